"""What opening a scene may touch: the one policy behind ``--allow-remote``, ``--allow-host``, ``--allow-root``,
``--allow-vrt`` and ``--max-pixels``.

A raster, a STAC item or a product comes from strangers, and GDAL follows what a file names. So an input may name files
of its own folder only, and nothing at all on the network, unless the user says otherwise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rsedge.errors import OptionError, SceneError
from rsedge.runtime.scenes.addresses import HOST
from rsedge.texts import plain

MAX_PIXELS = 20_000_000_000
"""Default limit: the pixels of about 160 whole Sentinel-2 tiles at 10 m."""

# Names that make GDAL open something other than a file of that name: virtual file systems, inline documents, and
# prefixes such as GTIFF_DIR:, JPEG_SUBFILE:, WMS:.
_GDAL_NAME = re.compile(r"/vsi[a-z0-9_]+[/?]|<\s*[A-Za-z]|^[A-Za-z][A-Za-z0-9_+.-]+:(?!//)", re.IGNORECASE)


_NETWORK_HANDLER = re.compile(
    r"/vsi(?:curl|s3|gs|az|adls|oss|swift)(?:_streaming)?[/?](?!.*/vsi[a-z0-9_]+[/?]).*", re.IGNORECASE | re.DOTALL
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What inputs may reach.

    Raises:
        OptionError: ``max_pixels`` is below 1, a root is no folder, or a host is none.
    """

    remote: bool = False
    """Whether anything may be read over the network."""
    hosts: Sequence[str] = ()
    """Hosts with local, loopback, link-local or private addresses that redirects and items may name."""
    roots: Sequence[Path] = ()
    """Folders beside an input's own that it may name files of."""
    vrt: bool = False
    """Whether a VRT may be opened."""
    max_pixels: int = MAX_PIXELS
    """Pixels that a raster may declare."""

    def __post_init__(self) -> None:
        problems = []
        if self.max_pixels < 1:
            problems.append(f"max_pixels is {self.max_pixels}, expected at least 1")
        problems += [f"root {root} is no folder" for root in self.roots if not Path(root).is_dir()]
        problems += [
            f"{host!r} is no host, such as example.com or 10.0.0.1:8080"
            for host in self.hosts
            if not HOST.fullmatch(host)
        ]
        if problems:
            raise OptionError("; ".join(problems) + ": correct --max-pixels, --allow-root or --allow-host")

    def confine(self, path: Path, home: Path, *, what: str) -> Path:
        """Return the real path of a file that an input names, if it lies below the input's folder or a root.

        The path is judged as it is written first, so that nothing elsewhere is touched, and again after symbolic links
        are followed.

        Args:
            path: The file.
            home: Folder of the input.
            what: How a message calls the file, such as ``asset red of item.json``.

        Raises:
            SceneError: It lies elsewhere.
        """
        folders = [home, *map(Path, self.roots)]
        allowed = [folder.resolve() for folder in folders]
        written = Path(os.path.normpath(path.absolute()))
        real = written
        if any(written.is_relative_to(folder) for folder in (*allowed, *(each.absolute() for each in folders))):
            try:
                real = path.resolve()
            except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that is none
                raise SceneError(f"{what} leads nowhere: {error}; pass files, not links in a circle") from error
            if any(real.is_relative_to(folder) for folder in allowed):
                return real
        raise SceneError(
            f"{what} leads to {real}, outside of {allowed[0]}: move the file there, or allow its folder with "
            f"--allow-root {real.parent}"
        )


LOCAL = Access()
"""Files alone, within the default limits."""


def shortened(name: str, most: int = 200) -> str:
    """A name for a message, cut off behind ``most`` characters."""
    return name if len(name) <= most else f"{name[:most]}…"


def refuse_handler(name: str) -> None:
    """Refuse a name of GDAL's that a user typed, unless it is one that reads over the network, and nothing inside.

    Raises:
        SceneError: It is ``/vsizip/``, ``/vsitar/`` or another.
    """
    if re.match(r"/vsi", name, re.IGNORECASE) and not _NETWORK_HANDLER.fullmatch(name):
        raise SceneError(
            f"{name} is a name of GDAL's own, and rsedge opens files, and over the network URLs, /vsicurl/, /vsis3/, "
            "/vsigs/, /vsiaz/, /vsioss/ and /vsiswift/: unpack what the file is in, or pass a .SAFE.zip as it is"
        )


def refuse_gdal_name(name: str, *, what: str) -> None:
    """Refuse a name in an input that GDAL takes for something other than a file or a URL; ``what`` is for messages.

    Raises:
        SceneError: It is one.
    """
    if match := _GDAL_NAME.search(name):
        shown = plain(match[0])
        raise SceneError(f"{what} holds {shown!r}, a name of GDAL's own, and an input may name files only: pass a file")


def is_plain_xml(data: bytes) -> bool:
    """Whether XML has no document type, so no entities that could grow, and is in UTF-8, as all that is read is.

    Parsers refuse encodings in which ASCII letters are others, and those of two bytes have zeros: so bytes can be
    compared.
    """
    return b"<!DOCTYPE" not in data and b"\0" not in data
