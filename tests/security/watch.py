"""Seeing what a process touches: inotify on decoys, a listener that counts, snapshots of folders, strace if there is.

``test_watch.py`` proves all of it on GDAL itself, which follows what an input names.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_ACCESS, _MODIFY, _OPEN, _CREATE, _DELETE, _MOVED = 0x1, 0x2, 0x20, 0x100, 0x200, 0x40 | 0x80
_NAMES = {_ACCESS: "read", _MODIFY: "changed", _OPEN: "opened", _CREATE: "made", _DELETE: "deleted"}
_NONBLOCK = 0o4000
_OURS = "/nobody-else-asks-for-this"
MARK = "/rsedge-watch"
"""Paths below it do not exist: a process asks for one to say in a trace what it begins."""


class Inotify:
    """Opens, reads and changes of the files right below some folders, by any process.

    Raises:
        OSError: The kernel has none to give.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(_NONBLOCK)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._folders: dict[int, Path] = {}
        for folder in folders:
            wanted = _ACCESS | _MODIFY | _OPEN | _CREATE | _DELETE | _MOVED
            watch = self._libc.inotify_add_watch(self._fd, os.fsencode(folder), wanted)
            if watch < 0:
                raise OSError(ctypes.get_errno(), f"inotify_add_watch {folder}")
            self._folders[watch] = folder

    def events(self) -> list[str]:
        """What happened since the last call: ``opened PATH`` and the like, each once."""
        found: dict[str, None] = {}
        while True:
            try:
                content = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return list(found)
            offset = 0
            while offset < len(content):
                watch, mask, _, length = struct.unpack_from("iIII", content, offset)
                name = os.fsdecode(content[offset + 16 : offset + 16 + length].rstrip(b"\0"))
                offset += 16 + length
                verb = next((text for bit, text in _NAMES.items() if mask & bit), "moved")
                found[f"{verb} {self._folders[watch] / name}"] = None

    def close(self) -> None:
        os.close(self._fd)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    listener: Listener

    def process_request(self, request: object, client_address: object) -> None:
        self.listener.count()
        super().process_request(request, client_address)  # type: ignore[arg-type]


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    timeout = 0.5  # who speaks another protocol waits for us to speak first

    def do_GET(self) -> None:
        content = self.server.listener.answer(self.path)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_POST = do_GET

    def log_message(self, *args: object) -> None:
        """The listener keeps a list instead."""


class Listener:
    """A web server on loopback, IPv4 and where possible IPv6, that counts connections and serves ``content``."""

    def __init__(self) -> None:
        self.content = b""
        self.asked: list[str] = []
        self.connections = 0
        self._lock = threading.Lock()
        self._servers: list[_Server] = [_Server(("127.0.0.1", 0), _Handler)]
        with suppress(OSError):  # no IPv6 here
            self._servers.append(_Server6(("::1", 0), _Handler))
        for server in self._servers:
            server.listener = self
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.port = self._servers[0].server_address[1]
        self.port6 = self._servers[1].server_address[1] if len(self._servers) > 1 else None

    def count(self) -> None:
        with self._lock:
            self.connections += 1

    def answer(self, path: str) -> bytes:
        with self._lock:
            self.asked.append(path)
        return self.content if ".tif" in path else b"{}" if ".json" in path else b"<x/>"

    def taken(self) -> list[str]:
        """What was connected and asked for since the last call.

        Connections are accepted in order, so one of our own comes after all that others opened before.
        """
        for server in self._servers:
            with socket.create_connection(server.server_address[:2], timeout=5) as connection:
                connection.sendall(f"GET {_OURS} HTTP/1.0\r\n\r\n".encode())
                while connection.recv(1 << 16):
                    pass
        with self._lock:
            others, self.connections = self.connections - len(self._servers), 0
            asked, self.asked = [path for path in self.asked if path != _OURS], []
        return ([f"{others} connections"] if others else []) + [f"asked for {path}" for path in dict.fromkeys(asked)]

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


def snapshot(folders: Iterable[Path], *, ignored: Iterable[Path] = ()) -> dict[str, tuple[int, int, str]]:
    """Size, modification time and hash of all files below folders; folders and links too."""
    left_out = tuple(map(str, ignored))
    found = {}
    for folder in folders:
        for path in _walk(folder):
            if str(path).startswith(left_out) and left_out:
                continue
            state = path.lstat()
            plain = path.is_file() and not path.is_symlink()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if plain else "-"
            found[os.fsencode(path).decode("utf-8", "replace")] = (
                (state.st_size, state.st_mtime_ns, content) if plain else (0, 0, content)
            )
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def changes(before: dict[str, tuple[int, int, str]], after: dict[str, tuple[int, int, str]]) -> list[str]:
    """What differs between two snapshots."""
    return (
        [f"made {path}" for path in after.keys() - before.keys()]
        + [f"removed {path}" for path in before.keys() - after.keys()]
        + [f"changed {path}" for path in before.keys() & after.keys() if before[path] != after[path]]
    )


@cache
def strace() -> list[str] | None:
    """The command to put in front of another to trace it into the file named next; None where it is missing."""
    command = ["strace", "-f", "-qq", "-s", "4096", "-e", "trace=network,%file", "-e", "signal=none", "-o"]
    if shutil.which("strace") is None:
        return None
    # Containers often forbid ptrace.
    allowed = subprocess.run([*command, os.devnull, "true"], capture_output=True, check=False).returncode == 0
    return command if allowed else None


_TOUCHES = re.compile(
    r"^\d+ +(?:open|openat|openat2|creat|truncate|rename|renameat|renameat2|unlink|unlinkat|mkdir|mkdirat|rmdir|"
    r"symlink|symlinkat|link|linkat|chmod|fchmodat|execve)\("
)
_SOCKET = re.compile(r"^\d+ +socket\((?:AF_INET6?|PF_INET6?)\b")


def read_trace(path: Path, forbidden: Iterable[Path], guarded: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """For each run that a trace names by ``MARK``, what it touched of the forbidden folders and the network.

    Args:
        path: The trace.
        forbidden: Folders.
        guarded: Files of the system that a run may not open either.
    """
    names = "|".join(re.escape(os.fspath(folder)) for folder in forbidden)
    below = re.compile(rf'(?<!\\)"(?:{names})')
    found: dict[str, list[str]] = {}
    run = ""
    for line in path.read_text(errors="replace").splitlines():
        if f'"{MARK}/' in line:
            run = line.split(f'"{MARK}/', 1)[1].split('"', 1)[0]
            continue
        if not run or run == "end":
            continue
        touches = _TOUCHES.match(line) and below.search(line)
        named = _TOUCHES.match(line) and any(f'"{name}"' in line for name in guarded.get(run, ()))
        if touches or named or _SOCKET.match(line):
            found.setdefault(run, []).append(line.split(None, 1)[1][:200])
    return found
