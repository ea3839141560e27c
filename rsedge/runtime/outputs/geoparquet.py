"""Records and embeddings as GeoParquet 1.1 (https://geoparquet.org/releases/v1.1.0): schema, metadata, writers.

Rows go to disk in groups of ``ROW_GROUP_ROWS``, so that memory is the same for any number of tiles and readers can
stream. Geometries are WKB in longitude and latitude (OGC:CRS84, which GeoParquet assumes where no ``crs`` is given);
``bbox`` is their covering, for readers that skip row groups by their statistics. It holds plain minima and maxima: a
tile on the antimeridian, whose geometry is two polygons, spans -180 to 180.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from rsedge import jsonvalues
from rsedge.errors import OptionError
from rsedge.jsonvalues import parse_json
from rsedge.runtime.outputs.files import Writer, open_file
from rsedge.runtime.outputs.geometry import bounding_box, wkb
from rsedge.runtime.outputs.records import TILES, Column, EmbeddingType, Table

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
        OptionError: A value is out of range.
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
        """The text that a file holds."""
        values = asdict(self)
        if self.caption_model is None:
            del values["caption_model"]
        return json.dumps({"version": values.pop("version"), **values})

    @classmethod
    def from_json(cls, data: str | bytes) -> EmbeddingsInfo:
        """Read the text of ``to_json``.

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


def embeddings_table(info: EmbeddingsInfo) -> Table:
    """The columns of results with embeddings: those of a tile, without captions where there are none, and ``path``."""
    without = () if info.caption_model else ("caption", "score")
    columns = (column for column in TILES.columns if column.name not in without)
    return Table(
        (*columns, Column("path", "text", repeated=True)),
        lambda result: (
            result.record.to_dict() | {"model": info.model, "path": result.path, "embedding": result.embedding}
        ),
    )


def make_schema(table: Table, info: EmbeddingsInfo | None = None) -> pa.Schema:
    """The Arrow schema of a file: columns of the table, ``bbox``, ``geometry`` and, with ``info``, ``embedding``."""
    import pyarrow as pa

    kinds = {"text": pa.string(), "integer": pa.int32(), "real": pa.float64(), "time": pa.timestamp("ms", tz="UTC")}
    schema = [pa.field(each.name, kinds[each.kind], nullable=not each.required) for each in table.properties]
    schema.append(pa.field("bbox", pa.struct([pa.field(corner, pa.float64(), nullable=False) for corner in _CORNERS])))
    schema.append(pa.field("geometry", pa.binary()))
    if info is not None:
        element = pa.float16() if info.dtype == "float16" else pa.float32()
        schema.append(pa.field("embedding", pa.list_(pa.field("element", element, nullable=False), info.dim)))
    return pa.schema(schema)


class GeoParquetWriter:
    """Records to the rows of a GeoParquet file, on a stream that need not seek.

    With ``info`` the rows of the table have an ``embedding`` besides the columns; ``metadata`` is kept in the footer.
    """

    def __init__(
        self,
        stream: BinaryIO,
        table: Table,
        info: EmbeddingsInfo | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        from pyarrow import parquet

        self._table, self._schema = table, make_schema(table, info)
        self._metadata = ({} if info is None else {METADATA_KEY.decode(): info.to_json()}) | dict(metadata or {})
        self._rows: list[Mapping[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []
        self._geometry_types: set[str] = set()
        self._bounds: list[float] | None = None
        corners = [f"bbox.{corner}" for corner in _CORNERS]
        counted = [*(column.name for column in table.properties), *corners]
        # Zstandard makes embeddings 8 % smaller and many times slower to read.
        compression = dict.fromkeys([*counted, "geometry"], "zstd")
        if info is not None:
            compression["embedding.list.element"] = "none"
        self._writer = parquet.ParquetWriter(
            _NoSeek(stream),
            self._schema,
            version="2.6",
            compression=compression,
            data_page_version="2.0",  # values start at a known place: a search reads them without decoding
            data_page_size=64 << 20,
            use_dictionary=[column.name for column in table.columns if column.repeated],
            # Statistics of geometries and embeddings would help nobody and take room in the footer.
            write_statistics=counted,
            store_schema=False,
        )

    def write(self, records: Iterable[Any]) -> None:
        """Append records."""
        for record in records:
            self._rows.append(self._table.row(record))
            if len(self._rows) == _BATCH_ROWS:
                self._pack()

    def finish(self) -> None:
        """Write the last rows, the metadata and the footer."""
        self._pack(last=True)
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

    def _pack(self, *, last: bool = False) -> None:
        """Turn the waiting rows into columns; a row group's worth of those goes to disk, and the last ones do."""
        import pyarrow as pa

        if self._rows:
            geometries = [row["geometry"] for row in self._rows]
            boxes = [geometry and bounding_box(geometry) for geometry in geometries]
            for geometry, bounds in zip(geometries, boxes, strict=True):
                if geometry is not None:
                    self._geometry_types.add(geometry["type"])
                    known = self._bounds or bounds
                    self._bounds = [*map(min, known[:2], bounds[:2]), *map(max, known[2:], bounds[2:])]
            places: dict[str, list[Any]] = {
                "bbox": [bounds and dict(zip(_CORNERS, bounds, strict=True)) for bounds in boxes],
                "geometry": list(map(wkb, geometries)),
            }
            columns = [
                _column(field, places.get(field.name) or [row.get(field.name) for row in self._rows])
                for field in self._schema
            ]
            self._batches.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
            self._rows = []
        if self._batches and (last or sum(map(len, self._batches)) >= ROW_GROUP_ROWS):
            self._writer.write_table(pa.Table.from_batches(self._batches), row_group_size=ROW_GROUP_ROWS)
            self._batches = []


def open_embeddings(path: Path, info: EmbeddingsInfo) -> AbstractContextManager[Writer]:
    """Open a writer of results with embeddings, and with captions where ``info`` names their model.

    Raises:
        OutputError: The file cannot be written.
    """
    return open_file(path, partial(GeoParquetWriter, table=embeddings_table(info), info=info))


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


def _column(field: pa.Field, values: Sequence[Any]) -> pa.Array:
    """A column of the values of rows."""
    import pyarrow as pa

    if field.name == "embedding":
        vectors = np.zeros((len(values), field.type.list_size), field.type.value_type.to_pandas_dtype())
        missing = np.array([vector is None for vector in values])
        for row in np.flatnonzero(~missing).tolist():
            vectors[row] = values[row]
        return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=field.type, mask=pa.array(missing))
    if pa.types.is_string(field.type):  # names of files need not be UTF-8
        values = [value and value.encode("utf-8", "replace").decode() for value in values]
    elif pa.types.is_timestamp(field.type):
        values = [value and datetime.fromisoformat(value.replace("Z", "+00:00")) for value in values]
    return pa.array(values, field.type)
