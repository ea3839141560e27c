"""The language of ``--where``: conditions on the columns of records as SQL writes them, parsed into expressions.

::

    condition := all {"or" all}        all := negated {"and" negated}        negated := ["not"] simple
    simple    := "(" condition ")" | COLUMN test
    test      := ("=" | "!=" | "<>" | "<" | "<=" | ">" | ">=") value
               | ["not"] "in" "(" value {"," value} ")" | ["not"] "like" TEXT | "is" ["not"] "null"
    value     := NUMBER | TEXT        TEXT in single quotes, a quote inside doubled; times as ISO 8601 in TEXT

Words are known in any case. As in SQL, a comparison with a missing value is neither true nor false, and only what is
true is kept. ``like`` knows ``%`` (any text) and ``_`` (one character).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timezone
from typing import TYPE_CHECKING, Any, Literal

from rsedge.errors import OptionError
from rsedge.texts import plain

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc

_TOKENS = re.compile(
    r"""\s*(?:(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
    |(?P<text>'(?:[^']|'')*')
    |(?P<name>[A-Za-z_][A-Za-z_0-9.]*|"[^"]*")
    |(?P<symbol><=|>=|<>|!=|[=<>(),]))""",
    re.VERBOSE,
)
_WORDS = frozenset(["and", "or", "not", "in", "like", "is", "null"])
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<>": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
_DEEPEST = 50


@dataclass(frozen=True, slots=True)
class _Token:
    kind: Literal["number", "text", "name", "word", "symbol", "end"]
    text: str
    at: int


def columns_of(schema: pa.Schema) -> dict[str, pa.DataType]:
    """What conditions may name: numbers, texts and times; those inside ``bbox`` as ``bbox.xmin``."""
    import pyarrow as pa

    named = [
        (".".join((field.name, *inside)), kind)
        for field in schema
        for inside, kind in (
            [((child.name,), child.type) for child in field.type] if _is_struct(field.type) else [((), field.type)]
        )
    ]
    return {name: kind for name, kind in named if _is_number(kind) or _is_text(kind) or pa.types.is_timestamp(kind)}


def parse_where(text: str, columns: Mapping[str, pa.DataType]) -> pc.Expression:
    """The condition as a pyarrow expression.

    Args:
        text: What the user wrote.
        columns: See :func:`columns_of`.

    Raises:
        OptionError: It is no condition; says where and what was expected.
    """
    return _Parser(text, columns).parse()


class _Parser:
    def __init__(self, text: str, columns: Mapping[str, pa.DataType]) -> None:
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
        kind, field = self._columns[name], pc.field(*name.split("."))
        if self._take("is"):
            negated = self._take("not")
            self._expect("null")
            return field.is_valid() if negated else field.is_null()
        operator = self._token
        if operator.kind == "symbol" and operator.text in _OPERATORS:
            self._next += 1
            return _OPERATORS[operator.text](field, self._value(kind, name))
        negated = self._take("not")
        if self._take("in"):
            found = self._is_in(field, kind, name)
        elif self._take("like"):
            found = self._like(field, kind, name)
        else:
            expected = "in or like" if negated else "=, !=, <, <=, >, >=, in, like or is"
            raise self._error(self._token, expected)
        return ~found if negated else found

    def _is_in(self, field: Any, kind: pa.DataType, name: str) -> Any:
        self._expect("(")
        equal = [field == self._value(kind, name)]  # not isin, which calls a missing value false
        while self._take(","):
            equal.append(field == self._value(kind, name))
        self._expect(")")
        while len(equal) > 1:  # as a balanced tree, for pyarrow descends into it
            equal = [a | b for a, b in zip(equal[::2], equal[1::2], strict=False)] + equal[len(equal) & ~1 :]
        return equal[0]

    def _like(self, field: Any, kind: pa.DataType, name: str) -> Any:
        import pyarrow.compute as pc

        token = self._token
        if token.kind != "text" or not _is_text(kind):
            raise self._error(token, f"a text in quotes, for a column of text ({name} is {_plain(kind)})")
        self._next += 1
        return pc.match_like(field, _unquote(token.text))

    def _value(self, kind: pa.DataType, name: str) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        token = self._token
        if token.kind == "number" and _is_number(kind):
            self._next += 1
            return pc.scalar(float(token.text) if re.search(r"[.eE]", token.text) else int(token.text))
        if token.kind == "text" and _is_text(kind):
            self._next += 1
            return pc.scalar(_unquote(token.text))
        if token.kind == "text" and pa.types.is_timestamp(kind):
            try:
                moment = parse_time(_unquote(token.text))
            except ValueError:
                raise self._error(
                    token, f"a time as ISO 8601 writes it ({name} is a time), such as '2024-05-31'"
                ) from None
            self._next += 1
            return pc.scalar(pa.scalar(moment, pa.timestamp("us", tz="UTC")))
        raise self._error(token, f"a value for {name}, which is {_plain(kind)}")

    def _error(self, token: _Token, expected: str) -> OptionError:
        found = f"{token.text!r}" if token.kind != "end" else "the end"
        shown = plain(self._text)
        where = f"  {shown}\n  {' ' * token.at}^"
        return OptionError(f"where: expected {expected}, found {found} at position {token.at + 1}:\n{where}")


def parse_time(text: str, *, end_of_day: bool = False) -> datetime:
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


def _is_number(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind))


def _is_struct(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind))


def _plain(kind: pa.DataType) -> str:
    return "a number" if _is_number(kind) else "a text in quotes" if _is_text(kind) else "a time in quotes"
