"""Records and embeddings as GeoParquet 1.1 (https://geoparquet.org/releases/v1.1.0): schema, metadata, writers.

Rows go to disk in groups of ``ROW_GROUP_ROWS``, so that memory is the same for any number of tiles and readers can
stream. Geometries are WKB in longitude and latitude (OGC:CRS84, which GeoParquet assumes where no ``crs`` is given);
``bbox`` is their covering, for readers that skip row groups by their statistics. It holds plain minima and maxima: a
tile on the antimeridian, whose geometry is two polygons, spans -180 to 180.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from rsedge import jsonvalues
from rsedge.errors import OptionError
from rsedge.jsontext import parse_json
from rsedge.runtime.outputs.records import TileRecord, TileResult
from rsedge.runtime.run.run import EmbeddingType  # noqa: TC001 - jsonvalues reads the annotations

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP_ROWS = 8192
"""32 MB of 1024 numbers as float32."""
METADATA_KEY = b"rsedge"
EMBEDDINGS_VERSION = 1

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_BATCH_ROWS = 512  # Python objects that wait to become columns


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingsInfo:
    """What a file of embeddings says of them, in the schema metadata under ``rsedge``.

    Attributes:
        model: ``name@hash12`` of the bundle that made them.
        model_hash: Its whole hash, 64 hexadecimal digits.
        dim: Length of an embedding.
        dtype: What they are stored as.
        normalized: Whether they have unit length (but for what ``dtype`` rounds off).
        caption_model: ``name@hash12`` of the bundle that wrote the captions, where there are any.
        version: Of this layout.

    Raises:
        OptionError: A value that cannot be.
    """

    model: str
    model_hash: str
    dim: int
    dtype: EmbeddingType
    normalized: bool = True
    caption_model: str | None = None
    version: int = EMBEDDINGS_VERSION

    def __post_init__(self) -> None:
        if self.version != EMBEDDINGS_VERSION:
            raise OptionError(
                f"embeddings of version {self.version}, this rsedge reads {EMBEDDINGS_VERSION}: embed again, or use "
                "the rsedge that wrote them"
            )
        if self.dim < 1 or len(self.model_hash) != 64:
            raise OptionError(f"embeddings of dim {self.dim} by {self.model_hash!r} cannot be")

    def to_json(self) -> str:
        """As stored."""
        values = asdict(self)
        if self.caption_model is None:
            del values["caption_model"]
        return json.dumps({"version": values.pop("version"), **values})

    @classmethod
    def from_json(cls, data: str | bytes) -> EmbeddingsInfo:
        """What ``to_json`` gave ``data`` for.

        Raises:
            OptionError: It is something else; all problems are named.
        """
        problems: list[str] = []
        try:
            values = parse_json(data)
        except ValueError as error:
            raise OptionError(f"the rsedge metadata are not JSON: {error}") from error
        if not isinstance(values, dict):
            raise OptionError("the rsedge metadata are no JSON object")
        info = jsonvalues.build(cls, values, "", problems.append)
        if info is None:
            raise OptionError("; ".join(problems))
        return info


def make_schema(info: EmbeddingsInfo | None, *, captions: bool, classes: Sequence[tuple[str, bool]] = ()) -> pa.Schema:
    """Columns of a file: the record's, then ``path`` and ``embedding`` of embeddings, ``bbox`` and ``geometry``.

    Args:
        info: Of the embeddings, None where there are none.
        captions: Whether there are ``caption`` and ``score``.
        classes: What stands in their place: names of columns, and whether they hold text (else numbers).
    """
    import pyarrow as pa

    text, count, share = pa.string(), pa.int32(), pa.float64()
    fields = [
        pa.field("scene", text, nullable=False),
        *(pa.field(name, count, nullable=False) for name in ("row", "col", "row_off", "col_off", "width", "height")),
        *([pa.field("caption", text), pa.field("score", share)] if captions else []),
        *(pa.field(name, text if is_text else share) for name, is_text in classes),
        pa.field("status", text, nullable=False),
        pa.field("nodata_fraction", share),
        pa.field("cloud_fraction", share),
        pa.field("datetime", pa.timestamp("ms", tz="UTC")),
        pa.field("model", text, nullable=False),
        pa.field("message", text),
        *(pa.field(name, text) for name in _OF_THE_SCENE),
        *([pa.field("path", text)] if info else []),
        pa.field("bbox", pa.struct([pa.field(corner, pa.float64(), nullable=False) for corner in _CORNERS])),
        pa.field("geometry", pa.binary()),
    ]
    if info:
        element = pa.float16() if info.dtype == "float16" else pa.float32()
        fields.append(pa.field("embedding", pa.list_(pa.field("element", element, nullable=False), info.dim)))
    return pa.schema(fields)


class TableWriter:
    """Results to the rows of a GeoParquet file of any schema that has ``bbox`` and ``geometry``.

    Args:
        stream: Where the bytes go; a pipe will do.
        schema: Columns: attributes of the records, ``path``, ``bbox``, ``geometry``, ``embedding``.
        model: Replaces what the records say of it, where given.
        metadata: Of the file, beside ``geo``.
    """

    def __init__(
        self, stream: BinaryIO, schema: pa.Schema, *, model: str | None, metadata: Mapping[str, str] | None = None
    ) -> None:
        from pyarrow import parquet

        names = [name for name in schema.names if name in _REPEATED]
        self._schema, self._model, self._metadata = schema, model, dict(metadata or {})
        self._rows: list[TileResult] = []
        self._batches: list[pa.RecordBatch] = []
        self._geometry_types: set[str] = set()
        self._bounds: list[float] | None = None
        # Statistics of geometries and embeddings would help nobody and take room in the footer.
        counted = [name for name in schema.names if name not in ("bbox", "geometry", "embedding")]
        counted += [f"bbox.{corner}" for corner in _CORNERS]
        self._writer = parquet.ParquetWriter(
            _NoSeek(stream),
            schema,
            version="2.6",
            compression=_compression(schema),
            data_page_version="2.0",  # values start at a known place: a search reads them without decoding
            data_page_size=64 << 20,
            use_dictionary=names,
            write_statistics=counted,
            store_schema=False,
        )

    def add(self, results: Iterable[TileResult]) -> None:
        """Append results."""
        for result in results:
            self._rows.append(result)
            if len(self._rows) == _BATCH_ROWS:
                self._pack()

    def finish(self) -> None:
        """Write the last rows, the metadata and the footer."""
        self._pack()
        self._flush()
        column: dict[str, Any] = {
            "encoding": "WKB",
            "geometry_types": sorted(self._geometry_types),
            "orientation": "counterclockwise",
            "covering": {"bbox": {corner: ["bbox", corner] for corner in _CORNERS}},
        }
        if self._bounds:
            column["bbox"] = self._bounds
        geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
        metadata = {"geo": json.dumps(geo), **self._metadata}
        # Arrow stores its schema under a key of its own, and shows readers the metadata of that one alone. The writer
        # would store it as it was at the beginning, when nobody knew the bounds.
        schema = self._schema.with_metadata(metadata).serialize().to_pybytes()
        metadata["ARROW:schema"] = base64.b64encode(schema).decode("ascii")
        self._writer.add_key_value_metadata(metadata)
        self._writer.close()

    def _pack(self) -> None:
        """Turn the waiting rows into columns; a row group's worth of those goes to disk."""
        import pyarrow as pa

        if not self._rows:
            return
        columns = [_column(field, self._rows, self._model) for field in self._schema]
        for result in self._rows:
            if result.record.geometry is not None:
                self._geometry_types.add(result.record.geometry["type"])
                bounds = bounding_box(result.record.geometry)
                known = self._bounds or bounds
                self._bounds = [*map(min, known[:2], bounds[:2]), *map(max, known[2:], bounds[2:])]
        self._batches.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._rows = []
        if sum(map(len, self._batches)) >= ROW_GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._batches:
            self._writer.write_table(pa.Table.from_batches(self._batches), row_group_size=ROW_GROUP_ROWS)
            self._batches = []


class GeoParquetWriter:
    """Records with captions as GeoParquet."""

    def __init__(self, stream: BinaryIO) -> None:
        self._table = TableWriter(stream, make_schema(None, captions=True), model=None)

    def write(self, records: Iterable[TileRecord]) -> None:
        """Append records."""
        self._table.add(map(TileResult, records))

    def finish(self) -> None:
        """Write the last rows and the footer."""
        self._table.finish()


class EmbeddingsWriter:
    """Results with embeddings as GeoParquet; captions too where ``info`` names who wrote them."""

    def __init__(self, stream: BinaryIO, info: EmbeddingsInfo) -> None:
        schema = make_schema(info, captions=info.caption_model is not None)
        self._table = TableWriter(stream, schema, model=info.model, metadata={METADATA_KEY.decode(): info.to_json()})

    def write(self, results: Iterable[TileResult]) -> None:
        """Append results."""
        self._table.add(results)

    def finish(self) -> None:
        """Write the last rows and the footer."""
        self._table.finish()


def _compression(schema: pa.Schema) -> dict[str, str]:
    """Zstandard but for embeddings, which it makes 8 % smaller and many times slower to read."""
    leaves = [name for name in schema.names if name not in ("bbox", "embedding")]
    leaves += [f"bbox.{corner}" for corner in _CORNERS]
    plain = {"embedding.list.element": "none"} if "embedding" in schema.names else {}
    return {**dict.fromkeys(leaves, "zstd"), **plain}


class _NoSeek:
    """A stream that counts for itself: a pipe cannot tell where it is."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._at = stream, 0

    def write(self, data: Any) -> int:
        self._stream.write(data)
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """The stream's owner closes it."""


_OF_THE_SCENE = ("scene_crs", "product_id", "mgrs_tile", "rendering")
_REPEATED = frozenset(["scene", "caption", "status", "model", "message", "path", "datetime", *_OF_THE_SCENE])


def _column(field: pa.Field, results: Sequence[TileResult], model: str | None) -> pa.Array:
    """A column of ``results``; ``model`` replaces what the records say of it."""
    import pyarrow as pa

    if field.name == "embedding":
        return _embeddings(field.type, results)
    if field.name == "model" and model is not None:
        return pa.array([model] * len(results), field.type)
    if make := _SPECIAL.get(field.name):
        values = [make(result) for result in results]
    elif field.name in TileRecord.__slots__:
        values = [getattr(result.record, field.name) for result in results]
    else:  # columns of a kind of record that has more
        values = [result.record.to_dict()[field.name] for result in results]
    if pa.types.is_string(field.type):  # file names and GDAL's messages need not be UTF-8
        values = [value and value.encode("utf-8", "replace").decode() for value in values]
    return pa.array(values, field.type)


def _embeddings(kind: pa.DataType, results: Sequence[TileResult]) -> pa.Array:
    import pyarrow as pa

    dtype = kind.value_type.to_pandas_dtype()
    vectors = np.zeros((len(results), kind.list_size), dtype)
    missing = np.ones(len(results), np.bool_)
    for row, result in enumerate(results):
        if result.embedding is not None:
            vectors[row], missing[row] = result.embedding, False
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=kind, mask=pa.array(missing))


def _when(result: TileResult) -> datetime | None:
    text = result.record.datetime
    return None if text is None else datetime.fromisoformat(text.replace("Z", "+00:00"))


def _bbox(result: TileResult) -> dict[str, float] | None:
    geometry = result.record.geometry
    return None if geometry is None else dict(zip(_CORNERS, bounding_box(geometry), strict=True))


_SPECIAL: dict[str, Callable[[TileResult], Any]] = {
    "path": lambda result: result.path,
    "datetime": _when,
    "bbox": _bbox,
    "geometry": lambda result: wkb(result.record.geometry),
}


def bounding_box(geometry: dict[str, Any]) -> list[float]:
    """West, south, east, north of a GeoJSON Polygon or MultiPolygon: plain minima and maxima."""
    parts = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    points = np.array([point for rings in parts for ring in rings for point in ring])
    return [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]


def wkb(geometry: dict[str, Any] | None) -> bytes | None:
    """A GeoJSON Polygon or MultiPolygon as little-endian well-known binary."""
    if geometry is None:
        return None
    if geometry["type"] == "Polygon":
        return _wkb_polygon(geometry["coordinates"])
    parts = geometry["coordinates"]
    return struct.pack("<BII", 1, 6, len(parts)) + b"".join(map(_wkb_polygon, parts))


def _wkb_polygon(rings: list[list[list[float]]]) -> bytes:
    packed = [struct.pack("<I", len(ring)) + np.array(ring, "<f8").tobytes() for ring in rings]
    return struct.pack("<BII", 1, 3, len(rings)) + b"".join(packed)
