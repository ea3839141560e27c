"""Which tiles a search looks at: place, time, clouds, and any condition on the columns of a record.

The language of ``--where`` is conditions on columns as SQL writes them, parsed into expressions::

    condition := all {"or" all}        all := negated {"and" negated}        negated := ["not"] simple
    simple    := "(" condition ")" | COLUMN test
    test      := ("=" | "!=" | "<>" | "<" | "<=" | ">" | ">=") value
               | ["not"] "in" "(" value {"," value} ")" | ["not"] "like" TEXT | "is" ["not"] "null"
    value     := NUMBER | TEXT        TEXT in single quotes, a quote inside doubled; times as ISO 8601 in TEXT

Words are known in any case. As in SQL, a comparison with a missing value is neither true nor false, and only what is
true is kept. ``like`` knows ``%`` (any text) and ``_`` (one character).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time, timezone
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import OptionError
from rsedge.runtime.outputs.geometry import from_wkb, polygons
from rsedge.runtime.search.search_file import SearchFile, reading
from rsedge.texts import plain

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc

Box = tuple[float, float, float, float]
Mask = NDArray[np.bool_]

_WIDE = 180.0
"""Degrees of longitude beyond which a covering is that of a tile on the antimeridian, in two parts."""
_TOKENS = re.compile(
    r"""\s*(?:(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
    |(?P<text>'(?:[^']|'')*')
    |(?P<name>[A-Za-z_][A-Za-z_0-9.]*|"[^"]*")
    |(?P<symbol><=|>=|<>|!=|[=<>(),]))""",
    re.VERBOSE,
)
_WORDS = frozenset(["and", "or", "not", "in", "like", "is", "null"])
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_DEEPEST = 50
_NUMBER, _TEXT, _TIME = "a number", "a text in quotes", "a time in quotes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What a tile must be to be searched; tiles that lack what a filter asks for (a place, a time) are left out.

    Attributes:
        bbox: West, south, east, north in degrees; west greater than east crosses the antimeridian. Tiles that touch
            it pass, by the bounding box of each of their polygons.
        since: Acquired then or later: a date or time as ISO 8601 writes it, UTC unless it says otherwise.
        until: Acquired then or earlier; a date alone includes the whole day.
        max_cloud: Largest share of cloudy pixels, 0 to 1.
        where: A condition on columns in the language above.

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
        problems = []
        if self.bbox is not None:
            west, south, east, north = self.bbox
            if not (-180 <= west <= 180 and -180 <= east <= 180):
                problems.append(
                    f"bbox goes from longitude {west:g} to {east:g}, expected -180 to 180 (west > east crosses 180)"
                )
            if not -90 <= south <= north <= 90:
                problems.append(
                    f"bbox goes from latitude {south:g} to {north:g}, expected south before north, -90 to 90"
                )
        times: dict[str, datetime | None] = {"since": None, "until": None}
        for name in times:
            value: str | None = getattr(self, name)
            try:
                times[name] = None if value is None else _parse_time(value.strip(), end_of_day=name == "until")
            except ValueError:
                problems.append(f"{name} is {value!r}, expected a date such as 2024-05-31 or 2024-05-31T10:30:00Z")
        since, until = times.values()
        if since and until and since > until:
            problems.append(f"since {self.since} is after until {self.until}: exchange them")
        if self.max_cloud is not None and not 0 <= self.max_cloud <= 1:
            problems.append(f"max_cloud is {self.max_cloud}, expected a share from 0 to 1, such as 0.2")
        if problems:
            raise OptionError("; ".join(problems))
        object.__setattr__(self, "_times", (since, until))

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
        terms += [_Parser(self.where, _columns_of(file.schema)).parse()] if self.where is not None else []
        return reduce(operator.and_, terms) if terms else None


class RowFilter:
    """The rows of a file that pass, for any number of threads.

    Raises:
        OptionError: See ``Filters.expression``; the file is damaged, or gone.
    """

    def __init__(self, file: SearchFile, filters: Filters) -> None:
        self._file, self._bbox = file, filters.bbox
        self._expression = filters.expression(file)
        self._fragment: Any = None
        self._groups: frozenset[int] = frozenset(range(file.groups))
        if self._expression is None:
            return
        from pyarrow import dataset, fs

        with reading(file.path):
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
        self._file.check_texts(group)
        with reading(self._file.path, group):
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


class _Token(NamedTuple):
    kind: Literal["number", "text", "name", "word", "symbol", "end"]
    text: str
    at: int


def _columns_of(schema: pa.Schema) -> dict[str, str]:
    """What conditions may name, and its kind: numbers, texts and times; those inside ``bbox`` as ``bbox.xmin``."""
    import pyarrow as pa

    types, found = pa.types, {}
    for each in schema:
        inside = (
            [(f"{each.name}.{child.name}", child.type) for child in each.type] if types.is_struct(each.type) else []
        )
        for name, kind in inside or [(each.name, each.type)]:
            if types.is_integer(kind) or types.is_floating(kind):
                found[name] = _NUMBER
            elif types.is_string(kind):
                found[name] = _TEXT
            elif types.is_timestamp(kind):
                found[name] = _TIME
    return found


class _Parser:
    """A condition to a pyarrow expression; an OptionError names the place and what was expected there."""

    def __init__(self, text: str, columns: Mapping[str, str]) -> None:
        self._text, self._columns = text, columns
        self._tokens = list(self._split())
        self._next = 0

    def parse(self) -> pc.Expression:
        expression = self._condition(0)
        if self._token.kind != "end":
            raise self._error(self._token, "and, or, or the end")
        return expression

    def _split(self) -> list[_Token]:
        tokens, at, text = [], 0, self._text.rstrip()
        while at < len(text):
            found = _TOKENS.match(text, at)
            if found is None:
                at += len(text[at:]) - len(text[at:].lstrip())
                quote = "; a text ends with a quote, and a quote inside is written twice" if text[at] == "'" else ""
                raise self._error(_Token("symbol", text[at], at), f"a column, a value or an operator{quote}")
            kind: Any = found.lastgroup
            word = found[kind]
            if kind == "name" and word.lower() in _WORDS:
                kind, word = "word", word.lower()
            tokens.append(_Token(kind, word, found.start(found.lastgroup or 0)))
            at = found.end()
        return [*tokens, _Token("end", "", len(text))]

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    def _take(self, *texts: str) -> bool:
        """Step over the present token if it is one of these words or symbols."""
        if self._token.kind not in ("word", "symbol") or self._token.text not in texts:
            return False
        self._next += 1
        return True

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise self._error(self._token, text)

    def _condition(self, depth: int) -> Any:
        left = self._all(depth)
        while self._take("or"):
            left = left | self._all(depth)
        return left

    def _all(self, depth: int) -> Any:
        left = self._negated(depth)
        while self._take("and"):
            left = left & self._negated(depth)
        return left

    def _negated(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise self._error(self._token, f"at most {_DEEPEST} conditions inside one another")
        if self._take("not"):
            return ~self._negated(depth + 1)
        if self._take("("):
            inside = self._condition(depth + 1)
            self._expect(")")
            return inside
        return self._test()

    def _test(self) -> Any:
        import pyarrow.compute as pc

        token = self._token
        if token.kind != "name":
            raise self._error(token, f"a column ({', '.join(self._columns)}), not or (")
        self._next += 1
        name = token.text.strip('"')
        if name not in self._columns:
            raise self._error(token, f"one of the columns {', '.join(self._columns)}")
        kind, column = self._columns[name], pc.field(*name.split("."))
        if self._take("is"):
            negated = self._take("not")
            self._expect("null")
            return column.is_valid() if negated else column.is_null()
        compare = self._token
        if compare.kind == "symbol" and compare.text in _OPERATORS:
            self._next += 1
            return _OPERATORS[compare.text](column, self._value(kind, name))
        negated = self._take("not")
        if self._take("in"):
            found = self._is_in(column, kind, name)
        elif self._take("like"):
            token = self._token
            if token.kind != "text" or kind != _TEXT:
                raise self._error(token, f"a text in quotes, for a column of text ({name} is {kind})")
            self._next += 1
            found = pc.match_like(column, _unquote(token.text))
        else:
            expected = "in or like" if negated else "=, !=, <, <=, >, >=, in, like or is"
            raise self._error(self._token, expected)
        return ~found if negated else found

    def _is_in(self, column: Any, kind: str, name: str) -> Any:
        self._expect("(")
        equal = [column == self._value(kind, name)]  # not isin, which calls a missing value false
        while self._take(","):
            equal.append(column == self._value(kind, name))
        self._expect(")")
        while len(equal) > 1:  # as a balanced tree, for pyarrow descends into it
            equal = [a | b for a, b in zip(equal[::2], equal[1::2], strict=False)] + equal[len(equal) & ~1 :]
        return equal[0]

    def _value(self, kind: str, name: str) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        token = self._token
        if token.kind == "number" and kind == _NUMBER:
            self._next += 1
            return pc.scalar(float(token.text) if re.search(r"[.eE]", token.text) else int(token.text))
        if token.kind == "text" and kind == _TEXT:
            self._next += 1
            return pc.scalar(_unquote(token.text))
        if token.kind == "text" and kind == _TIME:
            try:
                moment = _parse_time(_unquote(token.text))
            except ValueError:
                raise self._error(
                    token, f"a time as ISO 8601 writes it ({name} is a time), such as '2024-05-31'"
                ) from None
            self._next += 1
            return pc.scalar(pa.scalar(moment, pa.timestamp("us", tz="UTC")))
        raise self._error(token, f"a value for {name}, which is {kind}")

    def _error(self, token: _Token, expected: str) -> OptionError:
        found = f"{token.text!r}" if token.kind != "end" else "the end"
        shown = plain(self._text)
        where = f"  {shown}\n  {' ' * token.at}^"
        return OptionError(f"where: expected {expected}, found {found} at position {token.at + 1}:\n{where}")


def _parse_time(text: str, *, end_of_day: bool = False) -> datetime:
    """A date or time as ISO 8601 writes it, UTC unless it says otherwise.

    Args:
        text: Such as ``2024-05-31`` or ``2024-05-31T10:30:00Z``.
        end_of_day: A date alone means its last moment, not its first.

    Raises:
        ValueError: It is none.
    """
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        clock = time(23, 59, 59, 999999) if end_of_day else time()
        return datetime.combine(date.fromisoformat(text), clock, timezone.utc)
    moment = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))
    return moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _unquote(text: str) -> str:
    return text[1:-1].replace("''", "'")
