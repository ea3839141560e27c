"""The learning-rate test: on functions whose stable rates are known, and on a tiny model."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from rsedge.errors import OptionError, OutputError, RsedgeError
from rsedge.training.recipe import with_settings
from rsedge.training.train import train
from rsedge.training.tuning.lr_finder import LearningRateCurve, find_learning_rate, write_curve
from tests.training.test_tune import make_data, make_recipe


def rates(low: float, high: float, steps: int) -> list[float]:
    return [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]


def descend(curvature: float, noise: float = 0.0) -> LearningRateCurve:
    """Gradient descent on ½·curvature·w², which is stable below 2 / curvature."""
    generator = np.random.default_rng(0)
    tried, losses, weight = [], [], 3.0
    for rate in rates(1e-5 / curvature, 100 / curvature, 120):
        loss = 0.5 * curvature * weight**2 + 2 + noise * generator.normal()
        if loss > 1e6:
            break
        tried.append(rate)
        losses.append(loss)
        weight -= rate * curvature * weight
    return LearningRateCurve(tuple(tried), tuple(losses), True)


@pytest.mark.parametrize("curvature", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_suggestion_is_stable_and_not_timid_on_a_quadratic(curvature, noise):
    curve = descend(curvature, noise * curvature)
    limit = 2 / curvature
    assert limit / 300 < curve.suggestion < limit / 2
    assert curve.steepest < limit
    assert curve.tenth_of_minimum < limit / 2


def test_smoothing_is_centred_and_keeps_constants_and_slopes():
    steps = 100
    flat = LearningRateCurve(tuple(rates(1e-6, 1, steps)), (3.0,) * steps, False)
    assert flat.smoothed == pytest.approx([3.0] * steps)
    falling = LearningRateCurve(flat.rates, tuple(np.linspace(5, 1, steps)), False)
    assert falling.smoothed[20:80] == pytest.approx(falling.losses[20:80], abs=1e-3)
    drop = LearningRateCurve(flat.rates, (5.0,) * 60 + (1.0,) * 40, False)
    assert abs(drop.rates.index(drop.steepest) - 60) <= 1  # no lag


def test_on_a_plateau_its_beginning_counts():
    losses = [5.0] * 30 + list(np.linspace(5, 1, 20)) + [1 - 1e-6 * step for step in range(50)]
    curve = LearningRateCurve(tuple(rates(1e-6, 1, 100)), tuple(losses), False)
    assert 45 <= curve.rates.index(pytest.approx(curve.tenth_of_minimum * 10)) <= 60
    assert 30 <= curve.rates.index(curve.steepest) <= 50


def test_a_tiny_model(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, recipe = make_data(), make_recipe()
    events = []
    curve = find_learning_rate(recipe, data, min_rate=1e-6, max_rate=10, steps=60, cpu=True, observe=events.append)
    assert list(tmp_path.iterdir()) == []
    assert curve.rates == pytest.approx(rates(1e-6, 10, 60)[: len(curve.rates)])
    assert [event.step for event in events] == list(range(1, len(curve.rates) + 1))
    assert [event.values["learning_rate"] for event in events] == pytest.approx(curve.rates)
    assert curve == find_learning_rate(recipe, data, min_rate=1e-6, max_rate=10, steps=60, cpu=True)
    assert 1e-4 < curve.suggestion < 0.3

    def trained(rate: float) -> float:
        wanted = {"learning_rate": rate, "epochs": 6, "evaluate_every": 12}
        return train(
            with_settings(recipe, wanted), tmp_path / f"{rate}", data=data, cpu=True, trackers=()
        ).progress.best

    assert trained(curve.suggestion) < trained(curve.suggestion / 1000)


def test_groups_keep_their_proportion(monkeypatch):
    from rsedge.training.loop import Trainer

    seen = []
    step = Trainer.step_at_rates
    monkeypatch.setattr(
        Trainer,
        "step_at_rates",
        lambda self, chunks: seen.append({group["lr"] for group in self.optimizer.param_groups}) or step(self, chunks),
    )
    recipe = with_settings(make_recipe(), {"optimizer.learning_rates": {"vision": 3e-5}})  # a hundredth of the rest
    find_learning_rate(recipe, make_data(), min_rate=1e-6, max_rate=1e-3, steps=10, cpu=True)
    for low, high in map(sorted, seen):
        assert high == pytest.approx(100 * low)


def test_it_ends_where_the_loss_breaks_out():
    curve = find_learning_rate(make_recipe("clip_norm="), make_data(), min_rate=1e-6, max_rate=1e40, steps=40, cpu=True)
    assert curve.diverged
    assert len(curve.rates) < 40
    assert all(math.isfinite(loss) for loss in curve.losses)
    with pytest.raises(RsedgeError, match="lower --min-lr"):
        find_learning_rate(make_recipe("clip_norm="), make_data(), min_rate=1e35, max_rate=1e38, steps=40, cpu=True)


def test_bad_options():
    with pytest.raises(OptionError, match=r"from 0.1 to 0.01.*; steps is 3"):
        find_learning_rate(make_recipe(), make_data(), min_rate=0.1, max_rate=0.01, steps=3)


def test_files(tmp_path: Path):
    curve = descend(1.0)
    table, picture = write_curve(curve, tmp_path / "new" / "study")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["learning_rate"]) for row in rows] == list(curve.rates)
    assert [float(row["smoothed_loss"]) for row in rows] == list(curve.smoothed)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match=r"lr-finder.csv and .*lr-finder.png exist already: pass --overwrite"):
        write_curve(curve, tmp_path / "new" / "study")
    write_curve(curve, tmp_path / "new" / "study", overwrite=True)
    assert sorted(path.name for path in table.parent.iterdir()) == ["lr-finder.csv", "lr-finder.png"]
