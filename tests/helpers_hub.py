"""A small hub on the loopback interface, for the real huggingface_hub: one gated dataset repository, one public model.

As the hub does, it answers HEAD and GET of /datasets/.../resolve/main/<file> (small files itself, with git's SHA-1 as
ETag; large ones by a redirect to a signed address on another host, with their SHA-256 in X-Linked-Etag), ranges, and
POST of paths-info. Who asks is told by the token. `fault` chooses what goes wrong.
"""

import hashlib
import json
import re
import sys
import threading
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "ibrahimhamamci/CT-RATE"
PUBLIC = "microsoft/BiomedVLP-CXR-BERT-specialized"
TOKEN = "hf_" + "Zq7" * 11  # nobody's
NEWCOMER = "hf_" + "Yp5" * 11  # has not accepted the terms
UNSCOPED = "hf_" + "Xo3" * 11  # may not read gated repositories
BLOCK = 1 << 16


class LocalServer(ThreadingHTTPServer):
    """On the loopback interface, for the length of a `with`; `url` is its address."""

    daemon_threads = True

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


class Hub(LocalServer):
    """files: {path in its repository: bytes}. fault(verb, path, n) -> what goes wrong with the n-th such request:

    "500", "404 EntryNotFound", ...   that status, and the hub's code for it
    "cut"      half of the bytes asked for
    "wrong"    the right number of other bytes
    "slow"     a pause of `pause` seconds between blocks
    "hang"     no answer for `pause` seconds
    "stall"    half of the bytes asked for, and after `pause` seconds the end
    "endless"  the bytes, and then others for ever, without a length
    "gzip"     1 GB of zeros, compressed
    "portal"   200 and a page, as a network's login page answers everything

    checksums: whether ETags are sent; listing: whether there is one.
    """

    def __init__(self, files=None):
        super().__init__(Handler)
        self.files = files or {}
        self.fault = lambda verb, path, n: None
        self.pause = 0.01
        self.checksums = self.listing = True
        self.seen = Counter()
        self.requests = []  # (verb, path, token, first byte asked for)
        self.lock = threading.Lock()
        self.storage = f"http://localhost:{self.server_port}"

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)

    def count(self, verb, part=""):
        """Requests of that verb for paths that end so."""
        return sum(request[0] == verb and request[1].endswith(part) for request in self.requests)


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_small(path):
    return path.endswith((".csv", ".txt"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, headers=None, body=b"", length=None):
        self.send_response(status)
        length = len(body) if length is None else length
        for name, value in {"X-Repo-Commit": "c" * 40, "Content-Length": length, **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refusal(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return {TOKEN: None, NEWCOMER: (403, "GatedRepo"), UNSCOPED: (403, "")}.get(token, (401, ""))

    def handle_one(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
        public = path.startswith(f"/{PUBLIC}/resolve/main/")
        repository = f"/{PUBLIC}" if public else f"/datasets/{REPOSITORY}"
        inside = path.removeprefix(f"{repository}/resolve/main/").removeprefix("/storage/")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if REPOSITORY not in path and not path.startswith((f"/{PUBLIC}/", "/storage/")):  # others the client asks for
            return self.answer(404)
        with hub.lock:
            hub.seen[self.command, inside] += 1
            hub.requests.append((self.command, path, token, start))
            fault = hub.fault(self.command, inside, hub.seen[self.command, inside]) or ""
        if fault == "hang":
            time.sleep(hub.pause)
        if fault == "portal":
            page = b"<html>Please log in</html>"
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            return self.wfile.write(page) if self.command != "HEAD" else None
        if fault[:3].isdigit():
            status, _, code = fault.partition(" ")
            return self.answer(int(status), {"X-Error-Code": code} if code else {})
        if path.startswith("/storage/"):
            return self.send(hub.files[inside], start, fault)
        if not public and (refusal := self.refusal()):
            return self.answer(refusal[0], {"X-Error-Code": refusal[1]} if refusal[1] else {})
        if path == f"/api/datasets/{REPOSITORY}/paths-info/main" and hub.listing:
            return self.paths_info(parse_qs(body.decode())["paths"])
        if inside not in hub.files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        content = hub.files[inside]
        if is_small(inside):
            etag = git_sha1(content)
            if self.command == "HEAD":
                return self.answer(200, {"ETag": f'"{etag}"'} if hub.checksums else {}, length=len(content))
            return self.send(content, start, fault)
        linked = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'} if hub.checksums else {}
        linked |= {"X-Linked-Size": len(content)}
        return self.answer(302, {**linked, "Location": f"{hub.storage}/storage/{inside}?signature=x"})

    def paths_info(self, paths):
        files = self.server.files
        found = [path for path in paths if path in files]
        entries = [{"type": "file", "path": path, "size": len(files[path])} for path in found]
        for entry, content in zip(entries, map(files.get, found), strict=True):
            entry["oid"] = git_sha1(content)
            if not is_small(entry["path"]):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())

    def send(self, content, start, fault):
        if start >= len(content):
            return self.answer(416)
        body = content[start:]
        if fault == "wrong":
            body = bytes(byte ^ 0x55 for byte in body[:1000]) + body[1000:]
        if fault in ("endless", "gzip"):
            return self.pour(body, fault)
        part = body[: len(body) // 2] if fault in ("cut", "stall") else body
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        if self.command == "HEAD":
            return self.answer(200, length=len(body))
        self.answer(206 if start else 200, headers, length=len(body))
        for at in range(0, len(part), BLOCK):
            self.wfile.write(part[at : at + BLOCK])
            if fault == "slow":
                time.sleep(self.server.pause)
        if fault == "stall":
            time.sleep(self.server.pause)
        if fault in ("cut", "stall"):
            self.close_connection = True
        return None

    def pour(self, body, fault):
        """More than was announced; 64 MB at most, and 1 MB of gzip's."""
        packed = zlib.compressobj(9, wbits=31)
        parts = (packed.compress(bytes(1 << 20)) for _ in range(1000))
        self.close_connection = True
        self.send_response(200)
        if fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        for part in parts if fault == "gzip" else [body, *[bytes(1 << 20)] * 64]:
            self.wfile.write(part)

    def do_GET(self):
        try:
            self.handle_one()
        except ConnectionError:  # a client that was killed
            self.close_connection = True

    do_HEAD = do_POST = do_GET

    def do_CONNECT(self):
        """Asked to be a proxy: one that lets nothing through."""
        self.send_error(502)

