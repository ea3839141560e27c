"""Which tiles a search looks at: place, time, clouds, and any condition on the columns of a record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import OptionError
from rsedge.runtime.outputs.geometry import from_wkb, polygons
from rsedge.runtime.search.where import columns_of, parse_time, parse_where

if TYPE_CHECKING:
    import pyarrow.compute as pc

    from rsedge.runtime.search.search_file import SearchFile

Box = tuple[float, float, float, float]
Mask = NDArray[np.bool_]

_WIDE = 180.0
"""Degrees of longitude beyond which a covering is that of a tile on the antimeridian, in two parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What a tile must be to be searched; tiles that lack what a filter asks for (a place, a time) are left out.

    Attributes:
        bbox: West, south, east, north in degrees; west greater than east crosses the antimeridian. Tiles that touch
            it pass, by the bounding box of each of their polygons.
        since: Acquired then or later: a date or time as ISO 8601 writes it, UTC unless it says otherwise.
        until: Acquired then or earlier; a date alone includes the whole day.
        max_cloud: Largest share of cloudy pixels, 0 to 1.
        where: A condition on columns, see :mod:`rsedge.runtime.search.where`.

    Raises:
        OptionError: Values that cannot be; all are named.
    """

    bbox: Box | None = None
    since: str | None = None
    until: str | None = None
    max_cloud: float | None = None
    where: str | None = None
    _times: tuple[datetime | None, datetime | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        problems = list(_box_problems(self.bbox))
        times = [
            self._time("since", self.since, problems),
            self._time("until", self.until, problems, end_of_day=True),
        ]
        since, until = times
        if since and until and since > until:
            problems.append(f"since {self.since} is after until {self.until}: exchange them")
        if self.max_cloud is not None and not 0 <= self.max_cloud <= 1:
            problems.append(f"max_cloud is {self.max_cloud}, expected a share from 0 to 1, such as 0.2")
        if problems:
            raise OptionError("; ".join(problems))
        object.__setattr__(self, "_times", (since, until))

    @staticmethod
    def _time(name: str, value: str | None, problems: list[str], *, end_of_day: bool = False) -> datetime | None:
        try:
            return None if value is None else parse_time(value.strip(), end_of_day=end_of_day)
        except ValueError:
            problems.append(f"{name} is {value!r}, expected a date such as 2024-05-31 or 2024-05-31T10:30:00Z")
            return None

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.bbox, self.since, self.until, self.max_cloud, self.where))

    def expression(self, file: SearchFile) -> pc.Expression | None:
        """All conditions as one pyarrow expression on the columns of ``file``; None where there are none.

        Raises:
            OptionError: ``where`` is no condition on these columns.
        """
        import pyarrow.compute as pc

        terms: list[Any] = []
        if self.bbox is not None:
            west, south, east, north = self.bbox
            left, right = pc.field("bbox", "xmin"), pc.field("bbox", "xmax")
            along = (left <= east, right >= west)
            terms += [along[0] | along[1]] if west > east else [*along]
            terms += [pc.field("bbox", "ymin") <= north, pc.field("bbox", "ymax") >= south]
        since, until = self._times
        terms += [pc.field("datetime") >= pc.scalar(since)] if since else []
        terms += [pc.field("datetime") <= pc.scalar(until)] if until else []
        terms += [pc.field("cloud_fraction") <= self.max_cloud] if self.max_cloud is not None else []
        terms += [parse_where(self.where, columns_of(file.schema))] if self.where is not None else []
        combined = None
        for term in terms:
            combined = term if combined is None else combined & term
        return combined

    def rows(self, file: SearchFile) -> RowFilter:
        """The filters made ready for a file.

        Raises:
            OptionError: See ``expression``; the file is damaged, or gone.
        """
        return RowFilter(file, self)


class RowFilter:
    """Says which rows of a file pass; may be asked by several threads."""

    def __init__(self, file: SearchFile, filters: Filters) -> None:
        self._file, self._bbox = file, filters.bbox
        self._expression = filters.expression(file)
        self._fragment: Any = None
        self._groups: frozenset[int] = frozenset(range(file.groups))
        if self._expression is None:
            return
        from pyarrow import dataset, fs

        with file.reading():
            self._fragment = dataset.ParquetFileFormat().make_fragment(str(file.path), fs.LocalFileSystem())
            schema = self._fragment.physical_schema
            kept = self._fragment.split_by_row_group(self._expression, schema)  # those whose statistics allow it
            self._groups = frozenset(group.id for part in kept for group in part.row_groups)

    def mask(self, group: int) -> Mask | None:
        """Which rows of a row group pass, bool [N]; None where all do.

        Raises:
            OptionError: The file is damaged, or gone.
        """
        if self._expression is None:
            return None
        if group not in self._groups:
            return np.zeros(self._file.group_rows(group), np.bool_)
        import pyarrow.compute as pc

        columns = {"keep": self._expression}
        if self._bbox is not None:
            columns["wide"] = pc.field("bbox", "xmax") - pc.field("bbox", "xmin") > _WIDE
        with self._file.reading(group):
            part = self._fragment.subset(row_group_ids=[group])
            found = part.to_table(columns=columns, use_threads=False)
            keep = _flags(found["keep"])
            if self._bbox is not None and (unsure := np.flatnonzero(keep & _flags(found["wide"]))).size:
                shapes = part.to_table(columns=["geometry"], use_threads=False)["geometry"].take(unsure)
                keep[unsure] = [_touches(shape.as_py(), self._bbox) for shape in shapes]
        return keep


def _flags(column: Any) -> Mask:
    """A boolean column; what is missing is False."""
    import pyarrow.compute as pc

    flags: Mask = np.array(pc.fill_null(column, False))
    return flags


def _touches(shape: bytes, box: Box) -> bool:
    """Whether a box touches the bounding box of one of the polygons."""
    try:
        geometry = from_wkb(shape)
    except ValueError:
        return True  # its covering touches, and nothing says otherwise
    west, south, east, north = box
    for rings in polygons(geometry):
        lon, lat = np.array(rings[0]).T
        along = (lon.min() <= east, lon.max() >= west)
        if (any(along) if west > east else all(along)) and lat.min() <= north and lat.max() >= south:
            return True
    return False


def _box_problems(box: Box | None) -> Iterator[str]:
    if box is None:
        return
    west, south, east, north = box
    if not (-180 <= west <= 180 and -180 <= east <= 180):
        yield f"bbox goes from longitude {west:g} to {east:g}, expected -180 to 180 (west > east crosses 180)"
    if not -90 <= south <= north <= 90:
        yield f"bbox goes from latitude {south:g} to {north:g}, expected south before north, -90 to 90"
