"""A Hub of one machine: the HTTP calls that `huggingface_hub` makes to create, fill and read a repository.

Regular files come inside the commit, large ones by git-LFS (batch, PUT, verify), as the real Hub asks for them. Every
request needs the token, private repositories to be read too. Everything is kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_a_token_for_the_tests"
LARGE = (".safetensors", ".gguf")
COMMIT = "a" * 40


@dataclass
class Hub:
    """What has arrived."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    """git-LFS objects by SHA-256."""
    requests: list[str] = field(default_factory=list)


@contextmanager
def running() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, content: Any = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.body()
        self.hub.requests.append(f"POST {path}")
        if not self.allowed():
            return self.reply(401, {"error": "no token"})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+/.+)/preupload/main", path):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": [{**file, "shouldIgnore": False} for file in files]})
        if re.fullmatch(r"/(.+/.+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        if path == "/verify":
            told = json.loads(body)
            return self.reply(200 if len(self.hub.objects.get(told["oid"], b"")) == told["size"] else 422, {})
        if found := re.fullmatch(r"/api/models/(.+/.+)/commit/main", path):
            return self.commit(found[1], body)
        self.reply(404, {"error": f"no such call: {path}"})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked.get("visibility") == "private" or asked.get("private"):
            self.hub.private.add(name)
        known = name in self.hub.repositories
        self.hub.repositories.setdefault(name, {})
        self.reply(409 if known else 200, {"url": f"{self.hub.address}/{name}"})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                **{key: one[key] for key in ("oid", "size")},
                "actions": {
                    "upload": {"href": f"{self.hub.address}/upload/{one['oid']}"},
                    "verify": {"href": f"{self.hub.address}/verify"},
                },
            }
            for one in asked["objects"]
        ]
        self.reply(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, body: bytes) -> None:
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.hub.repositories[name][value["path"]] = self.hub.objects[value["oid"]]
        url = f"{self.hub.address}/{name}/commit/{COMMIT}"
        self.reply(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def do_PUT(self) -> None:
        oid, data = self.path.rpartition("/")[2], self.body()
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[oid] = data
        self.reply(200, {})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|resolve)/[^/]+(?:/(.+))?)?", path)
        name = found[1] if found else ""
        if name not in self.hub.repositories or (name in self.hub.private and not self.allowed()):
            return self.reply(404, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
        assert found
        files, kind, inside = self.hub.repositories[name], found[2], found[3]
        if kind == "resolve":
            if inside not in files:
                return self.reply(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            etag = f'"{hashlib.sha256(files[inside]).hexdigest()}"'
            return self.reply(200, files[inside], X_Repo_Commit=COMMIT, ETag=etag)
        if kind == "tree":
            return self.tree(files, inside)
        siblings = [{"rfilename": file} for file in files]
        self.reply(200, {"id": name, "sha": COMMIT, "siblings": siblings, "private": name in self.hub.private})

    do_HEAD = do_GET

    def tree(self, files: dict[str, bytes], inside: str | None) -> None:
        below = f"{inside}/" if inside else ""
        found = [
            {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for file, data in files.items()
            if file.startswith(below)
        ]
        if not found:
            return self.reply(404, {}, X_Error_Code="EntryNotFound")
        self.reply(200, found)
