"""The folder of a run: recipe, metrics, checkpoints. At every moment it holds a whole checkpoint or none.

::

    RUN/
      recipe.toml             the whole recipe
      data.json               what the data was: counts, and a fingerprint that a resume must meet
      metrics.jsonl           one line per logged step and per evaluation
      loss.png, samples.png   drawn at every evaluation
      logs/                   of the trackers
      checkpoints/
        step-00000120/        Hugging Face layout, recipe.toml, and in the last one state/ for resuming
      best → checkpoints/…    links
      last → checkpoints/…
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rsedge.errors import OptionError, OutputError
from rsedge.tomlfile import read_toml
from rsedge.training.optim import Progress
from rsedge.training.recipe_files import differences, from_dict, save_recipe, to_dict

if TYPE_CHECKING:
    from pathlib import Path

    from rsedge.training.recipe import Recipe

STATE = "state"
_MADE = ("recipe.toml", "data.json", "checkpoints")  # what every run has
_LATER = ("metrics.jsonl", "loss.png", "samples.png", "logs", "best", "last")
_FREE_ON_RESUME = ("data.workers", "data.sources")  # sources may have moved; the fingerprint holds what they must be


class RunFolder:
    """A run on disk.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"

    # Start and resume

    def check_free(self, *, overwrite: bool) -> None:
        """See that a run can be made here, before the data is read.

        Raises:
            OutputError: Something is there already.
        """
        if self.path.exists() and any(self.path.iterdir() if self.path.is_dir() else [self.path]):
            if not self._is_run():
                raise OutputError(f"{self.path} exists and is no run: choose another folder with -o")
            if not overwrite:
                raise OutputError(
                    f"{self.path} holds a run already: go on with --resume, start it anew with --overwrite, or "
                    f"choose another "
                    "folder with -o"
                )

    def _is_run(self) -> bool:
        """Whether a run was begun here; a folder that only holds someone's recipe.toml is none."""
        return all((self.path / name).exists() for name in _MADE)

    def create(self, recipe: Recipe, data: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make the folder, in place of a run that is there (what else it holds stays), and write what the run is
        made of.

        Raises:
            OutputError: Something is there already, or it cannot be made.
        """
        self.check_free(overwrite=overwrite)
        try:
            if overwrite:
                for entry in (self.path / name for name in (*_LATER, *_MADE)):
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    else:
                        entry.unlink(missing_ok=True)
            self.checkpoints.mkdir(parents=True)
        except OSError as error:
            raise OutputError(
                f"cannot make the folder {self.path}: {error.strerror}; choose another with -o"
            ) from error
        _write(self.path / "data.json", json.dumps(data, indent=2) + "\n")
        save_recipe(self.path / "recipe.toml", recipe)

    @property
    def recipe_path(self) -> Path:
        """The recipe the run was started with.

        Raises:
            OptionError: There is no run here.
        """
        if not self._is_run():
            raise OptionError(f"there is no run in {self.path} to resume: start one without --resume")
        return self.path / "recipe.toml"

    def check(self, recipe: Recipe, data: Mapping[str, Any]) -> None:
        """See that a resumed run means the same as the one that began here.

        Raises:
            OptionError: The recipe or the data differ; names what.
        """
        was = to_dict(from_dict(read_toml(self.recipe_path)))
        differing = differences(was, to_dict(recipe), free=_FREE_ON_RESUME)
        stored = json.loads((self.path / "data.json").read_text(encoding="utf-8"))
        if stored["fingerprint"] != data["fingerprint"]:
            differing.append(
                f"the data was {stored['summary']['splits']}, now {data['summary']['splits']}, or its texts changed"
            )
        if differing:
            raise OptionError(
                "\n".join(
                    [
                        f"{self.path} cannot be resumed with another recipe or other data:",
                        *(f"  - {text}" for text in differing),
                        "leave these out to go on, or start a new run with another -o (model.init = "
                        f"{self.path / 'last'} starts from its weights)",
                    ]
                )
            )

    # Metrics

    def append(self, values: Mapping[str, Any]) -> None:
        """Add a line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def rewind(self, step: int) -> None:
        """Forget the metrics of steps after ``step``, which will be done again, and lines cut off by a kill."""
        if self.metrics.exists():
            kept = [line for line in read_metrics(self.metrics) if line["step"] <= step]
            _write(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    # Checkpoints

    def draft_path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is put together."""
        return self.checkpoints / f".step-{step:08d}.tmp"

    def draft(self, step: int) -> Path:
        """An empty folder for the checkpoint of ``step``; whatever an interrupted run left there is removed."""
        draft = self.draft_path(step)
        shutil.rmtree(draft, ignore_errors=True)
        (draft / STATE).mkdir(parents=True)
        return draft

    def publish(self, draft: Path, progress: Progress, recipe: Recipe, *, best: bool) -> Path:
        """Make a draft the last checkpoint, and the best if it is; what is neither goes."""
        save_recipe(draft / "recipe.toml", recipe)
        _write(draft / STATE / "progress.json", json.dumps(asdict(progress)) + "\n")
        _sync(draft)
        final = self.checkpoints / draft.name.removeprefix(".").removesuffix(".tmp")
        shutil.rmtree(final, ignore_errors=True)  # of a run that was killed between rename and link
        draft.rename(final)
        if best:
            self._link("best", final)
        self._link("last", final)
        kept = {link.resolve() for name in ("best", "last") if (link := self.path / name).exists()}
        for folder in self.checkpoints.iterdir():
            if folder.resolve() not in kept:
                shutil.rmtree(folder)
            elif folder.resolve() != final.resolve():
                shutil.rmtree(folder / STATE, ignore_errors=True)
        return final

    def last(self) -> tuple[Path, Progress] | None:
        """The checkpoint to go on from, None where the run was stopped before its first."""
        folder = self.path / "last"
        if not (folder / STATE / "progress.json").is_file():
            return None
        return folder.resolve(), Progress(**json.loads((folder / STATE / "progress.json").read_text(encoding="utf-8")))

    def _link(self, name: str, target: Path) -> None:
        draft = self.path / f".{name}.tmp"
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        draft.symlink_to(target.relative_to(self.path), target_is_directory=True)
        draft.replace(self.path / name)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, without one that a kill cut off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk, so that the rename cannot outrun them in a power failure."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
