"""Recipes as files: presets, TOML in and out, ``--set key=value``."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rsedge.errors import OptionError
from rsedge.jsonvalues import build
from rsedge.tomlfile import read_toml, write_toml
from rsedge.training.recipe import Family, Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def presets() -> dict[str, str]:
    """Name → first comment line of every recipe that comes with rsedge."""
    folder = files("rsedge.training") / "recipes"
    found = {}
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".toml"):
            first = file.read_text(encoding="utf-8").partition("\n")[0]
            found[file.name.removesuffix(".toml")] = first.removeprefix("#").strip()
    return found


def load_recipe(source: str | Path | None, *, family: Family, settings: Sequence[str] = ()) -> Recipe:
    """The recipe ``source`` with ``settings`` applied.

    Args:
        source: A TOML file or the name of a preset; None is a recipe of defaults.
        family: What is to be trained; a recipe of another family is refused.
        settings: ``key=value`` each: the key ``table.name``, or the name alone where only one table has it; the value
            as TOML writes it, text without quotes too; ``key=`` takes the key out of the recipe.

    Raises:
        OptionError: Everything wrong at once: unknown keys by name, values of the wrong kind, contradictions.
    """
    values = _values(source) if source is not None else {}
    if (stated := values.setdefault("family", family)) != family and stated in get_args(Family):
        raise OptionError(f"{source} is a recipe for {stated}, not for {family}: run rsedge train {stated}")
    problems: list[str] = []
    for setting in settings:
        _set(values, setting, problems.append)
    recipe = build(Recipe, values, "", problems.append)
    if problems or recipe is None:
        origin = f"recipe {source}" if source is not None else "the recipe"
        raise OptionError("\n".join([f"{origin} cannot be used:", *(f"  - {problem}" for problem in problems)]))
    return recipe


def save_recipe(path: Path, recipe: Recipe) -> None:
    """Write the whole recipe, defaults included, so that it means the same when defaults change."""
    write_toml(path, to_dict(recipe))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested tables; what is None is left out, as TOML has no such value."""
    values: dict[str, Any] = _plain(dataclasses.asdict(recipe))
    return values


def from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that :func:`to_dict` gave ``values`` for.

    Raises:
        OptionError: As :func:`load_recipe`.
    """
    problems: list[str] = []
    recipe = build(Recipe, values, "", problems.append)
    if recipe is None:
        raise OptionError("; ".join(problems))
    return recipe


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with other values for dotted keys, ``{"optimizer.learning_rate": 1e-4}``.

    Raises:
        OptionError: An unknown key, or a value or combination that is not accepted.
    """
    values = to_dict(recipe)
    for key, value in settings.items():
        table, name = locate(key)
        _table(values, table)[name] = list(value) if isinstance(value, tuple) else value
    return from_dict(values)


def keys() -> list[str]:
    """Every key a recipe has, ``table.name``."""
    return [".".join((*table, name)) for table, name in _keys()]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _values(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.is_file():
        return read_toml(path)
    known = presets()
    if str(source) in known:
        return tomllib.loads((files("rsedge.training") / "recipes" / f"{source}.toml").read_text(encoding="utf-8"))
    raise OptionError(f"there is no recipe {source}: give a TOML file or one of {', '.join(known)}")


_Key = tuple[tuple[str, ...], str]


def _keys(cls: Any = Recipe, table: tuple[str, ...] = ()) -> list[_Key]:
    found: list[_Key] = []
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kinds = (hints[item.name], *get_args(hints[item.name]))
        inner = next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)
        found += _keys(inner, (*table, item.name)) if inner else [(table, item.name)]
    return found


def _free_table(table: tuple[str, ...]) -> bool:
    """Whether ``table`` lies within one whose keys are open, such as ``model.config``."""
    return any((table[:end], table[end]) in _keys() for end in range(len(table)))


def locate(key: str) -> _Key:
    """Table and name of a dotted key, or of a name only one table has.

    Raises:
        OptionError: No such key, or several; says which are near.
    """
    *table, name = key.split(".")
    known = _keys()
    if (tuple(table), name) in known or (table and _free_table(tuple(table))):
        return tuple(table), name
    homes = [entry for entry in known if entry[1] == name]
    if not table and len(homes) == 1:
        return homes[0]
    if not table and homes:
        raise OptionError(f"{key} is in several tables: say {' or '.join('.'.join((*at, name)) for at, name in homes)}")
    near = difflib.get_close_matches(key, [*keys(), *(entry[1] for entry in known)], n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "rsedge train --list-keys shows them all"
    raise OptionError(f"{key} is not a key of a recipe: {hint}")


def _table(values: dict[str, Any], table: tuple[str, ...]) -> dict[str, Any]:
    for end, name in enumerate(table, 1):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise OptionError(f"{'.'.join(table[:end])} is {values!r}, expected a table")
    return values


def _set(values: dict[str, Any], setting: str, report: Any) -> None:
    key, equals, text = setting.partition("=")
    if not equals:
        report(f"{setting!r} is no setting: write key=value")
        return
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()  # a word without quotes
    try:
        table, name = locate(key.strip())
        place = _table(values, table)
    except OptionError as error:
        report(str(error))
        return
    if value == "":  # TOML has no word for nothing; leaving a key out is how a recipe says so
        place.pop(name, None)
    else:
        place[name] = value
