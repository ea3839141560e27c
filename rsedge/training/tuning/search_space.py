"""The search space: recipe keys and the values each may take, read from text or TOML and checked on the recipe.

One syntax for the command line, a TOML table and Python: ``float:LOW:HIGH`` (uniform), ``log:LOW:HIGH`` (uniform in
the logarithm), ``int:LOW:HIGH`` or ``int:LOW:HIGH:STEP`` (whole numbers, both ends included), or a list of choices,
``a,b,c`` or as TOML writes it. An empty choice leaves the key out of the recipe, as ``--set KEY=`` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from rsedge.errors import OptionError
from rsedge.tomlfile import parse_toml, read_toml
from rsedge.training.recipe import flat, locate, parse_value, refusal, with_settings

if TYPE_CHECKING:
    from rsedge.training.recipe import Recipe

FORMS = "float:LOW:HIGH, log:LOW:HIGH, int:LOW:HIGH[:STEP], or choices A,B,C"
# Keys that decide which images there are: they are read once and shared, so that all trials are judged on the same.
_FIXED = (
    "family",
    "seed",
    "data.sources",
    "data.fractions",
    "data.val_fraction",
    "data.limit",
    "data.skip_bad",
    "data.paraphrases",
)
_MONITOR = ("loop.monitor", "loop.monitor_mode")


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from ``low`` to ``high``, both included. Raises OptionError: the ends are no range."""

    kind: Literal["float", "log", "int"]
    """``float`` (uniform), ``log`` (uniform in the logarithm) or ``int``."""
    low: float
    high: float
    """The ends."""
    step: int = 1
    """Between whole numbers."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise OptionError(f"{self} is no range: give a number and a larger one")
        if self.kind == "log" and self.low <= 0:
            raise OptionError(f"{self} has no logarithm at {self.low:g}: start above 0, or use float")
        if self.step < 1:
            raise OptionError(f"{self} has the step {self.step}: give 1 or more")

    def __str__(self) -> str:
        step = f":{self.step}" if self.step > 1 else ""
        return f"{self.kind}:{self.low!r}:{self.high!r}{step}"

    @property
    def grid(self) -> tuple[Any, ...] | None:
        """Every value, where they can be counted."""
        return tuple(range(int(self.low), int(self.high) + 1, self.step)) if self.kind == "int" else None

    def distribution(self) -> Any:
        """Optuna's distribution."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.kind == "int":
            # Optuna warns of a last value that no step meets, so the end is moved to the last that one does.
            last = int(self.low) + (int(self.high) - int(self.low)) // self.step * self.step
            return IntDistribution(int(self.low), last, step=self.step)
        return FloatDistribution(self.low, self.high, log=self.kind == "log")

    def decode(self, stored: Any) -> Any:
        """The value that Optuna stores as ``stored``."""
        return stored


@dataclass(frozen=True, slots=True)
class Choices:
    """One of several values; None leaves out the recipe's key. Raises OptionError: fewer than two, or one twice."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        shown = [json.dumps(value) for value in self.values]
        if len(shown) < 2:
            raise OptionError(f"[{', '.join(shown)}] is no choice: give two values or more; --set fixes a single one")
        if twice := sorted({text for text in shown if shown.count(text) > 1}):
            raise OptionError(f"[{', '.join(shown)}] holds {', '.join(twice)} more than once")

    def __str__(self) -> str:
        return ",".join("" if value is None else str(encode(value)) for value in self.values)

    @property
    def grid(self) -> tuple[Any, ...]:
        """All of them."""
        return self.values

    def distribution(self) -> Any:
        """Optuna's distribution."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([encode(value) for value in self.values])

    def decode(self, stored: Any) -> Any:
        """The value that Optuna stores as ``stored``."""
        return next(value for value in self.values if json.dumps(encode(value)) == json.dumps(stored))


Space = dict[str, Range | Choices]


def encode(value: Any) -> Any:
    """A value as Optuna stores it: it takes no lists."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def read_settings(settings: Sequence[str]) -> dict[str, str]:
    """``KEY=RANGE`` texts as a mapping. Raises OptionError: texts without ``=``, or a key twice; names all."""
    found: dict[str, str] = {}
    problems = []
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            problems.append(f"{setting!r} names no range: write KEY=RANGE with {FORMS}")
        elif key.strip() in found:
            problems.append(f"{key.strip()} is given twice")
        found[key.strip()] = text.strip()
    _refuse(problems)
    return found


def read_file(path: Path) -> dict[str, Any]:
    """The dotted keys of the table ``[search]`` in a TOML file. Raises OptionError: it has not that table alone."""
    values = read_toml(path)
    table = values.pop("search", None)
    if values or not isinstance(table, dict):
        raise OptionError(f"{path} must have the table [search] and nothing else: write KEY = RANGE with {FORMS}")
    return flat(table)


def parse_space(space: Mapping[str, Any], recipe: Recipe, *, grid: bool = False) -> Space:
    """A search space, every key in its long form, checked against the recipe it changes.

    Args:
        space: Recipe key → text, list of choices, :class:`Range` or :class:`Choices`.
        recipe: What is searched around.
        grid: Whether every value must be countable.

    Raises:
        OptionError: Everything wrong at once: unknown keys, bad ranges, values that the recipe never accepts.
    """
    problems: list[str] = []
    found: Space = {}
    if not space:
        problems.append(f"nothing is searched: give KEY=RANGE with {FORMS}")
    for key, value in space.items():
        problems += _add(found, key, value, grid=grid)
    _refuse(problems)
    _refuse(list(_never_accepted(found, recipe)))
    return dict(sorted(found.items()))  # so that the order they were written in does not change what is proposed


def to_toml(space: Space) -> dict[str, Any]:
    """The space as a TOML table that :func:`parse_space` takes."""
    return {
        key: [("" if value is None else value) for value in entry.values] if isinstance(entry, Choices) else str(entry)
        for key, entry in space.items()
    }


def _refuse(problems: list[str]) -> None:
    if problems:
        raise refusal("this cannot be searched:", problems)


def _add(space: Space, key: str, value: Any, *, grid: bool) -> list[str]:
    """Add a key to the space; return what is wrong with it."""
    try:
        table, name = locate(key)
        dotted = ".".join((*table, name))
        if dotted in space:
            raise OptionError(f"{dotted} is searched already, under another spelling")
        if dotted in _FIXED:
            raise OptionError("it decides which images there are, and those are the same for all trials: use --set")
        if dotted in _MONITOR:
            raise OptionError("it is what trials are compared by: use --metric and --direction")
        space[dotted] = _parse(value)
        if grid and space[dotted].grid is None:
            raise OptionError(f"{space[dotted]} cannot be counted: a grid needs choices A,B,C or int:LOW:HIGH")
    except OptionError as error:
        return [str(error) if str(error).startswith(key) else f"{key}: {error}"]
    return []


def _parse(value: Any) -> Range | Choices:
    if isinstance(value, (Range, Choices)):
        return value
    if isinstance(value, (list, tuple)):
        return Choices(tuple(None if entry == "" else entry for entry in value))
    if not isinstance(value, str):
        raise OptionError(f"{value!r} is no range: give {FORMS}")
    kind, *ends = value.split(":")
    if (kind := kind.strip()) in ("float", "log", "int"):
        number: Callable[[str], float] = int if kind == "int" else float
        try:
            numbers = [number(end) for end in ends]
            if len(numbers) != 2 and not (kind == "int" and len(numbers) == 3):
                raise ValueError
        except ValueError:
            expected = "int:LOW:HIGH or int:LOW:HIGH:STEP with whole numbers" if kind == "int" else f"{kind}:LOW:HIGH"
            raise OptionError(f"{value!r} is no range: give {expected}") from None
        step = int(numbers[2]) if len(numbers) == 3 else 1
        return Range(cast("Literal['float', 'log', 'int']", kind), numbers[0], numbers[1], step)
    if value.startswith("["):
        try:
            return _parse(parse_toml(f"value = {value}")["value"])
        except ValueError as error:
            raise OptionError(f"{value!r} is no list: {error}") from error
    entries = [entry.strip() for entry in value.split(",")]
    if len(entries) < 2 or "(" in value:  # a comma in loguniform(1, 2) separates no choices
        raise OptionError(f"{value!r} is no range: give {FORMS}")
    return Choices(tuple(parse_value(entry) if entry else None for entry in entries))


def _never_accepted(space: Space, recipe: Recipe) -> Iterator[str]:
    """The problems of values that the recipe refuses by themselves and beside any other value searched.

    Values that contradict each other only in some combinations are no fault: those trials fail and the others run.
    """

    def refusal(settings: dict[str, Any]) -> str | None:
        try:
            with_settings(recipe, settings)
        except OptionError as error:
            return str(error)
        return None

    samples = {
        key: entry.values if isinstance(entry, Choices) else (entry.low, entry.high) for key, entry in space.items()
    }
    for key, values in samples.items():
        for value in values:
            problem = refusal({key: value})
            others = ({key: value, name: side} for name in samples if name != key for side in samples[name])
            if problem and all(refusal(settings) for settings in others):
                yield f"{key} = {json.dumps(value)}: {problem}"
