"""CT-RATE's tables and volumes from a hub, as files (ctclip.hub.download) and as codes by a small disk (streaming).

Reference: the phantoms that the tests' own hub serves (helpers_hub), the cache that encoding them from files gives,
what the hub saw, and sizes sampled while a stream runs. The client is the real huggingface_hub.
"""

import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_hub import NEWCOMER, TOKEN, Hub
from helpers_stream import cache_of, disk_in_use, entries, manifest_lines, volumes_in

import ctclip_setup
from ctclip.data import feature_cache, volume_file
from ctclip.data.cohort import Volume, listed_volumes, load_cohort, read_streamed
from ctclip.data.ct_rate import volume_path
from ctclip.data.feature_cache import FeatureCache, encode_missing
from ctclip.distributed import Ranks
from ctclip.environment import setup as setup_steps
from ctclip.hub import client as hub_client
from ctclip.hub import stream_plan, streaming
from ctclip.hub.download import choose, draw_patients
from ctclip.hub.stream_plan import StreamRates
from ctclip.shard import Shard
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def files(phantoms) -> dict[str, bytes]:
    """The phantoms as the hub would hold them: all of them as version 2, those that are not also as version 1."""
    found = {str(path.relative_to(phantoms)): path.read_bytes() for path in phantoms.rglob("*.*") if path.is_file()}
    return {key: value for key, value in found.items() if key.startswith("dataset/")}


@pytest.fixture
def hub(files, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_client, "WAITS", (0.02, 0.02))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub(dict(files)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def setup(hub, tmp_path, monkeypatch, capsys, tiny_classfine):
    """ctclip_setup's command line from its packages step on: setup("--data", ...) -> (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(setup_steps, "folders_step", lambda: None)
    monkeypatch.setattr(ctclip_setup, "packages_step", lambda requirements: None)

    def call(*arguments):
        try:
            code = ctclip_setup.main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse's way
            code = ended.code
        captured = capsys.readouterr()
        assert TOKEN not in captured.out + captured.err
        return code, " ".join(captured.out.split()), captured.err

    return call


# ---- which volumes


def made_up(patients: int, rate: float, seed: int) -> list[Volume]:
    generator = np.random.default_rng(seed)
    labels = (generator.random((patients, len(ABNORMALITIES))) < rate).astype(np.float32)
    return [
        Volume(f"train_{p}_a_{r}.nii.gz", Path("x"), labels[p]) for p in range(patients) for r in range(1, 2 + p % 2)
    ]


def test_the_first_patients_drawn_have_every_label():
    volumes = made_up(300, 0.05, 0)
    drawn = draw_patients(volumes, 0)
    assert sorted(drawn) == sorted({volume.patient for volume in volumes})
    assert drawn != draw_patients(volumes, 1) and drawn == draw_patients(volumes[::-1], 0)
    chosen = choose(volumes, None, 18, 0)
    assert len({volume.patient for volume in chosen}) == 18
    assert np.sum([volume.labels for volume in chosen], axis=0).min() >= 1
    by_chance = [volume for volume in volumes if volume.patient in sorted(drawn)[:18]]
    assert np.sum([volume.labels for volume in by_chance], axis=0).min() == 0  # as a plain draw of 18 would


def test_a_larger_draw_contains_the_smaller():
    volumes = made_up(100, 0.1, 1)
    few, more = choose(volumes, 10, None, 3), choose(volumes, 37, None, 3)
    assert len(few) in (9, 10) and len(more) in (36, 37) and more[: len(few)] == few
    assert choose(volumes, None, None, 3) == volumes


def test_a_number_of_volumes_takes_whole_patients():
    """As the guide says: as many as fit, one at least, where patients have one or two volumes."""
    volumes = made_up(30, 0.1, 1)
    of_patient = Counter(volume.patient for volume in volumes)
    for number in range(1, len(volumes) + 2):
        chosen = Counter(volume.patient for volume in choose(volumes, number, None, 3))
        assert all(of_patient[patient] == count for patient, count in chosen.items())
        assert max(number - 1, 1) <= chosen.total() <= max(number, 2) or number > len(volumes)


# ---- as files


def test_tables_arrive_and_are_not_fetched_twice(setup, hub, files):
    code, out, _ = setup("--data", "labels", "--data-dir", "D")
    assert code == 0 and "data train: 40 volumes, 32 patients, D valid: 16 volumes, 13 patients, D" in out
    tables = {str(path.relative_to("D")): path.read_bytes() for path in Path("D").rglob("*") if path.is_file()}
    assert tables == {key: value for key, value in files.items() if not key.endswith(".gz")} and len(tables) == 6
    hub.requests.clear()
    damaged = Path("D", "dataset/metadata/no_chest_valid.txt")
    damaged.write_text("valid_1_a_1.nii.gz")
    _, out, _ = setup("--data", "labels", "--data-dir", "D")
    assert hub.count("HEAD") == 6 and hub.count("GET") == hub.count("GET", "no_chest_valid.txt") == 1
    assert damaged.read_bytes() == files["dataset/metadata/no_chest_valid.txt"]
    assert damaged.with_name("no_chest_valid.before.txt").read_text() == "valid_1_a_1.nii.gz"  # somebody's own, perhaps


def test_a_volume_of_the_user_s_own_is_left_as_it_is_and_named(setup, hub):
    code, *_ = setup("--data", "valid", "--volumes", 3, "--data-dir", "D")
    own, before = next(Path("D").rglob("*.nii.gz")), volumes_in(Path("D"))
    own.write_bytes(b"mine")
    hub.requests.clear()
    code, out, error = setup("--data", "valid", "--volumes", 9, "--data-dir", "D")
    assert code == 2 and f"{own} is here with another size than on the hub, and left as it is" in out
    assert own.read_bytes() == b"mine" and set(volumes_in(Path("D"))) > set(before)
    assert "1 volumes could not be fetched" in error


def test_volumes_arrive_in_the_hubs_layout(setup, hub, files):
    twins = {key.replace("/valid/", "/valid_fixed/"): value for key, value in files.items() if "/valid/" in key}
    hub.files |= twins  # but for one
    gone = sorted(twins)[0]
    del hub.files[gone]
    code, out, _ = setup("--data", "valid", "--volumes", 5, "--data-dir", "D")
    assert code == 0 and "valid: 5 of 16 volumes" in out and "skipped: 1 x not a chest (no-chest list)" in out
    first = volumes_in(Path("D"))
    assert len(first) == 5 and "5 to fetch" in out
    assert sorted(volume.name for volume in load_cohort("D", "valid").volumes) == first
    paths = [str(volume_path(name, True)) for name in first]
    assert all(Path("D", path).read_bytes() == hub.files[path] for path in paths)
    hub.requests.clear()
    code, out, _ = setup("--data", "valid", "--patients", 13, "--data-dir", "D")
    assert code == 0 and "valid: 16 of 16 volumes, 13 patients" in out
    assert f"not on the hub: 1 volumes ({Path(gone).name}) 5 are here, 10 to fetch" in out
    assert set(first) < set(volumes_in(Path("D"))) and len(volumes_in(Path("D"))) == 15 and hub.count("GET") == 10
    assert not list(Path("D").rglob(".*"))  # nothing half, nothing left over


def test_volumes_of_a_mirror_that_tells_sizes_only_are_not_said_to_be_compared(setup, hub, monkeypatch):
    assert "each with the hub's checksum" in setup("--data", "valid", "--volumes", 1, "--data-dir", "D")[1]
    listed, hub.checksums = hub_client._listed, False
    sizes = lambda *args: {file: (size, "") for file, (size, _) in listed(*args).items()}  # noqa: E731
    monkeypatch.setattr(hub_client, "_listed", sizes)
    code, out, _ = setup("--data", "valid", "--volumes", 3, "--data-dir", "E")
    said = r"(\d) volumes, \S+ MB in \S+ s, \1 of them not checked: the hub told no checksum"
    assert code == 0 and re.search(said, out) and "the hub's checksum" not in out


def test_version_1_is_fetched_where_it_is_asked_for(setup):
    code, out, _ = setup("--data", "train", "--data-version", 1, "--data-dir", "D")
    assert code == 0 and "not on the hub: 32 volumes" in out
    assert len(volumes_in(Path("D", "dataset", "train"))) == 8 == len(volumes_in(Path("D")))


def test_the_repository_is_never_listed(setup, hub):
    setup("--data", "valid", "--volumes", 3, "--data-dir", "D")
    kinds = {path.split("/")[1] + "/" + path.split("/")[-2] for _, path, *_ in hub.requests if "api" in path}
    assert kinds == {"api/paths-info"}


def test_a_disk_too_small_is_said_before_anything_is_fetched(setup, hub, monkeypatch):
    setup("--data", "labels", "--data-dir", "D")
    hub.requests.clear()
    monkeypatch.setattr(hub_client.shutil, "disk_usage", lambda path: SimpleNamespace(free=51_000_000))
    code, _, error = setup("--data", "valid", "--data-dir", "D")
    assert code == 2 and hub.count("GET") == 0
    listed = {volume.name for volume in listed_volumes("D", "valid", True).volumes}
    total = sum(len(content) for path, content in hub.files.items() if "_fixed" in path and Path(path).name in listed)
    assert error == (
        f"error: the disk is too small: 51.00 MB free in D/, {(total + 5e7) / 1e6:.2f} MB needed; take fewer "
        "(--volumes, --patients), name a --data-dir on a larger disk, or keep only the codes of each volume with "
        "--stream-cache\n"
    )


def test_refused_tokens_end_with_one_line(setup, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", NEWCOMER)
    for arguments in (("--data", "labels"), ("--data", "valid", "--volumes", "2")):
        code, _, error = setup(*arguments)
        assert code == 2 and error == (
            "error: the token is valid, but its account has not accepted CT-RATE's terms (403); accept them with that "
            "account: https://huggingface.co/datasets/ibrahimhamamci/CT-RATE; then run this again\n"
        )
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, _, error = setup("--data", "labels")
    assert code == 2 and error == (
        "error: no Hugging Face token found; 1. accept the terms, once: "
        "https://huggingface.co/datasets/ibrahimhamamci/CT-RATE; 2. make a read token "
        "(https://huggingface.co/settings/tokens) and set it: export HF_TOKEN=hf_...; then run this again\n"
    )


USAGE = {
    "both": (("--data", "valid", "--volumes", "1", "--patients", "1"), "found --volumes and --patients, expected one"),
    "none": (("--data", "valid", "--volumes", "0"), "--volumes is 0, expected at least 1"),
    "idle": (("--data", "labels", "--patients", "3"), "found --patients, which goes with --data train or valid only"),
    "no data": (("--stream-cache",), "found --stream-cache, which goes with --data train or valid only"),
    "no stream": (("--data", "valid", "--disk-gb", "1"), "found --disk-gb, which goes with --stream-cache only"),
    "disk": (("--data", "valid", "--stream-cache", "--disk-gb", "0"), "--disk-gb is 0, expected more than 0"),
    "weights": (("--data", "valid", "--stream-cache", "--no-weights"), "--stream-cache needs weights to encode with"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors(setup, hub, case):
    arguments, said = USAGE[case]
    code, _, error = setup(*arguments)
    assert code == 2 and error.startswith(f"error: {said}") and error.count("\n") == 1 and hub.requests == []


# ---- as codes


@pytest.fixture
def stream(setup, tiny_classfine):
    def call(*arguments, split="train"):
        where = ("--data-dir", "D", "--cache-dir", "C", "--ctclip-path", tiny_classfine, "--device", "cpu")
        return setup("--data", split, "--stream-cache", *where, *arguments)

    return call


@pytest.fixture(scope="module")
def undisturbed(phantoms, tiny_classfine, tmp_path_factory) -> dict[str, tuple]:
    """What encoding the version-2 files of the train split from the disk gives."""
    folder = tmp_path_factory.mktemp("undisturbed")
    model = CTCLIPMultiAbnormalityModel(tiny_classfine).eval()
    cache = FeatureCache(folder, model)
    volumes = [volume for volume in load_cohort(phantoms, "train").volumes if "train_fixed" in str(volume.path)]
    encode_missing(model, cache, volumes, torch.device("cpu"), 0, Ranks())
    return entries(cache)


@pytest.fixture
def few(hub, undisturbed) -> dict[str, tuple]:
    """Has the hub hold no more than six volumes, of version 2; -> what `undisturbed` has of them."""
    kept = dict(sorted(undisturbed.items())[:6])
    hub.files = {path: file for path, file in hub.files.items() if path[-3:] != ".gz" or Path(path).name in kept}
    return kept


def test_a_stream_gives_the_cache_that_files_give(stream, hub, undisturbed, tiny_classfine):
    code, out, error = stream()
    assert code == 0, error
    assert "not on the hub: 8 volumes" in out and "32 to fetch" in out
    assert "stream 32 volumes encoded in" in out
    assert re.search(r"32/32 \[\d+:\d+, ETA 00:00, [\d.]+ vol/min, disk 0\.\d+ MB of 10\.00 GB\]", error)
    assert entries(cache_of("C", tiny_classfine)) == undisturbed and len(undisturbed) == 32
    assert volumes_in(Path("D")) == [] and not Path("D/.stream").exists()
    known = read_streamed("D", "train")
    assert set(known) == {(name, True) for name in undisturbed}
    assert all(entry.reason is None for entry in known.values())
    cohort = load_cohort("D", "train")
    assert len(cohort) == 32 and cohort.not_on_disk == 9  # eight are version 1, one is a head
    assert all(row is not None for row in cache_of("C", tiny_classfine).rows(cohort.volumes))

    hub.requests.clear()
    code, out, _ = stream()
    assert code == 0 and "32 are in the cache, 0 in quarantine, 0 have a file here, 0 to fetch" in out
    assert hub.count("GET") == 0


def test_the_next_volume_is_fetched_while_one_is_encoded(stream, hub, monkeypatch):
    """Encoding waits until the hub has been asked for more than the volumes that have been encoded by then."""
    encode, encoded = CTCLIPMultiAbnormalityModel.encode_for_cache, []

    def waiting(model, volume):
        end = time.monotonic() + 10
        while len(encoded) < 4 and hub.count("GET", ".gz") < len(encoded) + 2:
            assert time.monotonic() < end, "the next volume was not asked for"
            time.sleep(0.01)
        encoded.append(1)
        return encode(model, volume)

    monkeypatch.setattr(CTCLIPMultiAbnormalityModel, "encode_for_cache", waiting)
    code, _, error = stream("--volumes", 6)
    assert code == 0 and len(encoded) >= 5, error


@pytest.mark.parametrize("budget", [1_800_000, 4_000_000])
def test_disk_use_stays_under_the_budget(stream, hub, undisturbed, tiny_classfine, budget):
    hub.fault, hub.pause = lambda verb, path, n: "slow" if verb == "GET" else None, 0.002
    samples, over = [], threading.Event()

    def sample():
        while not over.wait(0.002):
            samples.append(disk_in_use())

    sampler = threading.Thread(target=sample)
    sampler.start()
    code, out, error = stream("--disk-gb", budget / 1e9, "--volumes", 16)
    over.set()
    sampler.join()
    assert code == 0, error
    assert len(samples) > 50 and max(samples) <= budget
    assert max(samples) > 0.5 * budget  # it is used as well
    assert f"disk: at most {budget / 1e6:.2f} MB" in out
    found = entries(cache_of("C", tiny_classfine))
    assert len(found) > 10 and all(found[name] == undisturbed[name] for name in found)


def test_a_budget_below_the_largest_volume_is_refused(stream, hub):
    code, _, error = stream("--disk-gb", 0.0005)
    assert code == 2 and hub.count("GET", ".gz") == 0 and error.count("\n") == 1
    assert error.startswith("error: found --disk-gb 0.0005, expected at least 1.")
    assert error.endswith("and the codes of 32 volumes; raise it, or choose fewer volumes\n")


def test_a_disk_with_less_than_that_is_refused(stream, hub, monkeypatch):
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path: SimpleNamespace(free=50_100_000))
    code, _, error = stream()
    assert code == 2 and hub.count("GET", ".gz") == 0 and error.count("\n") == 1
    assert error.startswith("error: the disk is too small: 50.10 MB free in D/.stream, 51.")
    remedy = "free some, or name a --data-dir, --scratch-dir and --cache-dir on larger disks\n"
    assert error.endswith(f"MB) and the codes of 32 volumes; {remedy}")


def test_a_cache_on_another_disk_is_checked_there(setup, stream, hub, monkeypatch, tmp_path):
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system, /dev/shm")
    setup("--data", "labels", "--data-dir", "D")
    with tempfile.TemporaryDirectory(dir=shared) as scratch:
        monkeypatch.setattr(
            streaming.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9 if "shm" in str(path) else 100)
        )
        code, _, error = stream("--scratch-dir", scratch)
        assert code == 2 and hub.count("GET", ".gz") == 0
        assert error.startswith("error: the disk is too small: 0.00 MB free in ")
        assert "needed for the codes of 32 volumes; free some" in error


def test_files_in_transit_can_be_elsewhere(stream, undisturbed, tiny_classfine, tmp_path, monkeypatch):
    """On Colab: tables, manifest and codes on Drive, where a deleted file goes to the bin, and files on the machine."""
    (tmp_path / "S").mkdir()
    (tmp_path / "S" / "mine.txt").write_text("not the stream's")
    seen, read = set(), streaming.read

    def noting(transfer, shape):
        seen.add(transfer.target.parents[3])
        return read(transfer, shape)

    monkeypatch.setattr(streaming, "read", noting)
    code, _, error = stream("--scratch-dir", tmp_path / "S", "--volumes", 6)
    assert code == 0, error
    assert seen == {tmp_path / "S" / ".stream"}
    assert [path.name for path in (tmp_path / "S").iterdir()] == ["mine.txt"]
    found = entries(cache_of("C", tiny_classfine))
    assert len(found) >= 5 and all(found[name] == undisturbed[name] for name in found)


def test_unreadable_volumes_are_quarantined_with_the_reason(stream, hub, files, few, tiny_classfine):
    names = sorted(few)[:2]
    paths = [str(volume_path(name, True)) for name in names]
    hub.files[paths[0]] = files[paths[0]][:5000]
    hub.files[paths[1]] = b"no gzip"
    code, out, _ = stream()
    assert code == 0 and "stream 4 volumes encoded" in out
    assert "in quarantine, with the reason in D/streamed_train.jsonl: 2" in out
    reasons = {name: entry.reason for (name, _), entry in read_streamed("D", "train").items() if entry.reason}
    assert set(reasons) == set(names)
    assert reasons[names[0]].startswith("found a truncated file") and "first bytes b'no g'" in reasons[names[1]]
    assert set(entries(cache_of("C", tiny_classfine))) == set(few) - set(names)
    left_out = dict(load_cohort("D", "train").skipped)
    assert left_out[names[0]] == f"quarantined: {reasons[names[0]]}"

    hub.requests.clear()
    code, out, _ = stream()
    assert "4 are in the cache, 2 in quarantine" in out and hub.count("GET") == 0
    hub.files[paths[0]] = files[paths[0]]  # mended on the hub
    code, out, _ = stream()
    assert "4 are in the cache, 1 in quarantine, 0 have a file here, 1 to fetch" in out
    assert entries(cache_of("C", tiny_classfine))[names[0]] == few[names[0]]


def test_volumes_with_a_warning_are_counted_in_one_line(stream, hub, few, monkeypatch):
    names, read = sorted(few)[:2], streaming.read_volume

    def noted(volume, shape):
        tensor, decision = read(volume, shape)
        return tensor, decision._replace(notes=("is this a chest?",) if volume.name in names else ())

    monkeypatch.setattr(streaming, "read_volume", noted)
    code, out, _ = stream()
    assert code == 0 and out.count("with a warning") == 1
    assert re.search(r"2 volumes with a warning, first (\S+): is this a chest\?", " ".join(out.split()))[1] in names


def test_the_same_reason_three_times_in_a_row_stops_the_stream(stream, hub, undisturbed, tiny_classfine):
    def down_after_five(verb, path, n):
        return "500" if path.endswith(".gz") and hub.count("GET", ".gz") >= 5 else None

    hub.fault = down_after_five
    code, out, error = stream()
    host = hub.url.removeprefix("http://")
    assert code == 2 and error.splitlines()[-1] == (
        f"error: {host} answered with an error of its own (500); nothing is wrong here: run this again later "
        "(https://status.huggingface.co)"
    )
    asked = hub.count("HEAD", ".gz")
    assert asked < 32 * 3  # it did not go through all of them
    hub.fault = lambda verb, path, n: None
    code, out, error = stream()
    assert code == 0 and "to fetch" in out and "0 are in the cache" not in out
    assert entries(cache_of("C", tiny_classfine)) == undisturbed


def test_one_volume_that_fails_does_not_stop_the_others(stream, hub, few, tiny_classfine):
    name = sorted(few)[5]
    hub.fault = lambda verb, path, n: "wrong" if verb == "GET" and path.endswith(name) else None
    code, out, error = stream()
    assert code == 2 and error.splitlines()[-1].startswith(
        f"error: 1 volumes could not be fetched ({name}): {name} did not arrive as it is on the hub: SHA-256"
    )
    assert "stream 5 volumes encoded" in out
    assert set(entries(cache_of("C", tiny_classfine))) == set(few) - {name}
    assert volumes_in(Path("D")) == [] and not list(Path("D/.stream").rglob("*.part"))


@pytest.mark.parametrize("fault", ["429", "503", "cut", "wrong"])
def test_what_passes_is_waited_for(stream, hub, undisturbed, tiny_classfine, monkeypatch, fault):
    """Of tables, of the list of sizes and of volumes."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    verbs = ("HEAD", "POST") if fault[0].isdigit() else ("GET",)
    hub.fault = lambda verb, path, n: fault if verb in verbs and n == 1 else None
    code, out, error = stream("--volumes", 6)
    assert code == 0, error
    found = entries(cache_of("C", tiny_classfine))
    assert len(found) >= 5 and all(found[name] == undisturbed[name] for name in found)
    assert fault == "cut" or "going on in 0 s" in out


def test_a_disk_that_does_not_give_a_file_back_is_not_the_volume_s_fault(stream, tiny_classfine, monkeypatch):
    fill, left = volume_file.StreamFile.fill, [2]

    def broken(self, buffer):
        try:
            if left[0] and ".stream" in str(self.path):
                left[0] -= 1
                raise OSError(5, "Input/output error")
        except OSError:
            raise volume_file.file_error(self.path, "damaged data (5)", "a readable file", "copy it again") from None
        return fill(self, buffer)

    monkeypatch.setattr(volume_file.StreamFile, "fill", broken)
    code, out, error = stream("--volumes", 6)
    assert code == 2 and "could not be read (Input/output error)" in error
    assert all(entry.reason is None for entry in read_streamed("D", "train").values())
    code, out, error = stream("--volumes", 6)
    assert code == 0 and len(entries(cache_of("C", tiny_classfine))) >= 5, error


def test_a_volume_replaced_by_another_of_its_size_is_new(stream, hub, files):
    stream("--volumes", 4)
    name = next(iter(read_streamed("D", "train")))[0]
    path = str(volume_path(name, True))
    hub.files[path] = files[path][:4] + bytes([files[path][4] ^ 1]) + files[path][5:]  # the time in the gzip header
    code, out, _ = stream("--volumes", 4)
    assert code == 0 and "1 to fetch" in out


def test_both_versions_of_a_volume_are_known_by_the_manifest(stream, hub, files, few):
    name = sorted(few)[0]
    hub.files[str(volume_path(name, False))] = files[str(volume_path(name, True))]
    for version in (2, 1, 2):
        code, out, error = stream("--data-version", version)
        assert code == 0, error
    assert "6 are in the cache, 0 in quarantine, 0 have a file here, 0 to fetch" in out
    cohort = load_cohort("D", "train")
    assert len(cohort) == 6 and "train_fixed" in str(next(v.path for v in cohort.volumes if v.name == name))


def test_a_full_disk_loses_no_line_of_the_manifest(stream, tiny_classfine, monkeypatch):
    """The file takes a part of the first line, then nothing: what is here stays, and the next stream goes on."""
    write, full = streaming.write_all, [True]

    def half(file, data):
        if full[0] and file.name.endswith("streamed_train.jsonl"):
            full[0] = False
            write(file, data[:30])
            raise OSError(28, "No space left on device", file.name)
        write(file, data)

    monkeypatch.setattr(streaming, "write_all", half)
    code, _, error = stream("--volumes", 4)
    assert code == 2 and error.splitlines()[-1].startswith("error: ") and "No space left on device" in error
    code, out, error = stream("--volumes", 4)
    known = read_streamed("D", "train")
    assert code == 0 and len(known) >= 3 and len(known) == len(entries(cache_of("C", tiny_classfine))), error


def test_what_the_hub_does_not_have_at_all_is_an_error(stream, setup, hub, files):
    hub.files = {path: content for path, content in files.items() if not path.endswith(".gz")}
    for call in (stream, lambda: setup("--data", "valid", "--data-dir", "D")):
        code, _, error = call()
        assert code == 2 and error.startswith("error: the hub has none of the ") and error.count("\n") == 1


def test_a_table_without_a_usable_row_is_an_error(setup, hub):
    table = "dataset/multi_abnormality_labels/valid_predicted_labels.csv"
    hub.files[table] = hub.files[table].splitlines()[0] + b"\n"
    code, _, error = setup("--data", "valid", "--volumes", 3, "--data-dir", "D")
    found = "found no usable volume (an empty table), expected at least one"
    assert code == 2 and error == f"error: D/{table}: {found}; see the hub's own table\n"


def test_files_that_are_here_are_encoded_and_stay(setup, stream, hub, tiny_classfine):
    setup("--data", "train", "--volumes", 4, "--data-dir", "D")
    here = volumes_in(Path("D"))
    hub.requests.clear()
    code, out, error = stream("--volumes", 8)
    assert code == 0 and f"{len(here)} have a file here" in out, error
    assert volumes_in(Path("D")) == here
    assert hub.count("GET", ".gz") == len(entries(cache_of("C", tiny_classfine))) - len(here)


@pytest.mark.parametrize("folder", ["D/dataset", "S/.stream"])
def test_a_second_process_for_a_cohort_or_scratch_folder_is_refused(setup, stream, hub, tmp_path, folder):
    calls = [lambda: stream("--scratch-dir", "S")]
    if folder == "D/dataset":
        calls += [lambda what=what: setup("--data", what, "--data-dir", "D") for what in ("labels", "valid")]
    with hub_client.file_lock(Path(folder)):
        ended = [call() for call in calls]
    place = tmp_path.resolve() / folder
    line = f"error: another process is at work on {place}; wait for it to end, then run this again\n"
    assert [(code, error) for code, _, error in ended] == [(2, line)] * len(calls) and hub.requests == []


def test_a_manifest_torn_by_a_kill_goes_on(stream, undisturbed, tiny_classfine):
    stream("--volumes", 4)
    manifest = Path("D", "streamed_train.jsonl")
    content = manifest.read_bytes()
    manifest.write_bytes(content[:-20])  # its codes are in the cache, but who knows of what
    code, out, error = stream()
    assert code == 0, error
    assert set(read_streamed("D", "train")) == {(name, True) for name in undisturbed}
    cache = cache_of("C", tiny_classfine)
    assert all(row is not None for row in cache.rows(load_cohort("D", "train").volumes))


def test_damaged_codes_are_fetched_again(stream, hub, undisturbed, tiny_classfine):
    stream("--volumes", 6)
    shard = next(Path("C").rglob("0000.bin"))
    content = bytearray(shard.read_bytes())
    content[3] ^= 0xFF
    shard.write_bytes(content)
    hub.requests.clear()
    code, out, _ = stream("--volumes", 6)
    assert code == 0 and "1 to fetch" in out and hub.count("GET", ".gz") == 1
    cache = cache_of("C", tiny_classfine)
    rows = cache.rows(load_cohort("D", "train").volumes)
    assert cache.verify(rows) == 0 and None not in rows


def test_weights_that_are_not_there_are_one_line(setup):
    code, _, error = setup("--data", "train", "--stream-cache", "--ctclip-path", "nowhere.pt", "--volumes", 2)
    assert code == 2 and error == (
        "error: CT-CLIP model not found: run python ctclip_setup.py first (no file at nowhere.pt)\n"
    )


# ---- killed


@contextmanager
def forked_setup(hub: Hub, folder: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    """tests/fork_setup.py in `folder`, for a stream with the arguments."""
    where = ["--data", "train", "--stream-cache", "--data-dir", "D", "--cache-dir", "C", "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, ROOT / "tests" / "fork_setup.py", hub.url, *where, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
        env=os.environ | {"HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1,localhost"},
    ) as server:  # fmt: skip
        yield server


def start_forked(server: subprocess.Popen, processes: int = 1) -> list[int]:
    server.stdin.write(f"{processes}\n")
    server.stdin.flush()
    return [int(child) for child in server.stdout.readline().split()]


def test_killed_at_ten_random_moments_a_stream_ends_in_the_same_cache(hub, undisturbed, tiny_classfine, tmp_path):
    hub.fault, hub.pause = lambda verb, path, n: "slow" if verb == "GET" else None, 0.01
    budget = 4_000_000
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    progress, most = [], 0
    flags = "--ctclip-path", tiny_classfine, "--disk-gb", str(budget / 1e9)
    with forked_setup(hub, tmp_path, *flags) as server:
        for lines in [*(moments.randrange(6) for _ in range(10)), None]:
            (child,) = start_forked(server)
            # So many lines further, or anywhere before the first one; and then at a random moment.
            start = begun = time.monotonic()
            after = moments.uniform(0, 0.2 if lines else 0.7)
            while not select.select([server.stdout], [], [], 0.005)[0] and time.monotonic() < start + 100:
                most = max(most, disk_in_use(tmp_path))
                if lines is not None and manifest_lines(tmp_path) < sum(progress[-1:]) + lines:
                    begun = time.monotonic()
                elif lines is not None and time.monotonic() > begun + after:
                    break
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(child, signal.SIGKILL)
            code = int(server.stdout.readline())
            most = max(most, disk_in_use(tmp_path))
            progress.append(manifest_lines(tmp_path))
    log = (tmp_path / "log.txt").read_text()
    assert code == 0, f"seed {seed}: {log[-2000:]}"
    assert entries(cache_of(tmp_path / "C", tiny_classfine)) == undisturbed, f"seed {seed}"
    assert progress[-1] == 32 and len(set(progress)) >= 4, f"seed {seed}: {progress}"  # killed in the midst of it
    assert any(first for verb, _, _, first in hub.requests if verb == "GET")  # transfers went on where they were cut
    assert most <= budget and volumes_in(tmp_path / "D") == []


def test_of_four_processes_one_is_killed_and_the_next_start_takes_over(hub, undisturbed, tiny_classfine, tmp_path):
    """As torchrun does it: when one dies, all are ended and started again."""
    hub.fault, hub.pause = lambda verb, path, n: "slow" if verb == "GET" else None, 0.01
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    progress = []
    with forked_setup(hub, tmp_path, "--ctclip-path", tiny_classfine) as server:
        for more in (moments.randrange(1, 8), moments.randrange(1, 8), None):
            children = start_forked(server, 4)
            end = time.monotonic() + 100
            while more and manifest_lines(tmp_path) < sum(progress[-1:]) + more and time.monotonic() < end:
                time.sleep(0.01)
            if more:
                moments.shuffle(children)
                for child in children:
                    os.kill(child, signal.SIGKILL)
                    time.sleep(moments.uniform(0, 0.1))
            codes = server.stdout.readline().split()
            progress.append(manifest_lines(tmp_path))
    log = (tmp_path / "log.txt").read_text()
    assert codes == ["0"] * 4, f"seed {seed}: {log[-2000:]}"
    assert entries(cache_of(tmp_path / "C", tiny_classfine)) == undisturbed, f"seed {seed}"  # each volume once
    assert 0 < progress[0] < progress[1] < 32 == progress[2], f"seed {seed}: {progress}"
    assert volumes_in(tmp_path / "D") == [] and list((tmp_path / "D").glob(".stream*")) == []
    assert log.count("32 to fetch") == 1 and re.search(r"stream [1-4]of4 +[0-9]+ volumes encoded", log)


def test_shards_on_machines_of_their_own_are_merged(setup, undisturbed, tiny_classfine, tmp_path, capsys):
    """Two disks; the caches are merged by the command, the second's manifest is copied to the first's."""
    def stream(shard: int) -> tuple:
        where = ("--data-dir", f"D{shard}", "--cache-dir", f"C{shard}", "--ctclip-path", tiny_classfine)
        return setup("--data", "train", "--stream-cache", "--shard", f"{shard}/2", "--device", "cpu", *where)

    for shard in (1, 2):
        code, out, error = stream(shard)
        assert code == 0 and f"part {shard} of 2: 20 volumes" in out and "16/16" in error
    names = [{name for name, _ in read_streamed(f"D{shard}", "train")} for shard in (1, 2)]
    assert not names[0] & names[1] and names[0] | names[1] == set(undisturbed)
    assert feature_cache.main(["merge", "C1", "C2"]) == 0
    assert f"{len(names[1])} entries taken" in capsys.readouterr().out
    assert entries(cache_of("C1", tiny_classfine)) == undisturbed
    shutil.copy("D2/streamed_train.2of2.jsonl", "D1")
    assert all(row is not None for row in cache_of("C1", tiny_classfine).rows(load_cohort("D1", "train").volumes))
    assert feature_cache.main(["merge", "C1", "C2"]) == 0
    assert "0 entries taken" in capsys.readouterr().out


@pytest.mark.parametrize(("shard", "found"), [("3/2", "3/2"), ("0/2", "0/2"), ("1", "1"), ("a/b", "a/b")])
def test_a_shard_that_is_none_is_one_line(stream, hub, shard, found):
    code, _, error = stream("--shard", shard)
    assert code == 2 and f"found --shard {found}, expected I/N" in error and error.count("\n") == 1


def test_torchrun_is_for_streams_and_divides_them_itself(stream, setup, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = stream("--shard", "1/2")
    assert code == 2 and "found --shard 1/2 with torchrun" in error
    code, _, error = setup("--doctor")
    assert code == 2 and error == (
        "error: found torchrun with ctclip_setup.py, expected --stream-cache; start it with python\n"
    )


def test_files_that_one_process_sees_are_its_own_and_others_are_divided(monkeypatch):
    """Ranks whose gathered values are given: what each of three sees."""
    files = [["a", "b", "c"], ["b", "c"], ["c", "d"]]
    left = [["u", "v", "w", "x", "y"], ["u", "w", "x", "y"], ["u", "w", "x", "y"]]  # v is done elsewhere

    def taken(rank: int, method: str, of_ranks: list[list[str]]) -> list[str]:
        ranks = Ranks.alone()
        ranks.rank, ranks.world = rank, 3
        monkeypatch.setattr(ranks, "all_gather", lambda value: of_ranks)
        return getattr(Shard(rank, 3, 1, ranks), method)(of_ranks[rank], str)

    seen = [taken(rank, "seen_here", files) for rank in range(3)]
    assert sorted(sum(seen, [])) == ["a", "b", "c", "d"] and "a" in seen[0] and "d" in seen[2]
    parts = [taken(rank, "left_everywhere", left) for rank in range(3)]
    assert sorted(sum(parts, [])) == ["u", "w", "x", "y"] and max(map(len, parts)) == 2


# ---- what it will take


def test_a_plan_measures_a_few_volumes_and_leaves_nothing(stream, hub, monkeypatch):
    code, out, error = stream("--plan")
    assert code == 0, error
    left_out = hub.files["dataset/metadata/no_chest_train.txt"].decode()
    fixed = {Path(path).name: content for path, content in hub.files.items() if path.startswith("dataset/train_fixed/")}
    sizes = [len(content) for name, content in fixed.items() if name not in left_out]
    assert f"measured on 6 of 32 volumes, {sum(sizes) / 32e6:.2f} MB each on average" in out and len(sizes) == 32
    assert hub.count("GET", ".nii.gz") == 6  # and no more
    assert re.search(rf"fetch \(one for all\) .+ {sum(sizes) / 1e9:.2g} write file .+ bottleneck ", out)
    assert not Path("C").exists() and not list(Path("D").rglob("*.gz")) and not list(Path("D").glob("*stream*"))
    # A second of the link, and 2 + 2 s of a worker, where reading takes its share of two CPUs: 32 volumes.
    known = StreamRates(fetch=sum(sizes) / 32, write=1e12, read=2 / (sum(sizes) / 32), encode=1.0, volumes=6)
    monkeypatch.setattr(stream_plan, "measure_stream", lambda *args: known)
    monkeypatch.setattr(stream_plan, "available_cpus", lambda: 2.0)
    _, out, _ = stream("--plan")
    assert "fetch (one for all) 32 s 32 s 32 s" in out and "read 64 s 16 s 2 s" in out and "encode 64 s 16 s 2 s" in out
    assert re.search("bottleneck (read|encode) fetch fetch", out)
    assert stream("--volumes", 30)[0] == 0
    left = 32 - len(read_streamed("D", "train"))
    assert 0 < left < 32 and f"measured on 6 of {left} volumes" in stream("--plan")[1]
    assert stream()[0] == 0 and "plan nothing is left to fetch" in stream("--plan")[1]


def test_a_plan_is_of_one_process_and_of_the_whole(setup, monkeypatch):
    code, _, error = setup("--data", "train", "--stream-cache", "--plan", "--shard", "1/2")
    assert code == 2 and error.startswith("error: found --shard, which goes with --stream-cache without --plan only")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = setup("--data", "train", "--stream-cache", "--plan")
    assert code == 2 and "expected one process for --plan; start it with python" in error
