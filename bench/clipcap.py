"""How much faster are CLIPCap bundles than recomputing everything in torch, one image at a time, as ClipCap does?

GPT-2 small behind CLIP B/32 and a transformer mapper with 40 prefix positions (random weights, seeded; the stop token
never wins, so every caption has 67 tokens), greedy and beam 5. The reference keeps no cache: each step runs the whole
prefix and caption so far of all of an image's hypotheses, in torch fp32; it asks for the last position's logits only,
which ClipCap's own code does not, and so is the faster for it. rsedge runs its bundles with 16 images in work. Every
engine runs in a process of its own, after a caption to warm up; rounds go through all engines, so that each round is a
pair, and medians over rounds are reported, of the time on the clock and of the processor's (which tells more where the
machine has other work). Encoding the images is part of every time.

    python bench/clipcap.py [--rounds 3] [--reference-images 1] [--precisions fp32 int8] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from rsedge.host import usable_cores

TOKENS = 67
BATCH = 16
SEARCHES = {"greedy": 1, "beam5": 5}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "projection_dim": 512,
}
TEXT = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
MAPPER = {"mapper": "transformer", "prefix_length": 40, "mapper_layers": 8, "mapper_heads": 8}


def checkpoint() -> Path:
    path = common.CACHE / "clipcap-b32-gpt2"
    if not (path / "preprocessor_config.json").exists():
        from tests.clipcap_models import make_clipcap

        make_clipcap(path, seed=0, vision=VISION, text=TEXT, vocab=50257, ends=0, mapper_gain=1.0, **MAPPER)
    return path


def bundle(precision: str) -> Path:
    path = common.CACHE / f"clipcap-b32-gpt2-{precision}.rsedge"
    if not path.exists():
        from rsedge.export.convert import export

        export(checkpoint(), path, precision=precision)  # type: ignore[arg-type]
    return path


def images(count: int) -> np.ndarray:
    from tests.models import random_images

    return random_images(BATCH, VISION["image_size"], seed=9)[:count]  # the first ones are the same for all engines


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float], count: int) -> dict[str, float]:
    """Milliseconds per image on the clock and of the processor."""
    wall, cpu = (now - before for now, before in zip(clocks(), start, strict=True))
    return {"ms": wall / count * 1e3, "cpu_ms": cpu / count * 1e3}


def run_torch(count: int, threads: int) -> dict[str, Any]:
    import torch

    from rsedge.training.models.clipcap_model import ClipCapModel
    from tests.clipcap_models import beam_caption, embed

    torch.set_num_threads(threads)
    model = ClipCapModel.from_pretrained(checkpoint()).eval()
    pixels = images(count)
    beam_caption(model, embed(model, pixels[:1])[0], 2, 2)
    results: dict[str, Any] = {}
    for name, beams in SEARCHES.items():
        start = clocks()
        captions = [beam_caption(model, embed(model, pixels[i : i + 1])[0], beams, TOKENS)[0] for i in range(count)]
        results[name] = {**since(start, count), "captions": captions}
    return results


def run_rsedge(precision: str, threads: int) -> dict[str, Any]:
    from rsedge import Captioner

    captioner = Captioner.load(bundle(precision), device="cpu", threads=threads, batch_size=BATCH)
    pixels = images(BATCH)
    captioner.caption(pixels, max_new_tokens=2)
    results: dict[str, Any] = {}
    for name, beams in SEARCHES.items():
        start = clocks()
        captions = captioner.caption(pixels, num_beams=beams, max_new_tokens=TOKENS)
        results[name] = {**since(start, BATCH), "captions": [list(caption.token_ids) for caption in captions]}
        assert all(len(caption.token_ids) == TOKENS for caption in captions)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference-images", type=int, default=1, choices=range(1, BATCH + 1), metavar=f"1..{BATCH}")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"], choices=["fp32", "fp16", "int8"])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        if options.worker == "torch":
            results = run_torch(options.reference_images, options.threads)
        else:
            results = run_rsedge(options.worker, options.threads)
        print(json.dumps({"results": results, "peak_rss_mb": round(common.peak_rss_mb())}))
        return

    for precision in options.precisions:
        bundle(precision)
    engines = ("torch", *options.precisions)
    rounds, load = [], []
    common_arguments = ("--threads", str(options.threads), "--reference-images", str(options.reference_images))
    for number in range(options.rounds):
        load.append(round(os.getloadavg()[0], 2))
        rounds.append({name: common.worker(__file__, name, *common_arguments) for name in engines})
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)

    rows = []
    for search in SEARCHES:
        reference = rounds[0]["torch"]["results"][search]["captions"]
        for name in engines:
            mine = [entry[name]["results"][search] for entry in rounds]
            theirs = [entry["torch"]["results"][search] for entry in rounds]
            pairs = list(zip(theirs, mine, strict=True))
            captions = rounds[0][name]["results"][search]["captions"][: len(reference)]
            rows.append(
                {
                    "search": search,
                    "engine": "torch, no cache, batch 1" if name == "torch" else f"rsedge {name}, batch {BATCH}",
                    "ms_per_image": common.median([run["ms"] for run in mine]),
                    "ratio": common.median([a["ms"] / b["ms"] for a, b in pairs]),
                    "cpu_ms_per_image": common.median([run["cpu_ms"] for run in mine]),
                    "cpu_ratio": common.median([a["cpu_ms"] / b["cpu_ms"] for a, b in pairs]),
                    "equal_captions": float(np.mean([a == b for a, b in zip(captions, reference, strict=True)])),
                    "peak_rss_mb": max(entry[name]["peak_rss_mb"] for entry in rounds),
                }
            )
    values = {
        "machine": common.machine(),
        "threads": options.threads,
        # Above nought before the first round, others were at work here too.
        "load_before_each_round": load,
        "rounds": options.rounds,
        "tokens": TOKENS,
        "reference_images": options.reference_images,
        "images": BATCH,
        "rows": rows,
    }
    path = common.save("clipcap", values)

    print(f"{values['machine']['cpu']}, {options.threads} threads; {options.rounds} rounds, medians; load {load}")
    print(f"{'search':8}{'engine':26}{'ms/image':>10}{'ratio':>8}{'CPU ms':>9}{'ratio':>8}{'equal':>8}{'peak RSS':>12}")
    for row in rows:
        print(
            f"{row['search']:8}{row['engine']:26}{row['ms_per_image']:10.0f}{row['ratio']:8.2f}"
            f"{row['cpu_ms_per_image']:9.0f}{row['cpu_ratio']:8.2f}"
            f"{row['equal_captions']:8.1%}{row['peak_rss_mb']:9} MB"
        )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
