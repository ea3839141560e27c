"""An approximate index beside a file of embeddings: FAISS, one bit a dimension, candidates compared exactly.

Embeddings are sorted into cells round centres found by k-means (IVF), and each is kept as the signs of its randomly
rotated difference from its centre with two factors (RaBitQ): 36 bytes for 128 numbers, 84 for 512. A search looks into
the cells nearest to the query and reads the best candidates' embeddings from the file itself, so scores and their order
are exact; only which tiles are compared is not. The index is a cache: it says of which file it is, and is refused for
any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge.errors import BackendError, OptionError
from rsedge.jsonvalues import parse_json
from rsedge.runtime.outputs.files import whole_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rsedge.runtime.search.search_file import SearchFile

WORTHWHILE_ROWS = 2_000_000
"""Tiles from which on an index that exists is used unasked: comparing as many exactly takes about a second."""

_MAGIC = b"rsedge index 1\n"
_SAMPLE_PER_CELL = 40  # FAISS wants 39 at least
_QUERY_BITS = 8
_LARGEST_KEY = 2**16


def _key(file: SearchFile) -> dict[str, Any]:
    """Which file, in which state, an index is of."""
    size, mtime_ns = file.state
    return {
        "size": size,
        "mtime_ns": mtime_ns,
        "rows": file.rows,
        "dim": file.info.dim,
        "model_hash": file.info.model_hash,
    }


def index_path(file: SearchFile) -> Path:
    """Where the index of a file is kept: beside it."""
    return file.path.with_name(f"{file.path.name}.index")


def build(file: SearchFile, *, cells: int | None = None, progress: Callable[[int, int], None] | None = None) -> Path:
    """Make the index of a file, or make it again; ``progress`` is called with the rows done and their number.

    ``cells`` None takes 2 √N cells for N rows, and not so many that they hold fewer than 40 each.

    Raises:
        BackendError: FAISS is not installed.
        OptionError: There are no embeddings, or the file is damaged.
        OutputError: The index cannot be written.
    """
    faiss = _faiss()
    if cells is not None and not 1 <= cells <= max(1, file.rows):
        raise OptionError(f"cells is {cells}, expected 1 to the {file.rows} rows of {file.path}")
    file.check_unchanged()
    count = cells or max(1, min(int(2 * math.sqrt(file.rows)), file.rows // _SAMPLE_PER_CELL))
    # 1. A sample to find the cells in, spread over the file; the same each time.
    generator = np.random.default_rng(0)
    share = min(1.0, count * _SAMPLE_PER_CELL / max(1, file.rows))
    parts = [np.empty((0, file.info.dim), np.float32)]
    for group in range(file.groups):
        chosen = generator.random(file.group_rows(group)) < share
        parts += [vectors.astype(np.float32) for vectors, _ in file.blocks(group, chosen)]
    sample = np.concatenate(parts)
    sample = sample[np.isfinite(sample).all(axis=1)]
    if not len(sample):
        raise OptionError(f"{file.path} holds no embeddings: nothing can be indexed")
    count = min(count, len(sample))
    index = faiss.index_factory(file.info.dim, f"IVF{count},RaBitQ", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # small files are indexed too, and need no warning
    index.train(sample)
    del sample, parts
    # 2. All embeddings.
    for group in range(file.groups):
        for vectors, rows in file.blocks(group):
            wide = np.nan_to_num(vectors.astype(np.float32), posinf=0, neginf=0)
            index.add_with_ids(wide, rows)
        if progress:
            progress(int(file.starts[group + 1]), file.rows)
    file.check_unchanged()
    path = index_path(file)
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        stream.write(_MAGIC + json.dumps(_key(file)).encode() + b"\n")
        writer = faiss.PyCallbackIOWriter(stream.write)
        faiss.write_index(index, writer)
        del writer  # flushes
    return path


class Approximate:
    """The index of a file, ready to be searched; made by :meth:`open`."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def open(cls, file: SearchFile) -> Approximate:
        """Read the index beside a file.

        Raises:
            BackendError: FAISS is not installed.
            OptionError: There is none, it is damaged, or it is of another state of the file; says how to make it.
        """
        faiss = _faiss()
        path = index_path(file)
        remedy = f"make it with rsedge search --build-index {file.path}, or search with --exact"
        try:
            with path.open("rb") as stream:
                if stream.readline(len(_MAGIC)) != _MAGIC:
                    raise ValueError("it does not begin as one of this version")
                key = parse_json(stream.readline(_LARGEST_KEY))
                if not isinstance(key, dict):
                    raise ValueError("it does not say which file it is of")
                if key == _key(file):
                    return cls(faiss.read_index(faiss.PyCallbackIOReader(stream.read)))
        except FileNotFoundError:
            raise OptionError(f"{file.path} has no index {path.name}: {remedy}") from None
        except (OSError, ValueError, RuntimeError) as error:
            raise OptionError(f"{path} cannot be read as an index: {error}; {remedy}") from error
        changed = [name for name, value in _key(file).items() if key.get(name) != value]
        raise OptionError(f"{path} is out of date: {file.path} has another {', '.join(changed)}; {remedy}")

    def candidates(
        self, query: NDArray[np.float64], count: int, *, keep: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int64]:
        """Rows, int64 [n], that are probably among the nearest to the unit vector ``query``, float64 [D].

        They are at most ``count``, from a sixteenth of the cells, at least 32, and among ``keep``, bool [rows].
        """
        faiss, cells = _faiss(), int(self._index.nlist)
        probes = min(cells, max(32, cells // 16))
        selector = None
        if keep is not None:
            bits = np.packbits(keep, bitorder="little")
            selector = faiss.IDSelectorBitmap(len(keep), faiss.swig_ptr(bits))
        parameters = faiss.IVFRaBitQSearchParameters(nprobe=probes, qb=_QUERY_BITS, sel=selector)
        _, rows = self._index.search(query.astype(np.float32)[None], count, params=parameters)
        found: NDArray[np.int64] = rows[0][rows[0] >= 0]
        return found


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise BackendError("an approximate index needs faiss: pip install 'rsedge[search]', or use --exact") from error
    return faiss
