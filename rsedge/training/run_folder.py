"""The folder of a run: recipe, metrics, checkpoints, pictures. At every moment it holds a whole checkpoint or none.

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
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsedge.errors import OptionError, OutputError
from rsedge.files import open_itself, replacing, write_text
from rsedge.texts import plain
from rsedge.tomlfile import read_toml
from rsedge.training.optim import Progress
from rsedge.training.recipe import differences, from_dict, save_recipe, to_dict

if TYPE_CHECKING:
    from rsedge.datasets.examples import Example
    from rsedge.training.recipe import Recipe

STATE = "state"
_CHECKPOINT = re.compile(r"step-\d+|\.step-\d+\.tmp")
_MADE = ("recipe.toml", "data.json", "checkpoints")  # what every run has
_LATER = ("metrics.jsonl", "loss.png", "samples.png", "logs", "best", "last")
_FREE_ON_RESUME = ("data.workers", "data.sources")  # sources may have moved; the fingerprint holds what they must be


class RunFolder:
    """A run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"

    def check_free(self, *, overwrite: bool) -> None:
        """Check that a run can be made here. Raises OutputError: something is there already."""
        check_free(self.path, "run", is_one=self._is_run(), overwrite=overwrite)

    def _is_run(self) -> bool:
        """Whether a run was begun here; a folder that only holds someone's recipe.toml is none."""
        return all(path.exists() and not path.is_symlink() for path in (self.path / name for name in _MADE))

    def create(self, recipe: Recipe, data: Mapping[str, Any], *, overwrite: bool) -> None:
        """Write a new run; other files stay. Raises OutputError: the folder is taken, or cannot be made."""
        self.check_free(overwrite=overwrite)
        try:
            if overwrite:
                self._remove()
            self.checkpoints.mkdir(parents=True)
            write_text(self.path / "data.json", json.dumps(data, indent=2) + "\n")
            save_recipe(self.path / "recipe.toml", recipe)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._remove()  # half a run could be neither resumed nor replaced
            raise OutputError(f"cannot make a run in {self.path}: {error.strerror}; choose another with -o") from error

    def _remove(self) -> None:
        for entry in (self.path / name for name in (*_LATER, *_MADE)):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)

    @property
    def recipe_path(self) -> Path:
        """The recipe the run was started with. Raises OptionError: there is no run here."""
        if not self._is_run():
            raise OptionError(f"there is no run in {self.path} to resume: start one without --resume")
        return self.path / "recipe.toml"

    def check(self, recipe: Recipe, data: Mapping[str, Any]) -> None:
        """Check that a resumed run is the one that began here. Raises OptionError: names the differences."""
        was = to_dict(from_dict(read_toml(self.recipe_path)))
        differing = differences(was, to_dict(recipe), free=_FREE_ON_RESUME)
        try:
            stored = json.loads((self.path / "data.json").read_text(encoding="utf-8"))
            known, splits = stored["fingerprint"], stored["summary"]["splits"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise OptionError(f"{self.path / 'data.json'} is damaged: start a new run with another -o") from error
        if known != data["fingerprint"]:
            differing.append(f"the data was {splits}, now {data['summary']['splits']}, or its texts changed")
        if differing:
            shown = "\n".join(f"  - {text}" for text in differing)
            raise OptionError(
                f"{self.path} cannot be resumed with another recipe or other data:\n{shown}\nleave these out to go on, "
                f"or start a new run with another -o (model.init = {self.path / 'last'} starts from its weights)"
            )

    def append(self, values: Mapping[str, Any]) -> None:
        """Add a line to the metrics."""
        with open(self.metrics, "a", encoding="utf-8", opener=open_itself) as file:
            file.write(json.dumps(values) + "\n")

    def rewind(self, step: int) -> None:
        """Remove the metrics of steps after ``step``, which will be repeated, and lines cut off by a kill."""
        if self.metrics.exists():
            kept = [line for line in read_metrics(self.metrics) if line["step"] <= step]
            write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def draft_path(self, step: int) -> Path:
        """Folder in which the checkpoint of ``step`` is put together."""
        return self.checkpoints / f".step-{step:08d}.tmp"

    def draft(self, step: int) -> Path:
        """An empty folder for the checkpoint of ``step``; whatever an interrupted run left there is removed."""
        draft = self.draft_path(step)
        if draft.is_symlink():
            draft.unlink()
        shutil.rmtree(draft, ignore_errors=True)
        (draft / STATE).mkdir(parents=True)
        return draft

    def publish(self, draft: Path, progress: Progress, recipe: Recipe, *, best: bool) -> Path:
        """Make a draft the last checkpoint, and the best if it is; what is neither goes."""
        save_recipe(draft / "recipe.toml", recipe)
        write_text(draft / STATE / "progress.json", json.dumps(asdict(progress)) + "\n")
        _sync(draft)
        final = self.checkpoints / draft.name.removeprefix(".").removesuffix(".tmp")
        shutil.rmtree(final, ignore_errors=True)  # of a run that was killed between rename and link
        draft.rename(final)
        for name in ("best", "last") if best else ("last",):
            self._link(name, final)
        kept = {link.resolve() for name in ("best", "last") if (link := self.path / name).exists()}
        for folder in self.checkpoints.iterdir():
            if folder.is_symlink() or not _CHECKPOINT.fullmatch(folder.name):
                continue  # a run's own are folders
            if folder.resolve() not in kept:
                shutil.rmtree(folder)
            elif folder.resolve() != final.resolve():
                shutil.rmtree(folder / STATE, ignore_errors=True)
        return final

    def last(self) -> tuple[Path, Progress] | None:
        """The checkpoint to go on from, None where the run was stopped before its first. Raises OptionError: it is
        damaged, or lies outside of the run.
        """
        last = (self.path / "last").resolve()
        state = last / STATE / "progress.json"
        if not last.is_relative_to(self.path.resolve()):
            raise OptionError(f"{self.path / 'last'} leads out of the run, to {last}: start a new run with another -o")
        if not state.is_file():
            return None
        try:
            return last, Progress(**json.loads(state.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise OptionError(
                f"{state} is damaged: start a new run with another -o (model.init = {self.path / 'last'} starts from "
                "its weights)"
            ) from error

    def _link(self, name: str, target: Path) -> None:
        with replacing(self.path / name) as link:
            link.unlink(missing_ok=True)
            link.symlink_to(target.relative_to(self.path), target_is_directory=True)


def check_free(path: Path, kind: str, *, is_one: bool, overwrite: bool) -> None:
    """Check that a run or study can be made at ``path``. Raises OutputError: it cannot, or something is there."""
    check_place(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not is_one:
        raise OutputError(f"{path} exists and is no {kind}: choose another folder with -o")
    if not overwrite:
        raise OutputError(
            f"{path} holds a {kind} already: go on with --resume, start it anew with --overwrite, or choose another "
            "folder with -o"
        )


def check_place(folder: Path) -> None:
    """Check that ``folder`` can be made, or written in. Raises OutputError."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{there} is {'not writable' if there.is_dir() else 'no folder'}: choose another with -o")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, without one that a kill cut off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk, so that the rename cannot outrun them in a power failure."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def draw_losses(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write losses and learning rate over the steps of ``metrics.jsonl`` as PNG; nothing without a loss."""
    trained, validated, rates = (
        [(line["step"], line[name]) for line in lines if name in line] for name in ("loss", "val_loss", "learning_rate")
    )
    if not trained and not validated:
        return
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    if trained:
        marker = "o" if len(trained) < 50 else None  # a line of a few points, or of one, is hardly seen
        axes.plot(*zip(*trained, strict=True), "tab:blue", marker=marker, ms=3, alpha=0.6, lw=1, label="training")
    if validated:
        axes.plot(*zip(*validated, strict=True), color="tab:orange", marker="o", markersize=3, label="validation")
    axes.set(xlabel="optimiser step", ylabel="loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if rates:
        side = axes.twinx()
        side.plot(*zip(*rates, strict=True), color="tab:gray", linestyle=":", linewidth=1, label="learning rate")
        side.set_ylabel("learning rate")
        side.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    save(figure, path)


def draw_samples(examples: Sequence[Example], texts: Sequence[str], path: Path, *, title: str) -> None:
    """Write a grid of a few dozen images, each with the model's text and its first reference, as PNG."""
    columns = min(4, len(examples))
    rows = -(-len(examples) // columns)
    figure = new_figure(3.2 * columns, 4.1 * rows)
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


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # not pyplot, which would set the caller's backend

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=110)
