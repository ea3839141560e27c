"""TensorRT, native: the graphs of a bundle as engines on one CUDA device, with the ONNX Runtime backend's interface.

Engines are taken from the cache or built at first use. This backend is tested against a stand-in for TensorRT that
enforces its call protocol, and against its bindings' signatures; ``rsedge doctor --selftest`` confirms it on hardware.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rsedge.errors import BackendError, BundleError
from rsedge.host import is_out_of_memory
from rsedge.runtime.engines.contract import parse_device
from rsedge.runtime.engines.tensorrt.build import (
    BuildSettings,
    Limits,
    Loggers,
    Profile,
    build_plan,
    import_tensorrt,
    line_reports,
    profiles,
    refusals,
)
from rsedge.runtime.engines.tensorrt.cache import EngineKey, EngineStore
from rsedge.runtime.engines.tensorrt.cuda import Cuda, DeviceArray, find_device
from rsedge.runtime.engines.tensorrt.graph import LoadedEngine, RowsGraph, TrtGraph

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rsedge.bundle import Bundle
    from rsedge.runtime.engines.contract import Array
    from rsedge.runtime.engines.tensorrt.build import Report

_log = logging.getLogger("rsedge")

ENGINES = ("vision", "text", "step", "self_cache")
"""Roles that run as engines; ``cross_cache`` is done by copies, and no other is needed."""


def tensorrt_problem(number: int, precision: str) -> str:
    """Why TensorRT cannot run a bundle of this precision on CUDA device ``number``, or an empty string."""
    if precision == "int8":
        return "an int8 bundle is made for CPUs, with operators TensorRT does not have: export with --fp16"
    if sys.platform == "win32":
        return "engines are code and are kept closed to other users, which rsedge cannot do on Windows"
    try:
        find_device(number)  # first: without a device, TensorRT's runtime takes the process down
        import_tensorrt()
    except BackendError as error:
        return str(error)
    return ""


class TrtBackend:
    """The graphs of one bundle as TensorRT engines.

    Args:
        bundle: A bundle of precision fp16 or fp32.
        device: ``cuda`` or ``cuda:N``.
        limits: Sizes that engines are built for; None takes those of the bundle's defaults.
        least: Sizes that will do where engines for them are there already; None wants ``limits``.
        settings: How builds go.
        store: Where engines are kept; None takes the user's.
        report: Called with the progress of builds; None logs a line now and then.
        capture: Whether recurring runs are replayed as CUDA graphs.

    Raises:
        BackendError: There is no such device, TensorRT is missing, or the bundle is not for it.
    """

    name = "tensorrt"
    on_cuda = True

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cuda:0",
        *,
        limits: Limits | None = None,
        least: Limits | None = None,
        settings: BuildSettings | None = None,
        store: EngineStore | None = None,
        report: Report | None = None,
        capture: bool = True,
    ) -> None:
        number = parse_device(device)[1]
        if problem := tensorrt_problem(number, bundle.manifest.precision):
            raise BackendError(f"TensorRT cannot run {bundle.path.name}: {problem}")
        self.device = f"cuda:{number}"
        self.bundle, self.limits = bundle, limits or Limits.of(bundle.manifest)
        self._least = least or self.limits
        self.settings, self.store = settings or BuildSettings(), store or EngineStore()
        self._report, self._capture = report, capture
        self.cuda = Cuda(number)
        self._trt = import_tensorrt()
        self.version = str(self._trt.__version__)
        self._loggers = Loggers(self._trt)
        with refusals(self._trt, self._loggers, "starting its runtime"):
            self._runtime = self._trt.Runtime(self._loggers.logger)
        self._roles = {bundle.path / graph.file: role for role, graph in bundle.manifest.graphs.items()}
        self._ready: dict[str, TrtGraph] = {}

    def to_device(self, array: Array) -> DeviceArray:
        """A copy of ``array`` in the device's memory."""
        with self.cuda.using():
            return self.cuda.to_device(array)

    def open(self, path: Path) -> TrtGraph | RowsGraph:
        """A graph of this backend's bundle, ready to run; its engine is built if the cache has none.

        Raises:
            BundleError: The bundle has no such graph.
            BackendError: Its engine cannot be built or loaded.
        """
        role = self._roles.get(Path(path))
        if role is None:
            raise BundleError(f"{path} is no graph of {self.bundle.path}")
        graph = self.bundle.manifest.graphs[role]
        if role == RowsGraph.role:
            return RowsGraph(graph, self.cuda)
        if role not in ENGINES:
            raise BackendError(f"the graph {role} is not for TensorRT, which runs {', '.join(ENGINES)}")
        return self._ready.pop(role, None) or self._open(role)

    def open_ahead(self, roles: Iterable[str]) -> None:
        """Load the engines of those ``roles`` that the bundle has, for :meth:`open` to hand out: so it is known whether
        that works before it is relied on.

        Raises:
            BackendError: An engine cannot be built or loaded.
        """
        try:
            for role in roles:
                if role in self.bundle.manifest.graphs:
                    self._ready[role] = self._open(role)
        except BaseException:
            self._ready.clear()  # their memory is for what takes the place of this backend
            raise

    def _open(self, role: str) -> TrtGraph:
        with self.cuda.using(), refusals(self._trt, self._loggers, f"opening the engine of {role}"):
            return TrtGraph(
                role,
                self.bundle.manifest.graphs[role],
                trt=self._trt,
                cuda=self.cuda,
                obtain=lambda wanted: self._load(role, wanted),
                profiles=self._profiles(role),
                capture=self._capture,
            )

    def prepare(self, *, exact: bool = False, force: bool = False) -> dict[str, float]:
        """Build the engines that the cache does not have.

        Args:
            exact: Build for the very limits of this backend even where an engine for larger ones is there, and again
                where the one there was searched for less than the settings say.
            force: Build even what is there.

        Returns:
            Role → seconds its engine took to build; 0 where it was there.

        Raises:
            BackendError: An engine cannot be built.
        """
        taken = {}
        for role in self.bundle.manifest.graphs:
            if role in ENGINES:
                profiles = self._profiles(role)
                key, started = self._key(role, profiles), time.monotonic()
                again = force or (exact and 0 <= self.store.level(key) < self.settings.level)
                with self.cuda.using():
                    _, built = self._plan(key if exact or again else self._found(role, profiles), force=again)
                taken[role] = time.monotonic() - started if built else 0.0
        return taken

    def engine_path(self, role: str) -> Path:
        """Where the engine of a graph for the limits of this backend is, or would be."""
        return self.store.path(self._key(role, self._profiles(role)))

    def _profiles(self, role: str, limits: Limits | None = None) -> list[Profile]:
        embedding = self.bundle.manifest.embedding
        return profiles(role, limits or self.limits, context_length=embedding.context_length if embedding else None)

    def _found(self, role: str, wanted: list[Profile]) -> EngineKey:
        """The engine that is there for these profiles, or for the least that will do; else the one to build."""
        key, store = self.store.covering(self._key(role, wanted)), self.store
        if wanted == self._profiles(role) and not store.path(key).exists():
            least = store.covering(self._key(role, self._profiles(role, self._least)))
            return least if store.path(least).exists() else key
        return key

    def _key(self, role: str, wanted: list[Profile]) -> EngineKey:
        graph, info = self.bundle.manifest.graphs[role], self.cuda.info
        return EngineKey(
            role=role,
            graph_sha256=graph.sha256,
            external_sha256=tuple(ref.sha256 for ref in graph.external_data),
            tensorrt=self.version,
            gpu=info.name,
            sm=info.sm,
            multiprocessors=info.multiprocessors,
            precision=self.bundle.manifest.precision,
            profiles=tuple(tuple(profile.items()) for profile in wanted),
        )

    def _load(self, role: str, wanted: list[Profile]) -> LoadedEngine:
        key, again = self._found(role, wanted), False
        while True:
            plan, built = self._plan(key, force=again)
            self._loggers.taken()  # of something else
            engine, said = self._runtime.deserialize_cuda_engine(plan), self._loggers.taken()
            if engine is not None:
                return LoadedEngine(engine, [dict(profile) for profile in key.profiles], self._loggers.taken)
            if built or is_out_of_memory(BackendError(said)):
                made = "it has just built" if built else "that is kept"
                raise BackendError(f"TensorRT {self.version} refuses the engine of {role} {made}:\n{said}")
            _log.warning("TensorRT %s refuses the kept engine of %s: building it again\n%s", self.version, role, said)
            again = True

    def _plan(self, key: EngineKey, *, force: bool = False) -> tuple[bytes | memoryview, bool]:
        """The plan of a key, from the cache or else built just now, and whether it was built."""
        if not force and (kept := self.store.load(key)) is not None:
            return kept, False
        with self.store.building(key):
            if not force and (kept := self.store.load(key)) is not None:
                return kept, False  # another process built it meanwhile
            role, manifest, gpu = key.role, self.bundle.manifest, self.cuda.info.name
            _log.info(
                "building the TensorRT engine of %s for %s (TensorRT %s): once, which can take minutes; kept in %s",
                *(role, gpu, self.version, self.store.root),
            )
            started = time.monotonic()
            with refusals(self._trt, self._loggers, f"building the engine of {role}"):
                plan, timing = build_plan(
                    self._trt,
                    self._loggers,
                    self.bundle.graph_path(role),
                    manifest.graphs[role],
                    role,
                    [dict(profile) for profile in key.profiles],
                    precision=manifest.precision,
                    settings=self.settings,
                    timing=self.store.load_timing(key),
                    report=self._report or line_reports(),
                    activate=self.cuda.activate,
                )
            self.store.save(key, plan, seconds=time.monotonic() - started, level=self.settings.level)
            if timing is not None:
                self.store.save_timing(key, timing)
            return plan, True


def device_summary(cuda: Cuda) -> str:
    """One line about a device, for people."""
    info = cuda.info
    kind = "memory shared with the CPU" if info.integrated else "own memory"
    return f"{info.name}, compute capability {info.sm}, {info.memory / 2**30:.1f} GiB {kind}"
