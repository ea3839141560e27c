"""Where the numbers of an embedding column lie in a Parquet file, to be read as they are.

pyarrow decodes a list column number by number, which takes twenty times as long as the product it is read for. But in a
data page of version 2 that is neither compressed nor encoded, the numbers of consecutive rows lie in one piece behind
the levels, so a reader that knows the page headers can fetch them like an array. What is laid out in another way is
left to pyarrow. Layout: https://parquet.apache.org/docs/file-format/ and parquet.thrift (compact protocol).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HEADER_BYTES = 1024  # a header without statistics takes about 40
_UNCOMPRESSED, _PLAIN, _DATA_PAGE_V2 = "UNCOMPRESSED", 0, 3


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
    """The embeddings of a row group.

    Args:
        stream: The file, opened for reading bytes.
        metadata: pyarrow's ``FileMetaData`` of it.
        max_level: Definition level of a number that is there.
        group: Number of the row group.
        column: Number of the leaf column.
        dim: Numbers in an embedding.

    Returns:
        The pieces in order, or None where pyarrow must decode the column.
    """
    rows = metadata.row_group(group).num_rows
    chunk = metadata.row_group(group).column(column)
    if chunk.compression != _UNCOMPRESSED or chunk.has_dictionary_page:
        return None
    itemsize = {"FLOAT": 4, "FIXED_LEN_BYTE_ARRAY": 2}.get(chunk.physical_type)
    if itemsize is None:
        return None
    at, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    pieces: list[Piece] = []
    first = 0
    try:
        while first < rows:
            if not 0 < at < end:
                return None
            piece, at = _read_page(stream, at, first, rows - first, dim, itemsize, max_level)
            pieces.append(piece)
            first += piece.count
    except (
        _OtherLayoutError,
        LookupError,
        OSError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ):  # damage too: pyarrow says it better
        return None
    return pieces if first == rows and at <= end else None


def _read_page(
    stream: BinaryIO, at: int, first: int, most: int, dim: int, itemsize: int, max_level: int
) -> tuple[Piece, int]:
    """The piece of the page at ``at``, whose first row is ``first`` of ``most`` that are left, and where the next page
    begins.
    """
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
