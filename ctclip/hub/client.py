"""The Hugging Face hub by way of huggingface_hub: the token, checksums, transfers that resume after a kill, and every
failure as a HubError with its remedy.

Standard library only at import: setup installs huggingface_hub. A token is passed to huggingface_hub and sent to the
hub only; it is never printed, put into a message or written to a file.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

from ctclip.errors import UserError
from ctclip.fileio import DISK_FULL, LockedError, locked, read_json, replacing
from ctclip.formatting import TIED, size_text
from ctclip.paths import slim_path, weights_path

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

Result = TypeVar("Result")
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
DISK_GB = 10.0  # that a stream may use
WAITS = (1, 2, 4, 8, 16)  # seconds before each further attempt
LONGEST_WAIT = 300  # that the hub may ask for

AGAIN = "then run this again"


class HubError(UserError):
    """A request to the hub that failed: `reason` in one sentence, `steps` to take; as text, both in one line.

    kind   "access": token or terms; "network"; "hub": its own errors; "bytes": size or checksum differ from what was
           announced; "file": not there; "disk": ours; "other"
    wait   seconds the hub asked to wait
    """

    def __init__(self, reason: str, *steps: str, kind: str = "other", wait: float = 0):
        super().__init__("; ".join([reason, *(step.strip() for step in steps)]).replace(TIED, " "))
        self.reason, self.steps, self.kind, self.wait = reason, steps, kind, wait

    @property
    def is_transient(self) -> bool:
        """Whether waiting may help."""
        return self.kind in ("network", "hub", "bytes")


# ---- address and token


def on_colab() -> bool:
    try:
        return importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:
        return False


def token_steps() -> list[str]:
    make = f"2. make a read token ({TOKENS_PAGE})"
    steps = [f"{make} and set it: export{TIED}HF_TOKEN=hf_..."]
    if on_colab():
        why = "because a !python cell does not see Colab's secrets:"
        steps = [f"{make}, store it as the Colab secret HF_TOKEN, and run this cell, {why}", "       import os",
                 "       from google.colab import userdata",
                 '       os.environ["HF_TOKEN"] = userdata.get("HF_TOKEN")']
    return [f"1. accept the terms, once: {TERMS_PAGE}", *steps, AGAIN]


def endpoint() -> str:
    """The hub, or the mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def is_hub_url(url: str) -> bool:
    """Whether an address is on the hub itself; the bytes of large files are elsewhere, under signed addresses."""
    return urlsplit(url).netloc in {urlsplit(own).netloc for own in (endpoint(), HUB)}


def hub_host() -> str:
    """Host of the hub, without the user and password a mirror's address may carry."""
    address = urlsplit(endpoint())
    return f"{address.hostname}:{address.port}" if address.port else str(address.hostname)


def find_token(*steps: str) -> str:
    """HF_TOKEN or what `hf auth login` stored. Refuses what would end up, quoted, in an HTTP library's message.

    `steps`: what to do where there is none, if not those for CT-RATE.
    """
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise HubError("no Hugging Face token found", *(steps or token_steps()), kind="access")
    if not re.fullmatch(r"[A-Za-z0-9_.~+/=-]+", token):
        found = "the Hugging Face token holds characters that no token has (a quote, a space?)"
        remedy = "set HF_TOKEN again: letters, digits and _ only, without quotes; then run this again"
        raise HubError(found, remedy, kind="access")
    return token


# ---- errors


def to_hub_error(error: BaseException, file: str, token: str, repository: str = REPOSITORY) -> HubError:
    """Any failure of huggingface_hub, of its HTTP library or of the disk -> reason and remedy.

    Text that others wrote is shown without the token, and without the password of a mirror or proxy.
    """
    if isinstance(error, HubError):
        return error
    import ssl

    from huggingface_hub import errors

    httpx = importlib.import_module(errors.HTTPError.__module__)  # httpx2 from huggingface_hub 2 on
    error = unwrapped(error)
    if isinstance(error, errors.HfHubHTTPError):
        return _of_response(error, file, repository)
    host, place = hub_host(), error.filename if isinstance(error, OSError) else None
    causes = [error]
    while behind := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(behind)
    known = [  # applies, reason, remedy, kind
        (isinstance(error, errors.OfflineModeIsEnabled),
         "HF_HUB_OFFLINE is set, so nothing is fetched", "unset HF_HUB_OFFLINE", "access"),
        (isinstance(error, httpx.ProxyError),
         f"the proxy let nothing through to {host}", "check HTTPS_PROXY and HTTP_PROXY", "network"),
        (isinstance(error, (httpx.TimeoutException, TimeoutError, futures.TimeoutError)),
         f"no answer from {host} within {HUB_SECONDS} s",
         "check the network and the proxy (HTTPS_PROXY), or wait a few minutes", "network"),
        (any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes),
         f"the certificate of {host} is not trusted here: something in between replaces it",
         "name your network's certificates in SSL_CERT_FILE", "access"),
        (isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError, ConnectionError)),
         f"no connection to {host}", "check the network, the proxy (HTTPS_PROXY) and HF_ENDPOINT", "network"),
        (type(error) is OSError and error.errno is None,  # http_get's, the only one of no file and no system call
         "the transfer of a file ended before its last byte", "check the network", "bytes"),
        (getattr(error, "errno", None) in DISK_FULL, "the disk is full", "free some", "disk"),
        (place, f"{place}: {getattr(error, 'strerror', '')}", "make it writable, or name another folder", "disk"),
    ]  # fmt: skip
    for applies, reason, remedy, kind in known:
        if applies:
            return HubError(reason, f"{remedy}, {AGAIN}", kind=kind)
    said = str(error).replace(token, "***") if token else str(error)
    shown = re.sub(r"//[^/@\s]+@", "//***@", said)
    first = next((line.strip() for line in shown.splitlines() if line.strip()), "")[:200]
    return HubError(f"huggingface_hub stopped with {type(error).__name__}: {first}", "run this again")


def unwrapped(error: BaseException) -> BaseException:
    """The error behind one of huggingface_hub's own: of a failed upload, of a file that is not in its cache either."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _of_response(error: HfHubHTTPError, file: str, repository: str) -> HubError:
    """What an HfHubHTTPError means to the person whose token was sent (to CT-RATE; other repositories get none)."""
    from huggingface_hub.errors import GatedRepoError

    status, host = error.response.status_code, hub_host()
    case: int | str = status
    if status in (401, 403, 404, 410) and not is_hub_url(str(error.response.url)):
        case = "expired"
    elif status in (401, 403, 404) and repository != REPOSITORY:
        case = "other repository"
    elif status == 403 and isinstance(error, GatedRepoError):
        case = "terms"
    mirror = "unset HF_ENDPOINT if it names a mirror; otherwise"
    scope = '"Read access to contents of all public gated repos you can access"'
    reason, remedy, kind = {
        "expired": (f"the address of a file's bytes has expired ({status})", "run this again", "hub"),
        "other repository": (f"{host} gives no {file} of {repository} ({status})", f"{mirror} see {HUB}/{repository}",
                             "file"),
        "terms": ("the token is valid, but its account has not accepted CT-RATE's terms (403)",
                  f"accept them with that account: {TERMS_PAGE}; {AGAIN}", "access"),
        401: ("the hub refused the token (401): mistyped, expired or revoked",
              f"make a new read token ({TOKENS_PAGE}), set HF_TOKEN to it, {AGAIN}", "access"),
        403: ("the token may not read gated repositories (403)", f"give it {scope} ({TOKENS_PAGE}), {AGAIN}", "access"),
        404: (f"{host} has no {file} in {REPOSITORY} (404)", f"{mirror} the file was moved: see the dataset's page",
              "file"),
        416: ("what is here of a file is more than the hub has of it (416)", "run this again", "bytes"),
        429: ("the hub asks to slow down (429)", "wait a few minutes, then run this again", "hub"),
    }.get(case, (f"{host} answered with an error of its own ({status})",
                 "nothing is wrong here: run this again later (https://status.huggingface.co)", "hub"))
    return HubError(reason, remedy, kind=kind, wait=asked_wait(error.response.headers))


def asked_wait(headers: Mapping[str, str]) -> float:
    """Seconds that an answer asks to wait: Retry-After, or `t` of the hub's RateLimit header; 0 without either."""
    found = re.match(r"\s*(\d+)\s*$", headers.get("Retry-After") or "") or re.search(
        r"\bt=(\d+)", headers.get("RateLimit") or ""
    )
    return min(float(found[1]), LONGEST_WAIT) if found else 0


def with_timeout(seconds: float, function: Callable[[], Result]) -> Result:
    """function() or futures.TimeoutError after `seconds`, because no HTTP time-out covers all addresses of a host. Its
    thread is a daemon, which an executor's is not: nothing waits for it."""
    outcome: futures.Future[Result] = futures.Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return outcome.result(seconds)


def retry(
    attempt: Callable[[], Result], file: str, token: str, note: Callable[[str], None], repository: str = REPOSITORY
) -> Result:
    """attempt(), again after each of `WAITS` while its error is transient. Raises HubError.

    `note` gets a phrase for each failed attempt. Wrong bytes are fetched again once.
    """
    damaged = 0
    for wait in (*WAITS, None):
        try:
            return attempt()
        except Exception as caught:
            error = to_hub_error(caught, file, token, repository)
            damaged += error.kind == "bytes"
            if wait is None or not error.is_transient or damaged > 1:
                raise error from caught
            pause = max(wait, error.wait)
            note(f"{error.reason}; going on in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


# ---- files of the hub


class RemoteFile(NamedTuple):
    """A file as the hub announces it. etag: SHA-256 of a large file, git's SHA-1 of a small one; "" where neither the
    answer nor the listing has one, as with some mirrors. location: where its bytes are, signed and short-lived."""

    file: str
    size: int | None
    etag: str
    location: str

    @property
    def checksum(self) -> str | None:
        """"SHA-256", "git SHA-1", or None where nothing was announced that bytes could be compared with."""
        return _checksum_of(self.etag)

    def difference(self, path: Path) -> str | None:
        """How a copy of it differs, in a few words; None where it is intact. The whole copy is read."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"{size} bytes where the hub has {self.size}"
        if self.checksum is None:
            return None
        git = hashlib.sha1(f"blob {size}\0".encode())  # git's digest is over "blob", the size and the content
        found = sha256_of(path) if self.checksum == "SHA-256" else _digest_of(path, git)
        return None if found == self.etag else f"{self.checksum} {found[:12]}... where the hub has {self.etag[:12]}..."


def _checksum_of(etag: str) -> str | None:
    return {64: "SHA-256", 40: "git SHA-1"}.get(len(etag)) if re.fullmatch("[0-9a-f]+", etag) else None


def sha256_of(path: Path) -> str:
    return _digest_of(path, hashlib.sha256())


def _digest_of(path: Path, digest: hashlib._Hash) -> str:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_metadata(file: str, token: str, repository: str = REPOSITORY, sha256: str | None = None) -> RemoteFile:
    """Size and checksum of a file on the hub; also the cheapest way to learn whether this token may have it.

    Where the answer has no usable checksum, it is `sha256`, or is looked up in the repository's listing. `token`: ""
    for none, for what is public. Raises HubError where it is not the hub that answers, as behind a network's login
    page, and whatever huggingface_hub raises: see `to_hub_error`.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    kind = "dataset" if repository == REPOSITORY else "model"
    url = hf_hub_url(repository, file, repo_type=kind, endpoint=endpoint())
    found = with_timeout(HUB_SECONDS, lambda: get_hf_file_metadata(url, token=token or False, timeout=HUB_SECONDS))
    size, etag = found.size, (found.etag or "").lower()
    if sha256 and _checksum_of(etag) != "SHA-256":
        etag = sha256
    if _checksum_of(etag) is None:
        etag = ""
        with suppress(Exception):  # a mirror without listing: then it is said that nothing was compared
            size, etag = _listed([file], token, repository)[file]
        if not etag and found.commit_hash is None:
            reason = f"{hub_host()} does not answer as the hub does: a login page of the network, or no mirror of it?"
            raise HubError(reason, f"open it in a browser, check HF_ENDPOINT, {AGAIN}", kind="network")
    return RemoteFile(file, size, etag, found.location or url)


def file_sizes(files: Sequence[str], token: str) -> dict[str, tuple[int, str | None]]:
    """{file: (size, SHA-256 where it is a large one)} of those that CT-RATE has. They are asked for by name: listing
    the repository takes hours. Raises whatever huggingface_hub raises."""
    return {file: (size, digest if len(digest) == 64 else None)
            for file, (size, digest) in _listed(files, token, REPOSITORY).items()}


def _listed(files: Sequence[str], token: str, repository: str) -> dict[str, tuple[int, str]]:
    """{file: (size, SHA-256 of a large file, git's SHA-1 of a small one)}"""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    kind = "dataset" if repository == REPOSITORY else "model"
    found: dict[str, tuple[int, str]] = {}
    for start in range(0, len(files), PATHS_AT_ONCE):
        part = list(files[start : start + PATHS_AT_ONCE])
        ask = partial(HfApi(endpoint()).get_paths_info, repository, part, repo_type=kind, token=token or False)
        for entry in with_timeout(LISTING_SECONDS, ask):
            if isinstance(entry, RepoFile):
                found[entry.path] = entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id
    return found


def check_free_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        found = f"{size_text(free)} free in {folder}/, {size_text(needed + SPARE_BYTES)} needed"
        remedy = "free some, or run this in a folder on a larger disk"
        raise HubError(f"the disk is too small: {found}", remedy, kind="disk")


@contextmanager
def file_lock(*paths: Path) -> Iterator[None]:
    """Locks files or folders against other processes, those of other users too, by a file beside each, which goes
    again. Raises HubError where one is locked, or nothing can be written there."""
    with ExitStack() as locks:
        for path in dict.fromkeys(path.resolve() for path in paths):
            try:
                locks.enter_context(locked(path.with_name(f".{path.name}.lock")))
            except LockedError:
                found = f"another process is at work on {path}"
                raise HubError(found, f"wait for it to end, {AGAIN}", kind="file") from None
            except OSError as error:
                found = f"{path}: found no place for a lock beside it ({error.strerror}), expected a folder of yours"
                raise HubError(found, f"make it writable, or name another one, {AGAIN}", kind="disk") from error
        yield


def parts_of(target: Path) -> list[Path]:
    """Beginnings of it that wait for their rest. They are named after the content, so that two are never joined."""
    return list(target.parent.glob(f".{target.name}.*.part"))


def download(
    file: str,
    target: Path,
    token: str,
    note: Callable[[str], None] = lambda text: None,
    remote: RemoteFile | None = None,
    size: int | None = None,
    sha256: str | None = None,
    repository: str = REPOSITORY,
) -> RemoteFile:
    """Makes `target` the hub's `file`, trying again where that may help; -> what the hub announced.

    Not hf_hub_download: from huggingface_hub 2 on it starts from the first byte again after a kill (LOG.md).
    `remote`: from a `file_metadata` just made. `size`, `sha256`: from the listing; there is room for that much. The
    caller has locked the target, or a folder above it: see `file_lock`. Raises HubError.
    """

    def attempt() -> RemoteFile:
        nonlocal remote
        # A second time its address has expired.
        found, remote = remote or file_metadata(file, token, repository, sha256), None
        if found.size is None:
            found = found._replace(size=size)
        if size is not None and found.size != size:
            changed = f"{file} was changed on the hub meanwhile: {found.size} bytes where {size} were announced"
            raise HubError(changed, "run this again", kind="file")
        if sha256 and found.checksum == "SHA-256" and found.etag != sha256:
            raise HubError(f"{file} was changed on the hub meanwhile", "run this again", kind="file")
        try:
            _download_once(found, target, token)
        except Exception as error:
            if to_hub_error(error, file, token, repository).kind == "bytes":
                for part in parts_of(target):
                    part.unlink()
            raise
        return found

    return retry(attempt, file, token, note, repository)


class _LimitedFile(io.BufferedWriter):
    """A file that takes no more than `limit` bytes, whatever a body without end, or one that unpacks, would write."""

    def __init__(self, path: Path, limit: int):
        super().__init__(io.FileIO(path, "ab"))
        self.limit = limit

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.limit:
            found = f"more bytes arrive than the hub announced ({self.limit})"
            remedy = "something on the way changes files (a proxy, a mirror?): run this again, or on another network"
            raise HubError(found, remedy, kind="bytes")
        return super().write(data)


def _download_once(remote: RemoteFile, target: Path, token: str) -> None:
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
    if have and (remote.checksum is None or (remote.size is not None and have > remote.size)):
        part.unlink()  # the former: nothing would tell that it is a beginning of something else
        have = 0
    check_free_space(target.parent, (remote.size or 0) - have)
    free = shutil.disk_usage(target.parent).free
    own_token = token if is_hub_url(remote.location) else ""  # never sent to another host
    headers = build_hf_headers(token=own_token or False) | {"Accept-Encoding": "identity"}
    with _LimitedFile(part, remote.size if remote.size is not None else have + max(0, free - SPARE_BYTES)) as file:
        http_get(
            remote.location,
            cast(BinaryIO, file),
            resume_size=have,
            headers=headers,
            expected_size=remote.size,
            displayed_filename=target.name,
        )
        file.flush()
        os.fsync(file.fileno())
    if difference := remote.difference(part):
        raise HubError(
            f"{target.name} did not arrive as it is on the hub: {difference}",
            "something on the way changes files (a proxy, a mirror, the disk?): run this again, or on another network",
            kind="bytes",
        )
    os.replace(part, target)


# ---- weights on this machine


class WeightsFile:
    """models/ctclip_<name>.pt, or the slim copy in its place, and the record of it beside it."""

    def __init__(self, name: str):
        self.name, self.file = name, WEIGHTS[name]
        self.whole = weights_path(name)
        self.slim = slim_path(self.whole)
        self.record = record_path(self.whole)

    @property
    def path(self) -> Path | None:
        """The file that models are loaded from; None where there is none."""
        return next((path for path in (self.whole, self.slim) if path.exists()), None)

    @property
    def size(self) -> str:
        return size_text((self.path or self.whole).stat().st_size)

    @property
    def recorded_sha256(self) -> str | None:
        """Of the file as it was fetched or made."""
        return read_record(self.whole).get("slim_sha256" if self.path == self.slim else "sha256")

    @property
    def is_recorded(self) -> bool:
        """Whether the file that is here was fetched, or made of one that was; any other is a person's own."""
        record = read_record(self.whole)
        return "repository" in record and (self.path != self.slim or "slim_sha256" in record)

    def damage(self, remote: RemoteFile | None = None) -> str | None:
        """What is wrong with the file; None where it is intact or nothing is known.

        Compared with the hub's (`remote`); a slim copy, and any file where the hub cannot be asked, with the record.
        """
        if remote is not None and self.path == self.whole:
            return remote.difference(self.path)
        if remote is not None and remote.checksum == "SHA-256" and read_record(self.whole).get("sha256") != remote.etag:
            return f"not made from the file that the hub has now, says {self.record}"
        known = self.recorded_sha256
        found = sha256_of(self.path or self.whole) if known else None
        return None if known == found else f"SHA-256 {str(found)[:12]}... where {str(known)[:12]}... was kept"


def vocabulary_path(weights: Path) -> Path:
    """Where the vocabulary of a weights file's text tower is looked for."""
    return weights.parent / VOCABULARY_REPOSITORY.rpartition("/")[2] / VOCABULARY


def record_path(weights: Path) -> Path:
    return weights.with_suffix(".json")


def read_record(weights: Path) -> dict:
    """The record of a weights file; {} where there is none, or none that can be read: all of it can be found again."""
    try:
        return dict(read_json(record_path(weights)))
    except (OSError, ValueError, TypeError):
        return {}


def write_record(weights: Path, **changes: object) -> None:
    """Sets these fields and keeps the others."""
    with replacing(record_path(weights)) as temporary:
        temporary.write_text(json.dumps(read_record(weights) | changes, indent=2) + "\n", encoding="utf-8")
