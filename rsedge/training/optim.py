"""Optimisers, their parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rsedge.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rsedge.training.recipe import OptimizerRecipe, ScheduleRecipe


def matching(names: Iterable[str], pattern: str, parts: Mapping[str, str]) -> set[str]:
    """The parameter names that match ``pattern``.

    Args:
        names: All parameter names.
        pattern: A part of the model (``vision``), or a shell pattern (``model.vision_model.*.layers.[0-5].*``).
        parts: Part → shell patterns of its parameters, separated by spaces.

    Raises:
        OptionError: Nothing matches.
    """
    patterns = parts.get(pattern, pattern).split()
    found = {name for name in names if any(fnmatch.fnmatchcase(name, entry) for entry in patterns)}
    if not found:
        raise OptionError(
            f"{pattern!r} matches no parameter of the model: give a part ({', '.join(parts)}) or a pattern such as "
            f"{next(iter(names), '*')}"
        )
    return found


def freeze(model: nn.Module, patterns: Iterable[str], parts: Mapping[str, str]) -> None:
    """Freeze the parameters that match ``patterns``. Raises OptionError: no match, or nothing is left to train."""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        for name in matching(parameters, pattern, parts):
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise OptionError(f"model.freeze {list(patterns)} leaves nothing to train")


def make_optimizer(model: nn.Module, recipe: OptimizerRecipe, parts: Mapping[str, str]) -> torch.optim.Optimizer:
    """The optimiser; groups have their highest rate as ``peak_lr``. Raises OptionError: rates of nothing trained."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    rates = dict.fromkeys(trained, recipe.learning_rate)
    for pattern, rate in reversed(recipe.learning_rates.items()):
        if not (names := matching(dict(model.named_parameters()), pattern, parts) & trained.keys()):
            raise OptionError(f"optimizer.learning_rates names {pattern}, which model.freeze keeps: remove one of them")
        rates.update(dict.fromkeys(names, rate))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rates[name], decay), []).append(parameter)
    settings = [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    if recipe.name == "adafactor":
        return torch.optim.Adafactor(settings, lr=recipe.learning_rate)
    return torch.optim.AdamW(
        settings, lr=recipe.learning_rate, betas=(recipe.betas[0], recipe.betas[1]), eps=recipe.eps
    )


def factor_at(step: int, steps: int, recipe: ScheduleRecipe) -> float:
    """The share of the highest learning rate at ``step`` of ``steps``, counted from 0; without the plateau's factor.

    The same numbers as transformers' schedules with warm-up and torch's LinearLR.
    """
    if step < recipe.warmup_steps:
        return recipe.start_factor + (1 - recipe.start_factor) * step / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    if recipe.name == "linear":
        return 1 - done
    if recipe.name == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * done)
    return 1.0


@dataclass(slots=True)
class Progress:
    """The progress of a run; resuming needs it, the weights and the optimiser's state. JSON-ready."""

    step: int = 0
    """Optimiser steps done."""
    best: float | None = None
    """Best monitored value so far; None before the first evaluation."""
    best_step: int = 0
    """Step of the best value."""
    evaluations_since_best: int = 0
    """Evaluations without improvement."""
    plateau: float = 1.0
    """Factor that the schedule ``plateau`` has put on the rate."""
    plateau_wait: int = 0
    """Evaluations without improvement since its last change."""
    finished: bool = False
    """Early stopping has ended the run."""

    def record(self, value: float, *, better_is_less: bool, schedule: ScheduleRecipe, patience: int | None) -> bool:
        """Record a monitored value; True if it is the best so far."""
        best = self.best
        if best is None or math.isnan(best) or (value < best if better_is_less else value > best):
            self.best, self.best_step, self.evaluations_since_best, self.plateau_wait = value, self.step, 0, 0
            return True
        self.evaluations_since_best += 1
        self.plateau_wait += 1
        if schedule.name == "plateau" and self.plateau_wait > schedule.patience:
            self.plateau, self.plateau_wait = self.plateau * schedule.factor, 0
        self.finished = patience is not None and self.evaluations_since_best >= patience
        return False
