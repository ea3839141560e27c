"""Pictures of a study: its trials in order, its trials by setting, and which settings mattered."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge.training.figures import save
from rsedge.training.tuning.search_space import Range

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rsedge.training.tuning.search_space import Space
    from rsedge.training.tuning.trials import TrialRecord

_LOOKS: dict[str, dict[str, Any]] = {
    "complete": {"color": "tab:blue", "marker": "o", "s": 28},
    "pruned": {"color": "tab:orange", "marker": "v", "s": 28},
    "failed": {"color": "tab:red", "marker": "x", "s": 28},
}


def draw_study(
    records: Sequence[TrialRecord],
    space: Space,
    folder: Path,
    *,
    metric: str,
    best: int | None,
    importances: Mapping[str, float],
) -> None:
    """Write ``history.png``, ``slices.png`` and ``importances.png``; the first two need a value, the last a share.

    Args:
        records: The trials.
        space: The searched keys.
        folder: Of the study.
        metric: What the values are.
        best: The number of the best trial.
        importances: Key → its share in what makes a trial good.
    """
    valued = [record for record in records if record.state in _LOOKS and record.value is not None]
    if valued:
        save(_history(records, valued, metric, best), folder / "history.png")
        save(_slices(valued, space, metric, best), folder / "slices.png")
    if importances:
        figure = _figure(8, 1.2 + 0.4 * len(importances))
        axes = figure.subplots()
        ordered = sorted(importances.items(), key=lambda entry: entry[1])
        bars = axes.barh([key for key, _ in ordered], [share for _, share in ordered], color="tab:blue")
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.margins(x=0.1)
        axes.set_xlabel(f"importance for {metric} (PED-ANOVA)")
        save(figure, folder / "importances.png")


def _history(records: Sequence[TrialRecord], valued: Sequence[TrialRecord], metric: str, best: int | None) -> Any:
    """The value of every trial in order, and the best so far."""
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    _scatter(axes, valued, [record.number for record in valued], best)
    complete = {record.number: record.value for record in valued if record.state == "complete"}
    if best in complete:
        values = np.array(list(complete.values()))
        so_far = np.minimum if values.min() == complete[best] else np.maximum
        axes.step(
            list(complete),
            so_far.accumulate(values),
            where="post",
            color="tab:blue",
            alpha=0.5,
            linewidth=1,
            label="best so far",
        )
    failed = [record.number for record in records if record.state == "failed" and record.value is None]
    if failed:  # on the lower edge, as they have no value
        lower = {"transform": axes.get_xaxis_transform(), "label": "failed, no value", **_LOOKS["failed"]}
        axes.scatter(failed, [0.02] * len(failed), **lower)
    axes.set(xlabel="trial", ylabel=metric)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    return figure


def _slices(valued: Sequence[TrialRecord], space: Space, metric: str, best: int | None) -> Any:
    """The values of the trials over each searched key, one panel each; choices stand side by side, in their order."""
    columns = min(3, len(space))
    rows = -(-len(space) // columns)
    figure = _figure(4.0 * columns, 3.4 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.ravel()[len(space) :]:
        axes.set_axis_off()
    for axes, (key, entry) in zip(panels.ravel(), space.items(), strict=False):
        settings = [record.settings[key] for record in valued]
        if isinstance(entry, Range):
            _scatter(axes, valued, settings, best)
            if entry.kind == "log":
                axes.set_xscale("log")
            else:
                axes.locator_params(axis="x", nbins=5, integer=entry.kind == "int")
        else:
            _scatter(axes, valued, [entry.values.index(value) for value in settings], best)
            names = ["left out" if value is None else str(value) for value in entry.values]
            axes.set_xticks(range(len(names)), names, rotation=30 if max(map(len, names)) > 6 else 0)
            axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel(key)
        axes.grid(alpha=0.3)
    for row in panels:
        row[0].set_ylabel(metric)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _scatter(axes: Any, valued: Sequence[TrialRecord], places: Sequence[float], best: int | None) -> None:
    for state, looks in _LOOKS.items():
        points = [
            (place, record.value)
            for place, record in zip(places, valued, strict=True)
            if record.state == state and record.value is not None and math.isfinite(record.value)
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), label=state, **looks)
    for place, record in zip(places, valued, strict=True):
        if record.number == best:
            axes.scatter(place, record.value, s=140, marker="*", color="tab:green", label="best", zorder=3)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot, which would set the caller's backend

    return Figure(figsize=(width, height), layout="constrained")
