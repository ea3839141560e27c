"""A web server over a local folder for tests: byte ranges, a log of requests, and faults on demand."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import quote, unquote, urlsplit


@dataclass(frozen=True)
class Request:
    """What was asked for, what was answered, and how many bytes of body went out."""

    method: str
    path: str
    byte_range: str | None
    status: int
    sent: int


@dataclass
class Fault:
    kind: str  # status, stall or drop
    value: float
    times: float
    on: str
    method: str
    headers: dict[str, str] = field(default_factory=dict)


class RangeServer:
    """Made by ``serve``; set ``ranges`` to False to answer every request with the whole file, ``query`` to a query
    string to refuse (403) whatever does not carry exactly it, and ``head`` to False to refuse HEAD (403), as signed
    URLs do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.requests: list[Request] = []
        self.ranges, self.head, self.query = True, True, ""
        self.base = ""
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.closing = threading.Event()

    def url(self, name: str = "") -> str:
        """The address of a file of the folder, with the query string that is asked for."""
        return f"{self.base}/{quote(name)}" + (f"?{self.query}" if self.query else "")

    def fail(
        self, status: int, *, times: float = 1, on: str = "", method: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Answer the next ``times`` requests (inf: all) whose path holds ``on`` with ``status``."""
        self._faults.append(Fault("status", status, times, on, method, headers or {}))

    def stall(self, seconds: float, *, times: float = float("inf"), on: str = "") -> None:
        """Answer nothing for so long, then as usual."""
        self._faults.append(Fault("stall", seconds, times, on, ""))

    def drop(self, after: int = 0, *, times: float = 1, on: str = "") -> None:
        """Close the connection: before anything is answered, or after ``after`` bytes of a body."""
        self._faults.append(Fault("drop", after, times, on, ""))

    def heal(self) -> None:
        """No more faults."""
        with self._lock:
            self._faults.clear()

    @property
    def sent(self) -> int:
        """Bytes of bodies that went out."""
        return sum(request.sent for request in self.requests)

    def faults(self, method: str, path: str) -> list[Fault]:
        """The faults of one request, counted down."""
        with self._lock:
            found = [
                fault for fault in self._faults if fault.times > 0 and fault.on in path and fault.method in ("", method)
            ]
            for fault in found:
                fault.times -= 1
        return found

    def log(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as they do with object stores
    range_server: RangeServer

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        """The server keeps a list instead."""

    def _answer(self) -> None:
        server, parts = self.range_server, urlsplit(self.path)
        name, limit = unquote(parts.path).lstrip("/"), None
        for fault in server.faults(self.command, name):
            if fault.kind == "status":
                return self._refuse(int(fault.value), name, fault.headers)
            if fault.kind == "stall":
                server.closing.wait(fault.value)
            elif fault.value == 0:
                server.log(Request(self.command, name, self.headers.get("Range"), 0, 0))
                self.close_connection = True
                return None
            else:
                limit = int(fault.value)
        if (self.command == "HEAD" and not server.head) or parts.query != server.query:
            return self._refuse(403, name)
        file = (server.folder / name).resolve()
        if not file.is_file() or server.folder not in file.parents:
            return self._refuse(404, name)
        return self._send(file, name, limit)

    def _refuse(self, status: int, name: str, headers: dict[str, str] | None = None) -> None:
        server = self.range_server
        server.log(Request(self.command, name, self.headers.get("Range"), status, 0))
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, file: Path, name: str, limit: int | None) -> None:
        server, content, state = self.range_server, file.read_bytes(), file.stat()
        asked = self.headers.get("Range")
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "") if server.ranges else None
        first, last = 0, len(content) - 1
        if match and match[1]:
            first, last = int(match[1]), min(int(match[2] or last), last)
        elif match and match[2]:
            first = max(0, len(content) - int(match[2]))
        if match and first > last:
            return self._refuse(416, name, {"Content-Range": f"bytes */{len(content)}"})
        body = content[first : last + 1]
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        if server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{state.st_mtime_ns:x}-{state.st_size:x}"')
        self.send_header("Last-Modified", self.date_time_string(int(state.st_mtime)))
        self.end_headers()
        body = body[:limit] if self.command == "GET" else b""
        # Logged first: whoever has the answer may look at the log at once.
        server.log(Request(self.command, name, asked, 206 if match else 200, len(body)))
        try:
            self.wfile.write(body)
        except ConnectionError:  # the client had enough
            self.close_connection = True
        if limit is not None:
            self.close_connection = True
        return None


@contextmanager
def serve(folder: Path) -> Iterator[RangeServer]:
    """Serve a folder on a free port of 127.0.0.1, past any proxy, until the block ends."""
    server = RangeServer(folder)
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"range_server": server}))
    http.daemon_threads = True
    http.block_on_close = False  # clients keep connections open
    server.base = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        with mock.patch.dict(os.environ, {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}):
            yield server
    finally:
        server.closing.set()
        http.shutdown()
        http.server_close()
        thread.join()
