"""The folder of a study.

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
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rsedge.errors import OptionError, OutputError
from rsedge.tomlfile import read_toml, write_toml
from rsedge.training.recipe_files import differences, save_recipe
from rsedge.training.run_folder import RunFolder

if TYPE_CHECKING:
    from rsedge.training.optim import Progress
    from rsedge.training.recipe import Recipe
    from rsedge.training.tuning.trials import TrialRecord

Keep = Literal["best", "all", "none"]
_FREE_ON_RESUME = ("recipe.data.workers", "recipe.data.sources")  # the fingerprint holds what the data must be


class StudyFolder:
    """A study on disk.

    Args:
        path: The folder.
        keep: Whose checkpoints stay.
    """

    def __init__(self, path: Path, *, keep: Keep) -> None:
        self.path, self._keep = path, keep
        self._plan, self._journal = path / "study.toml", path / "journal.log"

    # Start and resume

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """See whether the folder can be opened so, before the data is read.

        Raises:
            OptionError: There is nothing to resume.
            OutputError: Something is there already.
        """
        if resume and not self._plan.is_file():
            raise OptionError(f"there is no study in {self.path} to resume: start one without --resume")
        if resume or not self.path.exists():
            return
        if not self.path.is_dir() or (any(self.path.iterdir()) and not self._plan.is_file()):
            raise OutputError(f"{self.path} exists and is no study: choose another folder with -o")
        if self._plan.is_file() and not overwrite:
            raise OutputError(
                f"{self.path} holds a study already: go on with --resume, start it anew with --overwrite, or choose "
                "another folder with -o"
            )

    @contextmanager
    def open(self, plan: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Iterator[Path]:
        """Take the folder for this process alone; gives the journal.

        Raises:
            OptionError: The study to resume is another; says how.
            OutputError: The folder cannot be made, or another process has it.
        """
        self.check(resume=resume, overwrite=overwrite)
        try:
            (self.path / "trials").mkdir(parents=True, exist_ok=True)
            handle = self._journal.open("a+b")
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
                    elif entry != self._journal and entry.name in _FILES:
                        entry.unlink()
                write_toml(draft := self.path / ".study.tmp", plan)
                draft.replace(self._plan)
            yield self._journal

    # Trials

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
        save_recipe(draft := self.path / ".best.tmp", recipe)
        draft.replace(self.path / "best.toml")

    def update(self, records: Sequence[TrialRecord], best: TrialRecord | None) -> None:
        """Write the table, and remove the checkpoints that are not kept."""
        keys = list(dict.fromkeys(key for record in records for key in record.settings))
        draft = self.path / ".trials.tmp"
        with draft.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["number", "state", "value", *keys, "steps", "seconds", "reason"])
            for record in records:
                seconds = None if record.seconds is None else round(record.seconds, 3)
                values = [record.settings.get(key) for key in keys]
                table.writerow(
                    [record.number, record.state, record.value, *values, record.steps, seconds, record.reason]
                )
        draft.replace(self.path / "trials.csv")
        for record in records:
            kept = self._keep == "all" or (self._keep == "best" and record is best)
            if not kept and record.state != "running":
                for link in ("best", "last"):
                    (self.run(record.number) / link).unlink(missing_ok=True)
                shutil.rmtree(self.run(record.number) / "checkpoints", ignore_errors=True)


_FILES = ("study.toml", "trials.csv", "best.toml", "history.png", "slices.png", "importances.png")
