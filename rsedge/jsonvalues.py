"""JSON objects → frozen dataclasses, led by their annotations, so that there is no second list of fields to forget."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rsedge.errors import BundleError, OptionError

T = TypeVar("T")

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(json.dumps(choice) for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return "a list"
    return _WORDS.get(hint, "an object")


def _scalar(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _convert(hint: Any, value: Any, where: str, report: Callable[[str], None]) -> Any:
    """``value`` as ``hint``, or None after a report."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return build(hint, value, where, report)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, f"{where}[{i}]", report) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, f"{where}.{key}", report) for key, item in value.items()}
    if origin in (Union, types.UnionType):
        containers = [option for option in arguments if option not in _WORDS and get_origin(option) is not Literal]
        for option in containers:
            if isinstance(value, list if get_origin(option) is tuple else dict):
                return _convert(option, value, where, report)
        if any(_scalar(value, option) for option in arguments):
            return value
    elif _scalar(value, hint):
        return float(value) if hint is float else value
    report(f"{where} must be {_describe(hint)}, got {json.dumps(value)[:80]}")
    return None


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def build(cls: type[T], values: dict[str, Any], where: str, report: Callable[[str], None]) -> T | None:
    """A ``cls`` from a JSON object, or None after at least one report.

    Args:
        cls: A dataclass whose fields are text, numbers, truth values, literals, dataclasses of this kind,
            ``tuple[X, ...]``, ``dict[str, X]`` or ``Any``; it raises BundleError or OptionError on impossible values.
        values: The JSON object.
        where: Path of the object in the file, empty for the whole.
        report: Called once per problem with a sentence that names the field.
    """
    prefix = f"{where}." if where else ""
    trouble: list[str] = []
    hints = get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    trouble += [
        f"{prefix}{name} is not a field rsedge knows{_meant(name, fields)}" for name in values if name not in fields
    ]
    trouble += [
        f"{prefix}{name} is missing"
        for name, item in fields.items()
        if name not in values and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    converted = {
        name: _convert(hints[name], values[name], f"{prefix}{name}", trouble.append)
        for name in fields
        if name in values
    }
    if not trouble:
        try:
            return cls(**converted)
        except (BundleError, OptionError) as error:
            trouble.append(f"{where}: {error}" if where else str(error))
    for problem in trouble:
        report(problem)
    return None


def read_object(path: Path, report: Callable[[str], None], remedy: str) -> dict[str, Any] | None:
    """The JSON object in ``path``, or None after a report that ends in ``remedy``."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        report(f"{path.name} is missing: {remedy}")
        return None
    except (OSError, ValueError) as error:
        report(f"{path.name} is not readable JSON ({error}): {remedy}")
        return None
    if not isinstance(values, dict):
        report(f"{path.name} must hold a JSON object: {remedy}")
        return None
    return values
