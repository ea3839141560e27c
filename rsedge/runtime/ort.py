"""ONNX Runtime on CPU and CUDA: choosing the device, opening graphs, running them with values left on the device."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsedge.bundle import Bundle, read_bundle
from rsedge.errors import BackendError, BundleError, OptionError

if TYPE_CHECKING:
    import onnxruntime

Array = NDArray[Any]

_log = logging.getLogger("rsedge")


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "ONNX Runtime is not installed: pip install 'rsedge[cpu]' (any machine) or 'rsedge[gpu]' (NVIDIA GPU)"
        ) from error
    return onnxruntime


def choose_device(device: str, precision: str) -> tuple[str, str]:
    """The device to run on and why.

    Args:
        device: ``auto`` (a CUDA GPU if ONNX Runtime can use one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        precision: Of the bundle: int8 is made for CPUs and has no operators on CUDA.

    Returns:
        ``cpu`` or ``cuda:N``, and a sentence that says why.

    Raises:
        OptionError: ``device`` is none of these.
        BackendError: A CUDA device was named, and this ONNX Runtime or this bundle cannot use it.
    """
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not (kind == "cuda" and number.isdecimal())):
        raise OptionError(f"device is {device!r}, expected auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return "cpu", "cpu was asked for"
    problem = "an int8 bundle is made for CPUs" if precision == "int8" else _cuda_problem(int(number or 0))
    if not problem:
        return f"cuda:{int(number or 0)}", "a CUDA GPU is usable" if kind == "auto" else f"{device} was asked for"
    if kind == "auto":
        return "cpu", problem
    raise BackendError(
        f"device {device} cannot be used: {problem}; use --device cpu, or install 'rsedge[gpu]' and export with --fp16"
    )


def _cuda_problem(number: int) -> str:
    """Why CUDA device ``number`` cannot be used, or an empty string."""
    ort = _import_onnxruntime()
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return f"onnxruntime {ort.__version__} here is built without CUDA"
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from their Python packages, where those are installed
    try:
        # Allocating is the cheapest act that needs a working driver, and it fails where a session would fall back.
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.float32, "cuda", number)
    except Exception as error:
        return f"no usable CUDA device {number} ({str(error).splitlines()[0][:120]})"
    return ""


def _usable_cores() -> int:
    """Cores this process may run on; macOS cannot tell, so there it is all of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def open_bundle(
    path: str | Path, *, device: str, threads: int | None, batch_size: int | None, usual: Mapping[str, int]
) -> tuple[Bundle, OrtBackend, str, int]:
    """A bundle with what runs it; where that is, and why, is logged.

    Args:
        path: A ``NAME.rsedge`` directory.
        device: As :func:`choose_device` takes it.
        threads: CPU threads; None takes the cores this process may use.
        batch_size: Images computed together, or None.
        usual: ``cpu`` and ``cuda`` → batch size where none is given.

    Returns:
        The bundle, its backend, why it runs there, and the batch size.

    Raises:
        BundleError: The bundle is damaged.
        BackendError: The device cannot be used, or ONNX Runtime is missing.
        OptionError: A value that is not accepted.
    """
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}, expected at least 1")
    bundle = read_bundle(path)
    chosen, reason = choose_device(device, bundle.manifest.precision)
    _log.info("running %s on %s: %s", bundle.model, chosen, reason)
    return bundle, OrtBackend(chosen, threads=threads), reason, batch_size or usual[chosen.partition(":")[0]]


class OrtBackend:
    """The graphs of a bundle in ONNX Runtime sessions on one device.

    Args:
        device: ``cpu`` or ``cuda:N``, as :func:`choose_device` gives it.
        threads: Threads of one operator on the CPU; None takes the cores this process may use.
    """

    name = "onnxruntime"

    def __init__(self, device: str, *, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise OptionError(f"threads is {threads}, expected at least 1")
        self.device = device
        self.on_cuda = device.startswith("cuda")
        self.threads = threads or _usable_cores()
        self._number = int(device.partition(":")[2] or 0)
        self._ort = _import_onnxruntime()

    def open(self, path: Path) -> OrtGraph:
        """A graph ready to run.

        Raises:
            BundleError: ONNX Runtime refuses the graph.
            BackendError: The CUDA provider did not start.
        """
        ort = self._ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.on_cuda:
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": self._number}))
        try:
            session = ort.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime raises several unrelated types
            raise BundleError(f"onnxruntime {ort.__version__} refuses {path}: {error}") from error
        if self.on_cuda and "CUDAExecutionProvider" not in session.get_providers():
            raise BackendError(f"onnxruntime {ort.__version__} did not start its CUDA provider for {path.name}")
        return OrtGraph(session, "cuda" if self.on_cuda else "cpu", self._number)

    def to_device(self, array: Array) -> onnxruntime.OrtValue:
        """A copy of ``array`` in the device's memory."""
        return self._ort.OrtValue.ortvalue_from_numpy(array, "cuda" if self.on_cuda else "cpu", self._number)


class OrtGraph:
    """One graph in one session."""

    def __init__(self, session: Any, device: str, number: int) -> None:
        self._session, self._device, self._number = session, device, number

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run on arrays of this machine's memory; on the CPU contiguous inputs are used where they lie."""
        results: list[Array] = self._session.run(list(outputs), dict(feeds))
        return results

    def run_on_device(
        self, feeds: Mapping[str, Array | onnxruntime.OrtValue], *, host: Sequence[str] = (), device: Sequence[str] = ()
    ) -> tuple[list[Array], list[onnxruntime.OrtValue]]:
        """Run with inputs on either side.

        Args:
            feeds: Arrays, or values that stay where they are.
            host: Outputs to bring into this machine's memory.
            device: Outputs to leave in the device's memory.

        Returns:
            The ``host`` outputs as arrays and the ``device`` outputs as values, in the orders asked for.
        """
        binding = self._session.io_binding()
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        for name in host:
            binding.bind_output(name, "cpu")
        for name in device:
            binding.bind_output(name, self._device, self._number)
        self._session.run_with_iobinding(binding)
        values = binding.get_outputs()
        return [value.numpy() for value in values[: len(host)]], list(values[len(host) :])
