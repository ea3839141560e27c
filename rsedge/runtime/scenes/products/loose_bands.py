"""Single-band rasters of Sentinel-2 that lie beside each other, such as ``…_B04.tif``, ``…_B03.tif`` and ``…_B02.tif``.

All that is known of them is in their names and in those of the folders around them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from rsedge.errors import SceneError
from rsedge.runtime.scenes.access import LOCAL, Access
from rsedge.runtime.scenes.products.product import BandFile, Product
from rsedge.runtime.scenes.products.sentinel2 import ProductName, acquisition_time, baseline_offset, printable
from rsedge.runtime.scenes.sensors import HLS, SENTINEL2, known_sensor

_COLOURS = {"red": "B04", "green": "B03", "blue": "B02"}
_SUFFIXES = (".tif", ".tiff", ".jp2")  # where a band is there twice, the one that is read faster is taken
# T34UCF_20230823T095559_B04_10m, B04, scene-B4, 20230823T095559_…_T34UCF.B4: what stands before, the band, its grid.
_BAND_NAME = re.compile(r"(?P<prefix>.*?)(?:(?<=[_.-])|^)(?P<band>B0?[234]|SCL)(?:_(?P<metres>\d{2})m)?", re.IGNORECASE)
_NATIVE = {"SCL": 20}  # metres where a name does not say; other bands: 10
_ANCESTORS = 5  # of a band in a .SAFE folder: R10m, IMG_DATA, the granule, GRANULE, the product


@dataclass(frozen=True, slots=True)
class _Band:
    path: Path
    prefix: str
    band: str
    metres: int

    @classmethod
    def of(cls, path: Path) -> _Band | None:
        """The band that a file is by its name, or None."""
        match = _BAND_NAME.fullmatch(path.stem) if path.suffix.lower() in _SUFFIXES else None
        sensor = known_sensor([], [path.stem]) if match else None
        if not match or sensor not in (None, SENTINEL2, HLS):
            return None
        name = match["band"].upper()
        # B4 without a name of Sentinel-2 may be Landsat 7's near infrared.
        if name in ("B2", "B3", "B4") and sensor is None and not ProductName.parse(path.stem):
            around = (known_sensor([], [parent.name]) for parent in path.absolute().parents[:_ANCESTORS])
            if SENTINEL2 not in around:
                return None
        band = name if name == "SCL" else f"B0{name[-1]}"
        return cls(path, match["prefix"].rstrip("_.-"), band, int(match["metres"] or _NATIVE.get(band, 10)))


def read_loose_bands(source: str | os.PathLike[str], *, access: Access = LOCAL) -> list[Product]:
    """The acquisitions whose red, green and blue lie as files of one band each in a folder, in the order of names.

    Bands belong together when the same stands before the name of the band. A scene classification (SCL) with the same
    before it rides along, from ``R20m`` beside a folder ``R10m`` too. Metadata files beside them are not read.

    Args:
        source: The folder, an ``IMG_DATA`` folder with ``R10m`` in it, or one of the three files.
        access: Folders that links among the files may lead to, beside the folder.

    Returns:
        The products; the one of its file where a file is named. Empty where there is no whole set of three.

    Raises:
        SceneError: The folder cannot be listed, or a link leads out of it.
    """
    path = Path(source)
    if path.is_dir():
        folder = path / "R10m" if (path / "R10m").is_dir() else path
        return _products(os.fspath(source), folder, access)
    product = sibling_bands(path, access=access)
    return [product] if product else []


def sibling_bands(path: str | os.PathLike[str], *, access: Access = LOCAL) -> Product | None:
    """The acquisition of a file that is its red, green or blue band; None for another, or where one is missing."""
    file = Path(path)
    band = _Band.of(file) if file.is_file() else None
    if band is None or band.band not in _COLOURS.values():
        return None
    return next(iter(_products(os.fspath(path), file.parent, access, only=band.prefix)), None)


def _products(source: str, folder: Path, access: Access, *, only: str | None = None) -> list[Product]:
    # 1. Band files by what stands before the name of the band.
    groups: dict[str, list[_Band]] = {}
    for band in _bands(folder):
        groups.setdefault(band.prefix, []).append(band)
    if folder.name == "R10m":
        for band in _bands(folder.parent / "R20m"):
            if band.band == "SCL" and band.prefix in groups:
                groups[band.prefix].append(band)
    # 2. Of each band the finest; a product where none is missing.
    products, warnings = [], []
    for prefix, bands in sorted(groups.items()):
        if only is not None and prefix != only:
            continue
        chosen: dict[str, _Band] = {}
        for band in sorted(
            bands, key=lambda each: (each.metres, _SUFFIXES.index(each.path.suffix.lower()), each.path.name)
        ):
            chosen.setdefault(band.band, band)
        missing = [name for name in _COLOURS.values() if name not in chosen]
        if not missing:
            products.append(_product(source, folder, prefix, chosen, access, alone=len(groups) == 1))
        elif chosen.keys() - {"SCL"}:
            there = ", ".join(sorted(printable(band.path.name) for band in chosen.values()))
            warnings.append(f"{source}: {there} left out, as the same scene lacks {' and '.join(missing)}")
    if products and warnings:
        products[0] = replace(products[0], warnings=(*products[0].warnings, *warnings))
    return products


def _bands(folder: Path) -> list[_Band]:
    if not folder.is_dir():
        return []
    try:
        found = [_Band.of(Path(entry.path)) for entry in os.scandir(folder)]
        return [band for band in found if band and band.path.is_file()]
    except OSError as error:
        raise SceneError(f"{folder} cannot be listed: {error.strerror}; check its permissions") from error


def _product(
    source: str, folder: Path, prefix: str, chosen: dict[str, _Band], access: Access, *, alone: bool
) -> Product:
    said = ProductName.parse(prefix)
    around = _around(folder, said) if said or not prefix or alone else None
    told = [name for name in (said, around) if name]
    baseline = next((name.baseline for name in told if name.baseline), None)
    home = folder.parent if folder.name == "R10m" else folder  # SCL lies in R20m
    files = {
        name: str(access.confine(band.path, home, what=f"{printable(band.path.name)} in {source}"))
        for name, band in chosen.items()
    }
    grids = sorted({chosen[band].metres for band in _COLOURS.values()})
    reason = "B04, B03, B02 by the names of files beside each other"
    return Product(
        name=printable(prefix or folder.resolve().name),
        source=source,
        bands={colour: BandFile(path=files[band]) for colour, band in _COLOURS.items()},
        reason=reason + (f", at {' and '.join(map(str, grids))} m" if grids != [10] else ""),
        scl=BandFile(path=files["SCL"]) if "SCL" in files else None,
        boa_offset=baseline_offset(baseline) if baseline else None,
        baseline=baseline,
        datetime=acquisition_time({}, prefix) or next((name.datetime for name in told if name.datetime), None),
        product_id=next((name.product_id for name in told if name.product_id), None),
        mgrs_tile=next((name.mgrs_tile for name in told if name.mgrs_tile), None),
        files=tuple(sorted(files.values())),
    )


def _around(folder: Path, said: ProductName | None) -> ProductName | None:
    """What the nearest folder that is named as a product says, unless it is of another place or day than the files."""
    here = folder.resolve()
    for parent in (here, *here.parents[: _ANCESTORS - 1]):
        name = ProductName.parse(parent.name)
        if name is None or name.product_id is None:
            continue
        of_files = (said.mgrs_tile, (said.datetime or "")[:10]) if said else (None, None)
        pairs = zip(of_files, (name.mgrs_tile, (name.datetime or "")[:10]), strict=True)
        return name if all(not own or not other or own == other for own, other in pairs) else None
    return None
