"""An acquisition as files: what a SAFE product, a folder of bands and a STAC item all come down to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

PER_BAND = -1
"""In place of the number of a mask's band: each band of the raster has a mask of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BandFile:
    """Where one band is."""

    path: str  # what GDAL opens: a file, or a name such as ``/vsizip/…`` or ``/vsicurl/…``
    band: int = 1  # its number there, from 1, or ``PER_BAND``


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The ground of a product as its metadata tell it, for band files that do not say where they lie."""

    crs: str  # coordinate reference system, such as ``EPSG:32629``
    left: float  # and top: upper left corner in its units
    top: float
    width: float  # and height: in its units
    height: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One acquisition over one tile of ground; no pixel has been read."""

    name: str  # what records call the scene
    source: str  # what the user named, for messages
    bands: Mapping[str, BandFile]  # ``red``, ``green`` and ``blue`` → where
    reason: str  # why these bands, as one clause for people
    visual: bool = False  # whether the bands are 8-bit colours (a TCI) and no reflectance
    scl: BandFile | None = None  # the scene classification of Sen2Cor, or None
    extent: Extent | None = None  # where it lies, or None where only its files say so
    # what metadata say is to be added to digital numbers, of all bands or of each; None where they say nothing
    boa_offset: int | tuple[int, ...] | None = None
    # digital numbers per unit of reflectance as metadata say, of all bands or of each, or None
    quantification: float | tuple[float, ...] | None = None
    sentinel2: bool = True  # false if its metadata name another sensor, whose digital numbers have offsets of their own
    baseline: str | None = None  # processing baseline, such as ``05.09``, or None
    datetime: str | None = None  # acquisition time, RFC 3339 in UTC, or None
    product_id: str | None = None  # identifier of the product, or None
    mgrs_tile: str | None = None  # tile in the Military Grid Reference System, such as ``29RKH``, or None
    # local files whose change changes the records, metadata and the zip around them included
    files: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # what the user should know, one line each

    @property
    def paths(self) -> list[str]:
        """What GDAL opens for its bands and its scene classification."""
        return [file.path for file in (*self.bands.values(), self.scl) if file]

    def at(self, paths: Mapping[str, str]) -> Product:
        """The product with files at other paths: ``paths`` has those that differ."""
        bands = {colour: replace(file, path=paths.get(file.path, file.path)) for colour, file in self.bands.items()}
        scl = replace(self.scl, path=paths.get(self.scl.path, self.scl.path)) if self.scl else None
        return replace(self, bands=bands, scl=scl)
