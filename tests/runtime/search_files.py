"""Files of embeddings for the tests of search, in any layout Parquet allows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from rsedge.runtime.outputs.geometry import bounding_box, wkb
from rsedge.runtime.outputs.geoparquet import EmbeddingsInfo, embeddings_table, make_schema
from rsedge.runtime.search.search_file import SearchFile

MODEL_HASH = "0123456789ab" + "c" * 52
TIME = datetime(2024, 5, 31, 10, 30, tzinfo=timezone.utc)


def unit_vectors(rows: int, dim: int, seed: int = 0, dtype: str = "float16") -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)


def box(west: float, south: float, east: float, north: float) -> dict[str, Any]:
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {"type": "Polygon", "coordinates": [ring]}


def write_file(
    path: Path,
    vectors: np.ndarray,
    /,
    *,
    missing: Sequence[int] = (),
    geometries: Sequence[dict[str, Any] | None] | None = None,
    model_hash: str = MODEL_HASH,
    model: str = "clip@0123456789ab",
    plain: bool = True,
    group_rows: int = 100,
    captions: bool = False,
    page_bytes: int = 2**26,
    **columns: Sequence[Any],
) -> Path:
    """Write ``vectors`` [N, D]; ``plain`` stores them uncompressed in version 2 pages, else zstd in version 1."""
    rows, dim = vectors.shape
    caption_model = "blip@abcdefabcdef" if captions else None
    info = EmbeddingsInfo(
        model=model, model_hash=model_hash, dim=dim, dtype=vectors.dtype.name, caption_model=caption_model
    )
    absent = np.zeros(rows, np.bool_)
    absent[list(missing)] = True
    geometries = geometries or [box(k % 100, k // 100, k % 100 + 1, k // 100 + 1) for k in range(rows)]
    values: dict[str, Sequence[Any]] = {
        "scene": [path.stem] * rows,
        "row": [k // 10 for k in range(rows)],
        "col": [k % 10 for k in range(rows)],
        "row_off": [k // 10 * 8 for k in range(rows)],
        "col_off": [k % 10 * 8 for k in range(rows)],
        "width": [8] * rows,
        "height": [8] * rows,
        "caption": ["a field"] * rows,
        "score": [-0.5] * rows,
        "status": ["nodata" if gone else "ok" for gone in absent],
        "nodata_fraction": [0.0] * rows,
        "cloud_fraction": [None] * rows,
        "datetime": [TIME] * rows,
        "model": [model] * rows,
        "message": [None] * rows,
        **{name: [None] * rows for name in ("scene_crs", "product_id", "mgrs_tile", "rendering")},
        "covered": [1.0] * rows,
        "path": [None] * rows,
        "bbox": [
            each and dict(zip(("xmin", "ymin", "xmax", "ymax"), bounding_box(each), strict=True)) for each in geometries
        ],
        "geometry": [wkb(each) for each in geometries],
        **columns,
    }
    schema = make_schema(embeddings_table(info), info)
    arrays = [pa.array(values[field.name], field.type) for field in schema if field.name != "embedding"]
    kind = schema.field("embedding").type
    arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=kind, mask=pa.array(absent)))
    table = pa.table(arrays, schema=schema.with_metadata({"rsedge": info.to_json()}))
    layout: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["scene", "status", "model"]}
    if plain:
        layout["compression"] = {"embedding.list.element": "none", "scene": "zstd"}
        layout["data_page_version"] = "2.0"
    parquet.write_table(table, path, row_group_size=group_rows, data_page_size=page_bytes, **layout)
    return path


def read_embeddings(path: Path | str) -> list[np.ndarray | None]:
    """The embedding of each row, None where it has none."""
    file = SearchFile.open(path)
    found: list[np.ndarray | None] = [None] * file.rows
    for group in range(file.groups):
        for vectors, rows in file.blocks(group):
            for vector, row in zip(vectors, rows.tolist(), strict=True):
                found[row] = vector.copy()
    return found


def brute_force(vectors: np.ndarray, query: np.ndarray, allowed: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and cosines of the nearest, in float64; the first of equals comes first."""
    scores = vectors.astype(np.float64) @ (query.astype(np.float64) / np.linalg.norm(query.astype(np.float64)))
    scores[~allowed] = -np.inf
    order = np.argsort(-scores, kind="stable")[: min(top, int(allowed.sum()))]
    return order, scores[order]
