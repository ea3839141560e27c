"""An output of a run: where it goes, and what writes the results there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rsedge.runtime.outputs.records import TileResult


class ResultWriter(Protocol):
    """Writes results to one output."""

    def write(self, results: Sequence[TileResult]) -> None:
        """Append the results of a segment."""


@dataclass(frozen=True, slots=True)
class Target:
    """An output of a run."""

    path: Path | None
    """Its file, or None for standard output."""
    open: Callable[[], AbstractContextManager[ResultWriter]]
    """Opens its writer; what was written is there when the block ends well, and nothing otherwise."""
