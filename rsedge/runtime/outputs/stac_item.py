"""A STAC Item 1.1 for what a run wrote: where and when, counts, models, its files, and the scenes it comes from.

Everything is taken from the records, from names and from the scenes' files. No clock is read, so that an interrupted
run writes the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_args
from urllib.parse import quote

import rsedge
from rsedge.errors import OptionError
from rsedge.runtime.outputs.files import Target, file_target
from rsedge.runtime.outputs.geometry import Outline, merge, outline_box, to_geojson
from rsedge.runtime.outputs.records import Status
from rsedge.texts import plain, rfc3339

if TYPE_CHECKING:
    from rsedge.runtime.outputs.records import TileResult
    from rsedge.runtime.scenes.scene import Scene

PROCESSING = "https://stac-extensions.github.io/processing/v1.1.0/schema.json"
# STAC lets an unknown time be null within a range. This one leaves nothing out.
_UNKNOWN_TIME = ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z")

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
_LISTS = {"rendering": "renderings", "mgrs_tile": "mgrs_tiles", "product_id": "product_ids", "scene_crs": "scene_crs"}
"""Field of a record → property with its different values."""
# A query or a name before the host may be a key to the file, and an item is for others to read.
_REMOTE = re.compile(r"^(?:/vsicurl/)?(https?://)(?:[^/@]*@)?([^?#]*)")
_BUCKET = re.compile(r"^(?:/vsi(s3|gs)/|(s3|gs)://)(.*)$")
_DATE = re.compile(r"(?<!\d)(?:19|20)\d\d(-?)\d\d\1\d\d(?!\d)")
_ARCHIVE = re.compile(r"^/vsi(?:zip|tar|gzip)/")


def result_item_target(
    path: Path,
    *,
    scenes: Iterable[Scene],
    model: str,
    output: Path | None,
    others: Mapping[str, Path] | None = None,
    key: str = "captions",
    file_format: str | None = None,
) -> Target:
    """Return the STAC Item of a run as an output of the run.

    Args:
        path: Path that ends in ``.json``.
        scenes: The scenes of the tiles, each linked as ``derived_from``.
        model: ``name@hash12`` of the bundle.
        output: The main output, or None where it went to standard output.
        others: Further files of the run by the key of their asset: ``embeddings``, ``report``, ``sheet``, ``style``
            or any other.
        key: Asset key of the main output, such as ``captions`` or ``classes``.
        file_format: Format of the main output, where its suffix does not name it.

    Raises:
        OptionError: ``path`` does not end in ``.json``, or is one of the other files.
    """
    files = {**({} if output is None else {key: output}), **(others or {})}
    if path.suffix.lower() != ".json":
        raise OptionError(f"a STAC item is JSON: end {os.fspath(path)!r} in .json")
    if path.resolve() in {file.resolve() for file in files.values()}:
        raise OptionError(f"the STAC item and another output were both to be written to {path}: name two files")
    assets = {}
    for name, file in files.items():
        kind = ((file_format if name == key else None) or file.suffix).lower().removeprefix(".")
        assets[name] = {
            "href": _relative(path, os.fspath(file)),
            "title": _TITLES.get(name, name),
            **({"type": _MEDIA_TYPES[kind]} if kind in _MEDIA_TYPES else {}),
            "roles": _ROLES.get(name, ["data"]),
        }
    scenes = list(scenes)
    fields = {"links": [_link(path, scene) for scene in scenes], "assets": assets}
    item_id = path.stem if output is None else output.stem
    # Times for records without one: of the dates in all names, else of the files.
    days = [day for scene in scenes if (day := _day(scene.name))]
    if days and len(days) == len(scenes):
        times = [moment for day in days for moment in (day, day + timedelta(days=1, seconds=-1))]
        source = "dates in the names of the scenes: no acquisition time is known"
    else:
        times = [
            datetime.fromtimestamp(int(Path(file).stat().st_mtime), timezone.utc)
            for scene in scenes
            for file in scene.files
            if Path(file).is_file()
        ]
        source = "modification times of the files: no acquisition time is known"
    dated = sorted(times), source if times else "no time is known"
    return file_target(path, partial(_ItemWriter, item_id=item_id, model=model, fields=fields, dated=dated))


def _day(name: str) -> datetime | None:
    """The first date in a name, which products give to the acquisition."""
    for match in _DATE.finditer(name):
        with suppress(ValueError):  # a number that is no date
            return datetime.strptime(match[0].replace("-", ""), "%Y%m%d").replace(tzinfo=timezone.utc)
    return None


class _ItemWriter:
    """Results to an item; memory does not grow with their number."""

    def __init__(
        self,
        stream: BinaryIO,
        *,
        item_id: str,
        model: str,
        fields: Mapping[str, Any],
        dated: tuple[Sequence[datetime], str],
    ) -> None:
        self._stream, self._item_id, self._model, self._fields = stream, item_id, model, fields
        self._dated = dated
        self._counts: Counter[str] = Counter()
        self._outlines: dict[tuple[str, str | None], Outline] = {}
        self._known: dict[str, set[str]] = {name: set() for name in ("datetime", *_LISTS)}

    def write(self, results: Iterable[TileResult]) -> None:
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
        # 1. The place: one hull per scene, joined where they touch.
        hulls = merge(hull for outline in self._outlines.values() if (hull := outline.hull()) is not None)
        box = outline_box(hulls)
        # 2. The time: of one moment itself, of several null with the first and the last.
        texts = (text.replace("Z", "+00:00") for text in self._known["datetime"])
        moments = sorted(datetime.fromisoformat(text).astimezone(timezone.utc) for text in texts)
        source = {}
        if not moments:
            moments = list(self._dated[0])
            source = {"rsedge:datetime_source": self._dated[1]}
        first, last = (rfc3339(moments[0]), rfc3339(moments[-1])) if moments else _UNKNOWN_TIME
        span = {"datetime": None, "start_datetime": first, "end_datetime": last}
        # 3. The item.
        properties = {
            **({"datetime": first} if first == last else span),
            **source,
            "rsedge:model": self._model,
            "rsedge:tiles": sum(self._counts.values()),
            "rsedge:tiles_by_status": {status: self._counts[status] for status in get_args(Status)},
            **{f"rsedge:{_LISTS[name]}": sorted(self._known[name]) for name in _LISTS if self._known[name]},
            "processing:software": {"rsedge": rsedge.__version__},
        }
        item = {
            "type": "Feature",
            "stac_version": "1.1.0",
            "stac_extensions": [PROCESSING],
            "id": plain(self._item_id),
            "geometry": to_geojson(hulls),
            **({} if box is None else {"bbox": box}),
            "properties": properties,
            **self._fields,
        }
        text = json.dumps(item, ensure_ascii=False, allow_nan=False, indent=2)
        self._stream.write(text.encode("utf-8", "replace") + b"\n")


def _link(item: Path, scene: Scene) -> dict[str, str]:
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
