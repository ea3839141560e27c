"""Modules in the working folder are never imported, and names in archives are those that every program sees."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest

from rsedge.errors import SceneError
from rsedge.runtime.scenes.scene import Scene
from tests.safe_products import write_safe

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module", ["numpy", "click", "rasterio"])
def test_python_m_imports_nothing_from_the_working_folder(tmp_path, module):
    (tmp_path / f"{module}.py").write_text("open('ran', 'w').close(); raise SystemExit(9)")
    done = subprocess.run(
        [sys.executable, "-m", "rsedge", "info", "nothing.tif"], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert not (tmp_path / "ran").exists()
    assert (done.returncode, "nothing.tif does not exist" in done.stderr) == (1, True), done.stderr


def test_a_member_with_a_second_name_is_refused(tmp_path):
    product = write_safe(tmp_path, seed=1, size=60, zipped=True).path
    assert Scene.open(product).product_id
    odd = tmp_path / "odd.SAFE.zip"
    with zipfile.ZipFile(product) as given, zipfile.ZipFile(odd, "w") as written:
        for number, info in enumerate(given.infolist()):
            copied = zipfile.ZipInfo(info.filename)
            if number == 3:
                other = b"GRANULE/other.jp2"
                body = struct.pack("<BL", 1, zlib.crc32(info.filename.encode())) + other
                copied.extra = struct.pack("<HH", 0x7075, len(body)) + body
            written.writestr(copied, given.read(info))
    with pytest.raises(SceneError, match="has a second name"):
        Scene.open(odd)


def test_long_names_take_no_time():
    from rsedge.runtime.scenes.products.sentinel2 import ProductName

    before = os.times().user
    ProductName.parse("S2A_OPER_" + "T00AAA_" * 100_000 + "x")
    assert os.times().user - before < 2
