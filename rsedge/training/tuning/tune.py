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
from rsedge.training.recipe import ContrastiveObjective, monitors
from rsedge.training.recipe_files import to_dict, with_settings
from rsedge.training.run_folder import read_metrics
from rsedge.training.train import fingerprint, read_data, train
from rsedge.training.tuning.search_space import parse_space, to_toml
from rsedge.training.tuning.study_folder import Keep, StudyFolder
from rsedge.training.tuning.trials import Method, Pruner, TrialRecord, Trials, grid_points
from rsedge.training.tuning.tune_report import draw_study

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
    """What a search came to."""

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
        recipe: What is searched around; its monitor becomes the metric.
        space: Recipe key → ``float:LOW:HIGH``, ``log:LOW:HIGH``, ``int:LOW:HIGH[:STEP]`` or choices; see
            :mod:`rsedge.training.tuning.search_space`.
        output: Folder of the study.
        data: Examples made elsewhere; else the recipe's ``data.sources`` are read, once.
        method: ``tpe`` and ``gp`` propose what earlier trials make promising (the first 10 trials are random);
            ``grid`` tries every combination.
        trials: How many in all, with those done before a resume; None: 20, and of a grid every point.
        metric: What an evaluation calls it, such as ``val_loss``; None: the recipe's ``loop.monitor``. The value of a
            trial is its best.
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
        known = monitors(
            recipe.family, captions=recipe.loop.captions, contrastive=recipe.contrastive or ContrastiveObjective()
        )
        better = recipe.loop.monitor_mode if metric == recipe.loop.monitor else known.get(metric)
        direction = "minimize" if better == "min" else "maximize"
    wanted = {"loop.monitor": metric, "loop.monitor_mode": "min" if direction == "minimize" else "max"}
    base = with_settings(recipe, wanted)
    parsed = parse_space(space, base, grid=method == "grid")
    points = grid_points(parsed) if method == "grid" else []
    if method == "grid" and trials is not None and trials > len(points):
        raise OptionError(f"trials is {trials}, but the grid has {len(points)} points: leave it out to try them all")
    seed = recipe.seed if seed is None else seed
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
        "seed": seed,
        "data": fingerprint(data),
        "search": to_toml(parsed),
        "recipe": to_dict(base),
    }
    with folder.open(plan, resume=resume, overwrite=overwrite) as journal:
        made = Trials(journal, base, parsed, method=method, pruner=pruner, seed=seed)
        search = _Search(made, folder, data, cpu=cpu, observe=observe)
        return search.run(trials or len(points) or _TRIALS, timeout)


class _Search:
    def __init__(
        self, trials: Trials, folder: StudyFolder, data: CaptionData, *, cpu: bool, observe: Observer | None
    ) -> None:
        self._trials, self._folder, self._data, self._cpu, self._observe = trials, folder, data, cpu, observe
        self._metric = trials.recipe.loop.monitor
        self._saved: int | None = None

    def run(self, wanted: int, timeout: float | None) -> TuningResult:
        began = time.monotonic()
        self._trials.take_up()
        try:
            while (done := self._trials.done) < wanted:
                if timeout is not None and time.monotonic() - began >= timeout:
                    _log.info("%d of %d trials in %.0f s: the time is up", done, wanted, timeout)
                    break
                number, outcome = self._trial()
                records, best = self._update()
                so_far = f"  (best: trial {best.number}, {_short(best.value)})" if best else ""
                _log.info("trial %d: %s%s", number, outcome, so_far)
                # Where every trial fails for one reason in training, the settings are not what is at fault.
                reasons = [record.reason for record in records if record.state == "failed"]
                trained = all(self._folder.run(record.number).exists() for record in records)
                if trained and len(reasons) == len(records) >= _ALIKE and len(set(reasons)) == 1:
                    raise RsedgeError(self._none_completed(records))
        finally:
            records, best = self._update()
            importances = self._trials.importances(records)
            draw_study(
                records,
                self._trials.space,
                self._folder.path,
                metric=self._metric,
                best=best.number if best else None,
                importances=importances,
            )
        if best is None:
            raise RsedgeError(self._none_completed(records))
        return TuningResult(self._folder.path, best, self._trials.recipe_of(best), tuple(records), importances)

    def _update(self) -> tuple[list[TrialRecord], TrialRecord | None]:
        """Bring the folder up to date; gives all trials and the best."""
        records = self._trials.records()
        best = self._trials.best(records)
        if best is not None and best.number != self._saved:
            self._folder.save_best(self._trials.recipe_of(best))
            self._saved = best.number
        self._folder.update(records, best)
        return records, best

    # One trial

    def _trial(self) -> tuple[int, str]:
        """Train once; gives the trial's number and what came of it."""
        from optuna import TrialPruned
        from torch.cuda import OutOfMemoryError

        trial, settings = self._trials.ask()
        _log.info("trial %d: %s", trial.number, ", ".join(f"{key} {_short(value)}" for key, value in settings.items()))
        _forget_accelerate()
        try:
            value = self._train(trial, with_settings(self._trials.recipe, settings))
            self._trials.end(trial, value)
            outcome = f"{self._metric} {_short(value)}"
        except TrialPruned as pruned:
            trial.set_user_attr("reason", str(pruned))
            self._trials.end(trial, state="PRUNED")
            outcome = f"pruned: {pruned}"
        except (RsedgeError, OutOfMemoryError) as error:
            trial.set_user_attr("reason", str(error))
            self._trials.end(trial, state="FAIL")
            outcome = f"failed: {error}"
        # Any other exception is no fault of the settings: it ends the search, and --resume repeats the trial.
        _forget_accelerate()
        return trial.number, outcome

    def _train(self, trial: Any, recipe: Recipe) -> float:
        """Train, reporting every evaluation by its number: a count that means the same whatever the batch size."""
        import optuna

        folder = self._folder.run(trial.number)
        steps = reports = 0

        def report(value: float) -> None:
            nonlocal reports
            reports += 1
            trial.report(value, reports)

        def watch(event: Event) -> None:
            nonlocal steps
            steps = event.step
            if self._observe is not None:
                self._observe(event)
            if not event.evaluated:
                return
            value = event.values[self._metric]
            if math.isnan(value):
                raise RsedgeError(f"{self._metric} is nan at step {event.step}")
            report(value)
            # What is behind at its last evaluation has nothing left to save, and its value is worth knowing.
            if event.step < event.steps and trial.should_prune():
                raise optuna.TrialPruned(f"behind the others at evaluation {reports}, step {event.step}")

        last = self._folder.take_over(trial.user_attrs.get("repeats"), trial.number)
        if last is not None:
            for line in read_metrics(folder / "metrics.jsonl"):
                if self._metric in line and line["step"] <= last.step:
                    report(line[self._metric])
        try:
            result = train(
                recipe, folder, data=self._data, resume=last is not None, cpu=self._cpu, trackers=(), observe=watch
            )
            steps = result.progress.step
        finally:
            trial.set_user_attr("steps", steps)
        assert result.progress.best is not None
        return result.progress.best

    def _none_completed(self, records: Sequence[TrialRecord]) -> str:
        reasons = dict.fromkeys(record.reason for record in records if record.reason)
        shown = [f"  - {reason}" for reason in itertools.islice(reasons, 5)]
        return "\n".join([f"no trial was completed; see {self._folder.path / 'trials.csv'}:", *shown])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _forget_accelerate() -> None:
    """Let the next trial choose its own precision, and have the memory of the last: accelerate's state outlives a run
    and refuses another.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
