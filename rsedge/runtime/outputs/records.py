"""Captions of images, records of tiles, what a run keeps of them, and the columns by which every format writes them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rsedge.texts import plain

Status = Literal["ok", "nodata", "cloud", "read_error"]
_TEXTS = ("scene", "caption", "datetime", "model", "message", "scene_crs", "product_id", "mgrs_tile", "rendering")
EmbeddingType = Literal["float16", "float32"]
EMBEDDING_TYPES: tuple[EmbeddingType, ...] = get_args(EmbeddingType)
Embedding = NDArray[np.float16] | NDArray[np.float32]
Kind = Literal["text", "integer", "real", "time", "geometry"]


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption with its search score.

    Attributes:
        text: The decoded caption, special tokens removed.
        score: Mean log-probability per generated token (greedy, sampling) or the length-normalised
            beam score; natural logarithm, 0 is certainty.
        token_ids: The generated token ids, without the start token and with the end token if one was produced.
    """

    text: str
    score: float
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TileRecord:
    """One tile of a scene and what was found there; or a whole image that has no place on a map.

    Its texts are made plain (:func:`rsedge.texts.plain`): names, metadata and captions come from strangers.

    Attributes:
        scene: Name of the scene or image (its file name without the suffix).
        row, col: Position of the tile in the tile grid, from the upper left.
        row_off, col_off: First source pixel of the tile; negative never.
        width, height: Source pixels the tile really covers (smaller than the tile size where an edge tile is
            padded); of an image its size, 0 if unreadable.
        geometry: GeoJSON polygon of the footprint in WGS 84 longitude and latitude, or None without a georeference.
        caption: The caption, or None unless ``status`` is ``ok``.
        score: Score of the caption, rounded to 4 decimals, or None.
        status: ``ok``, ``nodata``, ``cloud`` or ``read_error``.
        nodata_fraction: Share of the tile's covered source pixels without data, 0 to 1; None if unreadable, and of
            images.
        cloud_fraction: Share of cloudy pixels, 0 to 1, or None where no cloud mask is known.
        datetime: Acquisition time, RFC 3339, or None.
        model: ``name@hash12`` of the bundle that wrote the caption or the embedding.
        message: Why a tile has neither (``read_error``, ``nodata``, ``cloud``), else None.
        scene_crs: Coordinate reference system of the scene, such as ``EPSG:32629``; ``pixel`` where it has no place on
            a map and the columns and rows of its pixels are all there is; None of images.
        product_id: Identifier of the product the scene belongs to, or None.
        mgrs_tile: Its tile in the Military Grid Reference System, such as ``29RKH``, or None.
        rendering: The rule by which pixels became the 8-bit colours the model saw, or None where it saw none.
        covered: Share of the tile that lies in the scene; the rest is mirrored or black. None of images.
    """

    scene: str
    row: int
    col: int
    row_off: int
    col_off: int
    width: int
    height: int
    geometry: dict[str, Any] | None
    caption: str | None
    score: float | None
    status: Status
    nodata_fraction: float | None
    cloud_fraction: float | None
    datetime: str | None
    model: str
    message: str | None = None
    scene_crs: str | None = None
    product_id: str | None = None
    mgrs_tile: str | None = None
    rendering: str | None = None
    covered: float | None = None

    def __post_init__(self) -> None:
        for name in _TEXTS:
            text = getattr(self, name)
            if text is not None and (cleaned := plain(text)) is not text:
                object.__setattr__(self, name, cleaned)

    def to_dict(self) -> dict[str, Any]:
        """The record as a plain dict, in field order, ``geometry`` included."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, eq=False)
class TileResult:
    """A record with what outputs keep beside it.

    Attributes:
        record: The record; of a run with a captioner and an embedder it names the captioner.
        path: The file its pixels come from, as the user named it.
        embedding: float16 or float32 [D], or None where the tile has none or none was asked for.
    """

    record: TileRecord
    path: str | None = None
    embedding: Embedding | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; an embedding is its NumPy type and its bytes in base 64, so that it comes back to the bit."""
        values = {**self.record.to_dict(), "path": self.path}
        if self.embedding is not None:
            little = self.embedding.astype(self.embedding.dtype.newbyteorder("<"), copy=False)
            values["embedding"] = [little.dtype.str, base64.b64encode(little.tobytes()).decode("ascii")]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TileResult:
        """The result that ``to_dict`` gave ``values`` for."""
        path, embedding = values.pop("path"), values.pop("embedding", None)
        vector = None if embedding is None else np.frombuffer(base64.b64decode(embedding[1]), embedding[0])
        return cls(TileRecord(**values), path, vector)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    name: str
    """Its name in the file and in the rows."""
    kind: Kind
    """The type of its values: text is str, integer is int, real is float, time is an RFC 3339 string, geometry is a
    GeoJSON Polygon or MultiPolygon."""
    required: bool = False
    """Whether every row has a value; otherwise None is one."""
    repeated: bool = False
    """Whether few values stand in many rows: GeoParquet stores those as a dictionary."""


@dataclass(frozen=True, slots=True)
class Table:
    """A kind of record. A format takes the values of a record from its row, by the names of the columns."""

    columns: tuple[Column, ...]
    """In the order of the file; one is called ``geometry``. GeoPackage writes it first, GeoParquet last."""
    row: Callable[[Any], Mapping[str, Any]]
    """Returns the row of a record: its values by name. GeoJSON writes all of them in their order, and only them; the
    other formats write the columns, empty where the row has no value."""
    name: str = "tiles"
    """Name of the layer in a GeoPackage."""

    @property
    def properties(self) -> tuple[Column, ...]:
        """The columns without the geometry."""
        return tuple(column for column in self.columns if column.kind != "geometry")


TILES = Table(
    (
        Column("scene", "text", required=True, repeated=True),
        *(Column(name, "integer", required=True) for name in ("row", "col", "row_off", "col_off", "width", "height")),
        Column("geometry", "geometry"),
        Column("caption", "text", repeated=True),
        Column("score", "real"),
        Column("status", "text", required=True, repeated=True),
        Column("nodata_fraction", "real"),
        Column("cloud_fraction", "real"),
        Column("datetime", "time", repeated=True),
        Column("model", "text", required=True, repeated=True),
        *(
            Column(name, "text", repeated=True)
            for name in ("message", "scene_crs", "product_id", "mgrs_tile", "rendering")
        ),
        Column("covered", "real"),
    ),
    TileRecord.to_dict,
)
"""Columns of :class:`TileRecord`."""
RESULTS = replace(TILES, row=lambda result: result.record.to_dict())
"""The records of :class:`TileResult`."""
