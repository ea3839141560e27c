"""What a run would do with a scene, and what a bundle is, as values: what ``rsedge info`` says."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rsedge.bundle import read_bundle
from rsedge.runtime.scenes.tiles import Tile, TileGrid

if TYPE_CHECKING:
    from rsedge.bundle import TensorSpec
    from rsedge.runtime.diagnostics.estimate import Estimate
    from rsedge.runtime.run.sources import TileOptions
    from rsedge.runtime.scenes.scene import Scene

_CARD_BYTES = 1 << 20  # of a model card; the summary is at its beginning


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How a scene is cut."""

    tile_size: int
    overlap: int
    edge: str
    """See ``TileGrid``."""
    rows: int
    cols: int
    """Of the grid."""
    total: int
    """Tiles."""
    whole: int
    """Tiles that lie wholly in the scene."""

    @classmethod
    def of(cls, grid: TileGrid) -> Tiles:
        """The tiles of a grid."""
        size = grid.tile_size
        wide = sum(grid.tile(col).width == size for col in range(grid.cols))
        high = sum(grid.tile(row * grid.cols).height == size for row in range(grid.rows))
        return cls(
            tile_size=size,
            overlap=grid.overlap,
            edge=grid.edge,
            rows=grid.rows,
            cols=grid.cols,
            total=len(grid),
            whole=wide * high,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneDescription:
    """A scene as a run would read it; a field without a text is that of ``Scene``."""

    kind: Literal["scene"] = "scene"
    name: str
    source: str
    driver: str
    width: int
    height: int
    band_count: int
    """Bands in the file, used or not."""
    dtype: str
    crs: str | None
    """Such as ``EPSG:32629``, or None."""
    resolution: tuple[float, float] | None
    """Size of a pixel along columns and rows, in ``unit``, or None without a geotransform."""
    unit: str | None
    """Of the map: ``metre``, ``degree``, …; None without a coordinate reference system."""
    bbox: tuple[float, float, float, float] | None
    """West, south, east, north in WGS 84, west of an antimeridian in between greater than east; or None."""
    bands: tuple[int, ...]
    bands_reason: str
    pixel_values: str
    """What the numbers are: ``reflectance``, ``dn`` or ``colours``."""
    boa_offset: int | None
    """Added to digital numbers, or None for colours."""
    full_scale: int | None
    """Digital number that becomes 255, or None for colours."""
    rule: str
    """How pixels become 8-bit, as one line."""
    rule_reason: str
    """Why so, and where the offset comes from."""
    nodata: tuple[str | None, ...]
    """Per band the value that means no data, as text, or None; empty where no band has one."""
    mask: str | None
    """What else says where data are missing, or None."""
    clouds: str | None
    """Where clouds are known from, or None."""
    resampled: str | None
    """Resampling that brings it to its size, or None."""
    datetime: str | None
    product_id: str | None
    mgrs_tile: str | None
    files: int
    """Number of local files it comes from."""
    tiles: Tiles
    """How it is cut."""
    estimate: Estimate | None
    """Time and memory of a run, or None where no bundle can be opened."""
    warnings: tuple[str, ...]
    """What the user should know, one line each."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)


def describe_scene(scene: Scene, options: TileOptions, estimate: Estimate | None = None) -> SceneDescription:
    """What a run with ``options`` would do with a scene; no pixel is read.

    Raises:
        OptionError: The options leave no tile.
    """
    return SceneDescription(**_facts(scene), tiles=Tiles.of(options.grid(scene)), estimate=estimate)


def _facts(scene: Scene) -> dict[str, Any]:
    """The attributes of a scene as those of its description: the only place that knows both."""
    rule = scene.reflectance
    located = bool(scene.crs) and not scene.transform.is_identity
    return {
        "name": scene.name,
        "source": scene.source,
        "driver": scene.driver,
        "width": scene.width,
        "height": scene.height,
        "band_count": scene.band_count,
        "dtype": scene.dtype,
        "crs": scene.crs.to_string() if scene.crs else None,
        "resolution": None if scene.transform.is_identity else _resolution(scene.transform),
        "unit": _unit(scene.crs) if scene.crs else None,
        "bbox": _bbox(scene) if located else None,
        "bands": scene.bands,
        "bands_reason": scene.bands_reason,
        "pixel_values": scene.rendering.values,
        "boa_offset": rule.boa_offset if rule else None,
        "full_scale": rule.full_scale if rule else None,
        "rule": scene.rule,
        "rule_reason": scene.rendering_reason,
        "nodata": _nodata(scene.nodata),
        "mask": None if scene.mask_band is None else f"alpha, band {scene.mask_band}" if scene.mask_band else "mask",
        "clouds": scene.clouds.describe() if scene.clouds else None,
        "resampled": scene.resampled,
        "datetime": scene.datetime,
        "product_id": scene.product_id,
        "mgrs_tile": scene.mgrs_tile,
        "files": len(scene.files),
        "warnings": scene.warnings,
    }


def _nodata(values: tuple[float | None, ...]) -> tuple[str | None, ...]:
    """As text, because JSON has no nan."""
    if all(value is None for value in values):
        return ()
    return tuple(None if value is None else f"{value:g}" for value in values)


def _resolution(transform: Any) -> tuple[float, float]:
    across, down = math.hypot(transform.a, transform.d), math.hypot(transform.b, transform.e)
    return float(f"{across:.9g}"), float(f"{down:.9g}")


def _unit(crs: Any) -> str:
    return "degree" if crs.is_geographic else str(crs.linear_units)


def _bbox(scene: Scene) -> tuple[float, float, float, float] | None:
    """Of the whole scene, as RFC 7946 writes it; None where a corner is outside the projection."""
    (geometry,) = scene.footprints([Tile(0, 0, 0, 0, 0, scene.width, scene.height)])
    if geometry is None:
        return None
    polygons = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    boxes = []
    for (ring,) in polygons:
        lon, lat = zip(*ring, strict=True)
        boxes.append((min(lon), min(lat), max(lon), max(lat)))
    wests, souths, easts, norths = zip(*boxes, strict=True)
    west, east = min(wests), max(easts)
    if len(boxes) > 1:  # the parts are those that end at 180 and those that begin at -180
        west, east = min(w for w in wests if w > -180), max(e for e in easts if e < 180)
    return west, min(souths), east, max(norths)


# Bundles


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphDescription:
    """One graph of a bundle, its hash checked; a field without a text is that of ``Graph``."""

    role: str
    """What it is for, such as ``vision``."""
    file: str
    bytes: int
    """Size with its external data."""
    sha256: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    """Name, type and shape, such as ``pixels: uint8 [batch, 224, 224, 3]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleDescription:
    """A bundle whose files have all been checked against its manifest.

    A field without a text is that of ``Manifest``: a part of it as JSON values, or None where the bundle has none.
    """

    kind: Literal["bundle"] = "bundle"
    path: str
    """Its folder."""
    name: str
    model: str
    """``name@hash12``, as in every record."""
    family: str
    precision: str
    format_version: int
    sha256: str
    """Of the manifest, which names the model exactly."""
    bytes: int
    """Size of all files the manifest vouches for."""
    image: dict[str, Any]
    graphs: tuple[GraphDescription, ...]
    """Its graphs."""
    tokens: dict[str, Any] | None
    generation: dict[str, Any] | None
    decoder: dict[str, Any] | None
    embedding: dict[str, Any] | None
    tokenizer: dict[str, Any] | None
    provenance: dict[str, Any]
    parity: dict[str, Any]
    summary: str | None
    """First sentences of its card, or None."""
    licence: str | None
    """What its card says, or None."""
    labels: tuple[str, ...]
    """Tags of its card."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)


def describe_bundle(path: str | Path) -> BundleDescription:
    """What a bundle says of itself, once every file of it has been checked.

    Raises:
        BundleError: It is damaged; the message lists everything that is wrong.
    """
    bundle = read_bundle(path)
    manifest = bundle.manifest
    summary, licence, labels = _card(bundle.path)

    def part(value: Any) -> dict[str, Any] | None:
        return None if value is None else dataclasses.asdict(value)

    return BundleDescription(
        path=str(bundle.path),
        name=manifest.name,
        model=bundle.model,
        family=manifest.family,
        precision=manifest.precision,
        format_version=manifest.format_version,
        sha256=bundle.hash,
        bytes=sum(ref.size for ref in dict.fromkeys(manifest.files)),
        image=dataclasses.asdict(manifest.image),
        graphs=tuple(
            GraphDescription(
                role=role,
                file=graph.file,
                bytes=sum(ref.size for ref in graph.files),
                sha256=graph.sha256,
                opset=graph.opset,
                inputs=tuple(map(_tensor, graph.inputs)),
                outputs=tuple(map(_tensor, graph.outputs)),
            )
            for role, graph in manifest.graphs.items()
        ),
        tokens=part(manifest.tokens),
        generation=part(manifest.generation),
        decoder=part(manifest.decoder),
        embedding=part(manifest.embedding),
        tokenizer=part(manifest.tokenizer),
        provenance=dataclasses.asdict(manifest.provenance),
        parity=manifest.parity,
        summary=summary,
        licence=licence,
        labels=labels,
    )


def is_bundle(target: str) -> bool:
    """Whether a target of ``rsedge info`` is a bundle: by its name, or by what the folder holds."""
    path = Path(target)
    return path.name.endswith(".rsedge") or (path / "manifest.json").is_file()


def _tensor(tensor: TensorSpec) -> str:
    return f"{tensor.name}: {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


def _card(folder: Path) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Summary, licence and tags of the card; the last two are of its front matter, a few lines of YAML."""
    path = folder / "README.md"
    try:
        # The manifest does not vouch for it: it may be a pipe, endless, or a link to a file of the user's.
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            return None, None, ()
        with path.open("rb") as stream:
            text = stream.read(_CARD_BYTES).decode("utf-8", "ignore")
    except OSError:  # a bundle works without
        return None, None, ()
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    paragraphs = (text[front.end() :] if front else text).split("\n\n")
    summary = next((part.strip() for part in paragraphs if part.strip() and not part.lstrip().startswith("#")), None)
    licence, labels, key = None, [], ""
    for line in front.group(1).splitlines() if front else []:
        if found := re.fullmatch(r"([\w-]+):\s*(.*)", line):
            key, value = found[1], found[2].strip("'\" ")
            licence = value or licence if key == "license" else licence
        elif key == "tags" and (entry := re.fullmatch(r"\s*-\s+(.+)", line)):
            labels.append(entry[1].strip("'\" "))
    return summary and " ".join(summary.split()), licence, tuple(labels)
