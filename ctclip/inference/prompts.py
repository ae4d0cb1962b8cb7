"""Prompts from a text file. `ctclip_model` turns findings into a head (section "Text tower")."""

from __future__ import annotations

import os
from pathlib import Path

from ctclip_model import PromptError, Prompts


def read_prompts(path: str | os.PathLike) -> Prompts:
    """A text file of findings, UTF-8: one per line, or `finding<TAB>text if present<TAB>text if absent`.

    Blank lines and lines that begin with # are skipped. Raises PromptError, naming the file and the line.
    """
    path, rows = Path(path), []
    try:
        text = path.read_bytes().decode("utf-8-sig")  # Windows' editors begin with a mark
    except FileNotFoundError as error:
        raise PromptError(f"{path}: found no such file, expected one finding per line; check the path") from error
    except OSError as error:
        raise PromptError(f"{path}: found it unreadable ({error.strerror}), expected a text file; check it") from error
    except UnicodeDecodeError as error:
        found = f"{path}: found bytes that are not UTF-8 (at {error.start})"
        raise PromptError(f"{found}, expected a text file; save it as UTF-8") from error
    where = str(path)
    try:
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{path}, line {number}"
            if line.strip() and not line.lstrip().startswith("#"):
                rows.append(_parse_line(line))
        where = str(path)
        if not rows:
            raise PromptError("found no finding, expected one per line; add some")
        return Prompts(*(tuple(column) for column in zip(*rows, strict=True)))
    except PromptError as error:
        raise PromptError(f"{where}: {error}") from error


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
