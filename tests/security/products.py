"""STAC items, SAFE folders and zips of them that lead elsewhere."""

from __future__ import annotations

import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.security.places import REACHES, Base, Case, Place, mrf, reaches, stac_item, vrt, wms
from tests.security.sidecars import AUXILIARY

_USES = ("caption", "embed")
_COLOURS = ("red", "green", "blue")


def cases() -> Iterator[Case]:
    """Every reach as an href, and what else an item can do; then what the members of a product can be."""
    for reach in REACHES:
        yield Case(
            f"stac-{reach}", "STAC href", partial(_item, lambda place, name: reaches(place)[name], reach), uses=_USES
        )
    for name, href in _HREFS.items():
        yield Case(f"stac-{name}", "STAC href", partial(_item, lambda place, make: make(place), href), uses=_USES)
    for name, make in _ASSETS.items():
        yield Case(f"stac-asset-{name}", "STAC asset", partial(_assets, make), uses=_USES)
    for name, rel, href in _LINKS:
        yield Case(f"stac-link-{name}", "STAC link", partial(_link, rel, href), uses=_USES)
    yield Case("stac-scl", "STAC asset", _classification, own="any", uses=_USES)
    yield Case("stac-folder", "STAC folder", _folder, uses=_USES)
    for name, change in _MEMBERS.items():
        own: Base | str = "safe" if name.startswith("beside") else ""
        yield Case(f"safe-{name}", "SAFE", partial(_safe, change), own=own, uses=_USES)  # type: ignore[arg-type]
        if not name.startswith("linked"):
            yield Case(f"zip-{name}", "zip of SAFE", partial(_zipped, change), own=own, uses=_USES)  # type: ignore[arg-type]
    for name, pack in _ZIPS.items():
        yield Case(f"zip-{name}", "zip of SAFE", pack, own="any" if name == "more" else "", uses=_USES)
    for name, make in _LOOSE.items():
        yield Case(f"loose-{name}", "loose bands", make, uses=_USES)


def _item(of: Callable[[Place, object], str], what: object, place: Place) -> str:
    href = of(place, what)
    return str(place.write("item.json", stac_item("item", dict.fromkeys(_COLOURS, href))))


def _encoded(place: Place) -> str:
    return "%2e%2e/%2e%2e/secret/secret.tif"


_HREFS: dict[str, Callable[[Place], str]] = {
    "encoded": _encoded,
    "encoded-twice": lambda _: "%252e%252e/%252e%252e/secret/secret.tif",
    "encoded-slash": lambda _: "..%2f..%2fsecret%2fsecret.tif",
    "backslash": lambda _: "..\\..\\secret\\secret.tif",
    "dotdot-inside": lambda _: "x/../../../secret/secret.tif",
    "file-localhost": lambda place: f"file://localhost{place.secret}",
    "file-relative": lambda _: "file:../../secret/secret.tif",
    "file-upper": lambda place: f"FILE://{place.secret}",
    "file-encoded": lambda place: "file://" + place.secret.replace("secret.tif", "%73ecret.tif"),
    "file-host": lambda _: "file://127.0.0.1/share/secret.tif",
    "scheme-relative": lambda place: place.url().removeprefix("http:"),
    "upper-http": lambda place: place.url().replace("http:", "HTTP:"),
    "zip-url": lambda place: f"zip+{place.url('x.zip')}!a.tif",
    "zip-file": lambda place: f"zip://{place.outside}/secret.zip!a.tif",
    "space": lambda place: f" {place.secret}",
    "line-break": lambda place: f"x.tif\n{place.secret}",
    "nothing": lambda place: f"{place.secret}\0.tif",
    "environment": lambda _: "/proc/self/environ",
    "passwd": lambda place: f"{place.outside}/passwd",
    "standard-input": lambda _: "/dev/stdin",
    "host-name": lambda _: "https://rsedge-nobody-answers.invalid/x.tif",
    "s3": lambda _: "s3://rsedge-decoy/x.tif",
    "metadata-service": lambda _: "http://169.254.169.254/latest/meta-data/x.tif",
}


def _assets(make: Callable[[Place], str], place: Place) -> str:
    place.write("item.json", stac_item("item", dict.fromkeys(_COLOURS, make(place))))
    return str(place.folder / "item.json")


def _linked_folder(place: Place) -> str:
    place.link("data", place.outside)
    return "data/secret.tif"


def _named(name: str, text: Callable[[Place], str], place: Place) -> str:
    place.write(name, text(place))
    return name


def _linked(place: Place) -> str:
    return place.link("linked.tif", place.secret).name


def _linked_twice(place: Place) -> str:
    place.link("first.tif", place.secret)
    return place.link("second.tif", "first.tif").name


def _folder_asset(place: Place) -> str:
    place.copy("tif", "data/red.tif")
    return "data"


_ASSETS: dict[str, Callable[[Place], str]] = {
    "linked": _linked,
    "linked-twice": _linked_twice,
    "linked-folder": _linked_folder,
    "folder": _folder_asset,
    "vrt": partial(_named, "asset.tif", lambda place: vrt(place.secret)),
    "vrt-remote": partial(_named, "asset.vrt", lambda place: vrt(f"/vsicurl/{place.url()}")),
    "wms": partial(_named, "asset.tif", lambda place: wms(place, "asset")),
    "mrf": partial(
        _named,
        "asset.tif",
        lambda place: mrf(place, source=place.secret, data=f"{place.victim}/s.dat", index=f"{place.victim}/s.idx"),
    ),
    "item": lambda _: "item.json",
}

_LINKS: tuple[tuple[str, str, Callable[[Place], str]], ...] = (
    ("self-http", "self", lambda place: place.url("item.json")),
    ("self-file", "self", lambda place: f"file://{place.outside}/item.json"),
    ("self-path", "self", lambda place: f"{place.outside}/item.json"),
    ("self-s3", "self", lambda _: "s3://rsedge-decoy/item.json"),
    ("parent", "parent", lambda place: place.url("catalog.json")),
    ("root", "root", lambda place: place.url("catalog.json")),
    ("collection", "collection", lambda place: f"{place.outside}/collection.json"),
    ("item", "item", lambda place: place.url("other.json")),
    ("derived", "derived_from", lambda place: place.url("other.json")),
)


def _link(rel: str, href: Callable[[Place], str], place: Place) -> str:
    links = [{"rel": rel, "href": href(place), "type": "application/json"}]
    return str(place.write("item.json", stac_item("item", dict.fromkeys(_COLOURS, "secret.tif"), links=links)))


def _classification(place: Place) -> str:
    """Harmless colours, and a cloud mask that leads out."""
    for colour in _COLOURS:
        shutil.copyfile(place.ground.bases["stac"].parent / f"{colour}.tif", place.folder / f"{colour}.tif")
    scl = {"scl": {"href": place.secret, "type": "image/tiff"}}
    text = stac_item("item", {colour: f"{colour}.tif" for colour in _COLOURS}, assets=scl)  # type: ignore[arg-type]
    return str(place.write("item.json", text))


def _folder(place: Place) -> str:
    """Many items in a folder, as a download of a catalogue leaves them."""
    for number, reach in enumerate(("absolute", "http", "vsizip", "vrt_inline", "file")):
        place.write(f"{number}/item.json", stac_item(f"item{number}", dict.fromkeys(_COLOURS, reaches(place)[reach])))
    return str(place.folder)


def _safe(change: Callable[[Place, Path], None], place: Place) -> str:
    name = place.ground.bases["safe"].name
    product = place.copy("safe", name)
    change(place, product)
    return str(product)


def _zipped(change: Callable[[Place, Path], None], place: Place) -> str:
    product = Path(_safe(change, place))
    target = product.with_name(f"{product.name}.zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(product.rglob("*")):
            archive.write(path, f"{product.name}/{path.relative_to(product).as_posix()}")
    shutil.rmtree(product)
    return str(target)


def _bands(product: Path) -> list[Path]:
    return [path for path in product.rglob("*.jp2") if path.stem.rsplit("_", 2)[-2] in ("B02", "B03", "B04", "TCI")]


def _replace(make: Callable[[Place], str], place: Place, product: Path) -> None:
    for path in _bands(product):
        path.write_text(make(place))


def _link_bands(place: Place, product: Path) -> None:
    for path in _bands(product):
        path.unlink()
        path.symlink_to(place.outside / "T34UCF_20230823T095559_B02_10m.jp2")


def _link_folder(place: Place, product: Path) -> None:
    for folder in list(product.rglob("R10m")):
        shutil.rmtree(folder)
        folder.symlink_to(place.outside)


def _link_metadata(name: str, place: Place, product: Path) -> None:
    for path in list(product.rglob(name)):
        path.unlink()
        path.symlink_to(place.outside / "passwd")


def _link_product(place: Place, product: Path) -> None:
    granule = product / "GRANULE"
    moved = place.outside / f"GRANULE-{place.folder.name}"
    if not moved.exists():
        shutil.move(granule, moved)
    else:
        shutil.rmtree(granule)
    granule.symlink_to(moved)


def _rename_images(make: Callable[[Place], str], place: Place, product: Path) -> None:
    """Metadata that name images elsewhere; those that are there are taken away."""
    metadata = next(product.glob("MTD_MSI*.xml"))
    text = metadata.read_text()
    start, end = "<IMAGE_FILE>", "</IMAGE_FILE>"
    parts = text.split(start)
    changed = [parts[0]]
    for part in parts[1:]:
        image, rest = part.split(end, 1)
        changed.append(make(place) + "_".join(image.rsplit("_", 2)[-2:]) + end + rest)
    metadata.write_text(start.join(changed))
    for path in _bands(product):
        path.unlink()


def _entities(place: Place, product: Path) -> None:
    metadata = next(product.glob("MTD_MSI*.xml"))
    text = metadata.read_text().split("?>", 1)[1]
    doctype = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file://{place.outside}/passwd">]>'
    metadata.write_text(doctype + text.replace("<PRODUCT_URI>", "<PRODUCT_URI>&e;", 1))


def _beside(suffix: str, make: Callable[[Place], str], place: Place, product: Path) -> None:
    for path in _bands(product):
        path.with_name(path.name + suffix).write_text(make(place))


_STEM = "T34UCF_20230823T095559_"
_MEMBERS: dict[str, Callable[[Place, Path], None]] = {
    "vrt": partial(_replace, lambda place: vrt(place.secret, bands=1)),
    "vrt-remote": partial(_replace, lambda place: vrt(f"/vsicurl/{place.url()}", bands=1)),
    "wms": partial(_replace, lambda place: wms(place, "safe")),
    "mrf": partial(
        _replace,
        lambda place: mrf(place, source=place.secret, data=f"{place.victim}/z.dat", index=f"{place.victim}/z.idx"),
    ),
    "linked-bands": _link_bands,
    "linked-folder": _link_folder,
    "linked-granules": _link_product,
    "linked-metadata": partial(_link_metadata, "MTD_MSI*.xml"),
    "linked-granule-metadata": partial(_link_metadata, "MTD_TL.xml"),
    "images-dotdot": partial(_rename_images, lambda _: f"../../../secret/{_STEM}"),
    "images-absolute": partial(_rename_images, lambda place: f"{place.outside}/{_STEM}"),
    "images-remote": partial(_rename_images, lambda place: place.url(_STEM)),
    "images-vsicurl": partial(_rename_images, lambda place: f"/vsicurl/{place.url(_STEM)}"),
    "images-inline": partial(_rename_images, lambda place: vrt(place.secret).replace("<", "&lt;")),
    "entities": _entities,
    "beside-overview": partial(_beside, ".ovr", lambda place: vrt(place.secret, bands=1)),
    "beside-mask": partial(_beside, ".msk", lambda place: vrt(place.secret, bands=1)),
    "beside-aux": partial(_beside, ".aux.xml", lambda at: f"<PAMDataset>{AUXILIARY['overview'](at)}</PAMDataset>"),
    "beside-grid": partial(_beside, ".aux.xml", lambda at: f"<PAMDataset>{AUXILIARY['grid'](at)}</PAMDataset>"),
}


def _dotdot_members(place: Place) -> str:
    """Members whose names climb out."""
    product = Path(_safe(lambda *_: None, place))
    target = product.with_name(f"{product.name}.zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(product.rglob("*")):
            climbs = "../" * 6 if path.suffix == ".jp2" else ""
            archive.write(path, f"{climbs}{product.name}/{path.relative_to(product).as_posix()}")
    shutil.rmtree(product)
    return str(target)


def _linked_members(place: Place) -> str:
    """Members that are symbolic links, as Unix zips can hold them."""
    product = Path(_safe(lambda *_: None, place))
    target = product.with_name(f"{product.name}.zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(product.rglob("*")):
            name = f"{product.name}/{path.relative_to(product).as_posix()}"
            if path.suffix == ".jp2":
                member = zipfile.ZipInfo(name)
                member.create_system = 3
                member.external_attr = (stat.S_IFLNK | 0o777) << 16
                archive.writestr(member, str(place.outside / f"{_STEM}B02_10m.jp2"))
            else:
                archive.write(path, name)
    shutil.rmtree(product)
    return str(target)


def _more_in_zip(place: Place) -> str:
    """A product, and beside it in the zip a member that climbs out and one that is absolute."""
    target = Path(_zipped(lambda *_: None, place))
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr("../../victim/start.sh", "echo gotcha")
        archive.writestr(f"{place.victim}/absolute.sh", "echo gotcha")
    return str(target)


_ZIPS: dict[str, Callable[[Place], str]] = {
    "dotdot-members": _dotdot_members,
    "linked-members": _linked_members,
    "more": _more_in_zip,
}


def _loose(make: Callable[[Place, Path], None], place: Place) -> str:
    for band in ("B02", "B03", "B04"):
        make(place, place.folder / f"{_STEM}{band}_10m.jp2")
    return str(place.folder)


_LOOSE: dict[str, Callable[[Place], str]] = {
    "linked": partial(_loose, lambda place, path: path.symlink_to(place.outside / path.name)),
    "vrt": partial(_loose, lambda place, path: path.write_text(vrt(place.secret, bands=1))),
    "remote": partial(_loose, lambda place, path: path.write_text(vrt(f"/vsicurl/{place.url()}", bands=1))),
}
