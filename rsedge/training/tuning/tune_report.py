"""Pictures of a study: its trials in order, its trials by setting, and which settings mattered."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rsedge.training.tuning.search_space import Range

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rsedge.training.tuning.search_space import Choices, Space
    from rsedge.training.tuning.trials import TrialRecord

_LOOKS: dict[str, dict[str, Any]] = {
    "complete": {"color": "tab:blue", "marker": "o", "s": 28},
    "pruned": {"color": "tab:orange", "marker": "v", "s": 28},
    "failed": {"color": "tab:red", "marker": "x", "s": 28},
}


def draw_history(records: Sequence[TrialRecord], path: Path, *, metric: str, best: int | None) -> None:
    """The value of every trial in order, and the best so far, as PNG; nothing without a value.

    Args:
        records: The trials.
        path: PNG to write.
        metric: What the values are.
        best: The number of the best trial.
    """
    if not _valued(records):
        return
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    _scatter(axes, records, [record.number for record in records], best)
    complete = [record for record in records if record.state == "complete" and record.value is not None]
    if complete and best is not None:
        winner = next(record for record in complete if record.number == best)
        lower = all((winner.value or 0.0) <= (record.value or 0.0) for record in complete)
        so_far: list[float] = []
        for record in complete:
            values = [*so_far[-1:], record.value or 0.0]
            so_far.append(min(values) if lower else max(values))
        numbers = [record.number for record in complete]
        axes.step(numbers, so_far, where="post", color="tab:blue", alpha=0.5, linewidth=1, label="best so far")
    failed = [record.number for record in records if record.state == "failed" and record.value is None]
    if failed:  # on the lower edge, as they have no value
        looks = _LOOKS["failed"]
        axes.scatter(
            failed, [0.02] * len(failed), transform=axes.get_xaxis_transform(), label="failed, no value", **looks
        )
    axes.set(xlabel="trial", ylabel=metric)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    _save(figure, path)


def draw_slices(records: Sequence[TrialRecord], space: Space, path: Path, *, metric: str, best: int | None) -> None:
    """The values of the trials over each searched key, one panel each, as PNG; nothing without a value.

    Args:
        records: The trials.
        space: The searched keys.
        path: PNG to write.
        metric: What the values are.
        best: The number of the best trial.
    """
    valued = _valued(records)
    if not valued:
        return
    columns = min(3, len(space))
    rows = -(-len(space) // columns)
    figure = _figure(4.0 * columns, 3.4 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.ravel()[len(space) :]:
        axes.set_axis_off()
    for axes, (key, entry) in zip(panels.ravel(), space.items(), strict=False):
        _scatter(axes, valued, [_place(entry, record.settings[key]) for record in valued], best)
        if isinstance(entry, Range):
            if entry.kind == "log":
                axes.set_xscale("log")
            else:
                axes.locator_params(axis="x", nbins=5, integer=entry.kind == "int")
        else:
            names = ["left out" if value is None else str(value) for value in entry.values]
            axes.set_xticks(range(len(names)), names, rotation=30 if max(map(len, names)) > 6 else 0)
            axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel(key)
        axes.grid(alpha=0.3)
    for row in panels:
        row[0].set_ylabel(metric)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    _save(figure, path)


def draw_importances(importances: Mapping[str, float], path: Path, *, metric: str) -> None:
    """The share of each key in what makes a trial good, as PNG.

    Args:
        importances: Key → share.
        path: PNG to write.
        metric: What the trials were compared by.
    """
    figure = _figure(8, 1.2 + 0.4 * len(importances))
    axes = figure.subplots()
    ordered = sorted(importances.items(), key=lambda entry: entry[1])
    bars = axes.barh([key for key, _ in ordered], [share for _, share in ordered], color="tab:blue")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.margins(x=0.1)
    axes.set_xlabel(f"importance for {metric} (PED-ANOVA)")
    _save(figure, path)


def _valued(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [record for record in records if record.state in _LOOKS and record.value is not None]


def _place(entry: Range | Choices, value: Any) -> float:
    """Where on the axis a value stands: choices side by side, in their order."""
    return float(value) if isinstance(entry, Range) else float(entry.values.index(value))


def _scatter(axes: Any, records: Sequence[TrialRecord], places: Sequence[float], best: int | None) -> None:
    for state, looks in _LOOKS.items():
        points = [
            (place, record.value)
            for place, record in zip(places, records, strict=True)
            if record.state == state and record.value is not None and math.isfinite(record.value)
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), label=state, **looks)
    for place, record in zip(places, records, strict=True):
        if record.number == best:
            axes.scatter(place, record.value, s=140, marker="*", color="tab:green", label="best", zorder=3)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot, which would set the caller's backend

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    figure.savefig(draft, format="png", dpi=110)
    draft.replace(path)
