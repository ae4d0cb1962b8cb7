"""Does this machine do what the suite needs: a dozen checks, each with what was found and what to do about it.

Standard library only at import. What imports torch does so in a process of its own, because an import can end a
process: the probes at the end (`python -m ctclip.environment.doctor forward`, `... gpu`, `... cohort D`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator  # noqa: UP035  (ctclip_setup must get as far as its Python check)

from ctclip.config import TrainingConfig
from ctclip.environment.packages import (
    OLDEST_PYTHON,
    SetupError,
    installed_version,
    read_requirements,
    survey,
    versions_text,
    wanted_text,
)
from ctclip.formatting import TIED, WIDTH, comma_separated, size_text
from ctclip.hub.client import (
    PROMPTED,
    WEIGHTS,
    HubError,
    WeightsFile,
    file_metadata,
    find_token,
    hub_host,
    sha256_of,
    to_hub_error,
    vocabulary_path,
)
from ctclip.memory import system_memory
from ctclip.paths import module_command, module_environment, script

SYSTEM = Path("/")  # where proc/, sys/ and dev/ are
LITTLE_MEMORY, LITTLE_SHARED, LITTLE_DISK = 4e9, 1e9, 5e9  # bytes
PROBE_SHAPE = (60, 120, 120)  # enough to read a file to its end and to judge it
PROBE_SECONDS = 600  # a file on a slow mount

REINSTALL = "python -m pip install --force-reinstall torch torchvision timm"
MORE_MEMORY = "end other programs, or use a machine with more: encoding one real volume takes about 3 GB"
KILLED = " (out of memory?)"
BROKEN = "the check itself broke: run this again, and report this line if it stays"
CUDA_BUILDS = "https://pytorch.org/get-started/locally"

MARKS = {"ok": "ok", "warning": "warn", "failed": "FAIL", "skipped": "skip"}
MARK_WIDTH, NAME_WIDTH = 6, 15


@dataclass
class Row:
    """One finding. state: "ok", "warning", "failed" or "skipped"; remedy: lines; numbers: the same for scripts."""

    name: str
    state: str
    found: str
    remedy: tuple[str, ...] = ()
    numbers: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        texts = {"found": self.found, "remedy": "\n".join(self.remedy)}
        texts = {key: text.replace(TIED, " ") for key, text in texts.items()}
        return {"name": self.name, "state": self.state, **texts, **self.numbers}

    def __str__(self) -> str:
        """Lines of at most 100 columns, a path that is longer excepted: mark, name, finding; the remedy beneath."""
        lead, margin = f"{MARKS[self.state]:<{MARK_WIDTH}}{self.name:<{NAME_WIDTH}}", " " * MARK_WIDTH
        lines = wrapped(lead + self.found, "", " " * len(lead))
        for number, step in enumerate(self.remedy):
            numbered = "   " if re.match(r"\d\. ", step) else ""
            lines += wrapped(step, margin + ("   " if number else "-> "), margin + "   " + numbered)
        return "\n".join(lines).replace(TIED, " ")


def warning_if(little: bool, name: str, found: str, remedy: str, numbers: dict) -> Row:
    return Row(name, "warning", found, (remedy,), numbers) if little else Row(name, "ok", found, (), numbers)


def wrapped(text: str, first: str, further: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=further, break_long_words=False, break_on_hyphens=False
    )


def doctor(data_dir: Path | None, as_json: bool) -> int:
    """Prints the rows as they come, or all of them as one JSON object; -> 0, or 2 where one failed. Never raises."""
    rows = []
    for row in examine(data_dir):
        rows.append(row)
        if not as_json:
            print(row, flush=True)
    count = Counter(row.state for row in rows)
    if as_json:
        report: dict[str, object] = {
            "rows": [row.as_dict() for row in rows],
            "failed": count["failed"],
            "python": sys.version.split()[0],
            "versions": next((row.numbers["versions"] for row in rows if "versions" in row.numbers), {}),
        }
        print(json.dumps(report, indent=2))
    else:
        warnings = f"{count['warning']} warning{'' if count['warning'] == 1 else 's'}"
        skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
        print(f"\n{count['ok']} ok, {warnings}, {count['failed']} failed{skipped}")
    return 2 if count["failed"] else 0


def examine(data_dir: Path | None) -> Iterator[Row]:
    """All rows, in the order of what rests on what. A check that breaks is a failed row."""
    checks = {
        "python": python_rows,
        "packages": packages_rows,
        "gpu": gpu_rows,
        "memory": memory_rows,
        "shared memory": shared_rows,
        "disk": disk_rows,
        "token": token_rows,
        "hub": hub_rows,
        "weights": weights_rows,
        "prompts": prompts_rows,
        "cohort": lambda: cohort_rows(data_dir),
        "forward pass": forward_rows,
    }
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:
            yield failed_row(name, error)


def failed_row(name: str, error: Exception, *remedy: str) -> Row:
    """A check that raised: skipped where it needs a package that is missing, else failed."""
    if isinstance(error, SetupError):
        return Row(name, "failed", *found_and_remedy(str(error)))
    said = str(error) if isinstance(error, ProcessFailed) else f"{type(error).__name__}: {error}"
    said = said.strip().splitlines()[0]
    package = missing_package(said)
    if package:
        return Row(name, "skipped", f"needs {package}")
    return Row(name, "failed", said, (MORE_MEMORY,) if said.endswith(KILLED) else remedy or (BROKEN,))


def missing_package(said: str) -> str | None:
    """The requirement whose absence an error tells of; None for modules of the suite, or that packages bring along."""
    module = re.search(r"No module named '(\w+)", said)
    package = module and {"sklearn": "scikit-learn"}.get(module[1], module[1])
    if not package or installed_version(package) is not None:
        return None
    with contextlib.suppress(SetupError):  # says so in its own row
        return next((need.name for need in read_requirements(False) if need.name == package), None)
    return None


def found_and_remedy(line: str) -> tuple[str, tuple[str, ...]]:
    """The suite's one-line errors ("found ..., expected ...; what to do") in their two parts."""
    found, _, remedy = line.rpartition("; ")
    return (found, (remedy,)) if found else (remedy, (BROKEN,))


def setup_command() -> str:
    return f"python {script('ctclip_setup.py')}"


# ---- processes of their own


class ProcessFailed(Exception):
    """A process that gave no result; the message is the last line of its error."""


def output_of(command: list[str], seconds: float) -> str:
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
    command = module_command("ctclip.environment.doctor", name, *arguments)
    return json.loads(output_of(command, PROBE_SECONDS).splitlines()[-1])


# ---- Python and packages


def python_rows() -> Iterator[Row]:
    virtual = sys.prefix != sys.base_prefix
    conda = Path(sys.prefix, "conda-meta").is_dir()
    where = "in a virtual environment" if virtual else "in a conda environment" if conda else "no virtual environment"
    found = f"{sys.version.split()[0]}, {where}: {sys.executable}"
    numbers = {"executable": sys.executable, "virtual_environment": virtual or conda}
    if tuple(sys.version_info[:2]) >= OLDEST_PYTHON:
        yield Row("python", "ok", found, numbers=numbers)
    else:
        newer = f"run this with Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer (python3.11, ...)"
        yield Row("python", "failed", found, (newer,), numbers)


def packages_rows() -> Iterator[Row]:
    ready, wanted = survey(read_requirements(False))
    old = {need.name: version for need, version in wanted.items() if version}
    numbers = {"versions": {**ready, **old}, "missing": [str(need) for need in wanted]}
    if wanted:
        found = f"{len(ready)} of {len(ready) + len(wanted)} are here; missing or too old: {wanted_text(wanted)}"
        yield Row("packages", "failed", found, (f"{setup_command()} installs them",), numbers)
    else:
        yield Row("packages", "ok", f"all {len(ready)} are here: {versions_text(ready)}", numbers=numbers)


# ---- the machine


def driver_gpus() -> tuple[list[dict], str | None, str]:
    """(name and memory of each GPU, the driver's version, what nvidia-smi says where it is there and sees none)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], None, ""
    try:
        query = "--query-gpu=name,memory.total,driver_version"
        output = output_of([program, query, "--format=csv,noheader,nounits"], 20)
    except (ProcessFailed, OSError) as error:
        return [], None, str(error)
    lines = [line for line in output.splitlines() if line.count(",") >= 2]
    parts = [[part.strip() for part in line.rsplit(",", 2)] for line in lines]
    gpus = [{"name": name, "memory_bytes": int(mebi) << 20 if mebi.isdigit() else None} for name, mebi, _ in parts]
    return gpus, parts[0][2] if parts else None, "" if parts else output.partition("\n")[0]


def gpus_text(gpus: list[dict]) -> str:
    kinds = Counter((gpu["name"], gpu["memory_bytes"]) for gpu in gpus)
    return comma_separated(
        (f"{count} x " if count > 1 else "") + name + (f" with {size_text(memory)}" if memory else "")
        for (name, memory), count in kinds.items()
    )


def gpu_rows() -> Iterator[Row]:
    gpus, driver, complaint = driver_gpus()
    try:
        seen = run_probe("gpu")
    except ProcessFailed as error:
        row = failed_row("gpu", error, f"if the packages are at fault: {REINSTALL}")
        if gpus:
            row.found += f"; nvidia-smi sees {gpus_text(gpus)}, driver {driver}"
        yield row
        return
    build = f"torch {seen['torch']} for " + (f"CUDA {seen['cuda']}" if seen["cuda"] else "the CPU")
    numbers = {**seen, "driver": driver}
    if seen["devices"]:
        found = f"{gpus_text(seen['devices'])}; {build}" + (f", driver {driver}" if driver else "")
        yield Row("gpu", "ok", f"{found}; half precision: {seen['precision']}", numbers=numbers)
    elif gpus:
        why, remedy = unseen_gpu(seen, driver)
        yield Row("gpu", "warning", f"{gpus_text(gpus)} is here, but not for torch: {why}", (remedy,), numbers)
    else:
        note = f"; nvidia-smi: {complaint}" if complaint else ""
        yield Row("gpu", "ok", f"none: everything runs on the CPU; {build}{note}", numbers=numbers)


def unseen_gpu(seen: dict, driver: str | None) -> tuple[str, str]:
    """Why torch does not use a GPU that the driver has, and what to do."""
    if seen["cuda"] is None:
        why = f"torch {seen['torch']} is built for the CPU only"
        return why, f"install torch and torchvision built for CUDA: {CUDA_BUILDS}"
    if "too old" in seen["problem"]:
        why = f"driver {driver} is too old for its CUDA {seen['cuda']}"
        return why, f"update the driver, or install torch and torchvision built for an older CUDA: {CUDA_BUILDS}"
    if "no kernel image" in seen["problem"]:
        why = f"torch {seen['torch']} has no kernels for it: it is too old, or too new"
        return why, f"install torch and torchvision built for another CUDA: {CUDA_BUILDS}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"CUDA_VISIBLE_DEVICES is {hidden!r}", "unset CUDA_VISIBLE_DEVICES"
    return seen["problem"], "restart the machine or the container; if it stays, install the driver again"


def memory_rows() -> Iterator[Row]:
    memory = system_memory(SYSTEM)
    if memory is None:
        yield Row("memory", "skipped", "this system does not tell (no /proc/meminfo)")
        return
    found = f"{size_text(memory.available)} available of {size_text(memory.total)}"
    found += ", the limit of its cgroup" if memory.limited else ""
    numbers = {"available_bytes": memory.available, "total_bytes": memory.total, "cgroup_limited": memory.limited}
    yield warning_if(memory.available < LITTLE_MEMORY, "memory", found, MORE_MEMORY, numbers)


def shared_rows() -> Iterator[Row]:
    folder = SYSTEM / "dev/shm"
    if not folder.is_dir():
        yield Row("shared memory", "skipped", "this system has no /dev/shm")
        return
    total, _, free = shutil.disk_usage(folder)
    found, numbers = f"{size_text(free)} free of {size_text(total)}", {"free_bytes": free, "total_bytes": total}
    remedy = "add --workers 0 to every command that reads volumes; in a container: docker run --shm-size 8g"
    yield warning_if(free < LITTLE_SHARED, "shared memory", found, remedy, numbers)


def disk_rows() -> Iterator[Row]:
    """Of the working folder, and of those of models/, results/ and cache/ that there are: they may be elsewhere."""
    here, free = Path.cwd(), {}
    others = [here / name for name in ("models", "results", TrainingConfig.cache_dir)]
    for folder in (here, *(other for other in others if other.exists())):
        free[folder] = shutil.disk_usage(folder).free
        try:
            with tempfile.TemporaryFile(dir=folder):  # permission bits do not tell: root, read-only mounts
                pass
        except OSError as error:
            found = f"{folder} cannot be written to ({error.strerror})"
            yield Row("disk", "failed", found, ("run this in a folder you may write to",), {"folder": str(folder)})
            return
    tightest = min(free, key=lambda folder: free[folder])
    numbers = {"free_bytes": free[tightest], "folder": str(tightest)}
    found = f"{size_text(free[tightest])} free in {tightest}"
    remedy = "free some, or run this in a folder on a larger disk: one file of weights is 1.77 GB"
    yield warning_if(free[tightest] < LITTLE_DISK, "disk", found, remedy, numbers)


# ---- the hub


def token_source(token: str) -> str:
    names = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name, "").strip() == token]
    return f"in {names[0]}" if names else "stored by `hf auth login`"


def token_rows() -> Iterator[Row]:
    from huggingface_hub import get_token

    try:
        source = token_source(find_token())
    except HubError as error:
        state = "failed" if get_token() else "warning"  # the built-in cohort needs none
        yield Row("token", state, error.reason, error.steps, {"source": None})
        return
    yield Row("token", "ok", f"found, {source}", numbers={"source": source})


def hub_rows() -> Iterator[Row]:
    """What the hub answers to this token. It is a warning where waiting may help: what needs no hub works meanwhile."""
    from huggingface_hub import constants

    try:
        token = find_token()
    except HubError:
        yield Row("hub", "skipped", "no usable token to ask with")
        return
    if constants.HF_HUB_OFFLINE:
        yield Row("hub", "skipped", "HF_HUB_OFFLINE is set, so nothing is asked")
        return
    file, started = WEIGHTS["classfine"], time.monotonic()
    try:
        file_metadata(file, token)
    except Exception as caught:
        error = to_hub_error(caught, file, token)
        state = "warning" if error.is_transient else "failed"
        yield Row("hub", state, error.reason, error.steps, {"host": hub_host()})
        return
    seconds = time.monotonic() - started
    found = f"the token may read CT-RATE ({hub_host()} answered in {seconds:.1f} s)"
    yield Row("hub", "ok", found, numbers={"host": hub_host(), "seconds": seconds})


# ---- weights


def weights_rows() -> Iterator[Row]:
    files = [weights for weights in map(WeightsFile, WEIGHTS) if weights.path]
    if not files:
        remedy = f"once the token may read CT-RATE: {setup_command()}"
        yield Row("weights", "warning", "none in models/; the built-in cohort needs none", (remedy,))
    for weights in files:
        try:
            yield weights_row(weights)
        except Exception as error:
            row = failed_row("weights", error)
            yield Row(row.name, row.state, f"{weights.name}: {row.found}", row.remedy, {"weights": weights.name})


def weights_row(weights: WeightsFile) -> Row:
    """Of one file: its SHA-256 against the recorded one, then its fingerprint, which is recorded if there was none."""
    file = weights.path or weights.whole
    sha256 = sha256_of(file)
    numbers = {"weights": weights.name, "file": str(file), "bytes": file.stat().st_size, "sha256": sha256}
    lead = f"{weights.name}: {file}, {weights.size}"
    if problem := weights.differs_from_record(sha256):
        again = f"fetch it again: {setup_command()} --model {weights.name}"
        return Row("weights", "failed", f"{lead}: {problem}", (again,), numbers)
    try:
        said = output_of(module_command("ctclip.hub", "weights", str(file)), PROBE_SECONDS).splitlines()[-1]
    except ProcessFailed as error:
        if not str(error).startswith("error: "):
            raise
        found, remedy = found_and_remedy(str(error)[len("error: ") :])
        return Row("weights", "failed", f"{weights.name}: {found}", remedy, numbers)
    digest = re.search(r"fingerprint (\w+)", said)
    numbers |= {"fingerprint": digest and digest[1]}
    checked = ", SHA-256 as kept" if weights.recorded_sha256 else ""
    return Row("weights", "ok", f"{lead}{checked}; {said}", numbers=numbers)


def prompts_rows() -> Iterator[Row]:
    """What predicting by prompts needs beside the weights; no row where no weights classify that way."""
    files = [weights for weights in map(WeightsFile, PROMPTED) if weights.path]
    if not files:
        return
    vocabulary, transformers = vocabulary_path(files[0].whole), installed_version("transformers")
    numbers: dict[str, object] = {"vocabulary": str(vocabulary), "transformers": transformers}
    remedies = {
        "its vocabulary": not vocabulary.exists() and f"{setup_command()} --model {files[0].name} fetches it",
        "the package transformers": transformers is None and "pip install transformers",
    }
    kept = [any(weights.whole.parent.glob(f"{weights.whole.stem}.prompts_*.safetensors")) for weights in files]
    numbers["kept"] = sum(kept)
    lacking = {what: remedy for what, remedy in remedies.items() if remedy}
    names = comma_separated(weights.name for weights in files)
    if list(lacking) == ["the package transformers"] and all(kept):
        found = f"{names}: {vocabulary}, answers to prompts used before; others need the package transformers"
        yield Row("prompts", "ok", found, tuple(lacking.values()), numbers)
    elif lacking:
        found = f"{names}: without {' and '.join(lacking)} no prediction by prompts; fine-tuning works"
        yield Row("prompts", "warning", found, tuple(lacking.values()), numbers)
    else:
        yield Row("prompts", "ok", f"{names}: {vocabulary}, transformers {transformers}", numbers=numbers)


# ---- the cohort


def cohort_rows(data_dir: Path | None) -> Iterator[Row]:
    if data_dir is None:
        yield Row("cohort", "skipped", "no --data-dir given")
        return
    for seen in run_probe("cohort", str(data_dir)):
        lead = f"{seen['split']}: " if seen["split"] else ""
        if "error" in seen:
            found, remedy = found_and_remedy(seen["error"])
            yield Row("cohort", "failed", lead + found, remedy, {"split": seen["split"]})
            continue
        tried = len(seen["readings"]) + len(seen["faults"])
        counts = [f"{len(seen['readings'])} of {tried} files tried can be read"] if tried else []  # else: streamed
        found = "; ".join([*seen["summary"], *counts])
        groups: dict[tuple[str, str], list[str]] = {}
        for name, reading, evidence in seen["readings"]:
            groups.setdefault((reading, evidence), []).append(name)
        for (reading, evidence), names in groups.items():
            found += f"; as {reading}: {comma_separated(names)} ({evidence})"
        faults = seen.pop("faults")
        yield Row("cohort", "ok", lead + found, numbers=seen)
        for fault in faults:
            found, remedy = found_and_remedy(fault)
            yield Row("cohort", "failed", found, remedy, {"split": seen["split"]})


# ---- the forward pass


def forward_rows() -> Iterator[Row]:
    try:
        result = run_probe("forward")
    except ProcessFailed as error:
        yield failed_row("forward pass", error, f"if the packages are at fault: {REINSTALL}")
        return
    sizes = f"{tuple(result['input'])} -> logits {tuple(result['logits'])}"
    found = f"{sizes} in {result['seconds']:.2f} s on {result['device']}"
    yield Row("forward pass", "ok", found, numbers={"seconds": result["seconds"], "device": result["device"]})


# ---- probes: functions that import torch or read volumes, each in a process of its own (`run_probe`)


def probe_forward() -> dict:
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
    return {
        "torch": torch.__version__,
        "seconds": time.monotonic() - start,
        "input": list(volume.shape),
        "logits": list(logits.shape),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else "cpu",
    }


def probe_gpu() -> dict:
    """The GPUs that torch can use; `problem` where it can compute on none."""
    import torch

    devices: list[dict] = []
    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": devices, "precision": None,
             "problem": None}  # fmt: skip
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        return {**found, "problem": str(error).strip().splitlines()[0]}
    from ctclip.inference.predictor import choose_precision

    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        devices.append({"name": device.name, "memory_bytes": device.total_memory})
    found["precision"] = {"bfloat16": "bf16", "float16": "fp16"}[str(choose_precision(torch.device("cuda")))[6:]]
    return found


def probe_cohort(data_dir: str) -> list[dict]:
    """Of each split whose label table is there: what it holds, and how its first, middle and last file are read."""
    from ctclip.data.ct_rate import SPLITS, labels_path

    if not Path(data_dir).is_dir():
        return [{"split": None, "error": f"found no folder {data_dir}, expected the cohort's; check --data-dir"}]
    tables = {split: Path(data_dir, labels_path(split)) for split in SPLITS}
    if not any(table.exists() for table in tables.values()):
        first = next(iter(tables.values()))
        return [{"split": None, "error": f"found no {first}, expected a table of labels; check --data-dir"}]
    return [_probe_split(data_dir, split) for split, table in tables.items() if table.exists()]


def _probe_split(data_dir: str, split: str) -> dict:
    from ctclip.data.cohort import load_cohort
    from ctclip.data.ct_rate import VOLUME_SUFFIX
    from ctclip.data.preprocessing import read_volume
    from ctclip.data.tables import CohortError
    from ctclip.data.volume_file import VolumeError

    try:
        cohort = load_cohort(data_dir, split)
    except CohortError as error:
        return {"split": split, "error": str(error)}
    on_disk = [volume for volume in cohort.volumes if volume.signature is None]
    readings, faults = [], []
    for place in sorted({0, len(on_disk) // 2, len(on_disk) - 1}) if on_disk else ():
        volume = on_disk[place]
        try:
            _, decision = read_volume(volume, PROBE_SHAPE)
        except (VolumeError, OSError, MemoryError) as error:
            faults.append(str(error) or f"{volume.name}: {type(error).__name__}")
        else:
            folder, *_, why = decision.evidence.split("; ")
            name = volume.name.removesuffix(VOLUME_SUFFIX)
            readings.append([name, decision.reading, f"{folder}, {why.partition(': ')[2]}"])
    return {
        "split": split,
        "summary": cohort.summary().splitlines(),
        "volumes": len(cohort),
        "scans": len({volume.scan for volume in cohort.volumes}),
        "patients": len({volume.patient for volume in cohort.volumes}),
        "on_disk": len(on_disk),
        "not_on_disk": cohort.not_on_disk,
        "left_out": dict(Counter(reason for _, reason in cohort.skipped)),
        "readings": readings,
        "faults": faults,
    }


PROBES: dict[str, Callable[..., object]] = {"forward": probe_forward, "gpu": probe_gpu, "cohort": probe_cohort}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]](*sys.argv[2:])))
