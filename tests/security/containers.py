"""Databases, arrays and other containers by the name of a GeoTIFF: harmless, but their libraries look around."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial

from tests import scenes
from tests.security.places import Case, Place, sqlite_file


def cases() -> Iterator[Case]:
    """One of each."""
    for name, make in _BINARIES.items():
        yield Case(f"as-{name}", "other container", make, own="any")


def _sqlite(*statements: str, name: str = "holiday.tif") -> Callable[[Place], str]:
    return lambda place: str(sqlite_file(place.folder / name, [text.format(place=place) for text in statements]))


def _written_by(driver: str, place: Place) -> str:
    return str(
        scenes.write(place.folder / "holiday.tif", scenes.pixels(3, 64, 64), driver=driver, crs=None, transform=None)
    )


def _zarr(place: Place) -> str:
    """A folder that GDAL reads as an array; its CRS is an address."""
    array = {"zarr_format": 2, "shape": [64, 64], "chunks": [64, 64], "dtype": "|u1", "order": "C", "fill_value": 0}
    array |= {"compressor": None, "filters": None}
    place.write("holiday.zarr/.zarray", json.dumps(array))
    attributes = {"_CRS": {"url": place.url("crs.wkt"), "wkt": str(place.outside / "secret.wkt")}}
    place.write("holiday.zarr/.zattrs", json.dumps(attributes))
    place.write("holiday.zarr/0.0", bytes(range(64)) * 64)
    return str(place.folder / "holiday.zarr")


_BINARIES: dict[str, Callable[[Place], str]] = {
    **{driver.lower(): partial(_written_by, driver) for driver in ("GPKG", "MBTiles", "NITF", "HFA", "PCIDSK", "BMP")},
    "rasterlite": _sqlite(
        "CREATE TABLE raster_pyramids (table_prefix TEXT, pixel_x_size REAL, pixel_y_size REAL, tile_count INTEGER)",
        "CREATE TABLE x_metadata (id INTEGER, source_name TEXT, tile_id INTEGER, width INTEGER, height INTEGER)",
        "CREATE TABLE x_rasters (id INTEGER, raster BLOB)",
    ),
    "sqlite-wal": _sqlite("PRAGMA journal_mode=WAL", "CREATE TABLE tiles (zoom_level INTEGER, tile_data BLOB)"),
    "hdf5-magic": lambda place: str(place.write("holiday.tif", b"\x89HDF\r\n\x1a\n" + bytes(2000))),
    "netcdf-magic": lambda place: str(place.write("holiday.tif", b"CDF\x01" + bytes(2000))),
    "hdf4-magic": lambda place: str(place.write("holiday.tif", b"\x0e\x03\x13\x01" + bytes(2000))),
    "grib-magic": lambda place: str(place.write("holiday.tif", b"GRIB" + bytes(2000))),
    "zarr-folder": _zarr,
}
