"""Does this machine do what the suite needs: a dozen checks, each with what was found and what to do about it.

Standard library only at import. What imports torch does so in a process of its own, because an import can end a
process: the probes at the end (`python -m ctclip.environment.doctor forward`, `... gpu`, `... cohort D`).
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator  # noqa: UP035  (ctclip_setup must get as far as its Python check)

from ctclip.config import TrainingConfig
from ctclip.environment.bundle import missing_files, missing_message
from ctclip.environment.packages import installed_version, read_requirements, survey, versions_text, wanted_text
from ctclip.errors import UserError
from ctclip.formatting import comma_separated, plural, print_row, size_text
from ctclip.hub import client
from ctclip.hub.client import WeightsFile
from ctclip.memory import system_memory
from ctclip.paths import SUITE, module_command, module_environment, script

LITTLE_MEMORY, LITTLE_SHARED, LITTLE_DISK = 4e9, 1e9, 5e9  # bytes
PROBE_SHAPE = (60, 120, 120)  # enough to read a file to its end and to judge it
PROBE_SECONDS = 600  # a file on a slow mount

REINSTALL = "python -m pip install --force-reinstall torch torchvision timm"
MORE_MEMORY = "end other programs, or use a machine with more: encoding one real volume takes about 3 GB"
KILLED = " (out of memory?)"
BROKEN = f"run this again; if it stays, report this line; if the packages are at fault: {REINSTALL}"
CUDA_BUILDS = "https://pytorch.org/get-started/locally"

MARKS = {"ok": "ok", "warning": "warn", "failed": "FAIL", "skipped": "skip"}
MARK_WIDTH, LEAD_WIDTH = 6, 21


@dataclass
class Row:
    """One finding. state: "ok", "warning", "failed" or "skipped"; remedy: lines."""

    name: str
    state: str
    found: str
    remedy: tuple[str, ...] = ()

    def print(self) -> None:
        """Mark, name, finding; the remedy beneath."""
        print_row(f"{MARKS[self.state]:<{MARK_WIDTH}}{self.name}", self.found, LEAD_WIDTH)
        for number, step in enumerate(self.remedy):
            print_row("", ("   " if number else "-> ") + step, MARK_WIDTH)


def warning_if(little: bool, name: str, found: str, remedy: str) -> Row:
    return Row(name, "warning", found, (remedy,)) if little else Row(name, "ok", found)


def doctor(data_dir: Path | None) -> int:
    """Prints the rows as they come; -> 0, or 2 where one failed. Never raises."""
    count: Counter[str] = Counter()
    for row in examine(data_dir):
        count[row.state] += 1
        row.print()
    skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
    print(f"\n{count['ok']} ok, {plural(count['warning'], 'warning')}, {count['failed']} failed{skipped}")
    return 2 if count["failed"] else 0


def examine(data_dir: Path | None) -> Iterator[Row]:
    """All rows, in the order of what rests on what. A check that breaks is a failed row."""
    checks: dict[str, Callable[[], Iterable[Row]]] = {
        "python": python_rows,
        "files": files_rows,
        "packages": packages_rows,
        "gpu": gpu_rows,
        "memory": memory_rows,
        "disk": disk_rows,
        "hub": hub_rows,
        "weights": weights_rows,
        "prompts": prompts_rows,
        "cohort": lambda: cohort_rows(data_dir),
        "forward pass": lambda: [Row("forward pass", "ok", run_probe("forward")["found"])],
    }
    incomplete = False
    for name, check in checks.items():
        try:
            for row in check():
                incomplete |= (row.name, row.state) == ("packages", "failed")
                yield row
        except Exception as error:
            missing = re.search(r"No module named '(\w+)", str(error))
            needs = Row(name, "skipped", f"needs {missing[1]}") if missing and incomplete else None
            yield needs or failed_row(name, error)


def failed_row(name: str, error: Exception) -> Row:
    """A check that raised."""
    known = isinstance(error, (UserError, ProcessFailed))
    said = (str(error) if known else f"{type(error).__name__}: {error}").strip().splitlines()[0]
    if isinstance(error, UserError) or said.startswith("error: "):  # the line that a command of the suite ended with
        return Row(name, "failed", *found_and_remedy(said.removeprefix("error: ")))
    return Row(name, "failed", said, (MORE_MEMORY if said.endswith(KILLED) else BROKEN,))


def found_and_remedy(line: str) -> tuple[str, tuple[str, ...]]:
    """The suite's one-line errors ("found ..., expected ...; what to do") in their two parts."""
    found, _, remedy = line.rpartition("; ")
    return (found, (remedy,)) if found else (remedy, (BROKEN,))


def setup_command() -> str:
    return f"python {script('ctclip_setup.py')}"


# ---- processes of their own


class ProcessFailed(Exception):
    """A process that gave no result; the message is the last line of its error."""


def output_of(command: list[str], seconds: float | None = PROBE_SECONDS) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds, env=module_environment()
        )
    except subprocess.TimeoutExpired as error:
        raise ProcessFailed(f"no result within {seconds:g} s") from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ProcessFailed(f"the process was ended by {name}{KILLED if name == 'SIGKILL' else ''}")
    if done.returncode > 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ProcessFailed(lines[-1] if lines else f"the process ended with code {done.returncode}")
    return done.stdout.strip()


def run_probe(name: str, *arguments: str) -> Any:
    """What the function of PROBES returns in a process of its own."""
    return json.loads(output_of(module_command("ctclip.environment.doctor", name, *arguments)).splitlines()[-1])


# ---- packages and the machine


def python_rows() -> Iterator[Row]:
    virtual, conda = sys.prefix != sys.base_prefix, Path(sys.prefix, "conda-meta").is_dir()
    where = "in a virtual environment" if virtual else "in a conda environment" if conda else "no virtual environment"
    yield Row("python", "ok", f"{sys.version.split()[0]}, {where}: {sys.executable}")


def files_rows() -> Iterator[Row]:
    """A row only where one is missing."""
    if missing := missing_files():
        yield Row("files", "failed", *found_and_remedy(missing_message(missing, SUITE)))


def packages_rows() -> Iterator[Row]:
    ready, wanted = survey(read_requirements(False))
    if wanted:
        found = f"{len(ready)} of {len(ready) + len(wanted)} are here; missing or too old: {wanted_text(wanted)}"
        yield Row("packages", "failed", found, (f"{setup_command()} installs them",))
    else:
        yield Row("packages", "ok", f"all {len(ready)} are here: {versions_text(ready)}")


def gpu_rows() -> Iterator[Row]:
    seen = run_probe("gpu")
    try:
        listed = output_of(["nvidia-smi", "-L"], 20)
    except (ProcessFailed, OSError):
        listed = ""
    if seen["gpus"]:
        yield Row("gpu", "ok", f"{seen['gpus']}; {seen['build']}")
    elif listed.startswith("GPU "):
        found = f"{listed.splitlines()[0].partition(' (')[0]} is here, but not for torch: {seen['problem']}"
        remedy = f"unset CUDA_VISIBLE_DEVICES, or install torch and torchvision for its driver's CUDA: {CUDA_BUILDS}"
        yield Row("gpu", "warning", f"{found}; {seen['build']}", (remedy,))
    else:
        yield Row("gpu", "ok", f"none: everything runs on the CPU; {seen['build']}")


def memory_rows(shared: Path = Path("/dev/shm")) -> Iterator[Row]:
    """Where the system tells."""
    if memory := system_memory():
        found = f"{size_text(memory.available)} available of {size_text(memory.total)}"
        yield warning_if(memory.available < LITTLE_MEMORY, "memory", found, MORE_MEMORY)
    if shared.is_dir():
        total, _, free = shutil.disk_usage(shared)
        remedy = "add --workers 0 to every command that reads volumes; in a container: docker run --shm-size 8g"
        found = f"{size_text(free)} free of {size_text(total)}"
        yield warning_if(free < LITTLE_SHARED, "shared memory", found, remedy)


def disk_rows() -> Iterator[Row]:
    """Of the working folder, and of those of models/, results/ and cache/ that there are: they may be elsewhere."""
    free = {}
    for folder in (Path.cwd() / name for name in ("", "models", "results", TrainingConfig.cache_dir)):
        if folder.exists():
            free[folder] = shutil.disk_usage(folder).free
            try:
                with tempfile.TemporaryFile(dir=folder):  # permission bits do not tell: root, read-only mounts
                    pass
            except OSError as error:
                remedy = "run this in a folder you may write to"
                raise UserError(f"{folder} cannot be written to ({error.strerror}); {remedy}") from error
    tightest = min(free, key=lambda folder: free[folder])
    found = f"{size_text(free[tightest])} free in {tightest}"
    remedy = "free some, or run this in a folder on a larger disk: one file of weights is 1.77 GB"
    yield warning_if(free[tightest] < LITTLE_DISK, "disk", found, remedy)


# ---- the hub and its weights


def hub_rows() -> Iterator[Row]:
    """What the hub answers to the token. A warning without one and where waiting may help: the rest works meanwhile."""
    from huggingface_hub import constants, get_token

    file, token, started = client.WEIGHTS["classfine"], "", time.monotonic()
    try:
        token = client.find_token()
        client.file_metadata(file, token)
    except Exception as caught:
        error = client.to_hub_error(caught, file, token)
        optional = error.is_transient or constants.HF_HUB_OFFLINE or not get_token()
        yield Row("hub", "warning" if optional else "failed", error.reason, error.steps)
    else:
        seconds = time.monotonic() - started
        yield Row("hub", "ok", f"the token may read CT-RATE ({client.hub_host()} answered in {seconds:.1f} s)")


def weights_rows() -> Iterator[Row]:
    """Of each file: its SHA-256 against the recorded one, then its fingerprint, which is recorded if there was none."""
    files = [weights for weights in map(WeightsFile, client.WEIGHTS) if weights.path]
    if not files:
        remedy = f"once the token may read CT-RATE: {setup_command()}"
        yield Row("weights", "warning", "none in models/; the built-in cohort needs none", (remedy,))
    for weights in files:
        if problem := weights.damage():
            again = f"fetch it again: {setup_command()} --model {weights.name}"
            yield Row("weights", "failed", f"{weights.name}: {weights.path}: {problem}", (again,))
            continue
        try:
            said = output_of(module_command("ctclip.hub", "weights", str(weights.path))).splitlines()[-1]
        except ProcessFailed as error:
            row = failed_row("weights", error)
            yield Row("weights", "failed", f"{weights.name}: {row.found}", row.remedy)
        else:
            checked = ", SHA-256 as kept" if weights.recorded_sha256 else ""
            yield Row("weights", "ok", f"{weights.name}: {weights.path}, {weights.size}{checked}; {said}")


def prompts_rows() -> Iterator[Row]:
    """What predicting by prompts needs beside the weights; no row where no weights classify that way."""
    files = [weights for weights in map(WeightsFile, client.PROMPTED) if weights.path]
    if not files:
        return
    vocabulary, transformers = client.vocabulary_path(files[0].whole), installed_version("transformers")
    remedies = []
    if not vocabulary.exists():
        remedies.append(f"{setup_command()} --model {files[0].name} fetches its vocabulary")
    if transformers is None:
        remedies.append("pip install transformers")
    names = comma_separated(weights.name for weights in files)
    if remedies:
        yield Row("prompts", "warning", f"{names}: new prompts need more; the rest works", tuple(remedies))
    else:
        yield Row("prompts", "ok", f"{names}: {vocabulary}, transformers {transformers}")


def cohort_rows(data_dir: Path | None) -> Iterator[Row]:
    if data_dir is None:
        yield Row("cohort", "skipped", "no --data-dir given")
        return
    for state, text in run_probe("cohort", str(data_dir)):
        yield Row("cohort", state, text) if state == "ok" else Row("cohort", state, *found_and_remedy(text))


# ---- probes: functions that import torch or read volumes, each in a process of its own (`run_probe`)


def probe_forward() -> dict[str, str]:
    """A small volume through the demo model, or through a slice model where that file is absent."""
    import timm  # noqa: F401  (which fails where torchvision does not fit torch)
    import torch

    from ctclip_model import ABNORMALITIES, DEMO_PATH, CTCLIPMultiAbnormalityModel

    if Path(DEMO_PATH).exists():
        model = CTCLIPMultiAbnormalityModel(ctclip_path=DEMO_PATH)
        volume = torch.zeros(1, 1, *model.input_shape)
    else:
        model = CTCLIPMultiAbnormalityModel(ctclip_path=None, backbone="resnet18", pretrained=False)
        volume = torch.zeros(1, 3, 64, 64)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    start = time.monotonic()
    with torch.no_grad():
        logits = model(volume.to(device))
    if tuple(logits.shape) != (1, len(ABNORMALITIES)) or not bool(torch.isfinite(logits).all()):
        raise RuntimeError(f"logits of shape {tuple(logits.shape)}, expected finite (1, {len(ABNORMALITIES)})")
    seconds = time.monotonic() - start
    where = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    sizes = f"{tuple(volume.shape)} -> logits {tuple(logits.shape)}"
    return {"device": where, "found": f"torch {torch.__version__} on {where}, {sizes} in {seconds:.2f} s"}


def probe_gpu() -> dict[str, str]:
    """The GPUs that torch can use, "" for none; then `problem` says why."""
    import torch

    build = f"torch {torch.__version__} for " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU")
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        return {"gpus": "", "build": build, "problem": str(error).strip().splitlines()[0]}
    from ctclip.inference.predictor import choose_precision

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = Counter(f"{device.name} with {size_text(device.total_memory)}" for device in devices)
    gpus = comma_separated(f"{count} x {kind}" for kind, count in kinds.items())
    precision = str(choose_precision(torch.device("cuda"))).removeprefix("torch.")
    return {"gpus": gpus, "build": f"{build}; half precision: {precision}"}


def probe_cohort(data_dir: str) -> list[tuple[str, str]]:
    """States and texts: of each split whose label table is there, what it holds, and how its first, middle and last
    file are read; of each kind of warning about these, a line; of each file that cannot be read, its error."""
    from ctclip.data.ct_rate import SPLITS, labels_path

    if not Path(data_dir).is_dir():
        return [("failed", f"found no folder {data_dir}, expected the cohort's; check --data-dir")]
    tables = {split: Path(data_dir, labels_path(split)) for split in SPLITS}
    present = [split for split, table in tables.items() if table.exists()]
    if not present:
        return [("failed", f"found no {tables[SPLITS[0]]}, expected a table of labels; check --data-dir")]
    return [row for split in present for row in _probe_split(data_dir, split)]


def _probe_split(data_dir: str, split: str) -> list[tuple[str, str]]:
    from ctclip.data.cohort import load_cohort
    from ctclip.data.ct_rate import VOLUME_SUFFIX, no_chest_path
    from ctclip.data.loading import NOTE_SEPARATOR, count_notes
    from ctclip.data.preprocessing import read_volume
    from ctclip.data.tables import CohortError
    from ctclip.data.volume_file import VolumeError

    try:
        cohort = load_cohort(data_dir, split)
    except CohortError as error:
        return [("failed", f"{split}: {error}")]
    on_disk = [volume for volume in cohort.volumes if volume.signature is None]
    tried = sorted({0, len(on_disk) // 2, len(on_disk) - 1}) if on_disk else []
    read_as: dict[tuple[str, str], list[str]] = {}
    faults: list[tuple[str, str]] = []
    notes: dict[str, str] = {}
    for volume in (on_disk[place] for place in tried):
        try:
            _, decision = read_volume(volume, PROBE_SHAPE)
        except (VolumeError, OSError, MemoryError) as error:
            faults.append(("failed", str(error) or f"{volume.name}: {type(error).__name__}"))
        else:
            folder, *_, why = decision.evidence.split("; ")
            key = decision.reading, f"{folder}, {why.partition(': ')[2]}"
            read_as.setdefault(key, []).append(volume.name.removesuffix(VOLUME_SUFFIX))
            if decision.notes:
                notes[volume.name] = NOTE_SEPARATOR.join(decision.notes)
    found = "; ".join(cohort.summary().splitlines())
    if tried:  # else: streamed
        found += f"; {len(tried) - len(faults)} of {len(tried)} files tried can be read"
    for (reading, evidence), names in read_as.items():
        found += f"; as {reading}: {comma_separated(names)} ({evidence})"
    remedy = f"look at it, or list it in {no_chest_path(split)}"
    warned = [("warning", f"{split}, {len(tried)} files tried: {line}; {remedy}") for line in count_notes(notes)]
    return [("ok", f"{split}: {found}"), *warned, *faults]


PROBES: dict[str, Callable[..., object]] = {"forward": probe_forward, "gpu": probe_gpu, "cohort": probe_cohort}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]](*sys.argv[2:])))
