"""ctclip.hub.client against a small hub of the tests' own (helpers_hub), through the real huggingface_hub.

Reference: the bytes and checksums that hub holds, what it saw of tokens and ranges, and the exact sentences.
"""

import errno
import hashlib
import importlib
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers_hub import NEWCOMER, TOKEN, UNSCOPED, Hub
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from ctclip import fileio
from ctclip.hub import client as hub_client
from ctclip.hub.client import HubError, download, file_metadata, file_sizes, parts_of, to_hub_error

httpx = importlib.import_module(HTTPError.__module__)  # httpx2 from huggingface_hub 2 on
ROOT = Path(__file__).resolve().parents[2]
LARGE, SMALL = "dataset/valid_fixed/a.nii.gz", "dataset/labels.csv"
CONTENT = {LARGE: bytes(range(256)) * 8000, SMALL: b"VolumeName\na\n"}  # 2 MB
TERMS = "https://huggingface.co/datasets/ibrahimhamamci/CT-RATE"
TOKENS = "https://huggingface.co/settings/tokens"


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_client, "WAITS", (0.05, 0.05, 0.05))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Hub(dict(CONTENT)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def failing(verb, fault, times=10**6, suffix=""):
    return lambda v, path, n: fault if v == verb and n <= times and path.endswith(suffix) else None


# ---- files


@pytest.mark.parametrize("file", [LARGE, SMALL])
def test_a_file_arrives_with_the_hubs_checksum(hub, tmp_path, file):
    target = tmp_path / "file"
    remote = download(file, target, TOKEN)
    assert target.read_bytes() == CONTENT[file] and list(tmp_path.iterdir()) == [target]
    assert remote.size == len(CONTENT[file]) and remote.difference(target) is None
    assert remote.checksum == {LARGE: "SHA-256", SMALL: "git SHA-1"}[file]
    target.write_bytes(CONTENT[file][:-1] + b"?")
    found = hashlib.sha256(target.read_bytes()).hexdigest()[:12] if file == LARGE else None
    assert remote.difference(target).startswith(f"{remote.checksum} {found or ''}")
    target.write_bytes(b"half")
    assert remote.difference(target) == f"4 bytes where the hub has {len(CONTENT[file])}"


def test_the_token_goes_to_the_hub_and_not_to_the_storage_it_points_to(hub, tmp_path):
    download(LARGE, tmp_path / "file", TOKEN)
    tokens = {path.startswith("/storage/"): token for _, path, token, _ in hub.requests}
    assert tokens == {False: TOKEN, True: None}


def test_a_mirror_without_checksums_is_taken_by_its_size(tmp_path):
    remote = hub_client.RemoteFile("x", 3, "abc-def", "http://mirror")
    (tmp_path / "x").write_bytes(b"123")
    assert remote.checksum is None and remote.difference(tmp_path / "x") is None


@pytest.mark.parametrize("file", [LARGE, SMALL])
@pytest.mark.parametrize("fault", ["endless", "gzip"])
def test_a_body_larger_than_announced_is_stopped_there(hub, tmp_path, fault, file):
    """A body without end and one that unpacks to 1 GB: of neither more is written than the file has."""
    written = []
    write = hub_client._LimitedFile.write
    hub.fault = failing("GET", fault)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(HubError) as caught:
        patch.setattr(hub_client._LimitedFile, "write", lambda f, data: written.append(f.tell()) or write(f, data))
        download(file, tmp_path / "file", TOKEN)
    assert caught.value.reason == f"more bytes arrive than the hub announced ({len(CONTENT[file])})"
    assert max(written) <= len(CONTENT[file]) and list(tmp_path.iterdir()) == []


def test_a_body_without_end_whose_size_nobody_told_leaves_the_disk_its_spare_room(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_client.shutil, "disk_usage", lambda folder: SimpleNamespace(free=50_000_000 + 3_000_000))
    hub.fault = failing("GET", "endless")
    remote = file_metadata(LARGE, TOKEN)._replace(size=None)
    with pytest.raises(HubError, match=r"more bytes arrive than the hub announced \(3000000\)"):
        hub_client._download_once(remote, tmp_path / "file", TOKEN)


@pytest.mark.parametrize(("file", "checksum"), [(LARGE, "SHA-256"), (SMALL, "git SHA-1")])
def test_without_an_etag_the_listing_s_checksum_is_compared(hub, tmp_path, file, checksum):
    hub.checksums = False
    assert download(file, tmp_path / "file", TOKEN).checksum == checksum
    hub.fault = failing("GET", "wrong")
    with pytest.raises(HubError, match=f"did not arrive as it is on the hub: {checksum}"):
        download(file, tmp_path / "other", TOKEN)
    assert not (tmp_path / "other").exists()


def test_a_checksum_that_is_known_is_not_asked_for_again(hub, tmp_path):
    hub.checksums = False
    digest = hashlib.sha256(CONTENT[LARGE]).hexdigest()
    assert download(LARGE, tmp_path / "file", TOKEN, sha256=digest).etag == digest and hub.count("POST") == 0
    hub.fault = failing("GET", "wrong")
    with pytest.raises(HubError, match="did not arrive as it is on the hub: SHA-256"):
        download(LARGE, tmp_path / "other", TOKEN, sha256=digest)


def test_a_file_that_has_changed_since_the_listing_is_not_fetched(hub, tmp_path):
    with pytest.raises(HubError, match="was changed on the hub meanwhile"):
        download(LARGE, tmp_path / "file", TOKEN, sha256="0" * 64)
    assert hub.count("GET") == 0


def test_without_any_checksum_nothing_is_said_to_be_compared(hub, tmp_path):
    hub.checksums = hub.listing = False
    (tmp_path / ".file..part").write_bytes(b"the beginning of another version")
    assert download(LARGE, tmp_path / "file", TOKEN).checksum is None
    assert (tmp_path / "file").read_bytes() == CONTENT[LARGE]


def test_a_login_page_in_place_of_the_hub_is_one_line(hub, tmp_path):
    hub.fault = lambda verb, path, n: "portal"
    error = error_of(LARGE)
    assert error.reason == (
        f"{hub.url.removeprefix('http://')} does not answer as the hub does: a login page of the network, or no mirror "
        "of it?"
    )
    assert error.kind == "network" and "\n" not in str(error)


def test_a_transfer_that_stalls_is_given_up_in_time_and_goes_on(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.fault, hub.pause = failing("GET", "stall", times=1), 20
    started = time.monotonic()
    download(LARGE, tmp_path / "file", TOKEN)
    assert time.monotonic() - started < 10 and (tmp_path / "file").read_bytes() == CONTENT[LARGE]
    firsts = [first for verb, _, _, first in hub.requests if verb == "GET"]
    assert firsts[0] == 0 and firsts[-1] >= 1_000_000 - (1 << 16)


def test_a_cut_transfer_goes_on_from_its_last_chunk(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)  # 10 MB: more than the file has
    hub.fault = failing("GET", "cut", times=1)
    download(LARGE, tmp_path / "file", TOKEN)
    firsts = [first for verb, _, _, first in hub.requests if verb == "GET"]
    assert firsts == [0, 15 << 16] and (tmp_path / "file").read_bytes() == CONTENT[LARGE]


def test_a_beginning_left_by_a_killed_process_is_not_fetched_again(hub, tmp_path):
    etag = hashlib.sha256(CONTENT[LARGE]).hexdigest()
    (tmp_path / f".file.{etag[:12]}.part").write_bytes(CONTENT[LARGE][:1_500_000])
    (tmp_path / ".file.0123456789ab.part").write_bytes(b"of another version")
    download(LARGE, tmp_path / "file", TOKEN)
    assert [first for verb, _, _, first in hub.requests if verb == "GET"] == [1_500_000]
    assert (tmp_path / "file").read_bytes() == CONTENT[LARGE] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("beginning", [b"?" * 1_500_000, b"?" * 3_000_000], ids=["wrong", "too long"])
def test_a_damaged_beginning_costs_a_second_transfer(hub, tmp_path, beginning):
    etag = hashlib.sha256(CONTENT[LARGE]).hexdigest()
    (tmp_path / f".file.{etag[:12]}.part").write_bytes(beginning)
    download(LARGE, tmp_path / "file", TOKEN)
    assert (tmp_path / "file").read_bytes() == CONTENT[LARGE]


def test_wrong_bytes_are_caught_and_fetched_again(hub, tmp_path):
    hub.fault = failing("GET", "wrong", times=1)
    notes = []
    download(LARGE, tmp_path / "file", TOKEN, notes.append)
    assert (tmp_path / "file").read_bytes() == CONTENT[LARGE]
    assert len(notes) == 1 and notes[0].startswith("file did not arrive as it is on the hub: SHA-256 ")


def test_bytes_that_stay_wrong_never_get_the_name(hub, tmp_path):
    hub.fault = failing("GET", "wrong")
    with pytest.raises(HubError, match="did not arrive as it is on the hub") as caught:
        download(LARGE, tmp_path / "file", TOKEN)
    assert caught.value.kind == "bytes" and list(tmp_path.iterdir()) == [] and hub.count("GET") == 2


@pytest.mark.parametrize("status", ["500", "503"])
def test_the_hubs_own_errors_are_waited_for(hub, tmp_path, status):
    hub.fault = failing("HEAD", status, times=2)
    notes = []
    download(LARGE, tmp_path / "file", TOKEN, notes.append)
    host = hub.url.removeprefix("http://")
    assert notes == [f"{host} answered with an error of its own ({status}); going on in 0 s"] * 2


def test_it_waits_as_long_as_the_hub_asks(monkeypatch):
    assert hub_client.asked_wait({"Retry-After": "7"}) == 7
    assert hub_client.asked_wait({"RateLimit": '"resolvers";r=0;t=41'}) == 41
    assert hub_client.asked_wait({"Retry-After": "100000"}) == hub_client.LONGEST_WAIT
    assert hub_client.asked_wait({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}) == 0
    response = httpx.Response(429, headers={"Retry-After": "3"}, request=httpx.Request("GET", hub_client.HUB))
    assert to_hub_error(HfHubHTTPError("slow down", response=response), "x", TOKEN).wait == 3


def test_files_are_asked_for_by_name_many_at_a_time(hub, monkeypatch):
    monkeypatch.setattr(hub_client, "PATHS_AT_ONCE", 2)
    found = file_sizes([LARGE, "dataset/nowhere.nii.gz", SMALL], TOKEN)
    digest = hashlib.sha256(CONTENT[LARGE]).hexdigest()
    assert found == {LARGE: (len(CONTENT[LARGE]), digest), SMALL: (len(CONTENT[SMALL]), None)}
    assert [request[0] for request in hub.requests] == ["POST", "POST"]


def test_an_address_that_expired_is_asked_for_again(hub, tmp_path):
    """A 403 of the storage, which knows no tokens, says nothing of the token."""
    hub.fault = failing("GET", "403", times=1)
    notes = []
    download(LARGE, tmp_path / "file", TOKEN, notes.append)
    assert notes == ["the address of a file's bytes has expired (403); going on in 0 s"]
    assert hub.count("HEAD") == 2 and (tmp_path / "file").read_bytes() == CONTENT[LARGE]


def test_what_another_one_holds_is_left_to_it(tmp_path):
    with hub_client.file_lock(tmp_path / "a", tmp_path / "b"):
        for paths in ([tmp_path / "b"], [tmp_path / "c", tmp_path / "c" / ".." / "a"]):
            with pytest.raises(HubError) as caught, hub_client.file_lock(*paths):
                raise AssertionError("both hold it")
            place = tmp_path.resolve() / paths[-1].name
            assert str(caught.value) == (
                f"another process is at work on {place}; wait for it to end, then run this again"
            )
    with hub_client.file_lock(tmp_path / "b", tmp_path / "c"):  # nothing is held any more
        assert sorted(path.name for path in tmp_path.iterdir()) == [".b.lock", ".c.lock"]
    assert list(tmp_path.iterdir()) == []


HOLD = "import sys; from pathlib import Path; from ctclip.hub.client import file_lock\n"
HOLD += "with file_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.readline()"


@contextmanager
def held_elsewhere(path, **environment):
    """Another process holds the lock, and is given."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, env=os.environ | environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout.readline() == "held\n"
        yield holder
        holder.kill()


def test_processes_with_other_temporary_folders_exclude_each_other(tmp_path):
    (tmp_path / "tmp").mkdir()
    with held_elsewhere(tmp_path / "x", TMPDIR=str(tmp_path / "tmp")) as holder:
        with pytest.raises(HubError, match="another process is at work on"), hub_client.file_lock(tmp_path / "x"):
            raise AssertionError("both hold it")
        holder.kill()
        holder.wait()
        with hub_client.file_lock(tmp_path / "x"):  # the lock of a process that was killed
            pass


@contextmanager
def as_another_user():
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs two users")
def test_another_users_lock_excludes_and_a_folder_of_theirs_is_one_line():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are for one user
        theirs, shared = Path(name), Path(name, "shared")
        theirs.chmod(0o755)
        shared.mkdir()
        shared.chmod(0o777)
        refused = pytest.raises(HubError, match="another process is at work on")
        with held_elsewhere(shared / "x"), as_another_user(), refused, hub_client.file_lock(shared / "x"):
            raise AssertionError("both hold it")
        (shared / ".x.lock").chmod(0o644)  # left by the kill, and not to be written by others
        with as_another_user():
            with hub_client.file_lock(shared / "x"):
                pass
            with pytest.raises(HubError) as caught, hub_client.file_lock(theirs / "x"):
                raise AssertionError("a lock in a folder that cannot be written to")
    assert str(caught.value) == (
        f"{theirs.resolve() / 'x'}: found no place for a lock beside it (Permission denied), expected a folder of "
        "yours; make it writable, or name another one, then run this again"
    )


def test_a_disk_that_knows_no_locks_is_locked_in_the_temporary_folder(tmp_path, monkeypatch):
    real, tried = fileio._try_lock, []

    def no_locks_here(descriptor, writable):
        tried.append(descriptor)
        if len(tried) == 1:
            raise OSError(errno.ENOLCK, "No locks available")
        real(descriptor, writable)

    monkeypatch.setattr(fileio, "_try_lock", no_locks_here)
    monkeypatch.setattr(fileio.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    with hub_client.file_lock(tmp_path / "x"):
        assert [path.suffix for path in (tmp_path / "tmp").iterdir()] == [".lock"]


def test_a_file_that_has_grown_meanwhile_is_not_fetched(hub, tmp_path):
    with pytest.raises(HubError) as caught:
        download(LARGE, tmp_path / "file", TOKEN, size=1_000_000)
    assert caught.value.reason == (
        f"{LARGE} was changed on the hub meanwhile: 2048000 bytes where 1000000 were announced"
    )
    assert caught.value.kind == "file" and hub.count("GET") == 0


# ---- each failure its own sentence


def error_of(file, token=TOKEN):
    try:
        file_metadata(file, token)
    except Exception as error:
        return to_hub_error(error, file, token)
    raise AssertionError("no error")


REFUSALS = {
    "bad token": (
        "hf_wrong",
        "the hub refused the token (401): mistyped, expired or revoked; make a new read token "
        f"({TOKENS}), set HF_TOKEN to it, then run this again",
    ),
    "terms": (
        NEWCOMER,
        "the token is valid, but its account has not accepted CT-RATE's terms (403); accept them with that account: "
        f"{TERMS}; then run this again",
    ),
    "scope": (
        UNSCOPED,
        'the token may not read gated repositories (403); give it "Read access to contents of all public gated repos '
        f'you can access" ({TOKENS}), then run this again',
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_tokens(hub, case):
    token, line = REFUSALS[case]
    error = error_of(LARGE, token)
    assert str(error) == line and error.kind == "access" and not error.is_transient


STATUSES = {
    "404 EntryNotFound": "{host} has no dataset/valid_fixed/a.nii.gz in ibrahimhamamci/CT-RATE (404); unset "
    "HF_ENDPOINT if it names a mirror; otherwise the file was moved: see the dataset's page",
    "429": "the hub asks to slow down (429); wait a few minutes, then run this again",
    "500": "{host} answered with an error of its own (500); nothing is wrong here: run this again later "
    "(https://status.huggingface.co)",
}


@pytest.mark.parametrize("status", STATUSES)
def test_statuses(hub, status):
    hub.fault = failing("HEAD", status)
    assert str(error_of(LARGE)) == STATUSES[status].format(host=hub.url.removeprefix("http://"))


def test_no_connection(hub, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://someone:secret@127.0.0.1:{port}")
    assert str(error_of(LARGE)) == (
        f"no connection to 127.0.0.1:{port}; check the network, the proxy (HTTPS_PROXY) and HF_ENDPOINT, then run this "
        "again"
    )


def test_no_answer(hub, monkeypatch):
    monkeypatch.setattr(hub_client, "HUB_SECONDS", 0.3)
    hub.fault, hub.pause = failing("HEAD", "hang"), 2
    started = time.monotonic()
    assert str(error_of(LARGE)) == (
        f"no answer from {hub.url.removeprefix('http://')} within 0.3 s; check the network and the proxy "
        "(HTTPS_PROXY), or wait a few minutes, then run this again"
    )
    assert time.monotonic() - started < 1.5


def test_a_certificate_that_is_not_trusted(hub):
    error = httpx.ConnectError("as httpx has it")
    error.__cause__ = ssl.SSLCertVerificationError("self-signed certificate")
    assert str(to_hub_error(error, LARGE, TOKEN)) == (
        f"the certificate of {hub.url.removeprefix('http://')} is not trusted here: something in between replaces it; "
        "name your network's certificates in SSL_CERT_FILE, then run this again"
    )


def test_a_transfer_that_is_shorter_than_announced(hub, tmp_path, monkeypatch):
    """As the client tells it, which compares with the length of the answer."""
    monkeypatch.setattr("huggingface_hub.file_download.http_stream_backoff", half_of(CONTENT[LARGE]))
    with pytest.raises(HubError, match="the transfer of a file ended before its last byte") as caught:
        download(LARGE, tmp_path / "file", TOKEN)
    assert caught.value.kind == "bytes" and list(tmp_path.iterdir()) == []


def half_of(content):
    @contextmanager
    def stream(url, method="GET", **options):
        announced, request = {"Content-Length": str(len(content))}, httpx.Request(method, url)
        yield httpx.Response(200, headers=announced, content=content[:1000], request=request)

    return stream


def test_offline_switch(hub, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert str(error_of(LARGE)) == (
        "HF_HUB_OFFLINE is set, so nothing is fetched; unset HF_HUB_OFFLINE, then run this again"
    )
    assert hub.requests == []


def test_disk_too_small_is_said_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_client.shutil, "disk_usage", lambda folder: SimpleNamespace(free=51_000_000))
    with pytest.raises(HubError) as caught:
        download(LARGE, tmp_path / "file", TOKEN)
    assert str(caught.value) == (
        f"the disk is too small: 51.00 MB free in {tmp_path}/, 52.05 MB needed; free some, or run this in a folder on "
        "a larger disk"
    )
    assert hub.count("GET") == 0 and list(tmp_path.iterdir()) == []
    etag = hashlib.sha256(CONTENT[LARGE]).hexdigest()  # what is here already needs no room
    (tmp_path / f".file.{etag[:12]}.part").write_bytes(CONTENT[LARGE][:1_500_000])
    download(LARGE, tmp_path / "file", TOKEN)


def test_a_disk_that_fills_up(hub, tmp_path):
    error = OSError(28, "No space left on device")
    assert str(to_hub_error(error, LARGE, TOKEN)) == "the disk is full; free some, then run this again"


def test_a_folder_one_may_not_write_to(hub, tmp_path):
    error = PermissionError(13, "Permission denied", "models/x.part")
    assert str(to_hub_error(error, LARGE, TOKEN)) == (
        "models/x.part: Permission denied; make it writable, or name another folder, then run this again"
    )


def test_unknown_errors_lose_token_and_password():
    error = to_hub_error(RuntimeError(f"bad header Bearer {TOKEN}\nmore"), "x.pt", TOKEN)
    assert str(error) == "huggingface_hub stopped with RuntimeError: bad header Bearer ***; run this again"
    error = to_hub_error(RuntimeError("no scheme in 'htp://someone:secret@mirror/x'"), "x.pt", TOKEN)
    assert error.reason == "huggingface_hub stopped with RuntimeError: no scheme in 'htp://***@mirror/x'"


def test_a_transfer_that_is_cut_for_good_is_given_up_and_kept(hub, tmp_path, monkeypatch):
    """The client's function is replaced here alone: its own retries take 5 s for each of ours."""
    calls = []

    def cut(url, file, **options):
        calls.append(options["resume_size"])
        file.write(b"x" * 10)
        raise ConnectionError("cut")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", cut)
    with pytest.raises(HubError, match=r"no connection to 127\.0\.0\.1"):
        download(LARGE, tmp_path / "file", TOKEN)
    assert calls == [0, 10, 20, 30] and [path.stat().st_size for path in parts_of(tmp_path / "file")] == [40]


def test_a_slow_hub_is_no_failure(hub, tmp_path):
    hub.fault, hub.pause = failing("GET", "slow"), 0.01
    download(LARGE, tmp_path / "file", TOKEN)
    assert (tmp_path / "file").read_bytes() == CONTENT[LARGE] and hub.count("GET") == 1


def test_several_files_at_once(hub, tmp_path):
    """Threads share huggingface_hub's client."""
    targets = [tmp_path / str(i) for i in range(6)]
    threads = [threading.Thread(target=download, args=(LARGE, target, TOKEN)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(target.read_bytes() == CONTENT[LARGE] for target in targets)
