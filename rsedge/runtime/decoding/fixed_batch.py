"""A decoder's batch whose caches stay at fixed addresses: what CUDA graphs need, and what spares copies without them.

Every run has one of few shapes: slots come in halves of the batch size, columns in buckets, and what is not in use is
computed along and ignored. An image keeps its place in the cross cache until it is done; the next one is written over
it. A row that continues another's hypothesis takes over the other's place by number; only where a hypothesis is
continued twice is a row of the self cache copied. Per step one small array goes to the device for the step, one comes
back, and one goes for the caches. The images that enter next are encoded by another thread and session meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsedge.runtime.decoding.search import Ints, Request, StepOutput
from rsedge.runtime.engines.memory import Buffer, Cudart, Packed, View

if TYPE_CHECKING:
    import onnxruntime

    from rsedge.bundle import DecoderSpec, TensorSpec
    from rsedge.runtime.engines.ort import FixedRun, OrtBackend, OrtGraph

Array = NDArray[Any]
UInt8 = NDArray[np.uint8]

_COLUMNS = 16  # the narrowest self cache; each next one is twice as wide
_SHAPES = 4  # slots, slots / 2, slots / 4 and slots / 8: images at the end leave fewer and fewer rows
_TOP = 16  # candidates come in powers of two up to this, then in multiples of it; watched tokens in multiples


def _in_units(count: int) -> int:
    return -(-count // _TOP) * _TOP


class CacheLayout:
    """Names, types and shapes of a captioner's caches.

    Attributes:
        dtype: Of the self cache.
        self_names: Its tensors, keys of all layers before values: the order of ``new_kv``.
        per_image: What the step graph takes once per image, all of which its vision graph gives: name → type, and shape
            behind the images.
    """

    def __init__(self, spec: DecoderSpec, inputs: Sequence[TensorSpec]) -> None:
        self._spec = spec
        self.dtype = next(np.dtype(tensor.dtype) for tensor in inputs if tensor.name == "self_k.0")
        self.self_names = [f"self_{kind}.{layer}" for kind in "kv" for layer in range(spec.layers)]
        self.per_image = {
            tensor.name: (np.dtype(tensor.dtype), tuple(int(size) for size in tensor.shape[1:]))
            for tensor in inputs
            if tensor.shape[:1] == ("images",)
        }

    def self_shape(self, rows: int, columns: int) -> tuple[int, int, int, int]:
        """Shape of one tensor of the self cache, [R, H, C, d]."""
        return rows, self._spec.heads, columns, self._spec.head_dim

    def new_shape(self, rows: int) -> tuple[int, int, int, int]:
        """Shape of a new column of all of them, [2·L, R, H, d]."""
        return 2 * self._spec.layers, rows, self._spec.heads, self._spec.head_dim

    def image_zeros(self, images: int) -> dict[str, Array]:
        """Arrays for what there is per image."""
        return {name: np.zeros((images, *tail), dtype) for name, (dtype, tail) in self.per_image.items()}


class FixedGraphs:
    """The graphs of a captioner for :class:`FixedBatch`, and the thread that encodes its images beside it.

    Attributes:
        step, self_write, cross_write, self_cache, cross_cache: Of the bundle.
    """

    def __init__(self, backend: OrtBackend, vision: OrtGraph, graphs: Mapping[str, OrtGraph]) -> None:
        self.backend = backend
        self.step, self.self_write, self.cross_write, self.self_cache, self.cross_cache = (
            graphs[role] for role in ("step", "self_write", "cross_write", "self_cache", "cross_cache")
        )
        self._vision = vision
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rsedge-encoder")
        self._staging: UInt8 | None = None
        self._cudart = Cudart.load() if backend.on_cuda else None

    def encode(self, pixels: UInt8, names: Sequence[str]) -> Future[dict[str, onnxruntime.OrtValue]]:
        """Begin to encode uint8 [M, H, W, 3]; gives the outputs ``names`` in the device's memory."""
        return self._thread.submit(self._encode, pixels, names)

    def _encode(self, pixels: UInt8, names: Sequence[str]) -> dict[str, onnxruntime.OrtValue]:
        with self.backend.capture_lock:  # a capture forbids other threads to use the device
            if self._staging is None or len(self._staging) < len(pixels):
                self._staging = np.empty(pixels.shape, np.uint8)
                if self._cudart:
                    self._cudart.pin(self._staging, self.backend.place[1])
            staged = self._staging[: len(pixels)]
            np.copyto(staged, pixels)
            _, values = self._vision.run_on_device({"pixels": staged}, device=names)
        return dict(zip(names, values, strict=True))


class FixedMemory:
    """The caches of up to ``slots`` images with ``rows`` rows each, and the runs that were bound to them.

    Args:
        graphs: What is run.
        layout: Of the caches.
        vocab_size: Tokens there are.
        slots, rows: Images, and rows of each.
    """

    def __init__(self, graphs: FixedGraphs, layout: CacheLayout, vocab_size: int, *, slots: int, rows: int) -> None:
        self.slots, self.rows, self._graphs, self._layout, self.vocab_size = slots, rows, graphs, layout, vocab_size
        self.shapes = sorted({max(1, slots >> power) for power in range(_SHAPES)})
        self.image_names = tuple(layout.per_image)
        self._images = {
            name: graphs.backend.buffer(slots * int(np.prod(tail)) * dtype.itemsize)
            for name, (dtype, tail) in layout.per_image.items()
        }
        self._new = self._buffer(layout.new_shape(slots * rows))
        self._selves: dict[int, dict[str, Buffer]] = {}
        self._steps: dict[tuple[int, ...], tuple[FixedRun, Packed, Packed]] = {}
        self._writes: dict[tuple[int, ...], tuple[FixedRun, Packed]] = {}

    def _buffer(self, shape: tuple[int, ...]) -> Buffer:
        return self._graphs.backend.buffer(int(np.prod(shape)) * self._layout.dtype.itemsize)

    def image_views(self, images: int) -> dict[str, View]:
        """The cross cache, and whatever else there is per image, of the first ``images`` slots."""
        kinds = self._layout.per_image
        return {name: self._images[name].view(dtype, (images, *tail)) for name, (dtype, tail) in kinds.items()}

    def self_views(self, images: int, width: int) -> dict[str, View]:
        """The self cache of the rows of the first ``images`` slots, ``width`` columns of it."""
        layout = self._layout
        if width not in self._selves:
            whole = layout.self_shape(self.slots * self.rows, width)
            self._selves[width] = {name: self._buffer(whole) for name in layout.self_names}
        shape = layout.self_shape(images * self.rows, width)
        return {name: buffer.view(layout.dtype, shape) for name, buffer in self._selves[width].items()}

    def new_view(self, images: int) -> View:
        """The new column of those rows."""
        return self._new.view(self._layout.dtype, self._layout.new_shape(images * self.rows))

    def step(self, images: int, width: int, top: int, watched: int, full: bool) -> tuple[FixedRun, Packed, Packed]:
        """A decoder run at one shape, with what it takes (tokens, lengths, watch) and gives."""
        key = (images, width, top, watched, full)
        if key not in self._steps:
            rows, backend = images * self.rows, self._graphs.backend
            takes = backend.packed(
                {"tokens": (np.int64, (rows,)), "lengths": (np.int64, (rows,)), "watch": (np.int64, (rows, watched))}
            )
            tensors: dict[str, tuple[Any, tuple[int, ...]]] = {
                "top_logits": (np.float32, (rows, top)),
                "top_ids": (np.int64, (rows, top)),
                "logsumexp": (np.float32, (rows,)),
                "watched": (np.float32, (rows, watched)),
            }
            gives = backend.packed(tensors | ({"logits": (np.float32, (rows, self.vocab_size))} if full else {}))
            caches = self.image_views(images) | self.self_views(images, width)
            run = self._graphs.step.fix(
                {**takes.views(), "top": np.array([top], np.int64), **caches},
                {**gives.views(), "new_kv": self.new_view(images)},
            )
            self._steps[key] = run, takes, gives
        return self._steps[key]

    def write(self, images: int, width: int, moves: int) -> tuple[FixedRun, Packed]:
        """A run that appends the new column and copies ``moves`` rows, with what it takes."""
        key = (images, width, moves)
        if key not in self._writes:
            sizes = {"lengths": images * self.rows, "origins": moves, "targets": moves}
            takes = self._graphs.backend.packed({name: (np.int64, (size,)) for name, size in sizes.items()})
            caches = self.self_views(images, width)
            outputs = {f"{kind}_{name}": view for name, view in caches.items() for kind in ("written", "next")}
            inputs = {**takes.views(), **caches, "new_kv": self.new_view(images)}
            self._writes[key] = self._graphs.self_write.fix(inputs, outputs), takes
        return self._writes[key]

    def widen(self, images: int, old: int, new: int) -> None:
        """Bring the self cache of the first ``images`` slots from ``old`` columns to ``new``."""
        rows, after = images * self.rows, self.self_views(images, new)
        inputs: dict[str, View | Array] = {
            **self.self_views(images, old),
            "new_kv": self.new_view(images),
            "lengths": np.full(rows, -1, np.int64),
            "grow": np.array([new - old], np.int64),
            "parents": np.arange(rows),
        }
        with self._graphs.backend.capture_lock:
            self._graphs.self_cache.fix(inputs, {f"next_{name}": view for name, view in after.items()})()

    def enter(self, fresh: Mapping[str, onnxruntime.OrtValue], places: Ints) -> None:
        """Write encoded images to the slots ``places``."""
        here = self.image_views(self.slots)
        inputs = {**here, **{f"fresh_{name}": value for name, value in fresh.items()}, "places": places}
        with self._graphs.backend.capture_lock:
            self._graphs.cross_write.fix(inputs, {f"next_{name}": view for name, view in here.items()})()

    def move(self, origins: Ints, targets: Ints) -> None:
        """Let the slots ``targets`` hold the images of the slots ``origins``."""
        here = self.image_views(self.slots)
        one = {f"fresh_{name}": view for name, view in self.image_views(1).items()}
        names = [f"next_{name}" for name in here]
        _, copies = self._graphs.cross_cache.run_on_device({**here, **one, "sources": origins}, device=names)
        self.enter(dict(zip(here, copies, strict=True)), targets)

    def release(self) -> None:
        """Free what was captured; the memory goes when nobody refers to it."""
        for run in (*(entry[0] for entry in self._steps.values()), *(entry[0] for entry in self._writes.values())):
            run.release()
        self._steps.clear()
        self._writes.clear()


class FixedBatch:
    """Images in work, as in :class:`rsedge.runtime.decoding.decoder.Batch`.

    Args:
        graphs: What is run.
        memory: Where the caches are; nobody else may use it meanwhile.
        columns: Tokens that a row caches at most.
        together: Images that enter together at most.
        done: Called with the memory when the batch needs it no more.
    """

    def __init__(
        self,
        graphs: FixedGraphs,
        memory: FixedMemory,
        *,
        columns: int,
        together: int,
        done: Callable[[FixedMemory], None],
    ) -> None:
        self._graphs, self._memory, self.together, self._done = graphs, memory, together, done
        # One column more than tokens: the last is never read, so whoever has nothing to write writes there.
        self._limit = columns + 1
        self._width = min(_COLUMNS, _in_units(self._limit))
        self._slots: Ints = np.zeros(0, np.int64)  # slot of the search → place in memory
        self._rows: Ints = np.zeros(0, np.int64)  # row of the search → place in memory, rows of an image side by side
        self._images = memory.shapes[0]
        self._lengths: Ints = np.zeros(0, np.int64)
        self._coming: tuple[UInt8, Future[dict[str, onnxruntime.OrtValue]]] | None = None

    def expect(self, pixels: UInt8) -> None:
        """Begin to encode images, uint8 [M, H, W, 3], that the next :meth:`arrange` brings (this very array)."""
        if len(pixels) and self._coming is None:
            self._coming = pixels, self._graphs.encode(pixels, self._memory.image_names)

    def arrange(self, sources: Ints, pixels: UInt8) -> None:
        """Let slot i hold what slot ``sources[i]`` held, then encode ``pixels`` into the slots after them.

        Args:
            sources: int64 [k], distinct.
            pixels: uint8 [m, H, W, 3]; m may be 0.
        """
        # 1. The slots that stay, and how many places the batch now takes.
        memory, ranks = self._memory, np.arange(self._memory.rows)
        self._slots = self._slots[sources]
        self._rows = self._rows.reshape(-1, memory.rows)[sources].reshape(-1)
        count = len(sources) + len(pixels)
        images = next(size for size in (*memory.shapes, count) if size >= count)

        # 2. What lies behind these places moves into gaps in them.
        beyond = np.flatnonzero(self._slots >= images)
        if len(beyond):
            targets = np.setdiff1d(np.arange(images), self._slots)[: len(beyond)]
            origins = self._slots[beyond]
            memory.move(origins, targets)
            here, there = ((places[:, None] * memory.rows + ranks).reshape(-1) for places in (origins, targets))
            self._write(np.full(len(self._rows), self._width - 1), here, there)
            self._rows.reshape(-1, memory.rows)[beyond] += ((targets - origins) * memory.rows)[:, None]
            self._slots[beyond] = targets
        self._images = images

        # 3. New images enter, encoded already where they were expected.
        free = np.setdiff1d(np.arange(images), self._slots)
        for first in range(0, len(pixels), self.together):
            part = pixels[first : first + self.together]
            places = free[first : first + len(part)]
            coming, self._coming = self._coming, None
            if coming is None or coming[0] is not pixels or len(part) < len(pixels):
                if coming is not None:
                    coming[1].result()  # one at a time: they share the array the device reads from
                coming = part, self._graphs.encode(part, memory.image_names)
            memory.enter(coming[1].result(), places)
            self._slots = np.concatenate([self._slots, places])
            self._rows = np.concatenate([self._rows, (places[:, None] * memory.rows + ranks).reshape(-1)])

    def step(self, request: Request) -> StepOutput:
        """One decoder run for all rows."""
        self._lengths = request.lengths
        wanted, watched = request.top, request.watch.shape[1]
        # Some searches want more candidates at every step: without this a graph would be captured at every step.
        top = _in_units(wanted) if wanted > _TOP else 1 << (wanted - 1).bit_length()
        top, wide = min(top, self._memory.vocab_size), max(1, _in_units(watched))
        run, takes, gives = self._memory.step(self._images, self._width, top, wide, request.full)
        for name in ("tokens", "lengths", "watch"):
            takes.host(name)[:] = 0
        takes.host("tokens")[self._rows] = request.tokens
        takes.host("lengths")[self._rows] = request.lengths
        takes.host("watch")[self._rows, :watched] = request.watch
        takes.upload()
        run()
        found = {name: values[self._rows] for name, values in gives.download().items()}
        return StepOutput(
            found["top_logits"][:, :wanted],
            found["top_ids"][:, :wanted],
            found["logsumexp"],
            found["watched"][:, :watched],
            found.get("logits"),
        )

    def advance(self, parents: Ints) -> None:
        """Keep the last step's tokens, then let row i continue row ``parents[i]``."""
        sources = self._rows[parents]
        _, first = np.unique(sources, return_index=True)
        again = np.setdiff1d(np.arange(len(sources)), first)
        # A hypothesis continued once keeps its place; a second continuation gets the place of one that was dropped, of
        # the same image: both lists are in the order of images, and each image has as many of either.
        again = again[np.argsort(sources[again], kind="stable")]
        dropped = np.setdiff1d(self._rows, sources)
        following = sources.copy()
        following[again] = dropped[np.argsort(dropped // self._memory.rows, kind="stable")]
        self._write(self._lengths, sources[again], following[again])
        self._rows = following
        used = int(self._lengths.max()) + 1
        if used >= self._width - 1 and self._width < _in_units(self._limit):
            wider = min(2 * self._width, _in_units(self._limit))
            self._memory.widen(self._images, self._width, wider)
            self._width = wider

    def _write(self, lengths: Ints, origins: Ints, targets: Ints) -> None:
        """Append the new column to rows in use at ``lengths``, then copy rows."""
        total = self._images * self._memory.rows
        unit = max(1, -(-total // 4))
        moves = max(1, -(-len(origins) // unit) * unit)
        run, takes = self._memory.write(self._images, self._width, moves)
        column = takes.host("lengths")
        column[:] = self._width - 1
        column[self._rows] = lengths
        # Copies too many are of a row onto itself, one that no other is copied onto.
        still = np.setdiff1d(np.arange(total), targets)[0]
        for name, rows in (("origins", origins), ("targets", targets)):
            takes.host(name)[:] = still
            takes.host(name)[: len(rows)] = rows
        takes.upload()
        run()

    def close(self) -> None:
        """Wait for what is still encoded, and give the memory back; nothing else may be called after."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming[1].exception()
        self._done(self._memory)
