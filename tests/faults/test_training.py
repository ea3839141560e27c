"""Faults in training: killed runs, damaged checkpoints, full disks, dead workers, losses that are no number."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch.utils.data

from rsedge.datasets.examples import CaptionData
from rsedge.datasets.images import FileImage
from rsedge.errors import BackendError, OptionError, OutputError, RsedgeError, SceneError
from rsedge.training.data.samples import Order
from rsedge.training.models.blip import BlipTask
from rsedge.training.train import train
from tests.training.test_loop import RSDIX, losses, python, run, same
from tests.training.tiny import caption_data, tiny_recipe

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from rsedge.training import run_folder
from rsedge.training.train import train
from tests.training.tiny import caption_data, tiny_recipe

family, folder, settings = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
torch.set_num_threads(1)  # sums depend on how many share them, and forking wants no threads

def run(name, resume=False, observe=None):
    recipe = tiny_recipe(family, *settings)
    options = dict(data=caption_data(), cpu=True, trackers=(), resume=resume, observe=observe)
    return train(recipe, folder / name, **options)

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def at_step(number):
    return lambda event: kill() if event.step == number else None

def in_checkpoint():  # the third one is written, but not yet renamed
    before, count = run_folder._sync, [0]
    def sync(path):
        before(path)
        count[0] += 1
        if count[0] == 3:
            kill()
    run_folder._sync = sync

def between_links():  # renamed, and linked as the best if it is, but not yet as the last
    before, count = run_folder.RunFolder._link, [0]
    def link(self, name, target):
        count[0] += name == "last"
        if count[0] == 2:
            kill()
        before(self, name, target)
    run_folder.RunFolder._link = link

def killed(name, observe=None, prepare=None):
    child = os.fork()
    if child == 0:
        if prepare:
            prepare()
        run(name, observe=observe)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, name

killed("first step", observe=at_step(1))
killed("mid-epoch", observe=at_step(5))
killed("mid-checkpoint", prepare=in_checkpoint)
killed("between links", prepare=between_links)
found = {"whole": run("whole").progress.best}
for name in ("first step", "mid-epoch", "mid-checkpoint", "between links"):
    found[name] = run(name, resume=True).progress.best
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("blip", ("loop.ema_decay=0.9", "data.workers=1", "augmentation.rotation=[0.0, 180.0]")),
        ("clip", (*RSDIX, "loop.micro_batch_size=4")),
    ],
)
def test_killed_runs_go_on_bit_for_bit(family, settings, tmp_path):
    every = ("loop.epochs=4", "loop.evaluate_every=4", "loop.checkpoint_every=3")
    found = json.loads(python("-c", SCRIPT, family, str(tmp_path), *settings, *every).splitlines()[-1])
    whole = tmp_path / "whole"
    for name in set(found) - {"whole"}:
        assert found[name] == found["whole"]
        for link in ("best", "last"):
            same(whole / link, tmp_path / name / link)
        assert losses(tmp_path / name) == losses(whole)
        assert losses(tmp_path / name, "val_loss") == losses(whole, "val_loss")
        left = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (tmp_path / name, whole)]
        assert left[0] == left[1]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("damage", [cut, lambda data: b"", lambda data: os.urandom(len(data))])
def test_a_damaged_checkpoint_is_named_and_the_weights_remain(damage, tmp_path):
    recipe = tiny_recipe("clip", "loop.ema_decay=0.9", "loop.epochs=2", "loop.checkpoint_every=2")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", observe=interrupt_after(5))
    last = (tmp_path / "run" / "last").resolve()
    for name in ("model.safetensors", "optimizer.bin", "average.pt", "progress.json"):
        whole = (last / "state" / name).read_bytes()
        (last / "state" / name).write_bytes(damage(whole))
        with pytest.raises(OptionError, match=rf"state.*damaged.*start a new run .*model.init = .*{last.name}|last"):
            run(recipe, tmp_path / "run", resume=True)
        (last / "state" / name).write_bytes(whole)
    data = tmp_path / "run" / "data.json"
    whole = data.read_bytes()
    data.write_bytes(damage(whole))
    with pytest.raises(OptionError, match=r"data.json is damaged: start a new run"):
        run(recipe, tmp_path / "run", resume=True)
    data.write_bytes(whole)
    assert run(recipe, tmp_path / "run", resume=True).progress.step == 6


def interrupt_after(step: int):
    def observe(event):
        if event.step == step:
            raise KeyboardInterrupt

    return observe


@pytest.mark.parametrize("most", [300, 20_000, 100_000, 540_000])
def test_a_full_disk_keeps_the_checkpoint_before(most, tmp_path):
    """A limit on the size of files does what a full disk does: the kernel refuses a write in the middle of one."""
    settings = ("loop.ema_decay=0.9", "loop.epochs=2", "loop.checkpoint_every=2", "loop.evaluate_every=4")
    recipe = tiny_recipe("clip", *RSDIX, *settings)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event):
        if event.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))

    try:
        with pytest.raises(OutputError, match=r"the run cannot go on in .*: make room, then --resume") as caught:
            run(recipe, tmp_path / "run", observe=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 1
    folder = tmp_path / "run"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert run(recipe, folder, resume=True).progress.step == 6
    whole = run(recipe, tmp_path / "whole")
    assert losses(folder) == losses(whole.run)
    same(folder / "last", whole.run / "last")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    recipe, folder = tiny_recipe("clip", "loop.epochs=2", "loop.checkpoint_every=2"), small_disk / "run"

    def fill(event):
        if event.step == 3:
            with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    with pytest.raises(OutputError, match=r"No space left on device.*: make room, then --resume"):
        run(recipe, folder, observe=fill)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    (small_disk / "filler").unlink()
    assert run(recipe, folder, resume=True).progress.step == 6


def test_a_run_that_cannot_be_begun_is_told_before_the_training(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot make a run in .*run: File too large; choose another with -o"):
            run(tiny_recipe("clip"), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run(tiny_recipe("clip", "max_steps=1"), tmp_path / "run", overwrite=True).progress.step == 1


@dataclass(frozen=True)
class White:
    def read(self) -> np.ndarray:
        return np.full((40, 40, 3), 255, np.uint8)


def with_image(image, split: str) -> CaptionData:
    """The data with another image in the place of one."""
    examples = list(caption_data().examples)
    number = 13 if split == "train" else 29
    examples[number] = replace(examples[number], image=image)
    return CaptionData(tuple(examples))


def test_a_loss_that_is_no_number_names_its_step_and_images(tmp_path, monkeypatch):
    forward = BlipTask.forward

    def poisoned(self, batch):
        white = self.training and bool((batch["pixels"] == 255).flatten(1).all(1).any())
        return {name: value * (float("nan") if white else 1) for name, value in forward(self, batch).items()}

    monkeypatch.setattr(BlipTask, "forward", poisoned)
    recipe = tiny_recipe("blip", "loop.micro_batch_size=2", "loop.batch_size=4")
    with pytest.raises(RsedgeError, match=r"the loss is nan at step \d, on the images ") as caught:
        train(recipe, tmp_path / "run", data=with_image(White(), "train"), cpu=True, trackers=())
    text = str(caught.value)
    assert text.count("plain/") == 4
    assert "plain/013.png" in text
    order = enumerate(Order(24, 4, 4).batches(0, 6), start=1)
    assert f"step {next(step for step, chunk in order if (0, 13) in chunk)}," in text


@dataclass(frozen=True)
class Deadly:
    """An image whose reading ends the worker, as the kernel does where memory is short."""

    def read(self) -> np.ndarray:
        assert torch.utils.data.get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_worker_that_dies_is_told_with_what_to_do(split, tmp_path):
    recipe = tiny_recipe("clip", "data.workers=1")
    with pytest.raises(BackendError, match=r"reads images was killed .*lower .*data.workers .*--resume"):
        train(recipe, tmp_path / "run", data=with_image(Deadly(), split), cpu=True, trackers=())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_is_named_without_a_traceback(workers, tmp_path: Path):
    recipe, data = tiny_recipe("clip", f"data.workers={workers}"), with_image(FileImage(tmp_path / "gone.png"), "train")
    with pytest.raises(SceneError) as caught:
        train(recipe, tmp_path / "run", data=data, cpu=True, trackers=())
    assert str(caught.value) == f"{tmp_path / 'gone.png'} cannot be read: No such file or directory"
