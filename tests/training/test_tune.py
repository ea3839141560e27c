"""Searches: with a stand-in for training whose best recipe is known, and with tiny models really trained."""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import math
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rsedge.datasets.examples import CaptionData, Example
from rsedge.errors import OptionError, OutputError, RsedgeError, SceneError
from rsedge.training.loop import Event
from rsedge.training.optim import Progress
from rsedge.training.recipe import load_recipe, to_dict, with_settings
from rsedge.training.train import TrainingResult, train
from rsedge.training.tuning import tune as module
from rsedge.training.tuning.tune import tune

SPACE = {"learning_rate": "log:1e-6:1e-1", "weight_decay": "float:0:1"}
WORDS = ["red", "green", "blue", "dark"]


@dataclass(frozen=True)
class Plain:
    """An image of one colour with noise."""

    seed: int

    def read(self):
        generator = np.random.default_rng(self.seed)
        base = np.eye(3)[self.seed % 4] * 200 if self.seed % 4 < 3 else np.zeros(3)
        return np.clip(base + generator.integers(0, 50, (16, 16, 3)), 0, 255).astype(np.uint8)


def make_data() -> CaptionData:
    return CaptionData(
        tuple(
            Example(f"s/{i:03d}", Plain(i), (f"a {WORDS[i % 4]} field",), "train" if i < 16 else "val")
            for i in range(24)
        )
    )


def make_recipe(*settings: str):
    size = ["hidden_size=16", "intermediate_size=32", "num_hidden_layers=1", "num_attention_heads=2"]
    tiny = [f"model.config.{part}.{value}" for part in ("vision", "text") for value in size]
    return load_recipe(
        None,
        family="clip",
        settings=[
            *tiny,
            "model.config.projection_dim=8",
            "model.config.vision.patch_size=8",
            "model.image_size=16",
            "tokenizer=captions",
            "vocabulary_size=64",
            "max_tokens=8",
            "workers=0",
            "batch_size=8",
            "epochs=2",
            "log_every=1",
            "learning_rate=0.003",
            *settings,
        ],
    )


@pytest.fixture(scope="module")
def data() -> CaptionData:
    return make_data()


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """The curve of every run takes longer to draw than the run."""
    monkeypatch.setattr("rsedge.training.loop.draw_losses", lambda *args: None)


@pytest.fixture
def stand_in(monkeypatch):
    """Training that takes no time: five evaluations that fall to a value known from the settings."""
    seen = []

    def loss(recipe) -> float:
        found = (math.log10(recipe.optimizer.learning_rate) + 3) ** 2 + recipe.optimizer.weight_decay
        return found + (recipe.schedule.name == "cosine")

    def fake(recipe, output, *, observe, **options):
        output.mkdir(parents=True)
        seen.append(recipe)
        value = loss(recipe)
        for step in range(1, 6):
            values = {"val_loss": value + 5 - step, "val_accuracy": 1 / (1 + value) - 0.01 * (5 - step)}
            observe(Event(step, 5, step / 2, values, evaluated=True))
        return TrainingResult(
            output, output, Progress(step=5, best=values[recipe.loop.monitor], best_step=5), values, True
        )

    monkeypatch.setattr(module, "train", fake)
    monkeypatch.setattr(module, "_free_memory", lambda: None)
    monkeypatch.setattr(module, "draw_study", lambda *args, **options: None)  # half a second each
    fake.loss, fake.seen = loss, seen
    return fake


def table(study: Path) -> list[dict[str, str]]:
    with (study / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def tried(result) -> list[tuple]:
    return [tuple(trial.settings.values()) for trial in result.trials if trial.state != "interrupted"]


# Proposals


@pytest.mark.parametrize(("method", "trials"), [("tpe", 28), ("gp", 17)])
def test_bayesian_search_beats_chance_and_is_repeatable(stand_in, data, tmp_path, method, trials):
    result = tune(make_recipe(), SPACE, tmp_path / "a", data=data, method=method, trials=trials, pruner="none")
    values = [trial.value for trial in result.trials]
    # Random draws here have a median of 2.06; the sampler must have learnt where to look.
    assert np.median(values[-6:]) < 1.25
    assert result.best.value == min(values)
    assert result.best.value == pytest.approx(stand_in.loss(result.recipe))
    turned = dict(reversed(SPACE.items()))
    again = tune(make_recipe(), turned, tmp_path / "b", data=data, method=method, trials=12, pruner="none")
    assert tried(again) == tried(result)[:12]
    other = tune(make_recipe(), SPACE, tmp_path / "c", data=data, method=method, trials=3, seed=1)
    assert tried(other) != tried(result)[:3]


def test_importances_say_what_mattered(stand_in, data, tmp_path):
    space = {**SPACE, "schedule.warmup_steps": "int:0:9"}  # which the stand-in's loss does not know
    result = tune(make_recipe(), space, tmp_path / "s", data=data, trials=24, pruner="none")
    shares = result.importances
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["optimizer.learning_rate"] > shares["schedule.warmup_steps"]
    few = tune(make_recipe(), space, tmp_path / "t", data=data, trials=5, pruner="none")
    assert few.importances == {}


def test_first_draws_are_independent(stand_in, data, tmp_path):
    # Every trial has a sampler with a seed of its own; the seeds must not make draws alike.
    result = tune(make_recipe(), SPACE, tmp_path / "s", data=data, trials=10, pruner="none")
    places = np.array([[(math.log10(rate) + 6) / 5, decay] for rate, decay in tried(result)])
    assert places.std(axis=0).min() > 0.15
    assert abs(np.corrcoef(places[:-1, 0], places[1:, 0])[0, 1]) < 0.7


def test_a_grid_is_tried_whole(stand_in, data, tmp_path):
    space = {
        "learning_rate": [1e-4, 1e-3, 1e-2],
        "schedule.name": "linear,cosine",
        "schedule.warmup_steps": "int:0:8:4",
    }
    result = tune(make_recipe(), space, tmp_path / "s", data=data, method="grid")
    assert len(result.trials) == len(set(tried(result))) == 18
    assert result.best.settings["optimizer.learning_rate"] == 1e-3
    assert result.recipe.schedule.name == "linear"
    part = tune(make_recipe(), space, tmp_path / "t", data=data, method="grid", trials=5, pruner="none")
    assert len(part.trials) == 5
    rest = tune(make_recipe(), space, tmp_path / "t", data=data, method="grid", pruner="none", resume=True)
    assert sorted(tried(rest)) == sorted(tried(result))


def test_choices_may_be_lists_or_leave_a_key_out(stand_in, data, tmp_path):
    space = {"model.freeze": [[], ["vision"]], "loop.ema_decay": ["", 0.9]}
    tune(make_recipe("loop.ema_decay=0.5"), space, tmp_path / "s", data=data, method="grid")
    assert {(recipe.model.freeze, recipe.loop.ema_decay) for recipe in stand_in.seen} == {
        ((), None),
        (("vision",), None),
        ((), 0.9),
        (("vision",), 0.9),
    }


# Metric, direction, pruning


def test_the_metric_decides_the_direction_and_the_checkpoint(stand_in, data, tmp_path):
    result = tune(make_recipe(), SPACE, tmp_path / "s", data=data, metric="val_accuracy", trials=6, pruner="none")
    values = [trial.value for trial in result.trials]
    assert result.best.value == max(values)
    assert (result.recipe.loop.monitor, result.recipe.loop.monitor_mode) == ("val_accuracy", "max")
    with pytest.raises(OptionError, match="val_accuracy is better the larger it is"):
        tune(make_recipe(), SPACE, tmp_path / "t", data=data, metric="val_accuracy", direction="minimize")
    with pytest.raises(OptionError, match=r"loop.monitor is val_acuracy, but an evaluation gives val_loss"):
        tune(make_recipe(), SPACE, tmp_path / "t", data=data, metric="val_acuracy")


def test_a_loss_by_any_name_is_minimised(stand_in, data, tmp_path, monkeypatch):
    def train(recipe, output, *, observe, **options):
        output.mkdir(parents=True)
        value = recipe.optimizer.weight_decay
        observe(Event(1, 1, 1.0, {"val_contrastive": value}, evaluated=True))
        return TrainingResult(output, output, Progress(step=1, best=value, best_step=1), {}, True)

    monkeypatch.setattr(module, "train", train)
    space = {"optimizer.weight_decay": [0.1, 0.2]}
    result = tune(make_recipe(), space, tmp_path / "s", data=data, metric="val_contrastive", method="grid")
    assert result.best.settings == {"optimizer.weight_decay": 0.1}


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_trials_that_fall_behind_are_ended(stand_in, data, tmp_path, pruner):
    result = tune(make_recipe(), SPACE, tmp_path / "s", data=data, trials=16, pruner=pruner)
    pruned = [trial for trial in result.trials if trial.state == "pruned"]
    assert pruned
    for trial in pruned:
        assert trial.steps < 5
        assert trial.value == pytest.approx(
            stand_in.loss(with_settings(make_recipe(), dict(trial.settings))) + 5 - trial.steps
        )
        assert f"step {trial.steps}" in trial.reason
    none = tune(make_recipe(), SPACE, tmp_path / "t", data=data, trials=8, pruner="none")
    assert {trial.state for trial in none.trials} == {"complete"}


def test_pruning_compares_after_as_many_evaluations_whatever_the_steps(stand_in, data, tmp_path, monkeypatch):
    def fake(recipe, output, *, observe, **options):
        stride = recipe.loop.batch_size  # no two sizes evaluate at the same step
        for turn in range(1, 6):
            values = {"val_loss": float(stride)}
            observe(Event(turn * stride, 5 * stride, turn, values, evaluated=True))
        return TrainingResult(output, output, Progress(best=float(stride)), {}, True)

    monkeypatch.setattr(module, "train", fake)
    result = tune(make_recipe(), {"batch_size": "int:2:16"}, tmp_path / "s", data=data, method="grid")
    assert any(trial.state == "pruned" for trial in result.trials)


# What goes wrong


def test_failed_trials_are_told_and_the_search_goes_on(stand_in, data, tmp_path, monkeypatch):
    def sometimes(recipe, output, **options):
        if recipe.optimizer.learning_rate > 0.5:
            raise RsedgeError("the loss is nan at step 3")
        return stand_in(recipe, output, **options)

    monkeypatch.setattr(module, "train", sometimes)
    space = {"optimizer.name": "adamw,adafactor", "eps": [1e-8, 1e-6], "learning_rate": [1e-3, 1.0]}
    result = tune(make_recipe(), space, tmp_path / "s", data=data, method="grid")
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert len(result.trials) == 8
    contradictions = [trial for trial in failed if "betas and eps belong to adamw" in trial.reason]
    assert len(contradictions) == 2
    assert len([trial for trial in failed if "the loss is nan" in trial.reason]) == 3
    assert len(failed) == 5
    rows = table(tmp_path / "s")
    assert [row["state"] for row in rows] == [trial.state for trial in result.trials]
    assert rows[failed[0].number]["reason"] == failed[0].reason


def test_a_metric_that_no_evaluation_gives_is_refused_at_once(data, tmp_path):
    with pytest.raises(OptionError, match="val_bleu_4") as error:
        tune(make_recipe(), SPACE, tmp_path / "s", data=data, metric="val_bleu_4", trials=20, cpu=True)
    assert "val_mean_recall" in str(error.value)  # what there is


class Unreadable:
    def read(self):
        raise SceneError("disk.png cannot be read: Input/output error")


def test_a_fault_of_no_setting_ends_the_search(data, tmp_path):
    examples = [dataclasses.replace(example, image=Unreadable()) for example in data.examples]
    with pytest.raises(RsedgeError, match=r"no trial was completed.*trials.csv"):
        tune(make_recipe(), SPACE, tmp_path / "s", data=CaptionData(tuple(examples)), trials=20, cpu=True)
    assert [row["state"] for row in table(tmp_path / "s")] == ["failed"] * 3


def test_everything_wrong_with_a_space_is_told_at_once(data, tmp_path):
    space = {
        "learning_rat": "log:1e-6:1e-3",
        "batch_size": "8",
        "weight_decay": "loguniform(0, 1)",
        "optimizer.eps": "float:3:2",
        "schedule.start_factor": "log:0:1",
        "schedule.warmup_steps": "int:1.5:3",
        "loop.batch_size": "8,16",
        "seed": "1,2",
        "data.limit": "10,20",
        "loop.monitor": "val_loss,val_accuracy",
        "model.freeze": [["vision"]],
        "early_stopping": "2,2",
    }
    with pytest.raises(OptionError) as error:
        tune(make_recipe(), space, tmp_path / "s", data=data)
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 11  # batch_size is bad, so its other spelling is the first that is good
    for text in (
        "learning_rat is not a key of a recipe: did you mean learning_rate",
        "batch_size: '8' is no range: give float:LOW:HIGH, log:LOW:HIGH, int:LOW:HIGH[:STEP], or choices A,B,C",
        "'loguniform(0, 1)' is no range",
        "float:3.0:2.0 is no range: give a number and a larger one",
        "has no logarithm at 0",
        "give int:LOW:HIGH or int:LOW:HIGH:STEP with whole numbers",
        "use --metric and --direction",
        "give two values or more",
        "holds 2 more than once",
    ):
        assert text in str(error.value), text
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optimizer.name": "adam,adamw"}, 'optimizer.name = "adam".*must be "adamw"'),
        ({"learning_rate": "float:-1:1"}, "learning_rate is -1.0: give a rate above 0"),
        ({"learning_rate": "1e-3,fast", "batch_size": "4,8"}, 'learning_rate = "fast".*must be a number'),
        ({"learning_rate": "1e-3,", "batch_size": "4,8"}, "learning_rate = null"),
        ({"epochs": "float:1:4"}, "must be a whole number"),
        ({}, "nothing is searched"),
        ({"learning_rate": "1e-3,1e-2", "optimizer.learning_rate": "1e-3,1e-2"}, "another spelling"),
    ],
)
def test_values_the_recipe_never_accepts_are_refused(data, tmp_path, space, message):
    with pytest.raises(OptionError, match=message):
        tune(make_recipe(), space, tmp_path / "s", data=data)


def test_other_bad_options(stand_in, data, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match=r"log:1e-06:0.1 cannot be counted.*\n.*float:0.0:1.0 cannot be counted"):
        tune(make_recipe(), SPACE, tmp_path / "s", data=data, method="grid")
    with pytest.raises(OptionError, match="the grid has 2 points"):
        tune(make_recipe(), {"epochs": "1,2"}, tmp_path / "s", data=data, method="grid", trials=3)
    with pytest.raises(OptionError, match=r"trials is 0.*timeout is -1"):
        tune(make_recipe(), SPACE, tmp_path / "s", data=data, trials=0, timeout=-1)
    training_only = CaptionData(data.split("train"))
    with pytest.raises(OptionError, match="no images of the split val"):
        tune(make_recipe(), SPACE, tmp_path / "s", data=training_only)
    with pytest.raises(OptionError, match=r"no study in .* to resume"):
        tune(make_recipe(), SPACE, tmp_path / "s", data=data, resume=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="one process"):
        tune(make_recipe(), SPACE, tmp_path / "s", data=data)
    assert not (tmp_path / "s").exists()


# The folder


def test_a_study_is_not_overwritten_unasked(stand_in, data, tmp_path):
    study = tmp_path / "s"
    (study / "trials").mkdir(parents=True)
    (study / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="is no study"):
        tune(make_recipe(), SPACE, study, data=data, overwrite=True)
    (study / "mine.txt").rename(tmp_path / "mine.txt")
    (study / "trials").rmdir()
    tune(make_recipe(), SPACE, study, data=data, trials=3)
    with pytest.raises(OutputError, match=r"--resume.*--overwrite"):
        tune(make_recipe(), SPACE, study, data=data, trials=3)
    (tmp_path / "mine.txt").rename(study / "mine.txt")
    assert len(tune(make_recipe(), SPACE, study, data=data, trials=2, overwrite=True).trials) == 2
    assert sorted(path.name for path in (study / "trials").iterdir()) == ["0000", "0001"]
    assert (study / "mine.txt").exists()


def test_another_study_is_not_resumed(stand_in, data, tmp_path):
    tune(make_recipe(), SPACE, tmp_path / "s", data=data, trials=2)
    fewer = CaptionData(data.examples[1:])
    with pytest.raises(OptionError) as error:
        tune(make_recipe("epochs=3"), {**SPACE, "weight_decay": "float:0:2"}, tmp_path / "s", data=fewer, seed=5,
             method="gp", resume=True)  # fmt: skip
    for text in ("the images", "recipe.loop.epochs was 2, now 3", "method was 'tpe'", "seed was 0, now 5",
                 "search.optimizer.weight_decay was 'float:0.0:1.0', now 'float:0.0:2.0'"):  # fmt: skip
        assert text in str(error.value), text


def test_a_study_belongs_to_one_process_at_a_time(stand_in, data, tmp_path):
    tune(make_recipe(), SPACE, tmp_path / "s", data=data, trials=1)
    with (tmp_path / "s" / "journal.log").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="in use"):
            tune(make_recipe(), SPACE, tmp_path / "s", data=data, trials=2, resume=True)


def test_a_search_goes_on_as_if_it_had_not_stopped(stand_in, data, tmp_path):
    whole = tune(make_recipe(), SPACE, tmp_path / "a", data=data, trials=16)
    tune(make_recipe(), SPACE, tmp_path / "b", data=data, trials=5)
    with (tmp_path / "b" / "journal.log").open("ab") as journal:
        journal.write(b'{"op_code":4,"wor')  # a power failure in mid-line
    first = len(stand_in.seen)
    rest = tune(make_recipe(), SPACE, tmp_path / "b", data=data, trials=16, resume=True)
    assert len(stand_in.seen) == first + 11
    assert tried(rest) == tried(whole)
    assert [trial.state for trial in rest.trials] == [trial.state for trial in whole.trials]


def test_the_time_limit_ends_it_between_trials(stand_in, data, tmp_path, monkeypatch):
    def slow(recipe, output, **options):
        time.sleep(0.2)
        return stand_in(recipe, output, **options)

    monkeypatch.setattr(module, "train", slow)
    result = tune(make_recipe(), SPACE, tmp_path / "s", data=data, trials=50, timeout=0.3)
    assert 1 <= len(result.trials) <= 2
    assert {trial.state for trial in result.trials} == {"complete"}


def test_a_trial_that_ends_the_process_is_given_up(stand_in, data, tmp_path, monkeypatch):
    def dies(recipe, output, **options):
        if recipe.loop.batch_size == 16:
            raise KeyboardInterrupt
        return stand_in(recipe, output, **options)

    monkeypatch.setattr(module, "train", dies)
    space = {"batch_size": "4,16,8"}
    for turn in range(3):
        with pytest.raises(KeyboardInterrupt):
            tune(make_recipe(), space, tmp_path / "s", data=data, method="grid", resume=turn > 0)
    assert [row["state"] for row in table(tmp_path / "s")] == ["complete", "interrupted", "interrupted", "running"]
    result = tune(make_recipe(), space, tmp_path / "s", data=data, method="grid", resume=True)
    assert [trial.state for trial in result.trials] == [
        "complete", "interrupted", "interrupted", "failed", "complete",
    ]  # fmt: skip
    assert result.trials[3].reason == "the process ended 3 times in this trial"
    assert [trial.settings["loop.batch_size"] for trial in result.trials] == [4, 16, 16, 16, 8]


# Models really trained


def test_tiny_models_are_tuned(data, tmp_path):
    events = []
    space = {
        "learning_rate": "3e-3,1e30",
        "mixed_precision": "no,bf16",  # accelerate must forget the last trial's
    }
    study = tmp_path / "s"
    result = tune(make_recipe(), space, study, data=data, method="grid", cpu=True, observe=events.append)
    states = {tuple(trial.settings.values()): trial.state for trial in result.trials}
    assert states["no", 0.003] == states["bf16", 0.003] == "complete"
    assert states["no", 1e30] == "failed"
    assert any("is nan at step" in trial.reason for trial in result.trials)
    assert any(event.evaluated for event in events)

    best = load_recipe(study / "best.toml", family="clip")
    assert best == result.recipe
    assert best == with_settings(make_recipe(), dict(result.best.settings))
    again = train(best, tmp_path / "run", data=data, cpu=True, trackers=())
    assert again.progress.best == result.best.value

    rows = table(study)
    assert list(rows[0]) == [
        "number", "state", "value", "loop.mixed_precision", "optimizer.learning_rate", "steps", "seconds", "reason",
    ]  # fmt: skip
    assert {row["steps"] for row in rows if row["state"] == "complete"} == {"4"}
    for number, row in enumerate(rows):
        run = study / "trials" / f"{number:04d}"
        assert (run / "recipe.toml").exists()
        assert (run / "checkpoints").exists() == (number == result.best.number), row
        assert (run / "best").is_symlink() == (number == result.best.number)
    assert (study / "trials" / f"{result.best.number:04d}" / "best" / "model.safetensors").exists()
    for name in ("history.png", "slices.png"):
        assert (study / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("keep", ["all", "none"])
def test_checkpoints_are_kept_as_asked(data, tmp_path, keep):
    result = tune(make_recipe("epochs=1"), {"learning_rate": "1e-3,1e-2"}, tmp_path / "s", data=data, method="grid",
                  keep=keep, cpu=True)  # fmt: skip
    for trial in result.trials:
        checkpoint = tmp_path / "s" / "trials" / f"{trial.number:04d}" / "best" / "model.safetensors"
        assert checkpoint.exists() == (keep == "all")


def _search_until_killed(study: str) -> None:
    """In a process of its own: dies in the second evaluation of the second trial, which has one checkpoint then."""
    from rsedge.training import loop

    loop.draw_losses = lambda *args: None
    evaluations = 0

    def die(event: Event) -> None:
        nonlocal evaluations
        evaluations += event.evaluated
        if evaluations == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    tune(make_recipe(), SPACE, study, data=make_data(), trials=3, pruner="none", cpu=True, observe=die)


def test_a_killed_search_goes_on_in_the_trial_it_was_killed_in(data, tmp_path):
    recipe = make_recipe()
    options = {"data": data, "trials": 3, "pruner": "none", "cpu": True}
    process = multiprocessing.get_context("spawn").Process(target=_search_until_killed, args=(str(tmp_path / "s"),))
    process.start()
    whole = tune(recipe, SPACE, tmp_path / "whole", **options)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    steps = []
    result = tune(recipe, SPACE, tmp_path / "s", **options, resume=True, observe=lambda event: steps.append(event.step))
    assert [trial.state for trial in result.trials] == ["complete", "interrupted", *["complete"] * 2]
    assert result.trials[1].reason == "repeated as trial 2"
    assert steps[0] == 3  # from the checkpoint at the end of the first epoch, not from the start
    values = [trial.value for trial in result.trials if trial.state == "complete"]
    assert tried(result) == tried(whole)
    assert values == [trial.value for trial in whole.trials]
    assert to_dict(result.recipe) == to_dict(whole.recipe)
    assert not (tmp_path / "s" / "trials" / "0001").exists()
