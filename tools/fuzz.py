"""Fuzz the opening of scenes, the manifest and the journal: any bytes give a result or an error of rsedge.

    python tools/fuzz.py [--minutes 3] [--target scene|manifest|journal] [--seed 0]

Mutates a corpus of small seeds that it generates; with atheris installed (pip install atheris) ``--atheris`` explores
by coverage instead, for one target. An input that ends in any other error is kept in fuzz-findings/ and printed with
its traceback; the exit code is then 1. An input in work for 60 s, or one that ends the process, is fuzz-findings/last.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from rsedge.errors import RsedgeError  # noqa: E402 - the folder above is searched only now
from rsedge.manifest import Manifest  # noqa: E402
from rsedge.runtime.outputs.records import TileRecord, TileResult  # noqa: E402
from rsedge.runtime.run.journal import Journal  # noqa: E402
from rsedge.runtime.run.pipeline import caption_scene  # noqa: E402
from rsedge.runtime.scenes.opening import open_scenes  # noqa: E402
from tests import scenes  # noqa: E402
from tests.fakes import FakeCaptioner  # noqa: E402

FINDINGS = Path("fuzz-findings")
WORDS = (
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x80",
    b"\x7f",
    b'"',
    b"{",
    b"[",
    b"]",
    b"}",
    b",",
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
)
WORK = Path(tempfile.mkdtemp(prefix="fuzz-"))
PRINT = {"model": "fake@0123456789ab", "scenes": [{"path": "a.tif"}]}


def scene(data: bytes) -> None:
    """Open a raster, or a VRT, and caption its first tiles."""
    path = WORK / ("scene.vrt" if data[:1] == b"<" else "scene.tif")
    path.write_bytes(data)
    (opened,) = open_scenes([path], allow_vrt=True, max_pixels=2**24)
    for _, _ in zip(range(2), caption_scene(FakeCaptioner(16), opened, tile_size=64), strict=False):
        pass


def manifest(data: bytes) -> None:
    """Parse a manifest, and what it writes again."""
    found = Manifest.from_json(data)
    if Manifest.from_json(found.to_json()) != found:
        raise ValueError("the manifest that was written is another")


def journal(data: bytes) -> None:
    """Open a journal and read its segments; the checksums of whole lines are made to fit."""
    lines = data.split(b"\n")
    whole = [b"%08x %s" % (zlib.crc32(line[9:]), line[9:]) if len(line) % 4 else line for line in lines[:-1]]
    path = WORK / "out.csv.journal"
    path.write_bytes(b"\n".join([*whole, lines[-1]]))
    with Journal.open(path, PRINT) as opened:
        list(opened.segments())


def corpus(target: str) -> list[bytes]:
    """Small valid inputs of a target."""
    if target == "manifest":
        return [path.read_bytes() for path in sorted(ROOT.glob("rsedge/builtin/*.rsedge/manifest.json"))]
    path = WORK / "seed.tif"
    if target == "journal":
        nothing = dict.fromkeys(TileRecord.__slots__)
        numbers = dict.fromkeys(("row", "col", "row_off", "col_off", "width", "height"), 7)
        box = {"type": "Polygon", "coordinates": [[[1.5, 2], [3, 2], [3, 4], [1.5, 2]]]}
        record = TileRecord(**{**nothing, **numbers, "scene": "é", "status": "ok", "model": "m@0", "geometry": box})
        with Journal.open(path, PRINT) as opened:
            for number in range(3):
                opened.append(number, [TileResult(record, "a.tif")] * 2)
        return [path.read_bytes()]
    colours, few = scenes.pixels(3, 70, 90), scenes.pixels(4, 70, 90, "uint16")
    blocks = {"tiled": True, "blockxsize": 32, "blockysize": 32}
    made = []
    for data, options in (
        (colours, {"photometric": "RGB", "compress": "deflate", **blocks}),
        (colours, {"photometric": "RGB", "compress": "lzw", "tags": {"A": "b"}, "BIGTIFF": "YES"}),
        (colours, {"photometric": "YCbCr", "compress": "jpeg", **blocks}),
        (few, {"descriptions": ("B04", "B03", "B02", "SCL"), "nodata": 0, "interleave": "band"}),
        (colours[:1], {"colormap": {index: (index, 0, 0, 255) for index in range(256)}}),
        (colours, {"driver": "PNG", "crs": None, "transform": None}),
        (colours, {"driver": "JPEG", "crs": None, "transform": None}),
        (colours, {"driver": "JP2OpenJPEG"}),
    ):
        made.append(scenes.write(path, data, **options).read_bytes())
        path.unlink()
        path.with_name("seed.tif.aux.xml").unlink(missing_ok=True)
    scenes.write(WORK / "source.tif", colours, photometric="RGB")
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><SimpleSource><SourceFilename relativeToVRT="1">source.tif'
        f"</SourceFilename><SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
        for band in (1, 2, 3)
    )
    return [*made, f'<VRTDataset rasterXSize="90" rasterYSize="70">{bands}</VRTDataset>'.encode()]


def mutated(seeds: list[bytes], chance: random.Random) -> bytes:
    """A seed with one to eight changes: bits, bytes, numbers, words, pieces cut, doubled or of another seed."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        # Headers are short and matter most.
        at = chance.randrange(max(1, min(len(data), chance.choice((64, 1024, len(data) or 1)))))
        length = min(chance.choice((1, 2, 4, 8, 64, 1024)), len(data) - at)
        kind = chance.randrange(7)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at : at + length] = chance.randbytes(length)
        elif kind == 2:
            data[at : at + length] = chance.choice(WORDS)
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length]
        elif kind == 5:
            other = chance.choice(seeds)
            place = chance.randrange(len(other))
            data[at : at + length] = other[place : place + length]
        else:
            size = chance.choice((1, 2, 4, 8))
            number = chance.choice((0, 1, 2**31, 2 ** (8 * size) - 1, chance.getrandbits(16))) % 2 ** (8 * size)
            data[at : at + size] = number.to_bytes(size, "little")
    return bytes(data)


def tried(run: Callable[[bytes], None], data: bytes) -> str | None:
    """The traceback of an input that ends in an error which is none of rsedge's; it is kept."""
    FINDINGS.mkdir(exist_ok=True)
    FINDINGS.joinpath("last").write_bytes(data)
    faulthandler.dump_traceback_later(60, exit=True)
    try:
        run(data)
    except RsedgeError:
        return None
    except Exception:
        name = f"{run.__name__}-{zlib.crc32(data):08x}"
        FINDINGS.joinpath(name).write_bytes(data)
        return f"{name}\n{traceback.format_exc()}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    return None


def loop(run: Callable[[bytes], None], seeds: list[bytes], seconds: float, chance: random.Random) -> int:
    """Try mutated seeds for a time; prints each new kind of error once and returns the number of kinds."""
    kinds: set[tuple[str, ...]] = set()
    for seed in seeds:
        if found := tried(run, seed):
            print(found)
            kinds.add(("seed",))
    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        count += 1
        if found := tried(run, mutated(seeds, chance)):
            kind = tuple(line for line in found.splitlines() if line.lstrip().startswith('File "'))[-2:]
            if kind not in kinds:
                print(found, flush=True)
            kinds.add(kind)
    print(f"{run.__name__}: {count} inputs in {seconds:.0f} s, {len(kinds)} kinds of errors that are none of rsedge's")
    return len(kinds)


def explore(run: Callable[[bytes], None], seeds: Iterable[bytes], seconds: float) -> None:
    """Let atheris explore; ends the process."""
    import atheris

    folder = WORK / "corpus"
    folder.mkdir()
    for number, seed in enumerate(seeds):
        folder.joinpath(str(number)).write_bytes(seed)

    def once(data: bytes) -> None:
        if found := tried(run, data):
            raise RuntimeError(found)

    atheris.instrument_all()
    atheris.Setup(
        [sys.argv[0], str(folder), f"-max_total_time={seconds:.0f}", "-timeout=60", "-rss_limit_mb=4096"], once
    )
    atheris.Fuzz()


def main() -> int:
    """Fuzz each target for its share of the time; return 1 where something was found."""
    targets = {run.__name__: run for run in (scene, manifest, journal)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--target", choices=targets)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true")
    given = parser.parse_args()
    chosen = [given.target] if given.target else list(targets)
    found = 0
    try:
        for name in chosen:
            seconds = given.minutes * 60 / len(chosen)
            if given.atheris:
                explore(targets[name], corpus(name), seconds)
            found += loop(targets[name], corpus(name), seconds, random.Random(given.seed))
    finally:
        shutil.rmtree(WORK)
    return found > 0


if __name__ == "__main__":
    sys.exit(main())
