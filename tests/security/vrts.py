"""VRTs that reach out, under any name: GDAL opens by content."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from tests.security.places import RASTER_USES, REACHES, SIDE, Case, Place, escape, reaches, vrt

EVERY_USE = ("info", *RASTER_USES, "scene", "html", "scl", "mask", "locate", "search")


def cases() -> Iterator[Case]:
    """A VRT for every reach and every place in a VRT that can hold one, all called ``.tif``, some by other names."""
    for reach in REACHES:
        uses = EVERY_USE if reach in ("absolute", "vsicurl") else RASTER_USES
        yield Case(f"vrt-{reach}", "VRT source", partial(_source, reach, ".tif"), uses=uses)
    for suffix in (".vrt", ".jp2", ".png", ".jpg", ".webp", ".xml", ".img", ".txt", ""):
        for reach in ("absolute", "vsicurl"):
            name = f"vrt-{reach}-as{suffix or '-nothing'}"
            yield Case(name, "VRT by another name", partial(_source, reach, suffix))
    for name, make in _SPECIAL.items():
        guarded = ("/etc/hostname", "/proc/self/environ") if name.startswith("raw") else ()
        yield Case(f"vrt-{name}", "VRT, special", partial(_named, make), guarded=guarded)


def _source(reach: str, suffix: str, place: Place) -> str:
    text = vrt(reaches(place)[reach], relative=reach in ("relative", "roundabout"))
    return str(place.write(f"holiday{suffix}", text))


def _named(make: Callable[[Place], str], place: Place) -> str:
    return str(place.write("holiday.tif", make(place)))


def _bands(body: str, *, subclass: str, dataset: str = "", attributes: str = "", count: int = 3) -> str:
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}" subClass="{subclass}"><ColorInterp>{colour}</ColorInterp>'
        f"{body}</VRTRasterBand>"
        for band, colour in zip(range(1, count + 1), ("Red", "Green", "Blue"), strict=False)
    )
    return (
        f'<VRTDataset rasterXSize="{SIDE}" rasterYSize="{SIDE}"{attributes}><SRS>EPSG:32632</SRS>'
        f"<GeoTransform>600000,10,0,5100000,0,-10</GeoTransform>{dataset}{bands}</VRTDataset>"
    )


def _raw(path: Callable[[Place], str], place: Place) -> str:
    body = (
        f'<SourceFilename relativeToVRT="0">{path(place)}</SourceFilename><ImageOffset>0</ImageOffset>'
        f"<PixelOffset>1</PixelOffset><LineOffset>{SIDE if 'bin' in path(place) else 1}</LineOffset>"
    )
    return _bands(body, subclass="VRTRawRasterBand")


def _warped(source: Callable[[Place], str], place: Place) -> str:
    options = (
        f'<GDALWarpOptions><SourceDataset relativeToVRT="0">{escape(source(place))}</SourceDataset><BandList>'
        + "".join(f'<BandMapping src="{band}" dst="{band}"/>' for band in (1, 2, 3))
        + "</BandList><Transformer><GenImgProjTransformer>"
        "<SrcGeoTransform>600000,10,0,5100000,0,-10</SrcGeoTransform>"
        "<SrcInvGeoTransform>-60000,0.1,0,510000,0,-0.1</SrcInvGeoTransform>"
        "<DstGeoTransform>600000,10,0,5100000,0,-10</DstGeoTransform>"
        "<DstInvGeoTransform>-60000,0.1,0,510000,0,-0.1</DstInvGeoTransform>"
        "</GenImgProjTransformer></Transformer></GDALWarpOptions>"
    )
    text = _bands("", subclass="VRTWarpedRasterBand", dataset="", attributes=' subClass="VRTWarpedDataset"')
    return text.replace("</VRTDataset>", options + "</VRTDataset>")


def _python(place: Place) -> str:
    code = f'open("{place.victim}/made-by-python", "w").write("x")\ndef f(in_ar, out_ar, *a, **k):\n    out_ar[:] = 7\n'
    body = (
        "<PixelFunctionType>f</PixelFunctionType><PixelFunctionLanguage>Python</PixelFunctionLanguage>"
        f"<PixelFunctionCode><![CDATA[{code}]]></PixelFunctionCode>"
    )
    return _bands(body, subclass="VRTDerivedRasterBand")


def _python_module(place: Place) -> str:
    place.write("evil.py", f'open("{place.victim}/made-by-module", "w").write("x")\ndef f(*a, **k): pass\n')
    body = (
        "<PixelFunctionType>evil.f</PixelFunctionType><PixelFunctionLanguage>Python</PixelFunctionLanguage>"
        f"<SimpleSource><SourceFilename>{place.secret}</SourceFilename></SimpleSource>"
    )
    return _bands(body, subclass="VRTDerivedRasterBand")


def _derived(place: Place) -> str:
    body = (
        "<PixelFunctionType>sum</PixelFunctionType><SimpleSource>"
        f'<SourceFilename relativeToVRT="0">{place.secret}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>'
    )
    return _bands(body, subclass="VRTDerivedRasterBand")


def _pansharpened(place: Place) -> str:
    spectral = "".join(
        f'<SpectralBand dstBand="{band}"><SourceFilename relativeToVRT="0">{place.secret}</SourceFilename>'
        f"<SourceBand>{band}</SourceBand></SpectralBand>"
        for band in (1, 2, 3)
    )
    options = (
        "<PansharpeningOptions><Algorithm>WeightedBrovey</Algorithm><PanchroBand>"
        f'<SourceFilename relativeToVRT="0">{place.secret}</SourceFilename><SourceBand>1</SourceBand></PanchroBand>'
        f"{spectral}</PansharpeningOptions>"
    )
    text = _bands("", subclass="VRTPansharpenedRasterBand", attributes=' subClass="VRTPansharpenedDataset"')
    return text.replace("</VRTDataset>", options + "</VRTDataset>")


def _processed(place: Place) -> str:
    return (
        '<VRTDataset subClass="VRTProcessedDataset"><Input><SourceFilename relativeToVRT="0">'
        f"{place.secret}</SourceFilename></Input><ProcessingSteps><Step><Algorithm>LUT</Algorithm>"
        '<Argument name="lut_1">0:0,255:255</Argument><Argument name="lut_2">0:0,255:255</Argument>'
        '<Argument name="lut_3">0:0,255:255</Argument></Step></ProcessingSteps></VRTDataset>'
    )


def _processed_trim(place: Place) -> str:
    return (
        f'<VRTDataset subClass="VRTProcessedDataset"><Input>{vrt("own.tif", relative=True)}</Input><ProcessingSteps>'
        '<Step><Algorithm>LocalScaleOffset</Algorithm><Argument name="relativeToVRT">false</Argument>'
        + "".join(
            f'<Argument name="gain_dataset_filename_{band}">{place.secret}</Argument>'
            f'<Argument name="gain_dataset_band_{band}">1</Argument>'
            f'<Argument name="offset_dataset_filename_{band}">{place.secret}</Argument>'
            f'<Argument name="offset_dataset_band_{band}">1</Argument>'
            for band in (1, 2, 3)
        )
        + "</Step></ProcessingSteps></VRTDataset>"
    )


def _own(place: Place, text: str) -> str:
    """A VRT over a harmless raster beside it, with something more."""
    place.copy("tif", "own.tif")
    return vrt("own.tif", relative=True).replace("</VRTDataset>", text + "</VRTDataset>")


def _mask_band(place: Place) -> str:
    return _own(
        place,
        '<MaskBand><VRTRasterBand dataType="Byte"><SimpleSource><SourceFilename relativeToVRT="0">'
        f"{place.secret}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></MaskBand>",
    )


def _overview(place: Place) -> str:
    overview = f'<Overview><SourceFilename relativeToVRT="0">{place.secret}</SourceFilename>'
    overview += "<SourceBand>1</SourceBand></Overview>"
    return _own(place, "").replace("</SimpleSource>", "</SimpleSource>" + overview)


def _metadata_overview(place: Place) -> str:
    return _own(place, f'<Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{place.secret}</MDI></Metadata>')


def _open_options(place: Place) -> str:
    options = (
        f'<OpenOptions><OOI key="OVERVIEW_LEVEL">0</OOI><OOI key="GEOREF_SOURCES">{place.secret}</OOI></OpenOptions>'
    )
    return vrt(place.secret, in_source=options)


def _raw_options(place: Place) -> str:
    """A source that is a VRT of its own through the option of another driver."""
    place.write("inner.xml", vrt(f"/vsicurl/{place.url('options.tif')}"))
    return vrt("inner.xml", relative=True, in_source='<OpenOptions><OOI key="ROOT_PATH">/</OOI></OpenOptions>')


def _in_vrt(inner: Callable[[Place], str], depth: int, place: Place) -> str:
    place.write("inner0.tif", inner(place))
    for level in range(1, depth):
        place.write(f"inner{level}.tif", vrt(f"inner{level - 1}.tif", relative=True))
    return vrt(f"inner{depth - 1}.tif", relative=True)


def _itself(place: Place) -> str:
    return vrt("holiday.tif", relative=True)


def _multidimensional(place: Place) -> str:
    return (
        '<VRTDataset><Group name="/"><Dimension name="Y" size="224"/><Dimension name="X" size="224"/><Array name="a">'
        '<DataType>Byte</DataType><DimensionRef ref="Y"/><DimensionRef ref="X"/><Source>'
        f'<SourceFilename relativetoVRT="0">{place.secret}</SourceFilename><SourceBand>1</SourceBand></Source></Array>'
        "</Group></VRTDataset>"
    )


def _array_source(place: Place) -> str:
    source = (
        '<ArraySource><SingleSourceArray><SourceFilename relativeToVRT="0">'
        f"{place.secret}</SourceFilename><SourceArray>Band1</SourceArray></SingleSourceArray></ArraySource>"
    )
    return (
        f'<VRTDataset rasterXSize="{SIDE}" rasterYSize="{SIDE}"><VRTRasterBand dataType="Byte" band="1">{source}'
        "</VRTRasterBand></VRTDataset>"
    )


def _linked(place: Place) -> str:
    place.link("own.tif", place.secret)
    return vrt("own.tif", relative=True)


def _linked_folder(place: Place) -> str:
    place.link("own", place.outside)
    return vrt("own/secret.tif", relative=True)


def _entity(place: Place) -> str:
    return f'<!DOCTYPE VRTDataset [<!ENTITY s SYSTEM "file://{place.secret}">]>' + vrt("&s;").replace("&amp;s;", "&s;")


def _srs(text: Callable[[Place], str], place: Place) -> str:
    place.copy("tif", "own.tif")
    return vrt("own.tif", relative=True, srs=text(place))


_SPECIAL: dict[str, Callable[[Place], str]] = {
    "raw-decoy": partial(_raw, lambda place: f"{place.outside}/raw.bin"),
    "raw-passwd": partial(_raw, lambda place: f"{place.outside}/passwd"),
    "raw-hostname": partial(_raw, lambda _: "/etc/hostname"),
    "raw-environment": partial(_raw, lambda _: "/proc/self/environ"),
    "raw-remote": partial(_raw, lambda place: f"/vsicurl/{place.url('raw.bin')}"),
    "warped": partial(_warped, lambda place: place.secret),
    "warped-remote": partial(_warped, lambda place: f"/vsicurl/{place.url()}"),
    "python": _python,
    "python-module": _python_module,
    "derived-band": _derived,
    "pansharpened": _pansharpened,
    "processed": _processed,
    "processed-gain": _processed_trim,
    "mask-band": _mask_band,
    "overview": _overview,
    "overview-metadata": _metadata_overview,
    "open-options": _open_options,
    "other-options": _raw_options,
    "complex-source": lambda place: vrt(
        place.secret, source_kind="ComplexSource", in_source="<ScaleRatio>1</ScaleRatio>"
    ),
    "kernel-source": lambda place: vrt(
        place.secret, source_kind="KernelFilteredSource", in_source="<Kernel><Size>1</Size><Coefs>1</Coefs></Kernel>"
    ),
    "in-vrt": partial(_in_vrt, lambda place: vrt(place.secret), 1),
    "in-vrt-remote": partial(_in_vrt, lambda place: vrt(f"/vsicurl/{place.url()}"), 1),
    "in-vrt-deep": partial(_in_vrt, lambda place: vrt(place.secret), 6),
    "in-vrt-inline": lambda place: vrt(vrt(vrt(place.secret))),
    "in-vrt-inline-remote": lambda place: vrt(vrt(f"/vsicurl/{place.url()}")),
    "in-vrt-options": partial(_in_vrt, _open_options, 1),
    "itself": _itself,
    "multidimensional": _multidimensional,
    "array-source": _array_source,
    "linked": _linked,
    "linked-folder": _linked_folder,
    "entity": _entity,
    "srs-file": partial(_srs, lambda place: f"{place.outside}/secret.wkt"),
    "srs-url": partial(_srs, lambda place: place.url("srs.wkt")),
    "srs-grid": partial(_srs, lambda place: f"+proj=utm +zone=32 +ellps=intl +nadgrids={place.outside}/secret.gsb"),
    "srs-init": partial(_srs, lambda place: f"+init={place.outside}/passwd:1"),
    "late": lambda place: " " * 200 + "\n<!-- a picture -->" + vrt(place.secret),
    "byte-order-mark": lambda place: "﻿" + vrt(place.secret),
}
