"""The suite's files: which there have to be, and all of them in one ctclip.zip. Standard library only.

What unpacks that file is in ctclip_setup.py, because it has to work before this package is there.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from pathlib import Path
from typing import Iterator  # noqa: UP035  (3.8 must get as far as check_python)

from ctclip import __version__
from ctclip.environment.packages import SetupError
from ctclip.fileio import make_folder, replacing
from ctclip.formatting import comma_separated, plural, print_row, size_text
from ctclip.paths import DEMO_PATH, SUITE

BUNDLE = Path("ctclip.zip")
STAMP = "ctclip/bundle.txt"  # in a bundle only: its version and a digest of its files
SCRIPTS = ("ctclip_setup.py", "ctclip_model.py", "ctclip_training.py", "ctclip_evaluation.py", "run_task2.py")
# Files of the package that no import names: templates, and modules that are started as commands.
READ_FILES = (
    "ctclip/evaluation/report.html", "ctclip/evaluation/runs.html", "ctclip/inference/scan_page.html",
    "ctclip/hub/model_card.md", "ctclip/hub/__main__.py", "ctclip/phantoms/__main__.py",
    "ctclip/data/label_maps/rad-chestct.json", "ctclip/inference/merge.py",
)  # fmt: skip
# Of a line: from PACKAGE import NAMES, or import MODULES. Parsing every file takes setup a second.
IMPORT = re.compile(r"^ *(?:from ([\w.]+) import (\([^)]*\)|[^\n]*)|import (\w[\w., ]*))", re.MULTILINE)
SHOWN = 3  # names of missing files in a message


def expected_files(suite: Path) -> set[Path]:
    """The scripts, every module that a file of the suite imports, what these read, and the demo's weights."""
    sources = [*(suite / script for script in SCRIPTS), *suite.glob("ctclip/**/*.py")]
    modules = {name for path in sources if path.is_file() for name in _imported_modules(path, suite)}
    packages = {name.rpartition(".")[0] for name in modules}
    names = [name.replace(".", "/") + ("/__init__.py" if name in packages else ".py") for name in modules]
    return {suite / name for name in (*SCRIPTS, *READ_FILES, *names)} | {suite / DEMO_PATH.relative_to(SUITE)}


def _imported_modules(path: Path, suite: Path) -> Iterator[str]:
    """Dotted names of the suite's modules that a file imports, lazily too, and of the packages that they are in."""
    for package, names, modules in IMPORT.findall(path.read_text(encoding="utf-8")):
        dotted = [name.split()[0] for name in modules.split(",")] if modules else [package]
        for name in re.sub(r"#.*|[()]", "", names).split(","):
            if name.strip() and _is_module(suite, package, name.split()[0]):
                dotted.append(f"{package}.{name.split()[0]}")
        for name in dotted:
            parts = name.split(".")
            if parts[0] == "ctclip" or f"{name}.py" in SCRIPTS:
                yield from (".".join(parts[: end + 1]) for end in range(len(parts)))


def _is_module(suite: Path, package: str, name: str) -> bool:
    """Of `from package import name`: a module of the suite, not something that the package defines."""
    file = suite.joinpath(*package.split("."), "__init__.py")
    if not package.startswith("ctclip") or not file.is_file():
        return False
    definitions = re.sub(r'^""".*?"""', "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.search(rf"\b{name}\b", definitions) is None


def missing_files(suite: Path = SUITE) -> list[str]:
    return sorted(path.relative_to(suite).as_posix() for path in expected_files(suite) if not path.is_file())


def files_step(suite: Path = SUITE) -> None:
    """Weights of the demo that were uploaded beside the scripts get their place. Raises SetupError where a file that
    the commands need is missing."""
    demo = suite / DEMO_PATH.relative_to(SUITE)
    uploaded = suite / demo.name
    if uploaded.is_file() and not demo.exists():
        make_folder(demo.parent, "run this where you may write")
        os.replace(uploaded, demo)
        print_row("files", f"{demo.name} moved to {demo.parent.name}/, where the scripts look for it")
    if missing := missing_files(suite):
        raise SetupError(missing_message(missing, suite))


def missing_message(missing: list[str], suite: Path) -> str:
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    found = f"found no {comma_separated(missing[:SHOWN])}{more} in {suite}, expected every file of the suite"
    return f"{found}; put a ctclip.zip beside ctclip_setup.py and run python ctclip_setup.py, which unpacks it"


def write_bundle(target: Path = BUNDLE, suite: Path = SUITE) -> None:
    """Writes the suite as one zip, the same bytes for the same files. Raises SetupError where a file is missing."""
    if not (suite / "requirements.txt").is_file():
        found = f"found no requirements.txt in {suite}, expected a checkout or an unpacked bundle"
        raise SetupError(f"{found}; run the ctclip_setup.py of one")
    if missing := missing_files(suite):
        raise SetupError(missing_message(missing, suite))
    files = {path.relative_to(suite).as_posix(): path.read_bytes() for path in _bundled(suite)}
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    files[STAMP] = f"{__version__} {digest.hexdigest()[:12]}\n".encode()
    with replacing(target) as temporary, zipfile.ZipFile(temporary, "w") as bundle:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name)  # of 1980: the date of a file is not part of it
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # as on Unix, wherever it is made
            bundle.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)
    size = size_text(target.stat().st_size)
    print_row("bundle", f"{target}: {plural(len(files), 'file')}, {size}, {files[STAMP].decode().strip()}; "
                        "upload it to an empty folder with ctclip_task2.ipynb or ctclip_setup.py, which unpack it")


def _bundled(suite: Path) -> set[Path]:
    package = {path for suffix in ("py", "html", "md") for path in suite.glob(f"ctclip/**/*.{suffix}")}
    return expected_files(suite) | package | {suite / "requirements.txt", suite / "LICENSE"}
