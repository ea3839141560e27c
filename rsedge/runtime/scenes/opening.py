"""From what a user names to a scene: bands, grid, rendering, clouds; everything that is wrong is said at once.

Few pixels are read, and only where they must be asked what they are.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Sequence
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
from rsedge.runtime.scenes.clouds import CloudSource
from rsedge.runtime.scenes.composite import Composite, Grid
from rsedge.runtime.scenes.facts import choose_bands, choose_rendering, known_facts
from rsedge.runtime.scenes.gdal import SUBDATASET, open_dataset
from rsedge.runtime.scenes.headers import MAX_SIDE
from rsedge.runtime.scenes.products.product import BandFile, Product
from rsedge.runtime.scenes.rendering import FLOATS, PixelValues
from rsedge.runtime.scenes.scene import Scene
from rsedge.runtime.scenes.sidecars import mask_beside, unread_sidecars
from rsedge.runtime.scenes.vrt import is_vrt, read_vrt
from rsedge.texts import first_few

_GDAL_NAME = re.compile(r"^(/vsi[a-z0-9]+/|[A-Za-z][A-Za-z0-9_]+:)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneOptions:
    """How scenes are opened; what is None is told from the scene.

    Attributes:
        bands: Numbers of red, green and blue, from 1.
        boa_offset: Added to digital numbers, see ``ReflectanceRule``.
        nodata: Value that means no data, in place of what the file declares.
        pixel_values: What floats are, see ``Rendering``.
        scl: Raster of Sen2Cor's scene classification.
        cloud_mask: Raster in which what is not 0 is cloud.
        resolution: Size of a pixel in units of the coordinate reference system; the scene is resampled to it.
        allow_remote: Whether rasters may be read over the network.
        allow_hosts: Hosts with local or private addresses that redirects and STAC items may name.
        allow_roots: Folders that STAC items, products and VRTs may name files of, beside their own.
        allow_vrt: Whether a VRT may be opened.
        max_pixels: Pixels that a raster may declare.

    Raises:
        OptionError: Two cloud masks, a resolution that is not above 0, or limits that are none.
    """

    bands: Sequence[int] | None = None
    boa_offset: int | None = None
    nodata: float | None = None
    pixel_values: PixelValues | None = None
    scl: str | os.PathLike[str] | None = None
    cloud_mask: str | os.PathLike[str] | None = None
    resolution: float | None = None
    allow_remote: bool = False
    allow_hosts: Sequence[str] = ()
    allow_roots: Sequence[str | os.PathLike[str]] = ()
    allow_vrt: bool = False
    max_pixels: int = MAX_PIXELS

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
    access = options.access
    found = path if isinstance(path, Product) else find_one(os.fspath(path), access=access)
    files = [*found.bands.values(), *([found.scl] if found.scl else [])] if isinstance(found, Product) else []
    masks = {name: os.fspath(mask) for name in ("scl", "cloud_mask") if (mask := getattr(options, name)) is not None}
    names = [file.path for file in files] or [str(found)]
    far = [name for name in (*names, *masks.values()) if remote.is_remote(name)]
    remote.check_allowed(far, allow=options.allow_remote)
    # What the user named may have any address; what items and redirects name is judged.
    own = [*masks.values(), found.source if isinstance(found, Product) else found]
    hosts = (*options.allow_hosts, *remote.named_hosts(own))
    # Before GDAL, which remembers for good what it once failed to open.
    final = {name: remote.gdal_target(name, hosts=hosts) for name in far}
    options = replace(
        options, allow_hosts=hosts if far else (), **{n: final.get(mask, mask) for n, mask in masks.items()}
    )
    if isinstance(found, Product):
        return _of_product(found.at(final), options)
    return open_raster(found, options, final.get(found))


def open_scenes(
    names: Sequence[str | os.PathLike[str]],
    *,
    stdin: str | None = None,
    outputs: Collection[str | os.PathLike[str]] = (),
    **options: Any,
) -> list[Scene]:
    """The scenes of all ``names``, in order.

    Args:
        names: See :func:`rsedge.runtime.scenes.catalog.find`.
        stdin: What ``-`` holds.
        outputs: What will be written: the results of an earlier run are no scenes of the folder they lie in.
        **options: See :class:`SceneOptions`.

    Raises:
        SceneError: Scenes cannot be opened; all are named.
        OptionError: An option does not fit.
    """
    scenes: list[Scene] = []
    problems: list[str] = []
    access = SceneOptions(**options).access
    found: list[str | Product] = []
    written = {Path(output).resolve() for output in outputs}
    for each in names:
        name = os.fspath(each)
        with noted(problems):
            inside = find(name, access=access, stdin=stdin)
            found += [entry for entry in inside if entry == name or not _is_one_of(entry, written)]
    for entry in found:
        with noted(problems):
            scenes.append(open_scene(entry, SceneOptions(**options)))
    if problems:
        raise SceneError("\n".join(first_few(problems)))
    return scenes


def _is_one_of(entry: str | Product, paths: Collection[Path]) -> bool:
    return isinstance(entry, str) and not remote.is_remote(entry) and Path(entry).resolve() in paths


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


def _of_product(product: Product, options: SceneOptions) -> Scene:
    if options.bands is not None:
        raise OptionError(
            f"{product.source} is a product whose bands are known: leave --bands out, or pass one raster file"
        )
    bands = tuple(product.bands[role] for role in ("red", "green", "blue"))
    if len({file.path for file in bands}) == 1:
        with open_dataset(bands[0].path, options.access) as dataset:
            return _describe(product.source, bands[0].path, dataset, options, product)
    with Composite(bands, product.extent, options.access) as together:
        scene = _describe(product.source, bands[0].path, together, options, product)
        reason = "; ".join([scene.bands_reason, *together.notes])
        warnings = (*scene.warnings, *together.doubts)
    return replace(scene, bands_reason=reason, parts=bands, extent=product.extent, warnings=warnings)


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
    parts = [target] if product is None else [*(file.path for file in product.bands.values())]
    far = {name for name in parts if remote.is_remote(name)}
    choice, dtype = choose_bands(source, dataset, product, options.bands)
    if options.nodata is not None:
        _check_nodata(options.nodata, dtype)
    declared = [
        options.nodata if options.nodata is not None else dataset.nodatavals[index - 1] for index in choice.indexes
    ]
    nodata = tuple(value if value is not None and _fits(value, dtype) else None for value in declared)
    grid, resampled = _resample(Grid.of(dataset), options, source)
    composite = isinstance(dataset, Composite)  # which has the masks of its files
    mask_file, doubt = (None, None) if composite else mask_beside(target, dataset, options.access)
    mask_band = None if mask_file else _mask_band(dataset, choice.indexes)
    facts = known_facts(source, dataset, choice, product)
    rendering, why, doubts = choose_rendering(
        dataset, choice, nodata, facts, boa_offset=options.boa_offset, values=options.pixel_values, source=source
    )
    scene = Scene(
        name=product.name if product else _name(source),
        path=target if files or product is not None else dataset.name,
        source=remote.unsigned(source if product else target),
        width=grid.width,
        height=grid.height,
        crs=grid.crs,
        transform=grid.transform,
        dtype=dtype,
        bands=choice.indexes,
        bands_reason=choice.reason,
        datetime=facts.datetime,
        rendering=rendering,
        rendering_reason=why,
        nodata=nodata,
        mask_band=mask_band,
        palette=choice.palette,
        block_shape=tuple(dataset.block_shapes[choice.indexes[0] - 1]),
        band_count=dataset.count,
        driver=dataset.driver,
        files=_local_files((*dataset.files, *files, *([mask_file.path] if mask_file else [])), product),
        remote=tuple(sorted(far)),
        product_id=facts.product_id,
        mgrs_tile=facts.mgrs_tile,
        resampled=resampled,
        mask_file=mask_file,
        access=options.access,
        warnings=(
            *_georeference_warnings(source, dataset, grid),
            *((doubt,) if doubt else ()),
            *(warning for part in dict.fromkeys(parts) for warning in unread_sidecars(part)),
            *(product.warnings if product else ()),
            *doubts,
        ),
    )
    return _with_clouds(scene, dataset, options, product)


def _with_clouds(scene: Scene, dataset: Any, options: SceneOptions, product: Product | None) -> Scene:
    """The scene with its cloud mask: as asked, else the product's, else a band of the raster that is called SCL."""
    kind: Literal["scl", "mask"] = "mask" if options.cloud_mask is not None else "scl"
    file = product.scl if product else None
    if (named := options.scl if options.scl is not None else options.cloud_mask) is not None:
        file = BandFile(path=_resolve(os.fspath(named)))
    elif product is None:
        called = [index for index, text in enumerate(dataset.descriptions, 1) if (text or "").strip().upper() == "SCL"]
        if called and dataset.dtypes[called[0] - 1] in FLOATS:  # scaled with the bands, classes would be others
            doubt = (
                f"{scene.source}: band {called[0]} (SCL) is {dataset.dtypes[called[0] - 1]} and classes are whole "
                f"numbers, so clouds are not known: gdal_translate -b {called[0]} -ot Byte makes a raster for --scl"
            )
            return replace(scene, warnings=(*scene.warnings, doubt))
        file = BandFile(path=scene.path, band=called[0]) if called else None
    if file is None:
        return scene
    clouds = CloudSource(kind, file, scene.grid, product.extent if product else None, options.access)
    clouds.check()
    local = {file.path} if Path(file.path).is_file() else set()
    far = {file.path} if remote.is_remote(file.path) else set()
    return replace(
        scene,
        clouds=clouds,
        files=tuple(sorted({*scene.files, *local})),
        remote=tuple(sorted({*scene.remote, *far})),
    )


def _resample(grid: Grid, options: SceneOptions, source: str) -> tuple[Grid, str | None]:
    """The grid with pixels of another size, and how to get there."""
    if (resolution := options.resolution) is None:
        return grid, None
    if not grid.crs or grid.transform.is_identity:
        raise OptionError(f"{source} has no place on a map, so no resolution either: leave --resolution out")
    own = math.hypot(grid.transform.a, grid.transform.d), math.hypot(grid.transform.b, grid.transform.e)
    factors = [resolution / size for size in own]
    if all(abs(factor - 1) < 1e-9 for factor in factors):
        return grid, None
    width, height = (
        max(1, math.ceil(count / factor - 1e-6))
        for count, factor in zip((grid.width, grid.height), factors, strict=True)
    )
    if width * height > options.max_pixels or max(width, height) > MAX_SIDE:
        size = f"{width} x {height} pixels, more than --max-pixels {options.max_pixels} or {MAX_SIDE} on a side"
        raise OptionError(f"at resolution {resolution} {source} would have {size}: choose a larger one")
    return Grid(grid.crs, grid.transform @ Affine.scale(*factors), width, height), (
        "average" if max(factors) > 1 else "bilinear"
    )


def _local_files(files: Iterable[str], product: Product | None) -> tuple[str, ...]:
    names = {name for name in files if Path(name).is_file()}
    return tuple(sorted(names | set(product.files if product else ())))


def _check_nodata(nodata: float, dtype: str) -> None:
    if not _fits(nodata, dtype):
        limits = np.iinfo(dtype)
        raise OptionError(
            f"nodata {nodata} cannot occur in {dtype}: expected a whole number {limits.min} to {limits.max}"
        )


def _fits(value: float, dtype: str) -> bool:
    if dtype in FLOATS:
        return True
    limits = np.iinfo(dtype)
    return math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max


def _mask_band(dataset: Any, chosen: tuple[int, ...]) -> int | None:
    """Number of the alpha band, 0 for an internal mask or one beside the file, None where neither exists.

    GDAL calls the fourth band of many R, G, B, infrared files alpha; one that is described as something else, or chosen
    as a colour, is none.
    """
    bands = zip(dataset.indexes, dataset.colorinterp, dataset.descriptions, strict=True)
    called_alpha = {index: description for index, colour, description in bands if colour == ColorInterp.alpha}
    for index, description in called_alpha.items():
        if index not in chosen and (not description or "alpha" in description.lower()):
            return int(index)
    flags = dataset.mask_flag_enums[chosen[0] - 1]
    return 0 if MaskFlags.per_dataset in flags and not called_alpha else None


def _name(source: str) -> str:
    file = Path(source)
    if file.name.startswith("MTD_") and file.parent.suffix.upper() == ".SAFE":
        file = file.parent
    name = file.name if file.is_dir() and file.suffix.upper() != ".SAFE" else file.stem
    return os.fsencode(name).decode("utf-8", "replace")  # names on disk need not be UTF-8, outputs must be


def _georeference_warnings(source: str, dataset: Any, grid: Grid) -> tuple[str, ...]:
    missing = []
    if not grid.crs:
        missing.append("coordinate reference system")
    if grid.transform.is_identity:
        missing.append("geotransform")
    if not missing:
        return ()
    remedy = "gdal_edit.py -a_srs … -a_ullr … sets them"
    if dataset.gcps[0]:
        remedy = "gdalwarp uses its ground control points"
    elif dataset.rpcs:
        remedy = "gdalwarp -rpc uses its rational polynomial coefficients"
    return (f"{source} has no {' and no '.join(missing)}: its records have no geometry ({remedy})",)
