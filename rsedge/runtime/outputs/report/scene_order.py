"""Which of a run's scenes a result belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rsedge.runtime.scenes.products.sentinel2 import printable

if TYPE_CHECKING:
    from rsedge.runtime.outputs.records import TileResult
    from rsedge.runtime.scenes.scene import Scene


class SceneOrder:
    """Tells scenes apart though several may share a name, or a file: results come scene by scene, tile by tile."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self._keys = [(scene.name, printable(scene.source)) for scene in scenes]
        self._number, self._last = 0, (-1, -1)

    def number(self, result: TileResult) -> int:
        """The index of the scene of the next result.

        Raises:
            ValueError: It belongs to none of the scenes that are left.
        """
        place = (result.record.row, result.record.col)
        key = (result.record.scene, result.path)
        first = self._number if place > self._last else self._number + 1
        for number in range(first, len(self._keys)):
            if self._keys[number] == key:
                self._number, self._last = number, place
                return number
        raise ValueError(f"a result of {key} is of none of the scenes of the run, or out of order")
