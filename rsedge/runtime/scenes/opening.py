"""From what a user names to a scene: bands, grid, rendering, clouds; everything that is wrong is said at once.

Few pixels are read, and only where they must be asked what they are.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.transform import Affine

from rsedge.errors import OptionError, SceneError
from rsedge.runtime.scenes import remote
from rsedge.runtime.scenes.access import MAX_PIXELS, Access, refuse_handler
from rsedge.runtime.scenes.catalog import find, find_one, noted
from rsedge.runtime.scenes.composite import CloudReader, CloudSource, Composite, Grid
from rsedge.runtime.scenes.facts import choose_bands, choose_rendering, known_facts
from rsedge.runtime.scenes.gdal import SUBDATASET, open_dataset, reading
from rsedge.runtime.scenes.headers import MAX_SIDE
from rsedge.runtime.scenes.products.product import PER_BAND, BandFile, Product
from rsedge.runtime.scenes.rendering import FLOATS, PixelValues
from rsedge.runtime.scenes.scene import METRES_PER_DEGREE, Scene, open_masks
from rsedge.runtime.scenes.sidecars import is_vrt, mask_beside, read_vrt, unread_sidecars
from rsedge.runtime.scenes.stored import StoredPixels, Validity
from rsedge.texts import first_few

_NO_DESCRIPTION = re.compile(r"|.*(alpha|mask|opacity|transparen).*|(band|layer|channel)?[\s_#-]*\d*", re.IGNORECASE)
"""Description of an alpha band, or of a band that has none."""
_GDAL_NAME = re.compile(r"^(/vsi[a-z0-9]+/|[A-Za-z][A-Za-z0-9_]+:)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneOptions:
    """How scenes are opened; what is None is told from the scene.


    Raises:
        OptionError: Two cloud masks, a resolution that is not above 0, or limits that are none.
    """

    bands: Sequence[int] | None = None  # numbers of red, green and blue, from 1
    boa_offset: int | None = None  # added to digital numbers, see ``ReflectanceRule``
    nodata: float | None = None  # value that means no data, in place of what the file declares
    pixel_values: PixelValues | None = None  # what floats are, see ``Rendering``
    scl: str | os.PathLike[str] | None = None  # raster of Sen2Cor's scene classification
    cloud_mask: str | os.PathLike[str] | None = None  # raster in which what is not 0 is cloud
    # size of a pixel in units of the coordinate reference system; the scene is resampled to it
    resolution: float | None = None
    allow_remote: bool = False  # whether rasters may be read over the network
    allow_hosts: Sequence[str] = ()  # hosts with local or private addresses that redirects and STAC items may name
    # folders that STAC items, products and VRTs may name files of, beside their own
    allow_roots: Sequence[str | os.PathLike[str]] = ()
    allow_vrt: bool = False  # whether a VRT may be opened
    max_pixels: int = MAX_PIXELS  # pixels that a raster may declare

    @property
    def access(self) -> Access:
        """What the scene and what it names may touch."""
        return Access(
            remote=self.allow_remote,
            hosts=tuple(self.allow_hosts),
            roots=tuple(map(Path, self.allow_roots)),
            vrt=self.allow_vrt,
            max_pixels=self.max_pixels,
        )

    def __post_init__(self) -> None:
        problems = []
        if self.scl is not None and self.cloud_mask is not None:
            problems.append("scl and cloud_mask both say where clouds are: give one")
        if self.resolution is not None and not (math.isfinite(self.resolution) and self.resolution > 0):
            problems.append(f"resolution is {self.resolution}, expected map units above 0, such as 10")
        if problems:
            raise OptionError("; ".join(problems))
        _ = self.access  # its own checks


def open_scene(path: str | os.PathLike[str] | Product, options: SceneOptions) -> Scene:
    """See :meth:`rsedge.runtime.scenes.scene.Scene.open`."""
    # 1. What is it, and which of its files and of the masks that go with it are remote?
    access = options.access
    found = path if isinstance(path, Product) else find_one(os.fspath(path), access=access)
    masks = {name: os.fspath(mask) for name in ("scl", "cloud_mask") if (mask := getattr(options, name)) is not None}
    names = found.paths if isinstance(found, Product) else [found]
    far = [name for name in (*names, *masks.values()) if remote.is_remote(name)]
    remote.check_allowed(far, allow=options.allow_remote)
    # 2. What the user named may have any address; what items and redirects name is judged.
    own = [*masks.values(), found.source if isinstance(found, Product) else found]
    hosts = (*options.allow_hosts, *remote.named_hosts(own))
    # 3. Where redirects lead: before GDAL, which remembers for good what it once failed to open.
    final = {name: remote.gdal_target(name, hosts=hosts) for name in far}
    options = replace(
        options, allow_hosts=hosts if far else (), **{n: final.get(mask, mask) for n, mask in masks.items()}
    )
    # 4. Open and describe it.
    if not isinstance(found, Product):
        with reading(remote.unsigned(found)):
            return open_raster(found, options, final.get(found))
    if options.bands is not None:
        raise OptionError(
            f"{found.source} is a product whose bands are known: leave --bands out, or pass one raster file"
        )
    product, access = found.at(final), options.access
    bands = tuple(product.bands[role] for role in ("red", "green", "blue"))
    one = len({file.path for file in bands}) == 1
    with (
        reading(product.source),
        open_dataset(bands[0].path, access) if one else Composite(bands, product.extent, access) as dataset,
    ):
        return _describe(product.source, bands[0].path, dataset, options, product)


def open_scenes(
    names: Sequence[str | os.PathLike[str]],
    *,
    stdin: str | None = None,
    outputs: Collection[str | os.PathLike[str]] = (),
    unopened: list[str] | None = None,
    **options: Any,
) -> list[Scene]:
    """The scenes of all ``names``, in order.

    Args:
        names: See :func:`rsedge.runtime.scenes.catalog.find`.
        stdin: What ``-`` holds.
        outputs: What will be written: the results of an earlier run are no scenes of the folder they lie in.
        unopened: A list to which scenes that cannot be opened are added, one line each, if others can.
        **options: See :class:`SceneOptions`.

    Raises:
        SceneError: A name stands for nothing, or scenes cannot be opened; all are named.
        OptionError: An option does not fit.
    """
    how = SceneOptions(**options)
    written = {Path(output).resolve() for output in outputs}
    scenes: list[Scene] = []
    problems: list[str] = []
    found: list[str | Product] = []
    for each in names:
        name = os.fspath(each)
        with noted(problems):
            for entry in find(name, access=how.access, stdin=stdin):
                file = Path(entry) if isinstance(entry, str) and not remote.is_remote(entry) else None
                if entry == name or file is None or file.resolve() not in written:
                    found.append(entry)
    nothing = bool(problems)
    for entry in found:
        with noted(problems):
            scenes.append(open_scene(entry, how))
    if problems and (nothing or not scenes or unopened is None):
        raise SceneError("\n".join(first_few(problems)))
    if unopened is not None:
        unopened += problems
    return scenes


def open_raster(source: str, options: SceneOptions, target: str | None = None) -> Scene:
    """The scene of one raster file, which is no product and no document.

    Args:
        source: Path, subdataset of a TIFF, URL, or file in memory.
        options: How it is opened.
        target: What GDAL opens for it, where that is known.

    Raises:
        SceneError: It cannot be opened, its pixels are of no known kind, or its RGB cannot be told.
        OptionError: An option does not fit the raster.
    """
    target, access = target or _resolve(source), options.access
    files: tuple[str, ...] = ()
    if access.vrt and is_vrt(Path(target)):
        target, sources = read_vrt(Path(target), access)
        files = (str(Path(source).resolve()), *sources)
    source = remote.unsigned(source)
    with open_dataset(target, access) as dataset:
        if dataset.count > 0:
            return _describe(source, target, dataset, options, files=files)
        names = dataset.subdatasets
        if not names:
            raise SceneError(
                f"{source} has neither bands nor subdatasets: pass a raster with red, green and blue bands"
            )
        if len(names) > 1:
            listed = "".join(f"\n  {name}" for name in names)
            raise SceneError(
                f"{source} holds {len(names)} subdatasets and it is unclear which to read; pass one of:{listed}"
            )
        with open_dataset(names[0], access) as subdataset:
            return _describe(source, target, subdataset, options)


def _resolve(source: str) -> str:
    """What the gate should open for what the user named."""
    if source.startswith("/vsimem/"):  # a file in memory, whose bytes the caller put there
        return source
    refuse_handler(source)
    if remote.is_remote(source):
        return remote.gdal_path(source)
    file = Path(source)
    if file.exists():
        return str(file.resolve())
    if (match := SUBDATASET.fullmatch(source)) and Path(match["path"]).is_file():
        return source
    if _GDAL_NAME.match(source):
        raise SceneError(
            f"{source} is a name of GDAL's own, and rsedge opens files: unpack it, or make a GeoTIFF of it with "
            "gdal_translate, then pass the file"
        )
    raise SceneError(f"{source} does not exist: check the path, and pass a raster file or a .SAFE folder")


def _describe(
    source: str,
    target: str,
    dataset: Any,
    options: SceneOptions,
    product: Product | None = None,
    files: tuple[str, ...] = (),
) -> Scene:
    """The scene for an open dataset; reports everything that is wrong at once. ``files`` are those behind a VRT."""
    path = target if files or product is not None else dataset.name
    shown = remote.unsigned(source if product else target)
    parts = [target] if product is None else [file.path for file in product.bands.values()]
    together = dataset if isinstance(dataset, Composite) else None
    # 1. Bands, their type, and what means no data.
    choice, dtype = choose_bands(source, dataset, product, options.bands)
    if options.nodata is not None and not _fits(options.nodata, dtype):
        limits = np.iinfo(dtype)
        raise OptionError(
            f"nodata {options.nodata} cannot occur in {dtype}: expected a whole number {limits.min} to {limits.max}"
        )
    declared = [
        options.nodata if options.nodata is not None else dataset.nodatavals[index - 1] for index in choice.indexes
    ]
    nodata = tuple(value if value is not None and _fits(value, dtype) else None for value in declared)
    # 2. Grid and masks; a composite has the masks of its files.
    own = Grid.of(dataset, product.extent if product else None)
    grid, resampled = _resample(own, options, source, palette=choice.palette)
    mask_band, mask_file, doubt = _mask_band(dataset, choice.indexes), None, None
    if mask_band is None and not together:
        mask_file, doubt = mask_beside(target, dataset, options.access)
    clouds, no_clouds = _clouds(shown, path, dataset, grid, options, product)
    # 3. Rendering, by pixels that have data.
    facts = known_facts(source, dataset, choice, product)
    with ExitStack() as opened:
        beside = open_masks(mask_file, own, choice.indexes, options.access, opened)
        rendering, why, doubts = choose_rendering(
            StoredPixels(dataset, choice.indexes, Validity(nodata, True, -2000.0, mask_band), beside=beside),
            dtype,
            choice,
            facts,
            boa_offset=options.boa_offset,
            values=options.pixel_values,
            source=source,
        )
    # 4. Files that it is read from.
    read = [mask_file.path] if mask_file else []
    read += [clouds.file.path] if clouds else []
    local = {name for name in (*dataset.files, *files, *read) if Path(name).is_file()}
    return Scene(
        name=product.name if product else _name(source),
        path=path,
        source=shown,
        width=grid.width,
        height=grid.height,
        crs=grid.crs,
        transform=grid.transform,
        dtype=dtype,
        bands=choice.indexes,
        bands_reason="; ".join([choice.reason, *(together.notes if together else ())]),
        datetime=facts.datetime,
        rendering=rendering,
        rendering_reason=why,
        nodata=nodata,
        mask_band=mask_band,
        palette=choice.palette,
        block_shape=tuple(dataset.block_shapes[choice.indexes[0] - 1]),
        band_count=dataset.count,
        driver=dataset.driver,
        files=tuple(sorted(local.union(product.files if product else ()))),
        remote=tuple(sorted({name for name in (*parts, *read) if remote.is_remote(name)})),
        product_id=facts.product_id,
        mgrs_tile=facts.mgrs_tile,
        clouds=clouds,
        resampled=resampled,
        parts=together.parts if together else (),
        extent=product.extent if product and together else None,
        mask_file=mask_file,
        access=options.access,
        warnings=(
            *_georeference_warnings(source, dataset, grid),
            *((doubt,) if doubt else ()),
            *((choice.doubt,) if choice.doubt else ()),
            *(warning for part in dict.fromkeys(parts) for warning in unread_sidecars(part)),
            *(product.warnings if product else ()),
            *doubts,
            *((no_clouds,) if no_clouds else ()),
            *(together.doubts if together else ()),
        ),
    )


def _clouds(
    shown: str, path: str, dataset: Any, grid: Grid, options: SceneOptions, product: Product | None
) -> tuple[CloudSource | None, str | None]:
    """The cloud mask: as asked, else the product's, else a band called SCL of the raster; or why it is not used."""
    kind: Literal["scl", "mask"] = "mask" if options.cloud_mask is not None else "scl"
    file = product.scl if product else None
    if (named := options.scl if options.scl is not None else options.cloud_mask) is not None:
        file = BandFile(path=_resolve(os.fspath(named)))
    elif product is None:
        called = [index for index, text in enumerate(dataset.descriptions, 1) if (text or "").strip().upper() == "SCL"]
        if called and dataset.dtypes[called[0] - 1] in FLOATS:  # scaled with the bands, classes would be others
            return None, (
                f"{shown}: band {called[0]} (SCL) is {dataset.dtypes[called[0] - 1]} and classes are whole "
                f"numbers, so clouds are not known: gdal_translate -b {called[0]} -ot Byte makes a raster for --scl"
            )
        file = BandFile(path=path, band=called[0]) if called else None
    if file is None:
        return None, None
    clouds = CloudSource(kind, file, grid, product.extent if product else None, options.access)
    CloudReader(clouds).close()  # opened once, so that what is wrong is said now
    return clouds, None


def _resample(
    grid: Grid, options: SceneOptions, source: str, *, palette: bool
) -> tuple[Grid, Literal["average", "bilinear", "nearest"] | None]:
    """The grid with pixels of another size, and how to get there."""
    if (resolution := options.resolution) is None:
        return grid, None
    if not grid.crs or grid.transform.is_identity:
        raise OptionError(f"{source} has no place on a map, so no resolution either: leave --resolution out")
    own = math.hypot(grid.transform.a, grid.transform.d), math.hypot(grid.transform.b, grid.transform.e)
    factors = [resolution / size for size in own]
    if all(abs(factor - 1) < 1e-9 for factor in factors):
        return grid, None
    sides = grid.width * own[0], grid.height * own[1]
    degrees = bool(grid.crs.is_geographic)
    unit = "degrees" if degrees else grid.crs.linear_units or "map units"
    if resolution > min(sides):
        advice = f"give a size of pixels in {unit}; its own are {own[0]:.6g}"
        if degrees:
            metres = resolution / METRES_PER_DEGREE
            advice = f"its coordinates are degrees, so {resolution:g} metres are --resolution {metres:.3g}"
        size = f"{sides[0]:.6g} x {sides[1]:.6g} {unit}"
        raise OptionError(f"resolution {resolution:g} is more than the whole of {source}, {size}: {advice}")
    width, height = (
        max(1, math.ceil(count / factor - 1e-6))
        for count, factor in zip((grid.width, grid.height), factors, strict=True)
    )
    if width * height > options.max_pixels or max(width, height) > MAX_SIDE:
        size = f"{width} x {height} pixels, more than --max-pixels {options.max_pixels} or {MAX_SIDE} on a side"
        raise OptionError(f"at resolution {resolution} {source} would have {size}: choose a larger one")
    method: Literal["average", "bilinear", "nearest"] = "average" if max(factors) > 1 else "bilinear"
    if palette and method == "bilinear":
        method = "nearest"
    return Grid(grid.crs, grid.transform @ Affine.scale(*factors), width, height), method


def _fits(value: float, dtype: str) -> bool:
    if dtype in FLOATS:
        return True
    limits = np.iinfo(dtype)
    return math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max


def _mask_band(dataset: Any, chosen: tuple[int, ...]) -> int | None:
    """The mask band, see ``Validity``.

    GDAL calls the fourth band of many R, G, B, infrared files alpha; one that is described as something else, or chosen
    as a colour, is none. A description such as ``Band_4`` describes nothing.
    """
    bands = zip(dataset.indexes, dataset.colorinterp, dataset.descriptions, strict=True)
    called_alpha = [(index, description) for index, colour, description in bands if colour == ColorInterp.alpha]
    for index, description in called_alpha:
        if index not in chosen and _NO_DESCRIPTION.fullmatch((description or "").strip()[:100]):
            return int(index)
    flags = [dataset.mask_flag_enums[number - 1] for number in chosen]
    if called_alpha and all(MaskFlags.alpha in each for each in flags):
        return None
    if any(not each for each in flags):
        return PER_BAND
    return 0 if MaskFlags.per_dataset in flags[0] else None


def _name(source: str) -> str:
    file = Path(source)
    if file.name.startswith("MTD_") and file.parent.suffix.upper() == ".SAFE":
        file = file.parent
    name = file.name if file.is_dir() and file.suffix.upper() != ".SAFE" else file.stem
    return os.fsencode(name).decode("utf-8", "replace")  # names on disk need not be UTF-8, outputs must be


def _georeference_warnings(source: str, dataset: Any, grid: Grid) -> tuple[str, ...]:
    missing = ["coordinate reference system"] if not grid.crs else []
    missing += ["geotransform"] if grid.transform.is_identity else []
    if not missing:
        return ()
    remedy = "gdal_edit.py -a_srs … -a_ullr … sets them"
    if dataset.gcps[0]:
        remedy = "gdalwarp uses its ground control points"
    elif dataset.rpcs:
        remedy = "gdalwarp -rpc uses its rational polynomial coefficients"
    return (f"{source} has no {' and no '.join(missing)}: its records have no geometry ({remedy})",)
