"""How much faster than transformers is rsedge on the CPU, with the same weights, images and generation settings?

BLIP-base at 224 px (random weights, seeded), 20 new tokens, greedy and beam 3. transformers runs eager in fp32 at batch
1, 8 and 16 and its best counts; rsedge runs its fp32 and int8 bundles with 16 images in work. Every engine runs in a
process of its own, after a batch to warm up; rounds go through all engines, so that each round is a pair, and medians
over rounds are reported.

Before every round and after the last the bench also measures the limits of the machine with as many threads
(`bench/cpu_limits.py`): products in float32 and int8 at the shapes of the encoder, and memory; the best of each counts,
since a limit is what the machine does undisturbed. From them follow the shares that are reached (the encoder's of the
products, the decoder's steps' of the bandwidth) and the time at which products and memory alone would be done, beside
which no ratio can be higher on this machine. CLIPCap has its own reference: `bench/clipcap.py`.

    python bench/caption_cpu.py [--rounds 3] [--images 32]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common, cpu_limits

TOKENS = 20
SEARCHES = {"greedy": 1, "beam3": 3}
BATCH = 16
BATCHES = {1: 4, 8: 16, 16: 32}  # batch → images timed: small batches are slow and steady


def images(count: int) -> np.ndarray:
    from tests.models import random_images

    return random_images(count, common.BLIP_BASE["image_size"], seed=9)


def run_transformers(count: int) -> dict:
    import torch
    from transformers import BlipForConditionalGeneration

    from rsedge.bundle import read_bundle

    torch.set_num_threads(cpu_limits.usable_cores())
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
    from rsedge.host import CACHES, ENCODE, STEPS, StageClock

    clock = StageClock()
    captioner = Captioner.load(common.bundle(precision), device="cpu", batch_size=BATCH, clock=clock)
    pixels = images(count)
    captioner.caption(pixels[:BATCH], max_new_tokens=2)
    results = {}
    for name, beams in SEARCHES.items():
        clock.reset()
        start = time.perf_counter()
        captions = captioner.caption(pixels, num_beams=beams, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
        seconds = time.perf_counter() - start
        stages = {stage: clock.seconds[stage] / count * 1e3 for stage in (ENCODE, STEPS, CACHES)}
        results[name] = {
            "ms": seconds / count * 1e3,
            "stages": {**stages, "search and the rest": seconds / count * 1e3 - sum(stages.values())},
            "steps": clock.calls[STEPS],
            "captions": [list(caption.token_ids) for caption in captions],
        }
    return results


def at_the_limit(limits: dict, result: dict, precision: str, beams: int, count: int) -> dict[str, float]:
    """What part of the machine's limits is reached, and how long its products and memory take at the least."""
    from rsedge.bundle import read_bundle

    bundle = read_bundle(common.bundle(precision))
    spec, vocabulary = bundle.manifest.decoder, bundle.manifest.tokens.vocab_size
    width = spec.heads * spec.head_dim
    gflops, bandwidth = limits["gemm"][precision]["gflops"], limits["memory"]["read_gb_per_s"]

    vision = cpu_limits.encoder_gflop() + cpu_limits.cross_gflop(spec.layers)
    vision_ms = result["stages"]["encode"]
    # int8 keeps the table that tokens are looked up in apart from the one that the vocabulary's scores are made with.
    looked_up = vocabulary * width if precision == "int8" else 0
    values = 2 * spec.layers * width  # keys and values of a token, of all layers
    taken = {tensor.name: np.dtype(tensor.dtype).itemsize for tensor in bundle.manifest.graphs["step"].inputs}
    working = count * TOKENS / result["steps"]  # images in a step
    moved = bundle.graph_path("step").stat().st_size - looked_up
    moved += working * values * (taken["cross_k.0"] * spec.image_tokens + taken["self_k.0"] * beams * TOKENS / 2)
    weights = 14 * spec.layers * width**2 + width**2 + vocabulary * width
    flop = working * beams * (2 * weights + 4 * spec.layers * width * (spec.image_tokens + TOKENS / 2))
    step_ms = result["stages"]["decode steps"] * count / result["steps"]
    floor_ms = max(moved / bandwidth, flop / gflops) / 1e6  # of a step: the one while the other
    least_ms = vision / gflops * 1e3 + floor_ms * result["steps"] / count
    return {
        "vision_gflops": vision / vision_ms * 1e3,
        "vision_share_of_gemm": vision / vision_ms * 1e3 / gflops,
        "step_ms": step_ms,
        "step_mb": moved / 1e6,
        "step_gb_per_s": moved / step_ms / 1e6,
        "step_share_of_bandwidth": moved / step_ms / 1e6 / bandwidth,
        "step_share_of_limit": floor_ms / step_ms,
        "least_ms_per_image": least_ms,
        "share_of_limit": least_ms / result["ms"],
    }


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, float]:
    """Shares of identical captions and of equal tokens, position by position."""
    captions = [a == b for a, b in zip(ours, theirs, strict=True)]
    tokens = [x == y for a, b in zip(ours, theirs, strict=True) for x, y in zip(a, b, strict=True)]
    return {"captions": float(np.mean(captions)), "tokens": round(float(np.mean(tokens)), 4)}


def medians(entries: list[dict[str, float]]) -> dict[str, float]:
    """The median of each value."""
    return {name: common.median([entry[name] for entry in entries]) for name in entries[0]}


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
    threads = str(cpu_limits.usable_cores())
    rounds, limits, load = [], [], []
    for number in range(options.rounds):
        load.append(round(os.getloadavg()[0], 2))
        limits.append(common.worker(cpu_limits.__file__, "--threads", threads))
        rounds.append({name: common.worker(__file__, name, "--images", str(options.images)) for name in engines})
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
    limits.append(common.worker(cpu_limits.__file__, "--threads", threads))
    limit = cpu_limits.best(limits)

    rows = []
    for search, beams in SEARCHES.items():
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
            else:
                results = [entry["results"][search] for entry in runs]
                row["stages_ms"] = medians([result["stages"] for result in results])
                reached = [at_the_limit(limit, result, name, beams, options.images) for result in results]
                found = medians(reached)
                # The limit is undisturbed, and so is the fastest round of transformers.
                theirs = min(entry["transformers"]["results"][search]["ms"] for entry in rounds)
                row["limit"] = {**found, "ratio": common.median([theirs / found["least_ms_per_image"]])}
            rows.append(row)
    values = {
        "machine": common.machine(),
        "load_before_each_round": load,
        "rounds": options.rounds,
        "images": options.images,
        "tokens": TOKENS,
        "gflop_per_image": {
            "encoder": round(cpu_limits.encoder_gflop(), 2),
            "keys and values for the decoder": round(cpu_limits.cross_gflop(), 2),
        },
        "limits": limit,
        "rows": rows,
    }
    path = common.save("caption_cpu", values)

    print(
        f"{values['machine']['cpu']}, {values['machine']['cores']} cores; {options.rounds} rounds, medians; load {load}"
    )
    rates = ", ".join(f"{name} {found['gflops']:.0f}" for name, found in limit["gemm"].items())
    print(f"limits: products {rates} GFLOP/s, reading {limit['memory']['read_gb_per_s']:.1f} GB/s")
    print(f"{'search':8}{'engine':15}{'ms/image':>10}{'ratio':>8}{'captions':>10}{'tokens':>9}{'peak RSS':>11}")
    for row in rows:
        same = row["agreement"]
        print(
            f"{row['search']:8}{row['engine']:15}{row['ms_per_image']:10.0f}{row['ratio']:8.2f}"
            f"{same['captions']:10.1%}{same['tokens']:9.1%}{row['peak_rss_mb']:8} MB"
        )
    for row in rows[1:3] + rows[4:]:
        reached = row["limit"]
        print(
            f"{row['search']:8}{row['engine']:15}vision {reached['vision_share_of_gemm']:.0%} of the products' rate, "
            f"steps {reached['step_share_of_bandwidth']:.0%} of the bandwidth; {reached['share_of_limit']:.0%} of the "
            f"limit, at which the ratio would be {reached['ratio']:.2f}"
        )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
