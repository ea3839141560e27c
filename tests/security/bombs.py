"""Small files that ask for much: sizes that headers declare, blocks, bands, members, nesting."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

_BIG_TIFF = {1: "B", 3: "H", 4: "I", 16: "Q"}


def tiff(
    path: Path,
    *,
    width: int,
    height: int,
    bands: int = 3,
    tile: int = 0,
    rows: int = 0,
    bits: int = 8,
    planar: bool = False,
    compression: int = 1,
    content: bytes = b"",
    pages: int = 1,
) -> Path:
    """A BigTIFF without data, or with ``content`` as its only block; its tables of blocks are holes in the file."""
    rows = rows or height
    blocks = -(-width // tile) * -(-height // tile) if tile else -(-height // rows)
    blocks *= bands if planar else 1
    tags: list[tuple[int, int, int, int]] = [
        (256, 4, 1, width), (257, 4, 1, height), (259, 3, 1, compression), (262, 3, 1, 2 if bands > 2 else 1),
        (277, 3, 1, bands), (284, 3, 1, 2 if planar else 1),
    ]  # fmt: skip
    directory = 2 * 8 + 8 + 20 * 12
    tables = 16 + pages * directory + 2 * bands
    tables += -tables % 8
    tags.append((258, 3, bands, 16 + pages * directory) if bands > 4 else (258, 3, 1, bits))
    end = tables + 16 * blocks
    kinds = (324, 325) if tile else (273, 279)
    if blocks == 1:
        tags += [(kinds[0], 16, 1, end if content else 0), (kinds[1], 16, 1, len(content))]
    else:
        tags += [(kinds[0], 16, blocks, tables), (kinds[1], 16, blocks, tables + 8 * blocks)]
    tags += [(322, 4, 1, tile), (323, 4, 1, tile)] if tile else [(278, 4, 1, rows)]
    with path.open("wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16))
        for page in range(pages):
            file.seek(16 + page * directory)
            file.write(struct.pack("<Q", len(tags)))
            for tag, kind, count, value in sorted(tags):
                file.write(struct.pack("<HHQQ", tag, kind, count, value))
            file.write(struct.pack("<Q", 16 + (page + 1) * directory if page + 1 < pages else 0))
        if bands > 4:
            file.seek(16 + pages * directory)
            file.write(struct.pack("<H", bits) * bands)
        file.seek(end)
        file.write(content)
        file.truncate(max(file.tell(), end))
    return path


def _png(width: int, height: int, path: Path, *, more: bytes = b"", interlaced: int = 0) -> Path:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced))
    data = _chunk(b"IDAT", zlib.compress(bytes(100_000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + more + data + _chunk(b"IEND", b""))
    return path


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _zeros(count: int) -> bytes:
    """Deflated zeros, a thousandth of their size: one block over and over, without a checksum."""
    packer = zlib.compressobj(9)
    head = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * (count >> 20)


def _png_text(path: Path) -> Path:
    """A comment that inflates to half a gigabyte."""
    return _png(64, 64, path, more=_chunk(b"zTXt", b"Comment\0\0" + _zeros(1 << 29)))


def _jp2(size: tuple[int, int], path: Path, *, tile: tuple[int, int] | None = None, components: int = 3) -> Path:
    """The headers of a JPEG 2000 file, and the start of its first tile."""
    (width, height), (across, down) = size, tile or size
    stream = b"\xff\x4f" + _segment(
        0x51,
        struct.pack(">HIIIIIIIIH", 0, width, height, 0, 0, across, down, 0, 0, components)
        + b"\x07\x01\x01" * components,
    )
    stream += _segment(0x52, b"\x00\x00\x00\x01\x00\x05\x04\x04\x00\x01")
    stream += _segment(0x5C, b"\x40" + b"\x40" * 16)
    stream += _segment(0x90, struct.pack(">HIBB", 0, 0, 0, 1)) + b"\xff\x93" + bytes(64) + b"\xff\xd9"
    header = _box(b"ihdr", struct.pack(">IIHBBBB", height, width, components, 7, 7, 0, 0))
    header += _box(b"colr", struct.pack(">BBBI", 1, 0, 0, 16 if components > 2 else 17))
    boxes = _box(b"jP  ", b"\r\n\x87\n") + _box(b"ftyp", b"jp2 \0\0\0\0jp2 ") + _box(b"jp2h", header)
    path.write_bytes(boxes + _box(b"jp2c", stream))
    return path


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def _jpeg(side: int, path: Path, *, scans: int = 1) -> Path:
    """A picture cut off at once, baseline or progressive."""
    from io import BytesIO

    from PIL import Image

    with BytesIO() as file:
        Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=scans > 1)
        content = file.getvalue()
    frame = content.index(b"\xff\xc2" if scans > 1 else b"\xff\xc0")
    content = content[: frame + 5] + struct.pack(">HH", side, side) + content[frame + 9 :]
    if scans > 1:
        scan = content.index(b"\xff\xda")
        content = content[:scan] + content[scan:-2] * scans
    path.write_bytes(content)
    return path


def _webp(path: Path, *, extended: bool = False) -> Path:
    if extended:
        body = b"VP8X" + struct.pack("<II", 10, 0) + b"\xff\xff\xff" * 2
        body += b"VP8L" + struct.pack("<I", 6) + b"\x2f" + struct.pack("<I", 0x3FFF | 0x3FFF << 14) + b"\0"
    else:
        body = b"VP8L" + struct.pack("<I", 6) + b"\x2f" + struct.pack("<I", 0x3FFF | 0x3FFF << 14) + b"\0"
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body)
    return path


def _bmp(path: Path) -> Path:
    header = struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 2835, 2835, 0, 0)
    path.write_bytes(b"BM" + struct.pack("<IHHI", 54 + len(header), 0, 0, 54) + header + bytes(100))
    return path


_SAFE = "S2A_MSIL2A_20200101T000000_N0500_R001_T32TLS_20200101T000000.SAFE"


def _zip_members(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number in range(65_000):
            archive.writestr(f"{_SAFE}/GRANULE/G{number}/IMG_DATA/T32TLS_20200101T000000_B02.jp2", b"")
        archive.writestr(f"{_SAFE}/MTD_MSIL2A.xml", "<x/>")
    return path


def _zip_metadata(path: Path) -> Path:
    """Metadata that inflate to 256 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(f"{_SAFE}/MTD_MSIL2A.xml", "w", force_zip64=True) as member:
            for _ in range(256):
                member.write(b" " * (1 << 20))
        archive.writestr(f"{_SAFE}/GRANULE/G/IMG_DATA/T32TLS_20200101T000000_B02.jp2", b"")
    return path


def _safe(text: Callable[[], str], folder: Path) -> Path:
    product = folder / _SAFE
    (product / "GRANULE" / "G" / "IMG_DATA").mkdir(parents=True)
    (product / "GRANULE" / "G" / "IMG_DATA" / "T32TLS_20200101T000000_B02.jp2").write_bytes(b"")
    (product / "MTD_MSIL2A.xml").write_text(text())
    return product


def _laughs() -> str:
    entities = '<!ENTITY e0 "ha">' + "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    return f'<?xml version="1.0"?><!DOCTYPE x [{entities}]><n1:x xmlns:n1="x"><PRODUCT_URI>&e11;</PRODUCT_URI></n1:x>'


def _quadratic() -> str:
    long = "a" * 100_000
    return f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e "{long}">]><x><PRODUCT_URI>{"&e;" * 20_000}</PRODUCT_URI></x>'


def _deep_xml() -> str:
    return "<x>" * 1_000_000


def _large_xml() -> str:
    return "<x>" + "<a/>" * 30_000_000 + "</x>"


def _written(path: Path, parts: Callable[[], str]) -> Path:
    path.write_text(parts())
    return path


def _items() -> str:
    item = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": "x",
        "geometry": None,
        "properties": {},
        "links": [],
        "assets": {name: {"href": f"{name}.tif"} for name in ("red", "green", "blue")},
    }
    one = json.dumps(item)
    return '{"type":"FeatureCollection","features":[' + ",".join([one] * (60_000_000 // len(one))) + "]}"


def _nested_item() -> str:
    return '{"type":"Feature","stac_version":"1.0.0","id":"x","assets":{},"properties":' + '{"a":' * 12_000_000


def _chunky_zeros(path: Path) -> Path:
    """One strip of 2.7 GB in 2.7 MB."""
    return tiff(path, width=30_000, height=30_000, compression=8, content=_zeros(2_700_000_000))


BOMBS: dict[str, Callable[[Path], Path]] = {
    "tiff-sparse": lambda at: tiff(at / "bomb.tif", width=300_000, height=300_000, tile=512),
    "tiff-small-tiles": lambda at: tiff(at / "bomb.tif", width=300_000, height=300_000, tile=16),
    "tiff-many-blocks": lambda at: tiff(at / "bomb.tif", width=120_000, height=120_000, tile=16),
    "tiff-one-strip": lambda at: tiff(at / "bomb.tif", width=60_000, height=60_000),
    "tiff-one-tile": lambda at: tiff(at / "bomb.tif", width=60_000, height=60_000, tile=60_000),
    "tiff-large-tiles": lambda at: tiff(at / "bomb.tif", width=100_000, height=100_000, tile=32_768),
    "tiff-long-rows": lambda at: tiff(at / "bomb.tif", width=2_000_000_000, height=2, rows=1),
    "tiff-inflates": lambda at: _chunky_zeros(at / "bomb.tif"),
    "tiff-bands": lambda at: tiff(at / "bomb.tif", width=64, height=64, bands=65_535),
    "tiff-bands-planar": lambda at: tiff(at / "bomb.tif", width=64, height=64, bands=65_535, planar=True),
    "tiff-pages": lambda at: tiff(at / "bomb.tif", width=300_000, height=300_000, tile=512, pages=60_000),
    "png-row": lambda at: _png(2**31 - 1, 1, at / "bomb.png"),
    "png-column": lambda at: _png(1, 2**31 - 1, at / "bomb.png"),
    "png-square": lambda at: _png(140_000, 140_000, at / "bomb.png"),
    "png-interlaced": lambda at: _png(60_000, 60_000, at / "bomb.png", interlaced=1),
    "png-text": lambda at: _png_text(at / "bomb.png"),
    "jp2-one-tile": lambda at: _jp2((100_000, 100_000), at / "bomb.jp2"),
    "jp2-largest": lambda at: _jp2((2**32 - 1, 2**32 - 1), at / "bomb.jp2"),
    "jp2-components": lambda at: _jp2((1_000, 1_000), at / "bomb.jp2", components=16_384),
    "jp2-tiles": lambda at: _jp2((255 * 4, 257 * 4), at / "bomb.jp2", tile=(4, 4)),
    "jp2-large-tiles": lambda at: _jp2((120_000, 120_000), at / "bomb.jp2", tile=(40_000, 40_000)),
    "jpeg": lambda at: _jpeg(65_500, at / "bomb.jpg"),
    "jpeg-progressive": lambda at: _jpeg(30_000, at / "bomb.jpg", scans=500),
    "webp": lambda at: _webp(at / "bomb.webp"),
    "webp-canvas": lambda at: _webp(at / "bomb.webp", extended=True),
    "bmp": lambda at: _bmp(at / "bomb.bmp"),
    "zip-members": lambda at: _zip_members(at / f"{_SAFE}.zip"),
    "zip-inflates": lambda at: _zip_metadata(at / f"{_SAFE}.zip"),
    "safe-entities": partial(_safe, _laughs),
    "safe-quadratic": partial(_safe, _quadratic),
    "safe-deep": partial(_safe, _deep_xml),
    "safe-large": partial(_safe, _large_xml),
    "json-nested": lambda at: _written(at / "bomb.json", lambda: "[" * 60_000_000),
    "json-nested-item": lambda at: _written(at / "bomb.json", _nested_item),
    "json-items": lambda at: _written(at / "bomb.json", _items),
    "json-text": lambda at: _written(at / "bomb.json", lambda: '{"type":"Feature","x":"' + "a" * 60_000_000 + '"}'),
}
