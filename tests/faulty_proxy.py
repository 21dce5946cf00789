"""A proxy before an S3 server, which does to chosen requests what networks and stores do to some."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal[
    "slow-down",
    "error",
    "not-implemented",
    "forbidden",
    "expired",
    "drop",
    "cut-request",
    "drop-answer",
    "cut-answer",
    "slow",
]
"""503 SlowDown; 500; 501; 403; credentials that have expired; the connection ends before the request is
passed on, or amid its body, or after it was passed on, or amid the answer; the answer takes a while."""

ANSWERS = {
    "slow-down": (503, "SlowDown"),
    "error": (500, "InternalError"),
    "not-implemented": (501, "NotImplemented"),
    "forbidden": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
}
SLOW_SECONDS = 0.5


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose path ends so, and that have a
    header."""

    kind: Kind
    times: int = 1
    method: str = ""
    path: str = ""
    header: str | None = None

    def takes(self, request: BaseHTTPRequestHandler) -> bool:
        return (
            self.times > 0
            and request.command.startswith(self.method)
            and urlsplit(request.path).path.endswith(self.path)
            and (self.header is None or self.header in request.headers)
        )


@dataclass
class Rain:
    """Faults at random, until it is over.

    Attributes:
        rate: of a fault at any request.
        kinds: with the number of requests, at most, that one of them takes.
        fell: how often each kind has come.
    """

    random: Random
    rate: float
    kinds: dict[Kind, int]
    fell: Counter[Kind]
    _burst: list[Kind] = field(default_factory=list)

    def falls(self) -> Kind | None:
        if not self._burst and self.random.random() < self.rate:
            kind = self.random.choice(list(self.kinds))
            self._burst = [kind] * self.random.randint(1, self.kinds[kind])
        if not self._burst:
            return None
        self.fell[self._burst[-1]] += 1
        return self._burst.pop()


class FaultyProxy:
    """Passes everything on to `target` but for its faults, and for what `rain` there is. To be used as a
    context.

    Attributes:
        requests: the verb and the path of each.
        answered: bytes of all answers.
    """

    rain: Rain | None = None

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).netloc
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.answered = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign] # clients are killed
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fail(self, kind: Kind, **which) -> None:
        self.faults.append(Fault(kind, **which))

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _next_fault(self, request: BaseHTTPRequestHandler) -> Kind | None:
        with self._lock:
            self.requests.append(f"{request.command} {request.path}")
            for fault in self.faults:
                if fault.takes(request):
                    fault.times -= 1
                    return fault.kind
            return self.rain.falls() if self.rain else None

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                fault = proxy._next_fault(self)
                if fault == "drop":
                    return self.hang_up()
                length = int(self.headers.get("Content-Length") or 0)
                if fault == "cut-request":
                    self.rfile.read(length // 2)
                    return self.hang_up()
                body = self.rfile.read(length)
                if fault in ANSWERS:
                    return self.refuse(*ANSWERS[fault])
                status, headers, answer = self.passed_on(body)
                if fault == "drop-answer":
                    return self.hang_up()
                if fault == "slow":
                    time.sleep(SLOW_SECONDS)
                return self.answer(status, headers, answer, cut=fault == "cut-answer")

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any  # noqa: N815

            def passed_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
                connection = http.client.HTTPConnection(proxy.target, timeout=30)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
                connection.request(self.command, self.path, body=body, headers=headers)
                response = connection.getresponse()
                answer = response.read()
                connection.close()
                return response.status, dict(response.headers.items()), answer

            def answer(self, status: int, headers: dict, body: bytes, cut: bool = False) -> None:
                self.send_response_only(status)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else len(body)
                for name, value in headers.items():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if cut else body)
                with proxy._lock:
                    proxy.answered += len(body)
                if cut:
                    self.hang_up()

            def refuse(self, status: int, code: str) -> None:
                text = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
                self.answer(status, {"Content-Type": "application/xml"}, text)

            def hang_up(self) -> None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, *_: object) -> None: ...

        return Handler
