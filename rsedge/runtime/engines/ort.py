"""ONNX Runtime on CPU and CUDA: choosing the device, opening graphs, running them with values left on the device."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge.errors import BackendError, BundleError, OptionError
from rsedge.host import is_out_of_memory, usable_cores
from rsedge.runtime.engines.contract import Array, parse_device
from rsedge.runtime.engines.memory import (
    GRAPHS_SINCE,
    Buffer,
    Packed,
    View,
    fitting_batch,
    free_memory,
)
from rsedge.texts import first_line

if TYPE_CHECKING:
    import onnxruntime

    from rsedge.manifest import Manifest

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
    """The device to run on, ``cpu`` or ``cuda:N``, and a sentence that says why.

    Args:
        device: ``auto`` (a CUDA GPU if ONNX Runtime can use one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        precision: Of the bundle: int8 is made for CPUs and has no operators on CUDA.

    Raises:
        OptionError: ``device`` is none of these.
        BackendError: A CUDA device was named, and this ONNX Runtime or this bundle cannot use it.
    """
    kind, number = parse_device(device)
    if kind == "cpu":
        return "cpu", "cpu was asked for"
    problem = "an int8 bundle is made for CPUs" if precision == "int8" else _cuda_problem(number)
    if not problem:
        return f"cuda:{number}", "a CUDA GPU is usable" if kind == "auto" else f"{device} was asked for"
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
        return f"no usable CUDA device {number} ({first_line(error)[:120]})"
    return ""


def default_batch_size(manifest: Manifest, device: str, usual: Mapping[str, int]) -> int:
    """Images computed together unless the user says otherwise: the ``usual`` number of ``cpu`` or ``cuda``, or fewer
    where the device, ``cpu`` or ``cuda:N``, has not the memory.
    """
    kind, number = parse_device(device)
    most = usual[kind]
    if kind != "cuda":
        return most
    found = free_memory(number)
    if found is None:
        _log.info("batch size %d: the usual one on %s, whose free memory is unknown", most, device)
        return most
    size = fitting_batch(manifest, found[0], most=most)
    free, total = (amount / 2**30 for amount in found)
    _log.info(
        "batch size %d: %s has %.1f of %.1f GiB free (choose another with --batch-size)", size, device, free, total
    )
    return size


class OrtBackend:
    """The graphs of a bundle in ONNX Runtime sessions on one device.

    On CUDA ONNX Runtime's default logger is set to errors, for the whole process.

    Args:
        device: ``cpu`` or ``cuda:N``, as :func:`choose_device` gives it.
        threads: Threads of one operator on the CPU; None takes the cores this process may use.
        cuda_graphs: Whether runs at fixed addresses are captured as CUDA graphs; None does so on CUDA where this ONNX
            Runtime captures them soundly.

    Attributes:
        on_cuda: Whether memory is the GPU's.
        place: Kind and number of the device, as ONNX Runtime takes them.
        ort, version: The onnxruntime module and its version.
        graph_ids: Numbers for captured graphs, each given once.
        undisturbed: What allocates runs in it: the lock of captures where there are any.
        fixed_addresses: Whether captioners keep their caches at fixed addresses, and run at few shapes.
    """

    name = "onnxruntime"
    capture_lock: AbstractContextManager[Any] = threading.RLock()
    """Held while a CUDA graph is captured, and by what allocates: CUDA lets no other thread do that then.

    One model with the thread of its encoder is safe so. Several models in several threads may still copy while another
    captures: give them ``cuda_graphs=False``.
    """

    def __init__(self, device: str, *, threads: int | None = None, cuda_graphs: bool | None = None) -> None:
        if threads is not None and threads < 1:
            raise OptionError(f"threads is {threads}, expected at least 1")
        self.device = device
        self.on_cuda = device.startswith("cuda")
        self.undisturbed = self.capture_lock if self.on_cuda else nullcontext()
        self.fixed_addresses = self.on_cuda
        self.threads = threads or usable_cores()
        self.place = "cuda" if self.on_cuda else "cpu", parse_device(device)[1]
        self.ort = _import_onnxruntime()
        self.version = str(self.ort.__version__)
        self.cuda_graphs = self.on_cuda and _captures_soundly(self.ort) if cuda_graphs is None else cuda_graphs
        if self.on_cuda:
            self.ort.set_default_logger_severity(3)  # where CUDA's kernels warn of in-place writes, node by node
        self.graph_ids = itertools.count(1)

    def open(self, path: Path, *, capture: bool = False) -> OrtGraph:
        """The graph in an ONNX file, ready to run; with ``capture`` its runs at fixed addresses may be captured as CUDA
        graphs.

        Raises:
            BundleError: ONNX Runtime refuses the graph.
            BackendError: The CUDA provider did not start.
        """
        capture = capture and self.cuda_graphs
        try:
            session = self._session(path, capture)
        except Exception as error:  # onnxruntime raises several unrelated types
            if is_out_of_memory(error):
                raise
            if not (capture and any(words in str(error).lower() for words in ("cuda graph", "graph capture"))):
                raise BundleError(f"onnxruntime {self.version} refuses {path}: {error}") from error
            _log.warning("%s runs without CUDA graphs: %s", path.name, first_line(error)[:200])
            session, capture = self._session(path, False), False
        if self.on_cuda and "CUDAExecutionProvider" not in session.get_providers():
            raise BackendError(f"onnxruntime {self.version} did not start its CUDA provider for {path.name}")
        return OrtGraph(self, session, path, captures=capture)

    def _session(self, path: Path, capture: bool) -> Any:
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 4  # errors are raised; printed, they would hold names out of the file as they are
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.on_cuda:
            settings = {"device_id": self.place[1], "arena_extend_strategy": "kSameAsRequested"}
            # float32 means float32: what is to be faster is exported with --fp16.
            settings |= {"use_tf32": 0, "enable_cuda_graph": int(capture)}
            providers.insert(0, ("CUDAExecutionProvider", settings))
        # No fallback: ONNX Runtime would print, take its usual providers, and hide the reason.
        with self.undisturbed:
            return self.ort.InferenceSession(path, options, providers=providers, enable_fallback=0)

    def to_device(self, array: Array) -> onnxruntime.OrtValue:
        """A copy of ``array`` in the device's memory."""
        with self.undisturbed:
            return self.ort.OrtValue.ortvalue_from_numpy(array, *self.place)

    def buffer(self, size: int) -> Buffer:
        """``size`` bytes of the device's memory, zeros, that stay where they are."""
        with self.undisturbed:
            return Buffer(self.ort, size, *self.place)

    def packed(self, tensors: Mapping[str, tuple[Any, tuple[int, ...]]]) -> Packed:
        """Tensors, name → type and shape, that cross to or from the device in one transfer."""
        with self.undisturbed:
            return Packed(self.ort, *self.place, tensors)


def _captures_soundly(ort: Any) -> bool:
    return tuple(int(part) for part in ort.__version__.split(".")[:2]) >= GRAPHS_SINCE


class OrtGraph:
    """One graph in one session.

    Attributes:
        captures: Whether runs at fixed addresses are captured as CUDA graphs.
    """

    def __init__(self, backend: OrtBackend, session: Any, path: Path, *, captures: bool = False) -> None:
        self._backend, self._session, self._path, self.captures = backend, session, path, captures
        self._may_capture = captures

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """As :class:`~rsedge.runtime.engines.contract.Graph` has it; the CPU uses contiguous inputs where they lie."""
        with self._backend.undisturbed, self._blamed():
            results: list[Array] = self._session.run(list(outputs), dict(feeds), self._options(None))
        return results

    def run_on_device(
        self,
        feeds: Mapping[str, Array | View | onnxruntime.OrtValue],
        *,
        host: Sequence[str] = (),
        device: Sequence[str] = (),
    ) -> tuple[list[Array], list[onnxruntime.OrtValue]]:
        """As :class:`~rsedge.runtime.engines.contract.Graph` has it."""
        with self._backend.undisturbed, self._blamed():
            binding = self.bind(feeds, {})
            for name in host:
                binding.bind_output(name, "cpu")
            for name in device:
                binding.bind_output(name, *self._backend.place)
            self._session.run_with_iobinding(binding, self._options(None))
            values = binding.get_outputs()
        return [value.numpy() for value in values[: len(host)]], list(values[len(host) :])

    def fix(self, inputs: Mapping[str, View | Array | onnxruntime.OrtValue], outputs: Mapping[str, View]) -> FixedRun:
        """Bind the graph to fixed addresses, to be run often; arrays are read once, when it is captured.

        Args:
            inputs: Every input: in the device's memory, or arrays for what only decides shapes.
            outputs: Outputs that are wanted, and where they go; an input's address means in place.
        """
        backend = self._backend
        return FixedRun(self, inputs, outputs, graph_id=next(backend.graph_ids), capture_lock=backend.capture_lock)

    def bind(self, inputs: Mapping[str, View | Array | onnxruntime.OrtValue], outputs: Mapping[str, View]) -> Any:
        """A binding of ONNX Runtime for :meth:`run_binding`; it keeps addresses, not what is there."""
        binding, place = self._session.io_binding(), self._backend.place
        for name, value in inputs.items():
            if isinstance(value, View):
                binding.bind_input(name, *place, value.dtype.type, value.shape, value.address)
            elif isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        for name, view in outputs.items():
            binding.bind_output(name, *place, view.dtype.type, view.shape, view.address)
        return binding

    def run_binding(self, binding: Any, graph_id: int) -> None:
        """Run a binding; as the CUDA graph of that number where graphs are captured."""
        with self._blamed():
            self._session.run_with_iobinding(binding, self._options(graph_id if self.captures else None))

    def release_captured(self, graph_id: int) -> None:
        """Free a captured graph, where this ONNX Runtime can."""
        if hasattr(self._session, "release_captured_graph"):
            self._session.release_captured_graph(graph_id)

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        """What ONNX Runtime raises while the graph runs, as a BundleError, but for memory that ran out."""
        try:
            yield
        except Exception as error:  # onnxruntime raises several unrelated types
            if is_out_of_memory(error):
                raise
            raise BundleError(
                f"onnxruntime {self._backend.version} cannot run {self._path}: {error}; where rsedge doctor finds no "
                "fault, do not use this bundle, export again"
            ) from error

    def _options(self, graph_id: int | None) -> Any:
        """Run options where a session captures graphs: without them it would capture, and replay, any run."""
        if not self._may_capture:
            return None
        options = self._backend.ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(-1 if graph_id is None else graph_id))
        return options


class FixedRun:
    """One graph at one shape, bound to fixed addresses and run often, as a CUDA graph where its session captures them.

    Made by :meth:`OrtGraph.fix`. ONNX Runtime keeps captured graphs per thread, runs a graph several times to capture
    it, and the CUDA runtime then lets no other thread allocate: such runs take ``capture_lock``.
    """

    def __init__(
        self,
        graph: OrtGraph,
        inputs: Mapping[str, View | Array],
        outputs: Mapping[str, View],
        *,
        graph_id: int,
        capture_lock: AbstractContextManager[Any],
    ) -> None:
        self._graph, self._lock, self._id = graph, capture_lock, graph_id
        # Not a set of thread ids: those are given again, and a new thread has captured nothing.
        self._here, self._captured = threading.local(), False
        # Bindings hold addresses only: what is bound must live as long.
        self._owners = (dict(inputs), dict(outputs))
        self._binding = graph.bind(inputs, outputs)

    def __call__(self) -> None:
        """Run; outputs are there when it returns."""
        if not self._graph.captures or getattr(self._here, "captured", False):
            self._graph.run_binding(self._binding, self._id)
            return
        with self._lock:
            try:
                self._graph.run_binding(self._binding, self._id)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                reason = first_line(error)[:200]
                _log.warning("CUDA graphs cannot be captured here, running without them: %s", reason)
                self._graph.captures = False
                self._graph.run_binding(self._binding, self._id)
        self._here.captured = self._graph.captures
        self._captured |= self._graph.captures

    def release(self) -> None:
        """Free what was captured, where this ONNX Runtime can; the run must not be used again."""
        if self._captured:
            self._graph.release_captured(self._id)
