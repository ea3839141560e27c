"""Where hostile inputs lie, what they reach for, and how one is described.

A ground is a folder that holds the inputs, decoys that nothing may read (``outside``), files that nothing may change
(``victim``), a home with credentials, and folders for the outputs, temporary files and the working directory.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import rasterio.shutil
from PIL import Image

from tests import scenes
from tests.safe_products import write_jp2, write_safe

SIDE = 224
Base = Literal["tif", "jp2", "png", "jpg", "webp", "safe", "stac"]
RASTER_USES = ("caption", "embed", "image")


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        name: Unique; the folder that holds the input.
        kind: What the report groups it under.
        make: Writes the input into a place and returns what a user would pass: a path, absolute or relative to the
            place's folder (then the command runs there), or a name that only GDAL knows.
        own: What the input shows if the reach is ignored, ``any`` where that is not known; empty where it must be
            refused.
        uses: Commands that are given the input.
        options: Command-line options beside it.
        guarded: Files of the system that it names; only a trace of system calls tells whether they were opened.
        told: What a message has to hold, in place of the name of the input.
    """

    name: str
    kind: str
    make: Callable[[Place], str | Path]
    own: Base | Literal["any", ""] = ""
    uses: tuple[str, ...] = RASTER_USES
    options: tuple[str, ...] = ()
    guarded: tuple[str, ...] = ()
    told: str = ""


class Ground:
    """A folder with decoys; ``port`` and ``port6`` are of the listener that stands for the network."""

    def __init__(self, root: Path, port: int, port6: int | None) -> None:
        self.root, self.port, self.port6 = root.resolve(), port, port6
        self.inputs, self.outside, self.victim = root / "in", root / "secret", root / "victim"
        self.home, self.temporary, self.cwd, self.out = root / "home", root / "tmp", root / "cwd", root / "out"
        for folder in (self.inputs, self.outside, self.victim, self.home, self.temporary, self.cwd, self.out):
            folder.mkdir(parents=True)
        self._write_decoys()

    @cached_property
    def bases(self) -> dict[Base, Path]:
        """A harmless input of each kind, which hostile ones are made from and compared with."""
        folder = self.root / "clean"
        folder.mkdir()
        data = scenes.pixels(3, SIDE, SIDE, seed=7)
        found: dict[Base, Path] = {"tif": scenes.write(folder / "clean.tif", data, photometric="RGB")}
        found["jp2"] = folder / "clean.jp2"
        # A copy takes over which bands are which colours.
        rasterio.shutil.copy(found["tif"], found["jp2"], driver="JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES")
        picture = Image.fromarray(np.ascontiguousarray(data.transpose(1, 2, 0)))
        for suffix in ("png", "jpg", "webp"):
            found[suffix] = folder / f"clean.{suffix}"
            picture.save(found[suffix])
        found["safe"] = write_safe(folder, seed=3, size=240).path
        (folder / "stac").mkdir()
        for colour, pixel in zip(("red", "green", "blue"), data, strict=True):
            scenes.write(folder / "stac" / f"{colour}.tif", pixel[None])
        found["stac"] = folder / "stac" / "item.json"
        found["stac"].write_text(stac_item("item", {name: f"{name}.tif" for name in ("red", "green", "blue")}))
        return found

    def _write_decoys(self) -> None:
        secret = scenes.write(self.outside / "secret.tif", scenes.pixels(3, SIDE, SIDE, seed=99), photometric="RGB")
        content = secret.read_bytes()
        (self.outside / "secret.tif.gz").write_bytes(gzip.compress(content, 1))
        with tarfile.open(self.outside / "secret.tar", "w") as archive:
            archive.add(secret, "a.tif")
        with zipfile.ZipFile(self.outside / "secret.zip", "w") as packed:
            packed.write(secret, "a.tif")
        one = scenes.pixels(1, SIDE, SIDE, seed=98)
        for band in ("B02", "B03", "B04"):
            write_jp2(
                self.outside / f"T34UCF_20230823T095559_{band}_10m.jp2", one, "EPSG:32632", scenes.UTM["transform"]
            )
        Image.fromarray(one[0]).save(self.outside / "secret.png")
        (self.outside / "raw.bin").write_bytes(bytes(range(256)) * (3 * SIDE * SIDE // 256))
        (self.outside / "passwd").write_text("root:x:0:0:root:/root:/bin/bash\n" * 400)
        (self.outside / "secret.wkt").write_text('LOCAL_CS["secret"]')
        (self.outside / "secret.gsb").write_bytes(b"NUM_OREC" + bytes(168))
        (self.outside / "secret.vrt").write_text("<VRTDataset/>")
        (self.outside / "stdin.tif").write_bytes(content)
        shutil.copytree(self.outside, self.outside / "below")
        self.restore_victim()
        (self.home / ".aws").mkdir()
        (self.home / ".aws" / "credentials").write_text(
            "[default]\naws_access_key_id=decoy\naws_secret_access_key=decoy\n"
        )

    def restore_victim(self) -> None:
        """What nothing may change, as it was."""
        for path in self.victim.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.victim / "notes.txt").write_text("as it was\n")
        (self.victim / "start.sh").write_text("export PATH\n")

    def place(self, case: str) -> Place:
        """A fresh folder for one input."""
        folder = self.inputs / case
        folder.mkdir()
        return Place(self, folder)


@dataclass(frozen=True)
class Place:
    """What a generator writes to and reaches for."""

    ground: Ground
    folder: Path

    @property
    def outside(self) -> Path:
        return self.ground.outside

    @property
    def victim(self) -> Path:
        return self.ground.victim

    @property
    def secret(self) -> str:
        return str(self.outside / "secret.tif")

    def url(self, name: str = "x.tif") -> str:
        """An address that is this input's alone: GDAL remembers what it was once answered."""
        return f"http://127.0.0.1:{self.ground.port}/{self.folder.name}/{name}"

    def url6(self, name: str = "x.tif") -> str:
        """The same over IPv6 where this machine has it."""
        return f"http://[::1]:{self.ground.port6}/{self.folder.name}/{name}" if self.ground.port6 else self.url(name)

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file, with its folders."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def copy(self, base: Base, name: str) -> Path:
        """A harmless input under another name."""
        source, path = self.ground.bases[base], self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, path)
        else:
            shutil.copyfile(source, path)
        return path

    def link(self, name: str, target: str | Path) -> Path:
        """A symbolic link."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
        return path


def stac_item(
    name: str, hrefs: dict[str, str], *, links: Iterable[dict[str, str]] = (), assets: dict[str, object] | None = None
) -> str:
    """A STAC item with an asset for each colour."""
    described = {
        key: {"href": href, "type": "image/tiff; application=geotiff", "eo:bands": [{"common_name": key}]}
        for key, href in hrefs.items()
    }
    item = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "geometry": None,
        "properties": {"datetime": "2020-01-01T00:00:00Z"},
        "links": list(links),
        "assets": {**described, **(assets or {})},
    }
    return json.dumps(item)


def reaches(place: Place) -> dict[str, str]:
    """Every way to name something that is not a file of the input's folder, as any text of an input may do."""
    outside, url = place.outside, place.url
    bare = url().removeprefix("http://")
    found = {
        "absolute": place.secret,
        "relative": "../../secret/secret.tif",
        "roundabout": f"./x/../../../{place.outside.name}/secret.tif",
        "http": url(),
        "http6": place.url6(),
        "https": url().replace("http:", "https:"),
        "ftp": url().replace("http:", "ftp:"),
        "file": f"file://{place.secret}",
        "vsicurl": f"/vsicurl/{url('curl.tif')}",
        "vsicurl_upper": f"/VSICURL/{url('upper.tif')}",
        "vsicurl_options": f"/vsicurl?max_retry=0&url={url('options.tif')}",
        "vsicurl_streaming": f"/vsicurl_streaming/{url('stream.tif')}",
        "vsis3": "/vsis3/rsedge-decoy/secret.tif",
        "vsis3_streaming": "/vsis3_streaming/rsedge-decoy/secret.tif",
        "vsigs": "/vsigs/rsedge-decoy/secret.tif",
        "vsiaz": "/vsiaz/rsedge-decoy/secret.tif",
        "vsiadls": "/vsiadls/rsedge-decoy/secret.tif",
        "vsioss": "/vsioss/rsedge-decoy/secret.tif",
        "vsiswift": "/vsiswift/rsedge-decoy/secret.tif",
        "vsiwebhdfs": f"/vsiwebhdfs/http://{bare}",
        "vsizip": f"/vsizip/{outside}/secret.zip/a.tif",
        "vsizip_braces": f"/vsizip/{{{outside}/secret.zip}}/a.tif",
        "vsizip_remote": f"/vsizip/vsicurl/{url('x.zip')}/a.tif",
        "vsitar": f"/vsitar/{outside}/secret.tar/a.tif",
        "vsigzip": f"/vsigzip/{outside}/secret.tif.gz",
        "vsisubfile": f"/vsisubfile/0_10000000,{place.secret}",
        "vsicached": f"/vsicached?file={place.secret}",
        "vsicached_remote": "/vsicached?file="
        + f"/vsicurl/{url('cached.tif')}".replace("/", "%2F").replace(":", "%3A"),
        "vsicrypt": f"/vsicrypt/key=0123456789ABCDEF,file={place.secret}",
        "vsistdin": "/vsistdin/",
        "vsistdin_options": "/vsistdin?buffer_limit=10MB",
        "vrt": f"vrt://{place.secret}?bands=1,2,3",
        "vrt_remote": f"vrt:///vsicurl/{url('vrt.tif')}",
        "subdirectory": f"GTIFF_DIR:1:{place.secret}",
        "derived": f"DERIVED_SUBDATASET:AMPLITUDE:{place.secret}",
        "netcdf": f'NETCDF:"{place.secret}":Band1',
        "hdf5": f'HDF5:"{place.secret}"://Band1',
        "jpeg_subfile": f"JPEG_SUBFILE:Q0,0,10000,{place.secret}",
        "wms": f"WMS:{url('wms')}?SERVICE=WMS&VERSION=1.1.1&REQUEST=GetMap&LAYERS=x&SRS=EPSG:4326&BBOX=0,0,1,1",
        "wms_http": f"{url('wms')}?SERVICE=WMS&VERSION=1.1.1&REQUEST=GetCapabilities",
        "wmts": f"WMTS:{url('wmts')}?REQUEST=GetCapabilities,layer=x",
        "wcs": f"WCS:{url('wcs')}?VERSION=1.0.0&COVERAGE=x",
        "zarr": f'ZARR:"/vsicurl/{url("x.zarr")}"',
        "zarr_local": f'ZARR:"{outside}"',
        "stacit": f'STACIT:"/vsicurl/{url("item.json")}"',
        "stacta": f'STACTA:"/vsicurl/{url("tiled.json")}"',
        "gti": f"GTI:/vsicurl/{url('index.geojson')}",
        "plmosaic": "PLMosaic:api_key=decoy",
        "eedai": "EEDAI:decoy",
        "mrf_inline": mrf(
            place, source=place.secret, data=f"{place.victim}/inline.dat", index=f"{place.victim}/inline.idx"
        ),
        "wms_inline": wms(place, "inline"),
        "vrt_inline": vrt(place.secret),
        "vrt_inline_remote": vrt(f"/vsicurl/{url('inline.tif')}"),
    }
    sparse = place.write(
        "sparse.xml",
        f"<VSISparseFile><Length>200000</Length><SubfileRegion><Filename>{place.secret}</Filename>"
        "<DestinationOffset>0</DestinationOffset><SourceOffset>0</SourceOffset><RegionLength>200000</RegionLength>"
        "</SubfileRegion></VSISparseFile>",
    )
    return {**found, "vsisparse": f"/vsisparse/{sparse}"}


REACHES = (
    "absolute",
    "relative",
    "roundabout",
    "http",
    "http6",
    "https",
    "ftp",
    "file",
    "vsicurl",
    "vsicurl_upper",
    "vsicurl_options",
    "vsicurl_streaming",
    "vsis3",
    "vsis3_streaming",
    "vsigs",
    "vsiaz",
    "vsiadls",
    "vsioss",
    "vsiswift",
    "vsiwebhdfs",
    "vsizip",
    "vsizip_braces",
    "vsizip_remote",
    "vsitar",
    "vsigzip",
    "vsisubfile",
    "vsicached",
    "vsicached_remote",
    "vsicrypt",
    "vsisparse",
    "vsistdin",
    "vsistdin_options",
    "vrt",
    "vrt_remote",
    "subdirectory",
    "derived",
    "netcdf",
    "hdf5",
    "jpeg_subfile",
    "wms",
    "wms_http",
    "wmts",
    "wcs",
    "zarr",
    "zarr_local",
    "stacit",
    "stacta",
    "gti",
    "plmosaic",
    "eedai",
    "mrf_inline",
    "wms_inline",
    "vrt_inline",
    "vrt_inline_remote",
)
"""Names of ``reaches``. GDAL follows most from a VRT, others want credentials or a driver of some builds."""


def escape(text: str) -> str:
    """Text for XML."""
    for letter, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(letter, entity)
    return text


def vrt(
    source: str,
    *,
    relative: bool = False,
    srs: str = "EPSG:32632",
    bands: int = 3,
    source_kind: str = "SimpleSource",
    in_source: str = "",
    in_dataset: str = "",
) -> str:
    """A VRT of a source's bands."""
    text = f'<VRTDataset rasterXSize="{SIDE}" rasterYSize="{SIDE}"><SRS>{escape(srs)}</SRS>'
    text += "<GeoTransform>600000,10,0,5100000,0,-10</GeoTransform>" + in_dataset
    for band, colour in zip(range(1, bands + 1), ("Red", "Green", "Blue"), strict=False):
        text += f'<VRTRasterBand dataType="Byte" band="{band}"><ColorInterp>{colour}</ColorInterp><{source_kind}>'
        text += f'<SourceFilename relativeToVRT="{int(relative)}">{escape(source)}</SourceFilename>{in_source}'
        text += f"<SourceBand>{band}</SourceBand></{source_kind}></VRTRasterBand>"
    return text + "</VRTDataset>"


def mrf(place: Place, *, source: str = "", data: str = "", index: str = "", compression: str = "NONE") -> str:
    """An MRF description: with a source it is a cache, which GDAL fills."""
    cached = f"<CachedSource><Source>{source}</Source></CachedSource>" if source else ""
    files = f"<DataFile>{data}</DataFile>" * bool(data) + f"<IndexFile>{index}</IndexFile>" * bool(index)
    return (
        f'<MRF_META>{cached}<Raster><Size x="{SIDE}" y="{SIDE}" c="3"/><PageSize x="{SIDE}" y="{SIDE}" c="3"/>'
        f"<Compression>{compression}</Compression>{files}</Raster></MRF_META>"
    )


def wms(place: Place, name: str, *, service: str = "TMS", more: str = "", url: str = "") -> str:
    """A description of a map service."""
    address = url or place.url(f"{name}/${{z}}/${{x}}/${{y}}.tif")
    return (
        f'<GDAL_WMS><Service name="{service}"><ServerUrl>{escape(address)}</ServerUrl><Layers>x</Layers></Service>'
        "<DataWindow><UpperLeftX>600000</UpperLeftX><UpperLeftY>5100000</UpperLeftY><LowerRightX>602240</LowerRightX>"
        f"<LowerRightY>5097760</LowerRightY><SizeX>{SIDE}</SizeX><SizeY>{SIDE}</SizeY><TileLevel>0</TileLevel>"
        f"</DataWindow><Projection>EPSG:32632</Projection><BlockSizeX>{SIDE}</BlockSizeX><BlockSizeY>{SIDE}</BlockSizeY>"
        f"<BandsCount>3</BandsCount>{more}</GDAL_WMS>"
    )


def sqlite_file(path: Path, statements: Iterable[str]) -> Path:
    """A SQLite database."""
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    return path
