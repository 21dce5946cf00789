"""A hub on this machine: one model, and as much of the protocol as a download needs."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

COMMIT = "c" * 40
MODEL = "someone/some-model"


class Hub(ThreadingHTTPServer):
    """Serves a folder as `someone/some-model`.

    Attributes:
        refuse: how many requests are answered with 503 from now on.
        requests: method and path of those that were answered otherwise.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.refuse = 0
        self.requests: list[str] = []
        self.lock = Lock()
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> dict[str, Path]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in paths}

    def fetched(self) -> list[str]:
        """The weights that were sent, once for each time."""
        return [one for one in self.requests if re.match(r"GET .*\.safetensors$", one)]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        with self.server.lock:
            refused = self.server.refuse > 0
            self.server.refuse -= refused
            if not refused:
                self.server.requests.append(f"{self.command} {path}")
        if refused:
            return self._answer(503, b"busy")
        files = self.server.files()
        if re.fullmatch(rf"/api/models/{MODEL}(/revision/[^/]+)?", path):
            names = [{"rfilename": name} for name in files]
            return self._answer(200, {"id": MODEL, "sha": COMMIT, "siblings": names})
        if path.startswith(f"/api/models/{MODEL}/tree/"):
            return self._answer(200, [_entry(name, path) for name, path in files.items()])
        found = re.fullmatch(rf"/{MODEL}/resolve/[^/]+/(.+)", path)
        if found and found[1] in files:
            return self._answer(200, files[found[1]].read_bytes())
        return self._answer(404, b"", ("X-Error-Code", "EntryNotFound"))

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, status: int, body: object, *headers: tuple[str, str]) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        for header in headers:
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _entry(name: str, path: Path) -> dict:
    data = path.read_bytes()
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
