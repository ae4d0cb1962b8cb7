"""The hub, by way of huggingface_hub: the token, checksums, transfers that resume after a kill, and every failure as
one sentence with its remedy.

Standard library only at import. A token is handed to huggingface_hub and to nobody else: it is not printed, not put
into a message, not written to a file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence  # noqa: UP035  (ctclip_setup must get as far as its Python check)
from urllib.parse import urlsplit

from ctclip.errors import UserError
from ctclip.fileio import DISK_FULL
from ctclip.formatting import TIED, size_text

HUB = "https://huggingface.co"
REPOSITORY = "ibrahimhamamci/CT-RATE"  # a dataset repository, gated
TERMS_PAGE = f"{HUB}/datasets/{REPOSITORY}"
TOKENS_PAGE = f"{HUB}/settings/tokens"

WEIGHTS = {  # name on the command line -> file in the repository; saved as models/ctclip_<name>.pt
    "classfine": "models/CT-CLIP-Related/CT_LiPro_v2.pt",
    "vocabfine": "models/CT-CLIP-Related/CT_VocabFine_v2.pt",
    "zeroshot": "models/CT-CLIP-Related/CT-CLIP_v2.pt",
}
PROMPTED = ("vocabfine", "zeroshot")  # of these, the ones that classify by prompts
VOCABULARY_REPOSITORY = "microsoft/BiomedVLP-CXR-BERT-specialized"  # a model repository, public; of their text tower
VOCABULARY = "vocab.txt"

HUB_SECONDS = 10  # for the first answer; the hub's host name has several addresses, each with its own time-out
LISTING_SECONDS = 60  # for the sizes of PATHS_AT_ONCE files
PATHS_AT_ONCE = 500
SPARE_BYTES = 50_000_000  # left free on any disk
WAITS = (1, 2, 4, 8, 16)  # seconds before each further attempt
LONGEST_WAIT = 300  # that the hub may ask for

AGAIN = "then run this again"


class HubTrouble(UserError):
    """Something the hub did not give: `reason` in one sentence, `steps` to take.

    kind   access: token or terms; network; hub: its own errors; bytes: they are not those that were announced;
           file: not there; disk: ours; other
    wait   seconds the hub asked for
    """

    def __init__(self, reason: str, *steps: str, kind: str = "other", wait: float = 0):
        super().__init__(reason)
        self.reason, self.steps, self.kind, self.wait = reason, steps, kind, wait

    @property
    def one_file(self) -> bool:
        """Whether the trouble is with this file alone, so that the next one is worth asking for."""
        return self.kind in ("file", "bytes", "disk")

    @property
    def passes(self) -> bool:
        """Whether waiting may help."""
        return self.kind in ("network", "hub", "bytes")

    def line(self) -> str:
        """Reason and steps in one line."""
        return "; ".join([self.reason, *(step.strip() for step in self.steps)]).replace(TIED, " ")


# ---- who asks, and whom


def on_colab() -> bool:
    try:
        return importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:
        return False


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
    return [*steps, AGAIN]


def endpoint() -> str:
    """The hub, or the mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def is_hubs(url: str) -> bool:
    """Whether an address is on the hub itself; the bytes of large files are elsewhere, under signed addresses."""
    return urlsplit(url).netloc in {urlsplit(own).netloc for own in (endpoint(), HUB)}


def check_endpoint() -> None:
    """Raises HubTrouble where HF_ENDPOINT is no address: huggingface_hub would not import. It may hold a password."""
    try:
        address = urlsplit(endpoint())
        good = address.scheme in ("http", "https") and address.hostname and (address.port or True)
    except ValueError:
        good = False
    if not good:
        found = "found something else than an address in HF_ENDPOINT, expected https://HOST"
        raise HubTrouble(found, "correct it, or unset it for the hub itself", kind="access")


def hub_host() -> str:
    """Host of the hub, without the user and password a mirror's address may carry."""
    address = urlsplit(endpoint())
    return f"{address.hostname}:{address.port}" if address.port else str(address.hostname)


def find_token() -> str:
    """HF_TOKEN or what `hf auth login` stored. Refuses what would end up, quoted, in an HTTP library's message."""
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise HubTrouble("no Hugging Face token found", *token_steps(), kind="access")
    if not re.fullmatch(r"[A-Za-z0-9_.~+/=-]+", token):
        raise HubTrouble(
            "the Hugging Face token holds characters that no token has (a quote, a space?)",
            "set HF_TOKEN again: letters, digits and _ only, without quotes; then run this again",
            kind="access",
        )
    return token


# ---- what went wrong


def answer_of_status(
    status: int, gated: bool, file: str, wait: float = 0, repository: str = REPOSITORY
) -> HubTrouble:
    """What an HTTP status of the hub means to the person whose token was sent (to CT-RATE; to others goes none)."""
    if status in (401, 403, 404) and repository != REPOSITORY:
        return HubTrouble(
            f"{hub_host()} gives no {file} of {repository} ({status})",
            f"unset HF_ENDPOINT if it names a mirror; otherwise see {HUB}/{repository}",
            kind="file",
        )
    if status == 401:
        return HubTrouble(
            "the hub refused the token (401): mistyped, expired or revoked",
            f"make a new read token ({TOKENS_PAGE}), set HF_TOKEN to it, {AGAIN}",
            kind="access",
        )
    if status == 403 and gated:
        return HubTrouble(
            "the token is valid, but its account has not accepted CT-RATE's terms (403)",
            f"accept them with that account: {TERMS_PAGE}; {AGAIN}",
            kind="access",
        )
    if status == 403:
        return HubTrouble(
            "the token may not read gated repositories (403)",
            f'give it "Read access to contents of all public gated repos you can access" ({TOKENS_PAGE}), {AGAIN}',
            kind="access",
        )
    if status == 404:
        return HubTrouble(
            f"{hub_host()} has no {file} in {REPOSITORY} (404)",
            "unset HF_ENDPOINT if it names a mirror; otherwise the file was moved: see the dataset's page",
            kind="file",
        )
    if status == 407:
        return HubTrouble(
            "the proxy asks for a name and a password (407)", f"put them into HTTPS_PROXY, {AGAIN}", kind="network"
        )
    if status == 416:
        return HubTrouble("what is here of a file is more than the hub has of it (416)", "run this again", kind="bytes")
    if status == 429:
        return HubTrouble(
            "the hub asks to slow down (429)", "wait a few minutes, then run this again", kind="hub", wait=wait
        )
    return HubTrouble(
        f"{hub_host()} answered with an error of its own ({status})",
        "nothing is wrong here: run this again later (https://status.huggingface.co)",
        kind="hub",
        wait=wait,
    )


def asked_wait(headers) -> float:
    """Seconds that an answer asks to wait: Retry-After, or `t` of the hub's RateLimit header; 0 without either."""
    found = re.match(r"\s*(\d+)\s*$", headers.get("Retry-After") or "") or re.search(
        r"\bt=(\d+)", headers.get("RateLimit") or ""
    )
    return min(float(found[1]), LONGEST_WAIT) if found else 0


NETWORK_ERRORS = {"ConnectError", "ConnectionError", "NetworkError", "RemoteProtocolError", "ChunkedEncodingError"}
TIMEOUT_ERRORS = {"TimeoutException", "Timeout", "TimeoutError"}


def error_chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ is not None and len(chain) < 8:
        chain.append(chain[-1].__cause__)
    return chain


def explain(error: BaseException, file: str, token: str, repository: str = REPOSITORY) -> HubTrouble:
    """Any failure of huggingface_hub -> reason and remedy.

    Told apart by class *names*: the HTTP library underneath changed twice (requests, httpx, httpx2), and 0.x and
    later versions wrap the same failure differently. Text that others wrote is shown without the token, and without the
    password of a mirror or proxy.
    """
    if isinstance(error, HubTrouble):
        return error
    chain = error_chain(error)
    names = {base.__name__ for link in chain for base in type(link).__mro__}
    for link in chain:
        response = getattr(link, "response", None)
        status = getattr(response, "status_code", None)
        if status is not None:
            wait = asked_wait(getattr(response, "headers", {}))
            if status in (401, 403, 404, 410) and not is_hubs(str(getattr(response, "url", endpoint()))):
                return HubTrouble(f"the address of a file's bytes has expired ({status})", "run this again", kind="hub")
            return answer_of_status(status, "GatedRepoError" in names, file, wait, repository)
    said = " ".join(str(link) for link in chain)
    if "OfflineModeIsEnabled" in names:
        return HubTrouble(
            "HF_HUB_OFFLINE is set, so nothing is fetched", f"unset HF_HUB_OFFLINE, {AGAIN}", kind="access"
        )
    if "ProxyError" in names:
        return HubTrouble(
            f"the proxy let nothing through to {hub_host()}",
            f"check HTTPS_PROXY and HTTP_PROXY, {AGAIN}",
            kind="network",
        )
    if names & TIMEOUT_ERRORS:
        return no_answer()
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return HubTrouble(
            f"the certificate of {hub_host()} is not trusted here: something in between replaces it",
            f"name your network's certificates in SSL_CERT_FILE, {AGAIN}",
            kind="access",
        )
    if names & NETWORK_ERRORS:
        return HubTrouble(
            f"no connection to {hub_host()}",
            f"check the network, the proxy (HTTPS_PROXY) and HF_ENDPOINT, {AGAIN}",
            kind="network",
        )
    for link in chain:
        if getattr(link, "errno", None) in DISK_FULL:
            return HubTrouble("the disk is full", f"free some, {AGAIN}", kind="disk")
        if isinstance(link, OSError) and link.filename:
            what = f"{link.filename}: {link.strerror}"
            return HubTrouble(what, f"make it writable, or name another folder, {AGAIN}", kind="disk")
    if "Consistency check failed" in said:
        return HubTrouble("the transfer of a file ended before its last byte", "run this again", kind="bytes")
    shown = re.sub(r"//[^/@\s]+@", "//***@", str(error).replace(token, "***") if token else str(error))
    first = next((line.strip() for line in shown.splitlines() if line.strip()), "")[:200]
    return HubTrouble(f"huggingface_hub stopped with {type(error).__name__}: {first}", "run this again")


def no_answer() -> HubTrouble:
    return HubTrouble(
        f"no answer from {hub_host()} within {HUB_SECONDS} s",
        "check the network and the proxy (HTTPS_PROXY), or wait a few minutes; then run this again",
        kind="network",
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


# ---- files of the hub


class Remote(NamedTuple):
    """A file as the hub announces it. etag: SHA-256 of a large file, git's SHA-1 of a small one; a mirror may send
    neither. location: where its bytes are, signed and short-lived."""

    file: str
    size: int | None
    etag: str
    location: str

    @property
    def checksum(self) -> str | None:
        """"SHA-256", "git SHA-1", or None where nothing was announced that bytes could be compared with."""
        return {64: "SHA-256", 40: "git SHA-1"}.get(len(self.etag)) if re.fullmatch("[0-9a-f]+", self.etag) else None

    def differs(self, path: Path) -> str | None:
        """What is wrong with a copy of it, in a few words; None where it is intact. The whole copy is read."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"{size} bytes where the hub has {self.size}"
        if self.checksum is None:
            return None
        found = sha256_of(path) if self.checksum == "SHA-256" else git_sha1_of(path)
        return None if found == self.etag else f"{self.checksum} {found[:12]}... where the hub has {self.etag[:12]}..."


def digest_of(path: Path, digest) -> str:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    return digest_of(path, hashlib.sha256())


def git_sha1_of(path: Path) -> str:
    """What git calls a file: SHA-1 over "blob", its size and its content."""
    return digest_of(path, hashlib.sha1(f"blob {path.stat().st_size}\0".encode()))


def file_url(file: str, repository: str = REPOSITORY) -> str:
    from huggingface_hub import hf_hub_url

    kind = "dataset" if repository == REPOSITORY else "model"
    return hf_hub_url(repository, file, repo_type=kind, endpoint=endpoint())


def look_up(file: str, token: str, repository: str = REPOSITORY) -> Remote:
    """Size and checksum of a file on the hub; also the cheapest way to learn whether this token may have it.

    `token`: "" for none, for what is public. Raises whatever huggingface_hub raises: see `explain`.
    """
    from huggingface_hub import get_hf_file_metadata

    url = file_url(file, repository)
    found = within(HUB_SECONDS, lambda: get_hf_file_metadata(url, token=token or False, timeout=HUB_SECONDS))
    return Remote(file, found.size, (found.etag or "").lower(), found.location or url)


class Listed(NamedTuple):
    """A file as a listing has it: size, and SHA-256 where it is a large one."""

    size: int
    sha256: str | None


def listed(files: Sequence[str], token: str) -> dict[str, Listed]:
    """Those of the files that the hub has. They are asked for by name: listing the repository takes hours.

    Raises whatever huggingface_hub raises.
    """
    from huggingface_hub import HfApi

    found: dict[str, Listed] = {}
    for start in range(0, len(files), PATHS_AT_ONCE):
        part = list(files[start : start + PATHS_AT_ONCE])
        entries = within(
            LISTING_SECONDS,
            lambda part=part: HfApi(endpoint()).get_paths_info(REPOSITORY, part, repo_type="dataset", token=token),
        )
        for entry in entries:
            if hasattr(entry, "size"):  # a file
                found[entry.path] = Listed(entry.size, entry.lfs.sha256 if entry.lfs else None)
    return found


def check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise HubTrouble(
            f"the disk is too small: {size_text(free)} free in {folder}/, {size_text(needed + SPARE_BYTES)} needed",
            "free some, or run this in a folder on a larger disk",
            kind="disk",
        )


def parts_of(target: Path) -> list[Path]:
    """Beginnings of it that wait for their rest. They are named after the content, so that two are never joined."""
    return list(target.parent.glob(f".{target.name}.*.part"))


def receive(remote: Remote, target: Path, token: str) -> None:
    """One attempt at `target`, complete and compared with the hub's checksum. What arrived before a failure, or before
    the process was killed, is kept and not fetched again."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, logging

    logging.set_verbosity_error()  # it warns of every cut with the signed address
    part = target.with_name(f".{target.name}.{re.sub('[^0-9A-Za-z]', '', remote.etag)[:12]}.part")
    for other in parts_of(target):
        if other != part:  # the hub has had another version since
            other.unlink()
    have = part.stat().st_size if part.exists() else 0
    if remote.size is not None and have > remote.size:
        part.unlink()
        have = 0
    check_disk(target.parent, (remote.size or 0) - have)
    own = is_hubs(remote.location)  # the token is for nobody else
    with open(part, "ab") as file:
        http_get(
            remote.location,
            file,
            resume_size=have,
            headers=build_hf_headers(token=(token if own else "") or False),
            expected_size=remote.size,
            displayed_filename=target.name,
        )
        file.flush()
        os.fsync(file.fileno())
    difference = remote.differs(part)
    if difference:
        raise HubTrouble(
            f"{target.name} did not arrive as it is on the hub: {difference}",
            "something on the way changes files (a proxy, a mirror, the disk?): run this again, or on another network",
            kind="bytes",
        )
    os.replace(part, target)


def persist(
    attempt: Callable, file: str, token: str, note: Callable[[str], None], repository: str = REPOSITORY
):
    """attempt(), again after each of `WAITS` while it fails in a way that may pass. Raises HubTrouble.

    `note` gets a phrase for each failed attempt. Bytes that are wrong twice will not get right.
    """
    damaged = 0
    for wait in (*WAITS, None):
        try:
            return attempt()
        except Exception as error:
            trouble = explain(error, file, token, repository)
            damaged += trouble.kind == "bytes"
            if wait is None or not trouble.passes or damaged > 1:
                raise trouble from error
            pause = max(wait, trouble.wait)
            note(f"{trouble.reason}; going on in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


@contextmanager
def alone(*paths: Path) -> Iterator[None]:
    """Holds files or folders against other processes of this user and machine. Raises HubTrouble where one is held.

    A lock goes with its process, however that ends, and does not lie on the disk of the path, which may know none
    (network mounts).
    """
    from filelock import FileLock, Timeout  # huggingface_hub brings it

    owner = os.getuid() if hasattr(os, "getuid") else ""
    with ExitStack() as held:
        for path in dict.fromkeys(path.resolve() for path in paths):
            name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
            try:
                held.enter_context(FileLock(Path(tempfile.gettempdir(), f"ctclip-{owner}-{name}.lock"), timeout=0))
            except Timeout:
                found = f"another process is at work on {path}"
                raise HubTrouble(found, f"wait for it to end, {AGAIN}", kind="file") from None
        yield


def fetch(
    file: str,
    target: Path,
    token: str,
    note: Callable[[str], None] = lambda text: None,
    remote: Remote | None = None,
    size: int | None = None,
    repository: str = REPOSITORY,
) -> Remote:
    """Makes `target` the hub's `file`, trying again where that may help; -> what the hub announced.

    `remote`: from a `look_up` just made. `size`: what room there is for. The caller holds the target, or a folder above
    it: see `alone`. Raises HubTrouble.
    """

    def attempt() -> Remote:
        nonlocal remote
        found, remote = remote or look_up(file, token, repository), None  # a second time its address may have expired
        if size is not None and found.size != size:
            changed = f"{file} was changed on the hub meanwhile: {found.size} bytes where {size} were announced"
            raise HubTrouble(changed, "run this again", kind="file")
        try:
            receive(found, target, token)
        except Exception as error:
            if explain(error, file, token, repository).kind == "bytes":
                for part in parts_of(target):
                    part.unlink()
            raise
        return found

    return persist(attempt, file, token, note, repository)


# ---- weights on this machine


class WeightsFile:
    """models/ctclip_<name>.pt, or the slim copy in its place, and the record of it beside it."""

    def __init__(self, name: str):
        self.name, self.file = name, WEIGHTS[name]
        self.whole = Path("models", f"ctclip_{name}.pt")
        self.slim = slim_path(self.whole)
        self.record = record_path(self.whole)

    @property
    def path(self) -> Path | None:
        """The file that models are loaded from; None where there is none."""
        return next((path for path in (self.whole, self.slim) if path.exists()), None)

    @property
    def size(self) -> str:
        return size_text(self.path.stat().st_size)

    def kept(self) -> dict:
        return read_record(self.whole)

    @property
    def kept_sha256(self) -> str | None:
        """Of the file as it was fetched or made."""
        return self.kept().get("slim_sha256" if self.path == self.slim else "sha256")

    def damage(self, remote: Remote | None = None) -> str | None:
        """What is wrong with the file; None where it is intact or nothing is known.

        Compared with the hub's (`remote`); a slim copy, and any file where the hub cannot be asked, with what was kept.
        """
        if remote is not None and self.path == self.whole:
            return remote.differs(self.path)
        if remote is not None and remote.checksum == "SHA-256" and self.kept().get("sha256") != remote.etag:
            return f"not made from the file that the hub has now, says {self.record}"
        return self.unlike_kept(sha256_of(self.path)) if self.kept_sha256 else None

    def unlike_kept(self, sha256: str) -> str | None:
        """What is wrong with a file of that SHA-256, by what was kept."""
        known = self.kept_sha256
        return None if known in (None, sha256) else f"SHA-256 {sha256[:12]}... where {known[:12]}... was kept"


def vocabulary_path(weights: Path) -> Path:
    """Where the vocabulary of a weights file's text tower is looked for."""
    return weights.parent / VOCABULARY_REPOSITORY.rpartition("/")[2] / VOCABULARY


def slim_path(weights: Path) -> Path:
    return weights.with_suffix(".safetensors")


def record_path(weights: Path) -> Path:
    return weights.with_suffix(".json")


def read_record(weights: Path) -> dict:
    """What is kept of a weights file; {} where nothing is, or nothing readable: all of it can be found again."""
    try:
        return dict(json.loads(record_path(weights).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_record(weights: Path, **changes) -> None:
    """Keeps these fields beside what is kept already."""
    path = record_path(weights)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(read_record(weights) | changes, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
