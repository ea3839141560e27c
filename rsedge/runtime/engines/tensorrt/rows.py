"""The graph that chooses images for the next round, without an engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rsedge.errors import BackendError
from rsedge.runtime.engines.tensorrt.cuda import DeviceArray, Feeds, on_host

if TYPE_CHECKING:
    from rsedge.bundle import Graph
    from rsedge.runtime.engines.tensorrt.cuda import Array, Cuda


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
        with self._cuda.using():
            made = self._gather(feeds, (*host, *device))
            results = self._cuda.to_host([made[name] for name in host]) if host else []
        return results, [made[name] for name in device]

    def run(self, feeds: Feeds, outputs: Sequence[str]) -> list[Array]:
        """As of :class:`TrtGraph`."""
        return self.run_on_device(feeds, host=outputs)[0]

    def _gather(self, feeds: Feeds, outputs: Sequence[str]) -> dict[str, DeviceArray]:
        sources = on_host(feeds["sources"])
        pairs = {}
        for name in outputs:
            own = name.removeprefix("next_")
            pairs[name] = tuple(
                value if isinstance(value, DeviceArray) else self._cuda.to_device(value)
                for value in (feeds[own], feeds[f"fresh_{own}"])
            )
        shapes = (((len(sources), *present.shape[1:]), present.dtype) for present, _ in pairs.values())
        targets = dict(zip(pairs, self._cuda.empty(*shapes), strict=True))
        for name, (present, fresh) in pairs.items():
            self._copy_rows(sources, present, fresh, targets[name])
        return targets

    def _copy_rows(self, sources: Array, present: DeviceArray, fresh: DeviceArray, target: DeviceArray) -> None:
        count = present.shape[0]
        rows = count + fresh.shape[0]
        if len(sources) and not 0 <= int(sources.min()) <= int(sources.max()) < rows:
            raise BackendError(f"sources of the graph {self.role} name images beyond the {rows} there are")
        row = math.prod(present.shape[1:]) * present.dtype.itemsize
        # A new run begins where a row does not follow the one before it, and where the second array begins.
        breaks = np.flatnonzero((np.diff(sources) != 1) | (sources[1:] == count)) + 1
        for first, last in zip((0, *breaks.tolist()), (*breaks.tolist(), len(sources)), strict=True):
            if first < last:
                source = int(sources[first])
                origin = present.address + source * row if source < count else fresh.address + (source - count) * row
                self._cuda.copy(target.address + first * row, origin, (last - first) * row)
