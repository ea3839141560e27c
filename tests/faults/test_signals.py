"""Real interruptions of real runs."""

from __future__ import annotations

import contextlib
import json
import signal

import pytest

from rsedge.cli import main
from rsedge.host import interrupted
from rsedge.runtime.run.pipeline import run
from rsedge.runtime.sandbox.process import support
from rsedge.runtime.scenes.opening import open_scenes
from tests.fakes import FakeCaptioner
from tests.faults.machine import caption, done, segments, started, wait_for, write_scene


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A scene of 48 × 48 tiles, in 36 segments, and its output."""
    folder = tmp_path_factory.mktemp("scene")
    scene = write_scene(folder / "scene.tif", 768)
    found = done(caption(scene, "-o", folder / "whole.csv"))
    assert found.returncode == 0, found.stderr
    return scene, (folder / "whole.csv").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("sandbox", [False, True])
def test_one_signal_keeps_the_finished_tiles(tmp_path, whole, number, sandbox):
    if sandbox and support().problem:
        pytest.skip("no sandbox here")
    output = tmp_path / "out.csv"
    command = caption(whole[0], "-o", output, "--json", *["--sandbox"] * sandbox)
    process = started(command)
    wait_for(lambda: segments(output) > 1, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert f"finished tiles are in {output}.journal; the same command continues from there" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv.journal"]
    kept = segments(output)
    summary = json.loads(done(command).stdout)
    assert summary["resumed_tiles"] == 64 * kept > 0
    assert output.read_bytes() == whole[1]


def test_the_second_signal_ends_at_once(tmp_path):
    """While the first waits for a disk that never answers."""
    script = (
        "import os, signal, threading; from rsedge.cli import main\n"
        "def wait(**_):\n"
        "    try:\n"
        "        print('ready', flush=True); signal.pause()\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted', flush=True); threading.Event().wait()\n"
        "main.cli.main = wait; main.main([])"
    )
    for first, second in ((signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM)):
        process = started([*caption()[:1], "-c", script])
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        assert process.stdout.readline() == "interrupted\n"
        process.send_signal(second)
        assert process.wait(10) == -second


def test_an_interruption_that_python_drops(tmp_path, whole):
    """As it does where the signal comes while a finalizer runs."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    class Dropping(FakeCaptioner):
        def caption_tiles(self, images, keys, *tick):
            with contextlib.suppress(KeyboardInterrupt):
                main._interrupt()
            return super().caption_tiles(images, keys, *tick)

    captioner = Dropping(16)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(open_scenes([whole[0]]), captioner, tmp_path / "out.csv", tile_size=16)
    finally:
        interrupted.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert captioner.batches == [64]
    assert segments(tmp_path / "out.csv") == 1  # and that is kept


def test_ignored_signals_stay_ignored():
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from rsedge.cli import main; main.cli.main = lambda **_: signal.raise_signal(signal.SIGINT); main.main([])"
    )
    assert done([*caption()[:1], "-c", script]).returncode == 0


def test_a_worker_of_a_pool_ends_by_its_own_signal():
    script = (
        "import os, signal, time; from rsedge.cli import main\n"
        "def fork(**_):\n"
        "    reading, writing = os.pipe()\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os.write(writing, b'.'); time.sleep(30); os._exit(9)\n"
        "    os.read(reading, 1); os.kill(child, signal.SIGTERM)\n"
        "    print(os.waitpid(child, 0)[1])\n"
        "main.cli.main = fork; main.main([])"
    )
    found = done([*caption()[:1], "-c", script])
    assert (found.stdout.split(), found.stderr) == ([str(int(signal.SIGTERM))], "")
