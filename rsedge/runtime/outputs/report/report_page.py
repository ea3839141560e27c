"""The page of a report: template, style and script of this package and the data of a run, as one HTML file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from string import Template
from typing import Any

from rsedge.texts import plain

# What could end the data's element, or begin another one, is written so that only JSON sees it.
_IN_SCRIPT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page(title: str, data: dict[str, Any]) -> bytes:
    """The file, UTF-8; the same for the same data.

    Its policy lets nothing be loaded from anywhere, and nothing run but the one script, known by its hash.

    Args:
        title: Of the document; any text.
        data: JSON values that the script shows; their texts may hold any markup, and are plain (:mod:`rsedge.texts`).
    """
    style, script = _part("report.css"), _part("report.js")
    text = Template(_part("report_template.html")).substitute(
        policy=(
            f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
            "base-uri 'none'; form-action 'none'"
        ),
        title=html.escape(plain(title)),
        style=style,
        data=json_in_script(data),
        script=script,
    )
    return text.encode("utf-8")


def json_in_script(values: Any) -> str:
    """JSON in ASCII that may stand in a script element, whatever its texts hold."""
    text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign, escaped in _IN_SCRIPT.items():
        text = text.replace(sign, escaped)
    return text


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _source(text: str) -> str:
    """A source expression of Content-Security-Policy that allows just this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
