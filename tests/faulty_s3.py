"""A proxy in front of an S3 server that breaks ranged GETs as a script says, or a share of all requests, and keeps a
log of what it served."""

import http.client
import os
import random
import socket
import struct
import threading
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Fault(StrEnum):
    """What may happen to one GET."""

    SERVER_ERROR = "500"
    SLOW_DOWN = "503"
    NOT_FOUND = "404"
    FORBIDDEN = "403"
    RESET_BEFORE_HEADERS = "reset before headers"
    RESET_IN_BODY = "reset in body"
    TRUNCATED = "truncated"
    STALLED = "stalled"
    DRIPPING = "dripping"
    LOST_ANSWER = "carried out, then reset before headers"
    LATE = "answered a second late"
    NO_IF_MATCH = "ignores If-Match"
    NO_RANGE = "ignores Range"


CODES = {Fault.SERVER_ERROR: "InternalError", Fault.SLOW_DOWN: "SlowDown", Fault.NOT_FOUND: "NoSuchKey"}
ANY_REQUEST = (Fault.SERVER_ERROR, Fault.SLOW_DOWN, Fault.RESET_BEFORE_HEADERS, Fault.LOST_ANSWER)
"""What a share of all requests is answered with, where `kinds` says nothing else."""
CODES |= {Fault.FORBIDDEN: "AccessDenied"}


@dataclass(frozen=True)
class Get:
    """One ranged GET that reached the proxy, and the fault it was answered with."""

    path: str
    range: str
    fault: Fault | None


class FaultyS3:
    """The proxy, on loopback, from `with` to its end. Requests without a Range header pass untouched."""

    def __init__(self, upstream: str):
        self.upstream = urlsplit(upstream).netloc
        self.script: deque[Fault | None] = deque()
        """Faults of the next GETs, in order of arrival; None lets one pass."""
        self.always: Fault | None = None
        """Fault of every GET once the script is over."""
        self.kinds = ANY_REQUEST
        self.rate = 0.0
        """Share of all requests, of any method, that is broken; drawn from a fixed seed."""
        self.broken = 0
        self._draws = random.Random(0)
        self.gets: list[Get] = []
        self.arrived, self.over = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultyS3":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def reset(self):
        """Forget script and log, for the next test."""
        self.script.clear()
        self.gets.clear()
        self.arrived.clear()
        self.always, self.kinds = None, ANY_REQUEST
        self.rate, self.broken, self._draws = 0.0, 0, random.Random(0)

    def drawn_fault(self) -> Fault | None:
        """Whether this request is one of the share."""
        with self._lock:
            if self._draws.random() >= self.rate:
                return None
            self.broken += 1
            return self._draws.choice(self.kinds)

    def next_fault(self, path: str, byte_range: str) -> Fault | None:
        with self._lock:
            fault = self.script.popleft() if self.script else self.always
            self.gets.append(Get(path, byte_range, fault))
        self.arrived.set()
        return fault

    @property
    def faults(self) -> list[Fault]:
        """Those that were served."""
        return [get.fault for get in self.gets if get.fault]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    proxy: FaultyS3

    def handle_error(self, *_):
        """Clients that hang up are the point of the exercise."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        proxy: FaultyS3 = self.server.proxy
        fault = proxy.drawn_fault()
        if fault is None and "Range" in self.headers:
            fault = proxy.next_fault(self.path, self.headers["Range"])
        if fault in CODES:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(int(fault), {}, f"<Error><Code>{CODES[fault]}</Code></Error>".encode())
        elif fault == Fault.RESET_BEFORE_HEADERS:
            self._reset()
        elif fault == Fault.LOST_ANSWER:
            self._ask(proxy.upstream, None)
            self._reset()
        elif fault == Fault.LATE:
            proxy.over.wait(1.0)
            self._spoil(proxy, None, *self._ask(proxy.upstream, None))
        else:
            status, headers, body = self._ask(proxy.upstream, fault)
            self._spoil(proxy, fault, status, headers, body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def _ask(self, upstream: str, fault: Fault | None):
        dropped = {"connection"} | {Fault.NO_IF_MATCH: {"if-match"}, Fault.NO_RANGE: {"range"}}.get(fault, set())
        connection = http.client.HTTPConnection(upstream, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection.request(self.command, self.path, body or None, headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        hop = {"connection", "transfer-encoding", "server", "date"}
        return answer.status, {k: v for k, v in answer.getheaders() if k.lower() not in hop}, body

    def _spoil(self, proxy: FaultyS3, fault: Fault | None, status: int, headers: dict, body: bytes):
        half = body[: len(body) // 2]
        if fault == Fault.RESET_IN_BODY:
            self._answer(status, headers, half, content_length=len(body))
            self._reset()
        elif fault == Fault.TRUNCATED:
            self._answer(status, headers, half, content_length=len(body))
            self.close_connection = True
        elif fault == Fault.STALLED:
            self._answer(status, headers, half, content_length=len(body))
            proxy.over.wait(60)
            self.close_connection = True
        elif fault == Fault.DRIPPING:
            self._answer(status, headers, b"", content_length=len(body))
            self.close_connection = True
            for byte in body:
                if proxy.over.wait(0.02) or not self._send(bytes([byte])):
                    break
        else:  # a HEAD has the length of the body that it has not
            length = next((int(v) for k, v in headers.items() if k.lower() == "content-length"), len(body))
            self._answer(status, headers, body, content_length=length if self.command == "HEAD" else None)

    def _answer(self, status: int, headers: dict, body: bytes, content_length: int | None = None):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if content_length is None else content_length))
        self.end_headers()
        if self.command != "HEAD":
            self._send(body)

    def _send(self, data: bytes) -> bool:
        """False once the client has hung up."""
        try:
            self.wfile.write(data)
        except OSError:
            self.close_connection = True
            return False
        return True

    def _reset(self):
        """End the connection with RST, not FIN: a close with a linger time of zero."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
