"""Harmless files by names that GDAL, rasterio or a terminal take for something else.

A name is given as a user in that folder would, without a folder in front; it reaches for the decoys through what the
name says, never through what the file holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

from tests.security.places import Case, Place
from tests.security.vrts import EVERY_USE


def cases() -> Iterator[Case]:
    """Files by such names, then names of things that are no files."""
    for name, make in _FILES.items():
        told = "<VRTDataset" if name == "vrt-document" else ""
        uses = EVERY_USE if name in ("subdirectory", "zip", "vrt") else EVERY_USE[1:4]
        yield Case(f"name-{name}", "file name", partial(_named, make), own="tif", uses=uses, told=told)
    for name, text in _NOT_FILES.items():
        yield Case(
            f"only-{name}", "name without a file", text, uses=("info", "caption", "embed", "scl", "mask", "locate")
        )


def _named(make: Callable[[Place], str], place: Place) -> str:
    name = make(place)
    place.copy("tif", os.path.normpath(name))
    return name


def _document(place: Place) -> str:
    """A whole VRT as the path of a file: its slashes are folders."""
    return (
        '<VRTDataset rasterXSize="224" rasterYSize="224"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f'<SourceFilename relativeToVRT="0">{place.secret}<{"/"}SourceFilename><SourceBand>1<{"/"}SourceBand>'
        f"<{'/'}SimpleSource><{'/'}VRTRasterBand><{'/'}VRTDataset>"
    )


_FILES: dict[str, Callable[[Place], str]] = {
    "vrt-document": _document,
    "vrt-flat": lambda _: '<VRTDataset rasterXSize="4" rasterYSize="4">.tif',
    "wms-document": lambda _: '<GDAL_WMS><Service name="TMS">.tif',
    "mrf-document": lambda _: "<MRF_META>.tif",
    "subdirectory": lambda place: f"GTIFF_DIR:1:{place.secret}",
    "subdirectory-flat": lambda _: "GTIFF_DIR:1:x.tif",
    "derived": lambda place: f"DERIVED_SUBDATASET:AMPLITUDE:{place.secret}",
    "vrt": lambda place: f"vrt://{place.secret}",
    "vrt-options": lambda place: f"vrt:{place.secret}?bands=1,2,3",
    "zip": lambda place: f"zip:{place.outside}/secret.zip!a.tif",
    "zip-file": lambda place: f"zip+file:{place.outside}/secret.zip!a.tif",
    "tar": lambda place: f"tar://{place.outside}/secret.tar!a.tif",
    "gzip": lambda place: f"gzip://{place.outside}/secret.tif.gz",
    "file": lambda place: f"file:{place.secret}",
    "file-host": lambda place: f"file://localhost{place.secret}",
    "http": lambda place: place.url().replace("http://", "http:/"),
    "zip-http": lambda place: place.url("x.zip").replace("http://", "zip+http:/") + "!a.tif",
    "wms": lambda place: f"WMS:{place.url()}",
    "wmts": lambda place: f"WMTS:{place.url()}",
    "wcs": lambda place: f"WCS:{place.url()}",
    "netcdf": lambda place: f'NETCDF:"{place.secret}":Band1',
    "hdf5": lambda place: f'HDF5:"{place.secret}":Band1',
    "zarr": lambda place: f'ZARR:"{place.outside}"',
    "index": lambda place: f"GTI:{place.secret}",
    "items": lambda place: f'STACIT:"{place.url()}"',
    "archive-below": lambda place: "vsizip/secret.zip/a.tif",
    "archive-mark": lambda place: f"holiday.tif!{place.secret}",
    "question": lambda _: "holiday.tif?url=x&bands=1",
    "brackets": lambda _: "holiday[1-9].tif",
    "star": lambda _: "holi*.tif",
    "home": lambda _: "~root.tif",
    "variable": lambda _: "$HOME.tif",
    "colon": lambda _: "a:b.tif",
    "escape": lambda _: "holi\x1b[2Jday.tif",
    "line-break": lambda _: "holi\nError: all is well\nday.tif",
    "right-to-left": lambda _: "holi‮fit.day.tif",
    "comma": lambda _: "0_100,holiday.tif",
    "jpeg-subfile": lambda place: f"JPEG_SUBFILE:Q0,0,10000,{place.secret}",
    "sentinel2": lambda place: f"SENTINEL2_L1C:{place.secret}:10m:EPSG_32632",
    "memory": lambda _: "MEM:::DATAPOINTER=1,PIXELS=4,LINES=4,BANDS=3,DATATYPE=Byte",
}

_NOT_FILES: dict[str, Callable[[Place], str]] = {
    "vsicurl": lambda place: f"/vsicurl/{place.url()}",
    "vsicurl-options": lambda place: f"/vsicurl?url={place.url()}",
    "vsicached": lambda place: f"/vsicached?file=/vsicurl/{place.url()}",
    "vsizip-remote": lambda place: f"/vsizip/vsicurl/{place.url('x.zip')}/a.tif",
    "vsis3": lambda _: "/vsis3/rsedge-decoy/x.tif",
    "http": lambda place: place.url(),
    "zip-http": lambda place: f"zip+{place.url('x.zip')}!a.tif",
    "wms": lambda place: f"WMS:{place.url('wms')}?SERVICE=WMS&REQUEST=GetMap&LAYERS=x",
    "wmts": lambda place: f"WMTS:{place.url('wmts')}",
    "wcs": lambda place: f"WCS:{place.url('wcs')}?",
    "items": lambda place: f'STACIT:"/vsicurl/{place.url("i.json")}"',
    "vrt-remote": lambda place: f"vrt:///vsicurl/{place.url()}",
    "vrt-inline-remote": lambda place: (
        '<VRTDataset rasterXSize="4" rasterYSize="4"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>/vsicurl/{place.url()}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    ),
    "wms-inline": lambda place: (
        f'<GDAL_WMS><Service name="AGS"><ServerUrl>{place.url("ags")}</ServerUrl></Service></GDAL_WMS>'
    ),
    "zarr": lambda place: f'ZARR:"/vsicurl/{place.url("x.zarr")}"',
    "memory": lambda _: "MEM:::DATAPOINTER=4096,PIXELS=4,LINES=4,BANDS=3,DATATYPE=Byte",
}
