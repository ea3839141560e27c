"""An acquisition as files: what a SAFE product, a folder of bands and a STAC item all come down to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class BandFile:
    """Where one band is.

    Attributes:
        path: What GDAL opens: a file, or a name such as ``/vsizip/…`` or ``/vsicurl/…``.
        band: Its number there, from 1.
    """

    path: str
    band: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The ground of a product as its metadata tell it, for band files that do not say where they lie.

    Attributes:
        crs: Coordinate reference system, such as ``EPSG:32629``.
        left, top: Upper left corner in its units.
        width, height: In its units.
    """

    crs: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One acquisition over one tile of ground; no pixel has been read.

    Attributes:
        name: What records call the scene.
        source: What the user named, for messages.
        bands: ``red``, ``green`` and ``blue`` → where.
        reason: Why these bands, as one clause for people.
        visual: Whether the bands are 8-bit colours (a TCI) and no reflectance.
        scl: The scene classification of Sen2Cor, or None.
        extent: Where it lies, or None where only its files say so.
        boa_offset: What metadata say is to be added to digital numbers, or None where they say nothing.
        quantification: Digital numbers per unit of reflectance as metadata say, or None.
        baseline: Processing baseline, such as ``05.09``, or None.
        datetime: Acquisition time, RFC 3339 in UTC, or None.
        product_id: Identifier of the product, or None.
        mgrs_tile: Tile in the Military Grid Reference System, such as ``29RKH``, or None.
        files: Local files whose change changes the records, metadata and the zip around them included.
        warnings: What the user should know, one line each.
    """

    name: str
    source: str
    bands: Mapping[str, BandFile]
    reason: str
    visual: bool = False
    scl: BandFile | None = None
    extent: Extent | None = None
    boa_offset: int | None = None
    quantification: float | None = None
    baseline: str | None = None
    datetime: str | None = None
    product_id: str | None = None
    mgrs_tile: str | None = None
    files: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def paths(self) -> list[str]:
        """What GDAL opens for its bands and its scene classification."""
        return [file.path for file in (*self.bands.values(), self.scl) if file]

    def at(self, paths: Mapping[str, str]) -> Product:
        """The product with files at other paths: ``paths`` has those that differ."""
        bands = {colour: replace(file, path=paths.get(file.path, file.path)) for colour, file in self.bands.items()}
        scl = replace(self.scl, path=paths.get(self.scl.path, self.scl.path)) if self.scl else None
        return replace(self, bands=bands, scl=scl)
