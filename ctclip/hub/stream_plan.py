"""What a stream will cost, measured on a few volumes before it starts: `ctclip_setup.py --stream-cache --plan`.

They are fetched as the stream fetches, then read and encoded one by one. Nothing of them stays: no file, no codes, no
line in the manifest. Kept are the split's tables, which choosing volumes needs.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

from ctclip.data.ct_rate import COHORT
from ctclip.data.feature_cache import encoding
from ctclip.device_cost import measure_warm
from ctclip.fileio import nearest_existing
from ctclip.formatting import INDENT, duration, plural, print_row, size_text
from ctclip.hub import download
from ctclip.hub.client import HubError, file_lock, find_token
from ctclip.hub.download import CONNECTIONS, Downloader, Failures, Selection, Transfer
from ctclip.hub.streaming import StreamOptions, open_encoder, plan_disk, plan_stream, read, staged_path
from ctclip.job_cost import WORKERS, Phase, Stage, cost_table, reading_and_computing, total_seconds, write_rate
from ctclip.memory import available_cpus
from ctclip_model import CTCLIPMultiAbnormalityModel

SAMPLE = 2 * CONNECTIONS  # volumes; the second half only where the first came within ENOUGH
ENOUGH = 30  # seconds of fetching, and of reading and encoding at least two


@dataclass(frozen=True)
class StreamRates:
    """Of one process. Bytes per second that it fetches, over all its connections, and that its disk takes; seconds to
    read a byte of a file and to encode a volume; how many volumes were measured."""

    fetch: float
    write: float
    read: float
    encode: float
    volumes: int


def print_stream_plan(selection: Selection, options: StreamOptions) -> None:
    """Measures, and prints hours and GB of what `stream` has left to do. Raises what `stream` raises."""
    began, token = time.monotonic(), find_token()
    with file_lock(options.data_dir / COHORT):
        chosen = download.select_volumes(selection, options.data_dir, token)
        model, cache = open_encoder(options)
        on_disk, left = plan_stream(chosen, options, selection, cache, token)
        if not left:
            print_row("plan", "nothing is left to fetch")
            return
        _, room = plan_disk(options, cache, left)
        start = time.monotonic() - began
        rates = measure_stream(left, model, options, selection, token, room)
    device = next(model.parameters()).device
    mean = sum(transfer.size for transfer in left) / len(left)
    found = f"measured on {rates.volumes} of {plural(len(left), 'volume')}, {size_text(mean)} each on average: "
    found += f"{CONNECTIONS} at a time arrive with {size_text(rates.fetch)} per second; {duration(rates.read * mean)} "
    print_row("plan", f"{found}to read one, {duration(rates.encode)} to encode it on {device}")
    taken = rates.read * mean / available_cpus() if device.type == "cpu" else 0.0
    phases = stream_phases(rates, mean, len(left), cache.rows(on_disk).count(None), cache.record_bytes, taken, start)
    for line in cost_table(phases):
        print(f"{'':<{INDENT}}{line}", flush=True)
    apart = [phase._replace(stages=[stage._replace(shared=False) for stage in phase.stages]) for phase in phases]
    times = (f"{plural(count, 'worker')} {duration(total_seconds(apart, count))}" for count in WORKERS[1:])
    print_row("", f"whole job where each worker has a link of its own as fast as this one: {', '.join(times)}")
    print_row(
        "assumed",
        "a worker is a process with a device, a reading thread and a scratch disk of its own, as fast "
        "as those here; the link, and what the hub gives, is one for all; the other volumes take as long per "
        f"byte; nothing fails; each start takes {duration(start)}, as here (tables, sizes, weights, cache)",
    )
    print_row("", f"nothing was added to the cache; the tables are in {options.data_dir}")


def stream_phases(
    rates: StreamRates, size: float, fetched: int, here: int, record: int, taken: float, start: float
) -> list[Phase]:
    """Of so many volumes to fetch, `size` bytes each on average, and of `here` with a file to encode; `record`: bytes
    of a volume's codes. The rest as `reading_and_computing` and `Phase` have it."""
    link = Stage("fetch", "link", size / rates.fetch, size, shared=True)
    scratch = Stage("write file", "scratch disk", size / rates.write, size)
    work = reading_and_computing(rates.read * size, rates.encode, 1, taken)
    codes = Stage("write codes", "cache disk", record / rates.write, record, shared=True)
    stream = Phase("", fetched, (link, scratch, *work, codes), start)
    return [stream, Phase("files here", here, (*work, codes))]


def measure_stream(
    left: Sequence[Transfer],
    model: CTCLIPMultiAbnormalityModel,
    options: StreamOptions,
    selection: Selection,
    token: str,
    room: float,
) -> StreamRates:
    """Fetches, reads and encodes a few of the transfers, drawn at random, in a folder that is gone afterwards; `room`:
    bytes that they may have there."""
    drawn = random.Random().sample(list(left), min(SAMPLE, len(left)))
    totals = accumulate(transfer.size for transfer in drawn)
    drawn = drawn[: max(1, sum(total <= room for total in totals))]
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory(prefix=".stream-plan-", dir=nearest_existing(options.staging)) as name:
        places = [staged_path(Path(name), transfer.volume.name, selection.fixed) for transfer in drawn]
        sample = [
            replace(transfer, volume=replace(transfer.volume, path=path))
            for transfer, path in zip(drawn, places, strict=True)
        ]
        fetched, fetching = fetch(sample, token, room)
        read_bytes, reading, beginning = 0, 0.0, time.perf_counter()
        computing: list[float] = []
        for transfer in fetched:
            began = time.perf_counter()
            if len(computing) >= 2 and began - beginning > ENOUGH:
                break
            found = read(transfer, model.input_shape)
            if not isinstance(found, tuple):
                download.print_note(f"{transfer.volume.name}: {found or transfer.error}")
                continue
            reading += time.perf_counter() - began
            read_bytes += transfer.size
            volume = found[0][None].to(device)
            with encoding(model, device):
                computing.append(measure_warm(device, partial(model.encode_for_cache, volume)).seconds)
        if not computing:
            raise HubError(f"none of {plural(len(fetched), 'volume')} could be read", "run this again for others")
        written = write_rate(Path(name))
    arrived = sum(transfer.size for transfer in fetched)
    seconds = sum(computing) / len(computing)
    return StreamRates(arrived / fetching, written, reading / read_bytes, seconds, len(computing))


def fetch(sample: Sequence[Transfer], token: str, room: float) -> tuple[list[Transfer], float]:
    """-> (those that arrived, seconds): as many at a time as in a stream; the rest only if these were there soon."""
    failures, fetched, began = Failures(), [], time.perf_counter()
    for start in range(0, len(sample), CONNECTIONS):
        with Downloader(sample[start : start + CONNECTIONS], token, room) as downloader:
            fetched += [transfer for transfer in downloader if failures.add(transfer)]
        seconds = time.perf_counter() - began
        if seconds > ENOUGH:
            break
    if not fetched:
        failures.raise_if_any("nothing was kept")
    return fetched, seconds
