"""The watchers see what they are for: GDAL with nothing in its way follows what the same inputs name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.security import watch
from tests.security.catalog import CASES
from tests.security.places import Case
from tests.security.runner import Outcome, Runner, run_all

READS = (
    "vrt-absolute", "vrt-vsizip", "vrt-raw-decoy", "vrt-srs-grid", "stacit-local-as.tif", "isis3-as.tif",
    "dimap-as.tif", "aux-overview", "aux-grid", "beside.ovr-vrt-tif",
    "linked-holiday.tif.msk", "tag-overview", "two-faced-vrt-jpg",
)  # fmt: skip
ASKS = (
    "vrt-vsicurl",
    "vrt-http6",
    "wms-tms-as.tif",
    "wmts-as.tif",
    "wcs-as.tif",
    "index-remote-as.tif",
    "aux-overview-http",
)
WRITES = ("mrf-cache-as.tif", "mrf-index-as.tif", "wms-cache-as.tif")
HARMLESS = Case("harmless", "harmless", lambda place: place.copy("tif", "holiday.tif"), own="tif")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What GDAL does with each, by name."""
    cases = [CASES[name] for name in (*READS, *ASKS, *WRITES, "vrt-raw-hostname")]
    found = run_all(cases, tmp_path_factory.mktemp("raw"), uses=("raw",))
    return {name: outcomes[0] for name, outcomes in found.items()}


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    runner = Runner(tmp_path / "ground")
    yield runner
    runner.close()


@pytest.mark.parametrize(
    ("names", "sign", "most"),
    [(READS, "read /", 10), (ASKS, "asked for /", 5), (WRITES, "/victim/", 2)],
    ids=["reads", "asks", "writes"],
)
def test_gdal_alone_is_seen_to_follow(raw, names, sign, most):
    """Not all of them everywhere: a version of GDAL may have mended one or lack a driver."""
    seen = [name for name in names if any(sign in line for line in raw[name].touched)]
    assert len(seen) >= most, {name: raw[name].touched for name in names}


def test_a_trace_tells_the_same(raw):
    if watch.strace() is None:
        pytest.skip("strace is not on PATH, or may not trace here")
    for name, sign in (
        ("vrt-absolute", "secret.tif"),
        ("vrt-vsicurl", "AF_INET"),
        ("vrt-raw-hostname", "/etc/hostname"),
    ):
        assert any(line.startswith("traced") and sign in line for line in raw[name].touched)


def test_a_harmless_scene_touches_nothing(runner):
    outcomes = runner.run([HARMLESS])
    assert {outcome.use: outcome.faults for outcome in outcomes} == {key: [] for key in HARMLESS.uses}
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes)
    assert outcomes[0].captions


def test_what_another_process_opens_is_seen(runner):
    secret = runner.ground.outside / "secret.tif"
    decoys = watch.Inotify([runner.ground.outside])
    assert decoys.events() == []
    subprocess.run([sys.executable, "-c", f"open({str(secret)!r}, 'rb').read(1)"], check=True)
    assert f"read {secret}" in decoys.events()
    decoys.close()


def test_what_is_written_beside_an_input_is_seen(tmp_path):
    (tmp_path / "input.tif").write_bytes(b"x")
    before = watch.snapshot([tmp_path])
    (tmp_path / "input.tif.aux.xml").write_bytes(b"")
    (tmp_path / "input.tif").write_bytes(b"y")
    assert watch.changes(before, watch.snapshot([tmp_path])) == [
        f"made {tmp_path}/input.tif.aux.xml", f"changed {tmp_path}/input.tif"
    ]  # fmt: skip
