"""Memory of the device: tensors at fixed addresses, how much is free, how many images fit, and what to do when they do
not.

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

from rsedge.host import is_out_of_memory, memory_available
from rsedge.texts import first_line

if TYPE_CHECKING:
    from rsedge.manifest import Manifest
    from rsedge.runtime.engines.contract import Array

_log = logging.getLogger("rsedge")

GRAPHS_SINCE = (1, 31)
"""First ONNX Runtime whose operators keep what a captured graph reads again at every replay (onnxruntime#32121)."""

_ALIGNMENT = 256
_INTEGRATED = 18  # cudaDevAttrIntegrated
_PORTABLE = 1  # cudaHostRegisterPortable: pinned whichever device is current when it is read

SHARE = 0.5
"""Of the free memory that images in work may take: the rest is for weights, fragmentation and other programs."""


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


class Packed(Buffer):
    """Several ``tensors``, name → type and shape, that cross to or from the device in one transfer."""

    def __init__(self, ort: Any, device: str, number: int, tensors: Mapping[str, tuple[Any, tuple[int, ...]]]) -> None:
        self._places: dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}
        size = 0
        for name, (dtype, shape) in tensors.items():
            self._places[name] = (size, np.dtype(dtype), shape)
            size += -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        super().__init__(ort, size, device, number)
        self._host = np.zeros(max(size, 1), np.uint8)

    def views(self) -> dict[str, View]:
        """The tensors in the device's memory."""
        return {name: self.view(dtype, shape, at) for name, (at, dtype, shape) in self._places.items()}

    def host(self, name: str) -> Array:
        """A tensor in this machine's memory: write to it, then :meth:`upload`."""
        return self._of(self._host, name)

    def upload(self) -> None:
        """Bring what was written to :meth:`host` to the device."""
        self._value.update_inplace(self._host)

    def download(self) -> dict[str, Array]:
        """All tensors as the device has them."""
        data = self._value.numpy()
        return {name: self._of(data, name) for name in self._places}

    def _of(self, data: Array, name: str) -> Array:
        at, dtype, shape = self._places[name]
        return data[at : at + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


class Cudart:
    """The few functions of the CUDA runtime library that ONNX Runtime does not pass on; :meth:`load` finds its own."""

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


def smaller_batch(error: Exception, size: int, what: str) -> int:
    """Half of ``size``, the images or texts computed together until now, with a warning that names ``what`` ran out of
    memory; an ``error`` that says anything else is raised.
    """
    if size <= 1 or not is_out_of_memory(error):
        raise error
    reason = first_line(error)[:160]
    _log.warning("%s ran out of memory with batch size %d, going on with %d: %s", what, size, size // 2, reason)
    return size // 2


def fitting_batch(manifest: Manifest, free: int, *, most: int) -> int:
    """How many images, with three rows of 32 cached tokens each, fit into ``free`` bytes: a power of two, or ``most``;
    1 at least.
    """
    fit = int(free * SHARE / bytes_per_image(manifest, tokens=32, rows=3))
    return most if fit >= most else max(1, 2 ** int(math.log2(max(fit, 1))))


def bytes_per_image(manifest: Manifest, *, tokens: int, rows: int) -> int:
    """An upper estimate of what one image in work takes on the device: its caches, and activations of both graphs."""
    vision = manifest.graphs["vision"]
    given = sum(
        math.prod(size for size in tensor.shape if isinstance(size, int)) * np.dtype(tensor.dtype).itemsize
        for tensor in vision.outputs
    )
    # An encoder's activations are not in the manifest: taken as four bytes for each of 64 channels a pixel.
    total = given + 64 * 4 * manifest.image.size**2
    if manifest.decoder is None or manifest.tokens is None:
        return total
    decoder = manifest.decoder
    step = manifest.graphs["step"]
    wide = np.dtype(next(tensor.dtype for tensor in step.inputs if tensor.name == "self_k.0")).itemsize
    self_cache = 2 * decoder.layers * decoder.heads * decoder.head_dim * tokens * wide
    logits = 4 * 4 * manifest.tokens.vocab_size
    # The cross cache of images just encoded stands beside that of images in work. Self caches of all widths stand
    # beside each other (16, 32, … columns): together less than three times the widest.
    return total + given + rows * (3 * self_cache + logits)
