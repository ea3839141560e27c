"""Text made fit for people, terminals, spreadsheets and files: names, metadata, captions, messages, logs.

A scene's name may hold an escape sequence that a terminal obeys, a sign that turns the direction of what follows, or
one that nobody sees. Records and scenes clean their texts when they are made, and the command line cleans what it
prints, so nothing else has to.

:func:`redact` takes credentials out of any text: passwords, signatures and tokens in URLs, HTTP headers that authorise,
tokens of known forms, and the values of environment variables whose names say that they are secret.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

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
    is replaced by one, so positions stay. With ``lines``, line feeds stay.
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
    return [f"  {line}" for line in first_few([str(item) for item in items], most)]


def escape_hidden(source: str) -> str:
    """TOML with every hidden character of its strings as an escape, so that it reads back the same.

    Halves of surrogate pairs have no escape and become U+FFFD.
    """

    def escape(match: re.Match[str]) -> str:
        return "\N{REPLACEMENT CHARACTER}" if "\ud800" <= match[0] <= "\udfff" else f"\\U{ord(match[0]):08x}"

    return "\n".join(_HIDDEN.sub(escape, line) for line in source.split("\n"))


HIDDEN = "***"

SECRET_FIELD = (
    r"x-(?:amz|goog|oss|cos|ms)-[a-z0-9-]+|signature|expires|policy|key-pair-id|awsaccesskeyid|googleaccessid|sig|auth"
    r"|authorization|jwt|key|subscription-key|[a-z_-]*(?:token|api_?-?key|access_?-?key|secret|passw(?:or)?d|pwd)"
)
"""Pattern of the query fields that are a key to a file, or a part of one; case does not matter."""

# Repetitions have bounds, so that no text, however it is made, takes long.
_SCHEME = r"(?:[a-z][a-z0-9+.-]{0,15}(?:://|%3A%2F%2F)|(?:https?|ftp|s3|gs|az|oss|swift):/)"
_URL_END = r"\s\"'<>\\"
_RULES = (
    # user:password@, also where the password holds a slash, which no URL may, and where a URL is in another's query
    (
        rf"({_SCHEME})(?:[^{_URL_END}/?#@:]{{0,500}}:(?!\d+(?:[/?#]|$))[^{_URL_END}]{{0,500}}@"
        rf"|[^{_URL_END}/?#]{{0,500}}(?:@|%40))",
        rf"\1{HIDDEN}@",
    ),
    (rf"((?:[?&;]|%3F|%26)(?:{SECRET_FIELD})(?:=|%3D))(?:(?!%26|%23)[^&#{_URL_END}])+", rf"\1{HIDDEN}"),
    (
        r"(\b(?:proxy-authorization|authorization|x-api-key|x-auth-token|x-amz-security-token"
        r"|ocp-apim-subscription-key)[\"']?\s*[:=]\s*[\"']?)(?:(?:bearer|basic|token|digest)\s+)?[^\s\"',\\]+",
        rf"\1{HIDDEN}",
    ),
    (r"(\bcookie[\"']?\s*[:=]\s*[\"']?)[^\"'\r\n\\]+", rf"\1{HIDDEN}"),
    (r"(\b(?:bearer|basic)\s+)[a-z0-9+/_.=~-]{16,}", rf"\1{HIDDEN}"),
    (r"\b(?:hf_[a-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}\b)", HIDDEN),
)
_PATTERNS = [(re.compile(pattern, re.IGNORECASE), shown) for pattern, shown in _RULES]

_SECRET_NAME = re.compile(
    r"(?:PASSW(?:OR)?D|(?:^|_)(?:TOKEN|SECRET|PASSPHRASE|PWD|USERPWD|PROXYUSERPWD|BEARER|HTTP_HEADERS|CONNECTION_STRING"
    r"|SAS|SIGNATURE|(?:API|ACCESS|SECRET|PRIVATE|ACCOUNT)_?KEY))(?:_ID|S)?(?:$|_(?!FILE|PATH|DIR|URI|URL))",
    re.IGNORECASE,
)
_WITHOUT_SECRET = frozenset({"PWD", "OLDPWD"})
_SHORTEST = 8  # characters; shorter values stand in ordinary text by chance


def redact(text: str) -> str:
    """``text`` with every credential that can be told replaced by ``***``."""
    forms: set[str] = set()
    for secret in _secrets():  # as it is, and as it stands in URLs, in JSON and in what Python shows of an object
        quoted = quote(secret, safe="", errors="surrogateescape")
        forms |= {secret, quoted, json.dumps(secret)[1:-1], repr(secret)[1:-1]}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def _secrets() -> Iterator[str]:
    """What the environment holds that nobody may see, of at least 8 characters."""
    for name, value in os.environ.items():
        upper = name.upper()
        if upper.endswith("_PROXY") and "@" in value:
            found = [value.rpartition("@")[0].rpartition("//")[2]]
            found += [unquote(found[0])]
            found += [part.partition(":")[2] for part in found]
        elif upper in _WITHOUT_SECRET or not _SECRET_NAME.search(upper):
            continue
        elif "HEADERS" in upper:  # "Name: Bearer value", several of them parted by commas or ends of lines
            found = [header.partition(":")[2].strip() for header in re.split(r"[,\r\n]", value)]
            found += [header.rpartition(" ")[2] for header in found]
        else:
            found = [value]
            if "USERPWD" in upper:
                found += [value.partition(":")[2], base64.b64encode(value.encode("utf-8", "replace")).decode("ascii")]
        yield from (secret for secret in found if len(secret) >= _SHORTEST)
