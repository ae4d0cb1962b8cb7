"""Prompts from a text file, and prompt heads cached beside the weights, so that the text tower runs once.

`ctclip_model` turns findings into a head (section "Text tower").
"""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ctclip.data.digest import tensors_sha256
from ctclip.fileio import replacing
from ctclip_model import (
    ABNORMALITIES,
    CTCLIPMultiAbnormalityModel,
    PromptError,
    Prompts,
    Vocabulary,
    existing_weights,
    prompt_weights,
    read_checkpoint,
    takes_prompts,
    text_tower_tensors,
    vocabulary_path,
)

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
HEAD_VERSION = "1"  # of cached heads: raise it when the same tensors and texts would give another head


def load_with_prompts(
    path: str | os.PathLike, prompts: Prompts | None = None, head: str | None = None, **kwargs: Any
) -> CTCLIPMultiAbnormalityModel:
    """The constructor for a CT-CLIP file, with a cached `prompt_head` in place of one that is made each time.

    Args:
        prompts: findings and their wording; implies head="prompts".
        head, kwargs: the constructor's.
    """
    head = "prompts" if prompts is not None else head
    findings = prompts or Prompts.from_names(kwargs.get("labels") or ABNORMALITIES)
    weight = _prompt_weight(existing_weights(path), findings, head)
    return CTCLIPMultiAbnormalityModel(path, prompts=prompts, head=head, prompt_weight=weight, **kwargs)


def _prompt_weight(path: Path, prompts: Prompts, head: str | None) -> Tensor | None:
    """None where the model takes another head, or where none can be made: then the constructor says why."""
    if head not in (None, "prompts"):
        return None
    state = read_checkpoint(path)
    try:
        return prompt_head(path, state, prompts) if takes_prompts(head, state) else None
    except PromptError:
        return None


def read_prompts(path: str | os.PathLike) -> Prompts:
    """A text file of findings, UTF-8: one per line, or `finding<TAB>text if present<TAB>text if absent`.

    Blank lines and lines that begin with # are skipped. Raises PromptError, naming the file and the line.
    """
    path, rows = Path(path), []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                rows.append(_parse_line(line))
            except PromptError as error:
                raise PromptError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise PromptError(f"{path}: found no finding, expected one per line; add some")
    try:
        return Prompts(*(tuple(column) for column in zip(*rows, strict=True)))
    except PromptError as error:
        raise PromptError(f"{path}: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # Windows' editors begin with a mark
    except FileNotFoundError as error:
        raise PromptError(f"{path}: found no such file, expected one finding per line; check the path") from error
    except OSError as error:
        raise PromptError(f"{path}: found it unreadable ({error.strerror}), expected a text file; check it") from error
    except UnicodeDecodeError as error:
        found = f"{path}: found bytes that are not UTF-8 (at {error.start})"
        raise PromptError(f"{found}, expected a text file; save it as UTF-8") from error


def _parse_line(line: str) -> tuple[str, ...]:
    """(finding, text if present, text if absent)."""
    parts = [part.strip() for part in line.split("\t")]
    if len(parts) not in (1, 3) or not all(parts):
        empty = "" if all(parts) else ", one empty"
        raise PromptError(
            f"found {len(parts)} parts between tabs{empty}, expected a finding, or finding, text if present, text if "
            "absent; correct it"
        )
    finding = Prompts.from_names(parts) if len(parts) == 1 else Prompts(*((part,) for part in parts))
    return (*finding.names, *finding.pairs())


# ---- cached beside the weights


def head_digest(state: dict[str, Tensor], prompts: Prompts, vocabulary: Vocabulary) -> str:
    """SHA-256 of all that `prompt_weights` depends on. At the published size 0.44 GB are read."""
    used = text_tower_tensors(state) | {key: state[key] for key in ("to_text_latent.weight", "temperature")}
    words = hashlib.sha256(vocabulary.content).digest() + repr(asdict(prompts)).encode()
    return tensors_sha256(used, before=HEAD_VERSION.encode(), after=words)


def cached_head_path(weights: Path, digest: str) -> Path:
    return weights.with_name(f"{weights.stem}.prompts_{digest[:12]}.safetensors")


def prompt_head(weights: Path, state: dict[str, Tensor], prompts: Prompts) -> Tensor:
    """`prompt_weights` of the file at `weights`, cached in a small file beside it.

    With a cached head, transformers is not needed and no text is encoded. The vocabulary is looked for beside the
    weights, too. In a folder that cannot be written to, the head is made each time. Raises PromptError.
    """
    text_tower_tensors(state)  # first: without it nothing else matters
    vocabulary = Vocabulary.read(vocabulary_path(weights))
    digest = head_digest(state, prompts, vocabulary)
    path = cached_head_path(weights, digest)
    weight = _read_cached(path, digest)
    if weight is None:
        weight = prompt_weights(state, prompts, vocabulary)
        _write_cached(path, weight, digest)
    return weight


def _content_digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()


def _read_cached(path: Path, digest: str) -> Tensor | None:
    """The head cached at `path`; None where there is none, or one that is damaged or of something else."""
    try:
        with safe_open(path, framework="pt") as file:
            weight, metadata = file.get_tensor("weight"), file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return weight if metadata == {"digest": digest, "content": _content_digest(weight)} else None


def _write_cached(path: Path, weight: Tensor, digest: str) -> None:
    weight = weight.contiguous()
    content = save({"weight": weight}, metadata={"digest": digest, "content": _content_digest(weight)})
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
