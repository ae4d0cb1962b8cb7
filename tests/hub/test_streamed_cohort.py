"""A cohort whose files were encoded and deleted: tables, a manifest and the cache, against the same cohort on disk.

Checked: the cohort and its sources; what a manifest may look like; training, evaluation, planning and pictures through
their command lines; and what needs a file that is gone, refused in one line before anything is done.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import HEADER, META_HEADER, label_line, meta_line, put, tables
from helpers_training import damage, history, one_line, weights
from safetensors.torch import save_file

import ctclip_evaluation
import ctclip_training
from ctclip.data import loading
from ctclip.data.cohort import Streamed, Volume, load_cohort, read_streamed
from ctclip.data.ct_rate import SPLITS, streamed_path, volume_path
from ctclip.data.feature_cache import CacheError, FeatureCache, encode_missing
from ctclip.data.preprocessing import read_volume
from ctclip.data.tables import CohortError
from ctclip.data.volume_file import VolumeError
from ctclip.data.volume_key import cache_key, cache_keys
from ctclip.distributed import Ranks
from ctclip.evaluation import cases
from ctclip.evaluation.tables import load_predictions
from ctclip.inference.predictor import predict_volumes
from ctclip.training import logging
from ctclip_model import WRITTEN, CTCLIPMultiAbnormalityModel

CPU = torch.device("cpu")
A, B, C = "valid_1_a_1.nii.gz", "valid_2_a_1.nii.gz", "valid_3_a_1.nii.gz"
SCHEDULE = ["--epochs", "3", "--batch-size", "8", "--workers", "0"]


def line_of(path: Path, fixed: bool, reason: str | None = None) -> dict:
    """A manifest line, from all bytes of the file."""
    content = path.read_bytes()
    line = {"name": path.name, "fixed": fixed, "size": len(content), "tail": content[-8:].hex(), "sha256": None}
    return line | {"reason": reason}


def write_manifest(data_dir: Path, split: str, lines: list[dict]) -> None:
    (data_dir / streamed_path(split)).write_text("".join(json.dumps(line) + "\n" for line in lines))


def without_files(source: Path, target: Path) -> Path:
    """A copy of a cohort's tables, with a manifest of its files in place of them."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.nii.gz"))
    for split in SPLITS:
        lines = {}
        for folder in (split, f"{split}_fixed"):  # version 2 replaces version 1
            for path in sorted(source.glob(f"dataset/{folder}/*/*/*.nii.gz")):
                lines[path.name] = line_of(path, folder.endswith("_fixed"))
        assert len(lines) > 10
        write_manifest(target, split, list(lines.values()))
    assert not list(target.rglob("*.nii.gz"))
    return target


@pytest.fixture(scope="module")
def model(tiny_classfine):
    return CTCLIPMultiAbnormalityModel(tiny_classfine).eval()


@pytest.fixture(scope="module")
def streamed(phantoms, model, tmp_path_factory) -> tuple[Path, Path]:
    """(cohort without files, cache of both splits). Read-only."""
    folder = tmp_path_factory.mktemp("streamed")
    for split in SPLITS:
        cache = FeatureCache(folder / "cache", model)
        assert None not in encode_missing(model, cache, load_cohort(phantoms, split).volumes, CPU, 0, Ranks())
    return without_files(phantoms, folder / "cohort"), folder / "cache"


@pytest.fixture(autouse=True)
def no_figures(undrawn, monkeypatch):
    monkeypatch.setattr(logging, "write_training_figure", lambda *args: None)


def train_flags(data_dir: Path, cache_dir: Path, weights_file: str, *more: str) -> list[str]:
    more = more if "--freeze-backbone" in more else ("--freeze-epochs", "2", *more)
    return ["--data-dir", str(data_dir), "--cache-dir", str(cache_dir), "--ctclip-path", weights_file, *SCHEDULE, *more]


@pytest.fixture(scope="module")
def runs(phantoms, streamed, tiny_classfine, tmp_path_factory) -> tuple[Path, Path]:
    """(run with files and a cache of its own, run without files)."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "write_training_figure", lambda *args: None)
        for name, data_dir, cache_dir in (("disk", phantoms, folder / "cache"), ("streamed", *streamed)):
            flags = train_flags(data_dir, cache_dir, tiny_classfine, "--freeze-backbone")
            assert ctclip_training.main([*flags, "--output-dir", str(folder / name)]) == 0
    return folder / "disk", folder / "streamed"


def unfrozen(run: Path, target: Path) -> Path:
    """A copy of a run as unfrozen epochs would leave it: its encoder is not the one of the cache any more."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("predictions.csv", "labels.csv", WRITTEN))
    tensors = weights(run)
    name = next(name for name in tensors if name.startswith("visual_transformer.") and name.endswith("weight"))
    save_file(tensors | {name: tensors[name] * 1.01}, target / "model.safetensors")
    return target


def bring_back(volumes: list[Volume], source: Path, data_dir: Path) -> None:
    for volume in volumes:
        path = data_dir / volume.path.relative_to(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(volume.path, path)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}
    assert found
    return found


# ------------------------------------------------------------------ tables and manifest -> cohort


@pytest.mark.parametrize("split", SPLITS)
def test_the_cohort_is_the_one_on_disk(phantoms, streamed, split):
    disk, gone = load_cohort(phantoms, split), load_cohort(streamed[0], split)
    assert [v.name for v in gone.volumes] == [v.name for v in disk.volumes] and len(gone) >= 16
    assert {"train_fixed", "train", "valid_fixed", "valid"} > {v.path.parts[-4] for v in gone.volumes} != set()
    for here, there in zip(disk.volumes, gone.volumes, strict=True):
        assert np.array_equal(here.labels, there.labels) and here.metadata == there.metadata
        assert here.path.relative_to(phantoms) == there.path.relative_to(streamed[0])
        assert here.signature is None and there.signature is not None
    assert gone.skipped == disk.skipped != [] and gone.not_on_disk == disk.not_on_disk == 0
    told = f"without a file: {len(gone)} (streamed, known only by their cached codes)"
    assert told in gone.summary().splitlines() and "without a file" not in disk.summary()
    sources = cache_keys(gone.volumes)
    assert sources == cache_keys(disk.volumes) and None not in sources


def test_a_stamp_stands_for_the_whole_identity_of_a_file(tmp_path):
    """Another size, other last bytes, another folder or row give another source, as with files."""
    path = put(tmp_path, A, True)
    blank, line = np.zeros(18, np.float32), line_of(path, True)
    signature = line["size"], line["tail"]
    base = cache_key(Volume(A, path, blank))
    path.unlink()
    assert cache_key(Volume(A, path, blank, None, signature)) == base and cache_key(Volume(A, path, blank)) is None
    others = [
        Volume(A, path, blank, None, (signature[0] + 1, signature[1])),
        Volume(A, path, blank, None, (signature[0], signature[1][::-1])),
        Volume(A, tmp_path / volume_path(A, False), blank, None, signature),
        Volume(A, path, blank, {"ZSpacing": 1.0}, signature),
    ]
    assert len({base, *map(cache_key, others)}) == 5


@pytest.fixture
def small(tmp_path) -> Path:
    """Tables of A, B and C; on the disk A and B in version 2."""
    tables(tmp_path, [HEADER, *map(label_line, (A, B, C))], [META_HEADER, meta_line(B)], "")
    put(tmp_path, A, True)
    put(tmp_path, B, True)
    return tmp_path


def test_a_file_on_the_disk_wins_over_the_manifest(small):
    """Also over one that says that it could not be read, and over the version that it names."""
    lost = line_of(small / volume_path(A, True), False, "found damaged data")
    write_manifest(small, "valid", [lost, line_of(small / volume_path(B, True), False)])
    cohort = load_cohort(small, "valid")
    assert [v.name for v in cohort.volumes] == [A, B] and not cohort.skipped and cohort.not_on_disk == 1
    assert all(v.signature is None and v.path == small / volume_path(v.name, True) for v in cohort.volumes)
    (small / volume_path(B, True)).unlink()
    (volume,) = load_cohort(small, "valid").volumes[1:]
    assert volume.signature is not None and volume.path == small / volume_path(B, False)


def test_what_was_quarantined_is_left_out_with_its_reason(small):
    lines = [line_of(small / volume_path(name, True), fixed=True) for name in (A, B)]
    (small / volume_path(B, True)).unlink()
    write_manifest(small, "valid", [*lines, lines[1] | {"reason": "found a truncated file"}])
    cohort = load_cohort(small, "valid")
    assert [v.name for v in cohort.volumes] == [A] and cohort.skipped == [(B, "quarantined: found a truncated file")]
    assert f"skipped: 1 x quarantined: found a truncated file: {B}" in cohort.summary()
    write_manifest(small, "valid", [lines[1] | {"reason": "found a truncated file"}, lines[1]])  # read the second time
    assert [v.name for v in load_cohort(small, "valid").volumes] == [A, B]
    (small / volume_path(A, True)).unlink()
    write_manifest(small, "valid", [line | {"reason": "found air"} for line in lines])
    with pytest.raises(CohortError, match="no usable valid volume .*skipped: 2 x quarantined: found air"):
        load_cohort(small, "valid")


def test_a_streamed_version_1_needs_its_metadata_row(small):
    for name in (A, B):
        (small / volume_path(name, True)).unlink()
    write_manifest(small, "valid", [line_of(put(small, name, False), False) for name in (A, B)])
    for name in (A, B):
        (small / volume_path(name, False)).unlink()
    cohort = load_cohort(small, "valid")
    assert [v.name for v in cohort.volumes] == [B] and cohort.volumes[0].metadata["ZSpacing"] == 12
    assert cohort.skipped == [(A, "no metadata row (needed by a version-1 file)")]


def test_lines_that_are_none_are_ignored_and_the_last_counts(tmp_path):
    assert read_streamed(tmp_path, "valid") == {}
    line = {"name": A, "fixed": True, "size": 10, "tail": "00" * 8, "sha256": "ab", "reason": None}
    whole = json.dumps(line).encode()
    wrong = [{"name": [A]}, {"size": "10"}, {"fixed": 1}, {"tail": None}, {"reason": 3}]
    bad = [b"", b"[1]", b"null", b'"text"', bytes(40), b"\xff\xfe{", whole[:-9] + whole]
    bad += [json.dumps(line | {"size": 1} | change).encode() for change in wrong]
    bad += [json.dumps({key: line[key] for key in line if key != "tail"}).encode()]
    path = tmp_path / streamed_path("valid")
    path.write_bytes(b"\n".join([whole.replace(b"10", b"9"), whole, *bad]) + b"\n")
    assert read_streamed(tmp_path, "valid") == {(A, True): Streamed(True, 10, "00" * 8, "ab", None)}
    other = json.dumps(line | {"name": B, "more": 1}).encode()  # a later version may say more
    for cut in range(len(other) + 1):  # torn at every byte
        path.write_bytes(whole + b"\n" + other[:cut])
        known = [name for name, _ in read_streamed(tmp_path, "valid")]
        assert known == ([A, B] if cut == len(other) else [A])
    path.unlink()
    path.mkdir()
    with pytest.raises(CohortError, match=r"streamed_valid.jsonl: found an unreadable manifest \(Is a directory\)"):
        read_streamed(tmp_path, "valid")


def test_reading_voxels_that_are_gone_is_one_line(streamed):
    volume = load_cohort(streamed[0], "valid").volumes[0]
    with pytest.raises(VolumeError) as error:
        read_volume(volume, (20, 40, 40))
    assert str(error.value) == (
        f"{volume.name}: found no file (it was streamed), expected its features in the cache of this encoder; train "
        "with --freeze-backbone on that cache, or fetch the file with python ctclip_setup.py --data valid"
    )


# ------------------------------------------------------------------ training


def test_training_without_files_gives_the_weights_of_training_with_them(runs, streamed):
    disk, gone = runs
    assert (gone / "model.safetensors").read_bytes() == (disk / "model.safetensors").read_bytes()
    assert [{**line, "seconds": 0} for line in history(gone)] == [{**line, "seconds": 0} for line in history(disk)]
    for name in ("tuning_predictions.csv", "tuning_labels.csv"):
        assert (gone / name).read_bytes() == (disk / name).read_bytes()
    before, after = (json.loads((run / "run.json").read_text()) for run in runs)
    assert after["read_as"] == before["read_as"] and after["left_out"] == before["left_out"]
    assert not list(streamed[0].rglob("*.nii.gz"))


WITH_VOXELS = {
    (): ("unfrozen epochs", "add --freeze-backbone"),
    ("--augment", "--freeze-backbone"): ("--augment", "leave --augment out"),
    ("--augment",): ("unfrozen epochs and --augment", "add --freeze-backbone and leave --augment out"),
}


@pytest.mark.parametrize("flags", WITH_VOXELS)
@pytest.mark.parametrize("plan", [[], ["--plan"]])
def test_a_run_that_would_read_voxels_is_refused(streamed, tiny_classfine, tmp_path, capsys, flags, plan):
    folder = tmp_path / "run"
    argv = train_flags(*streamed, tiny_classfine, *flags, *plan, "--output-dir", str(folder))
    assert ctclip_training.main(argv) == 2 and not folder.exists()
    why, remedy = WITH_VOXELS[flags]
    assert capsys.readouterr().err == (
        f"error: {streamed[0]}: found 40 of 40 volumes without a file (streamed, only their codes are left), expected "
        f"files, because {why} read voxels; {remedy}, or fetch the files with python ctclip_setup.py --data train\n"
    )


def test_another_encoder_or_cache_is_refused_before_anything_is_encoded(streamed, tiny_classfine, tmp_path, capsys):
    state = torch.load(tiny_classfine, weights_only=True)
    name = next(name for name in state if "visual_transformer" in name and state[name].ndim == 2)
    torch.save(state | {name: state[name] * 1.01}, tmp_path / "other.pt")
    before = listing(streamed[1])
    for weights_file, cache_dir in ((str(tmp_path / "other.pt"), streamed[1]), (tiny_classfine, tmp_path / "cache")):
        for more in (["--plan"], []):
            run = str(tmp_path / f"run_{cache_dir.parent.name}")
            flags = train_flags(streamed[0], cache_dir, weights_file, "--freeze-backbone", *more)
            assert ctclip_training.main([*flags, "--output-dir", run]) == 2
            err = capsys.readouterr().err
            assert one_line(err) and err.startswith(f"error: {cache_dir}/codes-") and err.endswith(
                " volumes that were streamed and have no file, expected those of all; choose the --cache-dir and the "
                "encoder (--model, --ctclip-path) that they were streamed with, or fetch the files with python "
                "ctclip_setup.py --data train\n"
            )
            assert ": found features of 0 of " in err
    assert listing(streamed[1]) == before and not (tmp_path / "cache").exists()


def test_files_that_are_there_are_not_encoded_beside_a_volume_that_is_lost(phantoms, streamed, model, tmp_path):
    disk, gone = load_cohort(phantoms, "valid").volumes, load_cohort(streamed[0], "valid").volumes
    cache = FeatureCache(tmp_path / "cache", model)
    encode_missing(model, cache, disk[:2], CPU, 0, Ranks())
    mixed = [gone[0], disk[1], gone[2], disk[3]]
    with pytest.raises(CacheError, match="found features of 1 of 2 volumes that were streamed") as error:
        encode_missing(model, cache, mixed, CPU, 0, Ranks(), lambda *_: pytest.fail("encoded"))
    assert "\n" not in str(error.value)
    assert encode_missing(model, cache, [gone[0], *disk[1:4]], CPU, 0, Ranks()) == [0, 1, 2, 3]  # the others may be
    assert encode_missing(model, cache, mixed, CPU, 0, Ranks()) == [0, 1, 2, 3]


def test_a_plan_says_that_reading_is_not_measured(streamed, tiny_classfine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = listing(streamed[1])
    assert ctclip_training.main(train_flags(*streamed, tiny_classfine, "--freeze-backbone", "--plan")) == 0
    out = capsys.readouterr().out
    lines = {line[2:14].rstrip(): line[15:] for line in out[out.index("Plan (") :].splitlines() if line[:2] == "  "}
    assert lines["Reading"] == "not measured: the volumes were streamed and have no file"
    assert lines["Encoding"] == "nothing left to encode" and lines["Volumes"].endswith(", 0 not in the cache yet")
    assert lines["Frozen"].startswith("3 epochs x ") and lines["Unfrozen"] == "none" and "Total" in lines
    assert not list(tmp_path.iterdir()) and listing(streamed[1]) == before


def test_a_plan_measures_the_files_that_are_left(phantoms, streamed, tiny_classfine, tmp_path, monkeypatch, capsys):
    data_dir = tmp_path / "cohort"
    shutil.copytree(streamed[0], data_dir)
    bring_back(load_cohort(phantoms, "train").volumes[:12], phantoms, data_dir)
    cohort = load_cohort(data_dir, "train")
    assert sum(v.signature is None for v in cohort.volumes) == 12 and len(cohort) == 40
    monkeypatch.chdir(tmp_path)
    assert ctclip_training.main(train_flags(data_dir, streamed[1], tiny_classfine, "--freeze-backbone", "--plan")) == 0
    out = capsys.readouterr().out
    assert "Plan (measured on 8 volumes; nothing" in out and "per volume by the main process" in out


# ------------------------------------------------------------------ predictions


@pytest.mark.parametrize("head", ["linear", "attention"])
def test_logits_from_the_cache_are_those_from_the_file(phantoms, streamed, tiny_classfine, head, monkeypatch):
    torch.manual_seed(0)
    model = CTCLIPMultiAbnormalityModel(tiny_classfine, head=head).eval()
    for parameter in model.head_parameters():  # a new head answers 0
        torch.nn.init.normal_(parameter)
    cache = FeatureCache(streamed[1], model)
    read, expected = predict_volumes(model, load_cohort(phantoms, "valid").volumes, workers=0)
    sizes, inputs = [], FeatureCache.head_inputs
    monkeypatch.setattr(loading, "read_volume", lambda *_: pytest.fail("read a file"))
    monkeypatch.setattr(FeatureCache, "head_inputs", lambda *args: sizes.append(len(args[2])) or inputs(*args))
    again, logits = predict_volumes(model, load_cohort(streamed[0], "valid").volumes, 5, workers=0, cache=cache)
    assert again == read == list(range(16)) and sizes == [5, 5, 5, 1]  # token grids of a few volumes at a time
    assert (logits - expected).abs().max() < 1e-5 and logits.std() > 1e-3


def test_pooled_features_of_a_slice_backbone_do_as_well(phantoms, streamed, tmp_path):
    torch.manual_seed(0)
    model = CTCLIPMultiAbnormalityModel(None, "test_resnet", pretrained=False, n_slices=1).eval()
    disk = load_cohort(phantoms, "valid", limit=2).volumes
    _, expected = predict_volumes(model, disk, workers=0)
    cache = FeatureCache(tmp_path, model)
    encode_missing(model, cache, disk, CPU, 0, Ranks())
    read, logits = predict_volumes(model, load_cohort(streamed[0], "valid", limit=2).volumes, workers=0, cache=cache)
    assert read == [0, 1] and (logits - expected).abs().max() < 1e-5


def test_files_entries_and_losses_side_by_side(phantoms, streamed, model, tmp_path):
    """Of six volumes: streamed and stored; streamed and damaged in the cache; on disk and stored; on disk, damaged in
    the cache; on disk only; streamed and unknown to the cache."""
    disk, gone = (load_cohort(folder, "valid", limit=6).volumes for folder in (phantoms, streamed[0]))
    _, expected = predict_volumes(model, disk, workers=0)
    cache = FeatureCache(tmp_path / "cache", model)
    for one in (disk[0:1], disk[1:2], disk[2:3], disk[3:4]):
        encode_missing(model, cache, one, CPU, 0, Ranks())
    damage(cache.folder / "0001.bin")
    damage(cache.folder / "0003.bin")
    before = listing(cache.folder)
    volumes, seen = [gone[0], gone[1], disk[2], disk[3], disk[4], gone[5]], []
    cache = FeatureCache(tmp_path / "cache", model)
    read, logits = predict_volumes(model, volumes, 2, 0, lambda batch: seen.append(batch), cache=cache)
    assert read == [0, 2, 3, 4] and (logits - expected[read]).abs().max() < 1e-5
    failures = [failure for batch in seen for failure in batch.failures]
    assert [name for name, _ in failures] == [volumes[1].name, volumes[5].name]
    assert all(reason.startswith("found no file (it was streamed), expected its features") for _, reason in failures)
    assert sorted(i for batch in seen for i in batch.index.tolist()) == [3, 4]
    assert listing(cache.folder) == before


def test_evaluation_without_files_gives_the_predictions_of_evaluation_with_them(runs, streamed, tmp_path, capsys):
    before = listing(streamed[1])
    flags = ["--resamples", "100", "--pictures", "0"]
    for run, more in zip(runs, (flags, flags[:2]), strict=True):
        assert ctclip_evaluation.main(["--checkpoint", str(run), "--workers", "0", *more]) == 0
    out, err = capsys.readouterr()
    disk, gone = (load_predictions(run / "predictions.csv") for run in runs)
    assert list(gone.index) == list(disk.index) and len(gone) == 16
    assert np.abs(gone.to_numpy() - disk.to_numpy()).max() < 1e-5
    assert (runs[0] / "labels.csv").read_bytes() == (runs[1] / "labels.csv").read_bytes()
    first, second = (json.loads((run / "metrics.json").read_text()) for run in runs)
    assert second["n_volumes"] == 16
    assert second["tuned"]["auroc_macro"] == pytest.approx(first["tuned"]["auroc_macro"], abs=1e-3)
    assert "without a file: 16 (streamed" in out and "skipped: " not in err
    (told,) = (line for line in out.splitlines() if line.startswith("No picture of "))
    assert told.endswith(": streamed, and their files not kept; python ctclip_setup.py --data valid fetches them")
    assert listing(streamed[1]) == before


def test_a_picture_that_can_be_made_is_made(phantoms, streamed, tmp_path):
    data_dir = tmp_path / "cohort"
    shutil.copytree(streamed[0], data_dir)
    volumes = load_cohort(phantoms, "valid", limit=3).volumes
    bring_back(volumes[:1], phantoms, data_dir)
    listed = [cases.Case("Emphysema", "missed", volume.name, 0.5, 0.5) for volume in volumes]
    pictured, failures = cases.with_pictures(listed, "volume", data_dir, 3)
    assert [case.picture is not None for case in pictured] == [True, False, False]
    assert [name for name, _ in failures] == ["2 volumes"]


def test_an_encoder_that_moved_on_does_not_find_its_volumes(phantoms, runs, streamed, tmp_path, capsys):
    """Of an unfrozen run: refused in one line where nothing is left, a line for each volume where one file is."""
    run = unfrozen(runs[1], tmp_path / "run")
    argv = ["--checkpoint", str(run), "--workers", "0"]
    assert ctclip_evaluation.main(argv) == 2
    err = capsys.readouterr().err
    folder = FeatureCache(streamed[1], CTCLIPMultiAbnormalityModel.from_pretrained(run)).folder
    assert err == (
        f"error: {streamed[0]}: found none of the 16 volumes on disk (they were streamed) and none in {folder}, "
        "expected them in the cache of this encoder; evaluate a run that was trained with --freeze-backbone on the "
        "cache they were streamed into, or fetch the files with python ctclip_setup.py --data valid\n"
    )
    record = json.loads((run / "run.json").read_text())
    record["config"]["cache_dir"] = str(tmp_path / "moved")
    (run / "run.json").write_text(json.dumps(record))
    assert ctclip_evaluation.main(argv) == 2
    err = capsys.readouterr().err
    assert one_line(err) and f"and none in {tmp_path / 'moved'} (no such folder), expected" in err
    assert not (tmp_path / "moved").exists()

    data_dir = tmp_path / "cohort"
    shutil.copytree(streamed[0], data_dir)
    volume = load_cohort(phantoms, "valid").volumes[5]
    bring_back([volume], phantoms, data_dir)
    assert ctclip_evaluation.main([*argv, "--data-dir", str(data_dir), "--pictures", "0"]) == 0
    err = capsys.readouterr().err
    assert list(load_predictions(run / "on_cohort" / "predictions.csv").index) == [volume.name]
    assert err.count("skipped: ") == 15
    assert err.count("found no file (it was streamed), expected its features in the cache of this encoder") == 15
