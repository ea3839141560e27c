"""What was found on a grid over a scene, as Cloud Optimized GeoTIFF: one pixel per tile, or per step of a window.

Such a raster has a pixel where its scene has thousands, so it is made in memory and written in one piece; it appears by
rename when it is whole.
"""

from __future__ import annotations

import colorsys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from rasterio.transform import Affine

from rsedge.errors import OptionError, OutputError
from rsedge.runtime.outputs.files import check_target, write_bytes
from rsedge.texts import plain

if TYPE_CHECKING:
    import numpy.typing as npt

    from rsedge.runtime.scenes.scene import Scene

NO_CLASS = 0
"""Value of a tile without a class; label number n has the value n + 1."""
MAX_CLASSES = 65535

_PALETTE_ENTRIES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """A regular grid over a scene.

    Attributes:
        step: Side of a cell in source pixels.
        offset: Source pixels from the scene's upper left corner to the grid's, right and down.
    """

    step: int
    offset: float = 0.0

    def transform(self, scene: Scene) -> Any:
        """Affine from (column, row) of cells to the scene's coordinates; pixels where the scene has no place."""
        a, b, c, d, e, f = scene.transform[:6]
        step, offset = self.step, self.offset
        return Affine(a * step, b * step, c + offset * (a + b), d * step, e * step, f + offset * (d + e))


def tile_cells(tile_size: int, overlap: int) -> Cells:
    """A cell for each tile of a :class:`~rsedge.runtime.scenes.tiles.TileGrid`, round the tile's centre.

    Without overlap a cell is its tile. With overlap cells are as far apart as tiles are, and each lies in the middle of
    its tile. A last tile that ``shift`` moved inward covers what of its cell is in the scene, so cells stay regular.
    """
    return Cells(step=tile_size - overlap, offset=overlap / 2)


def check_suffix(path: Path, suffixes: Sequence[str] = (".tif", ".tiff")) -> None:
    """Refuse an output whose name promises another format.

    Raises:
        OptionError: It ends in none of ``suffixes``.
    """
    if path.suffix.lower() not in suffixes:
        raise OptionError(f"output {path}: end its name in {' or '.join(suffixes)}")


def check_outputs(outputs: Mapping[Path, Sequence[str]], *, overwrite: bool) -> None:
    """Refuse outputs, path → suffixes its name may have, that cannot be written.

    Raises:
        OptionError: A name does not fit its format.
        OutputError: Files exist, or cannot be written.
    """
    for path, suffixes in outputs.items():
        check_suffix(path, suffixes)
    for path in outputs:
        check_target(path)
    if not overwrite and (existing := [str(path) for path in outputs if path.exists()]):
        verb = "exists" if len(existing) == 1 else "exist"
        raise OutputError(
            f"{' and '.join(existing)} {verb} already: pass --overwrite to replace, or choose another output"
        )


def write_classes(
    path: Path,
    classes: npt.NDArray[np.unsignedinteger[Any]],
    labels: Sequence[str],
    *,
    scene: Scene,
    cells: Cells,
    tags: Mapping[str, str],
) -> None:
    """A class per cell: values with names, colours and 0 as no-data.

    Names are category names, which GDAL and QGIS read from ``<path>.aux.xml``; because that file gets lost, the GeoTIFF
    holds them once more, as metadata ``class_1``, ``class_2``, …

    Args:
        path: The GeoTIFF.
        classes: uint8 or uint16 [rows, cols], 0 where there is none, else 1 + the index of the label.
        labels: Names, at most ``MAX_CLASSES``.
        scene, cells: The coordinate reference system, and the place of the cells.
        tags: Further metadata.

    Raises:
        OutputError: It cannot be written.
    """
    names = {f"class_{value}": label for value, label in enumerate(labels, 1)}
    data = _encode(
        classes[None],
        scene,
        cells,
        nodata=NO_CLASS,
        names=["class"],
        tags={**tags, **names},
        colours=dict(enumerate(class_colours(len(labels)), 1)),
        overview_resampling="MODE",
    )
    categories = "".join(f"<Category>{escape(plain(name))}</Category>" for name in ("no class", *labels))
    band = f'<PAMRasterBand band="1"><CategoryNames>{categories}</CategoryNames></PAMRasterBand>'
    beside = f"<PAMDataset>{band}</PAMDataset>"
    # The raster last: where it is, its names are too.
    write_bytes(path.with_name(f"{path.name}.aux.xml"), beside.encode("utf-8", "replace"))
    write_bytes(path, data)


def write_heat(
    path: Path,
    heat: npt.NDArray[np.float32],
    names: Sequence[str],
    *,
    scene: Scene,
    cells: Cells,
    tags: Mapping[str, str],
) -> None:
    """Write ``heat``, float32 [bands, rows, cols], NaN where there is nothing, with ``names`` as band descriptions.

    Raises:
        OutputError: It cannot be written.
    """
    data = _encode(heat, scene, cells, nodata=float("nan"), names=names, tags=tags, overview_resampling="AVERAGE")
    write_bytes(path, data)


def class_colours(count: int) -> list[tuple[int, int, int, int]]:
    """R, G, B, A of that many classes: hues a golden angle apart, so that neighbours differ however many there are."""
    shades = ((0.75, 0.9), (0.5, 0.6), (0.45, 1.0))
    colours = []
    for number in range(count):
        saturation, value = shades[number % len(shades)]
        rgb = colorsys.hsv_to_rgb(number * 0.618034 % 1, saturation, value)
        colours.append((round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255), 255))
    return colours


def _encode(
    bands: npt.NDArray[Any],
    scene: Scene,
    cells: Cells,
    *,
    nodata: float,
    names: Sequence[str],
    tags: Mapping[str, str],
    overview_resampling: str,
    colours: Mapping[int, tuple[int, int, int, int]] | None = None,
) -> bytes:
    """Bands [N, rows, cols] as the bytes of a Cloud Optimized GeoTIFF."""
    count, height, width = bands.shape
    with warnings.catch_warnings(), rasterio.Env(), MemoryFile() as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # Scene.warnings says it
        with memory.open(
            driver="COG",
            width=width,
            height=height,
            count=count,
            dtype=bands.dtype,
            crs=scene.crs,
            transform=cells.transform(scene),
            nodata=nodata,
            compress="DEFLATE",
            predictor="NO" if colours else "YES",  # neighbouring class numbers are not near each other
            overview_resampling=overview_resampling,
        ) as dataset:
            dataset.write(bands)
            dataset.update_tags(**{name: plain(value) for name, value in tags.items()})
            for index, name in enumerate(names, 1):
                dataset.set_band_description(index, plain(name))
            if colours:
                table = dict.fromkeys(range(_PALETTE_ENTRIES), (0, 0, 0, 255))
                dataset.write_colormap(1, {**table, NO_CLASS: (0, 0, 0, 0), **colours})
        with memory.open() as written:  # GDAL is silent where its memory or disk was full
            if not np.array_equal(written.read(), bands, equal_nan=bands.dtype.kind == "f"):
                raise OutputError("GDAL did not write the whole raster: free memory, then run again")
        return bytes(memory.read())
