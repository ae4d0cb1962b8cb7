"""Seconds and memory of what a stream and a training run do before their first volume, for cohorts of any size.

    python tests/benchmarks/large_cohort.py [--volumes 47149 1000000]

Tables in CT-RATE's layout (two volumes to a patient), a manifest as a stream leaves it and an index of a code cache of
the published size, all made up; the records are holes in a file, so that no disk is needed for them. Printed are
processor time and the most memory beyond what there was before the step.
"""

import rows  # noqa: F401  puts the project on the path

# isort: split
import argparse
import json
import multiprocessing
import pickle
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from ctclip.data.cohort import Cohort, Streamed, listed_volumes, load_cohort, read_streamed, split_by_patient
from ctclip.data.ct_rate import labels_path, metadata_path, no_chest_path, streamed_path
from ctclip.data.feature_cache import FeatureCache
from ctclip.data.volume_key import cache_keys
from ctclip.hub.download import draw_patients
from ctclip.memory import process_memory, reset_peak_memory
from ctclip_model import ABNORMALITIES

RECORD = (24, 24, 24)  # code ids of the published size, uint16
KEY = {"kind": "codes", "shape": list(RECORD), "dtype": "uint16", "encoder_sha256": "0" * 64}


def name_of(number: int) -> str:
    return f"train_{number // 2 + 1}_a_{number % 2 + 1}.nii.gz"


def write_tables(folder: Path, count: int) -> None:
    """Labels, metadata, no-chest list, manifest and cache; one label in five is positive."""
    for path in (labels_path("train"), metadata_path("train")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    with open(folder / labels_path("train"), "w") as labels, open(folder / metadata_path("train"), "w") as metadata:
        labels.write(f"VolumeName,{','.join(ABNORMALITIES)}\n")
        metadata.write("VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing,PatientSex,PatientAge\n")
        for number in range(count):
            bits = zlib.crc32(str(number // 2).encode()) % 5**8
            row = ",".join("1" if (bits + 7 * label) % 5 == 0 else "0" for label in range(len(ABNORMALITIES)))
            labels.write(f"{name_of(number)},{row}\n")
            metadata.write(f'{name_of(number)},1.0,-1024.0,"[0.75, 0.75]",1.5,M,060Y\n')
    (folder / no_chest_path("train")).write_text("")
    with open(folder / streamed_path("train"), "w") as manifest:
        for number in range(count):
            entry = Streamed(True, 225_000_000, f"{number:016x}", f"{number:064x}", None)
            manifest.write(json.dumps({"name": name_of(number), **entry._asdict(), "time": 1.8e9}) + "\n")


def write_cache(folder: Path) -> None:
    """An entry of zeros for each volume of the cohort in `folder`."""
    store = folder / "cache"
    store.mkdir()
    volumes = load_cohort(folder, "train").volumes
    size = 2 * RECORD[0] * RECORD[1] * RECORD[2]
    crc32 = zlib.crc32(bytes(size))
    with open(store / "0000.jsonl", "w") as index, open(store / "0000.bin", "wb") as records:
        records.truncate(size * len(volumes))
        for number, (volume, key) in enumerate(zip(volumes, cache_keys(volumes), strict=True)):
            line = {"record": number, "name": volume.name, "source": key, "reading": "hu", "crc32": crc32}
            index.write(json.dumps(line) + "\n")


def listed(folder: Path) -> Cohort:
    return listed_volumes(folder, "train", fixed=True)


def gathered_names(folder: Path) -> list[set[str]]:
    """What `Shard.left_everywhere` holds on every process, of 8 that have all to do."""
    with open(folder / streamed_path("train"), "rb") as manifest:
        message = pickle.dumps([name_of(number) for number, _ in enumerate(manifest)])
    return [set(pickle.loads(message)) for _ in range(8)]


# Chains of steps, what -> function of what the step before it returned, the first of the folder.
CHAINS: list[dict[str, Callable]] = [
    {
        "tables -> volumes to fetch (listed_volumes)": listed,
        "draw of patients (draw_patients)": lambda cohort: draw_patients(cohort.volumes, 0),
    },
    {"manifest (read_streamed)": lambda folder: read_streamed(folder, "train")},
    {
        "tables, manifest, disk -> cohort (load_cohort)": lambda folder: load_cohort(folder, "train").volumes,
        "split by patient (split_by_patient)": lambda volumes: sum(split_by_patient(volumes, 0.1, 0), []),
        "keys of all volumes (cache_keys)": cache_keys,
    },
    {
        "index of the cache (FeatureCache)": lambda folder: FeatureCache.stored(folder / "cache", KEY),
        "CRC-32 of every record (verify)": lambda cache: cache.verify(range(len(cache._entries))),
    },
    {"names left to do, of 8 processes, on each (left_everywhere)": gathered_names},
]


def measure(chain: int, folder: Path) -> None:
    subject: object = folder
    for what, function in CHAINS[chain].items():
        reset_peak_memory()
        before, start = process_memory(), time.process_time()
        subject = function(subject)
        seconds, memory = time.process_time() - start, process_memory(peak=True) - before
        print(f"  {what:<60} {seconds:7.1f} s {memory / 1e6:7.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, nargs="+", default=[47_149, 1_000_000])
    for count in parser.parse_args().volumes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_tables(folder, count)
            write_cache(folder)
            sizes = {path.name: path.stat().st_size / 1e6 for path in folder.rglob("*.*") if path.suffix != ".bin"}
            print(f"{count:,} volumes; MB: " + ", ".join(f"{name} {size:.0f}" for name, size in sizes.items()))
            for chain in range(len(CHAINS)):
                process = multiprocessing.Process(target=measure, args=(chain, folder))
                process.start()
                process.join()


if __name__ == "__main__":
    main()
