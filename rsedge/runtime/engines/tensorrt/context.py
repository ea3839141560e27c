"""TensorRT's execution contexts: the order of calls, and one arena for the activations of all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsedge.errors import BackendError

if TYPE_CHECKING:
    from rsedge.runtime.engines.contract import Array
    from rsedge.runtime.engines.tensorrt.cuda import Cuda
    from rsedge.runtime.engines.tensorrt.profiles import Profile


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
            size = max(int(self._engine.device_memory_size_v2), 1)
            address = cuda.arena(size)
            context.set_device_memory(address, cuda.arena_size)
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
