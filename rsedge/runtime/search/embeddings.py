"""Reading files of embeddings: checked when opened, then a row group at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsedge.errors import OptionError
from rsedge.runtime.outputs.geoparquet import METADATA_KEY, EmbeddingsInfo, embeddings_table, make_schema

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from rsedge.runtime.outputs.records import Embedding


_FREE_ROWS = 1_000_000
"""Rows that a file may have however small it is; beyond, one for each byte."""


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingBatch:
    """Consecutive rows of a file.

    Attributes:
        first: Number of the first row in the file.
        rows: The columns asked for, without ``embedding``.
        embeddings: float16 or float32 [N, dim]; what stands where ``present`` is False means nothing.
        present: bool [N], False for tiles without an embedding.
    """

    first: int
    rows: pa.RecordBatch
    embeddings: Embedding
    present: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class EmbeddingFile:
    """A GeoParquet file of embeddings. Made by ``EmbeddingFile.open``; holds nothing open.

    Attributes:
        path: Where it is.
        info: What it says of its embeddings.
        rows: Number of rows, those without an embedding included.
        groups: Number of row groups.
        columns: Names of the columns, ``embedding`` excepted.
    """

    path: Path
    info: EmbeddingsInfo
    rows: int
    groups: int
    columns: tuple[str, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> EmbeddingFile:
        """Check a file's schema and metadata.

        Raises:
            OptionError: It cannot be read, or is no file of embeddings.
        """
        path = Path(path)
        with _opened(path) as file:
            schema = file.schema_arrow
            rows, size = file.metadata.num_rows, path.stat().st_size
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            # What repeats takes no room in a file, but in memory: real rows take hundreds of bytes, empty ones a few.
            if sum(sizes) != rows or min(sizes, default=0) < 0 or rows > _FREE_ROWS + size:
                raise OptionError(
                    f"{path} claims {rows} rows in {size} bytes, more than the {_FREE_ROWS + size} it may: embed again"
                )
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
            wanted = make_schema(embeddings_table(info), info)
            problems = [
                f"column {field.name} is {_kind(schema, field.name)}, expected {field.type}"
                for field in wanted
                if _kind(schema, field.name) != str(field.type)
            ]
            if problems:
                raise OptionError(f"{path} was changed since rsedge wrote it: {'; '.join(problems)}; embed again")
            columns = tuple(name for name in schema.names if name != "embedding")
            return cls(path, info, file.metadata.num_rows, file.num_row_groups, columns)

    def batches(
        self, columns: Sequence[str] | None = None, *, groups: Sequence[int] | None = None
    ) -> Iterator[EmbeddingBatch]:
        """The rows in order, a row group at a time.

        Args:
            columns: Columns to read beside the embeddings; None reads all.
            groups: Numbers of the row groups to read; None reads all.

        Raises:
            OptionError: The file is damaged, or gone.
        """
        import pyarrow as pa

        names = [*(self.columns if columns is None else columns), "embedding"]
        with _opened(self.path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            for group in range(self.groups) if groups is None else groups:
                try:
                    table = file.read_row_group(group, columns=names)
                except (OSError, pa.ArrowException) as error:
                    raise OptionError(f"{self.path} is damaged in row group {group}: {error}; embed again") from error
                (rows,) = table.combine_chunks().to_batches()
                found = rows.column(rows.schema.get_field_index("embedding"))
                vectors = found.values.to_numpy(zero_copy_only=False).reshape(-1, self.info.dim)
                yield EmbeddingBatch(
                    first=sum(sizes[:group]),
                    rows=rows.drop_columns(["embedding"]),
                    embeddings=vectors[found.offset : found.offset + len(found)],
                    present=found.is_valid().to_numpy(zero_copy_only=False),
                )


def _kind(schema: pa.Schema, name: str) -> str:
    index = schema.get_field_index(name)
    return "missing" if index < 0 else str(schema.field(index).type)


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
