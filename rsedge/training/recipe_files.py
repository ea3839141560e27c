"""Recipes as files: presets, TOML in and out, ``--set key=value``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rsedge.errors import OptionError
from rsedge.jsonvalues import build
from rsedge.tomlfile import parse_toml, read_toml, write_toml
from rsedge.training.recipe import Family, Recipe


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
    if source is None:
        values = {}
    elif Path(source).is_file():
        values = read_toml(Path(source))
    elif str(source) in (known := presets()):
        preset = files("rsedge.training") / "recipes" / f"{source}.toml"
        values = parse_toml(preset.read_text(encoding="utf-8"))
    else:
        raise OptionError(f"there is no recipe {source}: give a TOML file or one of {', '.join(known)}")
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


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differences(was: Mapping[str, Any], now: Mapping[str, Any], *, free: Sequence[str]) -> list[str]:
    """What differs between nested tables, a text for each dotted key that is not ``free``."""
    was, now = flat(was), flat(now)
    return [
        f"{key} was {was.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and key not in free
    ]


def keys() -> list[str]:
    """Every key a recipe has, ``table.name``."""
    return [".".join((*table, name)) for table, name in _keys()]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


_Key = tuple[tuple[str, ...], str]


def _keys(cls: Any = Recipe, table: tuple[str, ...] = ()) -> list[_Key]:
    found: list[_Key] = []
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kinds = (hints[item.name], *get_args(hints[item.name]))
        inner = next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)
        found += _keys(inner, (*table, item.name)) if inner else [(table, item.name)]
    return found


def locate(key: str) -> _Key:
    """Table and name of a dotted key, or of a name only one table has.

    Raises:
        OptionError: No such key, or several; says which are near.
    """
    *table, name = key.split(".")
    known = _keys()
    # A table such as model.config has open keys.
    free = any((tuple(table[:end]), table[end]) in known for end in range(len(table)))
    if free or (tuple(table), name) in known:
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
        value = parse_toml(f"value = {text}")["value"]
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
