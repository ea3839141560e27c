"""What a name stands for where file systems are strange: pipes, devices, circles of links, deep folders."""

from __future__ import annotations

import os

import pytest

from rsedge.errors import SceneError
from rsedge.runtime.scenes import access, catalog
from rsedge.runtime.scenes.catalog import find
from rsedge.runtime.scenes.scene import Scene
from tests import scenes
from tests.measured import measure


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    return scenes.write(path, pixels)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "a.tif", scenes.pixels(3, 8, 8))
    return tmp_path


def test_pipes_and_devices_are_not_opened(folder):
    os.mkfifo(folder / "pipe.tif")
    os.mkfifo(folder / "pipe.json")
    os.mkfifo(folder / "x_B04.tif")
    (folder / "device.tif").symlink_to("/dev/zero")
    alone = folder / "B.SAFE" / "GRANULE"
    alone.mkdir(parents=True)
    os.mkfifo(folder / "B.SAFE" / "MTD_MSIL2A.xml")
    code = f"""found = find({str(folder / "*")!r})"""
    said, seconds, _ = measure("from rsedge.runtime.scenes.catalog import find", code)
    assert "no product metadata" in said
    assert seconds < 2
    for name in ("pipe.tif", "pipe.json", "device.tif", "x_B04.tif"):
        with pytest.raises(SceneError, match="device, a pipe or a socket"):
            find(str(folder / name))
    with pytest.raises(SceneError, match="device, a pipe or a socket"):
        Scene.open("/dev/zero")
    (folder / "B.SAFE" / "MTD_MSIL2A.xml").unlink()
    alone.rmdir()
    (folder / "B.SAFE").rmdir()
    assert find(str(folder / "*")) == [str(folder / "a.tif")]
    assert find(str(folder)) == [str(folder / "a.tif")]


def test_circles_of_links_end(folder):
    for name in ("one", "two", "three"):
        (folder / name).symlink_to(".")
        (folder / f"to_{name}").symlink_to(f"to_{name}")
    assert find(str(folder)) == [str(folder / "a.tif")]
    assert find(str(folder / "**" / "*.tif")) == [str(folder / "a.tif")]
    assert len(find(str(folder / "**"))) == 4  # the file, and what each of three links leads to


def test_links_that_double_with_each_folder_end(folder):
    for number in range(40):
        (folder / f"level{number}").mkdir()
        for name in ("left", "right"):
            (folder / f"level{number}" / name).symlink_to(f"../level{number + 1}")
    write(folder / "level40" / "b.tif", scenes.pixels(3, 8, 8))
    with pytest.raises(SceneError, match=r"links lead to .*level\d+ more than 100 times"):
        find(str(folder))


def test_links_of_a_folder_that_the_user_named_are_followed(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write(other / "b.tif", scenes.pixels(3, 8, 8))
    (folder / "linked").symlink_to(other)
    (folder / "c.tif").symlink_to(other / "b.tif")
    (folder / "gone.tif").symlink_to(other / "none.tif")
    assert find(str(folder)) == [str(folder / name) for name in ("a.tif", "c.tif", "gone.tif", "linked/b.tif")]


def test_folders_deep_in_each_other(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for _ in range(150):
        os.mkdir("d")  # noqa: PTH102
        os.chdir("d")
    monkeypatch.chdir(folder)
    with pytest.raises(SceneError, match="lies 100 folders deep"):
        find(str(folder))


def test_a_folder_of_100000_files(folder):
    many = folder / "many"
    many.mkdir()
    for number in range(100_000):
        os.close(os.open(many / f"{number}.tif", os.O_CREAT))
    assert len(find(str(folder))) == 100_001


def test_a_folder_that_cannot_be_listed(folder, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(catalog.Path, "iterdir", refuse)
    with pytest.raises(SceneError, match="cannot be listed: Permission denied"):
        find(str(folder))


def test_patterns_are_those_of_the_shell(folder, monkeypatch):
    for name in ("sub/b.tif", "sub/.hidden.tif", ".hidden/c.tif", "sub/deep/d.tif"):
        write(folder / name, scenes.pixels(3, 8, 8))
    monkeypatch.chdir(folder)
    assert find("**/*.tif") == ["a.tif", "sub/b.tif", "sub/deep/d.tif"]
    assert find(str(folder / "su?" / "**" / "*.tif")) == [
        str(folder / "sub" / name) for name in ("b.tif", "deep/d.tif")
    ]
    assert find("**/.*.tif") == ["sub/.hidden.tif"]
    assert find("*/*.tif") == ["sub/b.tif"]


@pytest.mark.parametrize(
    "name",
    [
        *("/vsizip/a.zip/a.tif", "/vsizip//vsicurl/https://host/a.zip/a.tif", "/vsizip/{/vsigs/bucket/a.zip}/a.tif"),
        *("/vsitar/a.tar/a.tif", "/vsigzip/a.tif.gz", "/vsisubfile/0_9,a.tif", "/vsistdin/", "/VSIMEM/a.tif"),
        *("/vsicached?file=a.tif", "/vsicurl//vsizip/a", "/vsihdfs/a.tif", "/vsicrypt/a.tif", "/vsisparse/a.xml"),
    ],
)
def test_handlers_that_a_user_types(name):
    with pytest.raises(SceneError, match=r"name of GDAL's own.*unpack.*\.SAFE\.zip"):
        find(name, access=access.Access(remote=True))
    with pytest.raises(SceneError, match="name of GDAL's own"):
        Scene.open(name, allow_remote=True)


@pytest.mark.parametrize("name", ["/vsicurl/https://host/a.tif", "/vsis3/bucket/a.tif", "/vsigs/bucket/a.tif"])
def test_handlers_of_the_network_that_a_user_types(name):
    assert find(name, access=access.Access(remote=True)) == [name]


def test_a_mask_is_no_handler_either(folder):
    with pytest.raises(SceneError, match="name of GDAL's own"):
        Scene.open(folder / "a.tif", bands=(1, 2, 3), scl="/vsizip/a.zip/a.tif")
