"""What a stream has left on a disk: cohort and manifests in D/, codes in C/, of a folder."""

import json
from pathlib import Path

from ctclip.data.cohort import read_streamed
from ctclip.data.feature_cache import FeatureCache
from ctclip.hub.streaming import bytes_in
from ctclip_model import CTCLIPMultiAbnormalityModel


def cache_of(folder: Path, weights: str) -> FeatureCache:
    return FeatureCache(folder, CTCLIPMultiAbnormalityModel(weights).eval())


def entries(cache: FeatureCache) -> dict[str, tuple]:
    """{name: (source, reading, CRC-32, codes)} of every line of the index, each name once."""
    lines = [
        (shard, json.loads(line))
        for shard in sorted(cache.folder.glob("*.jsonl"))
        for line in shard.read_text().splitlines()
    ]
    rows = cache.rows_of([line["source"] for _, line in lines])
    assert len({line["name"] for _, line in lines}) == len(lines)
    codes = cache.load(rows)
    return {
        line["name"]: (line["source"], line["reading"], line["crc32"], codes[i].tolist())
        for i, (_, line) in enumerate(lines)
    }


def volumes_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.nii.gz"))


def disk_in_use(folder: Path = Path()) -> int:
    """Bytes of codes, files in transit and manifests: all but the tables."""
    manifests = sum(path.stat().st_size for path in (folder / "D").glob("*.jsonl"))
    return manifests + bytes_in(folder / "C") + sum(map(bytes_in, (folder / "D").glob(".stream*")))


def manifest_lines(folder: Path) -> int:
    return len(read_streamed(folder / "D", "train"))
