"""The parts of the soak, small."""

from __future__ import annotations

from tools import soak


def test_bad_scenes_are_listed_and_all_others_done(tmp_path):
    found = soak.many_scenes(tmp_path, 80)
    assert (found["code"], found["bad"], found["listed"], found["right"]) == (3, 2, 2, True)
    assert found["tiles"] == 79 * 16  # what is no raster is listed and has no record
    assert found["most_handles"] < 64


def test_what_the_soak_refuses():
    part = {"code": 0, "second_quarter_mib": 100, "last_quarter_mib": 100, "most_handles": 9}
    good = {"different": 0, "computed_again": 0, "left_over": []}
    result = {"kills": good, "scenes": {**part, "code": 3, "right": True}, "tiles": part}
    assert soak.problems(result) == []
    result["tiles"] = {**part, "code": 1, "last_quarter_mib": 200, "most_handles": 99}
    result["kills"] = {**good, "different": 1, "left_over": ["a.tmp"]}
    result["scenes"]["right"] = False
    assert len(soak.problems(result)) == 6
