"""The report, as a file and as a person sees it: in Chromium, where there is one."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rsedge.errors import OptionError, OutputError
from rsedge.runtime.demo.scene import write_scene
from rsedge.runtime.outputs.records import TileRecord, TileResult
from rsedge.runtime.outputs.report.report import report_target
from rsedge.runtime.run.pipeline import caption_scene
from rsedge.runtime.scenes.scene import Scene
from rsedge.texts import plain
from tests.browser import chromium, opened
from tests.fakes import FakeCaptioner
from tests.scenes import pixels, write

HOSTILE = [
    "</script><img src=x onerror=alert(1)><script>alert(2)</script>",
    "<!-- <script> ]]> &lt;b&gt; \" ' ` ${1+1}",
    '=HYPERLINK("http://example.com")',
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f line\u2028para\u2029 surrogate \ud800 end",
    "\u202egnidaer desrever\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "long " + "w" * 1995,
    "two\nlines",
    "__proto__",
]


def record(row: int, col: int, *, side: int = 64, **values) -> TileRecord:
    base = TileRecord(
        scene="a",
        row=row,
        col=col,
        row_off=row * side,
        col_off=col * side,
        width=side,
        height=side,
        geometry=None,
        caption="fields",
        score=-0.25,
        status="ok",
        nodata_fraction=0.0,
        cloud_fraction=None,
        datetime=None,
        model="m@0123456789ab",
    )
    return replace(base, **values)


def report(path, scenes, records):
    """The file for records of scenes; ``records`` has a list per scene."""
    with report_target(path, scenes).open() as writer:
        for scene, mine in zip(scenes, records, strict=True):
            writer.write([TileResult(each, scene.source) for each in mine])
    return path


def held(path) -> dict:
    """The data in a report."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture
def scene(tmp_path):
    return Scene.open(write(tmp_path / "a.tif", pixels(3, 192, 256)))


@pytest.fixture
def four(scene):
    """Twelve tiles, a row of them of other statuses."""
    records = [record(row, col, caption=f"forest {row}-{col}") for row in range(2) for col in range(4)]
    others = [("nodata", "no pixel has data"), ("cloud", "80 % cloud"), ("read_error", "bad block")]
    records += [
        record(2, col, caption=None, score=None, status=status, message=message)
        for col, (status, message) in enumerate(others)
    ]
    return [*records, record(2, 3, caption="a lake")]


# ---- the file


def test_it_holds_each_scene_with_its_tiles_and_picture(tmp_path, scene):
    other = Scene.open(write(tmp_path / "b.tif", pixels(3, 64, 128)))
    place = {"type": "Polygon", "coordinates": [[[9, 44], [9.02, 44], [9.02, 44.01], [9, 44.01], [9, 44]]]}
    facts = {"product_id": "S2A_X", "mgrs_tile": "32TNR", "scene_crs": "EPSG:32632", "rendering": "as it is"}
    first = [record(0, 0, geometry=place, **facts), record(0, 1)]
    data = held(report(tmp_path / "r.html", [scene, other], [first, [record(0, 0, scene="b", scene_crs="pixel")]]))
    one, two = data["scenes"]
    tiles = [dict(zip(data["fields"], values, strict=True)) for values in one["tiles"]]
    assert [tile["col_off"] for tile in tiles] == [0, 64]
    assert (tiles[0]["lon"], tiles[0]["lat"]) == (9.01, 44.005)
    assert (tiles[1]["lon"], tiles[1]["caption"], tiles[1]["score"]) == (None, "fields", -0.25)
    assert [one[name] for name in ("product", "mgrs", "crs", "rendering", "model")] == [
        "S2A_X",
        "32TNR",
        "EPSG:32632",
        "as it is",
        "m@0123456789ab",
    ]
    assert (two["name"], len(two["tiles"]), two["crs"]) == ("b", 1, "none: positions are pixels")
    picture = Image.open(io.BytesIO(base64.b64decode(one["picture"].removeprefix("data:image/webp;base64,"))))
    assert picture.size == (256, 192)
    assert np.abs(np.asarray(picture.convert("RGB"), int).mean() - pixels(3, 192, 256).mean()) < 3


@pytest.mark.parametrize(
    ("polygons", "expected"),
    [
        ([[[179.9, 1], [180, 1], [180, 2], [179.9, 2]], [[-180, 1], [-179.7, 1], [-179.7, 2], [-180, 2]]], -179.9),
        ([[[179.5, 1], [180, 1], [180, 2], [179.5, 2]], [[-180, 1], [-179.9, 1], [-179.9, 2], [-180, 2]]], 179.8),
    ],
)
def test_the_middle_of_a_tile_on_the_antimeridian_is_there(tmp_path, scene, polygons, expected):
    geometry = {"type": "MultiPolygon", "coordinates": [[[*ring, ring[0]]] for ring in polygons]}
    data = held(report(tmp_path / "r.html", [scene], [[record(0, 0, geometry=geometry)]]))
    assert data["scenes"][0]["tiles"][0][-2:] == [expected, 1.5]


def test_scenes_of_one_name_or_one_file_are_told_apart(tmp_path):
    paths = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "a.tif", pixels(3, 64, 128)))
    scenes = [Scene.open(path) for path in (paths[0], paths[1], paths[1])]
    records = [[record(0, 0, caption=f"scene {k}"), record(0, 1, caption=f"scene {k}")] for k in range(3)]
    data = held(report(tmp_path / "r.html", scenes, records))
    captions = [{tile[data["fields"].index("caption")] for tile in entry["tiles"]} for entry in data["scenes"]]
    assert captions == [{"scene 0"}, {"scene 1"}, {"scene 2"}]


def test_the_same_records_give_the_same_bytes_and_nothing_comes_from_outside(tmp_path, scene, four):
    first = report(tmp_path / "a.html", [scene], [four]).read_bytes()
    assert report(tmp_path / "b.html", [scene], [four]).read_bytes() == first
    text = first.decode()
    outside = set(re.findall(r"https?://[^\s\"'<]+", text)) - {"http://www.w3.org/2000/svg"}
    assert outside == set()
    assert not re.search(r'(?:src|href)="(?!data:)', text)


def test_its_policy_lets_only_its_own_style_and_script_in(tmp_path, scene, four):
    text = report(tmp_path / "a.html", [scene], [four]).read_text(encoding="utf-8")
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for name, tag in (("style-src", "style"), ("script-src", "script")):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    assert "unsafe" not in policy


def test_captions_come_back_from_the_file_as_they_were(tmp_path, scene):
    records = [record(0, col, caption=text) for col, text in enumerate(HOSTILE)]
    path = report(tmp_path / "r.html", [scene], [records])
    text = path.read_text(encoding="utf-8")
    block = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert not re.search(r"[<>&\x00-\x1f\u0080-\U0010ffff]", block)
    data = held(path)
    assert [tile[data["fields"].index("caption")] for tile in data["scenes"][0]["tiles"]] == list(map(plain, HOSTILE))


def test_a_scene_that_is_gone_leaves_its_results(tmp_path, scene, four):
    (tmp_path / "a.tif").unlink()
    data = held(report(tmp_path / "r.html", [scene], [four]))["scenes"][0]
    assert data["picture"] is None
    assert "no picture: " in data["warnings"][-1]
    assert len(data["tiles"]) == 12


def test_what_cannot_be_is_refused(tmp_path, scene):
    with pytest.raises(OptionError, match=r"r\.txt.*end its name in \.html"):
        report_target(tmp_path / "r.txt", [scene])
    with pytest.raises(OptionError, match="longest is 0"):
        report_target(tmp_path / "r.html", [scene], longest=0)
    with pytest.raises(OutputError, match="not a folder"):
        report(tmp_path / "absent" / "r.html", [scene], [[]])
    stranger = TileResult(record(0, 0, scene="z"), "z.tif")
    with pytest.raises(ValueError, match="none of the scenes"), report_target(tmp_path / "r.html", [scene]).open() as w:
        w.write([stranger])
    assert not (tmp_path / "r.html").exists()


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def shown(browser, tmp_path, scene, four):
    """The report of twelve tiles in a page; afterwards: nothing was asked for, nothing complained of."""
    path = report(tmp_path / "r.html", [scene], [four])
    with opened(browser, path, viewport={"width": 1200, "height": 800}) as page:
        yield page
    assert page.requests == [path.as_uri()]
    assert page.complaints == []


def tile(page, row: int, col: int):
    return page.locator(f'rect[data-tile="{4 * row + col}"]')


def listed(page) -> list[str]:
    return page.locator("#list li:visible > span:nth-child(2)").all_inner_texts()


def test_every_tile_is_drawn_where_it_lies(shown):
    page = shown.page
    assert page.locator("rect[data-tile]").count() == page.locator("#list li").count() == 12
    picture, last = page.locator("#picture").bounding_box(), tile(page, 2, 3).bounding_box()
    assert picture["width"] / picture["height"] == pytest.approx(256 / 192, rel=0.01)
    for axis, size, place in (("x", "width", 3 / 4), ("y", "height", 2 / 3)):
        assert last[axis] - picture[axis] == pytest.approx(place * picture[size], abs=2)
    assert page.evaluate("document.getElementById('picture').naturalWidth") == 256
    assert page.locator("#count").inner_text() == "12 tiles"


def test_hovering_shows_the_caption_and_a_click_keeps_it(shown):
    page = shown.page
    tile(page, 1, 2).hover()
    assert page.locator("#tip").inner_text().splitlines() == ["row 1, column 2", "forest 1-2"]
    tile(page, 1, 2).click()
    tile(page, 0, 0).hover()
    assert "forest 0-0" in page.locator("#tip").inner_text()
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden()
    assert page.locator("#caption").inner_text() == "forest 1-2"
    assert "−0.2500" in page.locator("#about").inner_text()
    assert page.locator('#list [aria-selected="true"]').count() == 1


def test_a_tile_without_a_caption_says_why(shown):
    page = shown.page
    for col, text in enumerate(("no data: no pixel has data", "cloud: 80 % cloud", "cannot be read: bad block")):
        tile(page, 2, col).click()
        assert page.locator("#caption").inner_text() == text


def test_the_filter_narrows_map_and_list_and_escape_clears_it(shown):
    page = shown.page
    page.keyboard.press("/")
    page.keyboard.type("FOREST 1-")
    assert page.locator("#count").inner_text() == "4 of 12 tiles match"
    assert listed(page) == [f"forest 1-{col}" for col in range(4)]
    assert page.locator("rect.match").count() == 4
    assert page.evaluate("CSS.highlights.get('found').size") == 8
    page.fill("#filter", "nothing of the kind")
    assert page.locator("#none").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#filter").input_value() == ""
    assert len(listed(page)) == 12


def test_the_legend_counts_and_switches_statuses(shown):
    page = shown.page
    assert [text.split() for text in page.locator("#legend label").all_inner_texts()] == [
        ["captioned", "9"],
        ["no", "data", "1"],
        ["cloud", "1"],
        ["cannot", "be", "read", "1"],
    ]
    page.locator('#legend input[value="ok"]').uncheck()
    assert page.locator("#count").inner_text() == "3 of 12 tiles match"
    page.locator('#legend input[value="cloud"]').uncheck()
    assert listed(page) == ["no data: no pixel has data", "cannot be read: bad block"]


def test_the_keyboard_walks_pins_and_says_where(shown):
    page = shown.page
    page.locator("#frame").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
    assert page.locator("#live").inner_text() == "row 1, column 0: forest 1-0"
    assert page.locator("rect.cursor").is_visible()
    assert "forest 1-0" in page.locator("#tip").inner_text()
    page.keyboard.press("Enter")
    assert page.locator("#caption").inner_text() == "forest 1-0"
    page.fill("#filter", "lake")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "list"
    assert page.locator("#list").get_attribute("aria-activedescendant") == "tile-11"
    page.keyboard.press("Enter")
    assert page.locator("#caption").inner_text() == "a lake"
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    assert page.locator("#which").inner_text() == "No tile pinned"
    width = page.locator("#plane").bounding_box()["width"]
    page.locator("#frame").focus()
    page.keyboard.press("+")
    assert page.locator("#plane").bounding_box()["width"] == pytest.approx(1.5 * width, abs=1)


def test_focus_can_be_seen_and_everything_that_acts_has_a_name(shown):
    page = shown.page
    for _ in range(12):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "(e => [e.id || e.value, getComputedStyle(e).outlineStyle, (e.getAttribute('aria-label') || "
            "(e.labels && e.labels[0] || {}).textContent || '').trim()])(document.activeElement)"
        )
        if not focused[0]:
            break
        assert focused[1] != "none", focused
        assert focused[2], focused
    assert page.evaluate("document.querySelectorAll('[id]').length === new Set([...document.querySelectorAll('[id]')]"
                         ".map(e => e.id)).size")  # fmt: skip


def test_the_list_can_be_ordered(shown):
    page = shown.page
    page.select_option("#order", "caption")
    texts = listed(page)
    assert texts[:2] == ["a lake", "forest 0-0"]
    assert texts[-3:] == ["cannot be read: bad block", "cloud: 80 % cloud", "no data: no pixel has data"]


def test_hostile_captions_are_shown_as_text(browser, tmp_path):
    # The file name is hostile as well.
    scene = Scene.open(write(tmp_path / "<img src=x onerror=alert(0)>.tif", pixels(3, 128, 256)))
    records = [
        record(col // 4, col % 4, caption=text, scene=scene.name, product_id="</script><b>")
        for col, text in enumerate(HOSTILE)
    ]
    path = report(tmp_path / "r.html", [scene], [records])
    with opened(browser, path, viewport={"width": 1000, "height": 700}) as seen:
        page = seen.page
        texts = []
        for number in range(len(HOSTILE)):
            tile(page, number // 4, number % 4).click()
            texts.append(page.locator("#caption").evaluate("e => e.textContent"))
        assert page.locator("img").count() == 1
        assert page.locator("b:not(label b):not(.tip b)").count() == 0
        assert page.title() == f"{scene.name} – rsedge"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("#caption").evaluate("e => e.scrollWidth <= e.clientWidth + 1")
    assert [texts[k] for k in (0, 1, 2, 5, 7)] == [HOSTILE[k] for k in (0, 1, 2, 5, 7)]
    assert texts[6] == "two lines"
    assert texts[3] == "nul � bell � escape �[31m delete � line para  surrogate � end"
    assert texts[4] == HOSTILE[4].replace("\u202e", "�").replace("\u202c", "�")
    assert seen.requests == [path.as_uri()]
    assert seen.complaints == []


def test_several_scenes_are_chosen_among(browser, tmp_path, scene):
    other = Scene.open(write(tmp_path / "b.tif", pixels(3, 64, 64)))
    path = report(tmp_path / "r.html", [scene, other], [[record(0, 0)], [record(0, 0, scene="b", caption="a lake")]])
    with opened(browser, path) as seen:
        page = seen.page
        assert page.locator("h1").inner_text() == "a"
        page.select_option("#scene", label="b")
        assert page.locator("h1").inner_text() == "b"
        assert listed(page) == ["a lake"]
    assert seen.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_usable_on_a_phone(browser, tmp_path, scene, four, scheme):
    path = report(tmp_path / "r.html", [scene], [four])
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "color_scheme": scheme}
    with opened(browser, path, **phone) as seen:
        page = seen.page
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        tile(page, 1, 1).tap()
        assert page.locator("#caption").inner_text() == "forest 1-1"
        assert "forest 1-1" in page.locator("#tip").inner_text()
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        page.locator("#closer").tap()
        page.locator("#closer").tap()
        assert page.evaluate("document.documentElement.scrollWidth") == 360, "the map scrolls within itself"
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    assert seen.complaints == []


def test_2401_tiles_are_drawn_and_filtered_at_once(browser, tmp_path):
    scene = Scene.open(write(tmp_path / "a.tif", pixels(3, 784, 784)))
    records = [
        record(row, col, side=16, caption=f"fields with a road and a river near town {row * 49 + col}")
        for row in range(49)
        for col in range(49)
    ]
    path = report(tmp_path / "r.html", [scene], [records])
    assert path.stat().st_size < 3e6
    with opened(browser, path, viewport={"width": 1200, "height": 800}) as seen:
        page = seen.page
        assert page.locator("rect[data-tile]").count() == 2401
        page.fill("#filter", "town 24")
        fitting = sum("24" in str(number) for number in range(2401))
        assert page.locator("#count").inner_text() == f"{fitting} of 2,401 tiles match"
        assert page.locator("#list li:visible").count() == fitting
        page.fill("#filter", "")
        page.locator('rect[data-tile="2400"]').hover()
        assert page.locator("#tip span").inner_text().endswith("town 2400")
    assert seen.complaints == []


def test_it_prints_the_map_and_every_result(browser, tmp_path, scene, four):
    path = report(tmp_path / "r.html", [scene], [four])
    with opened(browser, path) as seen:
        seen.page.emulate_media(media="print")
        assert seen.page.locator("#picture").is_visible()
        assert len(listed(seen.page)) == 12
        assert not seen.page.locator("#filter").is_visible()
        assert seen.page.pdf().startswith(b"%PDF")


def test_a_run_of_a_scene_is_reported(browser, tmp_path):
    scene = Scene.open(write_scene(tmp_path / "land.tif", seed=3, tiles=(2, 3), tile_size=64))
    records = [each for segment in caption_scene(FakeCaptioner(), scene, tile_size=64) for each in segment]
    path = report(tmp_path / "r.html", [scene], [records])
    with opened(browser, path) as seen:
        assert seen.page.locator("rect[data-tile]").count() == 6
        assert "EPSG:32632" in seen.page.locator("#facts").inner_text()
    assert (seen.requests, seen.complaints) == ([path.as_uri()], [])
