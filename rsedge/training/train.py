"""``rsedge train`` as a function: data, model, loop."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsedge.errors import BackendError, OptionError, OutputError
from rsedge.texts import in_lines
from rsedge.training.loop import Observer, Trainer, accelerating
from rsedge.training.run_folder import RunFolder, read_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rsedge.datasets.examples import CaptionData
    from rsedge.training.models.task import Task
    from rsedge.training.optim import Progress
    from rsedge.training.recipe import Recipe

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The result of a run."""

    run: Path
    """Its folder."""
    best: Path
    """The best checkpoint's."""
    progress: Progress
    """Steps done, best value and step."""
    values: dict[str, Any]
    """The evaluation of the best checkpoint, as in ``metrics.jsonl``."""
    main: bool
    """Whether this is the first of the run's processes, which reports for all."""


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    data: CaptionData | None = None,
    resume: bool = False,
    overwrite: bool = False,
    cpu: bool = False,
    trackers: Sequence[str] = ("tensorboard",),
    observe: Observer | None = None,
) -> TrainingResult:
    """Train the model of a recipe; in a notebook, through ``accelerate.notebook_launcher(train, (recipe, folder))``.

    Args:
        recipe: The run; its ``data.sources`` are read unless ``data`` is given.
        output: Folder of the run.
        data: Examples made elsewhere.
        resume: Continue in ``output`` from its last checkpoint, or from the start if it has none yet.
        overwrite: Replace a run that is there.
        cpu: Leave GPUs alone.
        trackers: Where accelerate sends the metrics too: ``tensorboard``, ``wandb`` …
        observe: Called after logged steps and evaluations, on the main process.

    Raises:
        OptionError: Recipe, data or model do not fit together, or the run to resume is another.
        OutputError: ``output`` is taken, or its disk is full.
        BackendError: A library, the precision or memory is missing on this machine.
        RsedgeError: The loss is no longer a number.
    """
    from accelerate.utils import set_seed
    from torch.cuda import OutOfMemoryError

    folder = RunFolder(Path(output))
    with accelerating(recipe, cpu=cpu, trackers=trackers, folder=folder) as accelerator:
        main = accelerator.is_main_process
        if not resume:
            folder.check_free(overwrite=overwrite)
        if data is None:
            data = read_data(recipe, progress=_log.info if main else None)
        training, validation = data.split("train"), data.split("val")
        if not training:
            raise OptionError(f"there are no training images in {', '.join(data.sources) or 'the data'}")
        about = {"summary": data.summary(), "fingerprint": fingerprint(data)}
        if resume:
            folder.check(recipe, about)
        set_seed(recipe.seed)
        task = make_task(recipe, data)
        trainer = Trainer(recipe, task, training, validation, accelerator, folder=folder, observe=observe)
        try:
            if resume:
                found = trainer.resume()
                if main:
                    folder.rewind(trainer.progress.step if found else 0)
            elif main:  # not before all of the above has proved possible
                folder.create(recipe, about, overwrite=overwrite)
            accelerator.wait_for_everyone()
            if trackers:
                accelerator.init_trackers("rsedge")
            progress = trainer.run()
        except OutOfMemoryError as error:
            raise BackendError(
                f"the GPU's memory is full ({error}): set loop.micro_batch_size to less than "
                f"{trainer.order.micro_batch_size}, or model.gradient_checkpointing to true, in a new run"
            ) from error
        except OSError as error:
            raise OutputError(
                f"the run cannot go on in {folder.path} ({error}): make room, then --resume goes on from the last "
                "checkpoint"
            ) from error
    lines = read_metrics(folder.metrics) if folder.metrics.exists() else []
    best = next((line for line in lines if line["step"] == progress.best_step and "val_loss" in line), {})
    return TrainingResult(folder.path, folder.path / "best", progress, best, main)


def read_data(recipe: Recipe, *, progress: Callable[[str], None] | None = None) -> CaptionData:
    """The training and validation examples of a recipe. Raises OptionError: no source is named, or records are bad."""
    from rsedge.datasets.layouts import load_examples

    wanted = recipe.data
    if not wanted.sources:
        raise OptionError("no data is named: give --data, or data.sources in the recipe")
    data = load_examples(
        wanted.sources,
        seed=recipe.seed,
        fractions=(wanted.fractions[0], wanted.fractions[1], wanted.fractions[2]),
        val_fraction=wanted.val_fraction,
        limit=wanted.limit,
        skip_bad=wanted.skip_bad,
        paraphrases=Path(wanted.paraphrases) if wanted.paraphrases else None,
        splits=("train", "val"),
        progress=progress,
    )
    if data.bad and progress is not None:
        progress("\n".join([f"left out {len(data.bad)} records:", *in_lines(data.bad)]))
    return data


def make_task(recipe: Recipe, data: CaptionData) -> Task:
    """The model of a recipe with its loss; ``data`` gives a learnt vocabulary and the texts to embed beforehand."""
    if recipe.family == "blip":
        from rsedge.training.models import blip

        return blip.make(recipe, data)
    if recipe.family == "clip":
        from rsedge.training.models import clip

        return clip.make(recipe, data)
    from rsedge.training.models import clipcap

    return clipcap.make(recipe, data)


def fingerprint(data: CaptionData) -> str:
    """A hash of keys, splits and texts: what the order of a run and its batches depend on."""
    digest = blake2b(digest_size=16)
    for example in sorted(data.examples, key=lambda example: example.key):
        values = [example.key, example.split, example.captions, example.paraphrases]
        digest.update(json.dumps(values, ensure_ascii=False).encode())
    return digest.hexdigest()
