"""The steps of ctclip_setup.py. Standard library only at import."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Sequence  # noqa: UP035  (3.8 must get as far as check_python)

from ctclip.cli import OneLineParser
from ctclip.environment.doctor import REINSTALL, ForwardFailed, doctor, forward_pass
from ctclip.environment.packages import (
    SetupError,
    check_python,
    installed_version,
    packages_step,
    read_requirements,
    survey,
    versions_text,
    wanted_text,
)
from ctclip.formatting import comma_separated, print_row, size_text
from ctclip.hub.client import (
    HUB_SECONDS,
    PROMPTED,
    REPOSITORY,
    TERMS_PAGE,
    VOCABULARY,
    VOCABULARY_REPOSITORY,
    WEIGHTS,
    HubError,
    RemoteFile,
    WeightsFile,
    check_disk,
    check_endpoint,
    download,
    file_lock,
    file_metadata,
    find_token,
    parts_of,
    sha256_of,
    to_hub_error,
    vocabulary_path,
    write_record,
)
from ctclip.paths import SUITE, module_command, module_environment, script

DATA_DIR = Path("data", "ct_rate")

# ---- folders


def folders_step() -> None:
    for name in ("models", "results"):
        try:
            Path(name).mkdir(exist_ok=True)
        except OSError as error:
            raise SetupError(
                f"cannot make {name}/ in {Path.cwd()} ({error.strerror}); run this in a folder you may write to"
            ) from error
    print_row("folders", f"models/ and results/ in {Path.cwd()}")


# ---- weights


WEIGHTS_BYTES = 1_800_000_000  # room to ask for when the hub does not announce a size
SLIM_BYTES = 720_000_000


def fetch_weights(weights: WeightsFile, slim: bool) -> str:
    """Makes the file the hub's; -> one phrase on what was done. `slim`: a copy beside it has to fit on the disk too."""
    token = ""
    try:
        token = find_token()
        remote = file_metadata(weights.file, token)
        checked = checked_text(remote)
        if weights.path:
            problem = weights.damage(remote)
            if problem is None:
                if weights.path == weights.whole and remote.checksum == "SHA-256":
                    keep_origin(weights, remote.etag)
                checked = checked if weights.path == weights.whole else "a slim copy of the hub's file, as it was made"
                return f"already here, {weights.path}, {weights.size}, {checked}"
            print_row("", f"{weights.name}: {weights.path} is damaged: {problem}; fetching it again")
        begun = sum(part.stat().st_size for part in parts_of(weights.whole))
        check_disk(weights.whole.parent, (remote.size or WEIGHTS_BYTES) - begun + slim * SLIM_BYTES)
        size = size_text(remote.size) if remote.size else "a file of unknown size"
        going_on = f", of which {size_text(begun)} are here" if begun else ""
        print_row("", f"{weights.name}: fetching {size}{going_on} to {weights.whole}")
        started = time.monotonic()
        download(weights.file, weights.whole, token, lambda text: print_row("", f"{weights.name}: {text}"), remote)
        weights.slim.unlink(missing_ok=True)
        weights.record.unlink(missing_ok=True)
        keep_origin(weights, remote.etag if remote.checksum == "SHA-256" else sha256_of(weights.whole))
        return f"{weights.whole}, {weights.size} in {time.monotonic() - started:.0f} s, {checked}"
    except Exception as error:
        raise to_hub_error(error, weights.file, token) from error


def checked_text(remote: RemoteFile) -> str:
    return f"{remote.checksum} as on the hub" if remote.checksum else "the hub's size; it told no checksum"


def keep_origin(weights: WeightsFile, sha256: str) -> None:
    """Keeps whose file it is, unless that is kept; what was kept of other bytes is dropped."""
    if weights.recorded().get("sha256") != sha256:
        weights.record.unlink(missing_ok=True)
        size = weights.whole.stat().st_size
        write_record(weights.whole, repository=REPOSITORY, file=weights.file, size=size, sha256=sha256)


def make_usable(weights: WeightsFile, slim: bool, hub_trouble: HubError | None) -> HubError | None:
    """Fetches or checks one file and prints what was done; -> why the hub could not be asked, if so.

    `hub_trouble`: known before. Raises HubError where the file is neither here nor to be had.
    """
    try:
        if hub_trouble:
            raise hub_trouble
        with file_lock(weights.whole):
            print_row("", f"{weights.name}: {fetch_weights(weights, slim)}")
        return None
    except HubError as trouble:
        problem = weights.damage() if weights.path else None
        if weights.path is None or problem:
            here = f"{weights.path} is damaged: {problem}" if problem else "not here"
            print_row("", f"{weights.name}: {here}: {trouble.reason}")
            raise
        known = "as it was when it was fetched" if weights.recorded().get("sha256") else "not verified"
        print_row("", f"{weights.name}: already here, {weights.size}, {known}: {trouble.reason}")
        return trouble


def fingerprint_step(weights: WeightsFile, slim: bool) -> None:
    """The fingerprint, printed and kept; with `slim`, of the slim copy that takes the file's place.

    In a process of its own, which needs 2.3 GB of memory, unless it is kept already. Raises HubError where the file
    is no model, or another one than was kept.
    """
    kept = weights.recorded().get("fingerprint")
    digest = kept.get("digest") if isinstance(kept, dict) else None
    if digest and weights.recorded_sha256 and not slim:  # the file has just been compared with it, or with the hub's
        print_row("", f"{weights.name}: fingerprint {str(digest)[:12]}, kept in {weights.record}")
        return
    command = module_command("ctclip.hub", "weights", str(weights.path), *(["--slim"] if slim else []))
    env = module_environment()
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=env)
    for line in done.stdout.splitlines():
        print_row("", f"{weights.name}: {line}")
    if done.returncode != 0:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = (said[-1] if said else f"ended with code {done.returncode}").removeprefix("error: ")
        print_row("", f"{weights.name}: {reason}")
        raise HubError(reason, f"see python -m ctclip.hub weights {weights.path}", kind="file")


def weights_step(names: Sequence[str], slim: bool) -> dict[str, HubError]:
    """Fetches each; -> the ones that are not usable, with why. A file that cannot be verified stays usable."""
    troubles: dict[str, HubError] = {}
    hub_trouble = None  # without token, access or network there is no need to wait for the same answer again
    print_row("weights", f"{comma_separated(names)} from {REPOSITORY}")
    for name in names:
        weights = WeightsFile(name)
        try:
            trouble = make_usable(weights, slim, hub_trouble)
            fingerprint_step(weights, slim and weights.path == weights.whole)
        except HubError as error:
            trouble = troubles[name] = error
        hub_trouble = trouble if trouble and not trouble.concerns_one_file else None
    if any(name in PROMPTED and name not in troubles for name in names):
        vocabulary_step(hub_trouble)
    return troubles


def weights_look(names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        weights = WeightsFile(name)
        found = f"{weights.path}, {weights.size}" if weights.path else f"{weights.whole} is not here"
        print_row("weights" if number == 0 else "", f"{name}: {found}")
    if any(name in PROMPTED for name in names):
        target = vocabulary_target()
        print_row("", f"vocabulary of the prompts: {target}{'' if target.exists() else ' is not here'}")
        note_transformers()


# ---- what prompts need beside the weights


def vocabulary_target() -> Path:
    return vocabulary_path(WeightsFile(PROMPTED[0]).whole)  # all weights lie in one folder


def fetch_vocabulary(target: Path) -> str:
    """Makes the file the hub's; -> one phrase on what was done. It is public: no token is sent for it."""
    try:
        remote = file_metadata(VOCABULARY, "", VOCABULARY_REPOSITORY)
        if target.exists():
            problem = remote.difference(target)
            if problem is None:
                return f"already here, {target}, {checked_text(remote)}"
            print_row("", f"vocabulary: {target} is damaged: {problem}; fetching it again")
        target.parent.mkdir(parents=True, exist_ok=True)
        download(VOCABULARY, target, "", lambda text: print_row("", f"vocabulary: {text}"), remote, None,
                 VOCABULARY_REPOSITORY)
        return f"{target}, {size_text(target.stat().st_size)}, {checked_text(remote)}"
    except Exception as error:
        raise to_hub_error(error, VOCABULARY, "", VOCABULARY_REPOSITORY) from error


def vocabulary_step(hub_trouble: HubError | None) -> None:
    """Fetches or checks the text tower's vocabulary and prints what was done. Without it the weights are usable all the
    same, to be fine-tuned. `hub_trouble`: known before; of the token it says nothing here."""
    target = vocabulary_target()
    try:
        if hub_trouble and hub_trouble.kind == "network":
            raise hub_trouble
        with file_lock(target):
            print_row("", f"vocabulary of the prompts: {fetch_vocabulary(target)}")
    except HubError as trouble:
        if target.exists():
            print_row("", f"vocabulary of the prompts: already here, {target}, not verified: {trouble.reason}")
        else:
            print_row("", f"vocabulary of the prompts: not here: {trouble.reason}; until it is, prompts cannot be used")
            for step in trouble.steps:
                print_row("", f"  {step}")
    note_transformers()


def note_transformers() -> None:
    if installed_version("transformers") is None:
        print_row("", "prompts need one more package: pip install transformers")


# ---- data


def data_step(options: argparse.Namespace) -> None:
    """`--data`: tables, volumes or codes of CT-RATE. Raises SetupError with the one line for whatever went wrong."""
    import torch
    from huggingface_hub.utils import disable_progress_bars

    from ctclip.data.feature_cache import CacheError
    from ctclip.data.tables import CohortError
    from ctclip.errors import UserError
    from ctclip.hub.download import Selection, download_tables, download_volumes
    from ctclip_model import CheckpointError

    disable_progress_bars()  # one for each file; ours counts volumes
    data_dir = Path(options.data_dir or DATA_DIR)
    fixed = options.data_version != 1
    selection = Selection(options.data, options.volumes, options.patients, options.seed or 0, fixed)
    try:
        if options.data == "labels":
            download_tables(data_dir)
        elif options.stream_cache:
            from ctclip.hub.streaming import DISK_GB, StreamOptions, stream

            weights = Path(options.ctclip_path or WeightsFile(options.model[0]).whole)
            scratch = Path(options.scratch_dir) if options.scratch_dir else None
            disk_gb = DISK_GB if options.disk_gb is None else options.disk_gb
            cache_dir = Path(options.cache_dir or "cache")
            stream(selection, StreamOptions(data_dir, cache_dir, weights, scratch, disk_gb, options.device))
        else:
            download_volumes(selection, data_dir)
    except HubError as trouble:
        raise SetupError(str(trouble)) from trouble
    except (CacheError, CohortError, CheckpointError, UserError, FileNotFoundError) as error:
        raise SetupError(str(error)) from error
    except OSError as error:
        raise SetupError(f"{error.filename or data_dir}: {error.strerror or error}; name another --data-dir") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        found = f"out of memory ({str(error).split('. ')[0] or 'on the CPU'})"
        raise SetupError(f"{found}; what has been encoded is kept: go on with --device cpu, or more memory") from error


# ---- verification


def verify_step() -> dict:
    result = forward_pass()
    sizes = f"{tuple(result['input'])} -> logits {tuple(result['logits'])} in {result['seconds']:.2f} s"
    print_row("check", f"forward pass: torch {result['torch']} on {result['device']}, {sizes}")
    return result


# ---- summary


def not_yet(troubles: dict[str, HubError]) -> None:
    """Each reason with the weights it keeps away, each remedy once."""
    remedies: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name, trouble in troubles.items():
        remedies.setdefault(trouble.steps, {}).setdefault(trouble.reason, []).append(name)
    label = "not yet"
    for steps, reasons in remedies.items():
        for reason, names in reasons.items():
            print_row(label, f"CT-CLIP {comma_separated(names)} for real CT: {reason}")
            label = ""
        for step in steps:
            print_row("", step)


def summary(troubles: dict[str, HubError], fetched: Sequence[str], device: str, development: bool) -> None:
    print()
    where = "on the CPU (no GPU found)" if device == "cpu" else f"on {device}"
    print_row("works now", f"training, evaluation and prediction on the built-in cohort, {where}")
    for name in fetched:
        print_row("", f"CT-CLIP {name}: {WeightsFile(name).path}")
    not_yet(troubles)
    print_row("next", f"python {script('run_task2.py')}")
    if development:
        print_row("", "python -m pytest" if Path.cwd() == SUITE else f"python -m pytest {shlex.quote(str(SUITE))}")


def failed(error: ForwardFailed) -> int:
    print(f"error: the forward pass failed: {error}; if the packages are at fault: {REINSTALL}", file=sys.stderr)
    return 1


def check(options: argparse.Namespace) -> int:
    """--check: the state of things, changing none of them."""
    ready, wanted = survey(read_requirements(options.dev))
    print_row("packages", f"{len(ready)} of {len(ready) + len(wanted)} are here: {versions_text(ready) or 'none'}")
    if wanted:
        print_row("", "missing or too old: " + wanted_text(wanted))
    weights_look(options.model)
    if wanted:
        flag = " --dev" if options.dev else ""
        raise SetupError(f"packages are missing or too old; to install them: python ctclip_setup.py{flag}")
    verify_step()
    return 0


def setup(options: argparse.Namespace) -> int:
    started = time.monotonic()
    # read when huggingface_hub is imported; its own default is as long, a caller's value wins
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(HUB_SECONDS))
    try:
        check_endpoint()
    except HubError as trouble:
        raise SetupError(str(trouble)) from trouble
    if options.doctor:
        return doctor(Path(options.data_dir) if options.data_dir else None, options.json)
    print_row("setup", f"CT-CLIP Task 2 suite in {SUITE}, Python {sys.version.split()[0]}")
    if options.check:
        return check(options)
    folders_step()
    packages_step(read_requirements(options.dev))
    troubles = weights_step(options.model, options.slim) if options.model else {}
    if options.data:
        if options.stream_cache and troubles:
            raise SetupError(f"--stream-cache needs the weights: {next(iter(troubles.values()))}")
        data_step(options)
    else:
        device = verify_step()["device"]
        summary(troubles, [name for name in options.model if name not in troubles], device, options.dev)
    print_row("", f"done in {time.monotonic() - started:.0f} s")
    return 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(
        description="Installs what is missing, fetches CT-CLIP's weights and checks that everything computes.",
        epilog="models/ and results/ are made in the folder you run this in, where the other scripts look for them. "
        f"Weights and data are gated: accept the terms at {TERMS_PAGE} and set HF_TOKEN; without them the built-in "
        "cohort works all the same. HF_ENDPOINT (a mirror) and HF_HOME (token and cache) are honoured.",
    )
    add = parser.add_argument
    add("--dev", action="store_true", help="also install pytest, ruff and what else the tests take")
    add("--check", action="store_true", help="look only; install and fetch nothing, use no network")
    add("--doctor", action="store_true", help="a table of what works here, with a remedy for what does not")
    add("--json", action="store_true", help="with --doctor: the table for scripts")
    group = parser.add_argument_group("weights")
    add = group.add_argument
    add(
        "--model", nargs="+", choices=list(WEIGHTS), metavar="NAME",
        help="weights to fetch, 1.77 GB each: classfine (default; predicts at once), vocabfine, zeroshot",
    )  # fmt: skip
    add("--no-weights", action="store_true", help="fetch no weights: enough for the built-in cohort")
    add("--slim", action="store_true", help="replace each file by the tensors in use (0.7 GB; with prompts 1.2 GB)")
    group = parser.add_argument_group("data", "From CT-RATE, 21 TB in all; a volume has about 225 MB.")
    add = group.add_argument
    add("--data", choices=("labels", "train", "valid"), help="labels: the tables only; train, valid: volumes as well")
    add("--volumes", type=int, metavar="N", help="so many, of patients drawn so that every label occurs")
    add("--patients", type=int, metavar="N", help="all volumes of so many patients, drawn likewise")
    add("--seed", type=int, help="of the draw (default 0); more of the same seed contain the fewer")
    add("--data-version", type=int, choices=(1, 2), help="2 (default): HU, right headers; 1: raw values")
    add("--data-dir", metavar="D", help=f"folder of the cohort (default {DATA_DIR}); with --doctor, the one to look at")
    group = parser.add_argument_group("streaming")
    add = group.add_argument
    add("--stream-cache", action="store_true", help="keep each volume's codes (28 KB) in place of the volume")
    add("--disk-gb", type=float, metavar="GB", help="never use more disk than this (default 10, or what is free)")
    add("--cache-dir", metavar="C", help="where the codes go (default cache)")
    add("--scratch-dir", metavar="S", help="where files are until encoded (default: in --data-dir); not on Drive")
    add("--ctclip-path", metavar="FILE", help="weights of the encoder (default: those of --model)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    options = parser.parse_args(arguments)
    refuse_idle_flags(parser, options)
    unneeded = options.doctor or options.ctclip_path or (options.data and not options.stream_cache)
    options.model = [] if options.no_weights else options.model or ([] if unneeded else ["classfine"])
    return options


def refuse_idle_flags(parser: OneLineParser, options: argparse.Namespace) -> None:
    """A flag that nothing would look at is an error: something else was meant."""
    volumes, counted = options.data in ("train", "valid"), options.volumes or options.patients
    for flag, needed, there in (
        ("--json", "--doctor", options.doctor),
        ("--volumes", "--data train or valid", volumes),
        ("--patients", "--data train or valid", volumes),
        ("--seed", "--volumes or --patients", counted),
        ("--data-version", "--data train or valid", volumes),
        ("--stream-cache", "--data train or valid", volumes),
        ("--disk-gb", "--stream-cache", options.stream_cache),
        ("--cache-dir", "--stream-cache", options.stream_cache),
        ("--scratch-dir", "--stream-cache", options.stream_cache),
        ("--ctclip-path", "--stream-cache", options.stream_cache),
        ("--device", "--stream-cache", options.stream_cache),
        ("--data-dir", "--data or --doctor", options.data or options.doctor),
        ("--slim", "weights to fetch (--no-weights, --check, --doctor)", not (
            options.no_weights or options.check or options.doctor)),
        ("--data", "being allowed to fetch (--check, --doctor)", not (options.check or options.doctor)),
    ):
        if getattr(options, flag[2:].replace("-", "_")) not in (None, False) and not there:
            parser.error(f"found {flag} without {needed}")
    if options.volumes is not None and options.patients is not None:
        parser.error("found --volumes and --patients, expected one of them")
    for flag, value, least in (
        ("--volumes", options.volumes, 1), ("--patients", options.patients, 1), ("--seed", options.seed, 0)
    ):
        if value is not None and value < least:
            parser.error(f"{flag} is {value}, expected at least {least}")
    if options.disk_gb is not None and not options.disk_gb > 0:
        parser.error(f"--disk-gb is {options.disk_gb:g}, expected more than 0")
    if options.stream_cache and options.no_weights and not options.ctclip_path:
        parser.error("--stream-cache needs weights to encode with: leave --no-weights out, or name --ctclip-path")


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True, errors="replace")
    try:
        check_python()
        return setup(parse_arguments(sys.argv[1:] if arguments is None else arguments))
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ForwardFailed as error:
        return failed(error)
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 130

