"""Evaluation within a run: the loss over the validation images, and the field's scores beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rsedge.metrics.captions import score_captions
from rsedge.metrics.retrieval import retrieval_scores
from rsedge.training.data.samples import PlainSamples, loaded
from rsedge.training.losses import in_batch_accuracy, similarity_mse
from rsedge.training.models.task import Batch, CaptionTask, ContrastiveTask, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from accelerate import Accelerator

    from rsedge.datasets.examples import Example
    from rsedge.training.recipe import Recipe


class Validation:
    """Evaluates a task on the same images each time, shared among the processes.

    Args:
        examples: The validation images.
        task: For its image size and collation.
        accelerator: The run's.
        recipe: For the batch that a contrastive loss compares, the number of captions, and the workers.
        chunk: Images of one forward pass.
        progress: Called with a text after each.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        task: Task,
        accelerator: Accelerator,
        recipe: Recipe,
        *,
        chunk: int,
        progress: Callable[[str], None],
    ) -> None:
        self._progress = progress
        self._examples = tuple(examples)
        self._accelerator, self._chunk, self._batch_size = accelerator, chunk, recipe.loop.batch_size
        # A subset spread evenly over the set, which may be ordered by class.
        count = min(recipe.loop.captions, len(self._examples))
        self._captioned = tuple(self._examples[i * len(self._examples) // count] for i in range(count))
        self._image, self._collate, self._workers = task.image, task.collate, recipe.data.workers

    def run(self, model: nn.Module, task: Task) -> dict[str, float]:
        """``val_loss`` and the rest; ``model`` is ``task`` as accelerate wrapped it, or ``task`` itself."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                if isinstance(task, ContrastiveTask):
                    return self._contrastive(model, task)
                assert isinstance(task, CaptionTask)
                return self._caption(model, task)
        finally:
            model.train(was_training)

    def _caption(self, model: nn.Module, task: CaptionTask) -> dict[str, float]:
        sums = [
            (model(batch)["loss_sum"].item(), task.tokens(batch)) if mine else (0.0, 0)
            for mine, batch in self._batches("validation", self._examples)
        ]
        losses, tokens = np.array(gather_object(sums)).sum(axis=0)
        values = {"val_loss": float(losses / max(tokens, 1))}
        if self._captioned:
            texts = self.generate(task, self._captioned)
            references = [example.captions for example in self._captioned]
            scores = score_captions(texts, references, metrics=("bleu", "rouge_l", "cider_d"))
            values |= {f"val_{name}": score.value for name, score in scores.scores.items()}
            values["val_words"] = float(np.mean([len(text.split()) for text in texts]))
            values["val_distinct"] = len(set(texts)) / len(texts)
        return values

    def generate(self, task: CaptionTask, examples: Sequence[Example]) -> list[str]:
        """Greedy captions of ``examples``, in their order, on every process."""
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        found = [
            (number * processes + rank, text)
            for number, (mine, batch) in enumerate(self._batches("captions", examples))
            if mine
            for text in task.generate(batch["pixels"])
        ]
        rows = gather_object(found)
        return [text for _, text in sorted(rows, key=lambda row: row[0])]  # stable: the order within a chunk stays

    def _contrastive(self, model: nn.Module, task: ContrastiveTask) -> dict[str, float]:
        rows: list[tuple[int, dict[str, np.ndarray], list[int]]] = []
        scalars: dict[str, Tensor] = {}
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        for number, (mine, batch) in enumerate(self._batches("validation", self._examples)):
            outputs = model(batch)
            scalars = {name: value.float().cpu() for name, value in outputs.items() if name not in task.rows}
            if mine:
                kept = {name: value.float().cpu().numpy() for name, value in outputs.items() if name in task.rows}
                rows.append((number * processes + rank, kept, batch["captions"].tolist()))
        parts = sorted(gather_object(rows), key=lambda row: row[0])
        counts = np.concatenate([part[2] for part in parts])
        # Copied into torch's own memory: sums over memory aligned by chance differ in their last bits by chance.
        whole = {name: torch.tensor(np.concatenate([part[1][name] for part in parts])) for name in parts[0][1]}
        first = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)[:-1]]))
        totals: dict[str, float] = {}
        images = len(counts)
        for start in range(0, images, self._batch_size):
            stop = min(start + self._batch_size, images)
            # One caption per image, its first: a loss over rows that belong together would punish the right answer.
            block = {
                name: value[first[start:stop] if name in task.text_rows else slice(start, stop)]
                for name, value in whole.items()
            }
            found = {**task.loss({**block, **scalars}), "accuracy": in_batch_accuracy(block["image"], block["text"])}
            if "sbert" in block:
                found["sbs_mse"] = similarity_mse(block["image"], block["text"], block["sbert"])
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + float(value) * (stop - start) / images
        values = {f"val_{name}": value for name, value in totals.items()}
        owners = np.repeat(np.arange(images), counts)
        scores = retrieval_scores(whole["image"].numpy(), whole["text"].numpy(), owners)
        for name, direction in (("image_to_text", scores.image_to_text), ("text_to_image", scores.text_to_image)):
            values |= {f"val_{name}_r{k}": value for k, value in direction.recall.items()}
        return {**values, "val_mean_recall": scores.mean_recall}

    def _batches(self, stage: str, examples: Sequence[Example]) -> Iterator[tuple[bool, Batch]]:
        """The chunks of this process, on its device. Every process gets as many, since sharded weights are
        gathered by all in step; those beyond the end repeat the last and are not ``mine``.
        """
        processes, rank = self._accelerator.num_processes, self._accelerator.process_index
        chunks = [list(range(at, min(at + self._chunk, len(examples)))) for at in range(0, len(examples), self._chunk)]
        rounds = -(-len(chunks) // processes)
        numbers = [turn * processes + rank for turn in range(rounds)]
        loader: DataLoader[Any] = DataLoader(
            PlainSamples(examples, self._image),
            batch_sampler=[chunks[min(number, len(chunks) - 1)] for number in numbers],
            collate_fn=self._collate,
            num_workers=self._workers,
        )
        for number, batch in zip(numbers, loaded(loader), strict=True):
            yield number < len(chunks), {name: value.to(self._accelerator.device) for name, value in batch.items()}
            done = min((number + 1) * self._chunk, len(examples))
            self._progress(f"{stage}, {done} of {len(examples)} images")
