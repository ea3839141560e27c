"""Sizes that a raster's first bytes declare, judged before GDAL allocates anything for them.

Opening alone costs GDAL memory and time for every band of a TIFF and for every tile and component of a JPEG 2000 file,
however little the file holds. PNG, JPEG and WebP are decoded from the top, some of them as a whole.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rsedge.errors import SceneError
from rsedge.host import memory_available
from rsedge.runtime.scenes.reference import file_named

Read = Callable[[int, int], bytes]
"""Offset and length → the bytes there, fewer at the end of the file."""

MAX_BANDS = 4096
MAX_SIDE = 2**22  # pixels: the equator at 10 m
_MAX_BLOCKS = 2**23  # GDAL keeps 16 bytes for each
_MAX_JP2_TILES = 2**15  # times components: OpenJPEG keeps some kB for each
_MAX_DIRECTORIES = 1000
_MAX_ENTRIES = 200_000  # of all directories: they may lie in each other, so that a small file has many
_MAX_TEXT = 2**16  # bytes of what a file says of its coordinate reference system
_MAX_BOXES = 1000
_MAX_BLOCK_BYTES = 2**30
_FROM_THE_TOP = 16  # formats without parts may have this many times fewer pixels
_GUESSED_MEMORY = 4 * 2**30  # available, where the system does not tell
_COPIES = 3  # of a block while it is decoded: GDAL's, its cache's, and ours

_TIFF_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q", 6: "b", 8: "h", 9: "i", 17: "q"}
_GEO_TEXT = 34737
_TEXT_TYPES = (1, 2, 6, 7)  # of one byte
_GEO_JP2 = bytes.fromhex("b14bf8bd083d4b43a5ae8cd7d5a6ce03")  # begins a box that holds a TIFF with the place
_WIDTH, _HEIGHT, _BITS, _SAMPLES, _ROWS_PER_STRIP, _PLANAR = 256, 257, 258, 277, 278, 284
_TILE_WIDTH, _TILE_HEIGHT = 322, 323


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a raster declares."""

    width: int
    height: int
    bands: int
    blocks: int  # tiles or strips that are kept track of
    block_bytes: int  # decoded size of one
    most_blocks: int = _MAX_BLOCKS
    from_the_top: bool = False  # whether its last pixel can only be decoded after all others

    def check(self, name: str, max_pixels: int) -> None:
        """Refuse what would fill the memory or never end; SceneError names all that is beyond its limit."""
        problems = []
        pixels = self.width * self.height
        factor = _FROM_THE_TOP if self.from_the_top else 1
        if pixels * factor > max_pixels:
            format_ = " for a format that is decoded from the top" if self.from_the_top else ""
            problems.append(
                f"{pixels:,} pixels, more than {max_pixels // factor:,}{format_} "
                f"(--max-pixels {pixels * factor} allows them)"
            )
        if max(self.width, self.height) > MAX_SIDE:
            problems.append(f"a side of {max(self.width, self.height):,} pixels, more than {MAX_SIDE:,}")
        if self.bands > MAX_BANDS:
            problems.append(f"{self.bands:,} bands, more than {MAX_BANDS:,}")
        if self.blocks > self.most_blocks:
            problems.append(f"{self.blocks:,} blocks, more than {self.most_blocks:,}: write larger ones")
        available = memory_available()
        most = min(_MAX_BLOCK_BYTES, (_GUESSED_MEMORY if available is None else available) // _COPIES)
        if self.block_bytes > most:
            problems.append(
                f"blocks of {self.block_bytes / 2**30:.1f} GiB, more than {most / 2**30:.1f} GiB (a third of the free "
                "memory, at most 1 GiB): gdal_translate -co TILED=YES writes smaller ones"
            )
        if problems:
            size = f"{self.width:,} x {self.height:,}"
            raise SceneError(f"{name} is not opened: its header declares {size} pixels, and " + "; ".join(problems))


def declared_sizes(read: Read, *, places: bool = True) -> Iterator[Sizes]:
    """Yield the sizes that a file declares, of a TIFF those of each directory; nothing for a damaged file.

    Args:
        read: Reads parts of the file.
        places: Whether what a JP2 states in the way of GeoTIFF is judged, too, wherever in the file it does.

    Raises:
        ValueError: It has more directories, entries or boxes than any raster, its codestream does not begin with its
            sizes, or its coordinate reference system names a file. GDAL and PROJ would go through all of it.
    """
    start = read(0, 16)
    try:
        if start[:2] in (b"II", b"MM") and start[2:4] in (b"*\0", b"\0*", b"+\0", b"\0+"):
            yield from _tiff_directories(read, start)
        elif start[4:8] == b"jP  " or start[:4] == b"\xff\x4f\xff\x51":
            yield _jpeg2000(read(0 if start[0] == 0xFF else _codestream(read, places=places), 44))
        elif start[:8] == b"\x89PNG\r\n\x1a\n":
            width, height, bits, kind, _, _, interlaced = struct.unpack(">IIBBBBB", read(16, 13))
            bands = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(kind, 4)
            size = (
                width * (height if interlaced else 1) * bands * max(8, bits) // 8
            )  # GDAL decodes interlaced ones whole
            yield Sizes(width=width, height=height, bands=bands, blocks=height, block_bytes=size, from_the_top=True)
        elif start[:3] == b"\xff\xd8\xff":
            yield from _jpeg(read)
        elif start[:4] == b"RIFF" and start[8:12] == b"WEBP":
            yield from _webp(read(12, 18))
    except struct.error:
        return  # cut off: GDAL says so


def _tiff_directories(read: Read, start: bytes) -> Iterator[Sizes]:
    order = "<" if start[:2] == b"II" else ">"
    big = b"+" in start[2:4]
    head, entry, pointer = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    head, entry, pointer = order + head, order + entry, order + pointer
    step = struct.calcsize(entry)
    [offset] = struct.unpack_from(pointer, start, 8 if big else 4)
    seen: set[int] = set()
    entries = 0
    while offset and offset not in seen:
        seen.add(offset)
        if len(seen) > _MAX_DIRECTORIES:
            raise ValueError(f"it has more than {_MAX_DIRECTORIES} directories")
        [count] = struct.unpack(head, read(offset, struct.calcsize(head)))
        if count > 65535:
            return  # no TIFF: GDAL says so
        entries += count
        if entries > _MAX_ENTRIES:
            raise ValueError(f"its directories have more than {_MAX_ENTRIES} entries")
        body = read(offset + struct.calcsize(head), count * step + struct.calcsize(pointer))
        tags: dict[int, int] = {}
        for number in range(count):
            tag, kind, length, raw = struct.unpack_from(entry, body, number * step)
            if tag == _GEO_TEXT:
                if kind not in _TEXT_TYPES or length > _MAX_TEXT:
                    raise ValueError(
                        f"its GeoTIFF texts are of type {kind} and have {length} parts, more than {_MAX_TEXT} letters"
                    )
                _check_text(raw if length <= len(raw) else read(struct.unpack(pointer, raw)[0], length))
            if (code := _TIFF_TYPES.get(kind)) is None or length < 1:
                continue
            size = struct.calcsize(code)
            if length * size > len(raw):  # the value stands elsewhere; the first one does
                [where] = struct.unpack(pointer, raw)
                raw = read(where, size) if tag == _BITS else bytes(8)
            tags.setdefault(tag, struct.unpack_from(order + code, raw)[0])  # of several libtiff takes the first, too
        width, height, samples = tags.get(_WIDTH, 0), tags.get(_HEIGHT, 0), tags.get(_SAMPLES, 1)
        across, down = max(1, width), max(1, min(tags.get(_ROWS_PER_STRIP, height), height))
        if _TILE_WIDTH in tags:
            across, down = max(1, tags[_TILE_WIDTH]), max(1, tags.get(_TILE_HEIGHT, 1))
        separate = tags.get(_PLANAR, 1) == 2
        yield Sizes(
            width=width,
            height=height,
            bands=samples,
            blocks=-(-width // across) * -(-height // down) * (samples if separate else 1),
            block_bytes=across * down * (1 if separate else samples) * tags.get(_BITS, 1) // 8,
        )
        [offset] = struct.unpack_from(pointer, body, count * step)


def _check_text(data: bytes) -> None:
    """Refuse what GDAL would find a reference system in that names a file."""
    if found := file_named(data.decode("utf-8", "replace")):
        raise ValueError(f"its coordinate reference system names a file of PROJ's ({found}), and an input may not")


def _codestream(read: Read, *, places: bool) -> int:
    """Where the codestream of a JP2 file begins; with ``places``, its GeoTIFF in a box is judged, wherever it is."""
    found = None
    for kind, offset, length in _boxes(read):
        if places and kind == b"uuid" and read(offset, 16) == _GEO_JP2:
            if length > _MAX_TEXT:
                raise ValueError(f"the place it states takes {length} bytes, more than {_MAX_TEXT}")
            _check_text(read(offset + 16, length - 16))
        if kind == b"jp2c" and found is None:
            found = offset
            if not places:
                break
    if found is None:
        raise struct.error("no codestream")
    return found


def _boxes(read: Read) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and length of what each box of a JP2 file holds; the last one may go on to the end of the file.

    ValueError where there are more than any raster has.
    """
    offset = 0
    for _ in range(_MAX_BOXES):
        head = read(offset, 16)
        if len(head) < 8:
            return
        length, kind = struct.unpack_from(">I4s", head)
        size = 8
        if length == 1:
            [length] = struct.unpack_from(">Q", head, 8)
            size = 16
        yield kind, offset + size, length - size if length >= size else 2**62  # 0: up to the end
        if length < size:
            return
        offset += length
    raise ValueError(f"it has more than {_MAX_BOXES} boxes")


def _jpeg2000(head: bytes) -> Sizes:
    if head[:4] != b"\xff\x4f\xff\x51":
        raise ValueError("its codestream does not begin with its sizes, as JPEG 2000 does")
    right, lower, left, upper, across, down, tiles_left, tiles_upper = struct.unpack_from(">8I", head, 8)
    [components] = struct.unpack_from(">H", head, 40)
    across, down = max(1, across), max(1, down)
    tiles = -(-max(0, right - tiles_left) // across) * -(-max(0, lower - tiles_upper) // down)
    width, height = max(0, right - left), max(0, lower - upper)
    return Sizes(
        width=width,
        height=height,
        bands=components,
        blocks=tiles * components,
        block_bytes=min(across, width) * min(down, height) * components * 4,  # OpenJPEG decodes to 32 bits
        most_blocks=_MAX_JP2_TILES,
    )


def _jpeg(read: Read) -> Iterator[Sizes]:
    offset = 2
    for _ in range(_MAX_BOXES):
        mark, kind, length = struct.unpack(">BBH", read(offset, 4))
        if mark != 0xFF:
            return
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width, bands = struct.unpack(">HHB", read(offset + 5, 5))
            whole = kind not in (0xC0, 0xC1)  # progressive: coefficients of 16 bits for all of it
            size = width * bands * (2 * height if whole else 16)
            yield Sizes(width=width, height=height, bands=bands, blocks=height, block_bytes=size, from_the_top=True)
            return
        offset += 2 + length
    raise ValueError(f"it has more than {_MAX_BOXES} segments before its sizes")


def _webp(head: bytes) -> Iterator[Sizes]:
    if head[:4] == b"VP8X":
        width, height = int.from_bytes(head[12:15], "little") + 1, int.from_bytes(head[15:18], "little") + 1
    elif head[:4] == b"VP8L":
        bits = int.from_bytes(head[9:13], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif head[:4] == b"VP8 ":
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", head, 14))
    else:
        return
    # Decoded whole, and libwebp keeps as much again.
    yield Sizes(width=width, height=height, bands=4, blocks=1, block_bytes=width * height * 4 * 2, from_the_top=True)
