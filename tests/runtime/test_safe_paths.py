"""SAFE products that name files outside, zips that are two archives, and products made to fill the memory."""

from __future__ import annotations

import os
import re
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import rasterio

from rsedge.errors import SceneError
from rsedge.runtime.scenes.access import Access
from rsedge.runtime.scenes.catalog import find
from rsedge.runtime.scenes.products import safe
from rsedge.runtime.scenes.products.loose_bands import read_loose_bands
from rsedge.runtime.scenes.products.safe import is_safe, read_safe
from rsedge.runtime.scenes.products.sentinel2 import granule_metadata, product_metadata
from tests import scenes
from tests.measured import measure
from tests.safe_products import SafeProduct, write_safe, zip_safe

SETUP = "from rsedge.runtime.scenes.catalog import find"


@pytest.fixture(scope="module")
def l2a(tmp_path_factory) -> SafeProduct:
    return write_safe(tmp_path_factory.mktemp("l2a"), seed=1, size=64)


@pytest.fixture
def copy(l2a, tmp_path) -> Path:
    return Path(shutil.copytree(l2a.path, tmp_path / l2a.path.name))


# ---- folders ----


@pytest.mark.parametrize("name", ["MTD_MSIL2A.xml", "{granule}/MTD_TL.xml", "B04", "SCL"])
def test_a_link_to_a_file_outside_is_refused(copy, l2a, tmp_path, name):
    file = copy / (l2a.image(name) if len(name) == 3 else name.format(granule=l2a.granule))
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.move(file, outside / "secret")
    file.symlink_to(outside / "secret")
    message = (
        f"{file.relative_to(copy)} in {copy} leads to {outside}/secret, outside of {copy}: .*--allow-root {outside}"
    )
    with pytest.raises(SceneError, match=message):
        read_safe(copy)
    with pytest.raises(SceneError, match="--allow-root"):
        find(str(copy))
    assert read_safe(copy, access=Access(roots=[outside]))


@pytest.mark.parametrize("name", ["GRANULE", "{granule}", "{granule}/IMG_DATA", "{granule}/IMG_DATA/R10m"])
def test_a_link_to_a_folder_outside_is_refused(copy, l2a, tmp_path, name):
    folder = copy / name.format(granule=l2a.granule)
    shutil.move(folder, tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    with pytest.raises(SceneError, match=r"leads to .*outside, outside of|has no granule|lacks B04"):
        read_safe(copy)


def test_a_granule_folder_that_is_a_link_is_not_walked(copy, tmp_path, monkeypatch):
    shutil.rmtree(copy / "GRANULE")
    (copy / "GRANULE").symlink_to("/")
    monkeypatch.setattr(Path, "rglob", None)
    with pytest.raises(SceneError, match=r"GRANULE in .* leads to /, outside of"):
        read_safe(copy)


def test_links_inside_a_product_are_followed(copy, l2a):
    file = copy / l2a.image("B04")
    file.rename(copy / "red.jp2")
    file.symlink_to(os.path.relpath(copy / "red.jp2", file.parent))
    assert read_safe(copy)[0].bands["red"].path == str((copy / "red.jp2").resolve())


def test_a_product_behind_a_link_is_its_own(copy, tmp_path):
    link = tmp_path / "links" / copy.name
    link.parent.mkdir()
    link.symlink_to(copy)
    assert read_safe(link)
    assert find(str(link.parent))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    "name", ["../../outside/T34UCF_B04_10m", "/etc/T34UCF_B04_10m", "/vsicurl/http://127.0.0.1/x_B04_10m"]
)
def test_names_in_the_metadata_only_choose_among_the_files(copy, l2a, tmp_path, name, zipped):
    expected = {Path(band.path).name for band in read_safe(copy)[0].bands.values()}
    metadata = copy / "MTD_MSIL2A.xml"
    text = metadata.read_text()
    metadata.write_text(re.sub(r"<IMAGE_FILE>[^<]*</IMAGE_FILE>", f"<IMAGE_FILE>{name}</IMAGE_FILE>", text))
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(copy / l2a.image("B04"), outside / "T34UCF_B04_10m.jp2")
    path = zip_safe(copy) if zipped else copy
    for product in read_safe(path):
        assert {Path(band.path).name for band in product.bands.values()} == expected
        assert all(str(path) in band.path for band in product.bands.values())
    if not zipped:
        for band in ("B04", "B03", "B02", "TCI"):
            (path / l2a.image(band)).unlink()
        with pytest.raises(SceneError, match="lacks B04"):
            read_safe(path)


def test_bands_beside_each_other_are_confined(tmp_path):
    folder, outside = tmp_path / "bands", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    for band in ("B04", "B03"):
        scenes.write(folder / f"{band}.tif", scenes.pixels(1, 8, 8, "uint16"))
    scenes.write(outside / "B02.tif", scenes.pixels(1, 8, 8, "uint16"))
    (folder / "B02.tif").symlink_to(outside / "B02.tif")
    for name in (folder, folder / "B04.tif"):
        with pytest.raises(SceneError, match=f"B02.tif in .* leads to {outside}/B02.tif, .*--allow-root {outside}"):
            read_loose_bands(name)
        assert read_loose_bands(name, access=Access(roots=[outside]))
        with pytest.raises(SceneError, match="--allow-root"):
            find(str(name))


# ---- zips ----


def packed(path: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


METADATA = b"<n1:Level-2A_User_Product xmlns:n1='x'/>"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../x.jp2", "leads elsewhere"),
        ("a.SAFE/../../x.jp2", "leads elsewhere"),
        ("/etc/x.jp2", "leads elsewhere"),
        ("a.SAFE\\x.jp2", "leads elsewhere"),
        ("a.SAFE/x.jp2\0.txt", "leads elsewhere"),
        ("a.SAFE/MTD_MSIL2A.xml", "is there twice"),
        ("./a.SAFE//MTD_MSIL2A.xml", "is there twice"),
        ("a.SAFE/" + "x" * 400, "has more than 400 letters"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_with_other_names_are_refused(tmp_path, name, message):
    stand_in = "#" * len(name)
    path = packed(tmp_path / "a.SAFE.zip", ("a.SAFE/MTD_MSIL2A.xml", METADATA), (stand_in, b"x"))
    path.write_bytes(path.read_bytes().replace(stand_in.encode(), name.encode()))  # zipfile writes no such names
    with pytest.raises(SceneError, match=rf"a\.SAFE\.zip is not read: its member .* {message}"):
        read_safe(path)
    with pytest.raises(SceneError, match=message):
        find(str(path))


def test_a_zip_inside_a_zip_is_not_looked_into(l2a, tmp_path):
    inner = zip_safe(Path(shutil.copytree(l2a.path, tmp_path / l2a.path.name)))
    path = packed(tmp_path / "outer.zip", (inner.name, inner.read_bytes()))
    with pytest.raises(SceneError, match=r"no product metadata|more than one list of members"):
        find(str(path))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_ways_to_compress_are_refused(tmp_path, method):
    path = tmp_path / "a.SAFE.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.SAFE/MTD_MSIL2A.xml", METADATA)
    with pytest.raises(SceneError, match="is compressed by method"):
        read_safe(path)


def test_gdal_reads_the_member_that_was_judged(l2a, tmp_path):
    """An archive with two lists: one that is found from the end, one that a comment hides."""
    product = Path(shutil.copytree(l2a.path, tmp_path / l2a.path.name))
    path = zip_safe(product)
    first = read_safe(path)[0]
    with rasterio.open(first.bands["red"].path) as dataset:
        assert dataset.read(1).tolist() == l2a.dn[0].tolist()
    data = path.read_bytes()
    end = data.rfind(b"PK\5\6")
    for hidden in (data[end:], b"PK\6\7" + struct.pack("<IQI", 0, 0, 1)):
        comment = hidden + b"x"
        path.write_bytes(data[: end + 20] + struct.pack("<H", len(comment)) + comment)
        with pytest.raises(SceneError, match="list of members"):
            read_safe(path)
    path.write_bytes(data[: end + 20] + struct.pack("<H", 5) + b"hello")
    assert read_safe(path)[0].bands == first.bands


def many_members(path: Path, count: int) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.SAFE/MTD_MSIL2A.xml", METADATA)
        for number in range(count - 1):
            archive.writestr(f"a.SAFE/GRANULE/{number}", b"")
    return path


def test_as_many_members_as_allowed(tmp_path):
    path = many_members(tmp_path / "a.SAFE.zip", 20_000)
    with pytest.raises(SceneError, match="has no granule"):
        read_safe(path)


@pytest.mark.parametrize("count", [20_001, 65_535, 70_000])
def test_a_zip_of_many_members_is_refused_soon(tmp_path, count):
    path = many_members(tmp_path / "a.SAFE.zip", count)
    data = path.read_bytes()
    assert (b"PK\6\6" in data) == (count > 65_535)
    said, seconds, memory = measure(SETUP, f"find({str(path)!r})")
    assert f"lists {count} members" in said
    assert "at most 20000" in said
    assert seconds < 2
    assert memory < 300
    assert not is_safe(path.rename(tmp_path / "other.zip"))


def test_the_members_are_counted_whatever_the_end_says(tmp_path):
    path = many_members(tmp_path / "a.SAFE.zip", 30_000)
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\5\6")
    struct.pack_into("<HH", data, end + 8, 3, 3)
    path.write_bytes(data)
    with pytest.raises(SceneError, match="lists 30000 members"):
        read_safe(path)
    struct.pack_into("<L", data, end + 12, 2**31)
    path.write_bytes(data)
    with pytest.raises(SceneError, match="in 2147483648 bytes"):
        read_safe(path)


def test_many_granules_and_much_metadata(copy, l2a, monkeypatch):
    for number in range(3):
        shutil.copytree(copy / l2a.granule, copy / f"GRANULE/more{number}")
    monkeypatch.setattr(safe, "_LARGEST_SUM", 3000)
    with pytest.raises(SceneError, match="its metadata have more than"):
        read_safe(copy)
    monkeypatch.undo()
    for number in range(500):
        path = copy / f"GRANULE/{number}/IMG_DATA/x.jp2"
        path.parent.mkdir(parents=True)
        path.touch()
    with pytest.raises(SceneError, match="has 504 granules"):
        read_safe(copy)


# ---- XML ----


def root(inside: str, attributes: str = "") -> str:
    return f"<n1:Level-2A_User_Product xmlns:n1='x'{attributes}>{inside}</n1:Level-2A_User_Product>"


SIZE = 8 * 2**20 - 200
BOMBS = {
    "elements": lambda: root("<a/>" * (SIZE // 4)),
    "nest": lambda: root("<a>" * (SIZE // 7) + "</a>" * (SIZE // 7)),
    "nest within the count": lambda: root("<a>" * 120_000 + "</a>" * 120_000),
    "attributes": lambda: root("", "".join(f" a{number:06}=''" for number in range(SIZE // 11))),
    "attributes within the count": lambda: root("", "".join(f" a{number:06}=''" for number in range(240_000))),
    "elements within the count": lambda: root("".join(f"<a{number}/>" for number in range(240_000))),
    "namespace": lambda: root("".join(f"<n:a{number}/>" for number in range(300_000)), f" xmlns:n='{'u' * 2**21}'"),
    "short namespace": lambda: root("".join(f"<n:a{number}/>" for number in range(240_000)), f" xmlns:n='{'u' * 150}'"),
    "text": lambda: root("x" * SIZE),
    "numbers": lambda: root(f"<BOA_QUANTIFICATION_VALUE>{'9' * SIZE}</BOA_QUANTIFICATION_VALUE>"),
    "entities": lambda: root("&amp;" * (SIZE // 5)),
    "comments": lambda: root("<!---->" * (SIZE // 7)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_metadata_of_eight_megabytes_are_judged_soon(copy, name):
    (copy / "MTD_MSIL2A.xml").write_text(BOMBS[name]())
    _, seconds, memory = measure(SETUP, f"find({str(copy)!r})")
    assert seconds < 2
    assert memory < 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (root("<a/>" * 250_001), "tags and attributes"),
        (root("<a>" * 101 + "</a>" * 101), "more than 100 deep"),
        (root("<n:a/>", f" xmlns:n = '{'u' * 201}'"), "a namespace of more than 200 letters"),
        (root('<BOA_ADD_OFFSET band_id="3">1e300</BOA_ADD_OFFSET>'), "offset of B04 is '1e300'"),
        (root(f'<BOA_ADD_OFFSET band_id="3">{"9" * 5000}</BOA_ADD_OFFSET>'), "offset of B04 is "),
    ],
)
def test_metadata_that_no_product_has(text, message):
    with pytest.raises(SceneError, match=message):
        product_metadata(text.encode(), "x.xml")
    assert product_metadata(root("<a>" * 99 + "</a>" * 99).encode(), "x.xml").level == "L2A"


@pytest.mark.parametrize(
    ("crs", "ncols", "expected"),
    [
        ("EPSG:32634", "100", True),
        ("/etc/passwd", "100", False),
        ("http://127.0.0.1/crs", "100", False),
        ("+proj=longlat +nadgrids=/etc/passwd", "100", False),
        ("EPSG:32634", "nan", False),
        ("EPSG:32634", "9" * 4000, False),
    ],
)
def test_the_ground_is_told_by_registers_and_numbers_alone(crs, ncols, expected):
    text = f"""<a><HORIZONTAL_CS_CODE>{crs}</HORIZONTAL_CS_CODE><Size resolution="10"><NROWS>9</NROWS>
        <NCOLS>{ncols}</NCOLS></Size>
        <Geoposition resolution="10"><ULX>0</ULX><ULY>0</ULY><XDIM>10</XDIM></Geoposition></a>"""
    assert (granule_metadata(text.encode(), "x.xml").extent is not None) is expected


def test_the_tags_of_a_product_are_counted_together(tmp_path):
    product = write_safe(tmp_path, seed=1, size=32)
    (granule,) = (product.path / "GRANULE").iterdir()
    for number in range(5):
        other = granule.with_name(f"{granule.name[:-1]}{number}x")
        shutil.copytree(granule, other)
        (other / "MTD_TL.xml").write_text(f"<r>{'<a/>' * 249_000}</r>")
    with pytest.raises(SceneError, match="1000000 tags and attributes"):
        find(str(product.path))
