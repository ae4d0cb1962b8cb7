"""README.md in a model's folder: whether this project wrote it or a person did. Standard library only."""

from __future__ import annotations

from pathlib import Path

CARD = "README.md"
MARK = "<!-- written by ctclip.hub, and again each time the model is saved; take this line out to keep your own -->"
EARLIER_MARK = "<!-- written by ctclip_card.py"  # of versions before 0.7
MIXIN_MARK = "This model has been pushed to the Hub using the [PytorchModelHubMixin]"  # huggingface_hub's own card


def read_card(folder: Path) -> str | None:
    path = folder / CARD
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def is_generated(card: str) -> bool:
    return MARK in card or EARLIER_MARK in card


def hand_written_card(folder: Path | None) -> str | None:
    """The folder's README.md where a person wrote it, not a program."""
    card = None if folder is None else read_card(folder)
    return None if card is None or is_generated(card) or MIXIN_MARK in card else card


def discard_card(folder: Path) -> None:
    """Removes a card that this project wrote: its weights are about to be replaced."""
    if is_generated(read_card(folder) or ""):
        (folder / CARD).unlink()
