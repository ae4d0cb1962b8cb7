"""`--plan`: what it prints, what it leaves alone, and when it refuses.

References: listings of the folders before and after, counts of volumes, and hand-worked times and bytes.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from helpers_training import one_line

from ctclip import device_cost
from ctclip.data import loading
from ctclip.data.volume_file import VolumeError
from ctclip.device_cost import Cost
from ctclip.training import estimate
from ctclip.training.estimate import HEADROOM, Plan, ReadingCost, duration
from ctclip.training.loop import TrainingConfig, train
from ctclip_training import main

pytestmark = pytest.mark.usefixtures("fast")
NAMES = ["Device", "Volumes", "Reading", "Encoding", "Frozen", "Unfrozen", "Memory", "Disk", "Total"]


@pytest.fixture
def run(phantoms, tiny_classfine, tmp_path, monkeypatch, capsys):
    """Runs the script in an empty folder; returns (exit code, what it printed, what it complained)."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str) -> tuple[int, str, str]:
        code = main(["--data-dir", str(phantoms), "--ctclip-path", tiny_classfine, "--plan", *flags])
        return code, *capsys.readouterr()

    return call


def lines_of(out: str) -> dict[str, str]:
    """The block's lines by name, after whatever came before and ahead of the whole job's."""
    block = out[out.index("Plan (measured") : out.index("Whole job: ")].splitlines()[1:]
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in block if line.startswith("  "))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}
    assert found
    return found


def test_every_line_is_printed_and_nothing_is_written(run, phantoms, tmp_path):
    before = listing(phantoms)
    code, out, err = run()
    assert code == 0 and not err
    lines = lines_of(out)
    assert list(lines) == NAMES
    assert "nothing has been written" in out and out.count("not clinical performance") == 1
    assert not list(tmp_path.iterdir()) and listing(phantoms) == before
    train_volumes, tuning, missing = (int(n) for n in re.findall(r"\d+", lines["Volumes"]))
    assert train_volumes + tuning == missing == 40
    assert lines["Frozen"].startswith("20 epochs x ") and lines["Unfrozen"].startswith("2 epochs x ")
    assert "4 of 6 layers unfrozen at the end, batch 16, micro-batch 16, accumulation 1" in lines["Unfrozen"]
    assert lines["Device"].startswith("cpu, 1 thread, ") and lines["Device"].endswith("; float32")


def test_volumes_in_the_cache_are_not_counted_again(run, phantoms, tiny_classfine, tmp_path):
    cache = tmp_path / "cache"
    config = TrainingConfig(
        data_dir=str(phantoms), ctclip_path=tiny_classfine, cache_dir=str(cache), limit=24, epochs=1, freeze_epochs=1
    )
    train(config, tmp_path / "run")
    before = listing(tmp_path)
    code, out, _ = run("--cache-dir", str(cache))
    assert code == 0 and ", 16 not in the cache yet" in out
    code, out, _ = run("--cache-dir", str(cache), "--limit", "24")
    lines = lines_of(out)
    assert code == 0 and lines["Volumes"].endswith(", 0 not in the cache yet")
    assert lines["Encoding"] == "nothing left to encode" and lines["Disk"].startswith("cache 0.0 MB")
    assert listing(tmp_path) == before


def test_a_resumed_run_is_planned_with_its_own_settings(run, phantoms, tiny_classfine, tmp_path, capsys):
    folder = tmp_path / "run"
    config = TrainingConfig(data_dir=str(phantoms), ctclip_path=tiny_classfine, limit=24, epochs=3, freeze_epochs=3)
    train(config, folder)
    before = listing(folder)
    capsys.readouterr()
    assert main(["--plan", "--resume", str(folder)]) == 0
    assert lines_of(capsys.readouterr().out)["Frozen"].startswith("3 epochs x ")
    assert listing(folder) == before


def test_built_in_cohort_is_the_one_thing_written(tiny_classfine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--train-volumes", "12", "--valid-volumes", "6", "--ctclip-path", tiny_classfine]
    assert main(["--plan", *flags]) == 0
    out = capsys.readouterr().out
    assert "nothing but the built-in cohort has been written" in out
    assert out.count("not clinical performance") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_stages_that_do_not_take_place_cost_nothing(run):
    _, out, _ = run("--freeze-backbone")
    lines = lines_of(out)
    assert lines["Frozen"].startswith("22 epochs") and lines["Unfrozen"] == "none"
    _, out, _ = run("--freeze-epochs", "0", "--epochs", "2")
    lines = lines_of(out)
    assert lines["Encoding"] == lines["Frozen"] == "none" and lines["Volumes"].endswith(", 0 not in the cache yet")


def test_augmented_training_volumes_are_encoded_in_every_frozen_epoch(run):
    _, out, _ = run("--augment", "--head", "attention")
    lines = lines_of(out)
    _, tuning, missing = (int(n) for n in re.findall(r"\d+", lines["Volumes"]))
    assert missing == tuning > 0


@pytest.mark.parametrize(("free", "part"), [(1000, "--cache-dir elsewhere"), (3_000_000, "--output-dir elsewhere")])
def test_too_small_a_disk_is_refused_in_one_line(run, tmp_path, monkeypatch, free, part):
    usage = estimate.shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda folder: usage)
    code, out, err = run()
    assert code == 2 and one_line(err) and part in err and "MB free on its disk" in err and "Plan (" not in out


def test_disk_is_counted_at_its_fullest(run, tiny_classfine):
    _, out, _ = run("--freeze-backbone")
    weights = sum(4 * tensor.numel() for tensor in torch.load(tiny_classfine, weights_only=True).values())
    need = float(re.search(r"run ([\d.]+) MB", out)[1]) * 1e6
    # two copies of the weights for a moment, and states of the head (18 x 16 + 18 numbers, three times) beside figures;
    # the file has tensors that play no part
    assert estimate.SMALL_FILES + 1e5 < need < estimate.SMALL_FILES + 2 * weights + 2e5


@pytest.mark.parametrize("flags", [[], ["--freeze-backbone"]])
def test_too_little_memory_is_refused_in_one_line(run, monkeypatch, flags):
    monkeypatch.setattr(estimate, "available_memory", lambda device: 20_000_000)
    code, out, err = run(*flags)
    assert code == 2 and one_line(err) and "found 20.0 MB of memory, expected " in err and "Plan (" not in out
    for remedy in ("--unfreeze-layers 1", "--gradient-checkpointing on", "--freeze-backbone"):
        assert (remedy in err) == (not flags)


def test_remedies_in_use_are_not_proposed_again(run, monkeypatch):
    monkeypatch.setattr(estimate, "available_memory", lambda device: 20_000_000)
    _, _, err = run("--gradient-checkpointing", "on", "--unfreeze-layers", "1")
    assert "--unfreeze-layers" not in err and "--gradient-checkpointing" not in err and "--freeze-backbone" in err


def unknown_memory(monkeypatch) -> None:
    monkeypatch.setattr(device_cost, "system_memory", lambda: None)
    monkeypatch.setattr(device_cost, "process_memory", lambda peak: None)


@pytest.mark.parametrize("told", [True, False])  # by the system, how much there is
@pytest.mark.parametrize("stage", ["frozen", "unfrozen"])
def test_an_allocation_that_fails_is_refused_in_one_line(run, monkeypatch, stage, told):
    real = estimate.accumulate_gradients
    if not told:
        unknown_memory(monkeypatch)

    def fail(job, micro_batches, size):
        (micro_batch,) = micro_batches
        if micro_batch.cached == (stage == "frozen"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(job, iter([micro_batch]), size)

    monkeypatch.setattr(estimate, "accumulate_gradients", fail)
    code, _, err = run()
    assert code == 2 and one_line(err) and "memory, expected more for " in err
    assert ("found too little memory" in err) == (not told)
    assert ("--freeze-backbone" in err) == (stage == "unfrozen")


@pytest.mark.parametrize("seconds", [0.1, 20.0])  # measured at the size in question, or predicted
@pytest.mark.parametrize(("available", "size"), [(47e9, 8), (46e9, 4), (20e9, 2), (16e9, 1)])
def test_micro_batch_is_halved_until_it_fits(run, monkeypatch, available, size, seconds):
    """4 GB per volume on top of 10 GB: 1.1 x (10 + 4 n) are 15.4, 19.8, 28.6 and 46.2 GB for n = 1, 2, 4 and 8."""
    monkeypatch.setattr(estimate, "available_memory", lambda device: available)
    monkeypatch.setattr(estimate, "held_memory", lambda device, peak=False: 10e9)
    monkeypatch.setattr(Plan, "measure_pass", lambda plan, n: Cost(seconds * n, 10e9 + 4e9 * n))
    code, out, _ = run("--batch-size", "8")
    unfrozen = lines_of(out)["Unfrozen"]
    assert code == 0 and f"batch 8, micro-batch {size}, accumulation {8 // size}, " in unfrozen
    assert unfrozen.endswith(f"; add --micro-batch {size}: 8 do not fit") == (size < 8)
    assert lines_of(out)["Memory"].startswith(f"{HEADROOM * (10 + 4 * size):.1f} GB of ")


@pytest.mark.parametrize(("device", "size"), [("cuda", 8), ("cpu", 2)])
def test_what_cannot_end_the_process_is_tried_rather_than_predicted(run, monkeypatch, device, size):
    """1 GB per volume and 3 GB once on top of 10 GB: measured, 8 volumes need 1.1 x 21 = 23.1 GB; from the first alone,
    with 4 GB for each, 1.1 x 18 = 19.8 GB are predicted for 2 and 28.6 GB for 4."""
    real = Plan.fit_micro_batch

    def on_device(plan, wanted):
        here, plan.device = plan.device, torch.device(device)
        found = real(plan, wanted)
        plan.device = here
        return found

    monkeypatch.setattr(Plan, "fit_micro_batch", on_device)
    monkeypatch.setattr(estimate, "available_memory", lambda device: 24e9)
    monkeypatch.setattr(estimate, "held_memory", lambda device, peak=False: 10e9)
    monkeypatch.setattr(Plan, "measure_pass", lambda plan, n: Cost(0.1 * n, 13e9 + 1e9 * n))
    _, out, _ = run("--batch-size", "8")
    assert f"micro-batch {size}," in lines_of(out)["Unfrozen"]


def test_memory_that_nothing_tells_refuses_nothing(run, monkeypatch):
    unknown_memory(monkeypatch)
    code, out, _ = run()
    lines = lines_of(out)
    assert code == 0 and lines["Memory"] == "not known on this system" and "free memory not known" in lines["Device"]
    assert "micro-batch 16" in lines["Unfrozen"]


def test_a_measured_peak_contains_what_was_held_for_a_moment(run):
    if not device_cost.reset_peak_memory():
        pytest.skip("this system does not tell the peak of a process")
    cpu = torch.device("cpu")
    before = device_cost.held_memory(cpu)
    cost = device_cost.measure(cpu, lambda: torch.ones(50_000_000).sum())
    assert 190e6 < cost.peak - before < 300e6
    assert device_cost.measure(cpu, lambda: None).peak - before < 100e6


def test_unreadable_volumes_are_skipped_and_counted(run, monkeypatch):
    real, bad = loading.read_volume, []

    def sometimes(volume, shape):
        if len(bad) < 3:
            bad.append(volume.name)
            raise VolumeError(f"{volume.path.name}: found the end of the file, expected more")
        return real(volume, shape)

    monkeypatch.setattr(loading, "read_volume", sometimes)
    code, out, _ = run()
    assert code == 0 and "measured on 5 volumes, 3 more could not be read; nothing" in out
    assert all(f"skipped (training): {name}: found the end" in out for name in bad)


def test_a_cohort_that_cannot_be_read_is_refused_in_one_line(run, monkeypatch):
    def never(volume, shape):
        raise VolumeError(f"{volume.path.name}: found the end of the file, expected more")

    monkeypatch.setattr(loading, "read_volume", never)
    code, _, err = run()
    assert code == 2 and one_line(err) and "found 8 of 8 training volumes unreadable" in err


def test_a_loss_that_is_not_finite_is_refused_in_one_line(run, monkeypatch):
    real = loading.read_volume
    blank = lambda volume, shape: (real(volume, shape)[0] * math.nan, real(volume, shape)[1])  # noqa: E731
    monkeypatch.setattr(loading, "read_volume", blank)
    code, _, err = run("--freeze-epochs", "0")
    assert code == 2 and one_line(err) and "not finite" in err


def test_seconds_per_volume():
    """Read in 2 s, computed in 3 s, 4 CPUs: 5 s one after the other; beside computing 3 s, or 3.5 s where reading takes
    its share of the CPUs; where reading takes 40 s, 10 s with four processes and 40 s with one."""

    def pace(device: str, workers: int, seconds: float) -> float:
        plan = Plan.__new__(Plan)
        plan.workers, plan.device, plan.cpus = workers, torch.device(device), 4.0
        plan.reading = ReadingCost(seconds, 0.5, 1, 0, "", torch.empty(0), torch.empty(0))
        assert plan.seconds_per_volume(Cost(0.0, 0), again=True) <= 0.5  # what is kept
        return plan.seconds_per_volume(Cost(3.0, 0))

    assert pace("cpu", 0, 2.0) == pace("cuda", 0, 2.0) == 5.0
    assert pace("cuda", 2, 2.0) == 3.0 and pace("cpu", 2, 2.0) == 3.5
    assert pace("cuda", 4, 40.0) == pace("cuda", 8, 40.0) == 10.0 and pace("cuda", 1, 40.0) == 40.0


def test_times_are_short():
    assert [duration(s) for s in (0.00001, 0.21, 7.04, 119, 121, 7100, 7300)] == [
        "0.001 s", "0.21 s", "7 s", "119 s", "2 min", "118 min", "2.0 h",
    ]  # fmt: skip

