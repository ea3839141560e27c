"""Small files that ask for much are refused from their headers: within 2 s and 300 MB."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import scenes
from tests.security.bombs import BOMBS

ROOT = Path(__file__).resolve().parents[2]
USES = ("info", "caption")
SECONDS, MEGABYTES = 2.0, 300.0
LIGHT = frozenset({"png-text"})
"""What need not be refused, because reading it may cost as little: only the limits count."""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resource.getrusage counts in other units elsewhere")


@dataclass(frozen=True)
class Taken:
    """What a command took: exit code, what it said, seconds of all CPUs, peak of resident memory."""

    code: int
    stderr: str
    cpu_s: float
    peak_mb: float


def measure(use: str, path: Path, folder: Path) -> Taken:
    """Run ``rsedge info`` or ``rsedge caption`` on a file, in a folder for what it writes."""
    more = ["--no-probe"] if use == "info" else ["-o", str(folder / "out.geojson")]
    command = [sys.executable, "-m", "tests.security.measure", sys.executable, "-m", "rsedge", use, str(path), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), "TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=True)
    return Taken(**json.loads(done.stdout))


@pytest.fixture(scope="module")
def start_up(tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """What a harmless scene takes."""
    folder = tmp_path_factory.mktemp("start-up")
    scene = scenes.write(folder / "scene.tif", scenes.pixels(3, 224, 224), photometric="RGB")
    runs = [measure("info", scene, folder) for _ in range(2)]
    assert [run.code for run in runs] == [0, 0], runs[0].stderr
    return min(runs, key=lambda run: run.cpu_s)


@pytest.fixture(scope="module", params=BOMBS)
def bomb(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("bomb")
    yield BOMBS[request.param](folder)
    shutil.rmtree(folder)


def test_a_bomb_is_refused_from_its_headers(bomb, start_up, tmp_path, request):
    folders = [tmp_path / use for use in USES]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(measure, USES, [bomb] * 2, folders))
    light = request.node.callspec.params["bomb"] in LIGHT
    for use, taken, folder in zip(USES, runs, folders, strict=True):
        # A picture that only Pillow reads is one record, whose status tells why it was not read.
        picture = request.node.callspec.params["bomb"] == "bmp"
        assert taken.code in ((0, 1, 2, 3) if light else (1, 2, 3) if picture else (1, 2)), (
            f"{use} ended with {taken.code}: {taken.stderr}"
        )
        assert "Traceback" not in taken.stderr
        assert "error in rsedge" not in taken.stderr
        assert taken.code == 0 or bomb.name in taken.stderr
        assert taken.cpu_s <= start_up.cpu_s + SECONDS
        assert taken.peak_mb <= max(MEGABYTES, start_up.peak_mb)
        assert taken.code in (0, 3) or list(folder.rglob("*.geojson*")) == []
