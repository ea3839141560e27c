"""The training loop: the only one, for all families, on whatever accelerate is configured for.

Every random choice is a function of the seed and of its place in the run (:mod:`rsedge.training.data.samples`), never
of earlier choices; so a run that goes on from a checkpoint takes the same steps as one that was never stopped, and the
number of processes, passes and workers changes nothing but rounding. Dropout is seeded by (seed, step, chunk): a chunk
drops the same units in both passes, on any process, and after a resume.

Gradients do not depend on how a step is cut into chunks. A captioner's loss is a mean over the caption tokens of the
whole step, whichever process and pass they are in. A contrastive loss compares every image of the step with every text
of it: chunks are embedded first, the loss is taken over the embeddings of all processes, and its gradient with respect
to them is carried through each chunk in a second pass (cached gradients, Gao et al. 2021, "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup").
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, LoggerType, ProjectConfiguration
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils.logging import disable_progress_bar

from rsedge.errors import BackendError, OptionError, RsedgeError
from rsedge.texts import first_line, in_a_line
from rsedge.training.data.samples import Order, TrainingSamples, derive, loaded
from rsedge.training.losses import ExponentialAverage
from rsedge.training.models.task import Batch, CaptionTask, ContrastiveTask, Task
from rsedge.training.optim import Progress, factor_at, freeze, make_optimizer
from rsedge.training.run_folder import STATE, RunFolder, draw_losses, draw_samples, read_metrics
from rsedge.training.validation import Validation

if TYPE_CHECKING:
    from rsedge.datasets.examples import Example
    from rsedge.training.recipe import Recipe

_log = logging.getLogger(__name__)
_AVERAGE = "average.pt"  # in the state of a checkpoint
_SAMPLES = 12  # validation images in the sample grid


@dataclass(frozen=True, slots=True)
class Event:
    """A report to the observer, on the main process."""

    step: int
    steps: int
    """Optimiser steps done and in all."""
    epoch: float
    """Epochs done, with a fraction."""
    values: Mapping[str, float] = field(default_factory=dict)
    """After a step ``loss``, ``learning_rate`` …; after an evaluation ``val_loss`` and the other monitors."""
    evaluated: bool = False
    """Whether these are an evaluation's."""
    stage: str = ""
    """Within an evaluation, without values: what it is at, such as ``validation, 16 of 40 images``."""


Observer = Callable[[Event], None]


class Trainer:
    """One run.

    Args:
        recipe: Of the run.
        task: The model of the recipe's family, on the CPU.
        training, validation: The examples.
        accelerator: Made by :func:`make_accelerator`, which sets its accumulation steps.
        folder: Of the run; None keeps nothing, for a learning-rate test.
        observe: Called after logged steps and evaluations.

    Raises:
        OptionError: Settings that do not fit the model, the data or the number of processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        training: Sequence[Example],
        validation: Sequence[Example],
        accelerator: Accelerator,
        *,
        folder: RunFolder | None = None,
        observe: Observer | None = None,
    ) -> None:
        loop = recipe.loop
        if not validation:
            raise OptionError(
                "there are no validation images: --val-fraction 0.1 takes some of the training images, or add a set "
                "with a split val"
            )
        self._recipe, self._accelerator, self._folder, self._observe = recipe, accelerator, folder, observe
        self._training, self._validation = tuple(training), tuple(validation)
        self.order = make_order(recipe, len(training), accelerator)
        steps = loop.epochs * self.order.steps_per_epoch
        self.steps = min(steps, loop.max_steps) if loop.max_steps else steps
        self._evaluate_every = loop.evaluate_every or self.order.steps_per_epoch
        self._checkpoint_every = loop.checkpoint_every or self._evaluate_every
        self.progress = Progress()

        freeze(task, recipe.model.freeze, task.parts)
        if recipe.model.gradient_checkpointing:
            # transformers 5 renames it, and warns of the old name.
            enable = getattr(task.model, "activation_checkpointing_enable", task.model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self._sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if self._sharded and loop.ema_decay is not None:
            raise OptionError("loop.ema_decay needs whole weights on each device: leave it out with FSDP and DeepSpeed")
        if self._sharded and loop.captions:
            raise OptionError("loop.captions needs whole weights on each device: set it to 0 with FSDP and DeepSpeed")
        optimizer = make_optimizer(task, recipe.optimizer, task.parts)
        self.model, self.optimizer = accelerator.prepare(task, optimizer)
        self.task: Task = accelerator.unwrap_model(self.model)
        self._average = ExponentialAverage(self.task, decay=loop.ema_decay) if loop.ema_decay else None
        self._objective = objective_for(self.task, accelerator, self.order)
        micro = self.order.micro_batch_size
        self._watch = Validation(validation, task, accelerator, recipe, chunk=micro, progress=self._tell)

    def resume(self) -> bool:
        """Load the last checkpoint of the run folder without executing anything in it; False where there is none.

        Raises:
            OptionError: Its state cannot be read.
        """
        found = self._folder.last() if self._folder else None
        if found is None:
            return False
        checkpoint, self.progress = found
        state = checkpoint / STATE
        try:
            self._accelerator.load_state(str(state))
            # Not registered with accelerate, which would unpickle the file whatever is in it.
            if self._average is not None:
                self._average.load_state_dict(torch.load(state / _AVERAGE, map_location="cpu", weights_only=True))
        except Exception as error:  # each library has its own for a file cut short
            raise OptionError(
                f"cannot resume from {state}: it is damaged, of another version or no mere numbers "
                f"({first_line(error)}): start a new run with model.init = {checkpoint}"
            ) from error
        return True

    def run(self) -> Progress:
        """Train to the end, evaluating and saving on the way. Raises RsedgeError: the loss is no longer a number."""
        if self.progress.finished or self.progress.step >= self.steps:
            return self.progress
        if self._accelerator.is_main_process:
            self._announce()
        self.model.train()
        began, images = time.monotonic(), 0
        for chunks in self.batches(self.progress.step):
            values = self.step(chunks)
            images += self._recipe.loop.batch_size
            step, last = self.progress.step, self.progress.step == self.steps
            if step % self._recipe.loop.log_every == 0 or last:
                values["samples_per_second"] = images / (time.monotonic() - began)
                if self._accelerator.device.type == "cuda":
                    values["gpu_memory_mb"] = torch.cuda.max_memory_allocated(self._accelerator.device) / 1e6
                self._log(values)
                began, images = time.monotonic(), 0
            evaluate = step % self._evaluate_every == 0 or last
            best = evaluate and self._evaluate()
            stop = last or self.progress.finished
            if stop or best or step % self._checkpoint_every == 0:
                self._save(best=best)
            if evaluate:
                began, images = time.monotonic(), 0
            if stop:
                break
        return self.progress

    def _announce(self) -> None:
        images = f"{len(self._training)} training and {len(self._validation)} validation images"
        batch, warmup = self._recipe.loop.batch_size, self._recipe.schedule.warmup_steps
        _log.info(f"{images}, {self.steps} steps of {batch} images on {self._accelerator.device}")
        if warmup >= self.steps:
            _log.warning(
                f"schedule.warmup_steps is {warmup}, but the run has {self.steps} steps: the learning rate never "
                f"reaches {self._recipe.optimizer.learning_rate:g}; lower it, or raise loop.epochs"
            )

    def step(self, chunks: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step on this process's chunks of it."""
        factor = self.progress.plateau * factor_at(self.progress.step, self.steps, self._recipe.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return self.step_at_rates(chunks)

    def step_at_rates(self, chunks: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step at the learning rates that the optimiser's groups have now."""
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad()
        values = self._objective.backward(self.model, chunks, self.progress.step)
        if not math.isfinite(values["loss"]):
            step, whole = self.progress.step, replace(self.order, processes=1, process=0)
            keys = [self._training[index].key for chunk in whole.batches(step, step + 1) for _, index in chunk]
            raise RsedgeError(
                f"the loss is {values['loss']} at step {step + 1}, on the images {in_a_line(keys, 8)}: lower "
                "optimizer.learning_rate, set optimizer.clip_norm, or use loop.mixed_precision bf16 or no; --resume "
                "goes on from the last checkpoint"
            )
        if (most := self._recipe.optimizer.clip_norm) is not None:
            norm = self._accelerator.clip_grad_norm_(self.model.parameters(), most)
            if norm is not None:
                values["gradient_norm"] = float(norm)
        self.optimizer.step()
        self.progress.step += 1
        self.task.after_step()
        if self._average is not None:
            self._average.update(self.task)
        return {**values, "learning_rate": rate}

    def batches(self, start: int = 0) -> Iterator[list[Batch]]:
        """The chunks of each step from ``start`` on, on this process's device."""
        order, device = self.order, self._accelerator.device
        samples = TrainingSamples(self._training, self.task.image, self._recipe, one_caption=self.task.one_caption)
        loader: DataLoader[Any] = DataLoader(
            samples,
            batch_sampler=order.batches(start, self.steps),
            collate_fn=self.task.collate,
            num_workers=self._recipe.data.workers,
            pin_memory=device.type == "cuda",
        )
        chunks: list[Batch] = []
        for batch in loaded(loader):
            chunks.append({name: value.to(device, non_blocking=True) for name, value in batch.items()})
            if len(chunks) == order.chunks:
                yield chunks
                chunks = []

    def _evaluate(self) -> bool:
        """Evaluate and draw the pictures of the run folder; True if the model is the best so far."""
        recipe, loop = self._recipe, self._recipe.loop
        task, model = (self.task, self.model) if self._average is None else (self._average.module,) * 2
        assert isinstance(task, Task)
        values = self._watch.run(model, task)
        best = self.progress.record(
            values[loop.monitor],
            better_is_less=loop.monitor_mode == "min",
            schedule=recipe.schedule,
            patience=loop.early_stopping,
        )
        self._log(values, evaluated=True)
        if self._folder is None:
            return best
        shown = self._validation[:: max(1, len(self._validation) // _SAMPLES)][:_SAMPLES]
        texts = None
        if isinstance(task, CaptionTask) and not self._sharded:
            was_training = task.training
            task.eval()
            texts = self._watch.generate(task, shown)
            task.train(was_training)
        if self._accelerator.is_main_process:
            draw_losses(read_metrics(self._folder.metrics), self._folder.path / "loss.png")
            if texts is not None:
                title = f"validation images after {self.progress.step} steps"
                draw_samples(shown, texts, self._folder.path / "samples.png", title=title)
        return best

    def _save(self, *, best: bool) -> None:
        if self._folder is None:
            return
        accelerator = self._accelerator
        accelerator.wait_for_everyone()
        draft = self._folder.draft(self.progress.step) if accelerator.is_main_process else None
        accelerator.wait_for_everyone()
        draft = draft or self._folder.draft_path(self.progress.step)
        try:
            accelerator.save_state(str(draft / STATE))
            if self._average is None:
                state: Mapping[str, Tensor] = accelerator.get_state_dict(self.model)
            else:
                state = self._average.module.state_dict()
                if accelerator.is_main_process:
                    torch.save(self._average.state_dict(), draft / STATE / _AVERAGE)
            if accelerator.is_main_process:
                self.task.save(draft, state)
                self._folder.publish(draft, self.progress, self._recipe, best=best)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, SafetensorError) as error:  # torch and safetensors hide that the disk is full
            raise OSError(f"cannot save {draft}: {first_line(error)}") from error
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(draft, ignore_errors=True)  # room for those that come after
        accelerator.wait_for_everyone()

    def _tell(self, stage: str) -> None:
        if self._accelerator.is_main_process and self._observe is not None:
            epoch = self.progress.step / self.order.steps_per_epoch
            self._observe(Event(self.progress.step, self.steps, epoch, stage=stage))

    def _log(self, values: Mapping[str, float], *, evaluated: bool = False) -> None:
        epoch = self.progress.step / self.order.steps_per_epoch
        self._accelerator.log(dict(values), step=self.progress.step)
        main = self._accelerator.is_main_process
        if main and self._folder is not None:
            self._folder.append({"step": self.progress.step, "epoch": round(epoch, 4), **values})
        if main and self._observe is not None:
            self._observe(Event(self.progress.step, self.steps, epoch, dict(values), evaluated))


class Objective(ABC):
    """Computes the gradients of a step."""

    def __init__(self, task: Task, accelerator: Accelerator, order: Order) -> None:
        self._task, self._accelerator, self._order = task, accelerator, order

    @abstractmethod
    def backward(self, model: nn.Module, chunks: Sequence[Batch], step: int) -> dict[str, float]:
        """Add the gradients of ``chunks`` and return the losses of the whole step."""

    def _seed(self, step: int, chunk: int) -> None:
        torch.manual_seed(derive("dropout", self._order.seed, step, self._order.chunk_number(chunk)))

    def _backward(self, loss: Tensor) -> None:
        # accelerate divides by the number of accumulation passes; our losses are shares of the step already.
        self._accelerator.backward(loss * self._accelerator.gradient_accumulation_steps)


class SummedObjective(Objective):
    """Cross entropy per caption token of the whole step."""

    _task: CaptionTask

    def backward(self, model: nn.Module, chunks: Sequence[Batch], step: int) -> dict[str, float]:
        """As :class:`Objective`; one pass per chunk."""
        accelerator = self._accelerator
        tokens = torch.tensor(float(sum(self._task.tokens(chunk) for chunk in chunks)), device=accelerator.device)
        tokens = accelerator.reduce(tokens, reduction="sum")
        total = torch.zeros((), device=accelerator.device)
        for number, chunk in enumerate(chunks):
            with accelerator.accumulate(model):
                self._seed(step, number)
                loss = model(chunk)["loss_sum"] / tokens
                # Processes average their gradients; the share of each is to be added.
                self._backward(loss * accelerator.num_processes)
                total += loss.detach()
        return {"loss": accelerator.reduce(total, reduction="sum").item()}


class CachedContrastiveObjective(Objective):
    """A loss over the embeddings of the whole step, in memory for one chunk."""

    _task: ContrastiveTask

    def backward(self, model: nn.Module, chunks: Sequence[Batch], step: int) -> dict[str, float]:
        """As :class:`Objective`; two passes per chunk, or one where the process has a single chunk."""
        accelerator = self._accelerator
        if len(chunks) == 1:
            with accelerator.accumulate(model):
                outputs = self._embed(model, chunks[0], step, 0)
                losses, gradients = self._losses([outputs])
                self._carry(outputs, gradients, 0, 1)
            return losses
        with torch.no_grad():
            embedded = [self._embed(model, chunk, step, number) for number, chunk in enumerate(chunks)]
        losses, gradients = self._losses(embedded)
        for number, chunk in enumerate(chunks):
            with accelerator.accumulate(model):
                self._carry(self._embed(model, chunk, step, number), gradients, number, len(chunks))
        return losses

    def _embed(self, model: nn.Module, chunk: Batch, step: int, number: int) -> dict[str, Tensor]:
        self._seed(step, number)
        outputs: dict[str, Tensor] = model(chunk)
        return outputs

    def _losses(self, embedded: Sequence[dict[str, Tensor]]) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The losses of the step, and the gradient for this process's embeddings and for the learnt scalars."""
        accelerator, rows = self._accelerator, self._task.rows
        leaves: dict[str, Tensor] = {}
        for name, value in embedded[0].items():
            if name in rows:
                mine = torch.cat([outputs[name].detach().float() for outputs in embedded])
                # Processes work on neighbouring chunks, so in the order of processes this is the order of the step.
                leaves[name] = accelerator.gather(mine)
            else:
                leaves[name] = value.detach().float().clone()
            leaves[name].requires_grad_()
        losses = self._task.loss(leaves)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        gradients = {}
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                size = len(leaf) // accelerator.num_processes if name in rows else 0
                first = accelerator.process_index * size
                gradients[name] = leaf.grad[first : first + size] if name in rows else leaf.grad
        return {name: value.item() for name, value in losses.items()}, gradients

    def _carry(self, outputs: dict[str, Tensor], gradients: dict[str, Tensor], number: int, chunks: int) -> None:
        """Continue the gradient of the embeddings, and of the scalars, into the weights."""
        parts = []
        for name, value in outputs.items():
            if name not in gradients or not value.requires_grad:
                continue
            gradient = gradients[name]
            if name in self._task.rows:
                size = len(gradient) // chunks
                # Processes average their gradients; those of different images are to be added …
                mine = gradient[number * size : (number + 1) * size]
                parts.append((value * mine).sum() * self._accelerator.num_processes)
            else:
                # … while every process knows a scalar's whole gradient, and carries a share of it with each chunk.
                parts.append((value * gradient).sum() / chunks)
        if not parts:
            raise RuntimeError("the loss depends on nothing that is trained")
        self._backward(sum(parts[1:], parts[0]))


def objective_for(task: Task, accelerator: Accelerator, order: Order) -> Objective:
    """The objective of a task."""
    kind = SummedObjective if isinstance(task, CaptionTask) else CachedContrastiveObjective
    return kind(task, accelerator, order)


def make_order(recipe: Recipe, examples: int, state: Accelerator | PartialState) -> Order:
    """The order of a run for this process. Raises OptionError: a step cannot be filled, or not be shared evenly."""
    micro = recipe.loop.micro_batch_size or max(1, recipe.loop.batch_size // state.num_processes)
    return Order(examples, recipe.loop.batch_size, micro, recipe.seed, state.num_processes, state.process_index)


@contextmanager
def accelerating(
    recipe: Recipe, *, cpu: bool = False, trackers: Sequence[str] = (), folder: RunFolder | None = None
) -> Iterator[Accelerator]:
    """:func:`make_accelerator` for a block. Its state ends with the block, for the next run in this process may want
    another precision. The group of processes stays: one made anew finds the old addresses and may wait for ever.
    """
    try:
        accelerator = make_accelerator(recipe, cpu=cpu, trackers=trackers, folder=folder)
        if accelerator.num_processes > 1:
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        yield accelerator
        for tracker in accelerator.trackers:
            tracker.finish()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def make_accelerator(
    recipe: Recipe, *, cpu: bool = False, trackers: Sequence[str] = (), folder: RunFolder | None = None
) -> Accelerator:
    """Accelerate for a recipe; the rest (processes, FSDP, DeepSpeed) comes from its own configuration.

    Args:
        recipe: For precision and accumulation.
        cpu: Leave GPUs alone.
        trackers: Accelerate's names: ``tensorboard``, ``wandb`` …; their logs go into ``folder``.

    Raises:
        BackendError: A tracker is not installed, or this machine does not have the precision.
        OptionError: There is no such tracker, or the batch cannot be shared evenly.
    """
    # Accelerate leaves out, with a word at most, a tracker that is not installed.
    known = [str(name.value) for name in LoggerType]
    if unknown := [name for name in trackers if name not in known]:
        raise OptionError(f"there is no tracker {', '.join(unknown)}: give some of {', '.join(known)}, or none")
    installed = ["all", *(str(name.value) for name in get_available_trackers())]
    if absent := [name for name in trackers if name not in installed]:
        raise BackendError(f"trackers {', '.join(absent)} are not installed: pip install {' '.join(absent)}")
    # What they would say of every checkpoint (tied weights, where each file went) is no news to anyone.
    for name in ("accelerate.accelerator", "accelerate.checkpointing", "accelerate.utils.other"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()
    logs = str(folder.path / "logs") if folder else None
    # Several processes on a machine without a GPU, as a notebook's launcher starts them, would not know of each other
    # unless accelerate is told to use the CPU.
    cpu = cpu or (int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available())
    # How many passes a step takes is known once the processes are.
    order = make_order(recipe, recipe.loop.batch_size, PartialState(cpu=cpu))
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=recipe.loop.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=order.chunks, sync_with_dataloader=False),
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(project_dir=logs, logging_dir=logs),
        )
    except (ImportError, ValueError) as error:
        raise BackendError(
            f"accelerate cannot start with loop.mixed_precision {recipe.loop.mixed_precision}: {error}"
        ) from error
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # DeepSpeed reads them from a data loader that it prepares; ours are not its own.
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = order.micro_batch_size
    return accelerator
