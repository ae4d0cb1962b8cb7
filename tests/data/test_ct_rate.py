"""Tables -> cohort -> batches, against small cohorts written by hand in the hub's layout.

Checked: paths and names as the hub spells them; columns matched by name; every kind of bad row left out with a reason
and never in the way of the others; version 2 preferred to version 1; splits by patient; augmentation that follows from
seed and name alone; loaders that survive bad files and Ctrl-C.
"""

import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
import torch
from helpers_data import HEADER, META_HEADER, SMALL, chest, label_line, meta_line, put, tables, write

from ctclip.data.augmentation import augment
from ctclip.data.cohort import Volume, load_cohort, read_metadata
from ctclip.data.ct_rate import PREVALENCE, labels_path, metadata_path, no_chest_path, patient_of, scan_of, volume_path
from ctclip.data.loading import VolumeDataset, volume_loader
from ctclip.data.preprocessing import preprocess_volume
from ctclip.data.splits import split_by_patient
from ctclip.data.tables import CohortError
from ctclip_model import ABNORMALITIES

A, B, C = "valid_1_a_1.nii.gz", "valid_1_a_2.nii.gz", "valid_2_a_1.nii.gz"


@pytest.fixture
def data_dir(tmp_path):
    """A: version 2; B: version 1; C: both. B and C have a metadata row."""
    put(tmp_path, A, True, seed=1)
    put(tmp_path, B, False, seed=2)
    put(tmp_path, C, True, seed=3)
    put(tmp_path, C, False, seed=3)
    labels = [HEADER, label_line(A, (0, 17)), label_line(B, (0, 17)), label_line(C)]
    return tables(tmp_path, labels, [META_HEADER, meta_line(B), meta_line(C)], "")


def names(cohort):
    return [volume.name for volume in cohort.volumes]


# ------------------------------------------------------------------ layout and facts


def test_hub_layout():
    assert volume_path(A, True).as_posix() == f"dataset/valid_fixed/valid_1/valid_1_a/{A}"
    name = "train_12_b_2.nii.gz"
    assert volume_path(name, False).as_posix() == f"dataset/train/train_12/train_12_b/{name}"
    assert (patient_of(name), scan_of(name)) == ("train_12", "train_12_b")
    tables_of = [[f(s).as_posix() for s in ("train", "valid")] for f in (labels_path, metadata_path, no_chest_path)]
    assert tables_of == [
        [f"dataset/multi_abnormality_labels/{s}_predicted_labels.csv" for s in ("train", "valid")],
        [f"dataset/metadata/{s}_metadata.csv" for s in ("train", "validation")],
        [f"dataset/metadata/no_chest_{s}.txt" for s in ("train", "valid")],
    ]


def test_prevalence_is_the_published_one():
    """Pooled over the 18 labels it is 19.2 %."""
    assert tuple(PREVALENCE) == ABNORMALITIES and sum(PREVALENCE.values()) / 18 == pytest.approx(0.192, abs=5e-4)
    assert (PREVALENCE["Medical material"], PREVALENCE["Lung nodule"]) == (0.123, 0.454)


# ------------------------------------------------------------------ joining


def test_joins_and_prefers_the_fixed_version(data_dir):
    cohort = load_cohort(data_dir, "valid")
    assert names(cohort) == [A, B, C] and len(cohort) == 3 and not cohort.skipped
    a, b, c = cohort.volumes
    assert [v.path for v in (a, b, c)] == [data_dir / volume_path(n, n != B) for n in (A, B, C)]
    assert a.labels.dtype == np.float32 and np.flatnonzero(a.labels).tolist() == [0, 17] and not c.labels.any()
    assert a.metadata is None and b.metadata["RescaleIntercept"] == -1024 and b.metadata["ZSpacing"] == 12
    assert (a.patient, a.scan) == ("valid_1", "valid_1_a")
    assert cohort.summary().splitlines()[0] == "3 volumes, 2 scans, 2 patients"
    assert names(load_cohort(str(data_dir), "valid", limit=2)) == [A, B]


def test_columns_are_matched_by_name(data_dir):
    """Reversed columns, an extra one, spaces and a byte order mark change nothing."""
    table = (data_dir / labels_path("valid")).read_text().splitlines()
    turned = [",".join([*reversed(line.split(",")), "x"]) for line in table]
    turned[0] = "\ufeff" + turned[0].replace(",Cardiomegaly,", ", Cardiomegaly ,")
    tables(data_dir, turned)
    assert [np.flatnonzero(v.labels).tolist() for v in load_cohort(data_dir, "valid").volumes] == [[0, 17]] * 2 + [[]]


@pytest.mark.parametrize(
    ("path", "column"),
    [
        (labels_path("valid"), "VolumeName"),
        (labels_path("valid"), "Cardiomegaly"),
        (metadata_path("valid"), "VolumeName"),
        (metadata_path("valid"), "ZSpacing"),
    ],
)
def test_a_wrong_header_is_an_error_naming_the_column(data_dir, path, column):
    text = (data_dir / path).read_text()
    (data_dir / path).write_text(text.replace(column, "Other", 1))
    with pytest.raises(CohortError, match=f"{path.name}: found no column '{column}', expected VolumeName.*; "):
        load_cohort(data_dir, "valid")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00binary\x81", None])
def test_an_unreadable_label_table_is_an_error(data_dir, content):
    path = data_dir / labels_path("valid")
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CohortError) as caught:
        load_cohort(data_dir, "valid")
    assert "\n" not in str(caught.value) and path.name in str(caught.value) and "expected" in str(caught.value)


def test_bad_rows_are_left_out_with_their_reason(data_dir):
    """One bad row of every kind beside three good volumes."""
    rows, metadata, expected = [HEADER], [META_HEADER, meta_line(B), meta_line(C)], {}
    for name in (A, B, C):
        rows += [label_line(name)]
    rows += [label_line(A)]  # once more, the same

    def bad(number, reason, *labels, fixed=True, meta=None):
        name = f"valid_{number}_a_1.nii.gz"
        path = data_dir / volume_path(name, fixed)
        path.parent.mkdir(parents=True)
        path.touch()
        rows.extend(line.replace("NAME", name) for line in labels)
        metadata.extend([meta.replace("NAME", name)] if meta else [])
        expected[name] = reason

    good = label_line("NAME")
    bad(10, "contradictory label rows", good, label_line("NAME", (3,)))
    bad(11, "labels other than 0 and 1", good.replace("0,0", "0,0.5", 1))
    bad(12, "labels other than 0 and 1", good.replace("0,0", "0,yes", 1))
    bad(13, "labels other than 0 and 1", good.replace("0,0", "0,", 1))
    bad(14, "labels other than 0 and 1", "NAME,1")
    bad(15, "no label row", meta=meta_line("NAME"))
    needed = "(needed by a version-1 file)"
    bad(16, f"no metadata row {needed}", good, fixed=False)
    bad(17, f"no ZSpacing in its metadata row {needed}", good, fixed=False, meta=meta_line("NAME", ""))
    bad(18, "not a chest (no-chest list)", good)
    bad(19, "not a chest (no-chest list)", good)
    bad(20, f"contradictory metadata rows {needed}", good, fixed=False, meta=meta_line("NAME"))
    metadata.append(meta_line("valid_20_a_1.nii.gz", 5.0))
    rows += [label_line("valid_90_a_1.nii.gz"), label_line("valid_91_a_1.nii.gz")]
    no_chest = "valid_18_a_1\ndataset/valid/valid_19/valid_19_a/valid_19_a_1.nii.gz\nvalid_999_a_1.nii.gz\n\n"
    cohort = load_cohort(tables(data_dir, rows, metadata, no_chest), "valid")
    assert names(cohort) == [A, B, C]
    assert dict(cohort.skipped) == expected and len(cohort.skipped) == len(expected)
    assert cohort.not_on_disk == 2
    summary = cohort.summary()
    assert "not on disk: 2" in summary and "counted once: 1" in summary
    assert "skipped: 4 x labels other than 0 and 1: valid_11_a_1.nii.gz, valid_12_a_1.nii.gz, " in summary
    assert len(summary.splitlines()) < 15


def test_version_2_does_without_a_metadata_table(data_dir):
    (data_dir / metadata_path("valid")).unlink()
    (data_dir / no_chest_path("valid")).unlink()
    cohort = load_cohort(data_dir, "valid")
    assert names(cohort) == [A, C]
    assert cohort.skipped == [(B, "no metadata row (needed by a version-1 file)")]
    assert "no validation_metadata.csv" in cohort.summary() and "no no_chest_valid.txt" in cohort.summary()


def test_a_cell_too_many_does_not_shift_the_columns(data_dir):
    table = (data_dir / labels_path("valid")).read_text().splitlines()
    tables(data_dir, [table[0], *(line + ",1" for line in table[1:])])
    assert [np.flatnonzero(v.labels).tolist() for v in load_cohort(data_dir, "valid").volumes] == [[0, 17]] * 2 + [[]]


@pytest.mark.parametrize(
    ("labels", "told"),
    [([HEADER], "empty label table"), ([HEADER, label_line("valid_77_a_1.nii.gz")], "not on disk: 1")],
)
def test_an_empty_cohort_is_an_error(data_dir, labels, told):
    with pytest.raises(CohortError, match=f"no usable valid volume .*{told}"):
        load_cohort(tables(data_dir, labels, [META_HEADER]), "valid")


def test_wrong_folder_and_split_are_errors(data_dir):
    with pytest.raises(CohortError, match="found no folder .*expected"):
        load_cohort(data_dir / "nowhere", "valid")
    with pytest.raises(CohortError, match="found split 'test', expected"):
        load_cohort(data_dir, "test")
    with pytest.raises(CohortError, match="train_predicted_labels.csv"):
        load_cohort(data_dir, "train")


# ------------------------------------------------------------------ splitting


def people(patients, seed=0):
    """One to three reconstructions each, labels at CT-RATE's prevalence."""
    rng, prevalence = np.random.default_rng(seed), np.array(list(PREVALENCE.values()))
    for number in range(patients):
        labels = (rng.random(18) < prevalence).astype(np.float32)
        for reconstruction in range(rng.integers(1, 4)):
            name = f"train_{number}_a_{reconstruction + 1}.nii.gz"
            yield Volume(name, volume_path(name, True), labels)


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.25, 0.5, 0.999])
@pytest.mark.parametrize("patients", [2, 3, 50])
def test_split_keeps_patients_together(patients, fraction):
    volumes = list(people(patients))
    rest, held = split_by_patient(volumes, fraction, seed=1)
    sides = [{v.patient for v in side} for side in (rest, held)]
    assert all(sides) and not sides[0] & sides[1]
    assert sorted(v.name for v in rest + held) == sorted(v.name for v in volumes)
    assert len(sides[1]) == min(max(round(fraction * patients), 1), patients - 1)


def test_split_depends_on_the_seed_only():
    volumes = list(people(40))

    def held(order, seed):
        return {v.name for v in split_by_patient(order, 0.25, seed)[1]}

    assert held(volumes, 1) == held(volumes[::-1], 1) != held(volumes, 2)


def test_split_keeps_label_rates_alike():
    """400 patients, a quarter held out: on average over the labels at most half as far apart as in random splits."""
    volumes = list(people(400))

    def gap(held):
        inside = np.array([v.patient in held for v in volumes])
        labels = np.array([v.labels for v in volumes])
        return np.abs(labels[inside].mean(0) - labels[~inside].mean(0)).mean()

    patients, rng = sorted({v.patient for v in volumes}), np.random.default_rng(0)
    random = np.mean([gap(set(rng.choice(patients, 100, replace=False))) for _ in range(30)])
    for seed in range(5):
        assert gap({v.patient for v in split_by_patient(volumes, 0.25, seed)[1]}) < random / 2


@pytest.mark.parametrize(("patients", "fraction"), [(0, 0.5), (1, 0.5), (5, 0.0), (5, 1.0), (5, float("nan"))])
def test_impossible_splits_are_errors(patients, fraction):
    with pytest.raises(CohortError, match="at least 2 patients and a fraction"):
        split_by_patient(list(people(patients)), fraction, 0)


# ------------------------------------------------------------------ batches


@pytest.fixture
def mixed(data_dir):
    """The three good volumes with a truncated, a missing and an all-zero one between them."""
    volumes = load_cohort(data_dir, "valid").volumes
    truncated = data_dir / "truncated.nii.gz"
    truncated.write_bytes(volumes[0].path.read_bytes()[:2000])
    zero = write(data_dir / "zero.nii.gz", np.zeros_like(chest()))
    bad = [Volume(p.name, p, np.zeros(18, np.float32)) for p in (truncated, data_dir / "missing.nii.gz", zero)]
    return [volumes[0], bad[0], volumes[1], bad[1], bad[2], volumes[2]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_survives_bad_files(mixed, num_workers):
    loader = volume_loader(mixed, SMALL, batch_size=2, num_workers=num_workers)
    for _ in range(2):  # persistent workers: a second epoch works alike
        batches = list(loader)
        assert [b.index.tolist() for b in batches] == [[0], [2], [5]]
        assert [name for b in batches for name, _ in b.failures] == [
            "truncated.nii.gz",
            "missing.nii.gz",
            "zero.nii.gz",
        ]
    assert [[v.reading for v in b.decisions] for b in batches] == [["hu"], ["stored"], ["hu"]]
    for batch, volume in zip(batches, (mixed[0], mixed[2], mixed[5]), strict=True):
        assert batch.volumes.dtype == batch.labels.dtype == torch.float32 and batch.index.dtype == torch.int64
        assert torch.equal(batch.volumes[0], preprocess_volume(volume.path, volume.metadata and row_for(volume), SMALL))
        assert torch.equal(batch.labels[0], torch.from_numpy(volume.labels))
    reasons = dict(failure for b in batches for failure in b.failures)
    assert "truncated" in reasons["truncated.nii.gz"] and not reasons["zero.nii.gz"].startswith("zero.nii.gz")


def row_for(volume):
    """A version-2 file is HU: its row must not be applied."""
    return None if "valid_fixed" in volume.path.as_posix() else volume.metadata


def test_a_batch_of_failures_only_is_empty(mixed):
    (batch,) = volume_loader([mixed[1], mixed[3]], SMALL, batch_size=2)
    assert batch.volumes.shape == (0, 1, *SMALL) and batch.labels.shape == (0, 18) and batch.index.shape == (0,)
    assert len(batch.failures) == 2 and batch.decisions == []


def test_shuffle_follows_the_generator(mixed):
    good = [mixed[0], mixed[2], mixed[5]] * 4

    def order(seed):
        generator = torch.Generator().manual_seed(seed)
        return [int(b.index[0]) for b in volume_loader(good, SMALL, shuffle=True, generator=generator)]

    assert order(0) == order(0) != order(1) and sorted(order(0)) == list(range(12))


def test_dataset_checks_its_shape():
    with pytest.raises(ValueError, match="three positive numbers"):
        VolumeDataset([], (480, 480))
    assert len(VolumeDataset([], SMALL)) == 0


# ------------------------------------------------------------------ augmentation


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def marked():
    """Air with a bright block left of the middle, in the upper back: axes (z, x, y), x to the left."""
    volume = torch.full((1, 100, 100, 130), -1.0)
    volume[0, 70:80, 75:85, 100:110] = 0.9
    return volume


def test_augmentation_moves_a_little_and_never_mirrors():
    """The block stays where it was but for 3 % of each axis, and such moves do occur."""
    shifts = []
    for seed in range(40):
        volume = marked()
        assert augment(volume, seeded(seed)) is volume, "in place"
        assert volume.min() >= -1 and volume.max() <= 1 and volume.isfinite().all()
        block = (volume[0] > 0.4).nonzero()
        assert len(block) == 1000
        shifts.append((block.min(0).values - torch.tensor([70, 75, 100])).tolist())
    shifts = np.array(shifts)
    assert shifts.min(0).tolist() == [-3, -3, -4] and shifts.max(0).tolist() == [3, 3, 4]


def test_augmentation_moves_air_in_and_keeps_the_rest_in_place():
    """Every voxel has its own value: the voxel that lands somewhere is the one that should, all others are air."""
    before = torch.rand(1, 40, 50, 60, generator=seeded(0)) - 0.3
    for seed in range(8):
        after = augment(before.clone(), seeded(seed))[0]
        draws = seeded(seed)  # the order in which augment draws
        shift = [int(torch.randint(-most, most + 1, (), generator=draws)) for most in (1, 2, 2)]
        expected = torch.full_like(after, -1)
        to = tuple(slice(max(s, 0), n + min(s, 0)) for s, n in zip(shift, after.shape, strict=True))
        of = tuple(slice(max(-s, 0), n + min(-s, 0)) for s, n in zip(shift, after.shape, strict=True))
        expected[to] = before[0][of]
        inside = expected > -1
        gain, offset = np.polyfit(expected[inside], after[inside], 1)
        assert 0.95 <= gain <= 1.05 and -0.021 <= offset <= 0.021
        noise = after[inside] - gain * expected[inside] - offset
        assert noise.std() < 0.0201 and noise.abs().max() < 0.12
        assert (after[~inside] < -0.8).all()


def tensors(volumes, seed, **kwargs):
    """Name -> tensor of one epoch."""
    loader = volume_loader(volumes, SMALL, augment_seed=seed, **kwargs)
    return {volumes[int(batch.index[0])].name: batch.volumes[0].clone() for batch in loader}


def test_augmentation_follows_from_seed_and_name(data_dir):
    volumes = load_cohort(data_dir, "valid").volumes
    first = tensors(volumes, 7)
    for again in (
        tensors(volumes[::-1], 7),
        tensors(volumes[1:], 7),  # a resumed epoch
        tensors(volumes, 7, num_workers=2),
        tensors(volumes, 7, shuffle=True, generator=seeded(3)),
    ):
        assert again and all(torch.equal(tensor, first[name]) for name, tensor in again.items())
    other, plain = tensors(volumes, 8), tensors(volumes, None)
    assert len(first) == 3
    for volume in volumes:
        assert not torch.equal(other[volume.name], first[volume.name])
        untouched = preprocess_volume(volume.path, volume.metadata and row_for(volume), SMALL)
        assert torch.equal(plain[volume.name], untouched) and not torch.equal(first[volume.name], untouched)
    assert not torch.equal(first[A] - plain[A], first[C] - plain[C]), "every volume draws its own"


# ------------------------------------------------------------------ signals


class Telling(VolumeDataset):
    """Says who reads instead of reading: process and its group."""

    def __getitem__(self, index):
        return torch.tensor([os.getpid(), os.getpgid(0)])


@pytest.mark.skipif(sys.platform == "win32", reason="signals to a process group are a POSIX matter")
def test_workers_leave_stopping_to_the_main_process(monkeypatch):
    """Ctrl-C, sent to a worker, changes nothing; the main process can end it, whatever SIGTERM does to itself."""
    monkeypatch.setattr("ctclip.data.loading.VolumeDataset", Telling)
    monkeypatch.setattr(Telling, "collate", lambda self, items: items[0])
    before = signal.signal(signal.SIGTERM, lambda *arguments: None)
    try:
        loader = volume_loader([None] * 6, SMALL, num_workers=1)
        pids = []
        for pid, group in loader:
            assert group == pid != os.getpid()
            os.kill(int(pid), signal.SIGINT)
            pids.append(int(pid))
        assert len(pids) == 6 and len(set(pids)) == 1, "one worker, from the first to the last"
        (worker,) = (child for child in multiprocessing.active_children() if child.pid == pids[0])
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0
    finally:
        signal.signal(signal.SIGTERM, before)


def test_metadata_rows_for_subgroups(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(f"VolumeName,PatientAge,PatientSex,Rows\n{A}, 036Y ,F,512\n{B},,M,512\n{C},1Y,M,1\n{C},2Y,M,1\n")
    assert read_metadata(path) == {  # C is there twice, and differently
        A: {"PatientSex": "F", "PatientAge": "036Y"}, B: {"PatientSex": "M", "PatientAge": ""}}
    path.write_text(f"VolumeName,Rows\n{A},512\n")
    with pytest.raises(CohortError, match="found none of PatientSex.*expected at least one") as error:
        read_metadata(path)
    assert "\n" not in str(error.value)
