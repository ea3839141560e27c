"""Credentials taken out of any text: messages, tracebacks, warnings, logs, saved options.

What counts as one: passwords, signatures and tokens in URLs, HTTP headers that authorise, tokens of known forms, and
the values of environment variables whose names say that they are secret.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator
from urllib.parse import quote, unquote

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
    for secret in sorted({form for value in _secrets() for form in _forms(value)}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
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


def _forms(secret: str) -> Iterator[str]:
    """As it is, and as it stands in URLs, in JSON and in what Python shows of an object."""
    yield secret
    yield quote(secret, safe="", errors="surrogateescape")
    yield json.dumps(secret)[1:-1]
    yield repr(secret)[1:-1]
