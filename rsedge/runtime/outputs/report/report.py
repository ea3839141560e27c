"""A run as one offline HTML file: each scene's picture with its tiles, captions on hover and click, and a filter."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image

from rsedge.errors import OptionError, SceneError
from rsedge.runtime.outputs.files import Target, file_target
from rsedge.runtime.outputs.rasters import class_colours
from rsedge.runtime.outputs.report.sheet import SceneOrder
from rsedge.runtime.scenes.quicklook import quicklook
from rsedge.texts import plain, redact

if TYPE_CHECKING:
    from rsedge.runtime.outputs.records import TileResult
    from rsedge.runtime.scenes.scene import Scene

_SUFFIXES = (".html", ".htm")
_MANY = 4  # scenes whose pictures have their full size; those of more are smaller, so that the file stays small
_SMALLEST = 320
_QUALITY = 82
_COPIED = (
    "row col row_off col_off width height status caption score message nodata_fraction cloud_fraction".split()  # noqa: SIM905
)
_FIELDS = [*_COPIED, "lon", "lat"]
# What could end the data's element, or begin another one, is written so that only JSON sees it.
_IN_SCRIPT = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}


def report_target(
    path: str | os.PathLike[str],
    scenes: Sequence[Scene],
    *,
    longest: int = 1400,
    classes: Sequence[str] | None = None,
) -> Target:
    """An output of a run that is one HTML file, with everything in it and nothing loaded from anywhere.

    The longer side of a scene's picture has at most ``longest`` pixels, less where scenes are many. ``classes`` are the
    labels of a classification, whose tiles have a class in place of a caption.

    Raises:
        OptionError: The suffix is another one, or ``longest`` is below 1.
    """
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise OptionError(f"the report {os.fspath(path)!r} is written as HTML: end its name in .html")
    if longest < 1:
        raise OptionError(f"longest is {longest}, expected at least 1 pixel")
    share = min(1.0, (_MANY / max(1, len(scenes))) ** 0.5)
    side = min(longest, max(_SMALLEST, int(longest * share)))
    return file_target(Path(path), partial(ReportWriter, scenes=tuple(scenes), longest=side, classes=classes))


class ReportWriter:
    """Gathers the results of a run and writes the page in the end."""

    def __init__(
        self, stream: BinaryIO, scenes: Sequence[Scene], longest: int, classes: Sequence[str] | None = None
    ) -> None:
        self._stream, self._scenes, self._longest, self._classes = stream, scenes, longest, classes
        self._order = SceneOrder(scenes)
        self._entries: list[dict[str, Any]] = [
            {
                "name": scene.name,
                "width": scene.width,
                "height": scene.height,
                "crs": plain(scene.crs.to_string()) if scene.crs else None,
                "datetime": scene.datetime,
                "product": None,
                "mgrs": None,
                "model": None,
                "rendering": scene.rule,
                "warnings": list(scene.warnings),
                "picture": None,
                "tiles": [],
            }
            for scene in scenes
        ]

    def write(self, results: Iterable[TileResult]) -> None:
        """Append the results of a segment."""
        for result in results:
            entry, record = self._entries[self._order.number(result)], result.record
            if not entry["tiles"]:
                crs = "none: positions are pixels" if record.scene_crs == "pixel" else record.scene_crs
                entry |= {
                    "crs": crs or entry["crs"],
                    "product": record.product_id,
                    "mgrs": record.mgrs_tile,
                    "model": record.model,
                    "rendering": record.rendering or entry["rendering"],
                }
            entry["tiles"].append([*(getattr(record, name) for name in _COPIED), *centre(record.geometry)])

    def finish(self) -> None:
        """Read the pictures and write the page."""
        for entry, scene in zip(self._entries, self._scenes, strict=True):
            data = io.BytesIO()
            try:  # without a picture the results are still worth showing
                image = Image.fromarray(quicklook(scene, longest=self._longest), "RGBA")  # transparent without data
                image.save(data, format="WEBP", quality=_QUALITY, method=4)
                entry["picture"] = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
            except SceneError as error:
                entry["warnings"].append(f"no picture: {redact(plain(str(error)))}")
        names = ", ".join(dict.fromkeys(scene.name for scene in self._scenes))
        classes = None
        if self._classes is not None:
            colours = ["rgb({} {} {})".format(*colour[:3]) for colour in class_colours(len(self._classes))]
            classes = [[plain(label), colour] for label, colour in zip(self._classes, colours, strict=True)]
        page = {"fields": _FIELDS, "classes": classes, "scenes": self._entries}
        self._stream.write(_page(f"{names} – rsedge", page))


def centre(geometry: dict[str, Any] | None) -> tuple[float | None, float | None]:
    """Longitude and latitude of the middle of a footprint, a small convex ring whose last point repeats the first."""
    if geometry is None:
        return None, None
    if geometry["type"] == "MultiPolygon":  # cut at the antimeridian: the two parts meet there
        rings = [polygon[0][:-1] for polygon in geometry["coordinates"]]
        points = [(lon + 360 if lon < 0 else lon, lat) for ring in rings for lon, lat in ring]
    else:
        points = geometry["coordinates"][0][:-1]
    lon, lat = ((min(values) + max(values)) / 2 for values in zip(*points, strict=True))
    return round(lon - 360 if lon > 180 else lon, 6), round(lat, 6)


def _page(title: str, data: dict[str, Any]) -> bytes:
    """The file, UTF-8; the same for the same data.

    Its policy lets nothing be loaded from anywhere, and nothing run but the one script, known by its hash. The texts of
    ``data``, which the script shows, may hold any markup, and are plain (:mod:`rsedge.texts`).
    """
    style, script = _part("report.css"), _part("report.js")
    text = Template(_part("report_template.html")).substitute(
        policy=(
            f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
            "base-uri 'none'; form-action 'none'"
        ),
        title=html.escape(plain(title)),
        style=style,
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).translate(_IN_SCRIPT),
        script=script,
    )
    return text.encode("utf-8")


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _source(text: str) -> str:
    """A source expression of Content-Security-Policy that allows just this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
