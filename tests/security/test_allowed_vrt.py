"""What ``--allow-vrt`` allows: sources below the VRT's folder, and elsewhere only below ``--allow-root``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.security.places import Case, Place, vrt
from tests.security.runner import Outcome, Runner

USES = ("info", "caption", "embed")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("vrt") / "ground")
    yield runner
    runner.close()


def _below(place: Place) -> str:
    place.copy("tif", "bands/own.tif")
    return vrt("bands/own.tif", relative=True)


def _absolute(place: Place) -> str:
    return vrt(str(place.copy("tif", "own.tif")))


def _another_format(base: str) -> Callable[[Place], str]:
    def make(place: Place) -> str:
        place.copy(base, f"own.{base}")  # type: ignore[arg-type]
        return vrt(f"own.{base}", relative=True)

    return make


def _run(runner: Runner, name: str, text: Callable[[Place], str], *options: str, own: str = "tif") -> list[Outcome]:
    case = Case(name, "VRT", lambda place: place.write("scene.vrt", text(place)), own=own, uses=USES, options=options)  # type: ignore[arg-type]
    return runner.run([case])


@pytest.mark.parametrize(
    ("name", "text", "own"),
    [
        ("below", _below, "tif"),
        ("absolute", _absolute, "tif"),
        ("jp2", _another_format("jp2"), "jp2"),
        ("png", _another_format("png"), "any"),  # the VRT adds the place that the picture lacks
    ],
)
def test_sources_below_the_folder_are_read(runner, name, text, own):
    outcomes = _run(runner, f"ok-{name}", text, "--allow-vrt", own=own)
    assert {outcome.use: (outcome.code, outcome.faults) for outcome in outcomes} == dict.fromkeys(USES, (0, []))


def test_sources_of_other_formats_are_refused(runner):
    for outcome in _run(runner, "webp", _another_format("webp"), "--allow-vrt", own=""):
        assert outcome.faults == []
        assert outcome.use == "embed" or "own.webp" in outcome.stderr


def test_without_the_option_it_is_refused(runner):
    for outcome in _run(runner, "not-allowed", _below, own=""):
        assert outcome.code in (1, 2, 3)
        assert outcome.faults == []
        assert outcome.use == "embed" or "--allow-vrt" in outcome.stderr


def test_a_source_elsewhere_wants_a_root(runner):
    def outside(place: Place) -> str:
        return vrt(place.secret)

    for outcome in _run(runner, "outside", outside, "--allow-vrt", own=""):
        assert outcome.code in (1, 2, 3)
        assert outcome.faults == []
        assert outcome.use == "embed" or "--allow-root" in outcome.stderr
    root: Path = runner.ground.outside
    for outcome in _run(runner, "rooted", outside, "--allow-vrt", "--allow-root", str(root), own="any"):
        assert outcome.code == 0, outcome.stderr
        assert outcome.use == "info" or f"read {root / 'secret.tif'}" in outcome.touched
