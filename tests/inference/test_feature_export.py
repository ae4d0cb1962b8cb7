"""Exported latents and tokens against the model's own forward, the table beside them, interruptions, refusals.

Reference: `encode`, `code_ids` and the backbone's own maps, of the volumes as `read_volume` gives them. A cohort of
three small chests; a tiny CT-CLIP, a tiny vision transformer.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers_data import HEADER, A, B, C, chest, label_line, put, tables, write
from safetensors.numpy import load_file
from torch import nn

import run_task2
from ctclip.data.cohort import load_cohort
from ctclip.data.feature_cache import CacheError, FeatureCache, encode_missing
from ctclip.data.preprocessing import read_volume
from ctclip.distributed import Ranks
from ctclip.errors import UserError
from ctclip.evaluation.run_folder import list_names
from ctclip.inference import feature_export
from ctclip.inference.feature_export import cohort_items, export_features, export_lines, scan_items
from ctclip.inference.scans import Scan
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel

NAMES = [A, B, C]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A valid split alone; nobody knows the first volume's second finding."""
    folder = tmp_path_factory.mktemp("cohort")
    unknown = label_line(A, (0,)).replace(f"{A},1,0", f"{A},1,")
    tables(folder, [HEADER, unknown, label_line(B), label_line(C, (3,))])
    for seed, name in enumerate(NAMES):
        put(folder, name, True, seed)
    return folder


@pytest.fixture(scope="module")
def tower(tiny_classfine):
    return CTCLIPMultiAbnormalityModel(tiny_classfine).eval()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def voxels(folder, model):
    return [read_volume(volume, model.input_shape)[0][None] for volume in load_cohort(folder, "valid").volumes]


def read_back(folder):
    """As docs/predict.md says: {name: (n, ...)} in the order of the table, and the table."""
    table = pd.read_csv(folder / "features.csv")
    files = {name: load_file(folder / name) for name in table.File.unique()}
    names = files[table.File[0]]
    return {name: np.stack([files[file][name][row] for file, row in zip(table.File, table.Row, strict=True)])
            for name in names}, table  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [None, "codes", "grid"])
def test_latents_and_tokens_are_the_model_s_own(cohort, tower, tiny_classfine, tmp_path, tokens):
    export = export_features(cohort_items(cohort), tiny_classfine, tmp_path / "out", tokens)
    found, table = read_back(tmp_path / "out")
    assert list(table.VolumeName) == NAMES and list(table.PatientID) == ["valid_1", "valid_1", "valid_2"]
    assert list(table.columns[5:]) == list(ABNORMALITIES) and set(table.Split) == {"valid"}
    assert np.isnan(table[ABNORMALITIES[1]][0]) and table[ABNORMALITIES[1]][1] == 0 and table[ABNORMALITIES[3]][2] == 1
    assert export.origins == {"from the feature cache": 0, "encoded": 3, "there before": 0}
    assert set(found) == {"latent", *([tokens] if tokens else [])}
    codebook = tower.codebook.numpy()
    for i, x in enumerate(voxels(cohort, tower)):
        assert np.abs(found["latent"][i] - tower.encode(x)[0].numpy()).max() < 1e-6
        ids = tower.code_ids(x)[0].numpy()
        if tokens == "codes":
            assert (found["codes"][i] == ids).all() and found["codes"].dtype == np.int32
        if tokens == "grid":
            assert (found["grid"][i] == codebook[ids]).all() and found["grid"].dtype == np.float32
    assert np.abs(found["latent"][0] - found["latent"][2]).max() > 1e-3
    if tokens == "codes":
        assert (load_file(tmp_path / "out" / "codebook.safetensors")["codebook"] == codebook).all()
    printed = "\n".join(export_lines(export, "x.pt"))
    assert "3 volumes in 1 file (3 encoded); model x.pt" in printed
    assert f"latent (3, {tower.sizes.latent}) float32" in printed and ("codebook" in printed) == (tokens == "codes")


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """A saved slice variant whose head pools tokens behind CBAM, neither of which an export looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctclip_model.SLICE_INPUT_SHAPE", (12, 64, 64))
        torch.manual_seed(0)
        model = CTCLIPMultiAbnormalityModel(None, "test_vit", attention="cbam", pretrained=False, n_slices=2).eval()
        for parameter in model.backbone.parameters():
            nn.init.normal_(parameter, std=0.05)
        folder = tmp_path_factory.mktemp("slices")
        model.save_pretrained(folder)
        yield folder, model


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [None, "slice", "patch"])
def test_slices_are_the_backbone_s_own(cohort, slices, tmp_path, tokens):
    folder, model = slices
    export_features(cohort_items(cohort), folder, tmp_path / "out", tokens)
    found, _ = read_back(tmp_path / "out")
    (name,) = found
    for i, x in enumerate(voxels(cohort, model)):
        triplets = torch.stack([x[0, 0, middle - 1 : middle + 2] for middle in (3, 9)])
        maps = model.backbone(triplets)
        own = {"pooled": maps.mean((0, 2, 3)), "patch": maps.movedim(1, -1),
               "slice": model.backbone.forward_features(triplets)[:, 0]}[name]  # fmt: skip
        assert found[name][i].shape == own.shape
        assert np.abs(found[name][i] - own.numpy()).max() < (1e-3 if tokens else 1e-5) * own.abs().max()
    assert name == (tokens or "pooled") and found[name].dtype == (np.float16 if tokens else np.float32)


def test_what_the_cache_has_is_not_encoded_again(cohort, tower, tiny_classfine, tmp_path, monkeypatch):
    volumes = load_cohort(cohort, "valid").volumes
    encode_missing(tower, FeatureCache(tmp_path / "cache", tower), volumes[:2], torch.device("cpu"), 0, Ranks())
    export = export_features(cohort_items(cohort), tiny_classfine, "mixed", "codes", tmp_path / "cache")
    assert export.origins == {"from the feature cache": 2, "encoded": 1, "there before": 0}
    export_features(cohort_items(cohort), tiny_classfine, "encoded", "codes", tmp_path / "none")
    mixed, encoded = read_back(tmp_path / "mixed")[0], read_back(tmp_path / "encoded")[0]
    assert all((mixed[name] == encoded[name]).all() for name in ("latent", "codes"))


def test_an_interrupted_export_goes_on(cohort, tiny_classfine, tmp_path, monkeypatch):
    """Two volumes to a file; Ctrl-C at the third keeps both, and the third of the next time is in a file of its own."""
    monkeypatch.setattr(feature_export, "SHARD_VOLUMES", 2)
    computed, own = [], feature_export.features_of

    def interrupted(*args):
        if len(computed) == 1:
            raise KeyboardInterrupt
        computed.append(args)
        return own(*args)

    monkeypatch.setattr(feature_export, "features_of", interrupted)
    with pytest.raises(KeyboardInterrupt, match="kept in out: 1 volume; the same command goes on"):
        export_features(cohort_items(cohort), tiny_classfine, "out")
    first = tmp_path / "out" / "features-00000.safetensors"
    before = first.stat().st_mtime_ns
    assert not (tmp_path / "out" / "features.csv").exists() and len(load_file(first)["latent"]) == 1
    (tmp_path / "out" / "features-00001.safetensors.99.tmp").touch()  # as SIGKILL leaves it
    monkeypatch.setattr(feature_export, "features_of", own)
    list_names(tmp_path / "out", "features-00001.safetensors")
    export = export_features(cohort_items(cohort), tiny_classfine, "out")
    assert export.origins == {"from the feature cache": 0, "encoded": 2, "there before": 1}
    assert first.stat().st_mtime_ns == before and export.files == [first.name, "features-00001.safetensors"]
    assert not list((tmp_path / "out").glob("*.tmp"))
    export_features(cohort_items(cohort), tiny_classfine, "whole")
    assert (read_back(tmp_path / "out")[0]["latent"] == read_back(tmp_path / "whole")[0]["latent"]).all()


def test_what_is_not_its_own_is_never_replaced(cohort, tiny_classfine, slices, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "features.csv").write_text("mine")
    (tmp_path / "file").write_text("mine")
    export_features(cohort_items(cohort), tiny_classfine, "out")
    shard = tmp_path / "out" / "features-00000.safetensors"
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for output, checkpoint, tokens, line in (
        ("mine", tiny_classfine, None, "found features.csv, which no run or evaluation wrote"),
        ("file", tiny_classfine, None, "found a place that cannot be written"),
        ("out", tiny_classfine, "codes", "found features of another encoder or other tokens"),
        ("out", slices[0], None, "found features of another encoder or other tokens"),
        ("new", tiny_classfine, "patch", "found --export-tokens patch for CT-CLIP, expected codes or grid"),
        ("new", slices[0], "codes", "found --export-tokens codes for a slice backbone, expected slice or patch"),
    ):
        with pytest.raises(UserError, match=line):
            export_features(cohort_items(cohort), checkpoint, output, tokens)
    assert (tmp_path / "mine" / "features.csv").read_text() == "mine" == (tmp_path / "file").read_text()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "new").exists()
    shard.write_bytes(before[shard.name][:-1] + b"x")
    with pytest.raises(ValueError, match="found other content than was written"):
        export_features(cohort_items(cohort), tiny_classfine, "out")


def test_streamed_volumes_come_from_the_cache_alone(cohort, tiny_classfine, tmp_path):
    """Their files are gone; without an entry that is one line, before anything is made."""
    source = cohort_items(cohort)
    streamed = [item._replace(volume=replace(item.volume, signature=(1, "ab"))) for item in source.items]
    with pytest.raises(CacheError, match="found features of 0 of 3 volumes that were streamed and have no file"):
        export_features(source._replace(items=streamed), tiny_classfine, "out")
    assert not (tmp_path / "out").exists()


def test_a_dicom_series_is_known_by_all_its_files(tmp_path):
    (tmp_path / "s").mkdir()
    for name in ("1.dcm", "2.dcm"):
        (tmp_path / "s" / name).write_bytes(name.encode())
    scans = [Scan("s", tmp_path / "s"), Scan("s", tmp_path / "s" / "1.dcm", series="1.2")]
    keys = [item.key for item in scan_items(scans).items]
    assert keys == [item.key for item in scan_items(scans).items] and len(set(keys)) == 2
    (tmp_path / "s" / "2.dcm").write_bytes(b"another slice")
    assert not {*keys} & {item.key for item in scan_items(scans).items}


def test_a_video_resnet_has_no_tokens():
    model = SimpleNamespace(is_ctclip=False, is_video=True, cache_format="pooled", tokens="slice")
    assert feature_export._prepared(model, None).cache_format == "pooled"
    with pytest.raises(UserError, match="found --export-tokens patch for a video ResNet, expected none"):
        feature_export._prepared(model, "patch")


def test_a_full_disk_is_said_before_anything_is_encoded(cohort, tiny_classfine, monkeypatch):
    usage = feature_export.shutil.disk_usage
    monkeypatch.setattr(feature_export.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    monkeypatch.setattr(feature_export, "features_of", None)
    with pytest.raises(UserError, match=r"out: found 0\.00 MB free on its disk, expected \S+ MB for 3 volumes"):
        export_features(cohort_items(cohort), tiny_classfine, "out", "grid")


def test_the_command_exports_scans_and_names_those_that_it_cannot_read(tiny_classfine, tmp_path, capsys):
    for seed in range(2):
        write(tmp_path / "scans" / f"p{seed}.nii.gz", chest(seed=seed))
    (tmp_path / "scans" / "broken.nii.gz").write_bytes(b"\x1f\x8b broken")
    flags = ["--export", "features", "--checkpoint", tiny_classfine, "--input", "scans", "--output", "out"]
    assert run_task2.main(flags) == 2
    printed = capsys.readouterr()
    assert "error: out: 1 of 3 volumes could not be read and are not in it; they are named above" in printed.err
    assert "skipped: broken.nii.gz: " in printed.err and "2 volumes in 1 file (2 encoded)" in printed.out
    found, table = read_back(tmp_path / "out")
    assert list(table.columns) == ["VolumeName", "PatientID", "Split", "File", "Row"] and len(found["latent"]) == 2
    (tmp_path / "scans" / "broken.nii.gz").unlink()
    assert run_task2.main(flags) == 0
    assert "2 volumes in 1 file (2 there before)" in capsys.readouterr().out
    (tmp_path / "scans" / "p1.nii.gz").unlink()
    (tmp_path / "scans" / "p0.nii.gz").write_bytes(b"\x1f\x8b broken")
    assert run_task2.main(flags) == 2
    assert "error: out: none of 1 volume could be read" in capsys.readouterr().err
    assert len(read_back(tmp_path / "out")[1]) == 2  # of before


def test_the_command_exports_a_run_s_own_cohort_beside_it(cohort, tower, tmp_path, capsys):
    run = tmp_path / "results" / "run"
    tower.save_pretrained(run)
    findings = list(ABNORMALITIES[:4])
    record = {"config": {"cache_dir": "kept"}, "data_dir": str(cohort), "phantom": True, "labels": findings}
    (run / "run.json").write_text(json.dumps(record))
    assert run_task2.main(["--export", "features"]) == 0  # the newest run's
    printed = capsys.readouterr().out
    assert "results/run_features/features.csv: 3 volumes" in printed and "Model trained on phantoms." in printed
    assert list(read_back(tmp_path / "results" / "run_features")[1].columns[5:]) == findings


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "needs --data-dir, a cohort, or --input, scans"),
        (["--input", "x", "--data-dir", "y"], "found --data-dir, which goes with a cohort (no --input) only"),
        (["--data-dir", "nowhere", "--assume-hu"], "found --assume-hu, which goes with --input only"),
        (["--data-dir", "nowhere"], "found no folder nowhere"),
        (["--input", "nothing.nii.gz"], "found no such file or folder"),
        (["--epochs", "2"], "found --epochs, which goes with --mode full or --mode train only"),
    ],
)
def test_wrong_usage_is_one_line(tiny_classfine, tmp_path, capsys, flags, line):
    assert run_task2.main(["--export", "features", "--checkpoint", tiny_classfine, "--output", "out", *flags]) == 2
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1 and not list(tmp_path.iterdir())


def test_tokens_go_with_an_export_of_features_only(capsys):
    assert run_task2.main(["--export", "onnx", "--export-tokens", "codes"]) == 2
    assert "found --export-tokens, which goes with --export features only" in capsys.readouterr().err
