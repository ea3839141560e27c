"""CUDA through cuda-python: the device, its memory, a stream and captured graphs; no torch, no CuPy.

Two layouts of cuda-python are served: ``cuda.bindings.runtime`` (12.8 on) and ``cuda.cudart`` (12.6, the first with
wheels for CUDA 12 on 64-bit Arm and Python 3.10). In both a function returns a tuple that begins with the error.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge.errors import BackendError
from rsedge.runtime.engines.contract import Array

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

_OLD_DRIVER = 35  # cudaErrorInsufficientDriver
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_ALIGNMENT = 256  # what TensorRT asks of activation memory, and what cudaMalloc gives
_STAGING = 1 << 20  # least page-locked memory for a direction: many small arrays, or a few images


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A CUDA device."""

    number: int
    name: str
    """As the driver gives it, such as ``Orin``."""
    sm: str
    """Compute capability, such as ``8.7``."""
    multiprocessors: int
    """How many it has. Boards with the same name differ in this, and so do a board's power modes."""
    memory: int
    """Bytes in all."""
    integrated: bool
    """Whether it shares the memory of the CPU, as on a Jetson."""


def runtime_bindings() -> Any:
    """cuda-python's runtime module.

    Raises:
        BackendError: It is not installed.
    """
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise BackendError("cuda-python is not installed: pip install 'rsedge[tensorrt]'")


def find_device(number: int) -> DeviceInfo:
    """CUDA device ``number``, asked of the driver before anything else touches CUDA.

    Raises:
        BackendError: cuda-python or the driver is missing, or there is no such device; the message says which.
    """
    cudart = runtime_bindings()
    try:
        count = _values(cudart, cudart.cudaGetDeviceCount(), "looking for a CUDA device")
    except RuntimeError as error:  # cuda-python 12.6 raises this where there is no driver library
        raise BackendError(f"there is no CUDA driver ({error})") from error
    except CudaError as error:
        if error.code == _OLD_DRIVER:
            hint = "the driver is missing or older than cuda-python's CUDA: pip install 'cuda-python>=12.6,<13'"
            raise CudaError(f"{error}; {hint}", error.code) from error
        raise
    if number >= count:
        raise BackendError(f"there is no CUDA device {number}: the driver knows {count}")
    properties = _values(cudart, cudart.cudaGetDeviceProperties(number), f"reading CUDA device {number}")
    name = properties.name
    return DeviceInfo(
        number=number,
        name=(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)).rstrip("\0"),
        sm=f"{properties.major}.{properties.minor}",
        multiprocessors=int(properties.multiProcessorCount),
        memory=int(properties.totalGlobalMem),
        integrated=bool(properties.integrated),
    )


def _values(cudart: Any, result: tuple[Any, ...], doing: str) -> Any:
    """What a call gave besides its error: nothing, one value or a tuple."""
    error, *values = result
    if int(error) != 0:
        cudart.cudaGetLastError()  # else whoever launches a kernel next, TensorRT say, is told of this failure
        text = cudart.cudaGetErrorString(error)[-1]
        text = text.decode() if isinstance(text, bytes) else str(text)
        raise CudaError(f"CUDA failed when {doing}: {text} ({int(error)})", int(error))
    return values[0] if len(values) == 1 else tuple(values)


class CudaError(BackendError):
    """A CUDA call failed.

    Attributes:
        code: The ``cudaError_t``.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Block:
    """Device memory that goes back to its pool when nothing refers to it any more."""

    __slots__ = ("_pool", "address", "size")

    def __init__(self, pool: Cuda, address: int, size: int) -> None:
        self._pool, self.address, self.size = pool, address, size

    def __del__(self) -> None:
        self._pool.free.setdefault(self.size, []).append(self.address)


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A dense array in device memory."""

    cuda: Cuda
    block: Block
    """Its memory, which may be larger."""
    start: int
    """Where it begins in the block, bytes."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def address(self) -> int:
        """Of the first element."""
        return self.block.address + self.start

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def numpy(self) -> Array:
        """A copy in this machine's memory."""
        with self.cuda.using():
            return self.cuda.to_host([self])[0]


class Cuda:
    """One device with one stream, on which everything happens in order.

    Memory is pooled: a block that nothing refers to is given out again. That is safe without waiting, since whoever
    gets it uses it on the same stream, later. It also makes addresses recur, which captured graphs depend on. All of it
    goes back to the driver with this object, which whatever uses it keeps alive.

    Attributes:
        stream: The stream's handle, as TensorRT takes it.
        free: Size of unused blocks → their addresses.

    Raises:
        BackendError: There is no device of this number.
    """

    def __init__(self, number: int) -> None:
        self.info = find_device(number)
        self._cudart = cudart = runtime_bindings()
        self._lock = threading.RLock()
        self.activate()
        flags = cudart.cudaStreamNonBlocking
        self._stream = self._call("making a stream", cudart.cudaStreamCreateWithFlags(flags))
        self.stream = int(self._stream)
        self.free: dict[int, list[int]] = {}
        # Page-locked memory for copies to and from the device: address and size; and what of the first is being read.
        self._up = self._down = (0, 0)
        self._staged = 0
        self._arena = (0, 0)
        self.arena_generation = 0

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # there may be nothing to free, or no driver any more
            self.trim()
            free, free_host = self._cudart.cudaFree, self._cudart.cudaFreeHost
            for release, (address, size) in ((free_host, self._up), (free_host, self._down), (free, self._arena)):
                if size:
                    release(address)
            self._cudart.cudaStreamDestroy(self._stream)

    def _call(self, doing: str, result: tuple[Any, ...]) -> Any:
        return _values(self._cudart, result, doing)

    def activate(self) -> None:
        """Make this the device of the calling thread: threads do not inherit it, and others may have chosen another."""
        self._call(f"choosing CUDA device {self.info.number}", self._cudart.cudaSetDevice(self.info.number))

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """The device for this thread alone: what is kept for the next run is shared by all threads."""
        with self._lock:
            self.activate()
            yield

    def wait(self) -> None:
        """Until all work on the stream is done."""
        self._call("computing", self._cudart.cudaStreamSynchronize(self._stream))

    # Memory

    def _allocate(self, size: int) -> int:
        for last in (False, True):
            error, address = self._cudart.cudaMalloc(size)
            if int(error) != _OUT_OF_MEMORY:
                return int(self._call(f"allocating {size} bytes", (error, address)))
            self._cudart.cudaGetLastError()
            if not last:
                self.trim()  # what others gave back has other sizes: return it to the driver and try once more
        raise CudaError(
            f"out of memory: the GPU {self.info.name} has no {size / 2**20:.0f} MiB left of "
            f"{self.info.memory / 2**30:.1f} GiB: choose a smaller --batch-size, or close what else uses it",
            _OUT_OF_MEMORY,
        )

    def trim(self) -> None:
        """Give unused memory back to the driver."""
        self.wait()
        for addresses in list(self.free.values()):
            while addresses:
                self._call("freeing memory", self._cudart.cudaFree(addresses.pop()))

    def arena(self, size: int) -> tuple[int, int]:
        """Address and size of at least ``size`` bytes that all execution contexts share for their activations.

        Sharing is safe since they run one after the other. Where the arena must grow it moves, and
        ``arena_generation`` says so: graphs captured before hold the old address.
        """
        address, present = self._arena
        if size > present:
            if address:
                self.wait()
                # Known as gone before anything can fail: contexts and captured graphs must not use it again.
                self._arena = (0, 0)
                self.arena_generation += 1
                self._call("freeing memory", self._cudart.cudaFree(address))
            size = _rounded(size)
            self._arena = (self._allocate(size), size)
            self.arena_generation += 1
        return self._arena

    # Copies

    def empty(self, *arrays: tuple[tuple[int, ...], DTypeLike]) -> list[DeviceArray]:
        """Memory for arrays of these shapes and types, with anything in it.

        They share one block, of memory given back if any fits: what is made together recurs at the same addresses
        together, which captured graphs need.

        Raises:
            CudaError: There is not that much memory.
        """
        kinds = [(shape, np.dtype(dtype)) for shape, dtype in arrays]
        starts, total = _packed([math.prod(shape) * kind.itemsize for shape, kind in kinds])
        size = _rounded(total)
        waiting = self.free.get(size)
        block = Block(self, waiting.pop() if waiting else self._allocate(size), size)
        return [
            DeviceArray(self, block, start, shape, kind) for start, (shape, kind) in zip(starts, kinds, strict=True)
        ]

    def to_device(self, array: Array) -> DeviceArray:
        """A copy of ``array``."""
        made = self.empty((array.shape, array.dtype))[0]
        self.write(made.address, array)
        return made

    def write(self, address: int, array: Array) -> None:
        """Copy an array to device memory; it may be changed as soon as this returns."""
        array, size = np.ascontiguousarray(array), array.nbytes
        if not size:
            return
        # Through page-locked memory of ours: whether CUDA has read pageable memory when it returns is not promised.
        if self._staged + size > self._up[1]:
            self.wait()
            self._staged = 0
            self._up = self._page_locked(self._up, size)
        place = self._up[0] + self._staged
        self._staged += -(-size // _ALIGNMENT) * _ALIGNMENT
        ctypes.memmove(place, array.ctypes.data, size)
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("copying to the GPU", self._cudart.cudaMemcpyAsync(address, place, size, kind, self._stream))

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy within device memory."""
        if size:
            kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
            self._call("copying on the GPU", self._cudart.cudaMemcpyAsync(target, source, size, kind, self._stream))

    def to_host(self, arrays: list[DeviceArray]) -> list[Array]:
        """Copies of several arrays in this machine's memory, with one wait for all of them."""
        starts, total = _packed([array.nbytes for array in arrays])
        self._down = self._page_locked(self._down, total)
        base = self._down[0]
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        for array, start in zip(arrays, starts, strict=True):
            if size := array.nbytes:
                result = self._cudart.cudaMemcpyAsync(base + start, array.address, size, kind, self._stream)
                self._call("copying from the GPU", result)
        self.wait()
        self._staged = 0
        whole = np.frombuffer(memoryview((ctypes.c_byte * max(total, 1)).from_address(base)).cast("B"), np.uint8)
        return [
            whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape).copy()
            for array, start in zip(arrays, starts, strict=True)
        ]

    def _page_locked(self, present: tuple[int, int], size: int) -> tuple[int, int]:
        """Page-locked memory, address and size, of at least ``size`` bytes; ``present`` if that is enough."""
        if size <= present[1] and present[0]:
            return present
        size = _rounded(max(size, _STAGING))
        made = int(self._call("allocating page-locked memory", self._cudart.cudaMallocHost(size)))
        if present[0]:
            self.wait()
            self._call("freeing memory", self._cudart.cudaFreeHost(present[0]))
        return made, size

    # Captured graphs

    @contextlib.contextmanager
    def capturing(self) -> Iterator[list[CapturedGraph]]:
        """Record what is enqueued on the stream instead of running it; the list then holds the graph to launch.

        Raises:
            CudaError: Something in it cannot be captured; the stream is usable again.
        """
        cudart = self._cudart
        made: list[CapturedGraph] = []
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("beginning a capture", cudart.cudaStreamBeginCapture(self._stream, mode))
        try:
            yield made
        except BaseException:
            error, graph = cudart.cudaStreamEndCapture(self._stream)
            if int(error) == 0:
                cudart.cudaGraphDestroy(graph)
            cudart.cudaGetLastError()  # as of _values
            raise
        graph = self._call("ending a capture", cudart.cudaStreamEndCapture(self._stream))
        try:
            executable = self._call("instantiating a captured graph", cudart.cudaGraphInstantiate(graph, 0))
        finally:
            cudart.cudaGraphDestroy(graph)
        made.append(CapturedGraph(self, executable))

    def launch(self, captured: CapturedGraph) -> None:
        """Run a captured graph."""
        launched = self._cudart.cudaGraphLaunch(captured.executable, self._stream)
        self._call("launching a captured graph", launched)

    def discard(self, executable: Any) -> None:
        """Free a graph that may be running."""
        self.wait()
        self._call("freeing a captured graph", self._cudart.cudaGraphExecDestroy(executable))


class CapturedGraph:
    """What :meth:`Cuda.capturing` made; freed when nothing refers to it any more."""

    __slots__ = ("_cuda", "executable")

    def __init__(self, cuda: Cuda, executable: Any) -> None:
        self._cuda, self.executable = cuda, executable

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the driver may be gone
            self._cuda.discard(self.executable)


Feeds = Mapping[str, Array | DeviceArray]
"""Inputs of a graph, on either side."""


def on_host(value: Array | DeviceArray) -> Array:
    """``value`` in this machine's memory, copied only if it is not there."""
    return value.numpy() if isinstance(value, DeviceArray) else value


def _rounded(size: int) -> int:
    """Up to one of four sizes per power of two, so that blocks of nearly equal arrays are exchangeable."""
    size = max(size, _ALIGNMENT)
    step = max(_ALIGNMENT, 1 << max((size - 1).bit_length() - 3, 0))
    return -(-size // step) * step


def _packed(sizes: list[int]) -> tuple[list[int], int]:
    """Where each of several pieces begins in one block, and the size of the block."""
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, total
