"""Image files of any kind as uint8 RGB, with the pixels that a scene of the same file has at run time.

Pictures (JPEG, PNG, WebP, GIF, BMP) are read by Pillow: EXIF orientation applied, 16-bit greys cut to their high byte,
the first frame of several. All else is a raster and read as :class:`rsedge.runtime.scenes.scene.Scene` is: 8-bit as
stored, uint16 and int16 as Sentinel-2 reflectance by the rule of :class:`rsedge.pixels.ReflectanceRule`. Where a raster
does not say which bands are red, green and blue, three are taken in this order, a single one as grey, and twelve or
thirteen 16-bit ones as Sentinel-2's in theirs (4, 3, 2). Floats are refused: their scale is not known.

Transparency is dropped, not composited; only pixels that are wholly transparent become black, as pixels without data do
at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rsedge.errors import OptionError, SceneError

if TYPE_CHECKING:
    from rsedge.pixels import UInt8

PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2"])
"""Names that are taken for images where a folder is searched for them; a named file may have any."""

MOST_BYTES = 2**25
"""Pixels of an image, times the bytes of a value: it is decoded as a whole, and a small file may hold any number of
them. 5792 x 5792 px of 8 bits, 4096 x 4096 of 16."""
_SENTINEL2_BANDS = (12, 13)  # L2A lacks B10


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image file of any kind Pillow or GDAL reads, as an :class:`~rsedge.datasets.examples.ImageSource`."""

    path: Path

    def read(self) -> UInt8:
        """The image, uint8 [H, W, 3], RGB.

        Raises:
            SceneError: It is missing, damaged or cut short, or its RGB cannot be told.
        """
        try:
            with self.path.open("rb") as stream:
                picture = _read_picture(stream, str(self.path))
        except OSError as error:
            raise SceneError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return _read_raster(str(self.path), str(self.path)) if picture is None else picture

    def metres_per_pixel(self) -> float | None:
        """Return the size of its pixels on the ground, of a raster with a place on a map; else None."""
        from rsedge.runtime.scenes.opening import SceneOptions, open_raster

        try:
            return open_raster(str(self.path), SceneOptions(bands=(1, 1, 1))).metres_per_pixel
        except (SceneError, OptionError):
            return None


def decode(content: bytes, name: str) -> UInt8:
    """The image in an image file's ``content``, uint8 [H, W, 3], RGB; SceneError, with ``name``, as
    :meth:`FileImage.read`.
    """
    picture = _read_picture(BytesIO(content), name)
    if picture is not None:
        return picture
    from rasterio.io import MemoryFile

    from rsedge.runtime.scenes.gdal import judge_header

    judge_header(lambda offset, length: content[offset : offset + length], name)
    with MemoryFile(content) as file:
        return _read_raster(file.name, name)


def _read_picture(stream: BinaryIO, name: str) -> UInt8 | None:
    """The picture in ``stream``, or None where it is none of ``PICTURES``."""
    kind = ""
    try:
        with Image.open(stream, formats=PICTURES) as image:
            kind = f" ({image.format})"
            _check_size(*image.size, 1, name)
            return _rgb(ImageOps.exif_transpose(image))
    except SceneError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        if isinstance(error, UnidentifiedImageError) and not kind:
            return None
        raise SceneError(f"{name} cannot be decoded{kind}: {error}") from error


def _check_size(width: int, height: int, itemsize: int, name: str) -> None:
    """Refuse an image that takes too much memory as a whole; ``itemsize`` is of a value, in bytes."""
    if width * height * itemsize > MOST_BYTES:
        raise SceneError(
            f"{name} has {width} x {height} px of {8 * itemsize} bits, and at most {MOST_BYTES // itemsize} px are "
            "decoded as one image: cut it with gdal_retile.py (rsedge embed --as scene does it), or make it smaller"
        )


def _rgb(image: Image.Image) -> UInt8:
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip instead of scale
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    rgba = np.array(image.convert("RGBA"))
    rgb = np.ascontiguousarray(rgba[..., :3])
    rgb[rgba[..., 3] == 0] = 0
    return rgb


def _read_raster(target: str, name: str) -> UInt8:
    """The raster that GDAL knows as ``target``."""
    from rasterio.errors import RasterioError

    from rsedge.runtime.scenes.opening import SceneOptions, open_raster

    try:
        scene = open_raster(target, SceneOptions())
    except SceneError as error:
        try:
            scene = open_raster(target, SceneOptions(bands=(1, 1, 1)))
        except SceneError:
            raise SceneError(f"{name} is no image that rsedge reads: {str(error).replace(target, name)}") from error
        usual = {3: (1, 2, 3), 1: (1, 1, 1)}
        if scene.dtype == "uint16":
            usual |= dict.fromkeys(_SENTINEL2_BANDS, (4, 3, 2))
        if scene.band_count not in usual:
            raise SceneError(
                f"{name}: it is unclear which of its bands are red, green and blue; write these alone: "
                f"gdal_translate -b R -b G -b B {name} rgb.tif"
            ) from error
        scene = open_raster(target, SceneOptions(bands=usual[scene.band_count]))
    _check_size(scene.width, scene.height, np.dtype(scene.dtype).itemsize, name)
    try:
        with scene.reader() as reader:
            return reader.read(0, 0, scene.height, scene.width)[0]
    except RasterioError as error:
        cause = error.__cause__ or error  # rasterio's own message only says where to look
        raise SceneError(f"{name} cannot be decoded ({scene.driver}): {str(cause).replace(target, name)}") from error
