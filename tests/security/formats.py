"""Files of formats that name other files or addresses, called ``.tif`` and by their own names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial

from tests.security.places import RASTER_USES, SIDE, Case, Place, mrf, vrt, wms
from tests.security.vrts import EVERY_USE


def cases() -> Iterator[Case]:
    """Each description under the name of a GeoTIFF and under its usual one."""
    for name, (kind, suffix, make) in _DESCRIPTIONS.items():
        several = EVERY_USE if name in ("wms-tms", "mrf-cache", "ers") else RASTER_USES
        yield Case(f"{name}-as.tif", kind, partial(_write, make, "holiday.tif"), uses=several)
        yield Case(f"{name}-as-its-own", kind, partial(_write, make, f"holiday{suffix}"))


def _write(make: Callable[[Place, str], str], name: str, place: Place) -> str:
    return str(place.write(name, make(place, name)))


def _service(service: str, address: str, place: Place, _: str) -> str:
    return wms(place, "x", service=service, url=place.url(address))


def _wmts(place: Place, _: str) -> str:
    return (
        f"<GDAL_WMTS><GetCapabilitiesUrl>{place.url('wmts')}?REQUEST=GetCapabilities</GetCapabilitiesUrl>"
        "<Layer>x</Layer></GDAL_WMTS>"
    )


def _wmts_file(place: Place, _: str) -> str:
    return f"<GDAL_WMTS><GetCapabilitiesUrl>{place.outside}/passwd</GetCapabilitiesUrl><Layer>x</Layer></GDAL_WMTS>"


def _wmts_cache(place: Place, name: str) -> str:
    return _wmts(place, name).replace("<Layer>", f"<Cache><Path>{place.victim}/wmts</Path></Cache><Layer>")


def _wcs(place: Place, _: str) -> str:
    return (
        f"<WCS_GDAL><ServiceURL>{place.url('wcs')}?</ServiceURL><Version>1.0.0</Version><CoverageName>x</CoverageName>"
        f"<CACHE>{place.victim}/wcs</CACHE></WCS_GDAL>"
    )


def _wms_cache(place: Place, _: str) -> str:
    return wms(place, "cache", more=f"<Cache><Path>{place.victim}/tiles</Path></Cache>")


def _wms_file(place: Place, _: str) -> str:
    return wms(place, "file", url=f"file://{place.secret}?${{z}}${{x}}${{y}}")


def _mrf_index(place: Place, _: str) -> str:
    """A cache whose index is a file that the user may write."""
    return mrf(place, source=place.secret, data=f"{place.victim}/x.dat", index=f"{place.victim}/start.sh")


def _mrf_cache(place: Place, _: str) -> str:
    return mrf(place, source=place.secret, data=f"{place.victim}/x.dat", index=f"{place.victim}/x.idx")


def _mrf_cache_remote(place: Place, _: str) -> str:
    source = f"/vsicurl/{place.url('mrf.tif')}"
    return mrf(place, source=source, data=f"{place.victim}/x.dat", index=f"{place.victim}/x.idx")


def _mrf_data(place: Place, _: str) -> str:
    """Pages that an index beside the file looks for in a file elsewhere."""
    place.write("own.idx", (0).to_bytes(8, "big") + (3 * SIDE * SIDE).to_bytes(8, "big"))
    return mrf(place, data=f"{place.outside}/raw.bin", index=f"{place.folder}/own.idx")


def _mrf_clone(place: Place, _: str) -> str:
    text = mrf(place, source=place.secret, data=f"{place.victim}/x.dat", index=f"{place.victim}/x.idx")
    return text.replace("<Source>", '<Source clone="true">')


def _tile_index(location: Callable[[Place], str], index: str, place: Place, _: str) -> str:
    ring = [[600000, 5097760], [602240, 5097760], [602240, 5100000], [600000, 5100000], [600000, 5097760]]
    feature = {
        "type": "Feature",
        "properties": {"location": location(place)},
        "geometry": {"type": "Polygon", "coordinates": [ring]},
    }
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32632"}}
    place.write("index.geojson", json.dumps({"type": "FeatureCollection", "crs": crs, "features": [feature]}))
    bands = "".join(f'<Band band="{band}" dataType="Byte"/>' for band in (1, 2, 3))
    dataset = index or str(place.folder / "index.geojson")
    return (
        f"<GDALTileIndexDataset><IndexDataset>{dataset}</IndexDataset><LocationField>location</LocationField>"
        f"<ResX>10</ResX><ResY>10</ResY><BandCount>3</BandCount>{bands}</GDALTileIndexDataset>"
    )


def _tile_index_remote(place: Place, name: str) -> str:
    return _tile_index(lambda _: "x.tif", f"/vsicurl/{place.url('index.geojson')}", place, name)


def _isis3(place: Place, _: str) -> str:
    return """Object = IsisCube
  Object = Core
    ^Core = ../../secret/raw.bin
    StartByte = 1
    Format = BandSequential
    Group = Dimensions
      Samples = 20
      Lines = 10
      Bands = 3
    End_Group
    Group = Pixels
      Type = UnsignedByte
      ByteOrder = Lsb
      Base = 0.0
      Multiplier = 1.0
    End_Group
  End_Object
End_Object
End
"""


def _isis2(place: Place, _: str) -> str:
    return """CCSD3ZF0000100000001NJPL3IF0PDS200000001 = SFDU_LABEL
RECORD_TYPE = FIXED_LENGTH
RECORD_BYTES = 512
^QUBE = "../../secret/raw.bin"
OBJECT = QUBE
  AXES = 3
  AXIS_NAME = (SAMPLE,LINE,BAND)
  CORE_ITEMS = (20,10,3)
  CORE_ITEM_BYTES = 1
  CORE_ITEM_TYPE = UNSIGNED_INTEGER
  CORE_BASE = 0.0
  CORE_MULTIPLIER = 1.0
  SUFFIX_ITEMS = (0,0,0)
END_OBJECT = QUBE
END
"""


def _pds3(place: Place, _: str) -> str:
    lines = (
        "PDS_VERSION_ID = PDS3", "RECORD_TYPE = FIXED_LENGTH", "RECORD_BYTES = 20", "FILE_RECORDS = 10",
        '^IMAGE = "../../secret/raw.bin"', "OBJECT = IMAGE", " LINES = 10", " LINE_SAMPLES = 20",
        " SAMPLE_TYPE = UNSIGNED_INTEGER", " SAMPLE_BITS = 8", " BANDS = 3", " BAND_STORAGE_TYPE = BAND_SEQUENTIAL",
        "END_OBJECT = IMAGE", "END", "",
    )  # fmt: skip
    return "\r\n".join(lines)


def _pds4(place: Place, _: str) -> str:
    axes = "".join(
        f"<Axis_Array><axis_name>{name}</axis_name><elements>{size}</elements><sequence_number>{number}</sequence_number>"
        "</Axis_Array>"
        for number, (name, size) in enumerate((("Band", 3), ("Line", 10), ("Sample", 20)), 1)
    )
    return (
        '<?xml version="1.0"?><Product_Observational xmlns="http://pds.nasa.gov/pds4/pds/v1"><File_Area_Observational>'
        f"<File><file_name>../../secret/raw.bin</file_name></File><Array_3D_Image>"
        '<offset unit="byte">0</offset><axes>3</axes><axis_index_order>Last Index Fastest</axis_index_order>'
        f"<Element_Array><data_type>UnsignedByte</data_type></Element_Array>{axes}</Array_3D_Image>"
        "</File_Area_Observational></Product_Observational>"
    )


def _vicar(_place: Place, _: str) -> str:
    label = (
        "LBLSIZE=1024  FORMAT='BYTE'  TYPE='IMAGE'  BUFSIZ=20  DIM=3  EOL=0  RECSIZE=20  ORG='BSQ'  NL=10  NS=20  "
        "NB=3  N1=20  N2=10  N3=3  N4=0  NBB=0  NLB=0  "
        "HOST='X86-LINUX'  INTFMT='LOW'  REALFMT='RIEEE'  BHOST='X86-LINUX'  "
    )
    return label.ljust(1024, "\0") + "x" * 600


def _ers(place: Place, _: str) -> str:
    return """DatasetHeader Begin
\tVersion = "6.0"
\tDataFile = "../../secret/raw.bin"
\tDataSetType = ERStorage
\tDataType = Raster
\tByteOrder = LSBFirst
\tRasterInfo Begin
\t\tCellType = Unsigned8BitInteger
\t\tNrOfLines = 10
\t\tNrOfCellsPerLine = 20
\t\tNrOfBands = 3
\tRasterInfo End
DatasetHeader End
"""


def _ers_translated(place: Place, name: str) -> str:
    """One whose data GDAL opens as a dataset of any kind."""
    place.write("inner", vrt(place.secret))
    return _ers(place, name).replace("ERStorage", "Translated").replace(f"{place.outside}/raw.bin", "inner")


def _kml(href: Callable[[Place], str], place: Place, _: str) -> str:
    return (
        '<?xml version="1.0"?><kml xmlns="http://www.opengis.net/kml/2.2"><GroundOverlay><Icon>'
        f"<href>{href(place)}</href></Icon><LatLonBox><north>1</north><south>0</south><east>1</east><west>0</west>"
        "</LatLonBox></GroundOverlay></kml>"
    )


def _kml_link(place: Place, _: str) -> str:
    box = "<north>1</north><south>0</south><east>1</east><west>0</west>"
    return (
        '<?xml version="1.0"?><kml xmlns="http://www.opengis.net/kml/2.2"><Document><Region><LatLonAltBox>'
        f"{box}</LatLonAltBox></Region><NetworkLink><Link><href>{place.url('link.kml')}</href></Link></NetworkLink>"
        "</Document></kml>"
    )


def _tilejson(place: Place, _: str) -> str:
    return json.dumps({"tilejson": "2.2.0", "tiles": [place.url("{z}/{x}/{y}.tif")], "minzoom": 0, "maxzoom": 0})


def _stacit(href: Callable[[Place], str], place: Place, _: str) -> str:
    asset = {"href": href(place), "type": "image/tiff", "proj:shape": [SIDE, SIDE]}
    asset |= {"proj:transform": [10, 0, 600000, 0, -10, 5100000], "proj:epsg": 32632, "eo:bands": [{"name": "B1"}]}
    item = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": ["https://stac-extensions.github.io/projection/v1.0.0/schema.json"],
        "id": "x",
        "geometry": None,
        "properties": {"proj:epsg": 32632},
        "assets": {"B1": asset},
    }
    return json.dumps({"type": "FeatureCollection", "features": [item], "links": []})


def _stacta(place: Place, _: str) -> str:
    matrix = {"identifier": "0", "scaleDenominator": 35714.28, "topLeftCorner": [600000, 5100000]}
    matrix |= {"tileWidth": 224, "tileHeight": 224, "matrixWidth": 1, "matrixHeight": 1}
    template = {"href": place.url("{TileMatrix}/{TileRow}/{TileCol}.tif"), "eo:bands": [{"name": "B1"}]}
    properties = {
        "tiled-assets:tile_matrix_sets": {
            "x": {"identifier": "x", "supportedCRS": "urn:ogc:def:crs:EPSG::32632", "tileMatrix": [matrix]}
        },
        "tiled-assets:tile_matrix_links": {"x": {"url": "#x", "limits": {}}},
    }
    item = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": ["https://stac-extensions.github.io/tiled-assets/v1.0.0/schema.json"],
        "id": "x",
        "geometry": None,
        "properties": properties,
        "asset_templates": {"bands": template},
        "assets": {},
    }
    return json.dumps(item)


def _dimap(place: Place, _: str) -> str:
    return (
        "<Dimap_Document><Metadata_Id><METADATA_FORMAT>DIMAP</METADATA_FORMAT></Metadata_Id><Raster_Dimensions>"
        f"<NCOLS>{SIDE}</NCOLS><NROWS>{SIDE}</NROWS><NBANDS>3</NBANDS></Raster_Dimensions><Data_Access><Data_File>"
        f'<DATA_FILE_PATH href="../../secret/secret.tif"/></Data_File></Data_Access></Dimap_Document>'
    )


def _radarsat(place: Place, _: str) -> str:
    return (
        '<?xml version="1.0"?><product xmlns="http://www.rsi.ca/rs2/prod/xml/schemas"><imageAttributes>'
        "<rasterAttributes><dataType>Magnitude Detected</dataType><bitsPerSample>8</bitsPerSample>"
        f"<numberOfSamplesPerLine>{SIDE}</numberOfSamplesPerLine><numberOfLines>{SIDE}</numberOfLines>"
        f'</rasterAttributes><fullResolutionImageData pole="HH">{place.secret}</fullResolutionImageData>'
        "</imageAttributes></product>"
    )


def _ndf(place: Place, _: str) -> str:
    return (
        'NDF_REVISION=0.00;\nPRODUCT_NUMBER="x";\nDATA_FILE_INTERLEAVING=BSQ;\nNUMBER_OF_BANDS_IN_VOLUME=1;\n'
        "BITS_PER_PIXEL=8;\nPIXELS_PER_LINE=20;\nLINES_PER_DATA_FILE=10;\nBAND1_FILENAME=../../secret/raw.bin;\n"
        "END_OF_HDR;\n"
    )


def _ozi(place: Place, _: str) -> str:
    return f"OziExplorer Map Data File Version 2.2\nholiday\n{place.secret}\n1 ,Map Code,\nWGS 84,,0.0,0.0,WGS 84\n"


def _til(place: Place, _: str) -> str:
    place.write("holiday.IMD", f'version = "R";\nnumRows = {SIDE};\nnumColumns = {SIDE};\nEND;\n')
    return (
        f'bandId = "RGB";\nnumTiles = 1;\ntileSizeX = {SIDE};\ntileSizeY = {SIDE};\ntileUnits = "Pixels";\n'
        f'BEGIN_GROUP = TILE_1\n filename = "../../secret/secret.tif";\n ULColOffset = 0;\n ULRowOffset = 0;\n'
        f" LRColOffset = {SIDE - 1};\n LRRowOffset = {SIDE - 1};\nEND_GROUP = TILE_1\nEND;\n"
    )


def _photomod(place: Place, _: str) -> str:
    return (
        '<phr version="1.0"><PrfTypeVerision major="1" minor="1"/><Type>Raster</Type><Spaces Name="x"/>'
        f'<Width>{SIDE}</Width><Files tile_size="{SIDE}"><x path="../../secret/secret.tif"/></Files></phr>'
    )


def _snodas(place: Place, _: str) -> str:
    return (
        "Format version: NOHRSC GIS/RS raster file v1.1\nData file pathname: ../../secret/raw.bin\n"
        "Number of columns: 20\nNumber of rows: 10\nData type: integer\nData bytes per pixel: 2\n"
    )


def _fast(place: Place, _: str) -> str:
    header = (
        f"ACQUISITION DATE =20200101 PIXELS PER LINE =00020 LINES PER BAND =00010 FILENAME ={place.outside}/raw.bin "
    )
    return header.ljust(1536) + "GEOMETRIC DATA ".ljust(3072)


def _pci_auxiliary(place: Place, name: str) -> str:
    stem = name.rsplit(".", 1)[0]
    place.write(
        f"{stem}.aux",
        f"AuxilaryTarget: {place.outside}/raw.bin\nRawDefinition: 20 10 3\nChanDefinition-1: 8U 0 1 20 Swapped\n"
        "ChanDefinition-2: 8U 200 1 20 Swapped\nChanDefinition-3: 8U 400 1 20 Swapped\n",
    )
    return "x" * 1000


def _envi(place: Place, name: str) -> str:
    stem = name.rsplit(".", 1)[0]
    place.write(
        f"{stem}.hdr",
        "ENVI\nsamples = 20\nlines = 10\nbands = 3\nheader offset = 0\nfile type = ENVI Standard\ndata type = 1\n"
        "interleave = bsq\nbyte order = 0\n"
        f"coordinate system string = {{{place.url('envi.wkt')}}}\nspectra file = {place.outside}/raw.bin\n",
    )
    place.link(f"{stem}.sta", f"{place.outside}/raw.bin")
    return "x" * 1000


def _ehdr(place: Place, name: str) -> str:
    stem = name.rsplit(".", 1)[0]
    place.write(
        f"{stem}.hdr", "NROWS 10\nNCOLS 20\nNBANDS 3\nNBITS 8\nLAYOUT BSQ\nULXMAP 0\nULYMAP 0\nXDIM 1\nYDIM 1\n"
    )
    for suffix in ("prj", "clr", "stx"):
        place.link(f"{stem}.{suffix}", f"{place.outside}/passwd")
    return "x" * 1000


def _genbin(place: Place, name: str) -> str:
    stem = name.rsplit(".", 1)[0]
    place.write(
        f"{stem}.hdr",
        f"BANDS:      3\nROWS:    10\nCOLS:    20\nINTERLEAVING:    BSQ\nDATATYPE:  U8\nBAND_ID: {place.secret}\n",
    )
    return "x" * 1000


def _table_of_contents(place: Place, _: str) -> str:
    return (
        "<Table_of_Contents><file_header/><product product_title='ProductTitle'><disc id='DiscId'><frame_list "
        f"number_of_frames='1'><scale size='1:500 K'><frame "
        f"name='{place.secret}'><frame_path>{place.outside}</frame_path>"
        "</frame></scale></frame_list></disc></product></Table_of_Contents>"
    )


_DESCRIPTIONS: dict[str, tuple[str, str, Callable[[Place, str], str]]] = {
    "wms-tms": ("map service", ".xml", lambda place, _: wms(place, "tms")),
    "wms-wms": ("map service", ".xml", partial(_service, "WMS", "wms?")),
    "wms-tile-service": ("map service", ".xml", partial(_service, "TileService", "t?")),
    "wms-worldwind": ("map service", ".xml", partial(_service, "WorldWind", "w?")),
    "wms-bing": ("map service", ".xml", partial(_service, "VirtualEarth", "${quadkey}.tif")),
    "wms-ags": ("map service", ".xml", partial(_service, "AGS", "ags")),
    "wms-iip": ("map service", ".xml", partial(_service, "IIP", "iip")),
    "wms-mrf": ("map service", ".xml", partial(_service, "MRF", "x.mrf")),
    "wms-tiled": ("map service", ".xml", partial(_service, "TiledWMS", "tiled?")),
    "wms-ipv6": ("map service", ".xml", lambda place, _: wms(place, "x", url=place.url6("${z}/${x}/${y}.tif"))),
    "wms-cache": ("map service", ".xml", _wms_cache),
    "wms-file": ("map service", ".xml", _wms_file),
    "wms-in-vrt": ("map service", ".vrt", lambda place, _: vrt(str(place.write("inner.tif", wms(place, "inner"))))),
    "wmts": ("map service", ".xml", _wmts),
    "wmts-file": ("map service", ".xml", _wmts_file),
    "wmts-cache": ("map service", ".xml", _wmts_cache),
    "wcs": ("map service", ".wcs", _wcs),
    "mrf-cache": ("MRF", ".mrf", _mrf_cache),
    "mrf-cache-remote": ("MRF", ".mrf", _mrf_cache_remote),
    "mrf-index": ("MRF", ".mrf", _mrf_index),
    "mrf-data": ("MRF", ".mrf", _mrf_data),
    "mrf-clone": ("MRF", ".mrf", _mrf_clone),
    "index-local": ("tile index", ".gti", partial(_tile_index, lambda place: place.secret, "")),
    "index-remote-tile": ("tile index", ".gti", partial(_tile_index, lambda p: f"/vsicurl/{p.url('tile.tif')}", "")),
    "index-remote": ("tile index", ".gti", _tile_index_remote),
    "isis3": ("planetary", ".cub", _isis3),
    "isis2": ("planetary", ".qub", _isis2),
    "pds3": ("planetary", ".lbl", _pds3),
    "pds4": ("planetary", ".xml", _pds4),
    "vicar": ("planetary", ".vic", _vicar),
    "ers": ("raw with header", ".ers", _ers),
    "ers-translated": ("raw with header", ".ers", _ers_translated),
    "ndf": ("raw with header", ".h1", _ndf),
    "snodas": ("raw with header", ".hdr", _snodas),
    "fast": ("raw with header", ".fst", _fast),
    "pci-aux": ("raw with header", ".raw", _pci_auxiliary),
    "envi": ("raw with header", ".bin", _envi),
    "ehdr": ("raw with header", ".bil", _ehdr),
    "genbin": ("raw with header", ".bin", _genbin),
    "kml-local": ("KML", ".kml", partial(_kml, lambda _: "../../secret/secret.tif")),
    "kml-remote": ("KML", ".kml", partial(_kml, lambda place: place.url())),
    "kml-link": ("KML", ".kml", _kml_link),
    "tilejson": ("JSON", ".json", _tilejson),
    "stacit-local": ("JSON", ".json", partial(_stacit, lambda place: place.secret)),
    "stacit-remote": ("JSON", ".json", partial(_stacit, lambda place: place.url())),
    "stacta": ("JSON", ".json", _stacta),
    "dimap": ("product description", ".dim", _dimap),
    "radarsat": ("product description", ".xml", _radarsat),
    "ozi": ("product description", ".map", _ozi),
    "til": ("product description", ".til", _til),
    "photomod": ("product description", ".prf", _photomod),
    "contents": ("product description", ".xml", _table_of_contents),
}  # fmt: skip
