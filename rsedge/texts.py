"""Text of strangers made fit for people, terminals, spreadsheets and files: names, metadata, captions, messages.

A scene's name may hold an escape sequence that a terminal obeys, a sign that turns the direction of what follows, or
one that nobody sees. Records and scenes clean their texts when they are made, and the command line cleans what it
prints, so nothing else has to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import datetime

_SPACES = re.compile("[\t\n\v\f\r\x85\u2028\u2029]")
# Control characters, signs that turn the direction of text, signs without width, half surrogate pairs and what Unicode
# never assigns. Emoji of several people or parts need their joiner, so it stays between two pictographs.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufdd0-\ufdef\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\ud800-\udfff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
    "|(?<![\u2600-\u27bf\ufe0f\U0001f000-\U0001faff])\u200d|\u200d(?![\u2190-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff])"
)
# A formula may stand behind spaces and quotes, and behind the semicolon that parts cells where the comma parts
# decimals; spreadsheets of East Asia take wide signs for signs.
_FORMULA = re.compile("(^|;)(?=[\\s\"'“”„]*[=+\\-@＝＋－＠﹦﹢﹣﹫])")


def plain(text: str, *, lines: bool = False) -> str:
    """Text in one line of visible characters: ends of lines and tabs become spaces, what is hidden becomes U+FFFD.

    Control characters, bidirectional controls, characters without width, tags and surrogates are hidden. Each character
    is replaced by one, so positions stay.

    Args:
        text: Any string.
        lines: Whether line feeds stay.
    """
    if text.isascii() and text.isprintable():
        return text
    if lines:
        return "\n".join(map(plain, text.split("\n")))
    return _HIDDEN.sub("\N{REPLACEMENT CHARACTER}", _SPACES.sub(" ", text))


def first_few(lines: Sequence[str], most: int = 8) -> list[str]:
    """Return the lines up to ``most``, then one that says how many more there are."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return [*lines[:most], *more]


def rfc3339(moment: datetime) -> str:
    """Return a moment in UTC as RFC 3339 writes it, to the millisecond where it has a fraction."""
    return moment.isoformat(timespec="milliseconds" if moment.microsecond else "seconds").replace("+00:00", "Z")


def cell(value: Any) -> Any:
    """A CSV cell: text that starts no formula in a spreadsheet, in one line; any other value as it is."""
    return _FORMULA.sub(r"\1'", plain(value)) if isinstance(value, str) else value


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def in_a_line(items: Iterable[Any], most: int = 5) -> str:
    """The first items, and how many more there are: ``a, b and 3 more``."""
    listed = [str(item) for item in items]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def in_lines(items: Iterable[Any], most: int = 20) -> list[str]:
    """A line for each of the first items, and one for how many more there are, all indented."""
    listed = [f"  {item}" for item in items]
    return [*listed[:most], f"  and {len(listed) - most} more"] if len(listed) > most else listed


def escape_hidden(source: str) -> str:
    """TOML with every hidden character of its strings as an escape, so that it reads back the same.

    Halves of surrogate pairs have no escape and become U+FFFD.
    """
    return "\n".join(_HIDDEN.sub(_escape, line) for line in source.split("\n"))


def _escape(match: re.Match[str]) -> str:
    return "\N{REPLACEMENT CHARACTER}" if "\ud800" <= match[0] <= "\udfff" else f"\\U{ord(match[0]):08x}"
