"""A small hub on the loopback interface that takes uploads and gives them back: repositories of the user jane.

What huggingface_hub asks of the real one for `push_to_hub` and `from_pretrained`, without xet: create a repository,
tell how each file is to come (weights by LFS, the rest in the commit), take the bytes, take the commit; list, describe
and send files. `files` is {repository: {path: bytes}}.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from helpers_hub import LocalServer

OWNER = "jane"
WRITER = "hf_" + "Wr4" * 11  # nobody's
READER = "hf_" + "Rd5" * 11  # may not write


class PushHub(LocalServer):
    def __init__(self):
        super().__init__(Handler)
        self.files, self.private, self.stored = {}, {}, {}
        self.commits, self.unknown = [], []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, content=None, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": "c" * 40, **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def handle_one(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if stored := re.fullmatch("/lfs/([0-9a-f]{64})", path):
            assert hashlib.sha256(body).hexdigest() == stored[1] and "Authorization" not in self.headers
            hub.stored[stored[1]] = body
            return self.answer(200)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wish = json.loads(body)
            repo = f"{wish['organization']}/{wish['name']}"
            if token != WRITER or wish["organization"] != OWNER:
                return self.refuse(403, "", f"You don't have the rights to create a model under {wish['organization']}")
            if repo in hub.files:
                return self.answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{repo}"})
            hub.files[repo] = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
            hub.private[repo] = wish.get("visibility") == "private" or bool(wish.get("private"))
            return self.answer(200, {"url": f"{hub.url}/{repo}", "name": repo, "id": repo})
        found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/.]+)(?:\.git)?(/.*)?", path)
        repo, rest = (found[1], found[2] or "") if found else ("", path)
        if repo not in hub.files:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        files = hub.files[repo]
        if rest in ("", "/revision/main", "/revision/" + "c" * 40):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            return self.answer(200, {"id": repo, "sha": "c" * 40, "private": hub.private[repo], "siblings": siblings})
        if rest.startswith("/tree/"):
            return self.answer(200, [self.entry(name, content) for name, content in files.items()])
        if sent := re.fullmatch("/resolve/[^/]+/(.+)", rest):
            return self.send(files.get(sent[1]))
        if token != WRITER or not repo.startswith(f"{OWNER}/"):
            return self.refuse(403, "", "Forbidden: you must use a write token to upload to a repository.")
        if rest == "/preupload/main":
            wishes = json.loads(body)["files"]
            return self.answer(200, {"files": [
                {"path": wish["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if wish["path"].endswith(".safetensors") else "regular"} for wish in wishes
            ]})
        if rest == "/info/lfs/objects/batch":
            wishes = json.loads(body)["objects"]
            return self.answer(200, {"transfer": "basic", "objects": [
                wish | {"actions": {"upload": {"href": f"{hub.url}/lfs/{wish['oid']}"}}} for wish in wishes
            ]})
        if rest == "/commit/main":
            return self.commit(repo, [json.loads(line) for line in body.splitlines()])
        hub.unknown.append((self.command, path))
        return self.answer(404)

    def commit(self, repo, lines):
        hub = self.server
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                hub.files[repo][value["path"]] = hub.stored[value["oid"]]
            elif line["key"] == "file":
                hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            else:
                del hub.files[repo][value["path"]]
        hub.commits.append([(line["key"], line["value"]["path"]) for line in lines[1:]])
        self.answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/{'c' * 40}", "commitOid": "c" * 40})

    def entry(self, name, content):
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send(self, content):
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        return self.answer(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one
