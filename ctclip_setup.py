"""Sets the suite up: packages, folders, weights, data, one forward pass, and a summary of what works.

    python ctclip_setup.py                    packages and the ClassFine weights
    python ctclip_setup.py --dev              also pytest and ruff
    python ctclip_setup.py --slim             keep 0.7 GB of the weights' 1.77 GB, proven to compute the same
    python ctclip_setup.py --data valid --volumes 100
                                              tables and volumes of CT-RATE
    python ctclip_setup.py --data train --patients 500 --stream-cache
                                              the same as codes of 28 KB each, through a few GB of disk
    python ctclip_setup.py --data train --stream-cache --plan
                                              what that would take, measured on a few volumes
    torchrun --nproc-per-node=4 ctclip_setup.py --data train --stream-cache
                                              divided among four GPUs or, with --nnodes, machines
    python ctclip_setup.py --doctor           what works here, and what to do about the rest
    python ctclip_setup.py --bundle           the suite as one file, ctclip.zip, to be uploaded (Colab)

A ctclip.zip beside this script is unpacked first, into the folder of this script.
Standard library only at import, so that it runs and explains itself on a bare interpreter. Versions are typed in
requirements.txt alone. It never replaces a torch that meets the floor written there (Colab's, a cluster's), never
prints a token, and without weights still ends with exit code 0: the built-in cohort needs none.
Exit codes: 0 ready, 2 something for you to do (one line says what), 1 the forward pass failed.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # Ctrl-C during the imports is no traceback
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)

import argparse
import hashlib
import os
import re
import subprocess
import time
import zipfile
import zlib
from pathlib import Path
from typing import NoReturn, Sequence  # noqa: UP035  (3.8 must get as far as check_python)

FOLDER = Path(__file__).resolve().parent
STAMP = "ctclip/bundle.txt"  # version and digest of a bundle, which tells it from a folder of somebody's own
BUNDLED = re.compile(
    r"ctclip/(\w+/)*[\w-]+\.(py|html|json|md|txt)|(ctclip_\w+|run_task2)\.py|models/ctclip_demo\.pt|"
    r"requirements\.txt|LICENSE",
    re.ASCII,
)
MOST_BYTES = 100_000_000  # of a bundle, unpacked; ours has 4 million


def refuse(line: str) -> NoReturn:
    """Ends as every command does; ctclip.cli is not there yet."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def read_bundle(path: Path) -> dict[str, bytes]:
    """Name -> content. Raises ValueError, or what zipfile raises, for anything but a whole bundle."""
    with zipfile.ZipFile(path) as bundle:
        entries = [entry for entry in bundle.infolist() if not entry.is_dir()]
        strange = [entry.filename for entry in entries if not BUNDLED.fullmatch(entry.filename)]
        if strange:
            raise ValueError(f"{strange[0]!r} in it, which is no file of the suite")
        if sum(entry.file_size for entry in entries) > MOST_BYTES or STAMP not in bundle.namelist():
            raise ValueError("another zip file")
        files = {entry.filename: bundle.read(entry) for entry in entries}
    digest = hashlib.sha256()
    for name in sorted(files):
        if name != STAMP:
            digest.update(f"{name} {hashlib.sha256(files[name]).hexdigest()}\n".encode())
    if files[STAMP].split()[1:] != [digest.hexdigest()[:12].encode()]:
        raise ValueError("files that are not those it was made of")
    return files


def unpack_bundle(folder: Path) -> bool:
    """Unpacks ctclip.zip, where there is one; -> whether this script is now another one.

    A package that came from another bundle is replaced, one that did not is left as it is. What is replaced is kept
    under another name. Of the same bundle only missing files are restored.
    """
    path, stamp = folder / "ctclip.zip", folder / STAMP
    if not path.is_file() or (folder / "pyproject.toml").is_file():  # a checkout needs none
        return False
    if any((folder / "ctclip").glob("**/*.py")) and not stamp.is_file():
        report("ctclip.zip is not used: a folder ctclip is here already that did not come from a bundle")
        return False
    try:
        files = read_bundle(path)
    except (ValueError, RuntimeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        found = str(error) or "a damaged file"
        refuse(f"{path}: found {found}, expected the file that --bundle writes; upload it again, or delete it")
    try:
        return Path(__file__).name in place_files(files, folder)
    except OSError as error:
        refuse(f"{error.filename}: {error.strerror}; unpack ctclip.zip in a folder with space that you may write to")


def place_files(files: dict[str, bytes], folder: Path) -> list[str]:
    """-> names of the files that were written; each is whole or not there, and a kill is made good by the next run."""
    stamp, version = folder / STAMP, files[STAMP].decode("ascii", "replace").strip()
    same = stamp.is_file() and stamp.read_bytes() == files[STAMP]
    if stamp.is_file() and not same:
        report(f"another bundle ({version}): the folder ctclip is kept as {move_aside(folder / 'ctclip')}")
    written = []
    # The package last, and its stamp before it: after a kill, what is there tells the next run that it may go on.
    for name in sorted(files, key=lambda name: (name.startswith("ctclip/"), name != STAMP)):
        target = folder / name
        if target.is_file() and (same or target.read_bytes() == files[name]):
            continue
        if target.exists():
            report(f"{name} was another one than the bundle's; it is kept as {move_aside(target)}")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_bytes(files[name])
        os.replace(temporary, target)
        written.append(name)
    if written:
        here = len(files) - len(written)
        others = f", {here} were here" if here else ""
        report(f"{len(written)} of {len(files)} files of ctclip.zip unpacked ({version}){others}")
    return written


def report(text: str) -> None:
    print(f"{'bundle':<12}{text}", flush=True)


def move_aside(path: Path) -> str:
    """Renames what may be somebody's own; -> the new name."""
    names = (f"{path.stem}.before{number or ''}{path.suffix}" for number in range(1000))
    name = next(name for name in names if not path.with_name(name).exists())
    os.replace(path, path.with_name(name))
    return name


if __name__ == "__main__":  # `python -I` finds the suite
    sys.path.insert(0, str(FOLDER))
    if unpack_bundle(FOLDER):
        sys.exit(subprocess.call([sys.executable, *sys.argv]))

try:
    from ctclip.cli import OneLineParser, refuse_unused, run_cli
    from ctclip.config import TrainingConfig
    from ctclip.environment import setup as steps
    from ctclip.environment.bundle import files_step, write_bundle
    from ctclip.environment.doctor import doctor
    from ctclip.environment.packages import SetupError, check_python, packages_step, read_requirements
    from ctclip.formatting import print_row
    from ctclip.hub.client import DISK_GB, TERMS_PAGE, WEIGHTS
    from ctclip.memory import torchrun_number
    from ctclip.paths import SUITE
except ImportError as error:  # uploaded without the package, or with one of another version
    if __name__ == "__main__":
        refuse(f"{error}, expected the folder ctclip; put ctclip.zip into {FOLDER} and run this again")
    raise

DATA_DIR = "data/ct_rate"


def setup_parser() -> OneLineParser:
    parser = OneLineParser(
        description="Installs what is missing, fetches CT-CLIP's weights and checks that everything computes.",
        epilog="models/ and results/ are made in the folder you run this in, where the other scripts look for them. "
        f"Weights and data are gated: accept the terms at {TERMS_PAGE} and set HF_TOKEN; without them the built-in "
        "cohort works all the same. HF_ENDPOINT (a mirror) and HF_HOME (token and cache) are honoured.",
    )
    add = parser.add_argument
    add("--dev", action="store_true", help="also install pytest, ruff and what else the tests take")
    add("--doctor", action="store_true", help="a table of what works here, with a remedy for what does not")
    add("--bundle", action="store_true", help="write the suite as one ctclip.zip, which a copy of this script unpacks")
    add = parser.add_argument_group("weights").add_argument
    add("--model", nargs="+", choices=list(WEIGHTS), metavar="NAME",
        help="weights to fetch, 1.77 GB each: classfine (default; predicts at once), vocabfine, zeroshot")
    add("--no-weights", action="store_true", help="fetch no weights: enough for the built-in cohort")
    add("--slim", action="store_true", help="replace each file by the tensors in use (0.7 GB; with prompts 1.2 GB)")
    add = parser.add_argument_group("data", "From CT-RATE, 21 TB in all; a volume has about 225 MB.").add_argument
    add("--data", choices=("labels", "train", "valid"), help="labels: the tables only; train, valid: volumes as well")
    add("--volumes", type=int, metavar="N", help="as many as make whole patients, drawn so that every label occurs")
    add("--patients", type=int, metavar="N", help="all volumes of so many patients, drawn likewise")
    add("--seed", type=int, default=0, help="of the draw (default 0); more of the same seed contain the fewer")
    add("--data-version", type=int, choices=(1, 2), default=2, help="2 (default): HU, right headers; 1: raw values")
    add("--data-dir", metavar="D", help=f"folder of the cohort (default {DATA_DIR}); with --doctor, the one to look at")
    add = parser.add_argument_group("streaming").add_argument
    add("--stream-cache", action="store_true", help="keep each volume's codes (28 KB) in place of the volume")
    add("--plan", action="store_true", help="measure a few volumes, print the hours and GB of all, and stop")
    add("--disk-gb", type=float, metavar="GB", default=DISK_GB,
        help=f"never use more disk than this (default {DISK_GB:g}, or what is free)")
    add("--cache-dir", metavar="C", default=TrainingConfig.cache_dir, help="where the codes go (default %(default)s)")
    add("--scratch-dir", metavar="S", help="where files are until encoded (default: in --data-dir); not on Drive")
    add("--ctclip-path", metavar="FILE", help="weights of the encoder (default: those of --model)")
    add("--shard", metavar="I/N", help="only the I-th of N parts of the volumes, for N machines without torchrun")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    return parser


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Raises UserError for a flag that nothing would look at, or a value that makes no sense."""
    options = setup_parser().parse_args(argv)
    volumes, fetching = options.data in ("train", "valid"), ("fetching (not --doctor)", not options.doctor)
    streaming = ("--stream-cache", options.stream_cache)
    refuse_unused(options.given, {
        **dict.fromkeys(("--dev", "--data", "--no-weights"), fetching),
        **dict.fromkeys(("--volumes", "--patients", "--data-version", "--stream-cache"),
                        ("--data train or valid", volumes)),
        "--seed": ("--volumes or --patients", bool(options.volumes or options.patients)),
        **dict.fromkeys(("--plan", "--disk-gb", "--cache-dir", "--scratch-dir", "--ctclip-path", "--device"),
                        streaming),
        "--shard": ("--stream-cache without --plan",
                    options.stream_cache and not options.plan),
        "--data-dir": ("--data or --doctor", bool(options.data or options.doctor)),
        "--model": ("weights (not --no-weights or --doctor)", not (options.no_weights or options.doctor)),
        "--slim": ("weights to fetch", bool(weight_names(options)) and not options.doctor),
    })
    if options.bundle and len(options.given) > 1:
        raise SetupError(f"found {' '.join(options.given)}, expected --bundle alone; leave the others out")
    if torchrun_number("WORLD_SIZE", 1) > 1 and (options.plan or not options.stream_cache):
        expected = "one process for --plan" if options.plan else "--stream-cache"
        raise SetupError(f"found torchrun with ctclip_setup.py, expected {expected}; start it with python")
    if options.volumes is not None and options.patients is not None:
        raise SetupError("found --volumes and --patients, expected one of them; leave one out")
    for flag, value, least in (("--volumes", options.volumes, 1), ("--patients", options.patients, 1),
                               ("--seed", options.seed, 0)):
        if value is not None and value < least:
            raise SetupError(f"{flag} is {value}, expected at least {least}")
    if not options.disk_gb > 0:
        raise SetupError(f"--disk-gb is {options.disk_gb:g}, expected more than 0")
    if options.stream_cache and options.no_weights and not options.ctclip_path:
        raise SetupError("--stream-cache needs weights to encode with: leave --no-weights out, or name --ctclip-path")
    return options


def weight_names(options: argparse.Namespace) -> list[str]:
    """Which weights to fetch: those that are named, else ClassFine's where the flags ask for no other work."""
    unneeded = options.ctclip_path or (options.data and not options.stream_cache)
    return [] if options.no_weights else options.model or ([] if unneeded else ["classfine"])


def setup(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    check_python()
    options = parse_options(argv)
    names = weight_names(options)
    if options.doctor:
        return doctor(Path(options.data_dir) if options.data_dir else None)
    if options.bundle:
        write_bundle()
        return 0
    failed = {} if torchrun_number("LOCAL_RANK", 0) else packages_and_weights(options, names)
    if options.data:
        steps.data_step(options, Path(options.data_dir or DATA_DIR), failed)
    else:
        steps.summary(names, failed, steps.forward_step(), options.dev)
    if not torchrun_number("RANK", 0):
        print_row("", f"done in {time.monotonic() - started:.0f} s")
    return 0


def packages_and_weights(options: argparse.Namespace, names: Sequence[str]) -> dict:
    """-> weights that are not usable, with the reason. Of torchrun's processes on a machine the first does this; the
    others wait for it where they join it."""
    print_row("setup", f"CT-CLIP Task 2 suite in {SUITE}, Python {sys.version.split()[0]}")
    files_step()
    steps.folders_step()
    packages_step(read_requirements(options.dev))
    return steps.weights_step(names, options.slim) if names else {}


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(lambda: setup(argv), "run the same command again to go on")


if __name__ == "__main__":
    sys.exit(main())
