"""Scenes outside the imagery that a model was trained on: one warning each, with the remedy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from rasterio.transform import from_origin

from rsedge.errors import BundleError
from rsedge.manifest import Domain
from rsedge.runtime.run.pipeline import run
from rsedge.runtime.scenes.scene import Scene
from tests import scenes
from tests.fakes import FakeCaptioner
from tests.safe_products import write_safe

TEN = Domain(resolution=(10.0, 10.0), surface_reflectance=True)


@pytest.mark.parametrize(
    ("crs", "size", "said"),
    [
        ("EPSG:32634", 1, "1 m per pixel; --resolution 10 resamples"),
        ("EPSG:32634", 100, "100 m per pixel"),
        ("EPSG:4326", 1e-5, "1.11 m per pixel; --resolution 8.98e-05"),
        ("EPSG:2263", 3.28084, "1 m per pixel; --resolution 32.8"),  # feet
        ("EPSG:32634", 10, None),
        ("EPSG:32634", 12, None),
    ],
)
def test_ground_resolution(tmp_path, crs, size, said):
    place = from_origin(10, 50, size, size) if crs == "EPSG:4326" else from_origin(500000, 5700000, size, size)
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 30, 30), photometric="RGB", crs=crs, transform=place)
    doubt = Scene.open(path).outside(TEN)
    assert (doubt is None) if said is None else said in doubt


def test_reflectance_above_the_atmosphere_and_grey_pictures(tmp_path):
    assert "level L1C" in Scene.open(write_safe(tmp_path, seed=1, size=60, level="L1C").path).outside(TEN)
    assert Scene.open(write_safe(tmp_path, seed=1, size=60, level="L2A").path).outside(TEN) is None
    for name, said in (("LC08_L1TP_193023_20230823_20230902_02_T1", True), ("x_3B_AnalyticMS_SR_8b", False),
                       ("x_3B_AnalyticMS_8b", True)):  # fmt: skip
        path = scenes.write(tmp_path / f"{name}.tif", scenes.pixels(3, 20, 20), photometric="RGB")
        assert ("not reflectance at the surface" in str(Scene.open(path).outside(TEN))) is said
    grey = Scene.open(scenes.write(tmp_path / "g.tif", scenes.pixels(1, 20, 20)))
    assert "grey" in grey.outside(TEN)
    assert grey.outside(None) is None


def test_a_run_warns_once(tmp_path):
    path = scenes.write(
        tmp_path / "a.tif", scenes.pixels(3, 60, 60), photometric="RGB", transform=from_origin(500000, 5700000, 1, 1)
    )
    captioner = FakeCaptioner(16)
    captioner.domain = TEN
    summary = run([Scene.open(path)], captioner, tmp_path / "out.csv", tile_size=16)
    assert sum("trained on 10 m per pixel" in warning for warning in summary.warnings) == 1
    coarse = run([Scene.open(path, resolution=10)], captioner, tmp_path / "10.csv", tile_size=16)
    assert not coarse.warnings


@pytest.mark.parametrize("resolution", [(0, 10), (10, 1), (float("nan"), 10), (10,), (), (1, 2, 3)])
def test_a_domain_has_metres(resolution):  # a single number was found by fuzzing
    with pytest.raises(BundleError, match="metres above 0"):
        dataclasses.replace(TEN, resolution=resolution)


def test_the_built_in_model_states_its_domain():
    from rsedge.bundle import read_bundle
    from rsedge.cli.config import built_in_model

    manifest = read_bundle(built_in_model()).manifest
    assert manifest.domain == TEN
    assert np.isclose(manifest.generation.repetition_penalty, 1.3)
