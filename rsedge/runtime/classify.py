"""Zero-shot classification: each tile is of the class whose prompts it is most similar to.

What is computed and kept are embeddings; classes are told from them when outputs are written, so that a run that was
interrupted goes on even with other labels.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import BundleError, OptionError
from rsedge.runtime.outputs.class_records import ClassifiedTile, class_table
from rsedge.runtime.outputs.rasters import MAX_CLASSES, NO_CLASS, Cells, check_suffix, tile_cells, write_classes
from rsedge.runtime.outputs.target import ResultWriter, Target
from rsedge.runtime.outputs.writers import STDOUT, Writer, open_writer, parse_format
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

    from rsedge.runtime.outputs.records import Embedding, TileResult
    from rsedge.runtime.scenes.scene import Scene

Floats = NDArray[np.floating[Any]]


class TextImageEmbedder(TileEmbedder, Protocol):
    """What classification needs of an embedder."""

    @property
    def logit_scale(self) -> float | None:
        """What similarities are multiplied by, or None where the model has none."""

    @property
    def logit_bias(self) -> float | None:
        """What is added then; only models trained with a sigmoid per pair have it."""

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
        """Embed the classes.

        Args:
            embedder: Of images and texts.
            labels: At least two different classes.
            templates: Each with ``{category}`` or ``{}``; the prompts of a class are averaged.

        Raises:
            OptionError: Labels or templates cannot be.
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
        vectors = [result.embedding for result in results]
        ranked = iter(self._ranked([vector for vector in vectors if vector is not None], top))
        return [
            ClassifiedTile.of(result.record, top, next(ranked) if vector is not None else ())
            for result, vector in zip(results, vectors, strict=True)
        ]

    def indices(self, results: Sequence[TileResult]) -> Iterator[tuple[TileResult, int]]:
        """Each result that has an embedding, and the index of its class."""
        found = [result for result in results if result.embedding is not None]
        best = self._order([result.embedding for result in found if result.embedding is not None])[1][:, 0]
        return zip(found, best.tolist(), strict=True)

    def _order(self, vectors: Sequence[Embedding]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Probabilities [N, C] and class indices by falling similarity [N, C]; of equal classes the first one leads."""
        stack = np.array(vectors, np.float64).reshape(len(vectors), self.anchors.shape[1])
        # Not by probability, which may saturate: two of 1.0 in floating point are not equally similar.
        return self.probabilities(stack), np.argsort(
            -(stack @ self.anchors.T.astype(np.float64)), axis=1, kind="stable"
        )

    def _ranked(self, vectors: Sequence[Embedding], top: int) -> list[tuple[tuple[str, float], ...]]:
        probabilities, order = self._order(vectors)
        return [
            tuple((self.labels[index], rounded(row[index]) or 0.0) for index in best)
            for row, best in zip(probabilities.tolist(), order[:, :top].tolist(), strict=True)
        ]


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
    classifier: Classifier,
    scene: Scene,
    *,
    top: int = 1,
    **tiling: Unpack[Tiling],
) -> Iterator[ClassifiedTile]:
    """The records of a scene, lazily, in row-major order of its tiles.

    Args:
        classifier: Tells the classes.
        scene: The scene.
        top: Classes a record names, the most probable first.
        **tiling: See :class:`~rsedge.runtime.run.sources.TileOptions`.

    Raises:
        OptionError: An option does not fit.
        SceneError: The scene cannot be opened any more. Pixels that cannot be read are ``read_error`` records instead.
    """
    from rsedge.runtime.outputs.records import TileResult

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
        scenes: Scenes in the order of the output.
        classifier: Tells the classes.
        output: Path, whose suffix names the format, or ``-``.
        top: Classes a record names, the most probable first.
        raster: GeoTIFF of the one scene's classes, a pixel per tile; see
            :func:`~rsedge.runtime.outputs.rasters.tile_cells`.
        beside: What else to make of the same records: a report, a contact sheet, a style.
        format: Format, where the suffix does not name it.
        overwrite: Replace outputs, or a journal of another run.
        settings: What else decides the embeddings (the device), as JSON values: a journal with others is refused.
        progress: Called at the start and after each segment.
        **tiling: See :class:`~rsedge.runtime.run.sources.TileOptions`.

    Raises:
        OptionError: An option does not fit.
        OutputError: An output exists, its journal belongs to another run or is in use, or it cannot be written.
        SceneError: A scene cannot be opened any more; the journal is kept.
    """
    options = TileOptions(**tiling)
    _check_top(classifier, top)
    target = os.fspath(output)
    counts: Counter[str] = Counter()
    targets = [_records_target(classifier, target, parse_format(target, format), top, counts)]
    if raster is not None:
        targets.append(_raster_target(classifier, scenes, Path(raster), options))
    targets += [_captioned_target(classifier, target) for target in beside]
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


class _RecordsWriter:
    """Results as classified records."""

    def __init__(self, writer: Writer, classifier: Classifier, top: int, counts: Counter[str]) -> None:
        self._writer, self._classifier, self._top, self._counts = writer, classifier, top, counts

    def write(self, results: Sequence[TileResult]) -> None:
        tiles = self._classifier.classify(results, top=self._top)
        self._counts.update(tile.ranked[0][0] for tile in tiles if tile.ranked)
        self._writer.write(tiles)


def _records_target(classifier: Classifier, output: str, file_format: str, top: int, counts: Counter[str]) -> Target:
    @contextmanager
    def open_records() -> Iterator[ResultWriter]:
        with open_writer(output, file_format, class_table(top)) as writer:
            yield _RecordsWriter(writer, classifier, top, counts)

    return Target(None if output == STDOUT else Path(output), open_records)


class _CaptionedWriter:
    """Results with the class where captions stand, and its probability for their score."""

    def __init__(self, writer: ResultWriter, classifier: Classifier) -> None:
        self._writer, self._classifier = writer, classifier

    def write(self, results: Sequence[TileResult]) -> None:
        best = [next(iter(tile.ranked), (None, None)) for tile in self._classifier.classify(results, top=1)]
        self._writer.write(
            [
                replace(result, record=replace(result.record, caption=label, score=probability))
                for result, (label, probability) in zip(results, best, strict=True)
            ]
        )


def _captioned_target(classifier: Classifier, target: Target) -> Target:
    """A view of a run as one of classes."""

    @contextmanager
    def open_view() -> Iterator[ResultWriter]:
        with target.open() as writer:
            yield _CaptionedWriter(writer, classifier)

    return Target(target.path, open_view)


class _RasterWriter:
    """Results as a value per tile."""

    def __init__(self, classifier: Classifier, rows: int, cols: int) -> None:
        self._classifier = classifier
        dtype = np.uint8 if len(classifier.labels) < 256 else np.uint16
        self.classes: NDArray[np.unsignedinteger[Any]] = np.full((rows, cols), NO_CLASS, dtype)

    def write(self, results: Sequence[TileResult]) -> None:
        for result, index in self._classifier.indices(results):
            self.classes[result.record.row, result.record.col] = index + 1


def _raster_target(classifier: Classifier, scenes: Sequence[Scene], path: Path, options: TileOptions) -> Target:
    if len(scenes) > 1:
        raise OptionError(f"{len(scenes)} scenes do not fit in one raster, {path}: classify one scene at a time")
    check_suffix(path)
    scene, grid = scenes[0], options.grid(scenes[0])
    cells: Cells = tile_cells(options.tile_size, options.overlap)
    tags = {
        "model": classifier.embedder.model,
        "scene": scene.name,
        "tile_size": str(options.tile_size),
        "templates": " | ".join(classifier.templates),
    }

    @contextmanager
    def open_raster() -> Iterator[ResultWriter]:
        writer = _RasterWriter(classifier, grid.rows, grid.cols)
        yield writer
        write_classes(path, writer.classes, classifier.labels, scene=scene, cells=cells, tags=tags)

    return Target(path, open_raster)
