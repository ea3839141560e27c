"""What is said on stderr while something trains."""

from __future__ import annotations

import logging
import sys

import pytest

from rsedge.cli import say as progress
from rsedge.runtime.run.pipeline import Progress
from rsedge.training.loop import Event

FOUND = Event(1, 2, 0.5, {"loss": 3.0, "learning_rate": 1e-4})  # of a learning-rate test, which measures no speed
TRAINED = Event(2, 2, 1.0, {**FOUND.values, "samples_per_second": 5.0, "gpu_memory_mb": 1e3})


@pytest.mark.parametrize("terminal", [True, False])
def test_steps_with_and_without_their_speed(terminal, monkeypatch, capsys, caplog):
    caplog.set_level(logging.INFO, "rsedge")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    with progress.training_progress() as observe:
        assert observe is not None
        observe(FOUND)
        observe(TRAINED)
        observe(Event(2, 2, 1.0, stage="validation, 16 of 40 images"))
        observe(Event(2, 2, 1.0, {"val_loss": 2.5}, evaluated=True))
    told = capsys.readouterr().err + caplog.text
    assert "step 2: loss 2.5" in told
    if not terminal:
        assert "step 1 of 2, epoch 0.50  loss 3.0000  lr 0.0001\n" in told
        assert "5.0 images/s  1000 MB" in told
        assert "step 2: validation, 16 of 40 images\n" in told


def test_a_name_is_no_markup(monkeypatch, capsys, caplog):
    caplog.set_level(logging.INFO, "rsedge")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.tile_progress() as observe:
        assert observe is not None
        observe(Progress(scene="[link=http://x]a[/link][bold]b", tiles_done=1, tiles_total=2, tiles_resumed=0))
    assert "[link=http://x]a[/link][bold]b" in capsys.readouterr().err.replace("\n", "")
