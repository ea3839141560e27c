"""The decoder of a captioner: it owns the caches, and a search drives it without seeing them.

Images sit in slots 0 to n − 1; each has ``rows`` adjacent rows (beams). The cross cache, and whatever else the step
graph takes per image, has one entry per slot, the self cache one per row. On the CPU the caches are arrays written in
place; on a GPU small graphs of the bundle rearrange them, so that only tokens and candidates cross to the host: in
place at fixed addresses (:mod:`rsedge.runtime.decoding.fixed_batch`) where the backend can, else from values to new
values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import BundleError
from rsedge.runtime.decoding.fixed_batch import FixedBatch, FixedGraphs, FixedMemory
from rsedge.runtime.decoding.search import Ints, Request, StepOutput
from rsedge.runtime.engines.contract import CACHE_BUCKET

if TYPE_CHECKING:
    import onnxruntime

    from rsedge.bundle import Bundle, DecoderSpec, TensorSpec
    from rsedge.runtime.engines.contract import Backend, Graph
    from rsedge.runtime.engines.ort import OrtBackend, OrtGraph

Array = NDArray[Any]
UInt8 = NDArray[np.uint8]

# Images encoded together on the CPU: few enough that activations stay in its last-level cache (bench/LOG.md).
_ENCODE_TOGETHER = 4

REFILL = 4
"""A batch is refilled when one in so many of its slots is free: encoding one image at a time leaves a GPU idle."""


class Caches(Protocol):
    """The cross and self caches of the images in work."""

    def feeds(self) -> Mapping[str, Any]:
        """The step graph's cache inputs, by name, for the images and rows in work."""

    def step_output(self, graph: Graph, feeds: Mapping[str, Any], names: Sequence[str]) -> list[Array]:
        """Run the step graph, keep its new column, and return the outputs ``names``."""

    def advance(self, lengths: Ints, parents: Ints) -> None:
        """Append the new column at each row's length, then let row i continue the cache of row ``parents[i]``."""

    def arrange(self, sources: Ints, encoder: Graph, pixels: UInt8) -> None:
        """Let slot i hold what slot ``sources[i]`` held, and put the encoded ``pixels`` into the slots after them."""


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
        self._inputs = bundle.manifest.graphs["step"].inputs
        self._rearrange: tuple[Graph, Graph] | None = None
        self._fixed: FixedGraphs | None = None
        self._idle: list[FixedMemory] = []
        # Another backend may keep values on the device and know nothing of addresses.
        if getattr(backend, "fixed_addresses", False) and {"self_write", "cross_write"} <= set(bundle.manifest.graphs):
            self.keep_fixed(bundle)
            return
        self._step = backend.open(bundle.graph_path("step"))
        if backend.on_cuda:
            self.keep_on_device(bundle)

    def keep_on_device(self, bundle: Bundle) -> None:
        """Hold the caches in values of the device, rearranged by the bundle's cache graphs."""
        paths = (bundle.graph_path("self_cache"), bundle.graph_path("cross_cache"))
        self._rearrange = (self._backend.open(paths[0]), self._backend.open(paths[1]))

    def keep_fixed(self, bundle: Bundle) -> None:
        """Hold the caches at fixed addresses of the device, written in place by the bundle's cache graphs."""
        backend = cast("OrtBackend", self._backend)  # the one that has addresses
        roles = ("self_cache", "cross_cache", "cross_write")
        graphs = {role: backend.open(bundle.graph_path(role)) for role in roles}
        # These run at every step, at few shapes.
        graphs |= {role: backend.open(bundle.graph_path(role), capture=True) for role in ("step", "self_write")}
        self._step = graphs["step"]
        self._fixed = FixedGraphs(backend, cast("OrtGraph", self._vision), graphs)

    def release(self) -> None:
        """Let go of memory that is kept for the next batch."""
        while self._idle:
            self._idle.pop().release()

    def encode(self, pixels: UInt8) -> Array:
        """The image encoder's output for uint8 [B, H, W, 3]: float32 [B, S, D], or [B, D] where it is one embedding."""
        return self._vision.run({"pixels": pixels}, ["image_embeds"])[0]

    def batch(self, *, slots: int, rows: int, columns: int) -> Batch | FixedBatch:
        """An empty batch of up to ``slots`` images with ``rows`` rows each and at most ``columns`` cached tokens.

        Close it when done: what it takes is then there for the next one.
        """
        if self._fixed is not None:
            memory, together = self._memory(self._fixed, slots, rows), max(1, slots // REFILL)
            return FixedBatch(self._fixed, memory, columns=columns, together=together, done=self._idle.append)
        if self._rearrange is None:
            caches: Caches = _HostCaches(self.spec, self._inputs, slots=slots, rows=rows, limit=columns)
        else:
            caches = _DeviceCaches(self.spec, self._inputs, self._backend, self._rearrange, rows=rows)
        return Batch(caches, self._vision, self._step)

    def _memory(self, graphs: FixedGraphs, slots: int, rows: int) -> FixedMemory:
        """Memory that fits, from the last batch if it does: what was captured at its addresses goes on being used."""
        try:
            memory = self._idle.pop()  # one act, whatever other threads do
        except IndexError:
            memory = None
        if memory is not None:
            if memory.rows == rows and memory.slots >= slots:
                return memory
            memory.release()
            slots = max(slots, memory.slots)
            del memory
        tokens = self._bundle.manifest.tokens
        assert tokens is not None
        return FixedMemory(graphs, self.spec, self._inputs, tokens.vocab_size, slots=slots, rows=rows)


class Batch:
    """Images in work: a search's requests go in, its candidates come out."""

    def __init__(self, caches: Caches, vision: Graph, step: Graph) -> None:
        self._caches, self._vision, self._graph = caches, vision, step
        self._lengths = np.zeros(0, np.int64)
        self.together: int | None = None
        """Images that may enter together at most, or None for any number."""

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
        self._caches.arrange(sources, self._vision, pixels)

    def step(self, request: Request) -> StepOutput:
        """One decoder run for all rows."""
        names = ["top_logits", "top_ids", "logsumexp", "watched"] + ["logits"] * request.full
        self._lengths = request.lengths
        feeds = {
            "tokens": request.tokens,
            "lengths": request.lengths,
            "top": np.array([request.top], np.int64),
            "watch": np.ascontiguousarray(request.watch),
            **self._caches.feeds(),
        }
        top_logits, top_ids, logsumexp, watched, *logits = self._caches.step_output(self._graph, feeds, names)
        return StepOutput(top_logits, top_ids, logsumexp, watched, logits[0] if logits else None)

    def advance(self, parents: Ints) -> None:
        """Keep the last step's tokens, then let row i continue row ``parents[i]``."""
        self._caches.advance(self._lengths, parents)


def _per_image(inputs: Sequence[TensorSpec], images: int) -> dict[str, Array]:
    """Room for what the step graph takes once per image, by name: all that its vision graph gives."""
    mine = [tensor for tensor in inputs if tensor.shape[:1] == ("images",)]
    return {
        tensor.name: np.zeros((images, *(int(size) for size in tensor.shape[1:])), np.dtype(tensor.dtype))
        for tensor in mine
    }


def _self_dtype(inputs: Sequence[TensorSpec]) -> np.dtype[Any]:
    return next(np.dtype(tensor.dtype) for tensor in inputs if tensor.name == "self_k.0")


def _self_names(layers: int) -> list[str]:
    return [f"self_{kind}.{layer}" for kind in "kv" for layer in range(layers)]


class _HostCaches:
    """Arrays with a place for every slot, written in place and handed to the graph as views of the slots in use."""

    def __init__(self, spec: DecoderSpec, inputs: Sequence[TensorSpec], *, slots: int, rows: int, limit: int) -> None:
        self._spec, self._slots, self._rows, self._limit = spec, slots, rows, limit
        self._dtype = _self_dtype(inputs)
        self._images = 0
        self._cross = _per_image(inputs, slots)
        self._self = self._columns(CACHE_BUCKET)
        self._new: Array = np.empty(0, self._dtype)

    def _columns(self, count: int) -> dict[str, Array]:
        # Zeros, not garbage: columns without a token are multiplied by a weight of zero, which NaN would survive.
        shape = (self._slots * self._rows, self._spec.heads, count, self._spec.head_dim)
        return {name: np.zeros(shape, self._dtype) for name in _self_names(self._spec.layers)}

    def feeds(self) -> dict[str, Array]:
        rows = self._images * self._rows
        cross = {name: array[: self._images] for name, array in self._cross.items()}
        return cross | {name: array[:rows] for name, array in self._self.items()}

    def step_output(self, graph: Graph, feeds: Mapping[str, Any], names: Sequence[str]) -> list[Array]:
        *outputs, self._new = graph.run(feeds, [*names, "new_kv"])
        return outputs

    def advance(self, lengths: Ints, parents: Ints) -> None:
        used = int(lengths.max()) + 1
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

    def arrange(self, sources: Ints, encoder: Graph, pixels: UInt8) -> None:
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
            for array, fresh in zip(
                self._cross.values(), encoder.run({"pixels": chunk}, list(self._cross)), strict=True
            ):
                array[places] = fresh
            self._images = places.stop


class _DeviceCaches:
    """Values in the device's memory, replaced by what the bundle's cache graphs make of them."""

    def __init__(
        self,
        spec: DecoderSpec,
        inputs: Sequence[TensorSpec],
        backend: Backend,
        graphs: tuple[Graph, Graph],
        *,
        rows: int,
    ) -> None:
        self._rows, self._images, self._width = rows, 0, 0
        self._self_graph, self._cross_graph = graphs
        self._dtype, self._spec, self._backend = _self_dtype(inputs), spec, backend
        self._cross: dict[str, onnxruntime.OrtValue] = {
            name: backend.to_device(array) for name, array in _per_image(inputs, 0).items()
        }
        self._fresh_start: dict[str, onnxruntime.OrtValue] = dict(self._cross)
        self._self: dict[str, onnxruntime.OrtValue] = {}
        self._new: onnxruntime.OrtValue | None = None

    def feeds(self) -> dict[str, onnxruntime.OrtValue]:
        return self._cross | self._self

    def step_output(self, graph: Graph, feeds: Mapping[str, Any], names: Sequence[str]) -> list[Array]:
        outputs, [self._new] = graph.run_on_device(feeds, host=names, device=["new_kv"])
        return outputs

    def advance(self, lengths: Ints, parents: Ints) -> None:
        used = int(lengths.max()) + 1
        grow = CACHE_BUCKET if used >= self._width else 0
        self._width += grow
        self._rewrite(lengths, grow, parents)

    def _rewrite(self, lengths: Ints, grow: int, parents: Ints) -> None:
        feeds = self._self | {
            "new_kv": self._new,
            "lengths": lengths,
            "grow": np.array([grow], np.int64),
            "parents": parents,
        }
        names = list(self._self)
        _, values = self._self_graph.run_on_device(feeds, device=[f"next_{name}" for name in names])
        self._self = dict(zip(names, values, strict=True))

    def arrange(self, sources: Ints, encoder: Graph, pixels: UInt8) -> None:
        names = list(self._cross)
        fresh = self._fresh_start
        if len(pixels):
            _, values = encoder.run_on_device({"pixels": pixels}, device=names)
            fresh = dict(zip(names, values, strict=True))
        count = len(sources) + len(pixels)
        chosen = np.concatenate([sources, self._images + np.arange(len(pixels))])
        feeds = self._cross | {f"fresh_{name}": value for name, value in fresh.items()} | {"sources": chosen}
        _, values = self._cross_graph.run_on_device(feeds, device=[f"next_{name}" for name in names])
        self._cross = dict(zip(names, values, strict=True))
        self._arrange_rows(sources, count)
        self._images = count

    def _arrange_rows(self, sources: Ints, count: int) -> None:
        """Rows follow their images; a fresh image's rows may hold anything, since its lengths are 0."""
        total, spec = self._images * self._rows, self._spec
        if not total:
            self._width = CACHE_BUCKET
            zeros = np.zeros((count * self._rows, spec.heads, self._width, spec.head_dim), self._dtype)
            self._self = {name: self._backend.to_device(zeros) for name in _self_names(spec.layers)}
            return
        if count == self._images and np.array_equal(sources, np.arange(count)):
            return
        images = np.concatenate([sources, np.zeros(count - len(sources), np.int64)])
        rows = (images[:, None] * self._rows + np.arange(self._rows)).reshape(-1)
        # No column is written: no row has this length.
        shape = (2 * spec.layers, total, spec.heads, spec.head_dim)
        self._new = self._backend.to_device(np.zeros(shape, self._dtype))
        self._rewrite(np.full(total, -1, np.int64), 0, rows)
