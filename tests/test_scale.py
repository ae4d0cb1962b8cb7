"""The simulated stream (benchmarks/scale.py) against the arithmetic of `--plan`, and what disturbs it.

Reference: ctclip.job_cost with the same rates, where nothing goes wrong.
"""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from scale import MB, Rates, Simulation, Trouble  # noqa: E402

EVEN = {"size": 100 * MB, "spread": 0.0, "start": 10.0}
CASES = {  # the bottleneck -> rates
    "encode": Rates(link=1000 * MB, connection=100 * MB, read=1.0, encode=2.0, **EVEN),
    "read": Rates(link=1000 * MB, connection=100 * MB, read=3.0, encode=0.5, **EVEN),
    "connections": Rates(link=1000 * MB, connection=10 * MB, read=0.5, encode=0.5, **EVEN),
    "link": Rates(link=50 * MB, connection=100 * MB, read=0.5, encode=0.5, turn=2.0, **EVEN),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("workers", [1, 3])
def test_an_undisturbed_stream_takes_what_the_arithmetic_says(name, workers):
    rates = CASES[name]
    phase = rates.phase(600, workers, elastic=True)
    assert phase.bottleneck(workers).name == name
    result = Simulation(rates, Trouble(), 600, workers).run()
    assert result.hours * 3600 == pytest.approx(phase.seconds(workers), rel=0.03)
    assert result.fetched_twice == result.encoded_twice == result.deaths == result.retries == 0
    assert result.idle == pytest.approx(1 - 600 * rates.encode / (workers * result.hours * 3600))


def test_no_more_is_staged_than_a_process_holds():
    """With room for two files a link that could bring three at a time is not used up."""
    rates = Rates(link=60 * MB, connection=20 * MB, read=0.1, encode=0.1, room=200 * MB, **EVEN)
    seconds = Simulation(rates, Trouble(), 300, 1).run().hours * 3600
    assert seconds > 1.3 * rates.phase(300, 1, True).seconds(1)


def test_a_death_stops_all_of_torchrun_and_one_of_shard():
    rates, trouble = CASES["encode"], Trouble(death_hours=0.1, replaced=60.0)
    free, elastic, shard = (
        Simulation(rates, each, 4000, 4, way).run()
        for each, way in ((Trouble(), True), (trouble, True), (trouble, False))
    )
    assert elastic.deaths > 2 and shard.deaths > 2
    # Each death costs all of them the replacement and a start, of which the arithmetic knows the least it can be.
    assert elastic.hours >= free.hours + elastic.deaths * 70 / 3600 > shard.hours > free.hours
    assert elastic.fetched_twice > shard.fetched_twice > 0 and elastic.encoded_twice > 0


def test_broken_transfers_go_on_from_their_last_byte():
    rates = CASES["link"]
    free, broken = (Simulation(rates, Trouble(failing=share), 600, 1).run() for share in (0.0, 0.05))
    assert broken.retries > 10 and broken.fetched_twice == 0
    assert broken.hours == pytest.approx(free.hours, rel=0.05)  # the others have the link meanwhile
