"""How much faster than transformers is rsedge on the CPU, with the same weights, images and generation settings?

BLIP-base at 224 px (random weights, seeded), 20 new tokens, greedy and beam 3. transformers runs eager in fp32 at batch
1, 8 and 16 and its best counts; rsedge runs its fp32 and int8 bundles with 16 images in work. Every engine runs in a
process of its own, after a batch to warm up; rounds go through all engines, so that each round is a pair, and medians
over rounds are reported.

    python bench/caption_cpu.py [--rounds 3] [--images 32]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

TOKENS = 20
SEARCHES = {"greedy": 1, "beam3": 3}
BATCHES = {1: 4, 8: 16, 16: 32}  # batch → images timed: small batches are slow and steady


def images(count: int) -> np.ndarray:
    from tests.models import random_images

    return random_images(count, common.BLIP_BASE["image_size"], seed=9)


def run_transformers(count: int) -> dict:
    import torch
    from transformers import BlipForConditionalGeneration

    from rsedge.bundle import read_bundle

    torch.set_num_threads(len(__import__("os").sched_getaffinity(0)))
    model = BlipForConditionalGeneration.from_pretrained(common.checkpoint()).eval()
    spec = read_bundle(common.bundle("fp32")).manifest.image
    values = (images(count) / 255 - np.array(spec.mean)) / np.array(spec.std)
    pixels = torch.from_numpy(values.astype(np.float32)).permute(0, 3, 1, 2).contiguous()
    results: dict = {}
    with torch.no_grad():
        model.generate(pixel_values=pixels[:16], max_new_tokens=2)
        for name, beams in SEARCHES.items():
            settings = {"num_beams": beams, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
            rates = {}
            for batch, timed in BATCHES.items():
                timed = min(timed, count)
                start = time.perf_counter()
                outputs = [
                    model.generate(pixel_values=pixels[first : first + batch], **settings)
                    for first in range(0, timed, batch)
                ]
                rates[batch] = (time.perf_counter() - start) / timed * 1e3
                captions = [row[1:].tolist() for output in outputs for row in output]
            results[name] = {"ms_by_batch": rates, "ms": min(rates.values()), "captions": captions}
    return results


def run_rsedge(precision: str, count: int) -> dict:
    from rsedge import Captioner

    captioner = Captioner.load(common.bundle(precision), device="cpu", batch_size=16)
    pixels = images(count)
    captioner.caption(pixels[:16], max_new_tokens=2)
    results = {}
    for name, beams in SEARCHES.items():
        start = time.perf_counter()
        captions = captioner.caption(pixels, num_beams=beams, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
        milliseconds = (time.perf_counter() - start) / count * 1e3
        results[name] = {"ms": milliseconds, "captions": [list(caption.token_ids) for caption in captions]}
    return results


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, float]:
    """Shares of identical captions and of equal tokens, position by position."""
    captions = [a == b for a, b in zip(ours, theirs, strict=True)]
    tokens = [x == y for a, b in zip(ours, theirs, strict=True) for x, y in zip(a, b, strict=True)]
    return {"captions": float(np.mean(captions)), "tokens": round(float(np.mean(tokens)), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=32, choices=range(16, 33), metavar="16..32")
    parser.add_argument("--worker", choices=["transformers", "fp32", "int8"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        count = options.images
        results = run_transformers(count) if options.worker == "transformers" else run_rsedge(options.worker, count)
        print(json.dumps({"results": results, "peak_rss_mb": round(common.peak_rss_mb())}))
        return

    for precision in ("fp32", "int8"):
        common.bundle(precision)
    engines = ("transformers", "fp32", "int8")
    rounds = []
    for number in range(options.rounds):
        rounds.append({name: common.worker(__file__, name, "--images", str(options.images)) for name in engines})
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)

    rows = []
    for search in SEARCHES:
        reference = rounds[0]["transformers"]["results"][search]["captions"]
        for name in engines:
            runs = [entry[name] for entry in rounds]
            ratios = [e["transformers"]["results"][search]["ms"] / e[name]["results"][search]["ms"] for e in rounds]
            row = {
                "search": search,
                "engine": name if name == "transformers" else f"rsedge {name}",
                "ms_per_image": common.median([entry["results"][search]["ms"] for entry in runs]),
                "ratio": common.median(ratios),
                "agreement": agreement(runs[0]["results"][search]["captions"], reference),
                "peak_rss_mb": max(entry["peak_rss_mb"] for entry in runs),
            }
            if name == "transformers":
                batches = {b: [e["results"][search]["ms_by_batch"][str(b)] for e in runs] for b in BATCHES}
                row["ms_by_batch"] = {batch: common.median(values) for batch, values in batches.items()}
            rows.append(row)
    values = {"machine": common.machine(), "rounds": options.rounds, "images": options.images, "rows": rows}
    path = common.save("caption_cpu", values)

    print(f"{values['machine']['cpu']}, {values['machine']['cores']} cores; {options.rounds} rounds, medians")
    print(f"{'search':8}{'engine':15}{'ms/image':>10}{'ratio':>8}{'captions':>10}{'tokens':>9}{'peak RSS':>11}")
    for row in rows:
        same = row["agreement"]
        print(
            f"{row['search']:8}{row['engine']:15}{row['ms_per_image']:10.0f}{row['ratio']:8.2f}"
            f"{same['captions']:10.1%}{same['tokens']:9.1%}{row['peak_rss_mb']:8} MB"
        )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
