"""Where the suite lies, where its weights are, and how a part of it is started. Standard library only."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

SUITE = Path(__file__).resolve().parents[1]  # the code; models/ and results/ belong to the working folder


def weights_path(name: str) -> Path:
    """Where the published weights of that name are looked for, from the working folder."""
    return Path("models", f"ctclip_{name}.pt")


def slim_path(weights: Path) -> Path:
    """The copy with only the tensors in use that may take the place of a weights file."""
    return weights.with_suffix(".safetensors")


# As in ctclip_model, for scripts that have not imported torch.
CLASSFINE_PATH = weights_path("classfine").as_posix()
DEMO_PATH = SUITE / ("ctclip/demo" if (SUITE / "ctclip" / "demo").is_dir() else "models") / "ctclip_demo.pt"


def script(name: str) -> str:
    """How one of the suite's scripts is started from the working folder."""
    return name if Path.cwd() == SUITE else shlex.quote(str(SUITE / name))


def module_command(module: str, *arguments: str) -> list[str]:
    """A command that runs a module of the suite in a process of its own; it needs `module_environment`."""
    return [sys.executable, "-m", module, *arguments]


def child_environment() -> dict[str, str]:
    """The environment for another program: without the hub's token, and a mirror's address that may hold a password."""
    secret = re.compile(r"(HF|HUGGING_?FACE)_.*(TOKEN|ENDPOINT)", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if not secret.match(name)}


def module_environment() -> dict[str, str]:
    """`child_environment` with the suite on Python's path, whatever the working folder is."""
    path = os.environ.get("PYTHONPATH")
    return child_environment() | {"PYTHONPATH": f"{SUITE}{os.pathsep}{path}" if path else str(SUITE)}
