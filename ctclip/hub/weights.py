"""Weights files: their fingerprint, the record kept beside them, and a slim copy with only the tensors in use.

Two people have the same model where the digests of their tensors are equal, and it computes the same where the numbers
beside it are: what the model makes of one fixed synthetic volume. models/ctclip_<name>.json keeps both.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ctclip.data.feature_cache import encoding, tensors_sha256
from ctclip.fileio import replacing
from ctclip.formatting import size_text
from ctclip.hub.client import read_record, record_path, sha256_of, write_record
from ctclip.paths import slim_path
from ctclip.phantoms.reference import fixed_phantom
from ctclip_model import (
    LINEAR_HEAD_KEYS,
    SLIM_OF,
    CheckpointError,
    CTCLIPMultiAbnormalityModel,
    is_slim_copy,
    read_checkpoint,
    unused_reason,
)

VALUES = 18  # numbers shown: the logits, or as many of the latent's
VALUE_TOLERANCE = 0.02  # of a number of about 1: processors differ in rounding, and a code nearly a tie may flip


@dataclass(frozen=True)
class Fingerprint:
    """kind "logits", or "latent" where the file has no head; digest of every loaded tensor; where it was computed."""

    digest: str
    kind: str
    values: tuple[float, ...]
    where: str

    def __str__(self) -> str:
        shown = " ".join(f"{value:.3f}" for value in self.values)
        return f"fingerprint {self.digest[:12]}; {self.kind} of the fixed phantom: {shown}"

    def difference(self, kept: Fingerprint) -> str | None:
        """How it differs from the recorded one, in a few words; None where it is the same."""
        if (self.digest, self.kind) != (kept.digest, kept.kind):
            return f"other tensors: {self.digest[:12]} where {kept.digest[:12]} was kept"
        if len(self.values) != len(kept.values):
            return "a record of another number of values"
        most = max(abs(a - b) for a, b in zip(self.values, kept.values, strict=True))
        if not most <= VALUE_TOLERANCE:  # NaN too
            return f"the same tensors give numbers up to {most:.3f} off those computed on {kept.where}"
        return None


def load(path: Path) -> CTCLIPMultiAbnormalityModel:
    """The file's own tensors only: its fingerprint must not depend on what else is in the folder, as a head made from
    prompts does."""
    return CTCLIPMultiAbnormalityModel(str(path), head="linear")


def fingerprint(model: CTCLIPMultiAbnormalityModel) -> Fingerprint:
    """Of a CT-CLIP model on the CPU, in float32. About ten seconds at the published size."""
    volume = fixed_phantom(model.input_shape)
    headless = bool(model.load_report and model.load_report.new)
    with encoding(model, torch.device("cpu")):
        values = model.encode(volume) if headless else model(volume)
    return Fingerprint(
        tensors_sha256(model.state_dict()),  # names, types, shapes and bytes, in the order of their names
        "latent" if headless else "logits",
        tuple(values[0, :VALUES].tolist()),
        f"{platform.machine()}, torch {torch.__version__}",
    )


# ---- slim


def make_slim(path: Path) -> tuple[Path, Fingerprint]:
    """Puts a slim copy in the place of `path` once it is proven to compute the same, to the bit; -> (it, fingerprint).

    Raises CheckpointError where `path` is no .pt file, another file is in the copy's place, there is no room for both,
    or the proof fails; `path` is then as it was.
    """
    target = slim_path(path)
    if path.suffix != ".pt" or (target.exists() and not path.exists()):
        found = f"{path if path.exists() else target}: found a {target.suffix} file"
        raise CheckpointError(f"{found}, expected the .pt file that a slim copy is made of; leave --slim out")
    if target.exists() and not is_slim_copy(target, path):
        raise CheckpointError(
            f"{target}: found a file that was not made from {path.name}, expected none; move it, or leave --slim out"
        )
    model = load(path)
    before, state = fingerprint(model), read_checkpoint(path)
    used = {*model.state_dict(), "visual_transformer.to_patch_emb_first_frame.1.weight"}  # which tells the patch size
    if LINEAR_HEAD_KEYS[0] not in state:  # such a file classifies with its text tower
        used |= {key for key in state if unused_reason(key) == "text tower"}
    kept = {key: value.contiguous() for key, value in state.items() if key in used}
    copy = path.with_name(f".{path.stem}.slim.safetensors")  # always this name: one left by a kill is overwritten
    try:
        with replacing(target, copy):
            save_file(kept, copy, metadata={SLIM_OF: path.name})
            del kept, model, state
            after = fingerprint(load(copy))
            if (after.digest, after.values) != (before.digest, before.values):
                raise CheckpointError(f"{path}: the slim copy gives {after}, expected {before}; it was not kept")
            shutil.copymode(path, copy)
    except SafetensorError as error:  # as a disk without room
        raise CheckpointError(f"{copy}: found {error}, expected room for a copy; leave --slim out") from error
    path.unlink()
    return target, after


# ---- the command


def check_weights(path: Path, slim: bool = False) -> Iterator[str]:
    """`python -m ctclip.hub weights`: yields its lines of output. Raises CheckpointError where the fingerprint is not
    the recorded one; where none is recorded, it is recorded now."""
    if slim:
        size = path.stat().st_size if path.exists() else 0
        path, found = make_slim(path)
        yield f"slim: {path}, {size_text(path.stat().st_size)} in place of {size_text(size)}: the same to the bit"
    else:
        found = fingerprint(load(path))
    try:
        kept = read_record(path)["fingerprint"]
        recorded = Fingerprint(**kept | {"values": tuple(map(float, kept["values"]))})
    except (TypeError, KeyError, ValueError):  # none, or something else in its place
        recorded = None
    if recorded and (difference := found.difference(recorded)):
        yield str(found)
        raise CheckpointError(
            f"{path}: found {difference}, expected the kept one ({record_path(path)}); fetch the file again, or delete "
            "the record if you replaced the file yourself"
        )
    how = "as kept" if recorded else f"kept now in {record_path(path)}"
    if recorded is None or slim:
        digest = {"slim_sha256": sha256_of(path)} if slim else {}
        try:
            write_record(path, fingerprint=asdict(found), **digest)
        except OSError as error:
            how = f"not kept: {record_path(path)}: {error.strerror}"
    yield f"{found}, {how}"
