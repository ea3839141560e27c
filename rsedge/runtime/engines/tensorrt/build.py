"""ONNX graph → TensorRT plan, one code path for TensorRT 10.3 to 11.4.

Networks are strongly typed: the types are those of the ONNX graph, so no precision flag of the builder is needed, and
TensorRT 11 has none. Written against the bindings' documented signatures and tested against a stand-in that enforces
them; not yet confirmed on hardware.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsedge.errors import BackendError, OptionError
from rsedge.runtime.engines.tensorrt.profiles import SIZE_INPUTS, Profile, shape_of

if TYPE_CHECKING:
    from rsedge.bundle import Graph

_log = logging.getLogger("rsedge")

OLDEST = (10, 3)
"""First TensorRT that is served: that of JetPack 6.1 and 6.2."""

_MOST_ERRORS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """How much to search for fast kernels."""

    level: int = 3
    """0 (build fast) to 5 (search longest); TensorRT's default is 3."""
    workspace: int | None = None
    """Most bytes of scratch memory a kernel may take; None leaves it to TensorRT (all of the device)."""

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 5:
            raise OptionError(f"optimization level is {self.level}, expected 0 to 5")
        if self.workspace is not None and self.workspace < 1 << 20:
            raise OptionError(f"workspace is {self.workspace} bytes, expected at least 1 MiB")


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """Where a build stands."""

    role: str
    """Graph that is built."""
    phase: str
    """What TensorRT calls what it does."""
    step: int
    steps: int
    """Done and in all, of this phase."""


Report = Callable[[BuildProgress], None]


def import_tensorrt() -> Any:
    """The ``tensorrt`` module. Whoever uses it must have found a device first: see :func:`find_device`.

    Raises:
        BackendError: It is missing, broken, or older than ``OLDEST``.
    """
    try:
        import tensorrt
    except Exception as error:  # its libraries fail to load with OSError, an old one with a new NumPy otherwise
        raise BackendError(
            f"TensorRT cannot be imported ({error}): on a Jetson use the system's, in a virtual environment made with "
            "--system-site-packages; elsewhere pip install tensorrt"
        ) from error
    version = tuple(int(part) for part in tensorrt.__version__.split(".")[:2])
    if version < OLDEST:
        raise BackendError(f"TensorRT is {tensorrt.__version__}, rsedge needs {'.'.join(map(str, OLDEST))} or newer")
    return tensorrt


class Loggers:
    """TensorRT's messages: errors are kept for the exception to come, the rest goes to Python's logging."""

    def __init__(self, trt: Any) -> None:
        self.errors: deque[str] = deque(maxlen=_MOST_ERRORS)
        errors, severity = self.errors, trt.ILogger.Severity
        levels = {severity.WARNING: logging.DEBUG}

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    errors.append(msg)
                    _log.debug("TensorRT: %s", msg)
                elif severity in levels:
                    _log.log(levels[severity], "TensorRT: %s", msg)

        self.logger = Logger()

    def taken(self) -> str:
        """The errors since the last call, one per line."""
        text = "\n".join(f"  - {message}" for message in self.errors)
        self.errors.clear()
        return text


@contextlib.contextmanager
def refusals(trt: Any, loggers: Loggers, doing: str) -> Iterator[None]:
    """Exceptions of the bindings as BackendErrors: a ``TypeError`` is how they say that an object was not made."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        said = "\n".join(filter(None, (f"TensorRT {trt.__version__} fails when {doing}: {error}", loggers.taken())))
        raise BackendError(said) from error


def build_plan(
    trt: Any,
    loggers: Loggers,
    path: Path,
    graph: Graph,
    role: str,
    profiles: Sequence[Profile],
    *,
    precision: str,
    settings: BuildSettings,
    timing: bytes = b"",
    report: Report | None = None,
    activate: Callable[[], None] = lambda: None,
) -> tuple[memoryview, memoryview | None]:
    """Build the engine of one graph; takes minutes for a large one.

    Args:
        trt: The ``tensorrt`` module, imported where a device is known to be there.
        loggers: Where TensorRT's messages go.
        path: The ONNX file, already checked against the manifest.
        graph: What the manifest says of it.
        role: Its name in the manifest.
        profiles: Sizes it must serve.
        precision: Of the bundle; fp32 keeps TensorRT from rounding products to TF32.
        settings: How long to search.
        timing: A timing cache of the same TensorRT and GPU, or nothing.
        report: Called from TensorRT's threads with where the build stands.
        activate: Makes the device that of the calling thread.

    Returns:
        The plan and the timing cache as it is now.

    Raises:
        BackendError: TensorRT does not accept the graph, naming every node that is at fault, or cannot build it.
        KeyboardInterrupt: The build was interrupted; it ends at its next step.
    """
    builder = trt.Builder(loggers.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, loggers.logger)
    if not parser.parse_from_file(str(path)):
        raise BackendError(_parser_message(trt, parser, path, loggers))
    config = builder.create_builder_config()
    config.builder_optimization_level = settings.level
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    for profile in profiles:
        if config.add_optimization_profile(_profile(builder, network, graph, profile)) < 0:
            raise BackendError(f"TensorRT {trt.__version__} refuses the sizes {profile}:\n{loggers.taken()}")
    cache = config.create_timing_cache(timing)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    monitor = _monitor(trt, role, report)
    config.progress_monitor = monitor
    plan = _interruptible(lambda: builder.build_serialized_network(network, config), monitor, activate)
    if plan is None:
        reasons = loggers.taken() or "  - no reason given"
        raise BackendError(f"TensorRT {trt.__version__} cannot build the engine of {path.name}:\n{reasons}")
    present = config.get_timing_cache()
    return memoryview(plan), memoryview(present.serialize()) if present is not None else None


def _profile(builder: Any, network: Any, graph: Graph, profile: Profile) -> Any:
    """The ranges of every input that needs them."""
    made = builder.create_optimization_profile()
    tensors = {tensor.name: tensor for tensor in graph.inputs}
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        if name in SIZE_INPUTS and network.get_input(index).is_shape_tensor:
            low, tuned, high = ([size] for size in profile[name])
            made.set_shape_input(name, low, tuned, high)
        elif any(isinstance(size, str) for size in tensors[name].shape):
            made.set_shape(name, *shape_of(tensors[name], profile))
    return made


def _parser_message(trt: Any, parser: Any, path: Path, loggers: Loggers) -> str:
    """Every node that the parser refuses."""
    lines = []
    for index in range(min(parser.num_errors, _MOST_ERRORS)):
        error = parser.get_error(index)
        name = error.node_name() or f"number {error.node()}"
        lines.append(f"  - node {name} ({error.node_operator() or 'unknown operator'}): {error.desc()}")
    loggers.errors.clear()  # the same, less well said
    text = "\n".join(lines) or "  - no reason given"
    return f"TensorRT {trt.__version__} does not accept {path}:\n{text}"


def _monitor(trt: Any, role: str, report: Report | None) -> Any:
    """An ``IProgressMonitor`` that reports the outermost phases and can end the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = threading.Event()
            self._lock = threading.Lock()
            self._outer: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                if not parent_phase:
                    self._outer[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not self.cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                steps = self._outer.pop(phase_name, None)
            if steps is not None and report is not None:
                report(BuildProgress(role, phase_name, steps, steps))

        def _tell(self, phase: str, step: int) -> None:
            with self._lock:
                steps = self._outer.get(phase)
            if steps is not None and report is not None:
                report(BuildProgress(role, phase, step, steps))

    return Monitor()


def _interruptible(build: Callable[[], Any], monitor: Any, activate: Callable[[], None]) -> Any:
    """Run ``build`` in a thread, so that Ctrl-C reaches Python and ends it at its next step."""
    result: list[Any] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            activate()
            result.append(build())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="rsedge-tensorrt-build")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
    except BaseException:
        monitor.cancelled.set()
        thread.join()
        raise
    if failures:
        raise failures[0]
    return result[0]


def line_reports(every: float = 30.0) -> Report:
    """A report that logs a line now and then, for builds that nobody asked for."""
    last, lock = [time.monotonic()], threading.Lock()

    def report(progress: BuildProgress) -> None:
        with lock:
            now = time.monotonic()
            if now - last[0] < every:
                return
            last[0] = now
        _log.info(
            "building the TensorRT engine of %s: %s, %d of %d",
            progress.role,
            progress.phase,
            progress.step,
            progress.steps,
        )

    return report
