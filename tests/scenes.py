"""Seeded generators of small rasters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine, from_origin

UTM = {"crs": "EPSG:32632", "transform": from_origin(600000, 5100000, 10, 10)}


def pixels(bands: int, height: int, width: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    """[bands, height, width] without zeros, different everywhere: noise on a slope, so that any shift shows."""
    generator = np.random.default_rng(seed)
    top = 250 if dtype == "uint8" else 3500
    slope = np.add.outer(np.arange(height), np.arange(width)) / (height + width) * top * 0.6
    noise = generator.integers(1, int(top * 0.4), size=(bands, height, width))
    return (slope + noise).astype(dtype)


def write(
    path: Path,
    data: np.ndarray,
    *,
    driver: str = "GTiff",
    descriptions: tuple[str, ...] | None = None,
    tags: dict[str, str] | None = None,
    mask: np.ndarray | None = None,
    colormap: dict[int, tuple[int, int, int, int]] | None = None,
    crs: Any = UTM["crs"],
    transform: Affine | None = UTM["transform"],
    **options: Any,
) -> Path:
    """Write [bands, height, width] as a raster; ``options`` are GDAL's creation options."""
    bands, height, width = data.shape
    profile = {"driver": driver, "count": bands, "height": height, "width": width, "dtype": data.dtype, **options}
    if crs is not None:
        profile["crs"] = crs
    if transform is not None:
        profile["transform"] = transform
    with (
        warnings.catch_warnings(),
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
    ):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", **profile) as dataset:
            dataset.write(data)
            for index, text in enumerate(descriptions or (), 1):
                dataset.set_band_description(index, text)
            if tags:
                dataset.update_tags(**tags)
            if mask is not None:
                dataset.write_mask(mask)
            if colormap is not None:
                dataset.write_colormap(1, colormap)
    return path


def truncate(path: Path, share: float) -> Path:
    """Cut the end of a file off, as an interrupted download does."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path
