"""ONNX Runtime on CUDA: memory at fixed addresses, and the CUDA runtime itself.

A CUDA graph replays what was captured, at the addresses of then. So values live in :class:`Buffer`, and a
:class:`rsedge.runtime.engines.ort.FixedRun` binds one graph at one shape to them for good. All of it works with the CPU
provider too: there it is tested without a GPU.
"""

from __future__ import annotations

import ctypes
import logging
import math
import subprocess
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge.host import memory_available

if TYPE_CHECKING:
    from rsedge.runtime.engines.contract import Array

_log = logging.getLogger("rsedge")

GRAPHS_SINCE = (1, 31)
"""First ONNX Runtime whose operators keep what a captured graph reads again at every replay (onnxruntime#32121)."""

_ALIGNMENT = 256
_INTEGRATED = 18  # cudaDevAttrIntegrated
_PORTABLE = 1  # cudaHostRegisterPortable: pinned whichever device is current when it is read


@dataclass(frozen=True, slots=True)
class View:
    """A tensor at an address of the device's memory; ``owner`` keeps the memory."""

    address: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    owner: Buffer


class Buffer:
    """Memory of the device that stays where it is, zeros at first.

    Garbage would not do: what is not in use is computed along, a NaN from there would be cached, and a weight of zero
    does not keep it from the next image.

    Args:
        ort: The onnxruntime module.
        size: Bytes.
        device, number: ``cpu`` or ``cuda``, and which.
    """

    def __init__(self, ort: Any, size: int, device: str, number: int) -> None:
        shape = [max(size, 1)]
        self._value = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, device, number)
        self._value.update_inplace(np.zeros(shape, np.uint8))

    def view(self, dtype: Any, shape: Sequence[int], offset: int = 0) -> View:
        """A tensor in it, ``offset`` bytes from its start."""
        return View(self._value.data_ptr() + offset, np.dtype(dtype), tuple(shape), self)

    def write(self, data: Array) -> None:
        """Replace all of it: uint8 of its size."""
        self._value.update_inplace(data)

    def read(self) -> Array:
        """All of it, in one transfer: uint8."""
        values: Array = self._value.numpy()
        return values


class Packed:
    """Several tensors in one buffer, so that they cross to or from the device in one transfer.

    Args:
        ort, device, number: As :class:`Buffer` takes them.
        tensors: Name → type and shape.
    """

    def __init__(self, ort: Any, device: str, number: int, tensors: Mapping[str, tuple[Any, tuple[int, ...]]]) -> None:
        self._places: dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}
        size = 0
        for name, (dtype, shape) in tensors.items():
            self._places[name] = (size, np.dtype(dtype), shape)
            size += -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        self._host = np.zeros(max(size, 1), np.uint8)
        self._buffer = Buffer(ort, size, device, number)

    def views(self) -> dict[str, View]:
        """The tensors in the device's memory."""
        return {name: self._buffer.view(dtype, shape, at) for name, (at, dtype, shape) in self._places.items()}

    def host(self, name: str) -> Array:
        """A tensor in this machine's memory: write to it, then :meth:`upload`."""
        return self._of(self._host, name)

    def upload(self) -> None:
        """Bring what was written to :meth:`host` to the device."""
        self._buffer.write(self._host)

    def download(self) -> dict[str, Array]:
        """All tensors as the device has them."""
        data = self._buffer.read()
        return {name: self._of(data, name) for name in self._places}

    def _of(self, data: Array, name: str) -> Array:
        at, dtype, shape = self._places[name]
        return data[at : at + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


class Cudart:
    """The few functions of the CUDA runtime library that ONNX Runtime does not pass on.

    Args:
        library: The loaded library; :meth:`load` finds the one that ONNX Runtime uses.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    @classmethod
    def load(cls) -> Cudart | None:
        """The CUDA runtime of this process, or None where there is none."""
        for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so", "cudart64_13.dll", "cudart64_12.dll"):
            try:
                return cls(ctypes.CDLL(name))
            except OSError:  # noqa: PERF203 - there are five
                continue
        return None

    def memory(self, number: int) -> tuple[int, int] | None:
        """Free and total bytes of a device, or None if the library will not say."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ask = self._library.cudaMemGetInfo
        return (free.value, total.value) if self._on(number, ask, ctypes.byref(free), ctypes.byref(total)) else None

    def shares_memory(self, number: int) -> bool:
        """Whether a device's memory is this machine's, as on a Jetson."""
        found, ask = ctypes.c_int(), self._library.cudaDeviceGetAttribute
        return self._on(number, ask, ctypes.byref(found), _INTEGRATED, ctypes.c_int(number)) and found.value == 1

    def pin(self, array: Array, number: int) -> bool:
        """Lock an array's pages until it is gone, so that device ``number`` reads them directly; whether it worked."""
        pointer, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        if not self._on(number, self._library.cudaHostRegister, pointer, size, ctypes.c_uint(_PORTABLE)):
            return False
        weakref.finalize(array, self._library.cudaHostUnregister, pointer)
        return True

    def _on(self, number: int, function: Any, *arguments: Any) -> bool:
        """Call a function while device ``number`` is current; whether it went well.

        The CUDA runtime keeps a thread's last error, and whoever asks next takes it for their own: ONNX Runtime asks
        after every kernel.
        """
        library, before = self._library, ctypes.c_int()
        if library.cudaGetDevice(ctypes.byref(before)) == 0 and library.cudaSetDevice(ctypes.c_int(number)) == 0:
            failed = function(*arguments)
            library.cudaSetDevice(before)
            if failed == 0:
                return True
        library.cudaGetLastError()
        return False


def free_memory(number: int) -> tuple[int, int] | None:
    """Free and total bytes of a CUDA device, from the CUDA runtime or else ``nvidia-smi``; None where neither tells.

    Where the device shares this machine's memory, what Linux would give back from its file cache is free too.
    """
    cudart = Cudart.load()
    found = cudart.memory(number) if cudart else None
    if cudart and found:
        free, total = found
        shared = memory_available() if cudart.shares_memory(number) else None
        return min(max(free, shared or 0), total), total
    command = ["nvidia-smi", f"--id={number}", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        free, total = (int(value) * 2**20 for value in text.split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return free, total
