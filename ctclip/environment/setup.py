"""The steps of ctclip_setup.py. Standard library only at import."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path
from typing import Sequence  # noqa: UP035  (3.8 must get as far as check_python)

from ctclip.environment.doctor import REINSTALL, ProcessFailed, output_of, run_probe
from ctclip.environment.packages import SetupError, installed_version
from ctclip.fileio import make_folder, move_aside
from ctclip.formatting import comma_separated, print_row, size_text
from ctclip.hub import client
from ctclip.hub.client import HubError, WeightsFile
from ctclip.paths import SUITE, module_command, script

WEIGHTS_BYTES = 1_800_000_000  # room to ask for when the hub does not announce a size
SLIM_BYTES = 720_000_000


class ForwardFailed(SetupError):
    """The installation does not compute."""

    exit_code = 1


def folders_step() -> None:
    for name in ("models", "results"):
        make_folder(name, "run this in a folder you may write to")
    print_row("folders", f"models/ and results/ in {Path.cwd()}")


# ---- weights


def weights_step(names: Sequence[str], slim: bool) -> dict[str, HubError]:
    """Fetches each; -> those that are not usable, with the reason. A file that cannot be verified stays usable."""
    failed: dict[str, HubError] = {}
    hub_error = None  # without token, access or network there is no need to wait for the same answer again
    print_row("weights", f"{comma_separated(names)} from {client.REPOSITORY}")
    for name in names:
        weights = WeightsFile(name)
        try:
            error = update_or_keep(weights, slim, hub_error)
            fingerprint_step(weights, slim and weights.path == weights.whole and weights.is_recorded)
        except HubError as caught:
            error = failed[name] = caught
        hub_error = error if error and error.kind not in ("file", "bytes", "disk") else None  # these concern one file
    if any(name in client.PROMPTED and name not in failed for name in names):
        vocabulary_step(hub_error)
    return failed


def update_or_keep(weights: WeightsFile, slim: bool, hub_error: HubError | None) -> HubError | None:
    """Fetches or checks one file and prints what was done; -> why the hub could not be asked, if so.

    `hub_error`: known before. Raises HubError where the file is neither here nor to be had.
    """
    token = ""
    try:
        if hub_error:
            raise hub_error
        with client.file_lock(weights.whole):
            token = client.find_token()
            update_weights(weights, slim, token)
        return None
    except Exception as caught:
        error = client.to_hub_error(caught, weights.file, token)
        damage = weights.damage() if weights.path else None
        if weights.path is None or damage:
            here = f"{weights.path} is damaged: {damage}" if damage else "not here"
            print_row("", f"{weights.name}: {here}: {error.reason}")
            raise error from caught
        known = "as it was when it was fetched" if weights.recorded_sha256 else "not verified"
        print_row("", f"{weights.name}: already here, {weights.size}, {known}: {error.reason}")
        return error


def update_weights(weights: WeightsFile, slim: bool, token: str) -> None:
    """Makes the file the hub's and prints what was done. `slim`: a copy beside it has to fit on the disk too."""

    def say(text: str) -> None:
        print_row("", f"{weights.name}: {text}")

    remote = client.file_metadata(weights.file, token)
    damage = weights.damage(remote) if weights.path else None
    if weights.path and damage is None:
        checked = checked_text(remote)
        if weights.path == weights.slim:
            checked = "a slim copy of the hub's file, as it was made"
        elif remote.checksum == "SHA-256":
            record_origin(weights, remote.etag)
        say(f"already here, {weights.path}, {weights.size}, {checked}")
        return
    if damage and not weights.is_recorded:  # a person's own; whether it is a model, its fingerprint will tell
        found = f"{weights.path} is left as it is: {damage}, and no record says that it was fetched"
        say(f"{found}; move it to another name to have the hub's")
        return
    if damage:
        say(f"{weights.path} is damaged: {damage}; fetching it again")
    if weights.path and weights.damage():  # not what was fetched, either: it may be a person's own by now
        say(f"what was there is kept as {move_aside(weights.path)}")
    begun = sum(part.stat().st_size for part in client.parts_of(weights.whole))
    needed = (remote.size or WEIGHTS_BYTES) - begun + (SLIM_BYTES if slim else 0)
    client.check_free_space(weights.whole.parent, needed)
    size = size_text(remote.size) if remote.size else "a file of unknown size"
    going_on = f", of which {size_text(begun)} are here" if begun else ""
    say(f"fetching {size}{going_on} to {weights.whole}")
    started = time.monotonic()
    slim_is_ours = "slim_sha256" in client.read_record(weights.whole)
    client.download(weights.file, weights.whole, token, say, remote)
    if slim_is_ours:
        weights.slim.unlink(missing_ok=True)
    weights.record.unlink(missing_ok=True)
    record_origin(weights, remote.etag if remote.checksum == "SHA-256" else client.sha256_of(weights.whole))
    say(f"{weights.whole}, {weights.size} in {time.monotonic() - started:.0f} s, {checked_text(remote)}")


def checked_text(remote: client.RemoteFile) -> str:
    return f"{remote.checksum} as on the hub" if remote.checksum else "the hub's size; it told no checksum"


def record_origin(weights: WeightsFile, sha256: str) -> None:
    """Records which file of the hub it is, unless that is known; a record of other bytes is dropped."""
    if client.read_record(weights.whole).get("sha256") != sha256:
        weights.record.unlink(missing_ok=True)
        size = weights.whole.stat().st_size
        client.write_record(
            weights.whole, repository=client.REPOSITORY, file=weights.file, size=size, sha256=sha256
        )


def fingerprint_step(weights: WeightsFile, slim: bool) -> None:
    """The fingerprint, printed and recorded; with `slim`, of the slim copy that takes the file's place.

    In a process of its own, which needs 2.3 GB of memory, unless it is recorded already. Raises HubError where the file
    is no model, or another one than was recorded.
    """
    recorded = client.read_record(weights.whole).get("fingerprint")
    digest = recorded.get("digest") if isinstance(recorded, dict) else None
    if digest and weights.recorded_sha256 and not slim:  # the file has just been compared with it, or with the hub's
        print_row("", f"{weights.name}: fingerprint {str(digest)[:12]}, kept in {weights.record}")
        return
    flags = ["--slim"] if slim else []
    try:
        said = output_of(module_command("ctclip.hub", "weights", str(weights.path), *flags), None)
    except ProcessFailed as error:
        reason = str(error).removeprefix("error: ")
        print_row("", f"{weights.name}: {reason}")
        raise HubError(reason, f"see python -m ctclip.hub weights {weights.path}", kind="file") from error
    for line in said.splitlines():
        print_row("", f"{weights.name}: {line}")


def vocabulary_step(hub_error: HubError | None) -> None:
    """Fetches or checks the text tower's vocabulary and prints what was done. Without it the weights can still be
    fine-tuned. `hub_error`: known before; one about the token does not matter here: none is sent for what is public."""
    target = client.vocabulary_path(WeightsFile(client.PROMPTED[0]).whole)  # all weights lie in one folder
    file, repository, label = client.VOCABULARY, client.VOCABULARY_REPOSITORY, "vocabulary of the prompts"
    try:
        if hub_error and hub_error.kind == "network":
            raise hub_error
        with client.file_lock(target):
            remote = client.file_metadata(file, "", repository)
            intact = target.exists() and remote.difference(target) is None
            if not intact:
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    print_row("", f"{label}: {target} is not the hub's; what was there is kept as {move_aside(target)}")
                client.download(file, target, "", lambda text: print_row("", text), remote, repository=repository)
        print_row("", f"{label}: {'already here, ' if intact else ''}{target}, {checked_text(remote)}")
    except Exception as caught:
        error = client.to_hub_error(caught, file, "", repository)
        if target.exists():
            print_row("", f"{label}: already here, {target}, not verified: {error.reason}")
        else:
            print_row("", f"{label}: not here: {error.reason}; until it is, prompts cannot be used")
            for step in error.steps:
                print_row("", f"  {step}")
    if installed_version("transformers") is None:
        print_row("", "prompts need one more package: pip install transformers")


# ---- data


def data_step(options: argparse.Namespace, data_dir: Path, failed: dict[str, HubError]) -> None:
    """`--data`: tables, volumes or codes of CT-RATE. `failed`: weights that are not usable."""
    if options.stream_cache and failed:
        raise SetupError(f"--stream-cache needs the weights: {next(iter(failed.values()))}")
    from huggingface_hub.utils import disable_progress_bars

    from ctclip.hub.download import Selection, download_tables, download_volumes
    from ctclip.hub.stream_plan import print_stream_plan
    from ctclip.hub.streaming import StreamOptions, stream
    from ctclip.shard import Shard

    disable_progress_bars()  # one for each file; ours counts volumes
    selection = Selection(options.data, options.volumes, options.patients, options.seed, options.data_version == 2)
    try:
        if options.data == "labels":
            download_tables(data_dir)
        elif options.stream_cache:
            weights = options.ctclip_path or WeightsFile((options.model or ["classfine"])[0]).whole
            scratch = Path(options.scratch_dir) if options.scratch_dir else None
            cache, shard = Path(options.cache_dir), Shard.named(options.shard)
            action = print_stream_plan if options.plan else stream
            action(selection, StreamOptions(data_dir, cache, Path(weights), scratch, options.disk_gb, options.device,
                                            shard))
        else:
            download_volumes(selection, data_dir)
    except OSError as error:
        if error.errno is None:  # of no file, such as the weights that are not there
            raise
        raise SetupError(f"{error.filename or data_dir}: {error.strerror or error}; name another --data-dir") from error


# ---- what works


def forward_step() -> str:
    """-> the device it was on."""
    try:
        result = run_probe("forward")
    except ProcessFailed as error:
        raise ForwardFailed(f"the forward pass failed: {error}; if the packages are at fault: {REINSTALL}") from error
    print_row("check", f"forward pass: {result['found']}")
    return result["device"]


def summary(names: Sequence[str], failed: dict[str, HubError], device: str, development: bool) -> None:
    """What can be used; each reason with the weights that it keeps away, each remedy once; the next command."""
    where = "on the CPU (no GPU found)" if device == "cpu" else f"on {device}"
    print()
    print_row("works now", f"training, evaluation and prediction on the built-in cohort, {where}")
    missing: dict[tuple[str, ...], dict[str, list[str]]] = {}  # steps -> reason -> names
    for name in names:
        if error := failed.get(name):
            missing.setdefault(error.steps, {}).setdefault(error.reason, []).append(name)
        else:
            print_row("", f"CT-CLIP {name}: {WeightsFile(name).path}")
    for steps, reasons in missing.items():
        for reason, without in reasons.items():
            print_row("not yet", f"CT-CLIP {comma_separated(without)} for real CT: {reason}")
        for step in steps:
            print_row("", step)
    print_row("next", f"python {script('run_task2.py')}")
    if development:
        print_row("", "python -m pytest" if Path.cwd() == SUITE else f"python -m pytest {shlex.quote(str(SUITE))}")
