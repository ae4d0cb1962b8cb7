"""Python and the packages of requirements.txt: what is there, what is missing, and pip where it may be used.

Standard library only. A torch that meets the floor of requirements.txt (Colab's, a cluster's) is never replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple, Sequence  # noqa: UP035  (3.8 must get as far as check_python)

from ctclip.errors import UserError
from ctclip.formatting import TIED, comma_separated, print_row
from ctclip.hub.client import on_colab
from ctclip.paths import SUITE, child_environment

OLDEST_PYTHON = (3, 10)


class SetupError(UserError):
    """Stops setup with exit code 2; the message is one line: what was found, what to do."""


def versions_text(versions: dict[str, str]) -> str:
    return comma_separated(f"{name}{TIED}{version}" for name, version in versions.items())


def check_python(version: Sequence[int] = sys.version_info[:3]) -> None:
    if tuple(version[:2]) < OLDEST_PYTHON:
        found = ".".join(str(part) for part in version[:3])
        raise SetupError(f"found Python {found}, expected 3.10 or newer; run this with a newer one (python3.11, ...)")


class Requirement(NamedTuple):
    name: str
    floor: str

    def __str__(self) -> str:
        return f"{self.name}>={self.floor}"


NOT_ON_WINDOWS = 'sys_platform != "win32"'  # as requirements.txt has it


def parse_requirements(text: str) -> tuple[list[Requirement], list[Requirement]]:
    """requirements.txt -> (what the suite runs on, what its extras ask for: the optional packages and the tests')."""
    runtime: list[Requirement] = []
    extras: list[Requirement] = []
    for line in text.splitlines():
        specification, _, marker = line.split("#")[0].partition(";")
        name, _, floor = specification.partition(">=")
        if floor and not (NOT_ON_WINDOWS in marker and sys.platform == "win32"):
            (extras if "extra ==" in marker else runtime).append(Requirement(name.strip(), floor.strip()))
    return runtime, extras


def release(version: str) -> tuple[int, ...]:
    """"2.6.0+cu124" -> (2, 6). Pre-releases count as their release: vendors ship a working torch as 2.6.0a0."""
    numbers = re.match(r"(?:\d+!)?(\d+(?:\.\d+)*)", version.strip())
    parts = [int(part) for part in numbers[1].split(".")] if numbers else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def installed_version(name: str) -> str | None:
    """None when absent, and when a broken uninstall left metadata without a version."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, KeyError):
        return None


def survey(requirements: Sequence[Requirement]) -> tuple[dict[str, str], dict[Requirement, str | None]]:
    """-> (name: version for what meets its floor; requirement: version found, None if absent, for what does not)."""
    ready, wanted = {}, {}
    for requirement in requirements:
        found = installed_version(requirement.name)
        if found and release(found) >= release(requirement.floor):
            ready[requirement.name] = found
        else:
            wanted[requirement] = found
    return ready, wanted


def pins(ready: dict[str, str]) -> list[str]:
    """Constraints that keep pip from replacing a torch that is good enough, and the torchvision built against it."""
    if "torch" not in ready:
        return []
    found = {name: installed_version(name) for name in ("torch", "torchvision")}
    return [f"{name}=={version}" for name, version in found.items() if version]


def pip_refusal(stdlib: Path, packages: Path, in_venv: bool) -> str | None:
    """Why pip may not install into this interpreter, or None. `stdlib` is where PEP 668 puts its marker."""
    managed = (stdlib / "EXTERNALLY-MANAGED").exists() and not in_venv
    if managed and os.environ.get("PIP_BREAK_SYSTEM_PACKAGES", "0") in ("", "0"):
        return "is managed by the operating system (PEP 668)"
    existing = next(folder for folder in (packages, *packages.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        return f"keeps its packages in {packages}, which you may not write to"
    if importlib.util.find_spec("pip") is None:
        return "has no pip"
    return None


def check_pip() -> None:
    paths = sysconfig.get_paths()
    refusal = pip_refusal(Path(paths["stdlib"]), Path(paths["purelib"]), sys.prefix != sys.base_prefix)
    if refusal and not on_colab():
        activate = r".venv\Scripts\activate" if os.name == "nt" else ". .venv/bin/activate"
        debian = "" if importlib.util.find_spec("ensurepip") else " (Debian, Ubuntu: apt install python3-venv first)"
        raise SetupError(
            f"this Python ({sys.executable}) {refusal}; make a virtual environment{debian} and run this again in it: "
            f"{shlex.quote(sys.executable)} -m venv .venv && {activate}"
        )


def run_pip(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """Runs pip, printing what takes a while: large downloads, the unpacking; -> (exit code, its lines of output)."""
    command = [sys.executable, "-m", "pip", *arguments]
    environment = {**child_environment(), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, encoding="utf-8", errors="replace"
    ) as process:
        for line in process.stdout or ():
            lines.append(line.strip())
            wheel = re.match(r"Downloading (?:\S*/)?(\w+)-([^-\s]+)-\S+ \((\d{3,}[\d.]* MB|[\d.]+ GB)\)", lines[-1])
            if wheel:
                print_row("", f"downloading {wheel[1]} {wheel[2]} ({wheel[3]})")
            elif lines[-1].startswith("Installing collected packages"):
                print_row("", f"unpacking {line.count(',') + 1} packages, which may take a minute or two")
    return process.returncode, lines


def pip_failure(lines: Sequence[str]) -> str:
    """pip's own last error line and what to do about it, in one line."""
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    said = (errors or [line for line in lines if line] or ["no output"])[-1]
    if "No space left" in said:
        remedy = "free some disk: torch with its CUDA libraries takes about 6 GB"
    else:
        remedy = "check the network and the proxy (HTTPS_PROXY, PIP_INDEX_URL), then run this again"
    return f"pip could not install the packages: {said}; {remedy}"


def install(wanted: Sequence[Requirement], constraints: Sequence[str]) -> None:
    names = [str(requirement) for requirement in wanted]
    if any(requirement.name == "torch" for requirement in wanted):
        names.append("torchvision")  # timm imports it and an older one is tied to the torch being replaced
    with tempfile.TemporaryDirectory() as folder:
        constraint_file = Path(folder, "constraints.txt")
        constraint_file.write_text("\n".join(constraints) + "\n")
        flags = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "-c", str(constraint_file)]
        code, lines = run_pip(["install", *flags, *names])
    if code != 0:
        raise SetupError(pip_failure(lines))
    importlib.invalidate_caches()
    ready, missing = survey(wanted)
    if missing:
        raise SetupError(f"pip reported success but {comma_separated(missing)} cannot be found; run this again")
    print_row("", f"installed {versions_text(ready)}")


def read_requirements(with_development: bool) -> list[Requirement]:
    """Of requirements.txt, or of the installed package, with which pip keeps the same lines."""
    from importlib import metadata

    try:
        text = (SUITE / "requirements.txt").read_text(encoding="utf-8")
    except OSError as error:
        try:
            text = "\n".join(metadata.requires("ctclip-task2") or [])
        except metadata.PackageNotFoundError:
            found = f"cannot read {SUITE / 'requirements.txt'} ({error.strerror})"
            raise SetupError(f"{found}; get the whole suite") from error
    runtime, extras = parse_requirements(text)
    return runtime + (extras if with_development else [])


def wanted_text(wanted: dict[Requirement, str | None]) -> str:
    return comma_separated(f"{need} (found {found})" if found else need for need, found in wanted.items())


def packages_step(requirements: Sequence[Requirement]) -> None:
    ready, wanted = survey(requirements)
    if not wanted:
        print_row("packages", f"all {len(ready)} are here: {versions_text(ready)}")
        return
    check_pip()
    if ready:
        print_row("packages", f"kept as they are: {versions_text(ready)}")
    print_row("" if ready else "packages", "installing " + wanted_text(wanted))
    install(list(wanted), pins(ready))
