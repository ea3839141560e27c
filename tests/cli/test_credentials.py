"""Credentials given to a run as a user gives them, looked for in every file it writes and in all it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rsedge.cli.main import run
from rsedge.runtime.captioner import Captioner
from tests import scenes
from tests.range_server import RangeServer, serve
from tests.runtime.test_stac import item

SECRET = "c0rrect-h0rse-battery"
QUERY = f"X-Amz-Credential=AKIA{SECRET}&X-Amz-Signature={SECRET}&v=1"
ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": f"aws-{SECRET}",
    "HF_TOKEN": f"hf_{SECRET}",
    "GDAL_HTTP_USERPWD": f"someone:{SECRET}",
    "GDAL_HTTP_HEADERS": f"X-Own: own-{SECRET}",
}
# As `rsedge` starts, but giving up soon.
IMPATIENT = (
    "import sys\nfrom rsedge.runtime.scenes import remote\n"
    "for name, value in dict(attempts=2, timeout=0.5, delay=0.01).items():\n"
    "    object.__setattr__(remote.PATIENCE, name, value)\n"
    "from rsedge.cli.main import main\nmain()"
)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    scenes.write(folder / "scene.tif", scenes.pixels(3, 70, 150), tiled=True, blockxsize=64, blockysize=64)
    scenes.truncate(scenes.write(folder / "broken.tif", scenes.pixels(3, 300, 300)), 0.4)
    (folder / "none.tif").write_text("no raster at all")
    with serve(folder) as served:
        served.query = QUERY
        yield served


def rsedge(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process and a folder of its own, where nothing but what it writes lies."""
    return subprocess.run(
        [sys.executable, "-c", IMPATIENT, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **ENVIRONMENT, "CPL_DEBUG": "OFF"},
    )


def check_secret(folder: Path, done: subprocess.CompletedProcess[str], *, files: int | None = None) -> None:
    assert SECRET not in done.stdout + done.stderr
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert [path.name for path in written if SECRET.encode() in path.read_bytes()] == []
    if files is not None:
        assert len(written) == files, written


def url(server: RangeServer, name: str, user: str = "") -> str:
    return server.url(name).replace("://", f"://{user}@" if user else "://")


def arguments(target: str) -> list[str]:
    views = ["--html", "r.html", "--sheet", "s.png", "--stac", "i.json", "--json"]
    return ["--debug", "caption", target, "--allow-remote", "--allow-host", "127.0.0.1", "-o", "o.geojson", *views]


def properties(path: Path) -> list[dict[str, Any]]:
    return [feature["properties"] for feature in json.loads(path.read_text("utf-8"))["features"]]


@pytest.fixture
def work(tmp_path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_a_signed_scene_leaves_no_signature(server, work):
    done = rsedge(work, *arguments(url(server, "scene.tif")))
    assert done.returncode == 0, done.stderr
    check_secret(work, done, files=6)
    assert server.base in (work / "o.geojson.config.toml").read_text("utf-8")  # the address itself is told
    assert json.loads(done.stdout)["scenes"] == 1
    done = rsedge(work, "info", url(server, "scene.tif"), "--allow-remote", "--no-probe", "--json")
    assert done.returncode == 0
    check_secret(work, done)


def test_signed_assets_of_an_item_leave_no_signature(server, work, tmp_path):
    bands = [{"name": name, "common_name": name} for name in ("red", "green", "blue")]
    asset = {"href": url(server, "scene.tif"), "type": "image/tiff", "roles": ["visual"], "eo:bands": bands}
    (tmp_path / "item.json").write_text(json.dumps(item({"visual": asset})))
    done = rsedge(work, *arguments("../item.json"))
    assert done.returncode == 0, done.stderr
    check_secret(work, done, files=6)
    server.fail(403, times=float("inf"))
    done = rsedge(work, *arguments("../item.json"), "--overwrite")
    assert done.returncode == 1
    assert "403" in done.stderr
    check_secret(work, done, files=6)


@pytest.mark.parametrize("user", ["", f"someone:{SECRET}", SECRET])
@pytest.mark.parametrize("fault", ["403", "404", "stall", "drop", "broken", "none"])
def test_failures_tell_no_credential(server, work, fault, user):
    name = {"404": "not-there.tif", "broken": "broken.tif", "none": "none.tif"}.get(fault, "scene.tif")
    if fault == "403":
        server.fail(403, times=float("inf"))
    elif fault == "stall":
        server.stall(3)
    elif fault == "drop":
        server.drop(times=float("inf"))
    done = rsedge(work, *arguments(url(server, name, user)))
    assert done.returncode in (1, 3)
    check_secret(work, done)
    if done.returncode == 1:
        assert "Traceback" in done.stderr
        assert server.base.removeprefix("http://") in done.stderr  # which address is told
    else:
        assert {row["status"] for row in properties(work / "o.geojson")} >= {"read_error"}
    assert "ERROR 1:" not in done.stderr  # GDAL's own, past everything that cleans


def test_options_and_configurations_hide_what_was_typed(server, work):
    target = f"https://someone:{SECRET}@127.0.0.1:9/x.json?sig={SECRET}"
    (work.parent / "c.toml").write_text(f'scl = "{target}"\nmodel = "{target}"\n')
    scenes.write(work.parent / "a.tif", scenes.pixels(3, 40, 40))
    for more in (
        ["--scl", target],
        ["-m", target],
        ["--config", "../c.toml"],
        ["--aoi-no-such", target],
        ["-o", target],
    ):
        for debug in ([], ["--debug"]):
            done = rsedge(work, *debug, "caption", "../a.tif", *more)
            assert done.returncode in (1, 2), done.stdout
            check_secret(work, done, files=0)
    done = rsedge(work, "doctor", "-m", target)
    assert done.returncode == 1
    check_secret(work, done, files=0)


class _Client:
    """Something whose representation tells what it was made with."""

    def __repr__(self) -> str:
        return f"Client(headers={{'authorization': 'Bearer {SECRET}'}}, url='https://u:{SECRET}@h/a?sig={SECRET}')"


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_chained_errors_of_libraries_tell_no_credential(tmp_path, monkeypatch, capsys, debug):
    monkeypatch.chdir(tmp_path)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    def fail(*_args: object, **_options: object) -> None:
        try:
            raise OSError(f"403 for {_Client()!r}, sent {ENVIRONMENT['AWS_SECRET_ACCESS_KEY']}")
        except OSError as error:
            raise ValueError(f"{error}: someone:{SECRET}") from error

    monkeypatch.setattr(Captioner, "load", fail)
    scenes.write(tmp_path / "a.tif", scenes.pixels(3, 40, 40))
    assert run([*debug, "caption", "a.tif"]) == 1
    told = "".join(capsys.readouterr())
    assert SECRET not in told
    assert "https://***@h/a?sig=***" in told
    assert ("OSError: 403 for Client(" in told) == bool(debug)
    assert ("The above exception was the direct cause" in told) == bool(debug)


def test_logs_and_warnings_of_libraries_tell_no_credential(tmp_path):
    code = (
        "import logging, threading, warnings\n"
        "from rsedge.cli import main as entry\n"
        "def fail(): raise OSError(text)\n"
        "def work(**_):\n"
        "    logging.getLogger('rasterio._err').error('GDAL signalled: %s', text)\n"
        "    try: fail()\n"
        "    except OSError: logging.getLogger('urllib3').exception('failed')\n"
        "    warnings.warn(text)\n"
        "    thread = threading.Thread(target=fail); thread.start(); thread.join()\n"
        "import rsedge.cli.demo as demo\n"
        f"text = 'https://u:{SECRET}@h/a?sig={SECRET} {ENVIRONMENT['HF_TOKEN']}'\n"
        "demo.command.callback = work\n"
        "entry.main(['demo'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **ENVIRONMENT},
    )
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert done.stderr.count("https://***@h/a?sig=*** ***") == 4
