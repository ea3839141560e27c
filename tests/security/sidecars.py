"""Harmless rasters with something hostile beside them or inside: what they show is their own pixels, or nothing."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests import scenes
from tests.security.places import SIDE, Base, Case, Place, escape, mrf, vrt, wms

_USES = ("caption", "image")
_EVERY_USE = ("info", "caption", "embed", "image", "scene", "html", "scl", "mask", "locate", "search")


def cases() -> Iterator[Case]:
    """Sidecars of every kind beside a GeoTIFF, the likely ones beside the other formats, then what files hold."""
    for name, make in AUXILIARY.items():
        uses = _EVERY_USE if name.startswith("overview") else _EVERY_USE[:4]
        yield Case(f"aux-{name}", ".aux.xml", partial(_aux, "tif", make), own="tif", uses=uses)
    for base in ("jp2", "png", "jpg", "webp"):
        for name in ("overview", "overview-remote", "srs-url", "grid"):
            yield Case(f"aux-{name}-{base}", ".aux.xml", partial(_aux, base, AUXILIARY[name]), own=base, uses=_USES)
    for base in ("tif", "jp2", "png", "jpg", "webp"):
        for suffix in (".ovr", ".msk"):
            for name, make in _BESIDE.items():
                case = f"beside{suffix}-{name}-{base}"
                yield Case(case, f"{suffix} beside", partial(_beside, base, suffix, make), own=base, uses=_USES)
    for name in _LINKED:
        yield Case(f"linked-{name}", "sidecar that is a link", partial(_linked, name), own="tif", uses=_USES)
    for name, domain, key, value in _TAGS:
        yield Case(f"tag-{name}", "TIFF metadata", partial(_tagged, domain, key, value), own="tif", uses=_EVERY_USE)
    for name, text in _GML.items():
        yield Case(f"gmljp2-{name}", "GML in JP2", partial(_gml, text), own="jp2", uses=_USES)
    for name, text in _TEXTS.items():
        for base in ("tif", "png", "jpg", "webp", "jp2"):
            yield Case(f"two-faced-{name}-{base}", "polyglot", partial(_two_faced, base, text), own=base, uses=_USES)


def _suffix(base: Base) -> str:
    return f"holiday.{base}"


def _aux(base: Base, make: Callable[[Place], str], place: Place) -> str:
    image = place.copy(base, _suffix(base))
    place.write(f"{image.name}.aux.xml", f"<PAMDataset>{make(place)}</PAMDataset>")
    return str(image)


def _overview(target: Callable[[Place], str], place: Place) -> str:
    return f'<Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{escape(target(place))}</MDI></Metadata>'


def _grid_wkt(place: Place) -> str:
    """A CRS that PROJ reads a file for as soon as it leads elsewhere."""
    return (
        'PROJCS["x",GEOGCS["x",DATUM["x",SPHEROID["International 1924",6378388,297],EXTENSION["PROJ4_GRIDS",'
        f'"{place.outside}/secret.gsb"]],PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],'
        'PROJECTION["Transverse_Mercator"],PARAMETER["latitude_of_origin",0],PARAMETER["central_meridian",9],'
        'PARAMETER["scale_factor",0.9996],PARAMETER["false_easting",500000],PARAMETER["false_northing",0],'
        'UNIT["metre",1]]'
    )


def _extension_wkt(place: Place) -> str:
    return _grid_wkt(place).replace(
        'UNIT["metre",1]]',
        'UNIT["metre",1],EXTENSION["PROJ4","+proj=utm +zone=32 +ellps=intl '
        f'+nadgrids={place.outside}/secret.gsb +type=crs"]]',
    )


def _band(text: str) -> str:
    return f'<PAMRasterBand band="1">{text}</PAMRasterBand>'


AUXILIARY: dict[str, Callable[[Place], str]] = {
    "overview": partial(_overview, lambda place: place.secret),
    "overview-relative": partial(_overview, lambda _: ":::BASE:::../../secret/secret.tif"),
    "overview-remote": partial(_overview, lambda place: f"/vsicurl/{place.url()}"),
    "overview-http": partial(_overview, lambda place: place.url()),
    "overview-zip": partial(_overview, lambda place: f"/vsizip/{place.outside}/secret.zip/a.tif"),
    "overview-vrt": partial(_overview, lambda place: vrt(place.secret)),
    "overview-mrf": partial(
        _overview,
        lambda place: mrf(place, source=place.secret, data=f"{place.victim}/o.dat", index=f"{place.victim}/o.idx"),
    ),
    "srs-file": lambda place: f"<SRS>{place.outside}/secret.wkt</SRS>",
    "srs-url": lambda place: f"<SRS>{place.url('srs.wkt')}</SRS>",
    "grid": lambda place: f"<SRS>{escape(_grid_wkt(place))}</SRS>",
    "grid-extension": lambda place: f"<SRS>{escape(_extension_wkt(place))}</SRS>",
    "grid-proj": lambda place: (
        f"<SRS>+proj=utm +zone=32 +ellps=intl +nadgrids={place.outside}/secret.gsb +type=crs</SRS>"
    ),
    "grid-remote": lambda place: (
        f"<SRS>+proj=utm +zone=32 +ellps=intl +nadgrids={place.url('grid.tif')} +type=crs</SRS>"
    ),
    "init": lambda place: f"<SRS>+init={place.outside}/passwd:1</SRS>",
    "points-url": lambda place: (
        f'<GCPList Projection="{place.url("gcp.wkt")}"><GCP Id="1" Pixel="0" Line="0" X="1" Y="2" Z="0"/></GCPList>'
    ),
    "subdataset": lambda place: (
        f'<Subdataset name="x"><PAMDataset><SRS>{place.url("sub.wkt")}</SRS></PAMDataset></Subdataset>'
    ),
    "xml-vrt": lambda place: f'<Metadata domain="xml:VRT" format="xml">{vrt(place.secret)}</Metadata>',
    "geolocation": lambda place: (
        f'<Metadata domain="GEOLOCATION"><MDI key="X_DATASET">{place.secret}</MDI><MDI key="X_BAND">1</MDI>'
        f'<MDI key="Y_DATASET">{place.secret}</MDI><MDI key="Y_BAND">2</MDI><MDI key="LINE_OFFSET">0</MDI></Metadata>'
    ),
    "rpc-terrain": lambda place: f'<Metadata domain="RPC"><MDI key="RPC_DEM">{place.secret}</MDI></Metadata>',
    "band-overview": lambda place: _band(_overview(lambda at: at.secret, place)),
    "mask-file": lambda place: _band(f'<Metadata domain="MASK"><MDI key="MASK_FILE">{place.secret}</MDI></Metadata>'),
    "entity": lambda place: (
        f'<!DOCTYPE x [<!ENTITY e SYSTEM "file://{place.secret}">]><Metadata><MDI key="k">&e;</MDI></Metadata>'
    ),
}


def _beside(base: Base, suffix: str, make: Callable[[Place], str], place: Place) -> str:
    image = place.copy(base, _suffix(base))
    flags = "".join(f'<MDI key="INTERNAL_MASK_FLAGS_{band}">2</MDI>' for band in (1, 2, 3))  # else GDAL ignores a mask
    text = make(place).replace("<VRTRasterBand ", f"<Metadata>{flags}</Metadata><VRTRasterBand ", 1)
    place.write(f"{image.name}{suffix}", text)
    return str(image)


_BESIDE: dict[str, Callable[[Place], str]] = {
    "vrt": lambda place: vrt(place.secret),
    "vrt-remote": lambda place: vrt(f"/vsicurl/{place.url('beside.tif')}"),
    "wms": lambda place: wms(place, "beside"),
    "mrf": lambda place: mrf(place, source=place.secret, data=f"{place.victim}/b.dat", index=f"{place.victim}/b.idx"),
}

_LINKED = [
    "holiday.tif.ovr",
    "holiday.tif.msk",
    "holiday.tif.aux.xml",
    "holiday.tfw",
    "holiday.wld",
    "holiday.tifw",
    "holiday.aux",
    "holiday.rrd",
    "holiday.IMD",
    "holiday.RPB",
    "holiday_RPC.TXT",
    "holiday_rpc.txt",
    "holiday_metadata.txt",
    "holiday.tab",
    "holiday.prj",
    "holiday.xml",
    "holiday.tif.xml",
    "holiday.vat.dbf",
    "holiday.tif.ovr.msk",
    "holiday.tif.msk.ovr",
    "holiday.hdr",
    "holiday.PVL",
    "DIM_holiday.XML",
    "holiday_MTL.txt",
    "METADATA.DIM",
]


def _linked(name: str, place: Place) -> str:
    image = place.folder / "holiday.tif"
    if name.endswith(("tfw", "wld", "tifw", "tab", "prj")):  # sought where the file itself has no georeference
        scenes.write(image, scenes.pixels(3, SIDE, SIDE, seed=7), crs=None, transform=None, photometric="RGB")
    else:
        place.copy("tif", image.name)
    raster = name.endswith((".ovr", ".msk"))
    place.link(name, place.outside / ("secret.tif" if raster else "passwd"))
    return str(image)


_TAGS: tuple[tuple[str, str, str, Callable[[Place], str]], ...] = (
    ("overview", "OVERVIEWS", "OVERVIEW_FILE", lambda place: place.secret),
    ("overview-relative", "OVERVIEWS", "OVERVIEW_FILE", lambda _: ":::BASE:::../../secret/secret.tif"),
    ("overview-remote", "OVERVIEWS", "OVERVIEW_FILE", lambda place: f"/vsicurl/{place.url()}"),
    ("overview-vrt", "OVERVIEWS", "OVERVIEW_FILE", lambda place: vrt(place.secret)),
    ("geolocation", "GEOLOCATION", "X_DATASET", lambda place: place.secret),
    ("terrain", "RPC", "RPC_DEM", lambda place: place.secret),
    ("subdatasets", "SUBDATASETS", "SUBDATASET_1_NAME", lambda place: place.secret),
)


def _tagged(domain: str, key: str, value: Callable[[Place], str], place: Place) -> str:
    """A GeoTIFF whose own metadata tag holds the domain, as GDAL reads it."""
    path = place.folder / "holiday.tif"
    scenes.write(path, scenes.pixels(3, SIDE, SIDE, seed=7), photometric="RGB", tags={"FILLER": "x" * 900})
    text = f'<GDALMetadata>\n  <Item name="{key}" domain="{domain}">{escape(value(place))}</Item>\n</GDALMetadata>'
    content = path.read_bytes()
    start = content.index(b"<GDALMetadata>")
    end = content.index(b"</GDALMetadata>") + len(b"</GDALMetadata>")
    if len(text) > end - start:  # a whole VRT: make room at the end, and lead the tag there
        entry = content.index(struct.pack("<HH", 42112, 2))
        content = bytearray(content)
        struct.pack_into("<II", content, entry + 4, len(text) + 1, len(content))
        path.write_bytes(bytes(content) + text.encode() + b"\0")
    else:
        path.write_bytes(content[:start] + text.encode().ljust(end - start) + content[end:])
    return str(path)


def _gml(text: Callable[[Place], str], place: Place) -> str:
    """A JP2 whose GML is ours and whose GeoTIFF box is gone."""
    path = place.copy("jp2", "holiday.jp2")
    content = path.read_bytes()
    stream = content.index(b"jp2c") - 4
    header = content.index(b"jp2h") - 4
    length = struct.unpack(">I", content[header : header + 4])[0]
    xml = text(place)
    root = _box(b"asoc", _box(b"lbl ", b"gml.root-instance") + _box(b"xml ", xml.encode()))
    gml = _box(b"asoc", _box(b"lbl ", b"gml.data") + root)
    path.write_bytes(content[: header + length] + gml + content[stream:])
    return str(path)


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def _coverage(srs: str, more: str = "") -> str:
    return (
        '<gml:FeatureCollection xmlns:gml="http://www.opengis.net/gml" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f"{more}<gml:featureMember><gml:FeatureCollection><gml:featureMember><gml:RectifiedGridCoverage>"
        '<gml:rectifiedGridDomain><gml:RectifiedGrid dimension="2"><gml:limits><gml:GridEnvelope><gml:low>0 0</gml:low>'
        f"<gml:high>{SIDE - 1} {SIDE - 1}</gml:high></gml:GridEnvelope></gml:limits><gml:origin>"
        f'<gml:Point gml:id="p" srsName="{srs}"><gml:pos>600005 5099995</gml:pos></gml:Point></gml:origin>'
        f'<gml:offsetVector srsName="{srs}">10 0</gml:offsetVector><gml:offsetVector srsName="{srs}">0 -10'
        "</gml:offsetVector></gml:RectifiedGrid></gml:rectifiedGridDomain></gml:RectifiedGridCoverage>"
        "</gml:featureMember></gml:FeatureCollection></gml:featureMember></gml:FeatureCollection>"
    )


_GML: dict[str, Callable[[Place], str]] = {
    "srs-url": lambda place: _coverage(place.url("gml.wkt")),
    "srs-file": lambda place: _coverage(f"{place.outside}/secret.wkt"),
    "srs-grid": lambda place: _coverage(f"+proj=utm +zone=32 +ellps=intl +nadgrids={place.outside}/secret.gsb"),
    "dictionary-url": lambda place: _coverage(f"{place.url('dictionary.gml')}#crs1"),
    "dictionary-box": lambda place: _coverage("gmljp2://xml/CRSDictionary.xml#ogrcrs1"),
    "schema": lambda place: _coverage("urn:ogc:def:crs:EPSG::32632").replace(
        "<gml:FeatureCollection ", f'<gml:FeatureCollection xsi:schemaLocation="x {place.url("schema.xsd")}" ', 1
    ),
    "link": lambda place: _coverage(
        "urn:ogc:def:crs:EPSG::32632", f'<gml:metaDataProperty xlink:href="{place.url("annotation.kml")}"/>'
    ),
    "entity": lambda place: f'<!DOCTYPE x [<!ENTITY e SYSTEM "{place.secret}">]>' + _coverage("&e;"),
}

_TEXTS: dict[str, Callable[[Place], str]] = {
    "vrt": lambda place: vrt(place.secret),
    "mrf": lambda place: mrf(place, source=place.secret, data=f"{place.victim}/p.dat", index=f"{place.victim}/p.idx"),
    "wms": lambda place: wms(place, "polyglot"),
    "pds": lambda place: (
        f'\nPDS_VERSION_ID = PDS3\r\nRECORD_BYTES = 20\r\n^IMAGE = "{place.outside}/raw.bin"\r\nOBJECT = IMAGE\r\n'
        " LINES = 10\r\n LINE_SAMPLES = 20\r\n SAMPLE_BITS = 8\r\n BANDS = 3\r\nEND_OBJECT = IMAGE\r\nEND\r\n"
    ),
    "kml": lambda place: (
        f'<kml xmlns="http://www.opengis.net/kml/2.2"><GroundOverlay><Icon><href>{place.secret}</href></Icon><LatLonBox>'
        "<north>1</north><south>0</south><east>1</east><west>0</west></LatLonBox></GroundOverlay></kml>"
    ),
}


def _two_faced(base: Base, text: Callable[[Place], str], place: Place) -> str:
    """An image that begins as one and holds, in its first bytes where drivers look, the text of something else."""
    path = place.copy(base, _suffix(base))
    path.write_bytes(_TWO_FACED[base](path, text(place).encode()))
    return str(path)


def _tiff_with(path: Path, text: bytes) -> bytes:
    """A TIFF with the text behind its first eight bytes, and everything that was there further back."""
    from rasterio.io import MemoryFile

    plain = scenes.pixels(3, SIDE, SIDE, seed=7)
    with MemoryFile() as file:
        scenes_profile = {"driver": "GTiff", "count": 3, "height": SIDE, "width": SIDE, "dtype": "uint8"}
        with file.open(**scenes_profile, **scenes.UTM, photometric="RGB", tiled=False) as dataset:
            dataset.write(plain)
        content = file.read()
    moved = len(text) + len(text) % 2
    first = struct.unpack("<I", content[4:8])[0] + moved
    shifted = bytearray(content[:4] + struct.pack("<I", first) + text.ljust(moved) + content[8:])
    _shift_offsets(shifted, first, moved)
    return bytes(shifted)


def _shift_offsets(content: bytearray, directory: int, moved: int) -> None:
    """Correct the offsets in a little-endian TIFF's directory after ``moved`` bytes were put before its content."""
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 12: 8, 16: 8}
    for index in range(struct.unpack_from("<H", content, directory)[0]):
        entry = directory + 2 + 12 * index
        tag, kind, count, value = struct.unpack_from("<HHII", content, entry)
        if sizes[kind] * count > 4:
            struct.pack_into("<I", content, entry + 8, value + moved)
            start = value + moved
        else:
            start = entry + 8
        if tag in (273, 324):  # where strips and tiles lie
            form = {3: "<H", 4: "<I"}[kind]
            for number in range(count):
                at = start + number * sizes[kind]
                struct.pack_into(form, content, at, struct.unpack_from(form, content, at)[0] + moved)


def _png_with(path: Path, text: bytes) -> bytes:
    content = path.read_bytes()
    body = b"tEXtComment\0" + text.replace(b"\0", b"")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return content[:33] + chunk + content[33:]  # behind the header, which must come first


def _jpeg_with(path: Path, text: bytes) -> bytes:
    content = path.read_bytes()
    return content[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + content[2:]


def _webp_with(path: Path, text: bytes) -> bytes:
    """The text as the first chunk, of a kind that readers skip."""
    content = path.read_bytes()
    chunk = b"XMP " + struct.pack("<I", len(text)) + text + b"\0" * (len(text) % 2)
    body = b"WEBP" + content[12:] + chunk
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _jp2_with(path: Path, text: bytes) -> bytes:
    content = path.read_bytes()
    header = content.index(b"jp2h") - 4
    return content[:header] + _box(b"xml ", text) + content[header:]


_TWO_FACED: dict[Base, Callable[[Path, bytes], bytes]] = {
    "tif": _tiff_with,
    "png": _png_with,
    "jpg": _jpeg_with,
    "webp": _webp_with,
    "jp2": _jp2_with,
}
