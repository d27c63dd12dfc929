"""A small model hub on the loopback, as far as huggingface_hub speaks to one: listings, files with their hashes,
ranges, large files on another host, gates, uploads in one commit, and the faults that a test orders."""

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
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WRITER, READER = "Bearer let-me-in", "Bearer only-reads"
LICENSES = ("mit", "apache-2.0", "other")
LARGE = 1 << 20  # from here on a file is stored as the real hub stores weights: by sha256, on a host of its own


@dataclass
class Hub:
    """Repositories are folders below `root`, owner/name.

    Attributes:
        gated: repositories that answer 401 without the token "let-me-in".
        cut: file -> after how many bytes the connection is closed; once each.
        altered: files whose bytes are not those of the hash that is named.
        commits: what each upload's ndjson said, line by line; blobs: large files by their sha256.
        asked: "METHOD path range" of every request, and the token that came with it.
    """

    root: Path
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    altered: set[str] = field(default_factory=set)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    commits: list[list[dict[str, Any]]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    port: int = 0
    _etags: dict[Path, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def etag(self, path: Path) -> str:
        if path not in self._etags:
            data = path.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self._etags[path] = hashlib.sha256(data).hexdigest() if len(data) >= LARGE else git
        return self._etags[path]

    def requests(self, part: str) -> list[str]:
        return [line for line, _ in self.asked if part in line]


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """The hub, up inside the block."""
    hub = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_PUT(self) -> None:
            """A large file, at the address that the batch named; signed, so that no token comes with it."""
            hub.asked.append((f"PUT {self.path}", self.headers.get("Authorization")))
            if self.headers.get("Transfer-Encoding") == "chunked":
                data = b""
                while length := int(self.rfile.readline(), 16):
                    data += self.rfile.read(length)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                data = self.sent()
            name = self.path.removeprefix("/lfs/")
            if hashlib.sha256(data).hexdigest() != name:
                return self.error(400, "")
            hub.blobs[name] = data
            return self.json({})

        def do_POST(self) -> None:
            token, path = self.headers.get("Authorization"), unquote(self.path)
            hub.asked.append((f"POST {path}", token))
            data = self.sent()
            if path == "/api/validate-yaml":
                return self.validated(json.loads(data)["content"])
            if token != WRITER:
                return self.error(403 if token == READER else 401, "", {"error": "Forbidden" if token else "Unknown"})
            if path == "/api/repos/create":
                asked = json.loads(data)
                folder = hub.root / asked["organization"] / asked["name"]
                url = f"{hub.url}/{asked['organization']}/{asked['name']}"
                if folder.is_dir():
                    return self.json({"error": "You already created this model repo", "url": url}, 409)
                folder.mkdir(parents=True)
                return self.json({"url": url})
            if ready := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
                files = [(hub.root / ready[1], each["path"]) for each in json.loads(data)["files"]]
                return self.json({"files": [self.mode(*each) for each in files]})
            if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
                objects = [self.large(each) for each in json.loads(data)["objects"]]
                return self.json({"transfer": "basic", "objects": objects})
            if path == "/lfs-verify":
                told = json.loads(data)
                return self.json({}) if len(hub.blobs[told["oid"]]) == told["size"] else self.error(404, "")
            if commit := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
                return self.commit(commit[1], [json.loads(line) for line in data.splitlines()])
            return self.error(404, "")

        def sent(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def validated(self, content: str) -> None:
            told = yaml.safe_load(content.split("---")[1])
            wrong = told.get("license", "mit") not in LICENSES
            errors = [{"message": f'"license" must be one of {LICENSES}'}] if wrong else []
            self.json({"errors": errors, "warnings": []}, 400 if wrong else 200)

        def mode(self, folder: Path, path: str) -> dict[str, object]:
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}

        def large(self, each: dict[str, Any]) -> dict[str, object]:
            told = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] in hub.blobs:
                return told
            upload, verify = {"href": f"{hub.url}/lfs/{each['oid']}"}, {"href": f"{hub.url}/lfs-verify"}
            return told | {"actions": {"upload": upload, "verify": verify}}

        def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
            if not (hub.root / repo).is_dir():
                return self.error(404, "RepoNotFound")
            hub.commits.append(lines)
            for value in (line["value"] for line in lines if line["key"] != "header"):
                file = hub.root / repo / value["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(value["content"]) if "content" in value else hub.blobs[value["oid"]])
            url = f"{hub.url}/{repo}/commit/{COMMIT}"
            return self.json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

        def answer(self, body: bool) -> None:
            token = self.headers.get("Authorization")
            hub.asked.append((f"{self.command} {self.path} {self.headers.get('Range') or ''}".strip(), token))
            path = unquote(self.path.split("?")[0])
            if cdn := re.fullmatch(r"/cdn/(.+)", path):
                return self.file(hub.root / cdn[1], body)
            if listed := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
                repo = listed[1]
                return self.listing(repo) if (hub.root / repo).is_dir() else self.error(404, "RepoNotFound")
            if tree := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
                return self.tree(tree[1])
            asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if asked is None:
                return self.error(404, "")
            repo, _, name = asked.groups()
            if not (hub.root / repo).is_dir():
                return self.error(404, "RepoNotFound")
            if repo in hub.gated and token != "Bearer let-me-in":
                return self.error(401, "GatedRepo")
            file = hub.root / repo / name
            if not file.is_file():
                return self.error(404, "EntryNotFound")
            if file.stat().st_size >= LARGE:
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{hub.port}/cdn/{repo}/{name}")
                self.facts(file)
                self.send_header("X-Linked-Etag", f'"{hub.etag(file)}"')
                self.send_header("X-Linked-Size", str(file.stat().st_size))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
            return self.file(file, body)

        def facts(self, file: Path) -> None:
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hub.etag(file)}"')
            self.send_header("Accept-Ranges", "bytes")

        def file(self, file: Path, body: bool) -> None:
            size = file.stat().st_size
            first, until = 0, size
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                first, until = int(wanted[1]), min(size, int(wanted[2]) + 1) if wanted[2] else size
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{until - 1}/{size}")
            else:
                self.send_response(200)
            self.facts(file)
            self.send_header("Content-Length", str(until - first))
            self.end_headers()
            if not body:
                return
            end = hub.cut.pop(file.name, until)
            with file.open("rb") as source:
                source.seek(first)
                left = min(end, until) - first
                while left > 0 and (piece := source.read(min(left, 1 << 20))):
                    if file.name in hub.altered:
                        piece = bytes([piece[0] ^ 1]) + piece[1:]
                    self.wfile.write(piece)
                    left -= len(piece)
            if end < until:
                self.close_connection = True

        def files(self, repo: str) -> Iterator[tuple[str, Path, dict[str, object]]]:
            for file in sorted((hub.root / repo).rglob("*")):
                if file.is_file():
                    size = file.stat().st_size
                    lfs = {"lfs": {"sha256": hub.etag(file), "size": size, "pointerSize": 130}} if size >= LARGE else {}
                    yield file.relative_to(hub.root / repo).as_posix(), file, {"size": size, **lfs}

        def tree(self, repo: str) -> None:
            found = [
                {"type": "file", "path": name, "oid": hub.etag(file)[:40], **told}
                for name, file, told in self.files(repo)
            ]
            self.json(
                [
                    {**entry, "lfs": {**lfs, "oid": lfs["sha256"]}} if (lfs := entry.get("lfs")) else entry
                    for entry in found
                ]
            )  # type: ignore[dict-item]

        def listing(self, repo: str) -> None:
            siblings = [{"rfilename": name, **told} for name, _, told in self.files(repo)]
            self.json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []})

        def json(self, value: object, code: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def error(self, code: int, kind: str, told: object = None) -> None:
            if told is not None:
                return self.json(told, code)
            self.send_response(code)
            if kind:
                self.send_header("X-Error-Code", kind)
                self.send_header("X-Error-Message", kind)
            if kind == "EntryNotFound":
                self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

    server = ThreadingHTTPServer(("", 0), Handler)
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
