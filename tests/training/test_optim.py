"""Schedules, parameter groups, freezing, and what early stopping and the plateau make of evaluations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from rsedge.errors import OptionError
from rsedge.training.optim import Progress, factor_at, freeze, make_optimizer
from rsedge.training.recipe import OptimizerRecipe, ScheduleRecipe

PARTS = {"vision": "vision.*", "text": "text.*"}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.text = nn.Linear(4, 2)


def rates(schedule, steps):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler, found = schedule(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("name", "oracle"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_schedules_are_those_of_transformers(name, oracle):
    recipe = ScheduleRecipe(name=name, warmup_steps=7)
    expected = rates(lambda optimizer: oracle(optimizer, 7, 40), 40)
    assert [factor_at(step, 40, recipe) for step in range(40)] == pytest.approx(expected, abs=1e-12)


def test_warm_up_is_torchs_linear_one():
    recipe = ScheduleRecipe(name="warmup", warmup_steps=5, start_factor=1 / 3)
    expected = rates(lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 1.0, 5), 12)
    assert [factor_at(step, 12, recipe) for step in range(12)] == pytest.approx(expected, abs=1e-12)


def test_groups_have_their_rates_and_no_decay_on_vectors():
    model = Model()
    recipe = OptimizerRecipe(learning_rate=1e-3, learning_rates={"vision": 1e-5}, weight_decay=0.1)
    optimizer = make_optimizer(model, recipe, PARTS)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = of[id(parameter)]
        assert group["lr"] == group["peak_lr"] == (1e-5 if name.startswith("vision") else 1e-3)
        assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)


def test_the_first_rate_that_fits_wins():
    optimizer = make_optimizer(
        Model(), OptimizerRecipe(learning_rate=1.0, learning_rates={"vision.0.*": 0.1, "vision": 0.2}), PARTS
    )
    assert {group["lr"] for group in optimizer.param_groups} == {0.1, 0.2, 1.0}


def test_freezing():
    model = Model()
    freeze(model, ["vision.0.*"], PARTS)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["vision.0.weight", "vision.0.bias"]
    frozen = {id(p) for p in model.vision[0].parameters()}
    optimizer = make_optimizer(model, OptimizerRecipe(name="adafactor"), PARTS)
    assert not frozen & {id(p) for group in optimizer.param_groups for p in group["params"]}
    with pytest.raises(OptionError, match=r"which model.freeze keeps"):
        make_optimizer(model, OptimizerRecipe(learning_rates={"vision.0.*": 0.1}), PARTS)
    with pytest.raises(OptionError, match=r"matches no parameter of the model: give a part \(vision, text\)"):
        freeze(model, ["visual"], PARTS)
    with pytest.raises(OptionError, match="leaves nothing to train"):
        freeze(model, ["vision", "text"], PARTS)


def record(values, *, schedule, patience=None, less=True):
    progress, found = Progress(), []
    for step, value in enumerate(values, 1):
        progress.step = step
        best = progress.record(value, better_is_less=less, schedule=schedule, patience=patience)
        found.append((best, progress.plateau, progress.finished))
    return progress, found


def test_the_plateau_is_torchs():
    values = [5.0, 4.0, 4.1, 4.2, 4.3, 3.0, 3.5, 3.5, 3.5, 3.5, 3.5]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1, threshold=0.0)
    expected = []
    for value in values:
        oracle.step(value)
        expected.append(optimizer.param_groups[0]["lr"])
    _, found = record(values, schedule=ScheduleRecipe(name="plateau"))
    assert [plateau for _, plateau, _ in found] == pytest.approx(expected)


def test_best_and_early_stopping():
    progress, found = record([1.0, 2.0, 1.5, 1.9, 2.5], schedule=ScheduleRecipe(), patience=2, less=False)
    assert [best for best, *_ in found] == [True, True, False, False, True]
    assert [finished for *_, finished in found] == [False, False, False, True, True]
    assert (progress.best, progress.best_step) == (2.5, 5)
