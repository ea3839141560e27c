"""The trials of a study: what Optuna's journal holds, and what is tried next."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rsedge.training.data.order import derive
from rsedge.training.recipe_files import with_settings
from rsedge.training.tuning.search_space import encode

if TYPE_CHECKING:
    from rsedge.training.recipe import Recipe
    from rsedge.training.tuning.search_space import Space

Method = Literal["tpe", "gp", "grid"]
Pruner = Literal["median", "hyperband", "none"]

_ATTEMPTS = 3  # a trial whose process ends so often is given up: it may be what ends it, by its memory, say
_ENOUGH = 20  # complete trials, for importances to mean something


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


def grid_points(space: Space) -> list[dict[str, Any]]:
    """Every combination of a countable space, as Optuna stores them."""
    values = [[encode(value) for value in entry.grid or ()] for entry in space.values()]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*values)]


class Trials:
    """Optuna's study in a journal, with a sampler made anew for every trial.

    Args:
        journal: File that no other process uses.
        recipe: What is searched around; its monitor is the metric.
        space: What is searched.
        method, pruner: As :func:`rsedge.training.tuning.tune.tune` has them.
        seed: Of the proposals.
    """

    def __init__(
        self, journal: Path, recipe: Recipe, space: Space, *, method: Method, pruner: Pruner, seed: int
    ) -> None:
        import optuna

        self.recipe, self.space = recipe, space
        self._method, self._seed = method, seed
        self._points = grid_points(space) if method == "grid" else []
        self._minimize = recipe.loop.monitor_mode == "min"
        pruners: dict[str, Callable[[], Any]] = {
            "median": optuna.pruners.MedianPruner,
            "hyperband": optuna.pruners.HyperbandPruner,
            "none": optuna.pruners.NopPruner,
        }
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # its news of every trial are told here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            backend = optuna.storages.journal.JournalFileBackend(str(journal), lock_obj=_Held())
            self._study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                study_name="rsedge",
                pruner=pruners[pruner](),
                direction="minimize" if self._minimize else "maximize",
                load_if_exists=True,
            )

    # What is tried

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
        made: dict[str, Callable[..., Any]] = {
            "tpe": samplers.TPESampler,
            "gp": samplers.GPSampler,
            "grid": samplers.RandomSampler,  # never asked: a grid's points are enqueued
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            # A seed of its own for every trial: what is proposed after a resume is what would have been.
            self._study.sampler = made[self._method](seed=derive("sampler", self._seed, position) % 2**32)
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

    # What came of it

    def end(self, trial: Any, value: float | None = None, *, state: Literal["PRUNED", "FAIL"] | None = None) -> None:
        """Store what a trial reached, or that it was ended early or could not be trained."""
        from optuna.trial import TrialState

        self._study.tell(trial, value, state=None if state is None else TrialState[state])

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
            found.append(
                TrialRecord(
                    number=trial.number,
                    state=state,
                    value=value,
                    settings=self._settings(trial.params),
                    steps=trial.user_attrs.get("steps"),
                    seconds=trial.duration.total_seconds() if trial.duration else None,
                    reason=reason,
                )
            )
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
        """What a trial trained with.

        Raises:
            OptionError: Its settings contradict each other.
        """
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


class _Held:
    """A lock for Optuna's journal that is held already: a study folder is open in one process at a time."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass
