"""The steps of ctclip_setup.py. Standard library only at import."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import time
from pathlib import Path
from typing import Sequence  # noqa: UP035  (3.8 must get as far as check_python)

from ctclip.environment.doctor import REINSTALL, ProcessFailed, run_probe
from ctclip.environment.packages import (
    SetupError,
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
    VOCABULARY,
    VOCABULARY_REPOSITORY,
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

__all__ = ["check", "configure_hub", "data_step", "folders_step", "forward_step", "packages_step", "summary",
           "weights_step"]

WEIGHTS_BYTES = 1_800_000_000  # room to ask for when the hub does not announce a size
SLIM_BYTES = 720_000_000


class ForwardFailed(SetupError):
    """The installation does not compute."""

    exit_code = 1


def configure_hub() -> None:
    """Before huggingface_hub is imported. Raises HubError for an HF_ENDPOINT with which it would not import."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(HUB_SECONDS))  # its own default is as long; a caller's value wins
    check_endpoint()


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


def weights_step(names: Sequence[str], slim: bool) -> dict[str, HubError]:
    """Fetches each; -> those that are not usable, with the reason. A file that cannot be verified stays usable."""
    failed: dict[str, HubError] = {}
    hub_error = None  # without token, access or network there is no need to wait for the same answer again
    print_row("weights", f"{comma_separated(names)} from {REPOSITORY}")
    for name in names:
        weights = WeightsFile(name)
        try:
            error = update_or_keep(weights, slim, hub_error)
            fingerprint_step(weights, slim and weights.path == weights.whole)
        except HubError as caught:
            error = failed[name] = caught
        hub_error = error if error and not error.concerns_one_file else None
    if any(name in PROMPTED and name not in failed for name in names):
        vocabulary_step(hub_error)
    return failed


def update_or_keep(weights: WeightsFile, slim: bool, hub_error: HubError | None) -> HubError | None:
    """Fetches or checks one file and prints what was done; -> why the hub could not be asked, if so.

    `hub_error`: known before. Raises HubError where the file is neither here nor to be had.
    """
    try:
        if hub_error:
            raise hub_error
        with file_lock(weights.whole):
            print_row("", f"{weights.name}: {update_weights(weights, slim)}")
        return None
    except HubError as error:
        damage = weights.damage() if weights.path else None
        if weights.path is None or damage:
            here = f"{weights.path} is damaged: {damage}" if damage else "not here"
            print_row("", f"{weights.name}: {here}: {error.reason}")
            raise
        known = "as it was when it was fetched" if weights.recorded().get("sha256") else "not verified"
        print_row("", f"{weights.name}: already here, {weights.size}, {known}: {error.reason}")
        return error


def update_weights(weights: WeightsFile, slim: bool) -> str:
    """Makes the file the hub's; -> one phrase on what was done. `slim`: a copy beside it has to fit on the disk too."""
    token = ""
    try:
        token = find_token()
        remote = file_metadata(weights.file, token)
        checked = checked_text(remote)
        if weights.path:
            damage = weights.damage(remote)
            if damage is None:
                if weights.path == weights.slim:
                    checked = "a slim copy of the hub's file, as it was made"
                elif remote.checksum == "SHA-256":
                    record_origin(weights, remote.etag)
                return f"already here, {weights.path}, {weights.size}, {checked}"
            print_row("", f"{weights.name}: {weights.path} is damaged: {damage}; fetching it again")
        begun = sum(part.stat().st_size for part in parts_of(weights.whole))
        check_disk(weights.whole.parent, (remote.size or WEIGHTS_BYTES) - begun + (SLIM_BYTES if slim else 0))
        size = size_text(remote.size) if remote.size else "a file of unknown size"
        going_on = f", of which {size_text(begun)} are here" if begun else ""
        print_row("", f"{weights.name}: fetching {size}{going_on} to {weights.whole}")
        started = time.monotonic()
        download(weights.file, weights.whole, token, lambda text: print_row("", f"{weights.name}: {text}"), remote)
        weights.slim.unlink(missing_ok=True)
        weights.record.unlink(missing_ok=True)
        record_origin(weights, remote.etag if remote.checksum == "SHA-256" else sha256_of(weights.whole))
        return f"{weights.whole}, {weights.size} in {time.monotonic() - started:.0f} s, {checked}"
    except Exception as error:
        raise to_hub_error(error, weights.file, token) from error


def checked_text(remote: RemoteFile) -> str:
    return f"{remote.checksum} as on the hub" if remote.checksum else "the hub's size; it told no checksum"


def record_origin(weights: WeightsFile, sha256: str) -> None:
    """Records which file of the hub it is, unless that is known; a record of other bytes is dropped."""
    if weights.recorded().get("sha256") != sha256:
        weights.record.unlink(missing_ok=True)
        size = weights.whole.stat().st_size
        write_record(weights.whole, repository=REPOSITORY, file=weights.file, size=size, sha256=sha256)


def fingerprint_step(weights: WeightsFile, slim: bool) -> None:
    """The fingerprint, printed and recorded; with `slim`, of the slim copy that takes the file's place.

    In a process of its own, which needs 2.3 GB of memory, unless it is recorded already. Raises HubError where the file
    is no model, or another one than was recorded.
    """
    recorded = weights.recorded().get("fingerprint")
    digest = recorded.get("digest") if isinstance(recorded, dict) else None
    if digest and weights.recorded_sha256 and not slim:  # the file has just been compared with it, or with the hub's
        print_row("", f"{weights.name}: fingerprint {str(digest)[:12]}, kept in {weights.record}")
        return
    command = module_command("ctclip.hub", "weights", str(weights.path), *(["--slim"] if slim else []))
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", env=module_environment()
    )
    for line in done.stdout.splitlines():
        print_row("", f"{weights.name}: {line}")
    if done.returncode != 0:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = (said[-1] if said else f"ended with code {done.returncode}").removeprefix("error: ")
        print_row("", f"{weights.name}: {reason}")
        raise HubError(reason, f"see python -m ctclip.hub weights {weights.path}", kind="file")


# ---- what prompts need beside the weights


def vocabulary_target() -> Path:
    return vocabulary_path(WeightsFile(PROMPTED[0]).whole)  # all weights lie in one folder


def update_vocabulary(target: Path) -> str:
    """Makes the file the hub's; -> one phrase on what was done. It is public: no token is sent for it."""
    try:
        remote = file_metadata(VOCABULARY, "", VOCABULARY_REPOSITORY)
        if target.exists():
            difference = remote.difference(target)
            if difference is None:
                return f"already here, {target}, {checked_text(remote)}"
            print_row("", f"vocabulary: {target} is damaged: {difference}; fetching it again")
        target.parent.mkdir(parents=True, exist_ok=True)
        download(VOCABULARY, target, "", lambda text: print_row("", f"vocabulary: {text}"), remote,
                 repository=VOCABULARY_REPOSITORY)
        return f"{target}, {size_text(target.stat().st_size)}, {checked_text(remote)}"
    except Exception as error:
        raise to_hub_error(error, VOCABULARY, "", VOCABULARY_REPOSITORY) from error


def vocabulary_step(hub_error: HubError | None) -> None:
    """Fetches or checks the text tower's vocabulary and prints what was done. Without it the weights can still be
    fine-tuned. `hub_error`: known before; one about the token does not matter here."""
    target = vocabulary_target()
    try:
        if hub_error and hub_error.kind == "network":
            raise hub_error
        with file_lock(target):
            print_row("", f"vocabulary of the prompts: {update_vocabulary(target)}")
    except HubError as error:
        if target.exists():
            print_row("", f"vocabulary of the prompts: already here, {target}, not verified: {error.reason}")
        else:
            print_row("", f"vocabulary of the prompts: not here: {error.reason}; until it is, prompts cannot be used")
            for step in error.steps:
                print_row("", f"  {step}")
    note_transformers()


def note_transformers() -> None:
    if installed_version("transformers") is None:
        print_row("", "prompts need one more package: pip install transformers")


# ---- data


def data_step(options: argparse.Namespace, data_dir: Path, failed: dict[str, HubError]) -> None:
    """`--data`: tables, volumes or codes of CT-RATE. `failed`: weights that are not usable."""
    if options.stream_cache and failed:
        raise SetupError(f"--stream-cache needs the weights: {next(iter(failed.values()))}")
    import torch
    from huggingface_hub.utils import disable_progress_bars

    from ctclip.hub.download import Selection, download_tables, download_volumes
    from ctclip.hub.streaming import StreamOptions, stream

    disable_progress_bars()  # one for each file; ours counts volumes
    selection = Selection(options.data, options.volumes, options.patients, options.seed, options.data_version == 2)
    try:
        if options.data == "labels":
            download_tables(data_dir)
        elif options.stream_cache:
            weights = options.ctclip_path or WeightsFile((options.model or ["classfine"])[0]).whole
            scratch = Path(options.scratch_dir) if options.scratch_dir else None
            cache = Path(options.cache_dir)
            stream(selection, StreamOptions(data_dir, cache, Path(weights), scratch, options.disk_gb, options.device))
        else:
            download_volumes(selection, data_dir)
    except OSError as error:
        if error.errno is None:  # of no file, such as the weights that are not there
            raise
        raise SetupError(f"{error.filename or data_dir}: {error.strerror or error}; name another --data-dir") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        found = f"out of memory ({str(error).split('. ')[0] or 'on the CPU'})"
        raise SetupError(f"{found}; what has been encoded is kept: go on with --device cpu, or more memory") from error


# ---- what works


def forward_step() -> dict:
    try:
        result = run_probe("forward")
    except ProcessFailed as error:
        raise ForwardFailed(f"the forward pass failed: {error}; if the packages are at fault: {REINSTALL}") from error
    sizes = f"{tuple(result['input'])} -> logits {tuple(result['logits'])} in {result['seconds']:.2f} s"
    print_row("check", f"forward pass: torch {result['torch']} on {result['device']}, {sizes}")
    return result


def summary(failed: dict[str, HubError], usable: Sequence[str], device: str, development: bool) -> None:
    """What can be used; each reason with the weights that it keeps away, each remedy once; the next command."""
    print()
    where = "on the CPU (no GPU found)" if device == "cpu" else f"on {device}"
    print_row("works now", f"training, evaluation and prediction on the built-in cohort, {where}")
    for name in usable:
        print_row("", f"CT-CLIP {name}: {WeightsFile(name).path}")
    remedies: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name, error in failed.items():
        remedies.setdefault(error.steps, {}).setdefault(error.reason, []).append(name)
    label = "not yet"
    for steps, reasons in remedies.items():
        for reason, names in reasons.items():
            print_row(label, f"CT-CLIP {comma_separated(names)} for real CT: {reason}")
            label = ""
        for step in steps:
            print_row("", step)
    print_row("next", f"python {script('run_task2.py')}")
    if development:
        print_row("", "python -m pytest" if Path.cwd() == SUITE else f"python -m pytest {shlex.quote(str(SUITE))}")


def check(names: Sequence[str], development: bool) -> None:
    """--check: the state of things, changing none of them."""
    ready, wanted = survey(read_requirements(development))
    print_row("packages", f"{len(ready)} of {len(ready) + len(wanted)} are here: {versions_text(ready) or 'none'}")
    if wanted:
        print_row("", "missing or too old: " + wanted_text(wanted))
    for number, name in enumerate(names):
        weights = WeightsFile(name)
        found = f"{weights.path}, {weights.size}" if weights.path else f"{weights.whole} is not here"
        print_row("weights" if number == 0 else "", f"{name}: {found}")
    if any(name in PROMPTED for name in names):
        target = vocabulary_target()
        print_row("", f"vocabulary of the prompts: {target}{'' if target.exists() else ' is not here'}")
        note_transformers()
    if wanted:
        flag = " --dev" if development else ""
        raise SetupError(f"packages are missing or too old; to install them: python ctclip_setup.py{flag}")
    forward_step()
