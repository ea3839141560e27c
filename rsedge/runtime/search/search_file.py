"""A file of embeddings as search reads it: blocks of embeddings from row groups, and single rows by number.

pyarrow decodes a list column number by number, which takes twenty times as long as the product it is read for. But in a
data page of version 2 that is neither compressed nor encoded, the numbers of consecutive rows lie in one piece behind
the levels, so a reader that knows the page headers can fetch them like an array. Another layout is left to pyarrow.
Layout: https://parquet.apache.org/docs/file-format/ and parquet.thrift (compact protocol).
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import OptionError
from rsedge.runtime.outputs.geoparquet import METADATA_KEY, EmbeddingsInfo, embeddings_table, make_schema

if TYPE_CHECKING:
    from rsedge.runtime.outputs.records import Embedding

Rows = NDArray[np.int64]

BLOCK_BYTES = 2**21
"""Embeddings compared at a time: with what they become in float32 they stay in the cache."""

_FREE_ROWS = 1_000_000
"""Rows that a file may have however small it is; beyond, one for each byte."""
_LARGEST_CHUNK = 2**28  # bytes of a column of a row group, unpacked
_LONGEST_VALUE = 2**16  # bytes of a text or a geometry
_FREE_BYTES, _MOST_UNPACKED = 2**26, 16  # rsedge stores embeddings unpacked; these have as little in them as zeros do
_HEADER_BYTES = 1024  # of a page, without statistics about 40
_ITEM_SIZES = {"FLOAT": 4, "FIXED_LEN_BYTE_ARRAY": 2}  # of embeddings
_UNCOMPRESSED, _PLAIN, _DATA_PAGE_V2 = "UNCOMPRESSED", 0, 3


def block_rows(dim: int, itemsize: int) -> int:
    """Embeddings in a block."""
    return max(1, BLOCK_BYTES // (dim * itemsize))


class SearchFile:
    """Made by :meth:`open`; holds the file's metadata and nothing open, and may be read by several threads.

    Attributes:
        path: Where it is.
        info: The description of its embeddings that it holds.
        rows: Number of rows, those without an embedding included.
        groups: Number of row groups.
        starts: First row of each row group and, last, the number of rows; int64 [groups + 1].
        schema: pyarrow's schema of it.
        state: Size in bytes and time of last change in nanoseconds.
    """

    def __init__(self, path: Path, info: EmbeddingsInfo, opened: Any) -> None:
        self.path, self.info, self.schema = path, info, opened.schema_arrow
        metadata, state = opened.metadata, path.stat()
        self.rows, self.groups, self.state = (
            metadata.num_rows,
            metadata.num_row_groups,
            (state.st_size, state.st_mtime_ns),
        )
        sizes = [metadata.row_group(group).num_rows for group in range(self.groups)]
        self.starts: Rows = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        leaves = [opened.schema.column(number) for number in range(len(opened.schema))]
        (number,) = [number for number, leaf in enumerate(leaves) if leaf.path.split(".")[0] == "embedding"]
        self._leaf = (number, leaves[number].max_definition_level)
        self._metadata = metadata
        self._pieces: dict[int, list[Piece] | None] = {}
        self._local = threading.local()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SearchFile:
        """Check a file's schema and metadata.

        Raises:
            OptionError: It cannot be read, or is no file of embeddings.
        """
        path = Path(path)
        if path.exists() and not path.is_file():  # a pipe would be waited for, where no signal is heard
            raise OptionError(f"{path} is no regular file: give a file of embeddings, or a folder of them")
        with _opened(path) as file:
            # 1. Rows. Those that repeat take no room in a file, but in memory: real rows take hundreds of bytes.
            rows, size = file.metadata.num_rows, path.stat().st_size
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            if sum(sizes) != rows or min(sizes, default=0) < 0 or rows > _FREE_ROWS + size:
                raise OptionError(
                    f"{path} claims {rows} rows in {size} bytes, more than the {_FREE_ROWS + size} it may: embed again"
                )
            # 2. Columns. A few bytes can stand for as many numbers, or as long a text, as a stranger likes.
            for group, number in itertools.product(range(file.num_row_groups), range(file.metadata.num_columns)):
                column = file.metadata.row_group(group).column(number)
                if column.path_in_schema.startswith("embedding."):
                    most = _FREE_BYTES + _MOST_UNPACKED * column.total_compressed_size
                    size = column.num_values * _ITEM_SIZES.get(column.physical_type, 8)
                else:
                    most, size = _LARGEST_CHUNK, column.total_uncompressed_size
                if size > most:
                    raise OptionError(
                        f"{path} claims {size} bytes of {column.path_in_schema} in row group {group}, more than the "
                        f"{most} it may: embed again"
                    )
            # 3. The description of the embeddings.
            schema = file.schema_arrow
            stored = (schema.metadata or {}).get(METADATA_KEY)
            if stored is None:
                raise OptionError(
                    f"{path} is Parquet, but holds no embeddings of rsedge: make some with rsedge embed … -o "
                    "tiles.parquet"
                )
            try:
                info = EmbeddingsInfo.from_json(stored)
            except OptionError as error:
                raise OptionError(f"{path}: {error}") from error
            # 4. The schema.
            places = {name: schema.get_field_index(name) for name in schema.names}
            kinds = {name: str(schema.field(place).type) for name, place in places.items() if place >= 0}
            problems = [
                f"column {field.name} is {kind}, expected {field.type}"
                for field in make_schema(embeddings_table(info), info)
                if (kind := kinds.get(field.name, "missing")) != str(field.type)
                and (field.name, kind) != ("covered", "missing")  # files of 0.1.0 lack it
            ]
            if problems:
                raise OptionError(f"{path} was changed since rsedge wrote it: {'; '.join(problems)}; embed again")
            with reading(path):
                return cls(path, info, file)

    @property
    def dtype(self) -> np.dtype[np.float16] | np.dtype[np.float32]:
        """What embeddings are stored as."""
        return np.dtype(np.float16) if self.info.dtype == "float16" else np.dtype(np.float32)

    def check_unchanged(self) -> None:
        """Refuse a file that was written again, or taken away, since it was opened.

        Raises:
            OptionError: It was.
        """
        with reading(self.path):
            state = self.path.stat()
        if (state.st_size, state.st_mtime_ns) != self.state:
            raise OptionError(f"{self.path} was changed since it was opened: open it again")

    def parquet(self) -> Any:
        """The file as pyarrow's ``ParquetFile``, a context manager, without reading its footer again."""
        from pyarrow import parquet

        # Few rows of a group are wanted: texts stay numbers in a dictionary until they are taken.
        texts = [field.name for field in self.schema if _is_text(field)]
        return parquet.ParquetFile(self.path, metadata=self._metadata, read_dictionary=texts, pre_buffer=False)

    def check_texts(self, group: int) -> None:
        """Check the lengths of the texts of a row group before they are decoded. Raises OptionError: one is longer than
        any may be.
        """
        texts = [field.name for field in self.schema if _is_text(field)]
        with reading(self.path, group), self.parquet() as opened:
            for column in opened.read_row_group(group, columns=texts, use_threads=False).columns:
                for chunk in column.chunks:
                    check_lengths(chunk)

    def group_rows(self, group: int) -> int:
        """Rows in a row group."""
        return int(self.starts[group + 1] - self.starts[group])

    def blocks(self, group: int, keep: NDArray[np.bool_] | None = None) -> Iterator[tuple[Embedding, Rows]]:
        """The embeddings of a row group, a block at a time; ``keep``, bool [N], are the rows to read.

        Yields:
            Embeddings [n, D], valid until this thread asks for another block, and their row numbers in the file. Rows
            without an embedding are left out.

        Raises:
            OptionError: The file is damaged, or gone.
        """
        pieces = self._find(group)
        blocks = self._decode(group) if pieces is None else self._read(group, pieces, keep)
        for vectors, rows in blocks:
            if keep is None or (wanted := keep[rows - self.starts[group]]).all():
                yield vectors, rows
            elif wanted.any():
                yield vectors[wanted], rows[wanted]

    def vectors(self, rows: Sequence[int] | Rows) -> tuple[Embedding, Rows]:
        """The embeddings [n, D] of those of single rows that have one, and their row numbers, ascending.

        Raises:
            OptionError: The file is damaged, or gone.
        """
        wanted = np.unique(np.asarray(rows, np.int64))
        found: list[Any] = [np.empty((0, self.info.dim), self.dtype)]
        numbers: list[Rows] = [np.empty(0, np.int64)]
        groups = np.searchsorted(self.starts, wanted, side="right") - 1
        for group in np.unique(groups).tolist():
            keep = np.zeros(self.group_rows(group), np.bool_)
            keep[wanted[groups == group] - self.starts[group]] = True
            pieces = self._find(group)
            if pieces is None:
                parts = [(vectors.copy(), part) for vectors, part in self.blocks(group, keep)]
            else:
                parts = list(self._pick(group, pieces, keep))
            found += [vectors for vectors, _ in parts]
            numbers += [part for _, part in parts]
        return np.concatenate(found), np.concatenate(numbers)

    def _find(self, group: int) -> list[Piece] | None:
        if group not in self._pieces:
            column, level = self._leaf
            with reading(self.path, group), self.path.open("rb") as stream:
                self._pieces[group] = find_pieces(stream, self._metadata, level, group, column, self.info.dim)
        return self._pieces[group]

    def _read(
        self, group: int, pieces: Sequence[Piece], keep: NDArray[np.bool_] | None
    ) -> Iterator[tuple[Embedding, Rows]]:
        """Blocks as they lie in the file; those without a row to keep are not read."""
        dim, dtype = self.info.dim, self.dtype
        count = block_rows(dim, dtype.itemsize)
        # Room for a block, one per thread: fresh memory for each row group takes a tenth of the time of it all.
        buffer: NDArray[Any] | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) != count:
            buffer = self._local.buffer = np.empty((count, dim), dtype)
        with self._stream(group) as stream:
            for piece in pieces:
                present = piece.rows
                for first in range(0, len(present), count):
                    rows = present[first : first + count]
                    if keep is not None and not keep[rows].any():
                        continue
                    vectors = buffer[: len(rows)]
                    _fill(vectors, stream, piece.offset + first * dim * dtype.itemsize)
                    yield _native(vectors), rows + self.starts[group]

    def _pick(self, group: int, pieces: Sequence[Piece], keep: NDArray[np.bool_]) -> Iterator[tuple[Embedding, Rows]]:
        """Single embeddings."""
        size = self.info.dim * self.dtype.itemsize
        with self._stream(group) as stream:
            for piece in pieces:
                present = piece.rows
                places = np.flatnonzero(keep[present])
                vectors = np.empty((len(places), self.info.dim), self.dtype)
                for place, vector in zip(places.tolist(), vectors, strict=True):
                    _fill(vector, stream, piece.offset + place * size)
                yield _native(vectors), present[places] + self.starts[group]

    def _decode(self, group: int) -> Iterator[tuple[Embedding, Rows]]:
        """Blocks of what pyarrow makes of the row group."""
        count = block_rows(self.info.dim, self.dtype.itemsize)
        with _opened(self.path) as file, reading(self.path, group):
            (column,) = file.read_row_group(group, columns=["embedding"]).combine_chunks().columns
        found = column.chunk(0)
        vectors = found.values.to_numpy(zero_copy_only=False).reshape(-1, self.info.dim)[found.offset :]
        present = found.is_valid().to_numpy(zero_copy_only=False)
        for first in range(0, len(present), count):
            rows = np.flatnonzero(present[first : first + count]) + first
            yield vectors[rows], rows + self.starts[group]

    @contextmanager
    def _stream(self, group: int) -> Iterator[BinaryIO]:
        # Unbuffered reads, and no memory map: a file cut off while it is read is an error and no crash.
        with reading(self.path, group), self.path.open("rb", buffering=0) as stream:
            yield stream


def _fill(vectors: NDArray[Any], stream: BinaryIO, offset: int) -> None:
    """Read as many bytes as the vectors have, from ``offset`` on."""
    view = vectors.reshape(-1).view(np.uint8).data
    stream.seek(offset)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise OSError("the file ends early")
        done += count


def _native(vectors: NDArray[Any]) -> Any:
    """Parquet's little-endian numbers in the machine's order."""
    return vectors if sys.byteorder == "little" else vectors.byteswap()


@contextmanager
def reading(path: Path, group: int | None = None) -> Iterator[None]:
    """Turn what reading a file can raise into an OptionError that names the file and the row group."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError as error:
        raise OptionError(f"{path} is gone: put it back, or open another") from error
    except (OSError, pa.ArrowException, OverflowError, ValueError) as error:
        where = "" if group is None else f" in row group {group}"
        raise OptionError(f"{path} is damaged{where}: {error}; embed again") from error


def _is_text(field: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(field.type) or pa.types.is_binary(field.type))


def check_lengths(column: Any) -> None:
    """Raise OSError where the dictionary of a pyarrow array holds a longer text than any row may have: repeated, it
    would take a thousand times as much memory as here.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        longest = pc.max(pc.binary_length(column.dictionary)).as_py() or 0
        if longest > _LONGEST_VALUE:
            raise OSError(f"a text has {longest} bytes, and at most {_LONGEST_VALUE} are read")


def _opened(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile``, usable as a context manager."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except FileNotFoundError as error:
        raise OptionError(f"{path} does not exist: make it with rsedge embed … -o {path}") from error
    except (OSError, pa.ArrowException) as error:
        raise OptionError(f"{path} cannot be read as Parquet: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Consecutive rows whose embeddings lie one behind the other.

    Attributes:
        offset: First byte in the file.
        first: Number of the first row in the row group.
        count: Rows, those without an embedding included.
        missing: Which of them have none and take no place in the file, int64 from 0, ascending.
    """

    offset: int
    first: int
    count: int
    missing: NDArray[np.int64]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Row numbers in the row group, ascending, of the embeddings there."""
        rows = np.arange(self.first, self.first + self.count)
        return np.delete(rows, self.missing) if len(self.missing) else rows


class _OtherLayoutError(Exception):
    """The column is stored in a way that only pyarrow knows."""


def find_pieces(
    stream: BinaryIO, metadata: Any, max_level: int, group: int, column: int, dim: int
) -> list[Piece] | None:
    """The pieces of a row group in order, or None where pyarrow must decode the column.

    ``metadata`` is pyarrow's ``FileMetaData`` of the stream, ``column`` the number of the leaf column, and
    ``max_level`` the definition level of a number that is there.
    """
    rows = metadata.row_group(group).num_rows
    chunk = metadata.row_group(group).column(column)
    if chunk.compression != _UNCOMPRESSED or chunk.has_dictionary_page:
        return None
    itemsize = _ITEM_SIZES.get(chunk.physical_type)
    if itemsize is None:
        return None
    at, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    pieces, first = [], 0
    try:
        while first < rows:
            if not 0 < at < end:
                return None
            piece, at = _read_page(stream, at, first, rows - first, dim, itemsize, max_level)
            pieces.append(piece)
            first += piece.count
    except (_OtherLayoutError, LookupError, OSError, TypeError, ValueError, OverflowError, RecursionError):
        return None  # damage too: pyarrow says it better
    return pieces if first == rows and at <= end else None


def _read_page(
    stream: BinaryIO, at: int, first: int, most: int, dim: int, itemsize: int, max_level: int
) -> tuple[Piece, int]:
    """The piece of the page at ``at``, with row ``first`` and at most ``most`` rows, and where the next page begins."""
    stream.seek(at)
    reader = _Compact(stream.read(_HEADER_BYTES))
    header = reader.struct()
    size, page = header[3], header.get(8)
    if header[1] != _DATA_PAGE_V2 or page is None or page[4] != _PLAIN:
        raise _OtherLayoutError
    body = at + reader.at
    if not 0 <= page[2] <= page[3] <= most or page[3] < 1:  # arrays of that length would be made
        raise _OtherLayoutError
    entries, missing, rows = page[1], page[2], page[3]
    definition_bytes, repetition_bytes = page[5], page[6]
    values = (entries - missing) * itemsize
    # A row without an embedding is one entry, every other one is as many as it has numbers.
    if entries - missing != (rows - missing) * dim or size != repetition_bytes + definition_bytes + values:
        raise _OtherLayoutError
    absent = np.empty(0, np.int64)
    if missing:
        stream.seek(body + repetition_bytes)
        below = np.flatnonzero(_levels(stream.read(definition_bytes), max_level, entries) < max_level)
        if len(below) != missing:
            raise _OtherLayoutError
        before = np.arange(missing, dtype=np.int64)
        absent = (below - before) // dim + before
    return Piece(body + repetition_bytes + definition_bytes, first, rows, absent), body + size


def _levels(data: bytes, max_level: int, count: int) -> NDArray[np.uint8]:
    """``count`` levels in Parquet's hybrid of repeated values and packed bits."""
    width = max_level.bit_length()
    reader = _Compact(data)
    levels = np.empty(count, np.uint8)
    done = 0
    while done < count:
        run = reader.varint()
        if run & 1:  # groups of eight, ``width`` bits each
            packed = np.frombuffer(reader.take((run >> 1) * width), np.uint8)
            bits = np.unpackbits(packed, bitorder="little").reshape(-1, width)
            part = np.packbits(bits, axis=1, bitorder="little")[:, 0][: count - done]
            levels[done : done + len(part)] = part
            done += len(part)
        else:
            value = reader.take((width + 7) // 8)[0]
            levels[done : done + (run >> 1)] = value
            done += run >> 1
    return levels


class _Compact:
    """Reads Thrift's compact protocol, as far as page headers use it."""

    def __init__(self, data: bytes) -> None:
        self.at = 0
        self._data = data

    def take(self, count: int) -> bytes:
        """The next bytes."""
        taken = self._data[self.at : self.at + count]
        if len(taken) != count:
            raise _OtherLayoutError
        self.at += count
        return taken

    def varint(self) -> int:
        """A number of 7 bits a byte."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise _OtherLayoutError

    def struct(self) -> dict[int, Any]:
        """A struct as field number → value."""
        fields: dict[int, Any] = {}
        number = 0
        while (head := self.take(1)[0]) != 0:
            number = number + (head >> 4) if head >> 4 else _signed(self.varint())
            fields[number] = self._value(head & 0x0F)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2):  # a boolean is its type
            return kind == 1
        if kind in (4, 5, 6):  # i16, i32, i64
            return _signed(self.varint())
        if kind == 8:
            return self.take(self.varint())
        if kind == 12:
            return self.struct()
        raise _OtherLayoutError


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
