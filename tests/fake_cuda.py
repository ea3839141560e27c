"""cuda-python's runtime module played on host memory: device pointers are real addresses that only a copy may touch.

What the real one would answer with an error or a crash is an AssertionError here: freeing what is not allocated,
copying outside an allocation or in the wrong direction, using a stream that is not there.
"""

from __future__ import annotations

import bisect
import ctypes
import enum
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


class Error(int):
    """A ``cudaError_t``: an enum in the real one, with ``int()``."""


OK = Error(0)


@dataclass
class Properties:
    name: bytes = b"Fake Orin\0"
    major: int = 8
    minor: int = 7
    totalGlobalMem: int = 8 << 30
    integrated: int = 1
    multiProcessorCount: int = 8


@dataclass
class FakeCuda:
    """One driver. ``limit`` bytes can be allocated; ``devices`` may be 0."""

    devices: int = 1
    limit: int = 1 << 30
    properties: Properties = field(default_factory=Properties)
    error: int = 0

    def __post_init__(self) -> None:
        self.device: dict[int, ctypes.Array[Any]] = {}
        self.pinned: dict[int, ctypes.Array[Any]] = {}
        self.streams: set[int] = set()
        self.pending: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.capture_problem = ""
        self.here = threading.local()
        self.last_error = Error(0)
        self.used_devices: set[int] = set()
        self.launches = 0
        self.copies = 0
        self.graphs: set[int] = set()
        self._made: dict[int, list[Callable[[], None]]] = {}
        self._count = 1000

    def handle(self) -> int:
        self._count += 1
        return self._count

    @property
    def used(self) -> int:
        return sum(len(block) for block in self.device.values())

    def owns(self, address: int, size: int) -> bool:
        """Whether [address, address + size) lies in one device allocation."""
        starts = sorted(self.device)
        index = bisect.bisect_right(starts, address) - 1
        return index >= 0 and address + size <= starts[index] + len(self.device[starts[index]])

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        """Keep it until somebody waits, as a busy GPU does, or for good where the stream is capturing."""
        assert stream in self.streams, f"there is no stream {stream}"
        (self.pending if self.recording is None else self.recording).append(work)

    def finish(self) -> None:
        """Do what was enqueued."""
        work, self.pending = self.pending, []
        for each in work:
            each()

    def is_pinned(self, address: int, size: int) -> bool:
        """Whether [address, address + size) lies in page-locked memory."""
        return any(start <= address and address + size <= start + len(block) for start, block in self.pinned.items())

    # The module's functions

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (Error(self.error), None) if self.error else (OK, self.devices)

    def cudaGetDeviceProperties(self, number: int) -> tuple[Any, ...]:
        assert 0 <= number < self.devices
        return OK, self.properties

    def cudaSetDevice(self, number: int) -> tuple[Any, ...]:
        if not 0 <= number < self.devices:
            return (Error(101),)
        self.here.number = number
        return (OK,)

    def cudaGetErrorString(self, error: Error) -> tuple[Any, ...]:
        texts = {2: b"out of memory", 35: b"CUDA driver version is insufficient for CUDA runtime version"}
        return OK, texts.get(int(error), b"unknown error")

    def cudaGetLastError(self) -> tuple[Any, ...]:
        error, self.last_error = self.last_error, OK
        return (error,)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        assert self.recording is None, "allocating while a stream is capturing"
        if self.used + size > self.limit:
            self.last_error = Error(2)
            return Error(2), None
        self.used_devices.add(getattr(self.here, "number", 0))
        block = (ctypes.c_byte * (size + 256))()
        ctypes.memset(block, 0x7F, len(block))  # whoever reads what was not written should see it
        address = -(-ctypes.addressof(block) // 256) * 256
        view = (ctypes.c_byte * size).from_address(address)
        view._keep = block  # type: ignore[attr-defined]
        self.device[address] = view
        return OK, address

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self.finish()  # it waits, as the real one does
        assert address in self.device, "freed twice, or never allocated"
        del self.device[address]
        return (OK,)

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        block = (ctypes.c_byte * size)()
        self.pinned[ctypes.addressof(block)] = block
        return OK, ctypes.addressof(block)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        assert not self.pending, "page-locked memory is freed while a copy may use it"
        del self.pinned[address]
        return (OK,)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: cudaMemcpyKind, stream: int
    ) -> tuple[Any, ...]:
        assert size > 0
        assert self.owns(target, size) == (kind != cudaMemcpyKind.cudaMemcpyDeviceToHost), f"wrong target for {kind!r}"
        assert self.owns(source, size) == (kind != cudaMemcpyKind.cudaMemcpyHostToDevice), f"wrong source for {kind!r}"
        host = {cudaMemcpyKind.cudaMemcpyHostToDevice: source, cudaMemcpyKind.cudaMemcpyDeviceToHost: target}.get(kind)
        assert host is None or self.is_pinned(host, size), "CUDA does not promise when it is done with pageable memory"
        self.copies += 1
        self.enqueue(stream, lambda: ctypes.memmove(target, source, size) and None)
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        assert flags == 1
        stream = self.handle()
        self.streams.add(stream)
        return OK, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self.streams.remove(stream)
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        assert stream in self.streams
        assert self.recording is None, "waiting for a stream that is capturing"
        self.finish()
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: cudaStreamCaptureMode) -> tuple[Any, ...]:
        assert stream in self.streams
        assert isinstance(mode, cudaStreamCaptureMode)
        self.recording = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        assert stream in self.streams
        assert self.recording is not None
        work, self.recording = self.recording, None
        if self.capture_problem:
            return Error(901), None
        handle = self.handle()
        self._made[handle] = work
        return OK, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        assert flags == 0
        handle = self.handle()
        self._made[handle] = self._made[graph]
        self.graphs.add(handle)
        return OK, handle

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self._made[graph]
        return (OK,)

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[Any, ...]:
        assert executable in self.graphs, "launched after it was destroyed"
        self.launches += 1
        for work in self._made[executable]:
            self.enqueue(stream, work)
        return (OK,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[Any, ...]:
        assert not self.pending, "a graph is freed while it may be running"
        self.graphs.remove(executable)
        return (OK,)


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda, *, layout: str = "cuda.bindings.runtime") -> None:
    """Let ``import cuda…`` find the fake, in the new package layout or the old one (``cuda.cudart``)."""
    module = types.ModuleType(layout)
    for name in dir(fake):
        if name.startswith("cuda"):
            setattr(module, name, getattr(fake, name))
    module.cudaMemcpyKind = cudaMemcpyKind  # type: ignore[attr-defined]
    module.cudaStreamCaptureMode = cudaStreamCaptureMode  # type: ignore[attr-defined]
    module.cudaStreamNonBlocking = 1  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name == "cuda" or name.startswith("cuda.")]:
        monkeypatch.delitem(sys.modules, name)
    parts = layout.split(".")
    for depth in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:depth]))
        package.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, layout, module)
