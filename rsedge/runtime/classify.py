"""Zero-shot classification: each tile is of the class whose prompts it is most similar to.

A run computes and keeps embeddings; classes follow from them when outputs are written. So an interrupted run can
continue even with other labels.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import BundleError, OptionError
from rsedge.runtime.outputs.files import ResultWriter, Target
from rsedge.runtime.outputs.rasters import MAX_CLASSES, NO_CLASS, check_suffix, tile_cells, write_classes
from rsedge.runtime.outputs.records import TILES, Column, Table, TileRecord, TileResult
from rsedge.runtime.outputs.writers import STDOUT, open_writer, parse_format
from rsedge.runtime.prompts import TEMPLATES, class_embeddings
from rsedge.runtime.run.pipeline import (
    Models,
    Progress,
    Summary,
    TileEmbedder,
    check_distinct,
    embed_scene,
    execute_run,
)
from rsedge.runtime.run.sources import TileOptions, Tiling, rounded
from rsedge.texts import plain

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from rsedge.runtime.outputs.records import Embedding
    from rsedge.runtime.scenes.scene import Scene

Floats = NDArray[np.floating[Any]]

_FIELDS = TileRecord.__slots__
_CAPTION = _FIELDS.index("caption")  # score follows it


def _columns(top: int) -> list[str]:
    """``class``, ``probability``, then ``class_2``, ``probability_2`` and so on."""
    places = ["", *(f"_{place}" for place in range(2, top + 1))]
    return [f"{name}{place}" for place in places for name in ("class", "probability")]


@dataclass(frozen=True, slots=True)
class ClassifiedTile(TileRecord):
    """A record with the most probable classes of its tile; it has no caption.

    Attributes:
        top: How many classes a record names.
        ranked: Class and probability, rounded to 4 decimals, the most similar first; empty unless ``status`` is ``ok``.
    """

    top: int = 1
    ranked: tuple[tuple[str, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The record as a plain dict, with classes and probabilities in place of ``caption`` and ``score``."""
        values = [(name, getattr(self, name)) for name in _FIELDS]
        ranked: list[str | float | None] = [value for pair in self.ranked for value in pair]
        found = zip(_columns(self.top), ranked or [None] * (2 * self.top), strict=True)
        return dict([*values[:_CAPTION], *found, *values[_CAPTION + 2 :]])


def class_table(top: int) -> Table:
    """The columns of :class:`ClassifiedTile` with ``top`` classes."""
    kinds = [Column(name, "text" if name.startswith("class") else "real") for name in _columns(top)]
    return Table((*TILES.columns[:_CAPTION], *kinds, *TILES.columns[_CAPTION + 2 :]), ClassifiedTile.to_dict)


class TextImageEmbedder(TileEmbedder, Protocol):
    """An embedder of images and texts."""

    logit_scale: float | None
    """Factor of similarities, or None where the model has none."""
    logit_bias: float | None
    """Added then; only models trained with a sigmoid per pair have it."""

    def embed_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """float32 [N, dim], unit length."""


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """Classes as embeddings; made by :meth:`make`.

    Attributes:
        embedder: Embeds tiles.
        labels: The classes.
        templates: What they were put into.
        anchors: float32 [C, D], a unit vector per class.
    """

    embedder: TextImageEmbedder
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    anchors: NDArray[np.float32]

    @classmethod
    def make(
        cls, embedder: TextImageEmbedder, labels: Sequence[str], *, templates: Sequence[str] = TEMPLATES
    ) -> Classifier:
        """Embed at least two different classes; the prompts of a class, one per template, are averaged.

        Raises:
            OptionError: Labels or templates are not accepted.
            BundleError: The model has no logit scale, so that similarities have no probabilities.
        """
        for name, value in (("labels", labels), ("templates", templates)):
            if isinstance(value, str):  # taken for a list, it would be one of letters
                raise OptionError(f"{name} is the string {value[:40]!r}, expected a list of strings")
        if len(labels) > MAX_CLASSES:
            raise OptionError(f"{len(labels)} labels: give at most {MAX_CLASSES}")
        need_scale(embedder)
        labels = [plain(label) for label in labels]
        anchors = class_embeddings(labels, embedder.embed_texts, templates)
        return cls(embedder, tuple(labels), tuple(templates), anchors)

    def probabilities(self, embeddings: Floats) -> NDArray[np.float64]:
        """float64 [N, C] for embeddings [N, D].

        A model trained with a softmax over captions (CLIP; no logit bias) gives shares that sum to 1. One trained with
        a sigmoid per image and caption (SigLIP; a bias) gives, for each class by itself, the probability that it fits:
        they need not sum to 1, and all of them low says that none does. Either way the most probable class is the most
        similar one.
        """
        similarity = embeddings.astype(np.float64) @ self.anchors.T.astype(np.float64)
        logits = need_scale(self.embedder) * similarity
        bias = self.embedder.logit_bias
        return softmax(logits) if bias is None else sigmoid(logits + bias)

    def classify(self, results: Sequence[TileResult], *, top: int = 1) -> list[ClassifiedTile]:
        """The records of a segment with the ``top`` most probable classes of each tile that has an embedding."""
        probabilities, order = self.order([result.embedding for result in results if result.embedding is not None])
        ranked = (
            tuple((self.labels[index], rounded(row[index]) or 0.0) for index in best)
            for row, best in zip(probabilities.tolist(), order[:, :top].tolist(), strict=True)
        )
        return [
            ClassifiedTile(
                **result.record.to_dict(), top=top, ranked=next(ranked) if result.embedding is not None else ()
            )
            for result in results
        ]

    def order(self, vectors: Sequence[Embedding]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Probabilities [N, C] and class indices by falling similarity [N, C]; of equal classes the first one leads."""
        stack = np.array(vectors, np.float64).reshape(len(vectors), self.anchors.shape[1])
        # Not by probability, which may saturate: two of 1.0 in floating point are not equally similar.
        similarity = stack @ self.anchors.T.astype(np.float64)
        return self.probabilities(stack), np.argsort(-similarity, axis=1, kind="stable")


def need_scale(embedder: TextImageEmbedder) -> float:
    """The logit scale.

    Raises:
        BundleError: There is none.
    """
    if embedder.logit_scale is None:
        raise BundleError(
            f"{embedder.model} has no logit scale, so its similarities have no probabilities: export a CLIP or SigLIP "
            "checkpoint"
        )
    return embedder.logit_scale


def softmax(logits: Floats) -> NDArray[np.float64]:
    """Shares along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float64)
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def sigmoid(logits: Floats) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)), without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(np.asarray(logits, np.float64) / 2)))


def classify_scene(
    classifier: Classifier, scene: Scene, *, top: int = 1, **tiling: Unpack[Tiling]
) -> Iterator[ClassifiedTile]:
    """The records of a scene, lazily, in row-major order of its tiles, with the ``top`` most probable classes.

    Raises:
        OptionError: An option does not fit.
        SceneError: The scene cannot be opened any more. Pixels that cannot be read are ``read_error`` records instead.
    """
    _check_top(classifier, top)
    tiles = embed_scene(classifier.embedder, scene, **tiling)
    return (classifier.classify([TileResult(record, None, vector)], top=top)[0] for record, vector in tiles)


@dataclass(frozen=True, slots=True)
class ClassSummary(Summary):
    """What a run did.

    Attributes:
        classes: Label → number of tiles, in the order of the labels; none is left out.
        raster: Path of the class raster, or None.
    """

    classes: Mapping[str, int] | None = None
    raster: str | None = None


def run(
    scenes: Sequence[Scene],
    classifier: Classifier,
    output: str | os.PathLike[str],
    *,
    top: int = 1,
    raster: str | os.PathLike[str] | None = None,
    beside: Sequence[Target] = (),
    format: str | None = None,  # noqa: A002 - the option's name
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
    **tiling: Unpack[Tiling],
) -> ClassSummary:
    """Classify the tiles of scenes into one output; journal and resumption as in
    :func:`rsedge.runtime.run.pipeline.run`.

    Args:
        scenes, output, format, overwrite, progress, **tiling: As there.
        classifier: The classes.
        top: Number of classes in a record, the most probable first.
        raster: GeoTIFF of the one scene's classes, a pixel per tile; see
            :func:`~rsedge.runtime.outputs.rasters.tile_cells`.
        beside: Further outputs of the same records: a report, a contact sheet, a style.
        settings: What else decides the embeddings (the device), as JSON values: a journal with others is refused.

    Raises:
        OptionError: An option does not fit.
        OutputError: An output exists, its journal belongs to another run or is in use, or it cannot be written.
        SceneError: A scene cannot be opened any more; the journal is kept.
    """
    options = TileOptions(**tiling)
    _check_top(classifier, top)
    target = os.fspath(output)
    name = parse_format(target, format)
    counts: Counter[str] = Counter()

    def classified(results: Sequence[TileResult]) -> list[ClassifiedTile]:
        tiles = classifier.classify(results, top=top)
        counts.update(tile.ranked[0][0] for tile in tiles if tile.ranked)
        return tiles

    def captioned(results: Sequence[TileResult]) -> list[TileResult]:
        """The class where captions stand, and its probability for their score."""
        best = [next(iter(tile.ranked), (None, None)) for tile in classifier.classify(results, top=1)]
        return [
            replace(result, record=replace(result.record, caption=label, score=probability))
            for result, (label, probability) in zip(results, best, strict=True)
        ]

    path = None if target == STDOUT else Path(target)
    targets = [_changed(path, lambda: open_writer(target, name, class_table(top)), classified)]
    if raster is not None:
        targets.append(_raster_target(classifier, scenes, Path(raster), options))
    targets += [_changed(view.path, view.open, captioned) for view in beside]
    check_distinct(targets)
    # Not rounded to float16, so that classes are those the model gives.
    models = Models(embedder=classifier.embedder, dtype="float32")
    summary = execute_run(scenes, models, targets, options, overwrite, settings or {}, progress)
    return ClassSummary(
        **{field.name: getattr(summary, field.name) for field in fields(Summary)},
        classes={label: counts[label] for label in classifier.labels},
        raster=None if raster is None else os.fspath(raster),
    )


def _check_top(classifier: Classifier, top: int) -> None:
    if not 1 <= top <= len(classifier.labels):
        raise OptionError(f"top is {top}, expected 1 to {len(classifier.labels)}, the number of labels")


@dataclass(frozen=True, slots=True)
class _Results:
    """A writer of results that is a function."""

    write: Callable[[Sequence[TileResult]], None]


def _changed(
    path: Path | None,
    open_unchanged: Callable[[], AbstractContextManager[ResultWriter]],
    change: Callable[[Sequence[TileResult]], Sequence[Any]],
) -> Target:
    """A target whose writer gets what ``change`` makes of the results."""

    @contextmanager
    def open_changed() -> Iterator[ResultWriter]:
        with open_unchanged() as writer:
            yield _Results(lambda results: writer.write(change(results)))

    return Target(path, open_changed)


def _raster_target(classifier: Classifier, scenes: Sequence[Scene], path: Path, options: TileOptions) -> Target:
    if len(scenes) > 1:
        raise OptionError(f"{len(scenes)} scenes do not fit in one raster, {path}: classify one scene at a time")
    check_suffix(path)
    scene, grid = scenes[0], options.grid(scenes[0])
    cells = tile_cells(options.tile_size, options.overlap)
    tags = {
        "model": classifier.embedder.model,
        "scene": scene.name,
        "tile_size": str(options.tile_size),
        "templates": " | ".join(classifier.templates),
    }

    @contextmanager
    def open_raster() -> Iterator[ResultWriter]:
        dtype = np.uint8 if len(classifier.labels) < 256 else np.uint16
        classes: NDArray[np.unsignedinteger[Any]] = np.full((grid.rows, grid.cols), NO_CLASS, dtype)

        def write(results: Sequence[TileResult]) -> None:
            found = [(result.record, result.embedding) for result in results if result.embedding is not None]
            order = classifier.order([embedding for _, embedding in found])[1]
            for (record, _), index in zip(found, order[:, 0].tolist(), strict=True):
                classes[record.row, record.col] = index + 1

        yield _Results(write)
        write_classes(path, classes, classifier.labels, scene=scene, cells=cells, tags=tags)

    return Target(path, open_raster)
