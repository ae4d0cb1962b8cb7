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
import time
from pathlib import Path
from typing import Callable, NamedTuple, Sequence  # noqa: UP035  (3.8 must get as far as check_python)

from ctclip.errors import UserError
from ctclip.formatting import TIED, comma_separated, print_row
from ctclip.hub.client import on_colab
from ctclip.paths import SUITE

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
    numbers = re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*)", version.strip())
    parts = [int(part) for part in numbers.group(1).split(".")] if numbers else []
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


def survey(
    requirements: Sequence[Requirement], version_of: Callable[[str], str | None] = installed_version
) -> tuple[dict[str, str], dict[Requirement, str | None]]:
    """-> (name: version for what meets its floor; requirement: version found, None if absent, for what does not)."""
    ready, wanted = {}, {}
    for requirement in requirements:
        found = version_of(requirement.name)
        if found and release(found) >= release(requirement.floor):
            ready[requirement.name] = found
        else:
            wanted[requirement] = found
    return ready, wanted


def pins(ready: dict[str, str], version_of: Callable[[str], str | None] = installed_version) -> list[str]:
    """Constraints that keep pip from replacing a torch that is good enough, and the torchvision built against it."""
    if "torch" not in ready:
        return []
    found = {name: version_of(name) for name in ("torch", "torchvision")}
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


def pip_event(line: str) -> str | None:
    """What is worth a line of its own in pip's output: wheels that take a while, and the unpacking."""
    wheel = re.match(r"\s*(Downloading|Using cached) (?:\S*/)?(\w+)-([^-\s]+)-\S+ \(([\d.]+) (MB|GB)\)", line)
    if wheel and (wheel.group(5) == "GB" or float(wheel.group(4)) >= 100):
        verb = "downloading" if wheel.group(1) == "Downloading" else "from pip's cache:"
        return f"{verb} {wheel.group(2).replace('_', '-')} {wheel.group(3)} ({wheel.group(4)} {wheel.group(5)})"
    if line.startswith("Installing collected packages:"):
        return f"unpacking {line.count(',') + 1} packages" + (", a minute or two" if " torch," in line else "")
    return None


def run_pip(command: list[str]) -> tuple[int, list[str]]:
    """Runs pip, printing its few events with the seconds since the start; -> (exit code, its whole output)."""
    started = time.monotonic()
    lines: list[str] = []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, encoding="utf-8", errors="replace"
    ) as process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            event = pip_event(line)
            if event:
                print_row("", f"[{time.monotonic() - started:4.0f} s] {event}")
    return process.returncode, lines


def pip_failure(lines: Sequence[str]) -> str:
    """pip's own last error line and what to do about it, in one line."""
    errors = [line.strip()[len("ERROR: ") :] for line in lines if line.strip().startswith("ERROR: ")]
    said = errors[-1] if errors else next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    text = "\n".join(lines)
    if "No space left" in text:
        remedy = "free some disk: torch with its CUDA libraries takes about 6 GB"
    elif re.search(r"NewConnectionError|NameResolutionError|name resolution|ProxyError|timed out|SSLError", text):
        remedy = "check the network and the proxy (HTTPS_PROXY, PIP_INDEX_URL), then run this again"
    else:
        remedy = "see all of it with: python -m pip install -r requirements.txt"
    return f"pip could not install the packages: {said}; {remedy}"


def install(wanted: Sequence[Requirement], constraints: Sequence[str]) -> None:
    names = [str(requirement) for requirement in wanted]
    if any(requirement.name == "torch" for requirement in wanted):
        names.append("torchvision")  # timm imports it and an older one is tied to the torch being replaced
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        constraint_file = Path(folder, "constraints.txt")
        constraint_file.write_text("\n".join(constraints) + "\n")
        code, lines = run_pip(
            [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
            + ["--progress-bar", "off", "-c", str(constraint_file), *names]
        )
    if code != 0:
        raise SetupError(pip_failure(lines))
    importlib.invalidate_caches()
    ready, missing = survey(wanted)
    if missing:
        raise SetupError(f"pip reported success but {comma_separated(missing)} cannot be found; run this again")
    print_row("", f"[{time.monotonic() - started:4.0f} s] installed {installed_text(ready, lines)}")


def installed_text(ready: dict[str, str], lines: Sequence[str]) -> str:
    count = sum(len(line.split()) - 2 for line in lines if line.startswith("Successfully installed "))
    others = count - len(ready)
    return versions_text(ready) + (f", and {others} more that they need" if others > 0 else "")


def read_requirements(with_development: bool) -> list[Requirement]:
    try:
        runtime, extras = parse_requirements((SUITE / "requirements.txt").read_text(encoding="utf-8"))
    except OSError as error:
        installed = requires_of("ctclip-task2")  # pip keeps the same lines with the package
        if installed is None:
            reason = f"cannot read {SUITE / 'requirements.txt'} ({error.strerror})"
            raise SetupError(f"{reason}; get the whole suite") from error
        runtime, extras = parse_requirements("\n".join(installed))
    return runtime + (extras if with_development else [])


def requires_of(name: str) -> list[str] | None:
    from importlib import metadata

    try:
        return metadata.requires(name)
    except metadata.PackageNotFoundError:
        return None


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
