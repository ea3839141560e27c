"""What every engine offers, and how a device is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from rsedge.errors import OptionError

Array = NDArray[Any]

CACHE_BUCKET = 16
"""Columns the self cache grows by: few enough that short captions read little, many enough that growing is rare.

It is always a multiple of it wide, and 16 float32 fill the widest vector of a CPU: so kernels add up the scores of a
row in the same order whatever the width, and a caption does not depend on how long those beside it are.
"""


def parse_device(device: str) -> tuple[str, int]:
    """Return the kind of a device, ``auto``, ``cpu`` or ``cuda``, and its number, 0 where none is named.

    Raises:
        OptionError: ``device`` is not ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not (kind == "cuda" and number.isdecimal())):
        raise OptionError(f"device is {device!r}, expected auto, cpu, cuda or cuda:N")
    return kind, int(number or 0)


class Graph(Protocol):
    """A graph ready to run."""

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run on arrays of this machine's memory.

        Raises:
            BundleError: The graph does not take these inputs, or fails at them.
            BackendError: The engine or the device refuses.
        """

    def run_on_device(
        self, feeds: Mapping[str, Any], *, host: Sequence[str] = (), device: Sequence[str] = ()
    ) -> tuple[list[Array], list[Any]]:
        """Run with inputs on either side: arrays, or values that stay where they are.

        Returns:
            The ``host`` outputs as arrays and the ``device`` outputs as values there, in the orders asked for.

        Raises:
            BundleError, BackendError: As :meth:`run`.
        """


class Backend(Protocol):
    """What runs graphs on one device."""

    name: str
    device: str
    on_cuda: bool

    def open(self, path: Path) -> Graph:
        """A graph of a bundle, ready to run."""

    def to_device(self, array: Array) -> Any:
        """A copy of ``array`` in the device's memory."""
