"""Put the figures of bench/results into the README, between its markers; with --check only say if they are there."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- end of figures -->)", re.DOTALL)


def results(name: str) -> dict[str, Any]:
    """One benchmark's results."""
    values: dict[str, Any] = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return values


def figures() -> str:
    """The speed section's table and sentences."""
    speed, memory, pipeline = results("caption_cpu"), results("memory"), results("pipeline")
    machine = speed["machine"]
    lines = [
        f"Measured on {machine['cores']} cores of an {machine['cpu']} ({', '.join(machine['instructions'])}), "
        f"{speed['images']} images, medians of {speed['rounds']} rounds:",
        "",
        "| search | engine | ms per image | ratio | identical captions | equal tokens | peak RSS |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in speed["rows"]:
        same = row["agreement"]
        lines.append(
            f"| {row['search']} | {row['engine']} | {row['ms_per_image']:.0f} | {row['ratio']:.2f} | "
            f"{same['captions']:.0%} | {same['tokens']:.1%} | {row['peak_rss_mb']} MB |"
        )
    ratios = " and ".join(f"{row['ratio']:.2f}" for row in memory["rows"])
    whole = " and ".join(f"{row['whole_mb']:.0f}" for row in memory["rows"])
    quarter = " and ".join(f"{row['quarter_mb']:.0f}" for row in memory["rows"])
    lines += [
        "",
        f"From a deflate-compressed GeoTIFF to GeoJSON the {pipeline['precision']} model takes {pipeline['ratio']:.3f} "
        f"times what the model alone takes (`bench/pipeline.py`, {pipeline['tiles']} tiles).",
        "",
        f"A {memory['side']} × {memory['side']} scene takes {ratios} times the memory of its quarter, as 8-bit and as "
        f"16-bit raster, {whole} against {quarter} MB with a small model (`bench/memory.py`).",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Write or check the block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = BLOCK.sub(lambda _: figures(), old)
    if not options.check:
        README.write_text(new, encoding="utf-8")
        return 0
    if new == old and BLOCK.search(old):
        return 0
    print("README.md does not show the figures of bench/results: run 'make docs'", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
