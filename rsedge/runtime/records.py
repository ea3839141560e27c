"""What the runtime hands out: a caption for an image, and one record per tile of a scene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "nodata", "cloud", "read_error"]


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption with its search score.

    Attributes:
        text: The decoded caption, special tokens removed.
        score: Mean log-probability per generated token (greedy, sampling) or the length-normalised
            beam score; natural logarithm, 0 is certainty.
        token_ids: The generated token ids, without the start token and with the end token if one was produced.
    """

    text: str
    score: float
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TileRecord:
    """One tile of a scene and what was found there.

    Attributes:
        scene: Name of the scene (its file name without the suffix).
        row, col: Position of the tile in the tile grid, from the upper left.
        row_off, col_off: First source pixel of the tile; negative never.
        width, height: Source pixels the tile really covers (smaller than the tile size where an edge tile is padded).
        geometry: GeoJSON polygon of the footprint in WGS 84 longitude and latitude, or None without a georeference.
        caption: The caption, or None unless ``status`` is ``ok``.
        score: Score of the caption, rounded to 4 decimals, or None.
        status: ``ok``, ``nodata``, ``cloud`` or ``read_error``.
        nodata_fraction: Share of the tile's covered source pixels without data, 0 to 1 (None if unreadable).
        cloud_fraction: Share of cloudy pixels, 0 to 1, or None where no cloud mask is known.
        datetime: Acquisition time, RFC 3339, or None.
        model: ``name@hash12`` of the bundle that wrote the caption.
        message: Why a tile has no caption (``read_error``, ``nodata``, ``cloud``), else None.
    """

    scene: str
    row: int
    col: int
    row_off: int
    col_off: int
    width: int
    height: int
    geometry: dict[str, Any] | None
    caption: str | None
    score: float | None
    status: Status
    nodata_fraction: float | None
    cloud_fraction: float | None
    datetime: str | None
    model: str
    message: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record as a plain dict, in field order, ``geometry`` included."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TileRecord:
        """The record that ``to_dict`` gave ``values`` for."""
        return cls(**values)
