"""A STAC Item 1.1 for what a run wrote: where and when, counts, models, its files, and the scenes it comes from.

Everything is taken from the records and from names: no clock is read, so that an interrupted run writes the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, get_args
from urllib.parse import quote

import rsedge
from rsedge.errors import OptionError
from rsedge.runtime.outputs.files import open_file
from rsedge.runtime.outputs.outline import Outline, bounding_box, merge, to_geojson
from rsedge.runtime.outputs.records import Status
from rsedge.runtime.outputs.target import Target
from rsedge.texts import plain

if TYPE_CHECKING:
    from rsedge.runtime.outputs.records import TileResult

STAC_VERSION = "1.1.0"
PROCESSING = "https://stac-extensions.github.io/processing/v1.1.0/schema.json"
# What STAC lets say of a time that nobody knows: null, within a range. This one leaves nothing out.
UNKNOWN_TIME = ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z")

_STATUSES = get_args(Status)
_MEDIA_TYPES = {
    "geojson": "application/geo+json",
    "geojsonl": "application/x-ndjson",
    "json": "application/json",
    "csv": "text/csv",
    "parquet": "application/vnd.apache.parquet",
    "gpkg": "application/geopackage+sqlite3",
    "html": "text/html",
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "tif": "image/tiff; application=geotiff",
    "tiff": "image/tiff; application=geotiff",
    "jp2": "image/jp2",
    "xml": "application/xml",
    "qml": "application/xml",
    "toml": "application/toml",
}
_ROLES = {"report": ["overview"], "sheet": ["overview"], "style": ["metadata"]}
_TITLES = {
    "captions": "Captions of tiles",
    "classes": "Classes of tiles",
    "embeddings": "Embeddings of tiles",
    "report": "Report with map and captions",
    "sheet": "Contact sheet",
    "style": "QGIS style",
}
# A query or a name before the host may be a key to the file, and an item is for others to read.
_REMOTE = re.compile(r"^(?:/vsicurl/)?(https?://)(?:[^/@]*@)?([^?#]*)")
_BUCKET = re.compile(r"^(?:/vsi(s3|gs)/|(s3|gs)://)(.*)$")
_ARCHIVE = re.compile(r"^/vsi(?:zip|tar|gzip)/")


class SceneSource(Protocol):
    """What an item says of a scene."""

    @property
    def name(self) -> str:
        """What records call it."""

    @property
    def source(self) -> str:
        """The file behind it, or its address."""


def result_item_target(
    path: Path,
    *,
    scenes: Iterable[SceneSource],
    model: str,
    output: Path | None,
    others: Mapping[str, Path] | None = None,
    key: str = "captions",
    file_format: str | None = None,
) -> Target:
    """The STAC Item of a run as an output of the run.

    Args:
        path: Where to, ending in ``.json``.
        scenes: What the tiles are of, each linked as ``derived_from``.
        model: ``name@hash12`` of the bundle.
        output: The main output, or None where it went to standard output.
        others: Further files of the run by the key of their asset: ``embeddings``, ``report``, ``sheet``, ``style``
            or any other.
        key: That of the main output's asset, such as ``captions`` or ``classes``.
        file_format: Of the main output, where its suffix does not name it.

    Raises:
        OptionError: ``path`` does not end in ``.json``, or is one of the other files.
    """
    files = {**({} if output is None else {key: output}), **(others or {})}
    if path.suffix.lower() != ".json":
        raise OptionError(f"a STAC item is JSON: end {os.fspath(path)!r} in .json")
    if path.resolve() in {file.resolve() for file in files.values()}:
        raise OptionError(f"the STAC item and another output were both to be written to {path}: name two files")
    assets = {name: _asset(path, name, file, file_format if name == key else None) for name, file in files.items()}
    links = [_link(path, scene) for scene in scenes]
    item_id = path.stem if output is None else output.stem
    return Target(
        path, lambda: open_file(path, partial(_ItemWriter, item_id=item_id, model=model, assets=assets, links=links))
    )


class _ItemWriter:
    """Results to an item: what they have in common, in the room of a few."""

    def __init__(
        self,
        stream: BinaryIO,
        *,
        item_id: str,
        model: str,
        assets: Mapping[str, Any],
        links: Sequence[Mapping[str, str]],
    ) -> None:
        self._stream = stream
        self._item_id, self._model, self._assets, self._links = item_id, model, assets, links
        self._counts: Counter[str] = Counter()
        self._outlines: dict[tuple[str, str | None], Outline] = {}
        self._known: dict[str, set[str]] = {
            name: set() for name in ("datetime", "rendering", "mgrs_tile", "product_id", "scene_crs")
        }

    def write(self, results: Sequence[TileResult]) -> None:
        places: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
        for result in results:
            record = result.record
            self._counts[record.status] += 1
            if record.geometry is not None:
                places.setdefault((record.scene, result.path), []).append(record.geometry)
            for name, values in self._known.items():
                if (value := getattr(record, name)) is not None:
                    values.add(value)
        for scene, geometries in places.items():
            self._outlines.setdefault(scene, Outline()).add(geometries)

    def finish(self) -> None:
        hulls = merge(hull for outline in self._outlines.values() if (hull := outline.hull()) is not None)
        box = bounding_box(hulls)
        item = {
            "type": "Feature",
            "stac_version": STAC_VERSION,
            "stac_extensions": [PROCESSING],
            "id": plain(self._item_id),
            "geometry": to_geojson(hulls),
            **({} if box is None else {"bbox": box}),
            "properties": self._properties(),
            "links": self._links,
            "assets": self._assets,
        }
        text = json.dumps(item, ensure_ascii=False, allow_nan=False, indent=2)
        self._stream.write(text.encode("utf-8", "replace") + b"\n")

    def _properties(self) -> dict[str, Any]:
        lists = {
            f"rsedge:{plural}": sorted(self._known[name])
            for name, plural in (
                ("rendering", "renderings"),
                ("mgrs_tile", "mgrs_tiles"),
                ("product_id", "product_ids"),
                ("scene_crs", "scene_crs"),
            )
        }
        return {
            **_times(self._known["datetime"]),
            "rsedge:model": self._model,
            "rsedge:tiles": sum(self._counts.values()),
            "rsedge:tiles_by_status": {status: self._counts[status] for status in _STATUSES},
            **{name: values for name, values in lists.items() if values},
            "processing:software": {"rsedge": rsedge.__version__},
        }


def _times(known: Iterable[str]) -> dict[str, str | None]:
    """``datetime`` of one moment; of several, null with the first and the last."""
    moments = sorted(datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(timezone.utc) for text in known)
    if not moments:
        first, last = UNKNOWN_TIME
    else:
        first, last = (
            each.isoformat(timespec="milliseconds" if each.microsecond else "seconds").replace("+00:00", "Z")
            for each in (moments[0], moments[-1])
        )
    if first == last:
        return {"datetime": first}
    return {"datetime": None, "start_datetime": first, "end_datetime": last}


def _asset(item: Path, key: str, file: Path, file_format: str | None) -> dict[str, Any]:
    kind = (file_format or file.suffix).lower().removeprefix(".")
    media = {"type": _MEDIA_TYPES[kind]} if kind in _MEDIA_TYPES else {}
    return {
        "href": _relative(item, os.fspath(file)),
        "title": _TITLES.get(key, key),
        **media,
        "roles": _ROLES.get(key, ["data"]),
    }


def _link(item: Path, scene: SceneSource) -> dict[str, str]:
    if match := _REMOTE.match(scene.source):
        href = match[1] + quote(match[2], safe="/%:!$&'()*+,;=")
    elif match := _BUCKET.match(scene.source):
        href = f"{match[1] or match[2]}://{match[3]}"
    else:
        href = _relative(item, _ARCHIVE.sub("", scene.source))
    kind = _MEDIA_TYPES.get(Path(scene.source).suffix.lower().removeprefix("."))
    return {"rel": "derived_from", "href": href, **({"type": kind} if kind else {}), "title": plain(scene.name)}


def _relative(item: Path, file: str) -> str:
    """How the item refers to a file: from its own folder, as a URI."""
    path = os.path.relpath(os.path.abspath(file), os.path.abspath(item.parent))  # noqa: PTH100 - links stay as named
    path = Path(path).as_posix()
    return quote(os.fsencode(path if path.startswith(".") else f"./{path}"))
