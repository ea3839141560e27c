"""The loop: what a step does to the weights must not depend on how it is cut, shared, or where the run was resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from PIL import Image
from safetensors.torch import load_file

from rsedge.errors import BackendError, OptionError, OutputError, RsedgeError
from rsedge.training.data.samples import Order, TrainingSamples
from rsedge.training.loop import Trainer, make_accelerator, objective_for
from rsedge.training.optim import Progress
from rsedge.training.recipe import monitors
from rsedge.training.run_folder import RunFolder, read_metrics
from rsedge.training.train import fingerprint, make_task, train
from tests.training.tiny import caption_data, tiny_recipe

DATA = caption_data()
RSDIX = ("contrastive.rsdix.teacher=ema", "contrastive.rsdix.alpha=0.5")
SIGMOID = (
    "contrastive.rsdix.use_sigmoid_loss=true",
    "contrastive.rsdix.teacher=none",
    "contrastive.rsdix.alpha=1.0",
)
STILL = "model.config.text.hidden_dropout_prob=0.0"


def run(recipe, folder, **options):
    return train(recipe, folder, data=DATA, cpu=True, trackers=(), **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path, *, exactly: bool = True) -> None:
    tolerance = 0 if exactly else 1e-5
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=tolerance, atol=tolerance)


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_metrics(folder / "metrics.jsonl") if key in line]


NO_DROPOUT = tuple(f"model.config.text.{name}_pdrop=0.0" for name in ("resid", "embd", "attn"))


@pytest.mark.parametrize(
    ("family", "settings"), [("blip", (STILL,)), ("clip", ()), ("clip", RSDIX), ("clipcap", NO_DROPOUT)]
)
def test_gradients_do_not_depend_on_the_chunks(family, settings):
    torch.manual_seed(0)
    recipe = tiny_recipe(family, *settings)
    task = make_task(recipe, DATA).train()
    samples = TrainingSamples(DATA.split("train"), task.image, recipe, one_caption=task.one_caption)
    found = {}
    for micro in (8, 2):
        order, accelerator = Order(24, 8, micro), Accelerator(cpu=True)
        accelerator.gradient_accumulation_steps = 8 // micro
        chunks = [task.collate([samples[position] for position in chunk]) for chunk in order.batches(0, 1)]
        task.zero_grad()
        values = objective_for(task, accelerator, order).backward(task, chunks, 0)
        gradients = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
        found[micro] = (values, gradients)
    assert found[8][0] == pytest.approx(found[2][0], abs=1e-5)
    assert found[8][1].keys() == found[2][1].keys()
    assert len(found[8][1]) > 20
    for name, gradient in found[8][1].items():
        torch.testing.assert_close(found[2][1][name], gradient, rtol=1e-3, atol=1e-5)
    # The oracle: one plain backward pass over the whole step.
    task.zero_grad()
    chunk = task.collate([samples[position] for position in next(iter(Order(24, 8, 8).batches(0, 1)))])
    outputs = task(chunk)
    loss = task.loss(outputs)["loss"] if "image" in outputs else outputs["loss_sum"] / task.tokens(chunk)
    loss.backward()
    for name, gradient in found[8][1].items():
        torch.testing.assert_close(dict(task.named_parameters())[name].grad, gradient, rtol=1e-3, atol=1e-5)


def python(*arguments: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Command:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_nothing_in_the_state_of_a_run_is_executed_on_resume(tmp_path):
    run, target = tmp_path / "run", tmp_path / "executed"
    recipe = tiny_recipe("blip", "loop.ema_decay=0.9", "loop.max_steps=1")
    train(recipe, run, data=caption_data(), cpu=True, trackers=())
    state = (run / "last" / "state").resolve()
    names = sorted(path.name for path in state.iterdir() if path.suffix in (".bin", ".pkl", ".pt"))
    assert names == ["average.pt", "optimizer.bin", "random_states_0.pkl"]
    for name in (*names, "custom_checkpoint_0.pkl"):  # the last is what accelerate would unpickle without a question
        whole = (state / name).read_bytes() if name in names else None
        torch.save({"state": Command(target)}, state / name)
        if name == "random_states_0.pkl":  # a run draws nothing from them, so accelerate goes on without
            train(recipe, run, data=caption_data(), cpu=True, trackers=(), resume=True)
        else:
            with pytest.raises(OptionError, match="cannot resume from"):
                train(recipe, run, data=caption_data(), cpu=True, trackers=(), resume=True)
        assert not target.exists(), name
        torch.load(state / name, weights_only=False)  # the control: it does run where it is trusted
        assert target.exists(), name
        target.unlink()
        if whole is None:
            (state / name).unlink()
        else:
            (state / name).write_bytes(whole)
    train(recipe, run, data=caption_data(), cpu=True, trackers=(), resume=True)


PROCESSES = """
import sys
from pathlib import Path
import torch
from rsedge.training.train import train
from tests.training.tiny import caption_data, tiny_recipe
folder = Path(sys.argv[1])
runs = {"clip": ("contrastive.rsdix.teacher=ema", "contrastive.rsdix.alpha=0.5"), "blip": ("loop.captions=4",)}
worlds = []
observe = lambda event: worlds.append(torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
for family, settings in runs.items():  # dropout is on in blip: it belongs to the chunk, not to the process
    recipe = tiny_recipe(family, *settings, "loop.micro_batch_size=4")
    if train(recipe, folder / family, data=caption_data(val=7), cpu=True, trackers=(), observe=observe).main:
        print("world", *sorted(set(worlds)))
"""


def test_two_processes_do_what_one_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    assert python(str(script), str(tmp_path / "one")).splitlines() == ["world 1"] * 2
    # accelerate launch --cpu starts a single process wherever there is no MPI.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert python(*launch, str(script), str(tmp_path / "two")).splitlines() == ["world 2"] * 2
    for family in ("clip", "blip"):
        one, two = tmp_path / "one" / family, tmp_path / "two" / family
        for name in ("loss", "gradient_norm", "val_loss"):
            assert losses(two, name) == pytest.approx(losses(one, name), rel=1e-5)
        same(one / "best", two / "best", exactly=False)


def test_a_run_leaves_what_it_says(tmp_path):
    settings = ("loop.captions=4", "loop.epochs=3", "model.gradient_checkpointing=true", "schedule.name=cosine")
    events = []
    result = train(
        tiny_recipe("blip", *settings),
        tmp_path / "run",
        data=DATA,
        cpu=True,
        trackers=("tensorboard",),
        observe=events.append,
    )
    assert result.progress.step == 9 == max(event.step for event in events)
    assert sum(event.evaluated for event in events) == 3
    stages = [event.stage for event in events if event.stage and event.step == 3]
    assert stages == ["validation, 8 of 8 images", "captions, 4 of 4 images", "captions, 8 of 8 images"]
    assert {"recipe.toml", "data.json", "metrics.jsonl", "loss.png", "samples.png", "best", "last", "logs"} <= {
        path.name for path in result.run.iterdir()
    }
    for name in ("loss.png", "samples.png"):
        assert np.asarray(Image.open(result.run / name).convert("L")).std() > 5
    assert list((result.run / "logs").rglob("events.out.tfevents*"))
    assert {"val_loss", "val_bleu_4", "val_cider_d", "val_words"} <= result.values.keys()
    stored = json.loads((result.run / "data.json").read_text())
    assert stored["fingerprint"] == fingerprint(DATA)
    assert not (result.best / "state").exists() or (result.run / "last").resolve() == result.best.resolve()
    lines = read_metrics(result.run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))
    assert all(line["samples_per_second"] > 0 for line in lines if "loss" in line)


def test_training_learns(tmp_path):
    recipe = tiny_recipe("blip", "loop.epochs=25", "loop.captions=8", "loop.evaluate_every=25")
    result = run(recipe, tmp_path / "run")
    found = losses(result.run)
    assert found[-1] < found[0] / 3
    assert result.values["val_cider_d"] > 1  # the colours are told apart; chance is well below


def test_gradient_checkpointing_and_workers_change_nothing(tmp_path):
    plain = run(tiny_recipe("blip"), tmp_path / "plain")
    for name, setting in (("saved", "model.gradient_checkpointing=true"), ("workers", "data.workers=2")):
        other = run(tiny_recipe("blip", setting), tmp_path / name)
        assert losses(other.run) == pytest.approx(losses(plain.run), rel=1e-6)


@pytest.mark.parametrize(
    "setting", ["optimizer.name=adafactor", "loop.mixed_precision=bf16", "model.freeze=['vision']"]
)
def test_other_ways_to_train(setting, tmp_path):
    result = run(tiny_recipe("blip", setting, "loop.epochs=6"), tmp_path / "run")
    assert losses(result.run)[-1] < losses(result.run)[0]
    torch.manual_seed(0)
    if "freeze" in setting:
        started = run(tiny_recipe("blip", setting, "loop.max_steps=1"), tmp_path / "one")
        for name, value in weights(started.best).items():
            equal = torch.equal(value, weights(result.best)[name])
            assert equal == name.startswith("vision_model."), name


def test_early_stopping_keeps_the_best(tmp_path):
    recipe = tiny_recipe(
        "clip",
        "loop.epochs=30",
        "loop.early_stopping=2",
        "loop.monitor=val_accuracy",
        "loop.monitor_mode=max",
        "learning_rate=1e-9",
    )
    result = run(recipe, tmp_path / "run")
    assert result.progress.finished
    assert result.progress.step == 9  # the first evaluation is the best, and two are no better
    assert (result.progress.best_step, result.best.resolve().name) == (3, "step-00000003")
    assert (result.run / "last").resolve().name == "step-00000009"
    assert run(recipe, result.run, resume=True).progress == result.progress  # nothing is left to do


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(RsedgeError, match=r"the loss is (nan|inf) at step"):
        run(tiny_recipe("blip", "learning_rate=1e20", "optimizer.clip_norm=", "loop.epochs=9"), tmp_path / "run")


def test_what_does_not_fit_is_refused(tmp_path):
    small = tiny_recipe("blip", "loop.batch_size=25")
    with pytest.raises(OptionError, match="there are 24 training images"):
        run(small, tmp_path / "run")
    with pytest.raises(OptionError, match=r"loop.monitor is val_bleu_9, but an evaluation gives val_loss"):
        run(tiny_recipe("blip", "loop.monitor=val_bleu_9", "loop.captions=2"), tmp_path / "run", overwrite=True)
    with pytest.raises(OptionError, match="no validation images"):
        train(tiny_recipe("blip"), tmp_path / "none", data=caption_data(val=0), cpu=True, trackers=())
    with pytest.raises(OptionError, match="no data is named"):
        train(tiny_recipe("blip"), tmp_path / "nothing", cpu=True, trackers=())


def test_trackers_that_cannot_be_had_are_refused(monkeypatch):
    recipe = tiny_recipe("blip")
    with pytest.raises(OptionError, match=r"there is no tracker nonsense: give some of .*tensorboard"):
        make_accelerator(recipe, cpu=True, trackers=("tensorboard", "nonsense"))
    monkeypatch.setattr("rsedge.training.loop.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(BackendError, match="wandb are not installed: pip install wandb"):
        make_accelerator(recipe, cpu=True, trackers=("tensorboard", "wandb"))


@pytest.mark.parametrize(
    ("family", "settings"),
    [("blip", ()), ("clipcap", ("loop.captions=2",)), ("clip", ()), ("clip", RSDIX), ("siglip", SIGMOID)],
)
def test_the_monitors_of_a_recipe_are_what_an_evaluation_gives(family, settings, tmp_path):
    recipe = tiny_recipe(family.replace("siglip", "clip"), "max_steps=1", *settings, siglip=family == "siglip")
    known = monitors(recipe)
    lines = read_metrics(run(recipe, tmp_path / "run").run / "metrics.jsonl")
    line = next(line for line in lines if "val_loss" in line)
    assert [name for name in line if name.startswith("val_")] == list(known)


def test_a_run_is_never_replaced_or_mixed_unasked(tmp_path):
    recipe = tiny_recipe("clip", "loop.epochs=1")
    run(recipe, tmp_path / "run")
    with pytest.raises(OutputError, match="go on with --resume, start it anew with --overwrite"):
        run(recipe, tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.toml").touch()  # someone's own, no run's
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(OutputError, match="exists and is no run"):
        run(recipe, tmp_path / "other", overwrite=True)
    with pytest.raises(OptionError, match=r"no run in .* to resume"):
        run(recipe, tmp_path / "other", resume=True)
    assert len(list((tmp_path / "other").iterdir())) == 2
    with pytest.raises(OptionError, match=r"no run in .* to resume"):
        run(recipe, tmp_path / "fresh", resume=True)
    with pytest.raises(OptionError, match=r"loop.epochs was 1, now 2") as caught:
        run(tiny_recipe("clip", "loop.epochs=2", "learning_rate=0.1"), tmp_path / "run", resume=True)
    assert "optimizer.learning_rate was 0.003, now 0.1" in str(caught.value)
    with pytest.raises(OptionError, match="the data was"):
        train(recipe, tmp_path / "run", data=caption_data(train=25), cpu=True, trackers=(), resume=True)
    assert run(tiny_recipe("clip", "loop.epochs=1", "data.workers=1"), tmp_path / "run", resume=True).progress.step == 3
    (tmp_path / "run" / "notes.txt").touch()
    assert run(recipe, tmp_path / "run", overwrite=True).progress.step == 3
    assert (tmp_path / "run" / "notes.txt").exists()
    assert len(losses(tmp_path / "run")) == 3  # the former run's are gone


def test_metrics_cut_off_by_a_kill(tmp_path):
    folder = RunFolder(tmp_path)
    for step in range(4):
        folder.append({"step": step, "loss": 1.0})
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    folder.rewind(2)
    assert [line["step"] for line in read_metrics(folder.metrics)] == [0, 1, 2]


def test_a_trainer_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe("clip", "loop.epochs=1")
    torch.manual_seed(0)
    trainer = Trainer(
        recipe, make_task(recipe, DATA), DATA.split("train"), DATA.split("val"), make_accelerator(recipe, cpu=True)
    )
    assert isinstance(trainer.run(), Progress)
    assert list(tmp_path.iterdir()) == []


def test_a_warm_up_that_outlasts_the_run_is_told(tmp_path, caplog):
    run(tiny_recipe("clip", "max_steps=2", "warmup_steps=2"), tmp_path / "run")
    assert "warmup_steps is 2, but the run has 2 steps: the learning rate never reaches 0.003" in caplog.text


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (OSError(28, "No space left on device"), OutputError, "make room, then --resume"),
        (torch.OutOfMemoryError("CUDA out of memory"), BackendError, "micro_batch_size to less than 8"),
    ],
)
def test_a_machine_that_is_too_small_is_told_apart_from_a_fault(fault, error, message, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(RunFolder, "publish" if isinstance(fault, OSError) else "append", fail)
    with pytest.raises(error, match=message):
        run(tiny_recipe("clip", "max_steps=1"), tmp_path / "run")
