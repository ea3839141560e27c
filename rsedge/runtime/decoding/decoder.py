"""The decoder of a captioner: it owns the caches, and a search drives it without seeing them.

Images sit in slots 0 to n − 1; each has ``rows`` adjacent rows (beams). The cross cache, and whatever else the step
graph takes per image, has one entry per slot, the self cache one per row. On the CPU the caches are arrays written in
place; on a GPU small graphs of the bundle rearrange them, so that only tokens and candidates cross to the host: in
place at fixed addresses (:mod:`rsedge.runtime.decoding.fixed_batch`) where the backend can, else from values to new
values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import BundleError
from rsedge.runtime.decoding.fixed_batch import CacheLayout, FixedBatch, FixedGraphs, FixedMemory
from rsedge.runtime.decoding.search import Ints, Request, StepOutput
from rsedge.runtime.engines.contract import CACHE_BUCKET

if TYPE_CHECKING:
    from rsedge.bundle import Bundle, DecoderSpec
    from rsedge.runtime.engines.contract import Backend, Graph
    from rsedge.runtime.engines.ort import OrtBackend, OrtGraph

Array = NDArray[Any]
UInt8 = NDArray[np.uint8]

# Images encoded together on the CPU: few enough that activations stay in its last-level cache (bench/LOG.md).
_ENCODE_TOGETHER = 4

REFILL = 4
"""A batch is refilled when one in so many of its slots is free: encoding one image at a time leaves a GPU idle."""


class Decoder:
    """The vision and step graphs of a captioner, with the caches between them.

    Args:
        bundle: A captioner's bundle.
        backend: Where to run it.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        spec = bundle.manifest.decoder
        if spec is None or not {"vision", "step"} <= set(bundle.manifest.graphs):
            raise BundleError(f"{bundle.path} cannot caption: a {bundle.manifest.family} bundle without a decoder")
        self.spec: DecoderSpec = spec
        self._bundle, self._backend = bundle, backend
        self._vision = backend.open(bundle.graph_path("vision"))
        self._layout = CacheLayout(spec, bundle.manifest.graphs["step"].inputs)
        self._rearrange: tuple[Graph, Graph] | None = None
        self._fixed: FixedGraphs | None = None
        self._idle: list[FixedMemory] = []
        # Another backend may keep values on the device and have no fixed addresses.
        if getattr(backend, "fixed_addresses", False) and {"self_write", "cross_write"} <= set(bundle.manifest.graphs):
            ort = cast("OrtBackend", backend)
            graphs = {
                # The step graph and self_write run at every step, at few shapes.
                role: ort.open(bundle.graph_path(role), capture=role in ("step", "self_write"))
                for role in ("self_cache", "cross_cache", "cross_write", "step", "self_write")
            }
            self._step: Graph = graphs["step"]
            self._fixed = FixedGraphs(ort, cast("OrtGraph", self._vision), graphs)
            return
        self._step = backend.open(bundle.graph_path("step"))
        if backend.on_cuda:
            self.keep_on_device(bundle)

    def keep_on_device(self, bundle: Bundle) -> None:
        """Hold the caches in values of the device, rearranged by the bundle's cache graphs."""
        paths = (bundle.graph_path("self_cache"), bundle.graph_path("cross_cache"))
        self._rearrange = (self._backend.open(paths[0]), self._backend.open(paths[1]))

    def release(self) -> None:
        """Let go of memory that is kept for the next batch."""
        while self._idle:
            self._idle.pop().release()

    def encode(self, pixels: UInt8) -> Array:
        """The image encoder's output for uint8 [B, H, W, 3]: float32 [B, S, D], or [B, D] where it is one embedding."""
        return self._vision.run({"pixels": pixels}, ["image_embeds"])[0]

    def batch(self, *, slots: int, rows: int, columns: int) -> Batch | FixedBatch:
        """An empty batch of up to ``slots`` images with ``rows`` rows each and at most ``columns`` cached tokens.

        Close it when done: its memory is then there for the next one.
        """
        if self._fixed is None:
            if self._rearrange is None:
                return _HostBatch(self._layout, self._vision, self._step, rows=rows, slots=slots, limit=columns)
            return _DeviceBatch(self._layout, self._vision, self._step, self._backend, self._rearrange, rows=rows)
        together, memory = max(1, slots // REFILL), None
        with suppress(IndexError):
            memory = self._idle.pop()  # one act, whatever other threads do
        # Memory of the last batch that fits is used again, and with it the graphs captured at its addresses.
        if memory is not None and not (memory.rows == rows and memory.slots >= slots):
            memory.release()
            slots, memory = max(slots, memory.slots), None
        if memory is None:
            tokens = self._bundle.manifest.tokens
            assert tokens is not None
            memory = FixedMemory(self._fixed, self._layout, tokens.vocab_size, slots=slots, rows=rows)
        return FixedBatch(self._fixed, memory, columns=columns, together=together, done=self._idle.append)


class Batch:
    """Images in work: a search's requests go in, its candidates come out."""

    together: int | None = None
    """Images that may enter together at most, or None for any number."""

    def __init__(self, layout: CacheLayout, vision: Graph, step: Graph, *, rows: int) -> None:
        self._layout, self._vision, self._graph, self._rows = layout, vision, step, rows
        self._images = 0
        self._lengths = np.zeros(0, np.int64)
        self._cross: dict[str, Any] = {}
        self._self: dict[str, Any] = {}

    def expect(self, pixels: UInt8) -> None:
        """Hear of the images that :meth:`arrange` brings next; they are encoded when they enter."""

    def close(self) -> None:
        """Let go of the caches."""

    def arrange(self, sources: Ints, pixels: UInt8) -> None:
        """Let slot i hold what slot ``sources[i]`` held, then encode ``pixels`` into the slots after them.

        Args:
            sources: int64 [k], distinct.
            pixels: uint8 [m, H, W, 3]; m may be 0.
        """
        raise NotImplementedError

    def step(self, request: Request) -> StepOutput:
        """One decoder run for all rows."""
        names = ["top_logits", "top_ids", "logsumexp", "watched"] + ["logits"] * request.full
        self._lengths = request.lengths
        feeds = {
            "tokens": request.tokens,
            "lengths": request.lengths,
            "top": np.array([request.top], np.int64),
            "watch": np.ascontiguousarray(request.watch),
        }
        top_logits, top_ids, logsumexp, watched, *logits = self._run(feeds, names)
        return StepOutput(top_logits, top_ids, logsumexp, watched, logits[0] if logits else None)

    def _run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
        """Run the step graph on the caches besides, keep its new column, and return the outputs ``names``."""
        raise NotImplementedError

    def advance(self, parents: Ints) -> None:
        """Keep the last step's tokens, then let row i continue row ``parents[i]``."""
        raise NotImplementedError


class _HostBatch(Batch):
    """Caches in arrays with a place for every slot, written in place; the graph gets views of the slots in use."""

    def __init__(self, layout: CacheLayout, vision: Graph, step: Graph, *, rows: int, slots: int, limit: int) -> None:
        super().__init__(layout, vision, step, rows=rows)
        self._slots, self._limit = slots, limit
        self._cross = layout.image_zeros(slots)
        self._self = self._columns(CACHE_BUCKET)

    def _columns(self, count: int) -> dict[str, Array]:
        # Zeros, not garbage: columns without a token are multiplied by a weight of zero, which NaN would survive.
        shape = self._layout.self_shape(self._slots * self._rows, count)
        return {name: np.zeros(shape, self._layout.dtype) for name in self._layout.self_names}

    def _run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
        rows = self._images * self._rows
        cross = {name: array[: self._images] for name, array in self._cross.items()}
        caches = cross | {name: array[:rows] for name, array in self._self.items()}
        *outputs, self._new = self._graph.run({**feeds, **caches}, [*names, "new_kv"])
        return outputs

    def advance(self, parents: Ints) -> None:
        lengths, used = self._lengths, int(self._lengths.max()) + 1
        width = self._self["self_k.0"].shape[2]
        if used >= width and used < self._limit:
            old, self._self = self._self, self._columns(width + CACHE_BUCKET)
            for name, array in old.items():
                self._self[name][:, :, : array.shape[2]] = array
        rows = np.arange(len(lengths))
        moved = np.flatnonzero(parents != rows)
        for array, new in zip(self._self.values(), self._new, strict=True):
            array[rows, :, lengths] = new
            if len(moved):
                array[moved, :, :used] = array[parents[moved], :, :used]

    def arrange(self, sources: Ints, pixels: UInt8) -> None:
        for slot, source in enumerate(sources.tolist()):
            # Sources lie at or behind the slot they move to, so going forward overwrites nothing still needed.
            if slot != source:
                here, there = slice(slot * self._rows, (slot + 1) * self._rows), source * self._rows
                for array in self._cross.values():
                    array[slot] = array[source]
                for array in self._self.values():
                    array[here] = array[there : there + self._rows]
        self._images = len(sources)
        for first in range(0, len(pixels), _ENCODE_TOGETHER):
            chunk = pixels[first : first + _ENCODE_TOGETHER]
            places = slice(self._images, self._images + len(chunk))
            encoded = self._vision.run({"pixels": chunk}, list(self._cross))
            for array, fresh in zip(self._cross.values(), encoded, strict=True):
                array[places] = fresh
            self._images = places.stop


class _DeviceBatch(Batch):
    """Caches in values in the device's memory, replaced by what the bundle's cache graphs make of them."""

    def __init__(
        self,
        layout: CacheLayout,
        vision: Graph,
        step: Graph,
        backend: Backend,
        graphs: tuple[Graph, Graph],
        *,
        rows: int,
    ) -> None:
        super().__init__(layout, vision, step, rows=rows)
        self._backend, self._width = backend, 0
        self._self_graph, self._cross_graph = graphs
        self._cross = {name: backend.to_device(array) for name, array in layout.image_zeros(0).items()}
        self._none = dict(self._cross)

    def _run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
        every = {**feeds, **self._cross, **self._self}
        outputs, [self._new] = self._graph.run_on_device(every, host=names, device=["new_kv"])
        return outputs

    def advance(self, parents: Ints) -> None:
        grow = CACHE_BUCKET if int(self._lengths.max()) + 1 >= self._width else 0
        self._width += grow
        self._rewrite(self._lengths, grow, parents)

    def _rewrite(self, lengths: Ints, grow: int, parents: Ints) -> None:
        feeds = {"new_kv": self._new, "lengths": lengths, "grow": np.array([grow], np.int64), "parents": parents}
        self._self = self._next(self._self_graph, self._self, feeds)

    def _next(self, graph: Graph, caches: dict[str, Any], feeds: Mapping[str, Any]) -> dict[str, Any]:
        """The caches that a cache graph makes of ``caches``."""
        _, values = graph.run_on_device({**caches, **feeds}, device=[f"next_{name}" for name in caches])
        return dict(zip(caches, values, strict=True))

    def arrange(self, sources: Ints, pixels: UInt8) -> None:
        # 1. The cross cache: images that stay, then those just encoded.
        fresh = self._none
        if len(pixels):
            _, values = self._vision.run_on_device({"pixels": pixels}, device=list(self._cross))
            fresh = dict(zip(self._cross, values, strict=True))
        chosen = np.concatenate([sources, self._images + np.arange(len(pixels))])
        feeds = {f"fresh_{name}": value for name, value in fresh.items()} | {"sources": chosen}
        self._cross = self._next(self._cross_graph, self._cross, feeds)

        # 2. The self cache: rows follow their images; a fresh image's may hold anything, since its lengths are 0.
        before, self._images = self._images, len(chosen)
        layout, total = self._layout, before * self._rows
        if not total:
            self._width = CACHE_BUCKET
            zeros = np.zeros(layout.self_shape(self._images * self._rows, self._width), layout.dtype)
            self._self = {name: self._backend.to_device(zeros) for name in layout.self_names}
        elif self._images != before or not np.array_equal(sources, np.arange(before)):
            images = np.concatenate([sources, np.zeros(len(pixels), np.int64)])
            rows = (images[:, None] * self._rows + np.arange(self._rows)).reshape(-1)
            # No column is written: no row has this length.
            self._new = self._backend.to_device(np.zeros(layout.new_shape(total), layout.dtype))
            self._rewrite(np.full(total, -1, np.int64), 0, rows)
