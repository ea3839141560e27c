"""Kill runs at random points, caption a thousand scenes of which some are bad, and caption very many tiles.

    python tools/soak.py [--kills 200] [--scenes 1000] [--tiles 100000] [--seed 0]

Every part runs ``rsedge caption`` with the tiny model of the self-test, in processes of its own. Prints the figures and
writes bench/results/soak.json; fails where something is lost, computed twice, or grows. 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests import scenes  # noqa: E402 - the folder above is searched only now
from tests.faults.machine import ENVIRONMENT, caption, segments, write_scene  # noqa: E402

RESULT = ROOT / "bench" / "results" / "soak.json"
FORMATS = ("geojson", "parquet", "gpkg", "csv")
TILE, SEGMENT = 16, 64
GROWTH = 12  # MiB that the last quarter of a run may take more than its second quarter


def kills(folder: Path, count: int, chance: random.Random) -> dict[str, Any]:
    """Kill a run of 36 segments ``count`` times at random points; complete it after each kill and compare the bytes."""
    scene = write_scene(folder / "scene.tif", 48 * TILE)
    whole, seconds = {}, 0.0
    for name in FORMATS:
        output, began = folder / f"whole.{name}", time.monotonic()
        subprocess.run(caption(scene, "-o", output), env=ENVIRONMENT, check=True)
        seconds = max(seconds, time.monotonic() - began)
        whole[name] = output.read_bytes()
    again = different = resumed = 0
    for number in range(count):
        name = FORMATS[number % len(FORMATS)]
        output = folder / f"killed.{name}"
        process = subprocess.Popen(caption(scene, "-o", output), env=ENVIRONMENT)
        time.sleep(chance.uniform(0, seconds))
        process.kill()
        process.wait()
        kept = segments(output)
        if not output.exists() or output.with_name(f"{output.name}.journal").exists():
            command = caption(scene, "-o", output, "--json")
            found = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
            resumed += kept > 0
            again += json.loads(found.stdout)["resumed_tiles"] != kept * SEGMENT
        different += output.read_bytes() != whole[name]
        output.unlink()
    left = sorted(path.name for path in folder.iterdir() if path.suffix in (".tmp", ".journal"))
    return {"kills": count, "resumed": resumed, "different": different, "computed_again": again, "left_over": left}


def watched(command: list[str]) -> tuple[int, str, dict[str, Any]]:
    """Run a command; gives its code, its standard output, and its memory (MiB) and file handles over time."""
    memory: list[float] = []
    handles: list[int] = []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=err)
        place = Path(f"/proc/{process.pid}")
        while process.poll() is None:
            pages = place.joinpath("statm").read_text().split()
            memory.append(int(pages[1]) * os.sysconf("SC_PAGESIZE") / 2**20)
            handles.append(len(list(place.joinpath("fd").iterdir())))
            time.sleep(0.1)
        out.seek(0)
        text = out.read()
    quarter = len(memory) // 4
    second, last = (statistics.mean(memory[part * quarter : (part + 1) * quarter] or [0]) for part in (1, 3))
    figures = {"second_quarter_mib": round(second), "last_quarter_mib": round(last), "peak_mib": round(max(memory))}
    return process.returncode, text, {**figures, "most_handles": max(handles[quarter:])}


def many_scenes(folder: Path, count: int) -> dict[str, Any]:
    """Caption ``count`` scenes in one command, of which 2 % are cut short or no rasters."""
    inside = folder / "scenes"
    inside.mkdir()
    first = write_scene(inside / "0.tif", 64)
    for number in range(1, count):
        path = Path(shutil.copy(first, inside / f"{number}.tif"))
        if number % 100 == 37:
            scenes.truncate(path, 0.6)
        elif number % 100 == 73:
            path.write_bytes(b"no raster")
    bad = [number for number in range(count) if number % 100 in (37, 73)]
    code, text, figures = watched(caption(inside, "-o", folder / "scenes.csv", "--json"))
    summary = json.loads(text)
    listed = [Path(line.split(":")[0].split(" cannot")[0]).name for line in summary["unread"] + summary["unopened"]]
    done = count - len(bad)
    return {
        "scenes": count,
        "bad": len(bad),
        "listed": len(listed),
        "code": code,
        "tiles": summary["tiles"],
        **figures,
        "right": sorted(listed) == sorted(f"{number}.tif" for number in bad) and summary["ok"] >= done * 16,
    }


def many_tiles(folder: Path, count: int) -> dict[str, Any]:
    """Caption one scene of ``count`` tiles or a few more."""
    scene = write_scene(folder / "large.tif", math.ceil(math.sqrt(count)) * TILE)
    began = time.monotonic()
    code, text, figures = watched(caption(scene, "-o", folder / "large.geojson", "--json"))
    tiles = json.loads(text)["ok"]
    return {"tiles": tiles, "code": code, "seconds": round(time.monotonic() - began), **figures}


def problems(result: dict[str, Any]) -> list[str]:
    """What is not as it should be, one line each."""
    found = [f"kills: {name} is {result['kills'][name]}" for name in ("different", "computed_again", "left_over")]
    found = [line for line in found if not line.endswith((" 0", " []"))]
    for part, code in (("scenes", 3), ("tiles", 0)):
        figures = result[part]
        if figures["code"] != code:
            found.append(f"{part}: the exit code is {figures['code']}, expected {code}")
        if (last := figures["last_quarter_mib"]) > (second := figures["second_quarter_mib"]) + GROWTH:
            found.append(f"{part}: memory grows from {second} to {last} MiB")
        if figures["most_handles"] > 64:
            found.append(f"{part}: {figures['most_handles']} open files")
    return found + ([] if result["scenes"]["right"] else ["scenes: not all bad scenes, and only they, are listed"])


def main() -> int:
    """Run all parts and return 1 if one has problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("kills", 200), ("scenes", 1000), ("tiles", 100_000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    given = parser.parse_args()
    result: dict[str, Any] = {"machine": {"cores": len(os.sched_getaffinity(0))}, "seed": given.seed}
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        for part, measure in (
            ("kills", lambda: kills(folder, given.kills, random.Random(given.seed))),
            ("scenes", lambda: many_scenes(folder, given.scenes)),
            ("tiles", lambda: many_tiles(folder, given.tiles)),
        ):
            began = time.monotonic()
            result[part] = measure()
            print(f"{part}: {json.dumps(result[part])}, {time.monotonic() - began:.0f} s", flush=True)
    found = problems(result)
    given.output.write_text(json.dumps({**result, "problems": found}, indent=2) + "\n", encoding="utf-8")
    print("\n".join(found) or "nothing lost, nothing grows", f"written to {given.output}", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
