"""A Hugging Face hub on 127.0.0.1 for tests: listings, files with etags and ranges, gated models, unknown revisions."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
TOKEN = "hf_good"


@dataclass
class Hub:
    """Serves `models` (id -> directory) at `url`; of each every file is on the branch main, and at its commit.

    gated: ids that need TOKEN; log: (method, file, bytes sent) of each file asked for; pause: seconds before weights.
    """

    models: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    log: list[tuple[str, str, int]] = field(default_factory=list)
    pause: float = 0.0
    url: str = ""

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            served = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def commit(self, name: str) -> str:
        return hashlib.sha1(name.encode()).hexdigest()

    def sent(self, suffix: str = "") -> int:
        """Bytes of files whose name ends so."""
        return sum(size for method, file, size in self.log if method == "GET" and file.endswith(suffix))


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := API.fullmatch(path):
            self.api(*found.groups())
        elif found := FILE.fullmatch(path):
            self.file(*found.groups())
        else:
            self.refuse(404, "EntryNotFound")

    def known(self, name: str, revision: str | None) -> bool:
        if name not in self.served.models:
            self.refuse(401, "RepoNotFound")
        elif revision not in (None, "main", self.served.commit(name)):
            self.refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def api(self, name: str, kind: str | None, revision: str | None) -> None:
        if not self.known(name, revision):
            return
        home = self.served.models[name]
        files = sorted(str(file.relative_to(home)) for file in home.rglob("*") if file.is_file())
        if kind == "tree":
            found: object = [{"type": "file", "path": file, "size": (home / file).stat().st_size,
                              "oid": etag(home / file)} for file in files]
        else:
            found = {"_id": "1", "id": name, "modelId": name, "sha": self.served.commit(name), "private": False,
                     "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": file} for file in files]}
        self.send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def file(self, name: str, revision: str, file: str) -> None:
        if not self.known(name, revision):
            return
        path = self.served.models[name] / file
        if name in self.served.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(403, "GatedRepo")
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        data = path.read_bytes()
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": self.served.commit(name), "Accept-Ranges": "bytes"}
        code, body = 200, data
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            code, body = 206, data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        if self.command == "GET" and file.endswith(".safetensors"):
            time.sleep(self.served.pause)
        self.served.log.append((self.command, file, len(body)))
        self.send(code, body, headers)

    def refuse(self, code: int, what: str) -> None:
        self.send(code, b"{}", {"X-Error-Code": what, "X-Error-Message": what})

    def send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
