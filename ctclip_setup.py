"""Sets the suite up: packages, folders, weights, one forward pass, and a summary of what works.

    python ctclip_setup.py                    packages and the ClassFine weights
    python ctclip_setup.py --dev              also pytest and ruff
    python ctclip_setup.py --check            look only: installs and downloads nothing

Standard library only at import, so that it runs and explains itself on a bare interpreter. Versions are typed in
requirements.txt alone. It never replaces a torch that meets the floor written there (Colab's, a cluster's), never
prints a token, and without weights still ends with exit code 0: the built-in cohort needs none.
Exit codes: 0 ready, 2 something for you to do (one line says what), 1 the forward pass failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import Callable, Iterable, NamedTuple, Sequence  # noqa: UP035  (3.8 must get as far as check_python)
from urllib.parse import urlsplit

SUITE = Path(__file__).resolve().parent  # the code; models/ and results/ belong to the working folder
OLDEST_PYTHON = (3, 10)

REPOSITORY = "ibrahimhamamci/CT-RATE"  # a dataset repository, gated
TERMS_PAGE = "https://huggingface.co/datasets/ibrahimhamamci/CT-RATE"
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
WEIGHTS = {  # name on the command line -> file in the repository; saved as models/ctclip_<name>.pt
    "classfine": "models/CT-CLIP-Related/CT_LiPro_v2.pt",
    "vocabfine": "models/CT-CLIP-Related/CT_VocabFine_v2.pt",
    "zeroshot": "models/CT-CLIP-Related/CT-CLIP_v2.pt",
}
WEIGHTS_BYTES = 1_800_000_000  # room to ask for when the hub does not announce a size
SPARE_BYTES = 50_000_000
HUB_SECONDS = 10  # for the first answer; the hub's host name has several addresses, each with its own time-out

WIDTH, INDENT, TIED = 100, 12, "\u00a0"  # TIED: a space at which no line is broken


class SetupError(Exception):
    """Stops setup with exit code 2; the message is one line: what was found, what to do."""


class HubTrouble(Exception):
    """Weights that could not be had: `reason` in one sentence, `steps` to take. Setup goes on without them.

    `one_file`: the trouble is with this file alone, so the next one is worth asking for.
    """

    def __init__(self, reason: str, *steps: str, one_file: bool = False):
        super().__init__(reason)
        self.reason, self.steps, self.one_file = reason, steps, one_file


# ---- output


def row(label: str, text: str) -> None:
    """One aligned entry of at most 100 columns; its further lines keep its own indentation, number or [seconds]."""
    hanging = " " * len(re.match(r" *(\d\. |\[[ \d]+ s\] )?", text).group())
    body = textwrap.wrap(
        text, WIDTH - INDENT, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False
    )
    for number, line in enumerate(body):
        print(f"{label if number == 0 else '':<{INDENT}}{line}".replace(TIED, " "), flush=True)


def join(items: Iterable) -> str:
    return ", ".join(str(item) for item in items)


def versions_text(versions: dict[str, str]) -> str:
    return join(f"{name}{TIED}{version}" for name, version in versions.items())


def size_text(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


# ---- Python and packages


def check_python(version: Sequence[int] = tuple(sys.version_info)) -> None:
    if tuple(version[:2]) < OLDEST_PYTHON:
        found = ".".join(str(part) for part in version[:3])
        raise SetupError(f"found Python {found}, expected 3.10 or newer; run this with a newer one (python3.11, ...)")


class Requirement(NamedTuple):
    name: str
    floor: str

    def __str__(self) -> str:
        return f"{self.name}>={self.floor}"


def parse_requirements(text: str) -> tuple[list[Requirement], list[Requirement]]:
    """requirements.txt -> (what the suite runs on, what its tests need in addition: all below the line `# dev ...`)."""
    runtime: list[Requirement] = []
    development: list[Requirement] = []
    target = runtime
    for line in text.splitlines():
        if line.startswith("# dev"):
            target = development
        specification = line.split("#")[0].strip()
        if specification:
            name, _, floor = specification.partition(">=")
            target.append(Requirement(name.strip(), floor.strip()))
    return runtime, development


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


def on_colab() -> bool:
    try:
        return importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:
        return False


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
    started, lines = time.monotonic(), []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, encoding="utf-8", errors="replace"
    ) as process:
        for line in process.stdout:
            lines.append(line.rstrip())
            event = pip_event(line)
            if event:
                row("", f"[{time.monotonic() - started:4.0f} s] {event}")
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
        raise SetupError(f"pip reported success but {join(missing)} cannot be found; run this again")
    row("", f"[{time.monotonic() - started:4.0f} s] installed {installed_text(ready, lines)}")


def installed_text(ready: dict[str, str], lines: Sequence[str]) -> str:
    count = sum(len(line.split()) - 2 for line in lines if line.startswith("Successfully installed "))
    others = count - len(ready)
    return versions_text(ready) + (f", and {others} more that they need" if others > 0 else "")


def read_requirements(with_development: bool) -> list[Requirement]:
    try:
        runtime, development = parse_requirements((SUITE / "requirements.txt").read_text(encoding="utf-8"))
    except OSError as error:
        raise SetupError(f"cannot read {SUITE / 'requirements.txt'} ({error.strerror}); get the whole suite") from error
    return runtime + (development if with_development else [])


def wanted_text(wanted: dict[Requirement, str | None]) -> str:
    return join(f"{need} (found {found})" if found else need for need, found in wanted.items())


def packages_step(requirements: Sequence[Requirement]) -> None:
    ready, wanted = survey(requirements)
    if not wanted:
        row("packages", f"all {len(ready)} are here: {versions_text(ready)}")
        return
    check_pip()
    if ready:
        row("packages", f"kept as they are: {versions_text(ready)}")
    row("" if ready else "packages", "installing " + wanted_text(wanted))
    install(list(wanted), pins(ready))


# ---- folders


def folders_step() -> None:
    for name in ("models", "results"):
        try:
            Path(name).mkdir(exist_ok=True)
        except OSError as error:
            raise SetupError(
                f"cannot make {name}/ in {Path.cwd()} ({error.strerror}); run this in a folder you may write to"
            ) from error
    row("folders", f"models/ and results/ in {Path.cwd()}")


# ---- weights


def token_steps() -> list[str]:
    steps = [f"1. accept the terms, once: {TERMS_PAGE}"]
    if on_colab():
        steps += [
            f"2. make a read token ({TOKENS_PAGE}), store it as the Colab secret HF_TOKEN, "
            "and run this cell, because a !python cell does not see Colab's secrets:",
            "       import os",
            "       from google.colab import userdata",
            '       os.environ["HF_TOKEN"] = userdata.get("HF_TOKEN")',
        ]
    else:
        steps += [f"2. make a read token ({TOKENS_PAGE}) and set it: export{TIED}HF_TOKEN=hf_..."]
    return [*steps, "then run this again"]


def hub_host() -> str:
    """Host of the hub, without the user and password a mirror's address may carry."""
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = f":{address.port}" if address.port else ""
    except ValueError:
        port = ""
    return f"{address.hostname or 'the address in HF_ENDPOINT'}{port}"


def find_token() -> str:
    """HF_TOKEN or what `hf auth login` stored. Refuses what would end up, quoted, in an HTTP library's message."""
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise HubTrouble("no Hugging Face token found", *token_steps())
    if not re.fullmatch(r"[A-Za-z0-9_.~+/=-]+", token):
        raise HubTrouble(
            "the Hugging Face token holds characters that no token has (a quote, a space?)",
            "set HF_TOKEN again: letters, digits and _ only, without quotes; then run this again",
        )
    return token


def answer_of_status(status: int, gated: bool, file: str) -> HubTrouble:
    """What an HTTP status of the hub means to the person whose token was sent."""
    if status == 401:
        return HubTrouble(
            "the hub refused the token (401): mistyped, expired or revoked",
            f"make a new read token ({TOKENS_PAGE}), set HF_TOKEN to it, then run this again",
        )
    if status == 403 and gated:
        return HubTrouble(
            "the token is valid, but its account has not accepted CT-RATE's terms (403)",
            f"accept them with that account: {TERMS_PAGE} and run this again",
        )
    if status == 403:
        return HubTrouble(
            "the token may not read gated repositories (403)",
            f'at {TOKENS_PAGE} give it "Read access to contents of all public gated repos you can access", '
            "or make a token of type Read; then run this again",
        )
    if status == 404:
        return HubTrouble(
            f"{hub_host()} has no {file} in {REPOSITORY} (404)",
            f"unset HF_ENDPOINT if it names a mirror; otherwise look for the file at {TERMS_PAGE}",
            one_file=True,
        )
    if status == 429:
        return HubTrouble("the hub asks to slow down (429)", "wait a few minutes, then run this again")
    return HubTrouble(
        f"{hub_host()} answered with an error of its own ({status})",
        "nothing is wrong here: run this again later (https://status.huggingface.co)",
    )


NETWORK_ERRORS = {"ConnectError", "ConnectionError", "NetworkError", "RemoteProtocolError", "ChunkedEncodingError"}
TIMEOUT_ERRORS = {"TimeoutException", "Timeout", "TimeoutError"}


def error_chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ is not None and len(chain) < 8:
        chain.append(chain[-1].__cause__)
    return chain


def class_names(chain: Sequence[BaseException]) -> set[str]:
    return {base.__name__ for link in chain for base in type(link).__mro__}


def explain(error: BaseException, file: str, token: str) -> HubTrouble:
    """Any failure of huggingface_hub -> reason and remedy.

    Told apart by class *names*: the HTTP library underneath changed twice (requests, httpx, httpx2), and 0.x and
    later versions wrap the same failure differently. Text that others wrote is shown with the token taken out.
    """
    if isinstance(error, HubTrouble):
        return error
    chain = error_chain(error)
    names = class_names(chain)
    for link in chain:
        status = getattr(getattr(link, "response", None), "status_code", None)
        if status is not None:
            return answer_of_status(status, "GatedRepoError" in names, file)
    again = "then run this again"
    if "OfflineModeIsEnabled" in names:
        return HubTrouble("HF_HUB_OFFLINE is set, so nothing is fetched", f"unset HF_HUB_OFFLINE, {again}")
    if "ProxyError" in names:
        return HubTrouble(
            f"the proxy let nothing through to {hub_host()}", f"check HTTPS_PROXY and HTTP_PROXY, {again}"
        )
    if names & TIMEOUT_ERRORS:
        return no_answer()
    if names & NETWORK_ERRORS:
        return HubTrouble(
            f"no connection to {hub_host()}", f"check the network, the proxy (HTTPS_PROXY) and HF_ENDPOINT, {again}"
        )
    if any(getattr(link, "errno", None) == 28 for link in chain):
        return HubTrouble("the disk is full", f"free {size_text(WEIGHTS_BYTES)}, {again}")
    said = str(error).replace(token, "***") if token else str(error)
    first = next((line.strip() for line in said.splitlines() if line.strip()), "")[:200]
    return HubTrouble(f"huggingface_hub stopped with {type(error).__name__}: {first}", "run this again")


def no_answer() -> HubTrouble:
    return HubTrouble(
        f"no answer from {hub_host()} within {HUB_SECONDS} s",
        "check the network and the proxy (HTTPS_PROXY), or wait a few minutes; then run this again",
    )


def within(seconds: float, function: Callable):
    """function() or HubTrouble after `seconds`; a thread, because no HTTP time-out covers all addresses of a host."""
    outcome: list = []

    def work() -> None:
        try:
            outcome.append((function(), None))
        except Exception as error:  # handed to the caller below
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise no_answer()
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def announced_size(file: str, token: str) -> int | None:
    """Size of the file on the hub; also the cheapest way to learn whether this token may have it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(REPOSITORY, file, repo_type="dataset")
    return within(HUB_SECONDS, lambda: get_hf_file_metadata(url, token=token, timeout=HUB_SECONDS)).size


def check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise HubTrouble(
            f"the disk is too small: {size_text(free)} free in {folder}/, {size_text(needed + SPARE_BYTES)} needed",
            "free some, or run this in a folder on a larger disk",
            one_file=True,  # another may be here already
        )


def transfer(file: str, folder: Path, token: str) -> str:
    from huggingface_hub import hf_hub_download

    for attempts_left in (2, 1, 0):
        try:
            return hf_hub_download(
                REPOSITORY, file, repo_type="dataset", local_dir=folder, token=token, etag_timeout=HUB_SECONDS
            )
        except Exception as error:
            if not attempts_left or not class_names(error_chain(error)) & (NETWORK_ERRORS | TIMEOUT_ERRORS):
                raise
            row("", "the transfer was cut; going on")
            time.sleep(1)
    raise AssertionError("unreachable")


def download(name: str, size: int | None, token: str) -> None:
    """Fetches into models/.download-<name>/ and moves the complete file into place: there is never half a file.

    Not every version of the hub's client goes on by itself after a cut, hence the second and third attempt.
    """
    target, staging = weights_path(name), Path("models", f".download-{name}")
    check_disk(target.parent, size or WEIGHTS_BYTES)
    row("", f"{name}: fetching {size_text(size) if size else 'a file of unknown size'} to {target}")
    fetched = transfer(WEIGHTS[name], staging, token)
    found = os.path.getsize(fetched)
    if size and found != size:
        os.remove(fetched)
        raise HubTrouble(f"the file that arrived has {found} bytes, expected {size}", "run this again", one_file=True)
    os.replace(fetched, target)
    shutil.rmtree(staging, ignore_errors=True)


def weights_path(name: str) -> Path:
    return Path("models", f"ctclip_{name}.pt")


def fetch(name: str) -> str:
    """Makes models/ctclip_<name>.pt the hub's file; -> one phrase on what was done. Raises HubTrouble."""
    path, file, token = weights_path(name), WEIGHTS[name], ""
    try:
        token = find_token()
        size = announced_size(file, token)
        if path.exists() and size in (None, path.stat().st_size):
            return f"already here, {size_text(path.stat().st_size)}, " + ("the hub's size" if size else "not verified")
        if path.exists():
            row("", f"{name}: {path} has {path.stat().st_size} bytes where the hub has {size}")
        started = time.monotonic()
        download(name, size, token)
        return f"{path}, {size_text(path.stat().st_size)} in {time.monotonic() - started:.0f} s"
    except Exception as error:
        raise explain(error, file, token) from error


def weights_step(names: Sequence[str]) -> dict[str, HubTrouble]:
    """Fetches each; -> the ones that are not usable, with why. A file that cannot be verified stays usable."""
    # read when huggingface_hub is imported; its own default is as long, a caller's value wins
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(HUB_SECONDS))
    troubles: dict[str, HubTrouble] = {}
    hub_trouble = None  # without token, access or network there is no need to wait for the same answer again
    row("weights", f"{join(names)} from {REPOSITORY}")
    for name in names:
        try:
            if hub_trouble:
                raise hub_trouble
            row("", f"{name}: {fetch(name)}")
        except HubTrouble as trouble:
            hub_trouble = None if trouble.one_file else trouble
            if weights_path(name).exists():
                found = size_text(weights_path(name).stat().st_size)
                row("", f"{name}: already here, {found}, not verified: {trouble.reason}")
            else:
                row("", f"{name}: not here: {trouble.reason}")
                troubles[name] = trouble
    return troubles


def weights_look(names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        path = weights_path(name)
        found = f"{path}, {size_text(path.stat().st_size)}" if path.exists() else f"{path} is not here"
        row("weights" if number == 0 else "", f"{name}: {found}")


# ---- verification

FORWARD = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import timm, torch
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel
if sys.argv[2]:
    model = CTCLIPMultiAbnormalityModel(ctclip_path=sys.argv[2])
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
    raise SystemExit("logits of shape %s, expected finite (1, %d)" % (tuple(logits.shape), len(ABNORMALITIES)))
print(json.dumps({"torch": torch.__version__, "seconds": time.monotonic() - start, "input": list(volume.shape),
    "logits": list(logits.shape), "device": torch.cuda.get_device_name(0) if device == "cuda" else "cpu"}))
"""


class ForwardFailed(Exception):
    """The installation does not compute; the message is the last line of its error."""


def forward_pass() -> dict:
    """A small volume through the demo model (the slice model where that file is absent), in its own process."""
    demo = SUITE / "models" / "ctclip_demo.pt"
    command = [sys.executable, "-c", FORWARD, str(SUITE), str(demo) if demo.exists() else ""]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=300)
    except subprocess.TimeoutExpired as error:
        raise ForwardFailed("no result within 300 s") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ForwardFailed(lines[-1] if lines else f"the process ended with code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def verify_step() -> dict:
    result = forward_pass()
    sizes = f"{tuple(result['input'])} -> logits {tuple(result['logits'])} in {result['seconds']:.2f} s"
    row("check", f"forward pass: torch {result['torch']} on {result['device']}, {sizes}")
    return result


# ---- summary


def not_yet(troubles: dict[str, HubTrouble]) -> None:
    """Each reason with the weights it keeps away, each remedy once."""
    remedies: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name, trouble in troubles.items():
        remedies.setdefault(trouble.steps, {}).setdefault(trouble.reason, []).append(name)
    label = "not yet"
    for steps, reasons in remedies.items():
        for reason, names in reasons.items():
            row(label, f"CT-CLIP {join(names)} for real CT: {reason}")
            label = ""
        for step in steps:
            row("", step)


def summary(troubles: dict[str, HubTrouble], fetched: Sequence[str], device: str, development: bool) -> None:
    print()
    where = "on the CPU (no GPU found)" if device == "cpu" else f"on {device}"
    row("works now", f"training, evaluation and prediction on the built-in cohort, {where}")
    for name in fetched:
        row("", f"CT-CLIP {name}: {weights_path(name)}")
    not_yet(troubles)
    folder = "" if Path.cwd() == SUITE else f"{SUITE}{os.sep}"
    row("next", f"python {folder}run_task2.py")
    if development:
        row("", f"python -m pytest {folder}".rstrip())


def failed(error: ForwardFailed) -> int:
    reinstall = "python -m pip install --force-reinstall torch torchvision timm"
    print(f"error: the forward pass failed: {error}; if the packages are at fault: {reinstall}", file=sys.stderr)
    return 1


def check(options: argparse.Namespace) -> int:
    """--check: the state of things, changing none of them."""
    ready, wanted = survey(read_requirements(options.dev))
    row("packages", f"{len(ready)} of {len(ready) + len(wanted)} are here: {versions_text(ready) or 'none'}")
    if wanted:
        row("", "missing or too old: " + wanted_text(wanted))
    weights_look(options.model)
    if wanted:
        flag = " --dev" if options.dev else ""
        raise SetupError(f"packages are missing or too old; to install them: python ctclip_setup.py{flag}")
    verify_step()
    return 0


def setup(options: argparse.Namespace) -> int:
    started = time.monotonic()
    row("setup", f"CT-CLIP Task 2 suite in {SUITE}, Python {sys.version.split()[0]}")
    if options.check:
        return check(options)
    folders_step()
    packages_step(read_requirements(options.dev))
    names = [] if options.no_weights else options.model
    troubles = weights_step(names) if names else {}
    device = verify_step()["device"]
    summary(troubles, [name for name in names if name not in troubles], device, options.dev)
    row("", f"done in {time.monotonic() - started:.0f} s")
    return 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Installs what is missing, fetches CT-CLIP's weights and checks that everything computes.",
        epilog="models/ and results/ are made in the folder you run this in, where the other scripts look for them. "
        f"The weights are gated: accept the terms at {TERMS_PAGE} and set HF_TOKEN; without them the built-in cohort "
        "works all the same. HF_ENDPOINT (a mirror) and HF_HOME (the cache) are honoured.",
    )
    parser.add_argument("--dev", action="store_true", help="also install pytest and ruff, to run the tests")
    parser.add_argument(
        "--model", nargs="+", choices=list(WEIGHTS), default=["classfine"], metavar="NAME",
        help="weights to fetch, 1.77 GB each: classfine (default; predicts at once), vocabfine, zeroshot",
    )  # fmt: skip
    parser.add_argument("--no-weights", action="store_true", help="fetch no weights: enough for the built-in cohort")
    parser.add_argument("--check", action="store_true", help="look only; install and fetch nothing, use no network")
    dashed = [
        re.sub(r"^--[\w-]+", lambda flag: flag.group().replace("_", "-"), argument) for argument in arguments
    ]  # --no_weights is --no-weights
    return parser.parse_args(dashed)


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
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


if __name__ == "__main__":
    sys.exit(main())
