"""Full, read-only and limited disks."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rsedge.errors import OutputError
from rsedge.runtime.outputs import files, rasters
from rsedge.runtime.run.pipeline import run
from rsedge.runtime.scenes.opening import open_scenes
from tests.fakes import FakeCaptioner
from tests.faults.machine import ENVIRONMENT, caption, done, segments, write_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """16 × 16 tiles of 16 pixels: 4 segments."""
    return write_scene(tmp_path_factory.mktemp("scene") / "scene.tif", 256)


def on_small_disk(folder, kib, *commands):
    """Run commands where ``folder`` is a file system of ``kib`` KiB, in one mount namespace."""
    mount = f"mount -t tmpfs -o size={kib}k none {shlex.quote(str(folder))} || exit 99"
    lines = [mount, *(command if isinstance(command, str) else shlex.join(command) for command in commands)]
    found = subprocess.run(
        ["unshare", "-rm", "sh", "-c", "\n".join(lines)],
        env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    if found.returncode == 99 or "unshare" in found.stderr:
        pytest.skip("no file system can be mounted here")
    return found


def test_too_little_room_is_found_before_inference(tmp_path, scene):
    found = on_small_disk(tmp_path, 64, caption(scene, "-o", tmp_path / "out.geojson"))
    assert found.returncode == 1
    assert "MiB of room, and this run writes" in found.stderr
    assert "Traceback" not in found.stderr


def test_full_disk_keeps_the_output_and_the_journal(tmp_path, scene):
    """The journal of 256 tiles takes some 130 KB, the output as much again."""
    output = tmp_path / "out.geojson"
    command = caption(scene, "-o", output, "--overwrite", "--json")
    name = shlex.quote(str(output))
    found = on_small_disk(
        tmp_path,
        112,
        f"echo precious > {name}",
        command,
        f"echo code $? >&2; cat {name}; ls -A {shlex.quote(str(tmp_path))}",
        f"mount -o remount,size=4m {shlex.quote(str(tmp_path))}",
        command,
    )
    assert "code 1" in found.stderr
    assert "cannot be written: No space left on device" in found.stderr
    before, _, summary = found.stdout.partition("{")
    assert before.split() == ["precious", "out.geojson", "out.geojson.journal"]
    assert '"resumed_tiles": 0' not in summary
    assert '"ok": 256' in summary
    assert found.returncode == 0


@pytest.mark.parametrize("name", ["out.geojson", "out.csv", "out.gpkg", "out.parquet"])
def test_file_limit_keeps_the_output_and_the_journal(tmp_path, scene, name):
    output = tmp_path / name
    output.write_text("precious")
    limited = done(caption(scene, "-o", output, "--overwrite"), {resource.RLIMIT_FSIZE: 60_000})
    assert (limited.returncode, "Traceback" in limited.stderr) == (1, False)
    assert "cannot be written: File too large" in limited.stderr
    assert output.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.journal"]
    kept = segments(output)
    assert kept > 0
    again = done(caption(scene, "-o", output, "--overwrite", "--json"))
    assert f'"resumed_tiles": {64 * kept}' in again.stdout, again.stderr


@pytest.mark.parametrize("name", ["out.geojson", "out.gpkg", "out.parquet"])
def test_output_that_does_not_fit(tmp_path, scene, name, monkeypatch):
    """Every write of the output fails in turn, in process: the output before stays, the journal is whole."""
    output = tmp_path / name
    output.write_text("precious")
    fail = files.os.fsync

    def full(handle):
        if Path(f"/proc/self/fd/{handle}").readlink().suffix == ".tmp":
            raise OSError(28, "No space left on device")
        fail(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        run(open_scenes([scene]), FakeCaptioner(16), output, tile_size=16, overwrite=True)
    monkeypatch.undo()
    assert output.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.journal"]
    assert run(open_scenes([scene]), FakeCaptioner(16), output, tile_size=16, overwrite=True).resumed_tiles == 256


class Losing:
    """A raster of GDAL's that drops what is written, as its driver did on a full disk."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.dataset.close()

    def write(self, _):
        pass


def test_a_raster_that_gdal_wrote_incompletely(tmp_path, scene, monkeypatch):
    output = tmp_path / "heat.tif"
    values = {"scene": open_scenes([scene])[0], "cells": rasters.Cells(step=64), "tags": {}}
    heat = np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    rasters.write_heat(output, heat, ["a"], **values)
    before = output.read_bytes()

    class Memory(rasters.MemoryFile):
        def open(self, **options):
            opened = super().open(**options)
            return Losing(opened) if options else opened

    monkeypatch.setattr(rasters, "MemoryFile", Memory)
    with pytest.raises(OutputError, match="did not write the whole raster"):
        rasters.write_heat(output, heat + 1, ["a"], **values)
    assert output.read_bytes() == before


def test_room_is_checked_per_disk(tmp_path, monkeypatch):
    free = 1000
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    files.check_room({tmp_path / "a": 500, tmp_path / "b": 500})
    with pytest.raises(OutputError, match="free space or choose another folder"):
        files.check_room({tmp_path / "a": 500, tmp_path / "b": 501})


def test_read_only_folder(tmp_path, scene):
    inside = tmp_path / "inside"
    inside.mkdir()
    found = on_small_disk(
        inside, 64, f"mount -o remount,ro {shlex.quote(str(inside))}", caption(scene, "-o", inside / "out.csv")
    )
    assert found.returncode == 1
    assert "read-only" in found.stderr.lower()
    assert "Traceback" not in found.stderr
