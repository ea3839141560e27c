"""Reference systems of strangers: none makes PROJ open a file, or ends in a fault."""

from __future__ import annotations

import struct
from xml.sax.saxutils import escape

import pytest
from rasterio.crs import CRS

from rsedge import Scene
from rsedge.errors import SceneError
from rsedge.runtime.scenes.reference import check_reference, file_named, parse_reference
from tests import scenes

GEOGRAPHIC = (
    'GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]],PRIMEM["Greenwich",0],'
    'UNIT["degree",0.0174532925199433]]'
)
NEWER = (
    'GEOGCRS["WGS 84",DATUM["World Geodetic System 1984",ELLIPSOID["WGS 84",6378137,298.257223563]],CS[ellipsoidal,2],'
    'AXIS["lat",north],AXIS["lon",east],ANGLEUNIT["degree",0.0174532925199433]]'
)
BASE = NEWER.partition(",CS")[0].replace("GEOGCRS", "BASEGEOGCRS") + ',PRIMEM["Greenwich",0]]'


def projected(method, end=""):
    return (
        f'PROJCRS["x",{BASE},CONVERSION["c",METHOD["{method}"]{end}],CS[Cartesian,2],AXIS["e",east],AXIS["n",north],'
        'LENGTHUNIT["metre",1]]'
    )


def extended(projection):
    return (
        f'PROJCS["x",{GEOGRAPHIC},PROJECTION["Transverse_Mercator"],PARAMETER["central_meridian",9],'
        f'UNIT["metre",1],EXTENSION["PROJ4","{projection}"]]'
    )


def bound(method):
    return f'BOUNDCRS[SOURCECRS[{NEWER}],TARGETCRS[{NEWER}],ABRIDGEDTRANSFORMATION["t",METHOD["{method}"]]]'


NAMING = {
    "a step in a method's name": projected("PROJ tinshift file={file}"),
    "a method in parentheses": projected("PROJ tinshift file={file}").replace("[", "(").replace("]", ")"),
    "an operation without plus signs": projected("PROJ-based operation method: proj=pipeline step init={file}:x"),
    "a parameter's name": projected("PROJ tinshift", ',PARAMETER["file={file} x",1]'),
    "a model of triangles": extended("+proj=tinshift +file={file} +type=crs"),
    "a pipeline": extended("+proj=pipeline +step +proj=defmodel +model={file} +type=crs"),
    "an init file without a plus sign": extended("init={file}:x +type=crs"),
    "grids": extended("+proj=tmerc +nadgrids={file} +type=crs"),
    "grids behind a tab": extended("+proj=tmerc +nadgrids\t={file} +type=crs"),
    "a transformation that is a model": bound("PROJ-based operation method: +proj=tinshift +file={file}"),
}
FAULTY = {
    "too deep": "PROJCS[" * 5000,
    "without an ellipsoid": GEOGRAPHIC.replace("6378137,298.257223563", "0,0"),
    "not finite": GEOGRAPHIC.replace("6378137", "1e400"),
    "too long": GEOGRAPHIC.replace('"WGS 84",D', f'"{"a" * 900_000}",D'),
    "a transformation without its file": bound("NTv2"),
}


@pytest.mark.parametrize("text", NAMING.values(), ids=NAMING)
def test_texts_that_make_proj_open_a_file_are_refused(tmp_path, text):
    text = text.format(file=tmp_path / "model.json")
    assert file_named(text)
    if text[7] == "[":
        with pytest.raises(ValueError, match="names a file of PROJ's"):
            parse_reference(text)


@pytest.mark.parametrize("text", FAULTY.values(), ids=FAULTY)
def test_texts_of_which_proj_makes_nothing_are_no_fault(tmp_path, text):
    with pytest.raises(ValueError, match=r"."):
        parse_reference(text)
    # What GDAL remembers of it would be raised by the next call, whichever it is.
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 8, 8), crs=None, transform=None)
    (tmp_path / "a.tif.aux.xml").write_text(f"<PAMDataset><SRS>{escape(text)}</SRS></PAMDataset>", encoding="utf-8")
    assert Scene.open(path).crs is None


@pytest.mark.parametrize(
    "text",
    [
        "EPSG:3857",
        "EPSG:32629",
        "EPSG:4326+5773",
        "ESRI:54030",
        "+proj=laea +lat_0=52 +lon_0=10 +towgs84=1,2,3",
        "+proj=ob_tran +o_proj=longlat +o_lat_p=30 +lon_0=10",
        "+proj=merc +a=6378137 +b=6378137 +nadgrids=@null +wktext +no_defs",
    ],
)
def test_what_real_rasters_have_is_let_through(text):
    crs = CRS.from_user_input(text)
    if "ob_tran" in text:  # PROJ has no other words for it than its own
        with pytest.raises(ValueError, match="PROJ ob_tran"):
            check_reference(crs)
        return
    check_reference(crs)
    assert file_named(crs.to_wkt()) is None


def geotiff(path, text):
    """A TIFF whose GeoTIFF keys hold WKT, as ArcGIS writes it; GDAL parses it while it opens the file."""
    content = f"ESRI PE String = {text}|\0".encode()
    keys = struct.pack("<16H", 1, 1, 0, 3, 1024, 0, 1, 32767, 1025, 0, 1, 1, 3073, 34737, len(content) - 1, 0)
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, None),
            (277, 3, 1, 1), (278, 3, 1, 8), (279, 4, 1, 64), (34735, 3, 16, keys),
            (34737, 2, len(content), content)]  # fmt: skip
    end = 8 + 2 + 12 * len(tags) + 4
    directory, behind = b"", b""
    for tag, kind, count, value in tags:
        where = end + len(behind)
        if isinstance(value, bytes):
            behind += value + b"\0" * (len(value) % 2)
        number = where if isinstance(value, bytes) else end + len(keys) + len(content) + 1 if value is None else value
        directory += struct.pack("<HHII", tag, kind, count, number)
    path.write_bytes(
        struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + directory + bytes(4) + behind + bytes(range(1, 129))
    )
    return path


@pytest.mark.parametrize("text", NAMING.values(), ids=NAMING)
def test_a_tiff_is_not_given_to_gdal_whose_keys_hold_such_a_text(tmp_path, text):
    with pytest.raises(SceneError, match="names a file of PROJ's"):
        Scene.open(geotiff(tmp_path / "a.tif", text.format(file=tmp_path / "model.json")), bands=(1, 1, 1))


def test_a_tiff_whose_keys_hold_a_harmless_text_is_read(tmp_path):
    scene = Scene.open(geotiff(tmp_path / "a.tif", extended("+proj=tmerc +lon_0=9 +type=crs")), bands=(1, 1, 1))
    assert scene.crs is not None


def test_a_jp2_is_not_given_to_gdal_whose_box_holds_such_a_text(tmp_path):
    path = scenes.write(tmp_path / "a.jp2", scenes.pixels(3, 64, 64), driver="JP2OpenJPEG")
    inner = geotiff(tmp_path / "a.tif", NAMING["a transformation that is a model"]).read_bytes()
    content = bytes.fromhex("b14bf8bd083d4b43a5ae8cd7d5a6ce03") + inner
    with path.open("ab") as file:
        file.write(struct.pack(">I4s", 8 + len(content), b"uuid") + content)
    with pytest.raises(SceneError, match="names a file of PROJ's"):
        Scene.open(path, bands=(1, 2, 3))
