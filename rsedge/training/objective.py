"""From the chunks of a step to gradients that do not depend on how the step was cut.

A captioner's loss is a mean over the caption tokens of the whole step, whichever process and pass they are in. A
contrastive loss compares every image of the step with every text of it: chunks are embedded first, the loss is taken
over the embeddings of all processes, and its gradient with respect to them is carried through each chunk in a second
pass (cached gradients, Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup").

Dropout is seeded by (seed, step, chunk): a chunk drops the same units in both passes, on any process, and after a
resume.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rsedge.training.data.samples import Order, derive
from rsedge.training.models.task import Batch, CaptionTask, ContrastiveTask, Task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate import Accelerator


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


def objective_for(task: Task, accelerator: Accelerator, order: Order) -> Objective:
    """The objective of a task."""
    if isinstance(task, CaptionTask):
        return SummedObjective(task, accelerator, order)
    if isinstance(task, ContrastiveTask):
        return CachedContrastiveObjective(task, accelerator, order)
    raise TypeError(f"{type(task).__name__} is neither a captioner nor a dual encoder")


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
        accelerator, single = self._accelerator, len(chunks) == 1
        if single:
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
        surrogate = None
        for name, value in outputs.items():
            if name not in gradients or not value.requires_grad:
                continue
            gradient = gradients[name]
            if name in self._task.rows:
                size = len(gradient) // chunks
                # Processes average their gradients; those of different images are to be added …
                part = (value * gradient[number * size : (number + 1) * size]).sum() * self._accelerator.num_processes
            else:
                # … while every process knows a scalar's whole gradient, and carries a share of it with each chunk.
                part = (value * gradient).sum() / chunks
            surrogate = part if surrogate is None else surrogate + part
        if surrogate is None:
            raise RuntimeError("the loss depends on nothing that is trained")
        self._backward(surrogate)
