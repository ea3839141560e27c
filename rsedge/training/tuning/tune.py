"""Search over a recipe: Bayesian or grid, with pruning, in a folder that a killed search goes on in.

What a trial tries is a function of the seed, of how many trials came before and of what they gave, so that a search
that was killed goes on with the trials it would have made anyway.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rsedge.errors import BackendError, OptionError, RsedgeError
from rsedge.training.recipe import monitors, to_dict, with_settings
from rsedge.training.run_folder import read_metrics
from rsedge.training.train import fingerprint, read_data, train
from rsedge.training.tuning.search_space import encode, parse_space, to_toml
from rsedge.training.tuning.study import Keep, Method, Pruner, StudyFolder, TrialRecord, Trials, draw_study

if TYPE_CHECKING:
    from rsedge.datasets.examples import CaptionData
    from rsedge.training.loop import Event, Observer
    from rsedge.training.recipe import Recipe

Direction = Literal["minimize", "maximize"]

_log = logging.getLogger(__name__)
_TRIALS = 20
_ALIKE = 3  # failures with the same reason, and nothing else, after which a search is given up


@dataclass(frozen=True, slots=True)
class TuningResult:
    """The result of a search."""

    study: Path
    """Its folder."""
    best: TrialRecord
    """The best trial."""
    recipe: Recipe
    """The best trial's, as in ``best.toml``."""
    trials: tuple[TrialRecord, ...]
    """All of them."""
    importances: Mapping[str, float]
    """Searched key → its share, adding up to 1; empty where there are too few trials to tell."""


def tune(
    recipe: Recipe,
    space: Mapping[str, Any],
    output: str | Path,
    *,
    data: CaptionData | None = None,
    method: Method = "tpe",
    trials: int | None = None,
    metric: str | None = None,
    direction: Direction | None = None,
    pruner: Pruner = "median",
    seed: int | None = None,
    keep: Keep = "best",
    timeout: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    cpu: bool = False,
    observe: Observer | None = None,
) -> TuningResult:
    """Search for the recipe that trains best.

    A trial that cannot be trained (settings that contradict each other, a loss that is no longer a number, no GPU
    memory left) is recorded as failed with its reason, and the search goes on.

    Args:
        recipe: The base of the search; its monitor becomes the metric.
        space: Recipe key → range or choices, as in :mod:`rsedge.training.tuning.search_space`.
        output: Folder of the study.
        data: Examples made elsewhere; else the recipe's ``data.sources`` are read, once.
        method: ``tpe`` and ``gp`` propose what earlier trials make promising (the first 10 trials are random);
            ``grid`` tries every combination.
        trials: How many in all, with those done before a resume; None: 20, and of a grid every point.
        metric: Value of an evaluation, such as ``val_loss``; None: the recipe's ``loop.monitor``. A trial counts with
            its best.
        direction: None: as the recipe's ``loop.monitor_mode`` for its own monitor; else losses are minimised and other
            metrics maximised.
        pruner: Ends trials that fall behind others after as many evaluations.
        seed: Of the proposals; None: the recipe's. Trials train with the recipe's in any case.
        keep: Whose checkpoints stay: ``best``, ``all``, ``none``.
        timeout: Seconds after which no further trial starts.
        resume: Go on in ``output``; a trial that was running is taken up at its last checkpoint.
        overwrite: Replace a study that is there.
        cpu: Leave GPUs alone.
        observe: Called with the events of every trial's training.

    Raises:
        OptionError: Something is not accepted, all of it listed; or the study to resume is another.
        OutputError: ``output`` is taken, or in use.
        BackendError: Optuna or SciPy is not installed.
        RsedgeError: No trial was completed.
    """
    for module in ("optuna", "scipy"):
        if importlib.util.find_spec(module) is None:
            raise BackendError(f"tuning needs {module}: pip install 'rsedge[tune]'")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError("a search runs in one process: start it without accelerate launch or torchrun")
    problems = [
        f"{name} is {value}: give {accepted} above 0"
        for name, value, accepted in (("trials", trials, "a whole number"), ("timeout", timeout, "seconds"))
        if value is not None and value <= 0
    ]
    if problems:
        raise OptionError("; ".join(problems))
    metric = metric or recipe.loop.monitor
    if direction is None:
        better = recipe.loop.monitor_mode if metric == recipe.loop.monitor else monitors(recipe).get(metric)
        direction = "minimize" if better == "min" else "maximize"
    wanted = {"loop.monitor": metric, "loop.monitor_mode": "min" if direction == "minimize" else "max"}
    base = with_settings(recipe, wanted)
    parsed = parse_space(space, base, grid=method == "grid")
    points: list[dict[str, Any]] = []
    if method == "grid":
        values = [[encode(value) for value in entry.grid or ()] for entry in parsed.values()]
        points = [dict(zip(parsed, point, strict=True)) for point in itertools.product(*values)]
    if method == "grid" and trials is not None and trials > len(points):
        raise OptionError(f"trials is {trials}, but the grid has {len(points)} points: leave it out to try them all")
    folder = StudyFolder(Path(output), keep=keep)
    folder.check(resume=resume, overwrite=overwrite)
    if data is None:
        data = read_data(base, progress=_log.info)
    for split in ("train", "val"):
        if not data.split(split):
            raise OptionError(f"there are no images of the split {split} in {', '.join(data.sources) or 'the data'}")
    plan = {
        "method": method,
        "metric": metric,
        "direction": direction,
        "pruner": pruner,
        "seed": recipe.seed if seed is None else seed,
        "data": fingerprint(data),
        "search": to_toml(parsed),
        "recipe": to_dict(base),
    }
    with folder.open(plan, resume=resume, overwrite=overwrite) as journal:
        search = _Search(Trials(journal, plan, base, parsed, points), folder, data, cpu, observe, metric)
        return search.run(trials or len(points) or _TRIALS, timeout)


@dataclass
class _Search:
    trials: Trials
    folder: StudyFolder
    data: CaptionData
    cpu: bool
    observe: Observer | None
    metric: str
    saved: int | None = None
    """The trial whose recipe is in ``best.toml``."""

    def run(self, wanted: int, timeout: float | None) -> TuningResult:
        began = time.monotonic()
        self.trials.take_up()
        try:
            while (done := self.trials.done) < wanted:
                if timeout is not None and time.monotonic() - began >= timeout:
                    _log.info("%d of %d trials in %.0f s: the time is up", done, wanted, timeout)
                    break
                number, outcome = self.trial()
                records, best = self.update()
                so_far = f"  (best: trial {best.number}, {_short(best.value)})" if best else ""
                _log.info("trial %d: %s%s", number, outcome, so_far)
                # Where every trial fails for one reason in training, the settings are not what is at fault.
                reasons = [record.reason for record in records if record.state == "failed"]
                trained = all(self.folder.run(record.number).exists() for record in records)
                if trained and len(reasons) == len(records) >= _ALIKE and len(set(reasons)) == 1:
                    raise RsedgeError(self.none_completed(records))
        finally:
            records, best = self.update()
            importances = self.trials.importances(records)
            draw_study(self.trials, records, importances, self.folder.path)
        if best is None:
            raise RsedgeError(self.none_completed(records))
        return TuningResult(self.folder.path, best, self.trials.recipe_of(best), tuple(records), importances)

    def update(self) -> tuple[list[TrialRecord], TrialRecord | None]:
        """Bring the folder up to date; return all trials and the best."""
        records = self.trials.records()
        best = self.trials.best(records)
        if best is not None and best.number != self.saved:
            self.folder.save_best(self.trials.recipe_of(best))
            self.saved = best.number
        self.folder.update(records, best)
        return records, best

    def trial(self) -> tuple[int, str]:
        """Train once; return the trial's number and what came of it."""
        from optuna import TrialPruned
        from torch.cuda import OutOfMemoryError

        trial, settings = self.trials.ask()
        _log.info("trial %d: %s", trial.number, ", ".join(f"{key} {_short(value)}" for key, value in settings.items()))
        value, state, reason = None, "", ""
        try:
            value = self.train(trial, with_settings(self.trials.recipe, settings))
            outcome = f"{self.metric} {_short(value)}"
        except TrialPruned as pruned:
            state, reason, outcome = "PRUNED", str(pruned), f"pruned: {pruned}"
        except (RsedgeError, OutOfMemoryError) as error:
            state, reason, outcome = "FAIL", str(error), f"failed: {error}"
        # Any other exception is no fault of the settings: it ends the search, and --resume repeats the trial.
        if state:
            trial.set_user_attr("reason", reason)
        self.trials.end(trial, value, state)
        _free_memory()
        return trial.number, outcome

    def train(self, trial: Any, recipe: Recipe) -> float:
        """Train, reporting every evaluation by its number: a count that means the same whatever the batch size."""
        import optuna

        folder = self.folder.run(trial.number)
        steps, reported = 0, itertools.count(1)

        def watch(event: Event) -> None:
            nonlocal steps
            steps = event.step
            if self.observe is not None:
                self.observe(event)
            if not event.evaluated:
                return
            value = event.values[self.metric]
            if math.isnan(value):
                raise RsedgeError(f"{self.metric} is nan at step {event.step}")
            trial.report(value, number := next(reported))
            # What is behind at its last evaluation has nothing left to save, and its value is worth knowing.
            if event.step < event.steps and trial.should_prune():
                raise optuna.TrialPruned(f"behind the others at evaluation {number}, step {event.step}")

        last = self.folder.take_over(trial.user_attrs.get("repeats"), trial.number)
        if last is not None:
            for line in read_metrics(folder / "metrics.jsonl"):
                if self.metric in line and line["step"] <= last.step:
                    trial.report(line[self.metric], next(reported))
        try:
            result = train(
                recipe, folder, data=self.data, resume=last is not None, cpu=self.cpu, trackers=(), observe=watch
            )
            steps = result.progress.step
        finally:
            trial.set_user_attr("steps", steps)
        assert result.progress.best is not None
        return result.progress.best

    def none_completed(self, records: Sequence[TrialRecord]) -> str:
        reasons = dict.fromkeys(record.reason for record in records if record.reason)
        shown = [f"  - {reason}" for reason in itertools.islice(reasons, 5)]
        return "\n".join([f"no trial was completed; see {self.folder.path / 'trials.csv'}:", *shown])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _free_memory() -> None:
    """Free what a trial leaves, on the GPU too."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
