"""Records of classified tiles: classes and probabilities in place of captions and scores."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from rsedge.runtime.outputs.records import TileRecord
from rsedge.runtime.outputs.table import TILES, Column, Table

_FIELDS = tuple(field.name for field in fields(TileRecord))
_CAPTION = _FIELDS.index("caption")  # score follows it


def columns(top: int) -> list[str]:
    """``class``, ``probability``, then ``class_2``, ``probability_2`` and so on."""
    return [
        f"{name}{place}" for place in ("", *(f"_{n}" for n in range(2, top + 1))) for name in ("class", "probability")
    ]


@dataclass(frozen=True, slots=True)
class ClassifiedTile(TileRecord):
    """A record with the most probable classes of its tile; it has no caption.

    Attributes:
        top: How many classes a record names.
        ranked: Class and probability, rounded to 4 decimals, the most similar first; empty unless ``status`` is ``ok``.
    """

    top: int = 1
    ranked: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, record: TileRecord, top: int, ranked: tuple[tuple[str, float], ...]) -> ClassifiedTile:
        """The record with its classes."""
        return cls(**{name: getattr(record, name) for name in _FIELDS}, top=top, ranked=ranked)

    def found(self) -> dict[str, str | float | None]:
        """:func:`columns` and their values, None where there is no class."""
        values: list[str | float | None] = [value for pair in self.ranked for value in pair]
        return dict(zip(columns(self.top), values or [None] * (2 * self.top), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The record as a plain dict, :func:`columns` in place of ``caption`` and ``score``."""
        values = [(name, getattr(self, name)) for name in _FIELDS]
        return dict([*values[:_CAPTION], *self.found().items(), *values[_CAPTION + 2 :]])


def class_table(top: int) -> Table:
    """The columns of :class:`ClassifiedTile` with ``top`` classes."""
    kinds = [Column(name, "text" if name.startswith("class") else "real") for name in columns(top)]
    return Table((*TILES.columns[:_CAPTION], *kinds, *TILES.columns[_CAPTION + 2 :]), ClassifiedTile.to_dict)
