"""TOML in and out, the same on every Python we support."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsedge.errors import OptionError
from rsedge.files import write_text
from rsedge.texts import escape_hidden

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path) -> dict[str, Any]:
    """The table in ``path``; OptionError, with the place, where it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"cannot read {path} as TOML: {error}") from error


def parse_toml(text: str) -> dict[str, Any]:
    """The table in ``text``; ValueError where it is not TOML."""
    return tomllib.loads(text)


def write_toml(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``values``, leaving out those that are None, which TOML does not have.

    Hidden characters of names are written as escapes, so that the file can be shown on a terminal.
    """
    import tomli_w

    write_text(path, escape_hidden(tomli_w.dumps(_without_none(values))))


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None
    }
