"""Pictures of a run: its loss curve, and validation images with what the model says of them."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from rsedge.texts import plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rsedge.datasets.examples import Example


def draw_losses(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The training loss, the validation loss and the learning rate over the steps, as PNG; nothing without a loss.

    Args:
        lines: Those of ``metrics.jsonl``.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validated = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    rates = [(line["step"], line["learning_rate"]) for line in lines if "learning_rate" in line]
    if not trained and not validated:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if trained:
        axes.plot(*zip(*trained, strict=True), color="tab:blue", alpha=0.6, linewidth=1, label="training")
    if validated:
        axes.plot(*zip(*validated, strict=True), color="tab:orange", marker="o", markersize=3, label="validation")
    axes.set(xlabel="optimiser step", ylabel="loss")
    axes.grid(alpha=0.3)
    if rates:
        side = axes.twinx()
        side.plot(*zip(*rates, strict=True), color="tab:gray", linestyle=":", linewidth=1, label="learning rate")
        side.set_ylabel("learning rate")
        side.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    save(figure, path)


def draw_samples(examples: Sequence[Example], texts: Sequence[str], path: Path, *, title: str) -> None:
    """A grid of images, each with the model's text and its first reference, as PNG.

    Args:
        examples: Up to a few dozen.
        texts: What the model says of each.
        path: PNG to write.
        title: Above the grid.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(examples))
    rows = -(-len(examples) // columns)
    figure = Figure(figsize=(3.2 * columns, 4.1 * rows), layout="constrained")
    figure.suptitle(title)
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for cell in cells:
        cell.set_axis_off()
    for cell, example, text in zip(cells, examples, texts, strict=False):
        cell.imshow(example.image.read())
        lines = [*textwrap.wrap(f"model: {text}", 40)[:4], *textwrap.wrap(f"reference: {example.captions[0]}", 40)[:4]]
        safe = (plain(line).replace("$", r"\$") for line in lines)  # matplotlib takes what stands in $ for a formula
        cell.set_title("\n".join(safe), fontsize=8, loc="left")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    draft = path.with_name(f".{path.name}.tmp")
    figure.savefig(draft, format="png", dpi=110)
    draft.replace(path)
