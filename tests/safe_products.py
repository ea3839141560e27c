"""Seeded Sentinel-2 products as ESA ships them: JP2 bands, metadata in XML, the classification at 20 m; small."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import Affine, from_origin

from rsedge.pixels import ReflectanceRule
from rsedge.runtime.demo.scene import CLASSES, NO_DATA, compose_scene

BANDS = ("B04", "B03", "B02", "B08")
ORIGIN = (300000.0, 6100020.0)
_ALL_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")  # band_id 0 to 12
_SCL = {
    "farmland": 4, "forest": 4, "grassland": 4, "desert": 5, "town": 5, "industrial area": 5, "lake": 6, "sea": 6,
    "river": 6, "road": 5, "snow": 11, "cloud": 9,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SafeProduct:
    """A product on disk and what was put into it.

    Attributes:
        path: The ``.SAFE`` folder, or the zip of it.
        name: Name of the product without ``.SAFE``.
        dn: Digital numbers as stored, uint16 [4, H, W]: B04, B03, B02, B08; 0 is no data.
        tci: Its true-colour image, uint8 [3, H, W].
        scl: Scene classification, uint8 [H / 2, W / 2]; an L1C product holds none, the land has it all the same.
        offset: What is to be added to ``dn``.
        crs, transform: Of the 10 m grid.
        datetime: Sensing time of the granule.
        granule: The granule's folder, relative to the product.
        image_stem: Of each band file, relative to the product: insert the band at ``{}``.
    """

    path: Path
    name: str
    level: str
    baseline: str
    tile: str
    dn: np.ndarray
    tci: np.ndarray
    scl: np.ndarray
    offset: int
    crs: str
    transform: Affine
    datetime: str
    granule: str
    image_stem: str

    def image(self, band: str) -> str:
        """File of a band at 10 m (B04, …, TCI) or of SCL at 20 m, relative to the product."""
        if self.level == "L1C":
            return f"{self.image_stem}_{band}.jp2"
        folder, stem = self.image_stem.rsplit("/", 1)
        metres = "20m" if band == "SCL" else "10m"
        return f"{folder}/R{metres}/{stem}_{band}_{metres}.jp2"


def write_safe(
    folder: Path,
    *,
    seed: int,
    level: str = "L2A",
    baseline: str = "05.09",
    size: int = 540,
    offset: int | None = None,
    zipped: bool = False,
    tile: str = "34UCF",
    sensed: str = "20230823T095559",
    image_files: bool = True,
    origin: tuple[float, float] = ORIGIN,
) -> SafeProduct:
    """Write a product in the compact layout (since late 2016) into ``folder``.

    Args:
        folder: Made where it is missing; the product goes below it.
        level: ``L1C`` or ``L2A``.
        baseline: Processing baseline; from 04.00 on the metadata list an offset per band.
        size: Height and width at 10 m; even.
        offset: Added to digital numbers to get reflectance × 10000; by default what the baseline says.
        zipped: Pack the product as ``NAME.SAFE.zip`` and keep no folder.
        tile: MGRS tile.
        sensed: Start of the datatake.
        image_files: Whether the metadata name the band files.
        origin: Upper left corner, metres.
    """
    number = baseline.replace(".", "")
    name = f"S2A_MSI{level}_{sensed}_N{number}_R122_T{tile}_20230823T124759"
    product = Path(folder) / f"{name}.SAFE"
    granule = f"GRANULE/{level}_T{tile}_A033753_20230823T095553"
    if offset is None:
        offset = -1000 if baseline >= "04.00" else 0
    written = _granule(product, granule, f"T{tile}_{sensed}", name, level, baseline, size, offset, seed, tile, origin)
    listed = _list_images(written) if image_files else []
    _write_text(product / f"MTD_MSI{level}.xml", _product_xml(written, f"{name}.SAFE", sensed, {tile: listed}))
    _write_text(product / granule / "MTD_TL.xml", _tile_xml(written))
    _write_text(product / "manifest.safe", '<?xml version="1.0" encoding="UTF-8"?>\n<XFDU version="generated"/>\n')
    _write_text(product / "INSPIRE.xml", '<?xml version="1.0" encoding="UTF-8"?>\n<MD_Metadata/>\n')
    (product / "rep_info").mkdir()
    return replace(written, path=zip_safe(product) if zipped else product)


def write_old_l1c(
    folder: Path, *, seed: int, tiles: Sequence[str] = ("32TQR", "32TRQ"), size: int = 256, zipped: bool = False
) -> list[SafeProduct]:
    """Write an L1C product as before December 2016 into ``folder``: one per datatake, a granule for each MGRS tile.

    Returns:
        What each granule holds, all with the path of the whole.
    """
    name = "S2A_OPER_PRD_MSIL1C_PDMC_20160103T120000_R022_V20160102T101402_20160102T101402"
    product = Path(folder) / f"{name}.SAFE"
    stamp = "EPA__20160102T153057_A000123"
    granules = []
    for index, tile in enumerate(tiles):
        granule = f"GRANULE/S2A_OPER_MSI_L1C_TL_{stamp}_T{tile}_N02.01"
        stem = f"S2A_OPER_MSI_L1C_TL_{stamp}_T{tile}"
        origin = (600000 + 10.0 * size * index, 5100000.0)
        written = _granule(product, granule, stem, name, "L1C", "02.01", size, 0, seed + index, tile, origin)
        _write_text(product / granule / f"S2A_OPER_MTD_L1C_TL_{stamp}_T{tile}.xml", _tile_xml(written))
        granules.append(written)
    images = {granule.tile: _list_images(granule) for granule in granules}
    text = _product_xml(granules[0], "", "20160102T101402", images, old=True)
    _write_text(product / "S2A_OPER_MTD_SAFL1C_PDMC_20160103T120000_R022_V20160102T101402.xml", text)
    path = zip_safe(product) if zipped else product
    return [replace(granule, path=path) for granule in granules]


def zip_safe(product: Path, name: str | None = None, *, below: str = "") -> Path:
    """Pack a product folder as a zip beside it, without its folder on disk.

    Args:
        name: File name, by default that of the product and ``.zip``.
        below: Folder inside the zip that holds the product, such as ``inner/``.
    """
    target = product.with_name(name or f"{product.name}.zip")
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(product.rglob("*")):
            inside = f"{below}{product.name}/{path.relative_to(product).as_posix()}"
            stored = path.suffix == ".jp2" or path.is_dir()
            archive.write(path, inside, zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED)
    shutil.rmtree(product)
    return target


def write_jp2(path: Path, data: np.ndarray, crs: str, transform: Affine) -> None:
    """Write [bands, H, W] as JPEG 2000 without loss, georeferenced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands, height, width = data.shape
    profile: dict[str, Any] = {
        "driver": "JP2OpenJPEG",
        "count": bands,
        "height": height,
        "width": width,
        "dtype": data.dtype,
        "crs": crs,
        "transform": transform,
        "REVERSIBLE": "YES",
        "QUALITY": "100",
        "BLOCKXSIZE": 256,
        "BLOCKYSIZE": 256,
    }
    if bands == 3:
        profile["YCC"] = "NO"  # a colour transform is exact too, but then it is not what was put in, band by band
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(data)


def _granule(
    product: Path,
    granule: str,
    stem: str,
    name: str,
    level: str,
    baseline: str,
    size: int,
    offset: int,
    seed: int,
    tile: str,
    origin: tuple[float, float],
) -> SafeProduct:
    """Paint land and write its images."""
    land = compose_scene(seed=seed, tiles=(6, 6), tile_size=-(-size // 6))
    rgb, cover = land.dn[:, :size, :size], land.cover[:size, :size]
    infrared = np.where(np.isin(cover, (0, 1, 2)), 3 * rgb[1], rgb[0] // 2 + 1)[None]
    dn = np.concatenate([rgb, infrared])
    empty = (cover == NO_DATA) | (dn == 0).all(axis=0)
    dn = np.where(empty, 0, np.maximum(dn, 1).astype(np.int32) - offset).astype(np.uint16)
    tci = np.where(empty, 0, ReflectanceRule(boa_offset=offset).apply(dn[:3])).astype(np.uint8)
    table = np.zeros(256, np.uint8)
    table[: len(CLASSES)] = [_SCL[name] for name in CLASSES]
    scl = np.where(empty, 0, table[cover])[::2, ::2].astype(np.uint8)
    zone, north = int(tile[:2]), tile[2] >= "N"
    written = SafeProduct(
        path=product,
        name=name,
        level=level,
        baseline=baseline,
        tile=tile,
        dn=dn,
        tci=tci,
        scl=scl,
        offset=offset,
        crs=f"EPSG:{(32600 if north else 32700) + zone}",
        transform=from_origin(*origin, 10, 10),
        datetime="2023-08-23T10:05:35.271949Z" if "_OPER_" not in name else "2016-01-02T10:14:02.155Z",
        granule=granule,
        image_stem=f"{granule}/IMG_DATA/{stem}",
    )
    for band, data in zip(BANDS, dn, strict=True):
        write_jp2(product / written.image(band), data[None], written.crs, written.transform)
    if "_OPER_" not in name:  # products of before have no true-colour image
        write_jp2(product / written.image("TCI"), tci, written.crs, written.transform)
    if level == "L2A":
        write_jp2(product / written.image("SCL"), scl[None], written.crs, written.transform @ Affine.scale(2))
    return written


def _list_images(product: SafeProduct) -> list[str]:
    bands = [*BANDS, "TCI", *(["SCL"] if product.level == "L2A" else [])]
    return [product.image(band).removesuffix(".jp2") for band in bands]


def _product_xml(
    product: SafeProduct, uri: str, sensed: str, images: dict[str, list[str]], *, old: bool = False
) -> str:
    """Product metadata; the old kind knows granules by their names and no folders."""
    level, baseline = product.level, product.baseline
    start = f"{sensed[:4]}-{sensed[4:6]}-{sensed[6:8]}T{sensed[9:11]}:{sensed[11:13]}:{sensed[13:15]}.024Z"
    element, image = ("Granules", "IMAGE_ID") if old else ("Granule", "IMAGE_FILE")
    granules = ""
    for tile, listed in images.items():
        names = [name.rsplit("/", 1)[1] for name in listed] if old else listed
        files = "".join(f"\n            <{image}>{name}</{image}>" for name in names)
        identifier = f"S2A_OPER_MSI_{level}_TL_EPA__20160102T153057_A000123_T{tile}_N{baseline}"
        granules += f"""
        <Granule_List>
          <{element} granuleIdentifier="{identifier}" imageFormat="JPEG2000">{files}
          </{element}>
        </Granule_List>"""
    if level == "L2A":
        quantification = """<QUANTIFICATION_VALUES_LIST>
        <BOA_QUANTIFICATION_VALUE unit="none">10000</BOA_QUANTIFICATION_VALUE>
        <AOT_QUANTIFICATION_VALUE unit="none">1000.0</AOT_QUANTIFICATION_VALUE>
      </QUANTIFICATION_VALUES_LIST>"""
        parent, entry = "BOA_ADD_OFFSET_VALUES_LIST", "BOA_ADD_OFFSET"
    else:
        quantification = '<QUANTIFICATION_VALUE unit="none">10000</QUANTIFICATION_VALUE>'
        parent, entry = "Radiometric_Offset_List", "RADIO_ADD_OFFSET"
    offsets = ""
    if baseline >= "04.00":
        each = (f'\n        <{entry} band_id="{n}">{product.offset}</{entry}>' for n in range(len(_ALL_BANDS)))
        offsets = f"\n      <{parent}>{''.join(each)}\n      </{parent}>"
    digits = level[1:]
    return f"""<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<n1:Level-{digits}_User_Product xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/User_Product_Level-{digits}.xsd">
  <n1:General_Info>
    <Product_Info>
      <PRODUCT_START_TIME>{start}</PRODUCT_START_TIME>
      <PRODUCT_STOP_TIME>{start}</PRODUCT_STOP_TIME>
      <PRODUCT_URI>{uri}</PRODUCT_URI>
      <PROCESSING_LEVEL>Level-{digits}</PROCESSING_LEVEL>
      <PRODUCT_TYPE>S2MSI{digits}</PRODUCT_TYPE>
      <PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE>
      <Datatake datatakeIdentifier="GS2A_{sensed}_033753_N{baseline}">
        <SPACECRAFT_NAME>Sentinel-2A</SPACECRAFT_NAME>
        <DATATAKE_SENSING_START>{start}</DATATAKE_SENSING_START>
      </Datatake>
      <Query_Options completeSingleTile="true">
        <Band_List>{"".join(f"<BAND_NAME>{band}</BAND_NAME>" for band in _ALL_BANDS)}</Band_List>
        <PRODUCT_FORMAT>{"SAFE" if old else "SAFE_COMPACT"}</PRODUCT_FORMAT>
      </Query_Options>
      <Product_Organisation>{granules}
      </Product_Organisation>
    </Product_Info>
    <Product_Image_Characteristics>
      {quantification}{offsets}
    </Product_Image_Characteristics>
  </n1:General_Info>
</n1:Level-{digits}_User_Product>
"""


def _tile_xml(product: SafeProduct) -> str:
    level, identifier = (
        product.level[1:],
        f"S2A_OPER_MSI_{product.level}_TL_EPA__20160102T153057_A000123_T{product.tile}",
    )
    height, width = product.dn.shape[1:]
    return f"""<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<n1:Level-{level}_Tile_ID xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/S2_PDI_Level-{level}_Tile_Metadata.xsd">
  <n1:General_Info>
    <TILE_ID metadataLevel="Brief">{identifier}_N{product.baseline}</TILE_ID>
    <SENSING_TIME metadataLevel="Standard">{product.datetime}</SENSING_TIME>
  </n1:General_Info>
  <n1:Geometric_Info>
    <Tile_Geocoding metadataLevel="Brief">
      <HORIZONTAL_CS_CODE>{product.crs}</HORIZONTAL_CS_CODE>
      <Size resolution="10"><NROWS>{height}</NROWS><NCOLS>{width}</NCOLS></Size>
      <Geoposition resolution="10">
        <ULX>{product.transform.c:.0f}</ULX><ULY>{product.transform.f:.0f}</ULY><XDIM>10</XDIM><YDIM>-10</YDIM>
      </Geoposition>
    </Tile_Geocoding>
  </n1:Geometric_Info>
</n1:Level-{level}_Tile_ID>
"""


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
