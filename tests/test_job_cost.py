"""Hours, gigabytes and bottleneck of a job (ctclip.job_cost). Reference: times worked out by hand."""

import pytest

from ctclip.job_cost import Phase, Stage, cost_table, limiting, pace, read_rate, reading_and_computing, write_rate

GB = 1e9
# 3,600 volumes: 2 s of a network link that all workers share; 1 s of reading beside 4 s of computing on each.
STREAM = Phase("", 3600, (
    Stage("fetch", "link", 2.0, 0.2 * GB, shared=True), Stage("read", "readers", 1.0), Stage("encode", "device", 4.0),
))  # fmt: skip


def test_known_rates_give_known_hours_and_bottlenecks():
    """One worker: 4 h of encoding, while the link is busy for 2 h. Four: 1 h of encoding each, the link still 2 h."""
    assert STREAM.seconds(1) == 4 * 3600 + 2 + 1  # the first volume is fetched and read before anything is encoded
    assert STREAM.seconds(4) == STREAM.seconds(32) == 2 * 3600 + 1 + 4
    assert [STREAM.bottleneck(workers).name for workers in (1, 2, 4, 32)] == ["encode", "fetch", "fetch", "fetch"]
    lines = [line.split("  ") for line in cost_table([STREAM])]
    cells = {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}
    assert cells == {
        "": ["1 worker", "4 workers", "32 workers", "GB moved"],
        "fetch (one for all)": ["2.0 h", "2.0 h", "2.0 h", "720"],
        "read": ["60 min", "15 min", "113 s"],
        "encode": ["4.0 h", "60 min", "8 min"],
        "whole job": ["4.0 h", "2.0 h", "2.0 h"],
        "bottleneck": ["encode", "fetch", "fetch"],
    }


def test_stages_of_one_resource_take_turns():
    """Without a reading process a worker reads, then computes: 5 s per volume."""
    assert pace(reading_and_computing(1.0, 4.0, 0, 0.5)) == 5.0
    assert pace(reading_and_computing(1.0, 4.0, 1, 0.5)) == 4.5  # reading takes its part of the CPUs
    assert pace(reading_and_computing(12.0, 4.0, 2, 0.0)) == 6.0
    alone = Phase("", 10, reading_and_computing(1.0, 4.0, 0, 0.5))
    assert alone.seconds(1) == 50 and alone.seconds(3) == 20  # the worker with most has 4 of them


def test_phases_follow_one_another_and_the_longest_names_the_bottleneck():
    """Start-up is not divided: with enough workers nothing is left but it."""
    training = Phase("train", 1000, (Stage("step", "device", 10.0),), start=60.0)
    phases = [STREAM, training, Phase("none", 0, (Stage("step", "device", 9e9),))]
    assert training.seconds(1) == 10_060 and training.seconds(1000) == 70
    assert limiting(phases, 1)[1].name == "encode" and limiting(phases, 32)[1].name == "fetch"
    assert limiting([STREAM._replace(volumes=900), training], 1)[1].name == "step"
    (total,) = (line for line in cost_table(phases) if line.startswith("whole job"))
    assert total.split()[2:] == ["6.8", "h", "2.7", "h", "2.1", "h"] and "none" not in "".join(cost_table(phases))


def test_the_disk_is_measured_and_left_as_it_was(tmp_path):
    assert 1e5 < write_rate(tmp_path) < 1e12 and not list(tmp_path.iterdir())
    (tmp_path / "file").write_bytes(bytes(3_000_000))
    assert 1e5 < read_rate([tmp_path / "file"]) < 1e12
    with pytest.raises(OSError):
        write_rate(tmp_path / "none")
