"""Files beside a raster. GDAL is kept from them, because each may be of any format and name any other file.

A mask (``.msk``) is opened through the gate like any raster. Where the raster says nothing of its place on a map, the
coordinate reference system and the geotransform of ``.aux.xml``, or a world file, are read here. What else would change
the pixels is named in a warning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from rasterio.enums import ColorInterp, MaskFlags
from rasterio.transform import Affine

from rsedge.errors import SceneError
from rsedge.runtime.scenes.access import is_plain_xml
from rsedge.runtime.scenes.gdal import open_dataset
from rsedge.runtime.scenes.products.product import BandFile
from rsedge.runtime.scenes.reference import parse_reference

if TYPE_CHECKING:
    from rsedge.runtime.scenes.access import Access

# What of GDAL's own sidecar decides pixels or place; statistics and names do not.
_DECIDES = (b"<NoDataValue", b"<GCPList", b"<ColorInterp", b"<Scale", b"<Offset")
_LARGEST = 2**20  # bytes of a text beside a raster
_WORLD_FILES = {"tif": "tfw", "tiff": "tfw", "jp2": "j2w", "png": "pgw", "jpg": "jgw", "jpeg": "jgw", "webp": "wldx"}
_PER_DATASET = "2"


def mask_beside(target: str, dataset: Any, access: Access) -> tuple[BandFile | None, str | None]:
    """The mask in ``FILE.msk``, where the raster has no mask and no transparency of its own.

    Args:
        target: The raster, as the gate opened it.
        dataset: It, open.
        access: What the mask may touch.

    Returns:
        The mask, or None; and a warning where there is one that is not used.
    """
    path = Path(f"{target}.msk")
    own = any(MaskFlags.per_dataset in flags for flags in dataset.mask_flag_enums)
    if target.startswith("/vsi") or own or ColorInterp.alpha in dataset.colorinterp or not path.is_file():
        return None, None
    if not _lies_beside(path):
        return None, f"{path} is not used as a mask: it is a link to a file elsewhere"
    try:
        with open_dataset(str(path), access) as mask:
            if mask.driver != "GTiff":
                return None, f"{path} is not used as a mask: it is {mask.driver}, and masks are TIFF"
            if mask.shape != dataset.shape:
                return None, f"{path} is not used as a mask: it has {mask.width} x {mask.height} px, the raster others"
            if mask.tags().get("INTERNAL_MASK_FLAGS_1", _PER_DATASET) != _PER_DATASET and mask.count > 1:
                return None, f"{path} is not used as a mask: it has one for each band"
    except SceneError as error:
        return None, f"{path} is not used as a mask: {error}"
    return BandFile(path=str(path)), None


def place_beside(name: str) -> tuple[Any, Affine | None]:
    """The coordinate reference system and the geotransform that files beside a raster state; None each where none does.

    Args:
        name: Path of a raster that says nothing of its place itself.
    """
    path = Path(name)
    crs, transform = None, None
    try:
        beside = Path(f"{name}.aux.xml")
        if beside.is_file() and _lies_beside(beside) and beside.stat().st_size <= _LARGEST:
            text = beside.read_bytes()
            if is_plain_xml(text):
                root = ElementTree.fromstring(text)
                stated = (root.findtext("SRS") or "").strip()
                transform = _affine((root.findtext("GeoTransform") or "").split(","))
                crs = parse_reference(stated) if stated else None
        world = _WORLD_FILES.get(path.suffix.lower().lstrip("."))
        file = path.with_suffix(f".{world}")
        if transform is None and world and file.is_file() and _lies_beside(file):
            with file.open("rb") as opened:
                a, d, b, e, x, y = opened.read(1024).decode("ascii").split()[:6]
            centred = _affine([x, a, b, y, d, e])  # it names the middle of the first pixel
            transform = centred @ Affine.translation(-0.5, -0.5) if centred else None
    except (OSError, ValueError, LookupError, ElementTree.ParseError):
        pass  # as without them: the scene says that it has no place
    return crs, transform


def _lies_beside(path: Path) -> bool:
    """Whether a file is in the folder it is named in, and no link to one elsewhere."""
    return path.resolve().parent == path.parent.resolve()


def _affine(numbers: Sequence[str]) -> Affine | None:
    """A geotransform of GDAL's, six finite numbers with an area; None for anything else."""
    values = [float(number) for number in numbers]
    if len(values) != 6 or not all(map(math.isfinite, values)):
        return None
    transform = Affine.from_gdal(*values)
    return transform if transform.determinant else None


def unread_sidecars(target: str) -> Iterator[str]:
    """A warning for each file beside a raster that GDAL would read and that decides something."""
    if target.startswith(("/vsi", "<")):
        return
    remedy = "gdal_translate writes one file that holds it all"
    beside = Path(f"{target}.aux.xml")
    try:
        if beside.is_file() and _lies_beside(beside):
            with beside.open("rb") as file:
                start = file.read(2**16)
            if found := [part.decode().lstrip("<") for part in _DECIDES if part in start]:
                yield f"{beside} is not read for them, and it states {', '.join(found)}: {remedy}"
    except (OSError, ValueError):
        return
