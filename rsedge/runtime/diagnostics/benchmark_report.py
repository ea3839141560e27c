"""What a benchmark found, as values, and the machine it was found on."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from rsedge import host
from rsedge.runtime.diagnostics import machine


@dataclass(frozen=True, slots=True)
class Spread:
    """What rounds gave: the median, the lowest and the highest."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value, to 4 figures."""
        return cls(*(float(f"{value:.4g}") for value in (statistics.median(values), min(values), max(values))))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRate:
    """The model alone at one batch size."""

    batch_size: int
    """Images computed together."""
    tiles: int
    """Tiles in a round."""
    tiles_per_second: Spread | None
    """Or None where the batch did not fit into memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a tile takes in one stage."""

    name: str
    """Such as ``encode``."""
    runs: str
    """``beside`` the model (reading: what it takes alone, with its threads) or ``in turn``."""
    ms_per_tile: Spread
    """Milliseconds."""
    calls: int | None
    """Times the stage was entered in a round of ``tiles`` tiles, or None."""
    tiles: int
    """Tiles in a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkReport:
    """What was measured, and on what."""

    machine: Mapping[str, Any]
    """CPU, cores, instructions, memory, GPUs, versions, date, and the load before measuring."""
    model: str
    family: str
    precision: str
    does: str
    """The bundle; ``does`` is ``caption`` or ``embed``."""
    device: str
    device_reason: str
    backend: str
    threads: int
    """Where it ran and why; ``threads`` are CPU threads of inference."""
    decoding: Mapping[str, Any] | None
    """The decoding options, or None for an embedder."""
    scene: Mapping[str, Any]
    """Name, size and tiling; ``generated`` where none was named."""
    rounds: int
    """Rounds behind each figure."""
    batches: tuple[BatchRate, ...]
    """The model alone, per batch size tried."""
    batch_size: int
    """The best of them, which the stages and the whole run had."""
    tiles_per_second: Spread
    """Of the model alone at that batch size."""
    stages: tuple[Stage, ...]
    """Where the time goes."""
    whole_tiles_per_second: Spread
    """With reading and writing."""
    whole_ratio: Spread
    """Time of a whole run over that of the model alone, in pairs."""
    peak_memory_mb: float | None
    """Highest resident memory of the process while measuring, all batch sizes tried among it, MB, or None where the
    system does not tell."""
    device_memory_mb: float | None
    """What was taken of a GPU's memory, MB, or None."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        values = asdict(self)
        return values | {name: list(values[name]) for name in ("batches", "stages")}


def this_machine() -> dict[str, Any]:
    """The machine as ``BenchmarkReport.machine`` has it, and its load now."""
    found, room, software = machine.processor(), machine.room(), machine.software()
    libraries = ("numpy", "rasterio", "onnxruntime", "onnxruntime-gpu", "tensorrt")
    versions = {name: software.libraries[name] for name in libraries if software.libraries[name]}
    return {
        "cpu": found.model,
        "architecture": found.architecture,
        "cores": found.usable,
        "instructions": [name for name, there in found.features.items() if there],
        "memory_mb": room.memory and round(room.memory / 1e6),
        "gpus": list(machine.devices().gpus),
        "platform": software.platform,
        "python": software.python.split(" (")[0],
        "versions": {"rsedge": software.rsedge, "gdal": software.gdal, **versions},
        "date": datetime.now(timezone.utc).date().isoformat(),
        "load": host.load(),  # before measuring
    }
