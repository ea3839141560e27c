"""A study: its trials in Optuna's journal, its folder, and its pictures.

::

    STUDY/
      study.toml         base recipe, search space, method, metric
      journal.log        every trial and evaluation, as Optuna stores them; what a resume reads
      trials.csv         one line per trial
      best.toml          the whole recipe of the best trial, for rsedge train --recipe
      history.png, slices.png, importances.png
      trials/0007/       its run folder
"""

from __future__ import annotations

import csv
import fcntl
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rsedge.errors import OptionError, OutputError
from rsedge.files import open_itself, replacing
from rsedge.tomlfile import read_toml, write_toml
from rsedge.training.data.samples import derive
from rsedge.training.recipe import differences, save_recipe, with_settings
from rsedge.training.run_folder import RunFolder, check_free, new_figure, save
from rsedge.training.tuning.search_space import Range

if TYPE_CHECKING:
    from rsedge.training.optim import Progress
    from rsedge.training.recipe import Recipe
    from rsedge.training.tuning.search_space import Space

Method = Literal["tpe", "gp", "grid"]
Pruner = Literal["median", "hyperband", "none"]
Keep = Literal["best", "all", "none"]

_ATTEMPTS = 3  # a trial whose process ends so often is given up: it may be what ends it, by its memory, say
_ENOUGH = 20  # complete trials, for importances to mean something
_FREE_ON_RESUME = ("recipe.data.workers", "recipe.data.sources")  # the fingerprint holds what the data must be
_FILES = ("study.toml", "trials.csv", "best.toml", "history.png", "slices.png", "importances.png")
# Classes of Optuna. The sampler of a grid is never asked: its points are enqueued.
_SAMPLERS = {"tpe": "TPESampler", "gp": "GPSampler", "grid": "RandomSampler"}
_PRUNERS = {"median": "MedianPruner", "hyperband": "HyperbandPruner", "none": "NopPruner"}
_LOOKS: dict[str, dict[str, Any]] = {
    "complete": {"color": "tab:blue", "marker": "o", "s": 28},
    "pruned": {"color": "tab:orange", "marker": "v", "s": 28},
    "failed": {"color": "tab:red", "marker": "x", "s": 28},
}


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial."""

    number: int
    """From 0."""
    state: str
    """``complete``, ``pruned``, ``failed``, ``interrupted`` (repeated as a later one) or ``running``."""
    value: float | None
    """Best value of the metric; None if it was never evaluated."""
    settings: Mapping[str, Any]
    """Dotted recipe key → value."""
    steps: int | None
    """Optimiser steps done; None where the process ended."""
    seconds: float | None
    """Time taken; None while running."""
    reason: str
    """Why it has no value of its own; empty for complete trials."""


class Trials:
    """Optuna's study in a journal, with a sampler made anew for every trial.

    Args:
        journal: File that no other process uses.
        plan: With the method, the pruner and the seed of the proposals.
        recipe: The base of the search; its monitor is the metric.
        space: The searched keys.
        points: Every point of a grid, as Optuna stores them; empty with another method.
    """

    def __init__(
        self, journal: Path, plan: Mapping[str, Any], recipe: Recipe, space: Space, points: Sequence[dict[str, Any]]
    ) -> None:
        import optuna

        self.recipe, self.space = recipe, space
        self._points, self._sampler, self._seed = points, _SAMPLERS[plan["method"]], plan["seed"]
        self._minimize = recipe.loop.monitor_mode == "min"
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # its news of every trial are told here
        # The journal needs no lock of its own: a study folder is open in one process at a time.
        unlocked = SimpleNamespace(acquire=lambda: True, release=lambda: None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            backend = optuna.storages.journal.JournalFileBackend(str(journal), lock_obj=unlocked)
            self._study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                study_name="rsedge",
                pruner=getattr(optuna.pruners, _PRUNERS[plan["pruner"]])(),
                direction="minimize" if self._minimize else "maximize",
                load_if_exists=True,
            )

    @property
    def done(self) -> int:
        """Trials that ended by themselves."""
        repeated = self._repetitions()
        return sum(trial.state.is_finished() and trial.number not in repeated for trial in self._all())

    def ask(self) -> tuple[Any, dict[str, Any]]:
        """The next trial, Optuna's, and its settings as a recipe takes them."""
        from optuna import samplers
        from optuna.exceptions import ExperimentalWarning
        from optuna.trial import TrialState

        position = self.done
        if self._points and not any(trial.state == TrialState.WAITING for trial in self._all()):
            self._study.enqueue_trial(self._points[position])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            # A seed of its own for every trial: what is proposed after a resume is what would have been.
            sampler = getattr(samplers, self._sampler)
            self._study.sampler = sampler(seed=derive("sampler", self._seed, position) % 2**32)
            trial = self._study.ask({key: entry.distribution() for key, entry in self.space.items()})
        return trial, self._settings(trial.params)

    def take_up(self) -> None:
        """Fail the trial that was running when the process ended, and put its repetition first in line."""
        from optuna.trial import TrialState

        for trial in self._all():
            if trial.state != TrialState.RUNNING:
                continue
            attempt = trial.user_attrs.get("attempt", 1)
            if trial.number not in self._repetitions() and attempt < _ATTEMPTS:
                params = self._points[self.done] if self._points else trial.params
                self._study.enqueue_trial(params, user_attrs={"repeats": trial.number, "attempt": attempt + 1})
            self._study.tell(trial.number, state=TrialState.FAIL)

    def end(self, trial: Any, value: float | None, state: str) -> None:
        """Store what a trial reached, or with ``PRUNED`` or ``FAIL`` that it ended early or could not be trained."""
        from optuna.trial import TrialState

        self._study.tell(trial, value, state=TrialState[state] if state else None)

    def records(self) -> list[TrialRecord]:
        """All trials, in order."""
        words = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
        repetitions, found = self._repetitions(), []
        for trial in self._all():
            if trial.state.name == "WAITING":
                continue
            state, reason = words[trial.state.name], trial.user_attrs.get("reason", "")
            if trial.number in repetitions:
                state, reason = "interrupted", f"repeated as trial {repetitions[trial.number]}"
            elif state == "failed" and not reason:
                reason = f"the process ended {_ATTEMPTS} times in this trial"
            value = trial.value
            if state != "complete":
                seen = [value for value in trial.intermediate_values.values() if math.isfinite(value)]
                value = (min(seen) if self._minimize else max(seen)) if seen else None
            steps, seconds = trial.user_attrs.get("steps"), trial.duration.total_seconds() if trial.duration else None
            settings = self._settings(trial.params)
            found.append(TrialRecord(trial.number, state, value, settings, steps, seconds, reason))
        return found

    def best(self, records: Sequence[TrialRecord]) -> TrialRecord | None:
        """The best complete trial, of equal ones the first."""
        complete = [
            (record.value if self._minimize else -record.value, record.number, record)
            for record in records
            if record.state == "complete" and record.value is not None
        ]
        return min(complete)[2] if complete else None

    def recipe_of(self, record: TrialRecord) -> Recipe:
        """The recipe of a trial. Raises OptionError: its settings contradict each other."""
        return with_settings(self.recipe, dict(record.settings))

    def importances(self, records: Sequence[TrialRecord]) -> dict[str, float]:
        """How much each key matters for being among the best, adding up to 1; empty with too few trials to tell."""
        from optuna import importance
        from optuna.exceptions import ExperimentalWarning

        complete = [record.value for record in records if record.state == "complete"]
        if len(self.space) < 2 or len(complete) < _ENOUGH or len(set(complete)) < 2:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            evaluator = importance.PedAnovaImportanceEvaluator()  # the one that needs no scikit-learn
            found = importance.get_param_importances(self._study, evaluator=evaluator)
        return {key: float(share) for key, share in found.items() if math.isfinite(share)}

    def _all(self) -> list[Any]:
        trials: list[Any] = self._study.get_trials(deepcopy=False)
        return trials

    def _repetitions(self) -> dict[int, int]:
        """Number of a trial that was cut off → of the one that repeats it."""
        found = {trial.user_attrs.get("repeats"): trial.number for trial in self._all()}
        return {cut: again for cut, again in found.items() if cut is not None}

    def _settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {key: entry.decode(params[key]) for key, entry in self.space.items() if key in params}


class StudyFolder:
    """A study on disk.

    Args:
        path: The folder.
        keep: Whose checkpoints stay.
    """

    def __init__(self, path: Path, *, keep: Keep) -> None:
        self.path, self._keep = path, keep
        self._plan, self._journal = path / "study.toml", path / "journal.log"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Check, before the data is read, whether the folder can be opened so.

        Raises:
            OptionError: There is nothing to resume.
            OutputError: Something is there already.
        """
        if resume and not self._plan.is_file():
            raise OptionError(f"there is no study in {self.path} to resume: start one without --resume")
        if not resume:
            check_free(self.path, "study", is_one=self._plan.is_file(), overwrite=overwrite)

    @contextmanager
    def open(self, plan: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Iterator[Path]:
        """Take the folder for this process alone; yields the journal.

        Raises:
            OptionError: The study to resume is another; names the differences.
            OutputError: The folder cannot be made, or another process has it.
        """
        self.check(resume=resume, overwrite=overwrite)
        try:
            (self.path / "trials").mkdir(parents=True, exist_ok=True)
            if (self.path / "trials").is_symlink():
                raise OutputError(f"{self.path / 'trials'} is a link: choose another with -o")
            handle = open(self._journal, "a+b", opener=open_itself)  # noqa: SIM115 - Path takes no opener
        except OSError as error:
            raise OutputError(f"cannot write in {self.path}: {error.strerror}; choose another with -o") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"{self.path} is in use by another search: wait for it to end") from None
            if resume:
                stored = read_toml(self._plan)
                changed = ["the images, their splits or their texts changed"] if stored["data"] != plan["data"] else []
                changed += differences(stored, plan, free=("data", *_FREE_ON_RESUME))
                if changed:
                    shown = "\n".join(f"  - {text}" for text in changed)
                    raise OptionError(
                        f"{self.path} cannot be resumed as another study:\n{shown}\nleave these as they were to go on, "
                        "or start a new study with another -o"
                    )
                # A power failure may leave a line half-written; Optuna would read it together with the next.
                handle.seek(0)
                text = handle.read()
                if len(text) > (whole := text.rfind(b"\n") + 1):
                    handle.truncate(whole)
                    os.fsync(handle.fileno())
            else:
                handle.truncate(0)
                for entry in self.path.iterdir():
                    if entry.name == "trials":
                        shutil.rmtree(entry)
                        entry.mkdir()
                    elif entry.name in _FILES:
                        entry.unlink()
                with replacing(self._plan) as draft:
                    write_toml(draft, plan)
            yield self._journal

    def run(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.path / "trials" / f"{number:04d}"

    def take_over(self, repeated: int | None, number: int) -> Progress | None:
        """Let a trial go on with the run of the one it repeats; None where it starts from nothing."""
        if repeated is not None and self.run(repeated).exists():
            self.run(repeated).rename(self.run(number))
        last = RunFolder(self.run(number)).last()
        if last is None:
            shutil.rmtree(self.run(number), ignore_errors=True)  # cut off before its first checkpoint
            return None
        return last[1]

    def save_best(self, recipe: Recipe) -> None:
        """Write the best trial's recipe."""
        with replacing(self.path / "best.toml") as draft:
            save_recipe(draft, recipe)

    def update(self, records: Sequence[TrialRecord], best: TrialRecord | None) -> None:
        """Write the table, and remove the checkpoints that are not kept."""
        keys = list(dict.fromkeys(key for record in records for key in record.settings))
        with replacing(self.path / "trials.csv") as draft, draft.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["number", "state", "value", *keys, "steps", "seconds", "reason"])
            for record in records:
                seconds = None if record.seconds is None else round(record.seconds, 3)
                values = [record.value, *(record.settings.get(key) for key in keys), record.steps, seconds]
                table.writerow([record.number, record.state, *values, record.reason])
        for record in records:
            kept = self._keep == "all" or (self._keep == "best" and record is best)
            if not kept and record.state != "running":
                for link in ("best", "last"):
                    (self.run(record.number) / link).unlink(missing_ok=True)
                shutil.rmtree(self.run(record.number) / "checkpoints", ignore_errors=True)


def draw_study(trials: Trials, records: Sequence[TrialRecord], importances: Mapping[str, float], folder: Path) -> None:
    """Write ``history.png``, ``slices.png`` and ``importances.png``; the first two need a value, the last a share."""
    metric, best = trials.recipe.loop.monitor, trials.best(records)
    valued = [record for record in records if record.state in _LOOKS and record.value is not None]
    if valued:
        save(_history(records, valued, metric, best), folder / "history.png")
        save(_slices(valued, trials.space, metric, best), folder / "slices.png")
    if importances:
        figure = new_figure(8, 1.2 + 0.4 * len(importances))
        axes = figure.subplots()
        bars = axes.barh(*zip(*sorted(importances.items(), key=lambda entry: entry[1]), strict=True), color="tab:blue")
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.margins(x=0.1)
        axes.set_xlabel(f"importance for {metric} (PED-ANOVA)")
        save(figure, folder / "importances.png")


def _history(
    records: Sequence[TrialRecord], valued: Sequence[TrialRecord], metric: str, best: TrialRecord | None
) -> Any:
    """The value of every trial in order, and the best so far."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    _scatter(axes, valued, [record.number for record in valued], best)
    complete = {record.number: record.value for record in valued if record.state == "complete"}
    if best is not None:
        values = np.array(list(complete.values()))
        so_far = (np.minimum if values.min() == best.value else np.maximum).accumulate(values)
        looks = {"color": "tab:blue", "alpha": 0.5, "linewidth": 1, "label": "best so far"}
        axes.step(list(complete), so_far, where="post", **looks)
    failed = [record.number for record in records if record.state == "failed" and record.value is None]
    if failed:  # on the lower edge, as they have no value
        lower = {"transform": axes.get_xaxis_transform(), "label": "failed, no value", **_LOOKS["failed"]}
        axes.scatter(failed, [0.02] * len(failed), **lower)
    axes.set(xlabel="trial", ylabel=metric)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    return figure


def _slices(valued: Sequence[TrialRecord], space: Space, metric: str, best: TrialRecord | None) -> Any:
    """The values of the trials over each searched key, one panel each; choices stand side by side, in their order."""
    columns = min(3, len(space))
    rows = -(-len(space) // columns)
    figure = new_figure(4.0 * columns, 3.4 * rows + 0.4)
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


def _scatter(axes: Any, valued: Sequence[TrialRecord], places: Sequence[float], best: TrialRecord | None) -> None:
    placed = list(zip(places, valued, strict=True))
    for state, looks in _LOOKS.items():
        points = [
            (place, record.value)
            for place, record in placed
            if record.state == state and record.value is not None and math.isfinite(record.value)
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), label=state, **looks)
    for place, record in placed:
        if record is best:
            axes.scatter(place, record.value, s=140, marker="*", color="tab:green", label="best", zorder=3)
