"""The command line under a fault: limits, full disks, signals."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import scenes

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def write_scene(path: Path, side: int, seed: int = 0) -> Path:
    """An RGB scene of side × side pixels in compressed blocks of 64."""
    blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
    return scenes.write(path, scenes.pixels(3, side, side, seed=seed), photometric="RGB", **blocks)


def caption(*arguments: object) -> list[str]:
    """The command that captions in tiles of 16 pixels with the tiny model of the self-test."""
    model = REPOSITORY / "rsedge" / "builtin" / "selftest.rsedge"
    options = f"--device cpu --tile-size 16 --beams 1 --max-new-tokens 4 --threads 1 -m {model}".split()
    return [sys.executable, "-m", "rsedge", "caption", *options, *map(str, arguments)]


def done(command: list[str], limits: dict[int, int] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command, under limits of ``resource``."""

    def limit() -> None:
        for kind, value in (limits or {}).items():
            resource.setrlimit(kind, (value, value))

    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120, preexec_fn=limit
    )


def started(command: list[str]) -> subprocess.Popen[str]:
    """Start a command that receives signals also where the tests run in the background of a shell."""

    def receive() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True, preexec_fn=receive)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until a condition holds; fail if the process ends before."""
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    pytest.fail("the condition never held")


def segments(output: Path) -> int:
    """Number of finished segments in the journal of an output."""
    journal = output.with_name(f"{output.name}.journal")
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0
