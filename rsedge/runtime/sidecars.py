"""Files beside a raster. GDAL is kept from them, because each may be of any format and name any other file; a mask is
opened through the gate like any raster, and what else would change the pixels or their place is named in a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rasterio.enums import ColorInterp, MaskFlags

from rsedge.errors import SceneError
from rsedge.runtime.opening import open_dataset
from rsedge.runtime.products import BandFile

if TYPE_CHECKING:
    from rsedge.runtime.access import Access

# What of GDAL's own sidecar decides pixels or place; statistics and names do not.
_DECIDES = (b"<SRS", b"<GeoTransform", b"<NoDataValue", b"<GCPList", b"<ColorInterp", b"<Scale", b"<Offset")
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


def unread_sidecars(target: str) -> Iterator[str]:
    """A warning for each file beside a raster that GDAL would read and that decides something."""
    path = Path(target)
    if target.startswith(("/vsi", "<")):
        return
    remedy = "gdal_translate writes one file that holds it all"
    beside = Path(f"{target}.aux.xml")
    try:
        if beside.is_file():
            with beside.open("rb") as file:
                start = file.read(2**16)
            if found := [part.decode().lstrip("<") for part in _DECIDES if part in start]:
                yield f"{beside} is not read, and it states {', '.join(found)}: {remedy}"
        world = _WORLD_FILES.get(path.suffix.lower().lstrip("."))
        if world and (name := path.with_suffix(f".{world}")).is_file():
            yield f"{name} is not read: {remedy}"
    except (OSError, ValueError):
        return
