"""What identifies a volume in a cache: everything about it that decides its tensor."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ctclip.data.cohort import Volume
from ctclip.data.ct_rate import GEOMETRY_COLUMNS, is_version_2

SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of a bgzip-ed file; a block of it is no larger than a sample


def cache_key(volume: Volume) -> str | None:
    """Digest of everything about a volume that decides its tensor and its HU decision; None where there is neither a
    file nor a signature of it.

    Name, folder (version 2 or not), the geometry and scaling in the metadata row, and which file it is
    (`file_signature`). The decision on how to read the voxels follows from just these, by the code that
    PREPROCESSING_VERSION stands for: another decision is always another entry.
    """
    try:
        size, content = volume.signature or file_signature(volume.path)
    except OSError:  # reading it will fail as well, and say why
        return None
    row = volume.metadata and {column: volume.metadata.get(column) for column in GEOMETRY_COLUMNS}
    parts = [volume.name, is_version_2(volume.path), row, size, content]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def file_signature(path: Path) -> tuple[int, str | int]:
    """(size, last 8 bytes in hex) of a .gz file, (size, time of change in ns) of another. Raises OSError.

    The last bytes are CRC-32 and length of the content: known without reading it, and the same in a copy. Of a file in
    blocks (bgzip: an extra field in the header, an empty block at the end) they are the last block's only, so a digest
    of SAMPLES pieces of the file follows.
    """
    with open(path, "rb") as file:
        size, modified = os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_mtime_ns
        if path.suffix != ".gz":
            return size, modified
        extra_field = any(flags & 4 for flags in file.read(4)[3:])
        file.seek(max(0, size - 8))
        last = file.read(8)
        if last != bytes(8) and not extra_field:
            return size, last.hex()
        digest = hashlib.sha256()
        for piece in range(SAMPLES):  # evenly from the first byte to the last; all of a small file
            file.seek(max(0, size - SAMPLE_BYTES) * piece // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
        return size, last.hex() + digest.hexdigest()[:16]


def cache_keys(volumes: Sequence[Volume]) -> list[str | None]:
    """`cache_key` each; several at a time, because on a network file system each one waits for an answer."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(cache_key, volumes))
