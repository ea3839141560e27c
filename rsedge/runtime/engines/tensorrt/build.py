"""ONNX graph → TensorRT plan, one code path for TensorRT 10.3 to 11.4; first the shapes that an engine is made for.

TensorRT fixes at build time which sizes each dynamic dimension may have and which it is tuned for. A few optimisation
profiles per graph say so by the names that the manifest gives to dimensions: images as ``batch``, ``images``; rows
(beams of images) as ``rows``, ``previous``; ``columns`` of the self cache; ``watched`` and ``tokens``. ``top`` and
``grow`` are inputs whose value is a size.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsedge.errors import BackendError, OptionError
from rsedge.runtime.engines.contract import CACHE_BUCKET

if TYPE_CHECKING:
    from rsedge.bundle import Graph, Manifest

_log = logging.getLogger("rsedge")

OLDEST = (10, 3)
"""First TensorRT that is served: that of JetPack 6.1 and 6.2."""

_MOST_ERRORS = 10

Range = tuple[int, int, int]
"""Smallest, tuned-for and largest size."""
Profile = dict[str, Range]
"""Dimension or value name → its range."""

SIZE_INPUTS = ("top", "grow")
"""Inputs int64 [1] that shapes depend on: TensorRT wants them in this machine's memory, and a range for their value."""

_IMAGES, _BEAMS, _TOKENS = 32, 3, 40
_IMAGES_EMBEDDED = 64
_MOST_CANDIDATES = 3839  # of TensorRT's TopK


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What engines are made for."""

    images: int = _IMAGES
    """Images computed together."""
    beams: int = _BEAMS
    """Rows per image."""
    tokens: int = _TOKENS
    """Longest caption."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, expected 1 to {most}"
            for name, most in (("images", 4096), ("beams", 64), ("tokens", 4096))
            if not 1 <= getattr(self, name) <= most
        ]
        if problems:
            raise OptionError("; ".join(problems))

    @classmethod
    def of(
        cls, manifest: Manifest, *, images: int | None = None, beams: int | None = None, tokens: int | None = None
    ) -> Limits:
        """The given limits, else what the bundle's defaults need and a little more."""
        generation, decoder = manifest.generation, manifest.decoder
        longest = decoder.max_positions if decoder else 4096
        usual = generation.max_new_tokens if generation else None
        return cls(
            images=images or (_IMAGES if generation else _IMAGES_EMBEDDED),
            beams=beams or max(_BEAMS, generation.num_beams if generation else 1),
            tokens=min(tokens or max(_TOKENS, usual or 0), longest),
        )


def profiles(role: str, limits: Limits, *, context_length: int | None = None) -> list[Profile]:
    """The optimisation profiles that serve ``limits``, the narrowest first, of the graph ``vision``, ``text``, ``step``
    or ``self_cache``; ``context_length`` is the text graph's.
    """
    images, beams = limits.images, limits.beams
    few = max(1, images // 4)
    columns = -(-limits.tokens // CACHE_BUCKET) * CACHE_BUCKET + CACHE_BUCKET
    if role in ("vision", "text"):
        tokens = context_length or limits.tokens
        length: Profile = {"tokens": (1, min(16, tokens), tokens)}
        return _distinct([{"batch": (1, few, few), **length}, {"batch": (1, images, images), **length}])
    cache = (CACHE_BUCKET, min(2 * CACHE_BUCKET, columns), columns)
    rows = [(1, images, images), (1, images * min(beams, 3), images * beams)]
    if role == "step":
        shared: Profile = {
            "columns": cache,
            "images": (1, images, images),
            "watched": (0, 0, columns + CACHE_BUCKET),
            "top": (1, 2 * beams, min(_MOST_CANDIDATES, 2 * beams + columns + CACHE_BUCKET)),
        }
        return _distinct([{"rows": each, **shared} for each in rows])
    shared = {"columns": cache, "grow": (0, 0, CACHE_BUCKET)}
    return _distinct([{"rows": each, "previous": each, **shared} for each in rows])


def _distinct(candidates: list[Profile]) -> list[Profile]:
    return [profile for index, profile in enumerate(candidates) if profile not in candidates[:index]]


def fitting(candidates: list[Profile], sizes: Mapping[str, int]) -> int | None:
    """The first profile that allows ``sizes``, or None."""
    for index, profile in enumerate(candidates):
        if all(profile[name][0] <= size <= profile[name][2] for name, size in sizes.items() if name in profile):
            return index
    return None


def widened(candidates: list[Profile], sizes: Mapping[str, int]) -> list[Profile]:
    """The profiles with the last of them widened so that it allows ``sizes``: doubled, to widen seldom.

    Raises:
        OptionError: A size is below what any profile could start at.
    """
    last = dict(candidates[-1])
    for name, size in sizes.items():
        if name in last:
            low, tuned, high = last[name]
            if size > high:
                most = _MOST_CANDIDATES if name == "top" else 1 << 30
                if size > most:
                    raise OptionError(f"{name} is {size}, TensorRT allows at most {most}")
                last[name] = (low, tuned, min(most, 1 << (size - 1).bit_length()))
            elif size < low:
                last[name] = (size, tuned, high)
    return [*candidates[:-1], last]


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
    """How far the build of the graph ``role`` is: steps done, and in all, of the ``phase`` as TensorRT names it."""

    role: str
    phase: str
    step: int
    steps: int


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
        errors, kinds = self.errors, trt.ILogger.Severity

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in (kinds.ERROR, kinds.INTERNAL_ERROR):
                    errors.append(msg)
                if severity in (kinds.ERROR, kinds.INTERNAL_ERROR, kinds.WARNING):
                    _log.debug("TensorRT: %s", msg)

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
        graph, role: The manifest's description of it, and its name there.
        profiles: Sizes it must serve.
        precision: Of the bundle; fp32 keeps TensorRT from rounding products to TF32.
        settings: How long to search.
        timing: A timing cache of the same TensorRT and GPU, or nothing.
        report: Called from TensorRT's threads with the progress of the build.
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
        lines = []
        for index in range(min(parser.num_errors, _MOST_ERRORS)):
            error = parser.get_error(index)
            name = error.node_name() or f"number {error.node()}"
            lines.append(f"  - node {name} ({error.node_operator() or 'unknown operator'}): {error.desc()}")
        loggers.errors.clear()  # the same, less well said
        text = "\n".join(lines) or "  - no reason given"
        raise BackendError(f"TensorRT {trt.__version__} does not accept {path}:\n{text}")
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
            made.set_shape_input(name, *([size] for size in profile[name]))
            continue
        shape = tensors[name].shape
        if any(isinstance(size, str) for size in shape):
            ranges = (
                tuple(size if isinstance(size, int) else profile[size][end] for size in shape) for end in range(3)
            )
            made.set_shape(name, *ranges)
    return made


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
            self._tell(phase_name, None)
            with self._lock:
                self._outer.pop(phase_name, None)

        def _tell(self, phase: str, step: int | None) -> None:
            with self._lock:
                steps = self._outer.get(phase)
            if steps is not None and report is not None:
                report(BuildProgress(role, phase, steps if step is None else step, steps))

    return Monitor()


def _interruptible(build: Callable[[], Any], monitor: Any, activate: Callable[[], None]) -> Any:
    """Run ``build`` in a thread, so that Ctrl-C reaches Python and ends it at its next step."""

    def work() -> Any:
        activate()
        return build()

    with ThreadPoolExecutor(1, thread_name_prefix="rsedge-tensorrt-build") as pool:
        future = pool.submit(work)
        try:
            while not wait([future], timeout=0.2).done:
                pass
        except BaseException:
            monitor.cancelled.set()
            raise
        return future.result()


def line_reports(every: float = 30.0) -> Report:
    """A report that logs a line now and then, for builds that nobody asked for."""
    last, lock = [time.monotonic()], threading.Lock()

    def report(progress: BuildProgress) -> None:
        with lock:
            now = time.monotonic()
            if now - last[0] < every:
                return
            last[0] = now
        values = (progress.role, progress.phase, progress.step, progress.steps)
        _log.info("building the TensorRT engine of %s: %s, %d of %d", *values)

    return report
