"""The learning-rate range test: train for a few steps with a growing rate and see where the loss falls and where it
breaks (Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, with fastai's two suggestions).

fastai reads an exponential average, which lags by half of a test of 100 steps and so suggests rates that are too high;
here the average is centred.
"""

from __future__ import annotations

import csv
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsedge.errors import OptionError, OutputError, RsedgeError
from rsedge.files import replacing
from rsedge.training.recipe import with_settings
from rsedge.training.run_folder import check_place, new_figure, save
from rsedge.training.train import make_task, read_data

if TYPE_CHECKING:
    from rsedge.datasets.examples import CaptionData
    from rsedge.training.loop import Observer
    from rsedge.training.recipe import Recipe

_WIDTH = 1 / 20  # standard deviation of the centred average, as a share of the test
_LEVEL = 0.05  # share of the whole fall by which a loss may miss the lowest and count as having reached it
_KEPT = 0.98  # fastai's running average: what it keeps at each step
_BROKEN = 4.0  # fastai's: the running average, in multiples of its lowest, at which the test ends
_ENOUGH = 10  # points that a curve needs to be read
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LearningRateCurve:
    """The loss over a growing learning rate. Raises RsedgeError: there are too few points to be read."""

    rates: tuple[float, ...]
    """The rate of each step, growing by the same factor."""
    losses: tuple[float, ...]
    """The loss of each step, before it was taken."""
    diverged: bool
    """Whether the loss broke out before the last rate."""

    def __post_init__(self) -> None:
        if len(self.rates) < _ENOUGH or len(self.losses) != len(self.rates):
            raise RsedgeError(
                f"the loss broke out after {len(self.losses)} steps, which is too few to see where it falls: start "
                "with a lower --min-lr"
            )

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The losses under a centred Gaussian window, cut off at both ends of the test."""
        places = np.arange(len(self.losses))
        weights = np.exp(-0.5 * ((places[:, None] - places) / (_WIDTH * len(places))) ** 2)
        return tuple((weights @ np.array(self.losses) / weights.sum(axis=1)).tolist())

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss falls fastest, per decade."""
        slope = np.gradient(np.array(self.smoothed), np.log(self.rates))
        return self.rates[int(np.argmin(slope[: self._lowest + 1]))]

    @property
    def tenth_of_minimum(self) -> float:
        """A tenth of the rate at which the smoothed loss has come down; on a plateau, of its beginning."""
        return self.rates[self._lowest] / 10

    @property
    def suggestion(self) -> float:
        """The lower of the two, which is the safer."""
        return min(self.steepest, self.tenth_of_minimum)

    @property
    def _lowest(self) -> int:
        smoothed = np.array(self.smoothed)
        lowest = int(np.argmin(smoothed))
        fall = smoothed[: lowest + 1].max() - smoothed[lowest]
        return int(np.argmax(smoothed <= smoothed[lowest] + _LEVEL * fall))


def find_learning_rate(
    recipe: Recipe,
    data: CaptionData | None = None,
    *,
    min_rate: float = 1e-7,
    max_rate: float = 1.0,
    steps: int = 100,
    cpu: bool = False,
    observe: Observer | None = None,
) -> LearningRateCurve:
    """Train ``recipe``'s model for ``steps`` optimiser steps of growing learning rate, until the loss breaks out.
    Nothing is kept: no run, no checkpoint.

    Args:
        recipe: The training; other rates in ``optimizer.learning_rates`` grow in proportion.
        data: Examples made elsewhere; else the recipe's ``data.sources`` are read.
        min_rate, max_rate: The first and the last rate.
        steps: How many, at most.
        cpu: Leave GPUs alone.
        observe: Called after every step.

    Raises:
        OptionError: The rates are no range, or recipe and data do not fit together.
        RsedgeError: The loss breaks out at once.
    """
    from accelerate.utils import set_seed

    from rsedge.training.loop import Event, Trainer, accelerating

    problems = []
    if not 0 < min_rate < max_rate < math.inf:
        problems.append(f"the rates go from {min_rate} to {max_rate}: give a rate above 0 and a larger one")
    if steps < _ENOUGH:
        problems.append(f"steps is {steps}: give {_ENOUGH} or more")
    if problems:
        raise OptionError("; ".join(problems))
    if data is None:
        data = read_data(recipe, progress=_log.info)
    training = data.split("train")
    epochs = -(-steps // max(1, len(training) // recipe.loop.batch_size))
    # Captions are for evaluations, an average of the weights too, and there are neither.
    recipe = with_settings(recipe, {"loop.epochs": epochs, "loop.max_steps": steps, "loop.ema_decay": None})
    with accelerating(recipe, cpu=cpu) as accelerator:
        set_seed(recipe.seed)
        trainer = Trainer(recipe, make_task(recipe, data), training, data.split("val"), accelerator)
        trainer.model.train()
        rates = [min_rate * (max_rate / min_rate) ** (step / (steps - 1)) for step in range(steps)]
        losses: list[float] = []
        average, lowest, diverged = 0.0, math.inf, False
        for rate, chunks in zip(rates, trainer.batches(), strict=True):
            for group in trainer.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * (rate / recipe.optimizer.learning_rate)
            try:
                values = trainer.step_at_rates(chunks)
            except RsedgeError:  # not a number any more
                diverged = True
                break
            losses.append(values["loss"])
            if observe is not None:
                observe(Event(len(losses), steps, trainer.progress.step / trainer.order.steps_per_epoch, values))
            average = _KEPT * average + (1 - _KEPT) * losses[-1]
            smoothed = average / (1 - _KEPT ** len(losses))  # without its pull to the start at 0
            lowest = min(lowest, smoothed)
            if len(losses) >= _ENOUGH and smoothed > _BROKEN * lowest:
                diverged = True
                break
    return LearningRateCurve(tuple(rates[: len(losses)]), tuple(losses), diverged)


def write_curve(curve: LearningRateCurve, folder: str | Path, *, overwrite: bool = False) -> tuple[Path, Path]:
    """Write ``lr-finder.csv`` and ``lr-finder.png`` in a folder. Raises OutputError: they exist, or writing fails."""
    table, picture = curve_files(folder, overwrite=overwrite)
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        with replacing(table) as draft, draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["learning_rate", "loss", "smoothed_loss"])
            writer.writerows(zip(curve.rates, curve.losses, curve.smoothed, strict=True))
        figure = new_figure(8, 4.5)
        axes = figure.subplots()
        axes.plot(curve.rates, curve.losses, color="tab:blue", alpha=0.3, linewidth=1, label="loss")
        axes.plot(curve.rates, curve.smoothed, color="tab:blue", label="smoothed")
        marks = {"steepest slope": curve.steepest, "a tenth of the minimum": curve.tenth_of_minimum}
        for (name, rate), color in zip(marks.items(), ("tab:orange", "tab:green"), strict=True):
            axes.axvline(rate, color=color, linestyle="--", linewidth=1, label=f"{name}: {rate:.2g}")
        smoothed = np.array(curve.smoothed)
        low, high = min(curve.losses), max(smoothed[: max(2, len(smoothed) // 2)].max(), curve.losses[0])
        axes.set_ylim(low - 0.05 * (high - low), high + 0.3 * (high - low))  # what broke out leaves the picture
        axes.set(xlabel="learning rate", ylabel="training loss", xscale="log")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        save(figure, picture)
    except OSError as error:
        raise OutputError(f"cannot write in {folder}: {error.strerror}; choose another with -o") from error
    return table, picture


def curve_files(folder: str | Path, *, overwrite: bool = False) -> tuple[Path, Path]:
    """The files of :func:`write_curve`. Raises OutputError: they exist, or cannot be written."""
    check_place(Path(folder))
    paths = (Path(folder) / "lr-finder.csv", Path(folder) / "lr-finder.png")
    taken = [str(path) for path in paths if path.exists()]
    if taken and not overwrite:
        raise OutputError(f"{' and '.join(taken)} exist already: pass --overwrite, or choose another -o")
    return paths
