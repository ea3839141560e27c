"""Band files on one grid, as a VRT in memory: GDAL does the resampling, and every thread opens a VRT of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element, SubElement, tostring

from rasterio.crs import CRS
from rasterio.enums import MaskFlags
from rasterio.transform import from_origin

from rsedge.errors import SceneError
from rsedge.runtime import remote
from rsedge.runtime.opening import open_dataset
from rsedge.runtime.sentinel2 import OFFSET_TAGS

if TYPE_CHECKING:
    from rasterio.transform import Affine

    from rsedge.runtime.products import BandFile, Extent

_GDAL_TYPES = {
    "uint8": "Byte",
    "uint16": "UInt16",
    "int16": "Int16",
    "float32": "Float32",
    "float64": "Float64",
}
_COLOURS = ("Red", "Green", "Blue")


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the pixels of a raster lie.

    Attributes:
        crs: rasterio CRS, or None.
        transform: Affine from (column, row) to map coordinates.
        width, height: In pixels.
    """

    crs: Any
    transform: Affine
    width: int
    height: int

    @classmethod
    def of(cls, dataset: Any) -> Grid:
        """That of an open dataset."""
        return cls(dataset.crs, dataset.transform, dataset.width, dataset.height)


@dataclass(frozen=True, slots=True)
class _Source:
    """A band file as a VRT refers to it."""

    file: BandFile
    grid: Grid
    dtype: str
    nodata: float | None
    blocks: tuple[int, int]
    masked: bool
    scaling: tuple[float, float]
    tags: Mapping[str, str]

    @classmethod
    def open(cls, file: BandFile, extent: Extent | None) -> _Source:
        name = remote.unsigned(file.path)
        with open_dataset(file.path) as dataset:
            if not 1 <= file.band <= dataset.count:
                raise SceneError(
                    f"{remote.unsigned(file.path)} has {dataset.count} bands and no band {file.band}: name another file"
                )
            index = file.band - 1
            if dataset.dtypes[index] not in _GDAL_TYPES:
                raise SceneError(
                    f"{name} is {dataset.dtypes[index]}, expected one of {', '.join(_GDAL_TYPES)}: convert it "
                    "with gdal_translate -ot"
                )
            grid = Grid.of(dataset)
            if extent is not None and not grid.crs and grid.transform.is_identity:
                grid = _spread_over(extent, dataset.width, dataset.height)
            return cls(
                file,
                grid,
                dataset.dtypes[index],
                dataset.nodatavals[index],
                dataset.block_shapes[index],
                MaskFlags.per_dataset in dataset.mask_flag_enums[index],
                (dataset.scales[index], dataset.offsets[index]),
                dataset.tags(index + 1),
            )


@dataclass(frozen=True, slots=True)
class Composite:
    """A VRT of several files.

    Attributes:
        vrt: Its XML, which GDAL opens.
        block_shape: Height and width of the blocks of the first file.
        driver: GDAL's name of the first file's format.
        notes: Which bands were resampled, one clause each.
    """

    vrt: str
    block_shape: tuple[int, int]
    driver: str
    notes: tuple[str, ...]


def compose(bands: Sequence[BandFile], extent: Extent | None = None) -> Composite:
    """Red, green and blue from files of one coordinate reference system, on the grid of the finest.

    Args:
        bands: Files of red, green and blue.
        extent: Where files lie that do not say so themselves.

    Raises:
        SceneError: A file cannot be opened, or they do not lie on grids that can be brought together.
    """
    sources = [_Source.open(file, extent) for file in bands]
    finest = min(sources, key=lambda source: abs(source.grid.transform.a)).grid
    dtypes = {source.dtype for source in sources}
    if len(dtypes) > 1:
        found = ", ".join(f"{remote.unsigned(source.file.path)} {source.dtype}" for source in sources)
        raise SceneError(f"the bands have different types ({found}): convert them to one, with gdal_translate -ot")
    root = _root(finest)
    notes = []
    for number, (source, colour) in enumerate(zip(sources, _COLOURS, strict=True), 1):
        band = SubElement(root, "VRTRasterBand", dataType=_GDAL_TYPES[source.dtype], band=str(number))
        SubElement(band, "ColorInterp").text = colour
        if source.nodata is not None:
            SubElement(band, "NoDataValue").text = repr(source.nodata)
        _add_scaling(band, source)
        resampled = source.grid.transform.a != finest.transform.a
        if resampled:
            notes.append(f"{colour.lower()} was resampled from {abs(source.grid.transform.a):g} to "
                         f"{abs(finest.transform.a):g} map units")  # fmt: skip
        _add_source(band, source, finest, "bilinear" if resampled else None)
    if masked := next((source for source in sources if source.masked), None):
        band = SubElement(SubElement(root, "MaskBand"), "VRTRasterBand", dataType="Byte")
        _add_source(band, masked, finest, None, of_mask=True)
    with open_dataset(bands[0].path) as dataset:
        driver = dataset.driver
    return Composite(tostring(root, encoding="unicode"), sources[0].blocks, driver, tuple(notes))


def on_grid(file: BandFile, grid: Grid, *, outside: int, extent: Extent | None = None) -> str:
    """A VRT of one band of classes on another grid, nearest neighbour, ``outside`` where the file has no pixels.

    Raises:
        SceneError: It cannot be opened, or lies on another grid.
    """
    source = _Source.open(file, extent)
    if source.dtype.startswith("float"):
        name = remote.unsigned(file.path)
        raise SceneError(f"{name} is {source.dtype}, but masks hold classes: convert it with gdal_translate -ot Byte")
    root = _root(grid)
    band = SubElement(root, "VRTRasterBand", dataType=_GDAL_TYPES[source.dtype], band="1")
    SubElement(band, "NoDataValue").text = str(outside)
    _add_source(band, source, grid, None)
    return tostring(root, encoding="unicode")


def _spread_over(extent: Extent, width: int, height: int) -> Grid:
    """The grid of ``width`` by ``height`` pixels that covers ``extent``."""
    transform = from_origin(extent.left, extent.top, extent.width / width, extent.height / height)
    return Grid(CRS.from_string(extent.crs), transform, width, height)


def _root(grid: Grid) -> Element:
    root = Element("VRTDataset", rasterXSize=str(grid.width), rasterYSize=str(grid.height))
    if grid.crs:
        SubElement(root, "SRS", dataAxisToSRSAxisMapping="1,2").text = grid.crs.to_wkt()
    if not grid.transform.is_identity:
        SubElement(root, "GeoTransform").text = ", ".join(map(repr, grid.transform.to_gdal()))
    return root


def _add_scaling(band: Element, source: _Source) -> None:
    """What the file says of its digital numbers."""
    scale, offset = source.scaling
    if (scale, offset) != (1.0, 0.0):
        SubElement(band, "Offset").text, SubElement(band, "Scale").text = repr(offset), repr(scale)
    told = {name: text for name, text in source.tags.items() if name in OFFSET_TAGS}
    if told:
        entries = SubElement(band, "Metadata")
        for name, text in told.items():
            SubElement(entries, "MDI", key=name).text = text


def _add_source(band: Element, source: _Source, grid: Grid, resampling: str | None, *, of_mask: bool = False) -> None:
    x, y, width, height = _place(source, grid)
    entry = SubElement(band, "SimpleSource")
    if resampling:
        entry.set("resampling", resampling)
    # Shared handles would be used by several threads at once.
    SubElement(entry, "SourceFilename", relativeToVRT="0", shared="0").text = source.file.path
    SubElement(entry, "SourceBand").text = ("mask," if of_mask else "") + str(source.file.band)
    rows, cols = source.blocks
    own = source.grid
    SubElement(  # known here, so that GDAL opens a file when its pixels are wanted and not before
        entry,
        "SourceProperties",
        RasterXSize=str(own.width),
        RasterYSize=str(own.height),
        DataType="Byte" if of_mask else _GDAL_TYPES[source.dtype],
        BlockXSize=str(cols),
        BlockYSize=str(rows),
    )
    SubElement(entry, "SrcRect", xOff="0", yOff="0", xSize=str(own.width), ySize=str(own.height))
    SubElement(entry, "DstRect", xOff=repr(x), yOff=repr(y), xSize=repr(width), ySize=repr(height))


def _place(source: _Source, grid: Grid) -> tuple[float, float, float, float]:
    """Where the file lies in the pixels of the grid: left, top, width, height.

    Raises:
        SceneError: Nowhere, or askew.
    """
    own, name = source.grid, remote.unsigned(source.file.path)
    advice = "bring them together first, with gdalwarp"
    if own.crs != grid.crs:
        raise SceneError(f"{name} is in {_named(own.crs)} and the scene in {_named(grid.crs)}: {advice}")
    to_grid = ~grid.transform @ own.transform
    if max(abs(to_grid.b), abs(to_grid.d)) > 1e-9 or to_grid.a <= 0 or to_grid.e <= 0:
        raise SceneError(f"{name} is rotated or mirrored against the scene: {advice}")
    x, y = _exact(to_grid.c), _exact(to_grid.f)
    width, height = _exact(to_grid.a * own.width), _exact(to_grid.e * own.height)
    if x >= grid.width or y >= grid.height or x + width <= 0 or y + height <= 0:
        raise SceneError(f"{name} lies beside the scene and covers no pixel of it: name another file")
    return x, y, width, height


def _exact(value: float) -> float:
    """Without the noise of dividing coordinates, which would make GDAL resample what fits."""
    return float(round(value)) if abs(value - round(value)) < 1e-6 else value


def _named(crs: Any) -> str:
    return crs.to_string() if crs else "no coordinate reference system"
