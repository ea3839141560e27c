"""The graphs of a bundle with values left on the device: as TensorRT engines, whose execution contexts share one arena
for their activations, and one graph that needs no engine.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge.errors import BackendError
from rsedge.runtime.engines.tensorrt.build import SIZE_INPUTS, Profile, fitting, widened
from rsedge.runtime.engines.tensorrt.cuda import CapturedGraph, DeviceArray, Feeds, on_host

if TYPE_CHECKING:
    from rsedge.bundle import Graph
    from rsedge.runtime.engines.contract import Array
    from rsedge.runtime.engines.tensorrt.cuda import Cuda

_log = logging.getLogger("rsedge")

_MOST_CAPTURED = 48
"""Captured graphs kept per engine; each holds an execution context, so this bounds memory."""
_MOST_SHAPES = 4096
_SEEN_BEFORE_CAPTURE = 2
"""Runs with the same shapes and addresses before one is captured: what comes once is not worth it."""
_SEEN_AT_MOST = 64
"""To this that number grows where captured graphs make room for others before they have paid for themselves."""
_WORTH = 16
"""Replays that pay for a capture: it makes an execution context and computes twice more."""


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine in memory, and what it was built for."""

    engine: Any
    """TensorRT's ``ICudaEngine``."""
    profiles: list[Profile]
    """Its optimisation profiles."""
    errors: Callable[[], str]
    """Gives what TensorRT said went wrong since it was last asked, or an empty string."""


class Context:
    """An execution context whose activations lie in the shared arena.

    Calls come in TensorRT's order: profile, input shapes, addresses of sizes in host memory, then output shapes, then
    all other addresses, then execution.
    """

    def __init__(self, trt: Any, cuda: Cuda, loaded: LoadedEngine) -> None:
        self._cuda, self._engine, self._errors = cuda, loaded.engine, loaded.errors
        self._sizes: dict[str, Array] = {}  # TensorRT holds their addresses
        # The activations of all contexts share the arena; without this each would keep its own.
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context = loaded.engine.create_execution_context(strategy)
        if self._context is None:
            raise self._refused("to make an execution context")
        self._generation = -1
        self._profile: int | None = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the driver may be gone
            self._cuda.wait()  # what still runs uses what goes with the context

    def _refused(self, what: str) -> BackendError:
        """TensorRT's own words are part of it: by them is known whether memory ran out."""
        return BackendError("\n".join(filter(None, (f"TensorRT refuses {what}", self._errors()))))

    def shape(
        self,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        sizes: Mapping[str, Array],
        outputs: Sequence[str],
    ) -> dict[str, tuple[int, ...]]:
        """Choose a profile and input shapes; returns the shapes of the outputs.

        Args:
            profile: Index of the optimisation profile.
            shapes: Of every input.
            sizes: Inputs in this machine's memory; they must not be changed before the next call.
            outputs: Names.

        Raises:
            BackendError: TensorRT refuses one of them, or lacks memory.
        """
        context, cuda = self._context, self._cuda
        if self._generation != cuda.arena_generation:
            context.set_device_memory(*cuda.arena(max(int(self._engine.device_memory_size_v2), 1)))
            self._generation = cuda.arena_generation
        if self._profile != profile:
            if not context.set_optimization_profile_async(profile, cuda.stream):
                raise self._refused(f"optimization profile {profile}")
            self._profile = profile
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._refused(f"the shape {list(shape)} of {name}")
        for name, value in sizes.items():
            if not context.set_tensor_address(name, value.ctypes.data):
                raise self._refused(f"an address for {name}")
        self._sizes = dict(sizes)
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:  # which is how it says that the shapes do not fit together
            raise self._refused(f"these shapes ({error})") from error
        if missing:
            raise self._refused(f"to tell the output shapes without {', '.join(missing)}")
        return {name: tuple(int(size) for size in context.get_tensor_shape(name)) for name in outputs}

    def run(self, addresses: Mapping[str, int]) -> None:
        """Enqueue execution on the device's stream."""
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._refused(f"an address for {name}")
        if not self._context.execute_async_v3(self._cuda.stream):
            raise self._refused("the execution")


@dataclass(slots=True)
class _Captured:
    """A captured graph, and the context it depends on, which nobody else may change."""

    graph: CapturedGraph
    context: Context
    generation: int
    replays: int = 0


class TrtGraph:
    """One graph as an engine.

    Args:
        role: In the manifest.
        graph: What the manifest says of it.
        trt: The ``tensorrt`` module.
        cuda: The device.
        obtain: Gives the engine for profiles: from the cache, or built.
        profiles: To begin with; a run that needs larger sizes gets a larger engine.
        capture: Whether to replay runs as CUDA graphs where their shapes and addresses recur.
    """

    def __init__(
        self,
        role: str,
        graph: Graph,
        *,
        trt: Any,
        cuda: Cuda,
        obtain: Callable[[list[Profile]], LoadedEngine],
        profiles: list[Profile],
        capture: bool = True,
    ) -> None:
        self.role, self._graph, self._trt, self._cuda, self._obtain = role, graph, trt, cuda, obtain
        self._inputs = {tensor.name: tensor for tensor in graph.inputs}
        self._outputs = {tensor.name: tensor for tensor in graph.outputs}
        self._capture = capture
        self._fixed: dict[str, DeviceArray] = {}
        self._shapes: dict[Any, dict[str, tuple[int, ...]]] = {}
        self._seen: OrderedDict[Any, int] = OrderedDict()
        self._captured: OrderedDict[Any, _Captured] = OrderedDict()
        self._wanted = _SEEN_BEFORE_CAPTURE
        self._open(profiles)

    def _open(self, profiles: list[Profile]) -> None:
        loaded = self._obtain(profiles)
        sizes = self._check(loaded.engine)
        # The arena grows now rather than in the first run: captured graphs hold its address.
        self._cuda.arena(max(int(loaded.engine.device_memory_size_v2), 1))
        context = Context(self._trt, self._cuda, loaded)
        # Only now, together: where memory ran out above, the engine there was goes on with a smaller batch.
        self._captured.clear()
        self._seen.clear()
        self._loaded, self._sizes, self._context = loaded, sizes, context

    def _check(self, engine: Any) -> list[str]:
        """Compare the engine's inputs and outputs with the manifest; returns the inputs it wants in host memory."""
        trt = self._trt
        there = {engine.get_tensor_name(index): index for index in range(engine.num_io_tensors)}
        problems = [f"{name} is missing" for name in (*self._inputs, *self._outputs) if name not in there]
        problems += [f"{name} is not in the manifest" for name in there if name not in {*self._inputs, *self._outputs}]
        host = []
        for name in there:
            tensor = self._inputs.get(name) or self._outputs.get(name)
            if tensor is None:
                continue
            if np.dtype(trt.nptype(engine.get_tensor_dtype(name))) != np.dtype(tensor.dtype):
                problems.append(f"{name} is {engine.get_tensor_dtype(name)}, the manifest says {tensor.dtype}")
            if (engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT) != (name in self._inputs):
                problems.append(f"{name} is on the wrong side")
            if engine.get_tensor_location(name) == trt.TensorLocation.HOST:
                host.append(name)
        problems += [f"{name} is wanted in host memory" for name in host if name not in SIZE_INPUTS]
        if problems:
            raise BackendError(f"the TensorRT engine of {self.role} does not fit its graph: {'; '.join(problems)}")
        return host

    def run(self, feeds: Feeds, outputs: Sequence[str]) -> list[Array]:
        """As :class:`~rsedge.runtime.engines.contract.Graph` has it."""
        return self.run_on_device(feeds, host=outputs)[0]

    def run_on_device(
        self, feeds: Feeds, *, host: Sequence[str] = (), device: Sequence[str] = ()
    ) -> tuple[list[Array], list[DeviceArray]]:
        """As :class:`~rsedge.runtime.engines.contract.Graph` has it.

        Raises:
            BackendError: TensorRT or CUDA refuses, or ``feeds`` are not the graph's inputs.
            OptionError: A size that no engine can serve.
        """
        with self._cuda.using():
            # 1. The profile for these sizes, and the inputs: sizes on this machine, all else on the device.
            profile = self._profile_for(self._dimensions(feeds))
            sizes = {name: on_host(feeds[name]).astype(np.int64) for name in self._sizes}
            inputs = {name: self._place(name, feeds[name]) for name in self._inputs if name not in sizes}
            shapes = {name: tuple(feeds[name].shape) for name in self._inputs}

            # 2. The shapes of the outputs, asked of TensorRT once.
            key = (tuple(shapes.values()), tuple(value.item() for value in sizes.values()))
            if key not in self._shapes:
                given = self._context.shape(profile, shapes, sizes, list(self._outputs))
                if unknown := [name for name, shape in given.items() if min(shape, default=0) < 0]:
                    raise BackendError(
                        f"TensorRT cannot tell the shape of {', '.join(unknown)} of the graph {self.role}"
                    )
                if len(self._shapes) >= _MOST_SHAPES:
                    self._shapes.clear()
                self._shapes[key] = given
            given = self._shapes[key]

            # 3. Memory for them: new for what stays on the device, else memory kept for this output.
            left = self._cuda.empty(*((given[name], self._outputs[name].dtype) for name in device)) if device else []
            fresh = dict(zip(device, left, strict=True))
            outputs = {  # in one order: addresses are compared as a tuple
                name: fresh[name] if name in fresh else self._room(f"output {name}", shape, self._outputs[name].dtype)
                for name, shape in given.items()
            }
            addresses = {name: value.address for name, value in (inputs | outputs).items()}

            # 4. Replay, or run.
            self._execute((*key, tuple(addresses.values())), profile, shapes, sizes, addresses)
            results = self._cuda.to_host([outputs[name] for name in host]) if host else []
            return results, [outputs[name] for name in device]

    def _dimensions(self, feeds: Feeds) -> dict[str, int]:
        """The size of every named dimension and value, checked against the contract."""
        if set(feeds) != set(self._inputs):
            expected, got = ", ".join(self._inputs), ", ".join(feeds)
            raise BackendError(f"the graph {self.role} takes {expected}; given were {got}")
        sizes: dict[str, int] = {}
        for name, value in feeds.items():
            tensor = self._inputs[name]
            agreeing = len(value.shape) == len(tensor.shape) and all(
                (sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted) == size
                for wanted, size in zip(tensor.shape, value.shape, strict=True)
            )
            if not agreeing or value.dtype != np.dtype(tensor.dtype):
                raise BackendError(
                    f"{name} of the graph {self.role} is {value.dtype} {list(value.shape)}, expected {tensor.dtype} "
                    f"{list(tensor.shape)} with equal names for equal sizes"
                )
            if name in SIZE_INPUTS:
                sizes[name] = int(on_host(value).item())
        return sizes

    def _profile_for(self, sizes: Mapping[str, int]) -> int:
        found = fitting(self._loaded.profiles, sizes)
        if found is None:
            wider = widened(self._loaded.profiles, sizes)
            _log.info(
                "%s: %s is beyond what its TensorRT engine is for; a larger engine takes its place",
                self.role,
                ", ".join(f"{name} {size}" for name, size in sizes.items() if name in wider[-1]),
            )
            self._open(wider)
            found = fitting(self._loaded.profiles, sizes)
            assert found is not None
        return found

    def _place(self, name: str, value: Array | DeviceArray) -> DeviceArray:
        """The input on the device; arrays go to memory of their own, whose address stays while they fit."""
        if isinstance(value, DeviceArray):
            return value
        place = self._room(f"input {name}", value.shape, value.dtype)
        self._cuda.write(place.address, value)
        return place

    def _room(self, name: str, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Memory that belongs to this input or output for good."""
        kind = np.dtype(dtype)
        present = self._fixed.get(name)
        if present is None or present.block.size < math.prod(shape) * kind.itemsize:
            self._fixed[name] = present = self._cuda.empty((tuple(shape), kind))[0]
        return DeviceArray(self._cuda, present.block, 0, tuple(shape), kind)

    def _execute(
        self,
        key: Any,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        sizes: Mapping[str, Array],
        addresses: Mapping[str, int],
    ) -> None:
        """Replay the run ``key`` if it is captured, else run it, and capture it for the next time if it recurs."""
        captured = self._captured.pop(key, None)
        if captured is not None and captured.generation == self._cuda.arena_generation:
            self._captured[key] = captured  # the last to be given up
            captured.replays += 1
            self._cuda.launch(captured.graph)
            return
        del captured  # its activations are where the arena was
        self._context.shape(profile, shapes, sizes, [])
        self._context.run(addresses)
        if not self._capture:
            return
        count = self._seen.pop(key, 0) + 1
        self._seen[key] = count
        while len(self._seen) > 16 * _MOST_CAPTURED:
            self._seen.popitem(last=False)
        if count < self._wanted:
            return
        # Capture what has just been computed; the outputs are computed again, to the same values.
        while len(self._captured) >= _MOST_CAPTURED:
            if self._captured.popitem(last=False)[1].replays < _WORTH:
                self._wanted = min(2 * self._wanted, _SEEN_AT_MOST)
        try:
            context = Context(self._trt, self._cuda, self._loaded)
            context.shape(profile, shapes, sizes, [])
            context.run(addresses)  # settles what depends on the shapes, which must not be captured
            with self._cuda.capturing() as made:
                context.run(addresses)
        except BackendError as error:
            self._capture = False
            _log.info("%s runs without CUDA graphs: %s", self.role, str(error).splitlines()[0])
            return
        self._captured[key] = _Captured(made[0], context, self._cuda.arena_generation)
        del self._seen[key]


class RowsGraph:
    """The ``cross_cache`` graph as copies: its outputs are rows of its inputs, which needs no kernel.

    Runs of neighbouring rows go in one copy each. Unlike an engine it has nothing to build, and no images at all are
    no special case.
    """

    role = "cross_cache"

    def __init__(self, graph: Graph, cuda: Cuda) -> None:
        self._cuda = cuda
        self._outputs = {tensor.name for tensor in graph.outputs}

    def run_on_device(
        self, feeds: Feeds, *, host: Sequence[str] = (), device: Sequence[str] = ()
    ) -> tuple[list[Array], list[DeviceArray]]:
        """As of :class:`TrtGraph`: ``next_X`` holds the rows ``sources`` of ``X`` with ``fresh_X`` behind it."""
        if unknown := sorted({*host, *device} - self._outputs):
            raise BackendError(f"the graph {self.role} has no output {', '.join(unknown)}")
        cuda = self._cuda
        with cuda.using():
            sources, pairs = on_host(feeds["sources"]), {}
            for name in (*host, *device):
                own = name.removeprefix("next_")
                pairs[name] = tuple(
                    value if isinstance(value, DeviceArray) else cuda.to_device(value)
                    for value in (feeds[own], feeds[f"fresh_{own}"])
                )
            shapes = (((len(sources), *present.shape[1:]), present.dtype) for present, _ in pairs.values())
            made = dict(zip(pairs, cuda.empty(*shapes), strict=True))
            for name, (present, fresh) in pairs.items():
                count = present.shape[0]
                rows = count + fresh.shape[0]
                if len(sources) and not 0 <= int(sources.min()) <= int(sources.max()) < rows:
                    raise BackendError(f"sources of the graph {self.role} name images beyond the {rows} there are")
                row = math.prod(present.shape[1:]) * present.dtype.itemsize
                # A new run begins where a row does not follow the one before it, and where the second array begins.
                breaks = np.flatnonzero((np.diff(sources) != 1) | (sources[1:] == count)) + 1
                for first, last in zip((0, *breaks.tolist()), (*breaks.tolist(), len(sources)), strict=True):
                    if first < last:
                        begin = int(sources[first])
                        origin = (
                            present.address + begin * row if begin < count else fresh.address + (begin - count) * row
                        )
                        cuda.copy(made[name].address + first * row, origin, (last - first) * row)
            results = cuda.to_host([made[name] for name in host]) if host else []
        return results, [made[name] for name in device]

    def run(self, feeds: Feeds, outputs: Sequence[str]) -> list[Array]:
        """As of :class:`TrtGraph`."""
        return self.run_on_device(feeds, host=outputs)[0]
