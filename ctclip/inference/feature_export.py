"""Latents and tokens of volumes for other tools: safetensors files of bounded size, and a CSV that says what is where.

    from ctclip.inference.feature_export import cohort_items, export_features
    export_features(cohort_items("data/ct_rate"), "results/RUN", "features", tokens="codes")

    features/features.csv                   VolumeName, PatientID, Split, File, Row, and the findings (empty: unknown)
    features/features-00000.safetensors     tensors (n, ...): row i of each belongs to the volume whose Row is i
    features/codebook.safetensors           with `codes`: `codebook` (codes, C) float32

Tensors, n volumes each (docs/predict.md has them as a table): of CT-CLIP `latent` (n, L), and `codes` (n, T, h, w) or
`grid` (n, T, h, w, C); of a slice backbone `pooled` (n, C), or `slice` (n, S, C), or `patch` (n, S, h, w, C); of a
video ResNet `pooled`.

A file is written whole or not at all and never again: what an interrupted export has written is taken up by the next
one of the same encoder into the same folder, and only the table is replaced.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ctclip.config import TrainingConfig
from ctclip.data.cohort import Volume, load_cohort
from ctclip.data.ct_rate import SPLITS, labels_path
from ctclip.data.feature_cache import CacheError, FeatureCache, encoding, tensors_sha256
from ctclip.data.loading import read_ahead
from ctclip.data.readers import FILE_SUFFIXES
from ctclip.data.tables import NAME_COLUMN, PATIENT_COLUMN
from ctclip.data.volume_key import cache_key, cache_keys
from ctclip.errors import UserError
from ctclip.evaluation.run_folder import LOCK, check_names, is_left_over, own_files, writing
from ctclip.fileio import check_writable, locked, make_folder, replacing
from ctclip.formatting import BAR, plural, size_text
from ctclip.inference.predictions import model_note
from ctclip.inference.predictor import choose_workers, load_encoder
from ctclip.inference.scans import Scan
from ctclip_model import ABNORMALITIES, UNKNOWN, CTCLIPMultiAbnormalityModel, check_written

TABLE, CODEBOOK, SHARD = "features.csv", "codebook.safetensors", re.compile(r"features-(\d{5,})\.safetensors")
SHARD_VOLUMES, SHARD_BYTES = 256, 2**27  # at most so many in a file, and in memory; one volume may be larger
TOKENS = {"CT-CLIP": ("codes", "grid"), "a slice backbone": ("slice", "patch")}
TYPES = {"F32": "float32", "F16": "float16", "I32": "int32"}  # safetensors' names of what is written
ANOTHER_OUTPUT = "name another --output"


class ExportedVolume(NamedTuple):
    """A volume with the split that it is of ("" for a scan), and what identifies its content; None where there is no
    file and no signature."""

    volume: Volume
    split: str
    key: str | None


class Source(NamedTuple):
    """What is exported: the volumes, and the findings that their labels are of, () without labels."""

    items: list[ExportedVolume]
    findings: tuple[str, ...]
    cached: bool  # whether a feature cache may have them


def cohort_items(data_dir: str | Path, patients: str | None = None, findings: Sequence[str] | None = None,
                 minus_one_is_unknown: bool = False) -> Source:  # fmt: skip
    """All volumes of both splits of a cohort, or of the one that has a label table; arguments as of `load_cohort`."""
    splits = [split for split in SPLITS if Path(data_dir, labels_path(split)).is_file()]
    items: list[ExportedVolume] = []
    for split in splits or SPLITS:
        cohort = load_cohort(data_dir, split, None, patients, findings, minus_one_is_unknown)
        findings = cohort.findings
        keys = cache_keys(cohort.volumes)
        items += [ExportedVolume(volume, split, key) for volume, key in zip(cohort.volumes, keys, strict=True)]
    return Source(items, tuple(findings or ()), cached=True)


def scan_items(scans: Sequence[Scan], assume_hu: bool = False) -> Source:
    """Scans as `find_scans` gives them."""
    no_labels = np.zeros(len(ABNORMALITIES), np.float32)
    volumes = [Volume(scan.name, scan.path, no_labels, assume_hu=assume_hu) for scan in scans]
    folders: dict[Path, list] = {}
    keys = (_scan_key(scan, volume, folders) for scan, volume in zip(scans, volumes, strict=True))
    return Source([ExportedVolume(volume, "", key) for volume, key in zip(volumes, keys, strict=True)], (), False)


def _scan_key(scan: Scan, volume: Volume, folders: dict[Path, list]) -> str | None:
    """`cache_key`; of a DICOM series its identity with names, sizes and times of all files beside it, which `folders`
    keeps for the next series."""
    if scan.path.name.lower().endswith(FILE_SUFFIXES):
        return cache_key(volume)
    folder = scan.path if scan.path.is_dir() else scan.path.parent
    if folder not in folders:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        folders[folder] = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([scan.name, scan.series, folders[folder]]).encode()).hexdigest()[:32]


@dataclass
class FeatureExport:
    """What `export_features` has written. `files`: those that the table names; `origins`: how many volumes came from
    where."""

    folder: Path
    volumes: int = 0
    files: list[str] = field(default_factory=list)
    note: str | None = None  # disclaimer to show with them
    origins: dict[str, int] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of volumes that are not in it


def export_features(
    source: Source,
    checkpoint: str | Path,
    output: str | Path,
    tokens: str | None = None,
    cache_dir: str | Path = TrainingConfig.cache_dir,
    device: str | None = None,
    workers: int | None = None,
) -> FeatureExport:
    """Writes the latents of all volumes, and their `tokens`, into the folder `output`; a file's volumes in memory.

    Args:
        source: `cohort_items(...)` or `scan_items(...)`. What the feature cache under `cache_dir` has of a cohort is
            not encoded again; nothing is added to it.
        checkpoint: a run's folder, a folder of `save_pretrained`, or a CT-CLIP file, with or without a head.
        tokens: "codes" or "grid" of CT-CLIP, "slice" or "patch" of a slice backbone; see the top of this file.
        device, workers: as of `predict_scans`.

    Raises:
        UserError, CheckpointError, FileNotFoundError: one line each, before anything is computed: tokens of another
        kind of model, a folder that cannot be written, files there that no export wrote, an export of another encoder.
        UserError where no volume could be read. A volume that cannot be read costs only itself: see `failures`.
    """
    folder = Path(output)
    check_writable(folder, ANOTHER_OUTPUT)
    check_names(folder, TABLE, CODEBOOK)
    model = _prepared(load_encoder(checkpoint, device), tokens)
    note = model_note(Path(checkpoint), model.derived_from)
    cache = FeatureCache(cache_dir, model)
    settings = dict(cache.key, tokens=tokens, assume_hu=any(item.volume.assume_hu for item in source.items))
    if model.is_ctclip:
        settings["projection_sha256"] = tensors_sha256({"to_visual_latent": model.to_visual_latent.weight})
    rows = cache.intact([item.key for item in source.items])[0] if source.cached else [None] * len(source.items)
    if message := cache.missing_message([item.volume for item in source.items], rows):
        raise CacheError(message)
    make_folder(folder, ANOTHER_OUTPUT)
    busy = f"{folder}: found another export into it, expected none; wait for its end, or {ANOTHER_OUTPUT}"
    with locked(folder / LOCK, busy):
        shards, export = Shards(folder, json.dumps(settings, sort_keys=True)), FeatureExport(folder, note=note)
        missing = [i for i, item in enumerate(source.items) if (item.volume.name, item.key) not in shards.places]
        _check_room(model, cache, folder, len(missing), tokens)
        if tokens == "codes":
            _write_tensors(folder, CODEBOOK, {"codebook": model.codebook.detach().cpu().contiguous()}, {})
        with shards:
            _fill(shards, export, model, cache, source.items, {i: rows[i] for i in missing}, tokens, workers)
        _write_table(export, shards, source)
    return export


def _prepared(model: CTCLIPMultiAbnormalityModel, tokens: str | None) -> CTCLIPMultiAbnormalityModel:
    """With `encode_for_cache` giving what the export is made of. Raises UserError for tokens it has not."""
    if tokens and model.is_video:
        raise UserError(f"found --export-tokens {tokens} for a video ResNet, expected none (it has pooled features "
                        "only); leave it out")  # fmt: skip
    kind = "CT-CLIP" if model.is_ctclip else "a slice backbone"
    if tokens not in (None, *TOKENS[kind]):
        raise UserError(f"found --export-tokens {tokens} for {kind}, expected {' or '.join(TOKENS[kind])}; "
                        "take one of these, or leave it out")
    if not model.is_ctclip:
        model.cache_format = "tokens" if tokens else "pooled"
        model.tokens = tokens or model.tokens
    return model


def _check_room(
    model: CTCLIPMultiAbnormalityModel, cache: FeatureCache, folder: Path, count: int, tokens: str | None
) -> None:
    """Raises UserError where the disk has no room for `count` more volumes."""
    each = cache.record_bytes
    if model.sizes is not None:
        width = {"codes": 1, "grid": model.sizes.dim}.get(tokens or "", 0)
        each = 4 * (model.sizes.latent + width * int(np.prod(cache.shape)))
    free = shutil.disk_usage(folder).free
    if count * each > free:
        raise UserError(f"{folder}: found {size_text(free)} free on its disk, expected {size_text(count * each)} for "
                        f"{plural(count, 'volume')}; free that much, or {ANOTHER_OUTPUT}")


def features_of(model: CTCLIPMultiAbnormalityModel, stored: Tensor, tokens: str | None) -> dict[str, Tensor]:
    """Output (1, ...) of `encode_for_cache`, on the model's device -> {name: tensor of the one volume}."""
    if not model.is_ctclip:
        one = stored[0].flatten(1, 3) if tokens == "slice" else stored[0]  # of slices (S, 1, 1, C)
        return {tokens: one.half()} if tokens else {"pooled": one.float()}
    codes = stored.int()
    grid = model.visual_transformer.vq.lookup(codes)
    found = {"latent": model.project(grid)[0]}
    return found | ({"codes": codes[0]} if tokens == "codes" else {"grid": grid[0]} if tokens == "grid" else {})


def _fill(
    shards: Shards, export: FeatureExport, model: CTCLIPMultiAbnormalityModel, cache: FeatureCache,
    items: Sequence[ExportedVolume], missing: dict[int, int | None], tokens: str | None, workers: int | None,
) -> None:  # fmt: skip
    """Adds the `missing` ones, {number of the item: row in the cache}; those without a row are encoded, one by one,
    because rounding depends on the shape of a batch."""
    device = next(model.parameters()).device
    unread = [i for i, row in missing.items() if row is None]
    bar = tqdm(total=len(missing), desc="export", unit=" volumes", bar_format=BAR, delay=2, leave=False)
    with encoding(model, device), bar as progress:
        for i, row in missing.items():
            if row is not None:
                stored = cache.load([row])
                stored = stored.int() if model.is_ctclip else stored  # few operations know uint16
                shards.add(items[i], features_of(model, stored.to(device), tokens))
                progress.update()
        loader = read_ahead([item.volume for item in items], model.input_shape, [[i] for i in unread],
                            max(1, choose_workers(workers)))  # fmt: skip
        for batch in loader:
            progress.update()
            failures = list(batch.failures)
            for i in batch.index.tolist():
                found = features_of(model, model.encode_for_cache(batch.volumes.to(device)), tokens)
                if all(bool(tensor.isfinite().all()) for tensor in found.values()):
                    shards.add(items[i], found)
                else:
                    failures.append((items[i].volume.name, f"found features that are no numbers in {cache.dtype}, "
                                     "expected finite ones; check the weights and the scan"))  # fmt: skip
            export.failures += failures
            for name, reason in failures:
                tqdm.write(f"skipped: {name}: {reason}", file=sys.stderr)
    encoded = len(unread) - len(export.failures)
    cached, before = len(missing) - len(unread), len(items) - len(missing)
    export.origins = {"from the feature cache": cached, "encoded": encoded, "there before": before}


# ------------------------------------------------------------------ files


class Shards:
    """The safetensors files of a folder, all of one encoder and one choice of tokens; new ones are added in a `with`
    block, whose last file is written when it ends, by Ctrl-C too.

    Raises UserError for files of other `settings`, CheckpointError for one that has changed since it was written.
    """

    def __init__(self, folder: Path, settings: str):
        self.folder, self.settings = folder, settings
        self.places: dict[tuple[str, str | None], tuple[str, int]] = {}  # (volume, key) -> (file, row)
        self.pending: list[tuple[str, str | None]] = []
        self.buffers: dict[str, Tensor] = {}
        own = own_files(folder)
        for path in folder.iterdir():
            if is_left_over(path, own):
                path.unlink()
        numbers = [int(found[1]) for path in folder.glob("*") if (found := SHARD.fullmatch(path.name))]
        self.next = max(numbers, default=-1) + 1
        for number in sorted(numbers):
            if _shard_name(number) in own:
                self._take_up(folder / _shard_name(number))

    def _take_up(self, path: Path) -> None:
        check_written(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        if metadata["settings"] != self.settings:
            raise UserError(f"{path}: found features of another encoder or other tokens, expected none, or those of "
                            f"this export; {ANOTHER_OUTPUT}")
        for row, (name, key) in enumerate(json.loads(metadata["volumes"])):
            if key is not None:
                self.places[name, key] = path.name, row

    def add(self, item: ExportedVolume, tensors: dict[str, Tensor]) -> None:
        if not self.pending:
            count = max(1, SHARD_BYTES // sum(tensor.nbytes for tensor in tensors.values()))
            self.buffers = {name: torch.empty(min(count, SHARD_VOLUMES), *tensor.shape, dtype=tensor.dtype)
                            for name, tensor in tensors.items()}  # fmt: skip
        for name, tensor in tensors.items():
            self.buffers[name][len(self.pending)] = tensor.cpu()
        self.pending.append((item.volume.name, item.key))
        if len(self.pending) == len(next(iter(self.buffers.values()))):
            self.write()

    def write(self) -> None:
        """The volumes that are in memory, as the next file."""
        if not self.pending:
            return
        name, count = _shard_name(self.next), len(self.pending)
        metadata = {"settings": self.settings, "volumes": json.dumps(self.pending)}
        _write_tensors(self.folder, name, {key: buffer[:count] for key, buffer in self.buffers.items()}, metadata)
        self.places |= {of: (name, row) for row, of in enumerate(self.pending)}
        self.pending, self.next = [], self.next + 1

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):  # such as a full disk
            self.write()
        if isinstance(error, KeyboardInterrupt):
            error.args = (f"kept in {self.folder}: {plural(len(self.places), 'volume')}; the same command goes on",)


def _shard_name(number: int) -> str:
    return f"features-{number:05d}.safetensors"


def _write_tensors(folder: Path, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with writing(folder, name), replacing(folder / name) as temporary:
        temporary.write_bytes(save(tensors, metadata))


def _write_table(export: FeatureExport, shards: Shards, source: Source) -> None:
    """The table of the volumes that this export was asked for, in their order."""
    lines, files = [], set()
    for volume, split, key in source.items:
        if (place := shards.places.get((volume.name, key))) is None:
            continue
        labels = ["" if label == UNKNOWN else int(label) for label in volume.labels] if source.findings else []
        lines.append([volume.name, volume.patient, split, *place, *labels])
        files.add(place[0])
    if not lines:
        raise UserError(f"{export.folder}: none of {plural(len(source.items), 'volume')} could be read, expected at "
                        "least one; see the lines above")
    header = [NAME_COLUMN, PATIENT_COLUMN, "Split", "File", "Row", *source.findings]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *lines])
    with writing(export.folder, TABLE), replacing(export.folder / TABLE) as temporary:
        temporary.write_bytes(text.getvalue().encode())
    export.volumes, export.files = len(lines), sorted(files)


def export_lines(export: FeatureExport, checkpoint: str | Path) -> list[str]:
    """Lines to print."""
    origins = ", ".join(f"{count} {origin}" for origin, count in export.origins.items() if count)
    where = f"{plural(export.volumes, 'volume')} in {plural(len(export.files), 'file')}"
    lines = [f"Wrote {export.folder / TABLE}: {where} ({origins}); model {checkpoint}"]
    names = [export.files[0], *([CODEBOOK] if (export.folder / CODEBOOK).exists() else [])]
    for name in names:
        with safe_open(export.folder / name, framework="pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  no dictionary
            shown = [f"{key} {tuple(part.get_shape())} {TYPES[part.get_dtype()]}" for key, part in parts.items()]
        lines.append(f"  {name}: {', '.join(shown)}")
    return lines
