"""Is rsedge right on the GPU, and how fast beside transformers and the limits of the machine?

First what must hold: fp16 captions agree with transformers in float32 on at least 99 % of tokens; embeddings have a
cosine of at least 0.999; CUDA graphs, fixed addresses and values that move give the same captions; and a batch that
does not fit is halved with nothing lost. Then pairs in one process: transformers in float16, eager and compiled by
torch, against rsedge with and without CUDA graphs, each at the batch size at which it is fastest, greedy and beam 3.
Then shares of the measured limits (`bench/gpu_limits.py`), and where the time goes.

The model is BLIP-base at 224 px, random and seeded unless `--checkpoint` names another; images are random unless
`--image-folder` names real ones. Needs onnxruntime-gpu, onnx, torch, transformers, safetensors, numpy and Pillow, and
no more: rsedge need not be installed. Results are written after each part; the exit code is 1 where a check failed.

    python bench/gpu.py [--quick] [--output FILE.json]
    python bench/gpu.py --device cpu --tiny          # the same on any machine, in little time and with no meaning
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import caption_gpu, common, gpu_limits
from bench.caption_gpu import Case, Rsedge, Torch

LEAST_TOKENS, LEAST_COSINE = 0.99, 0.999


def make_case(options: argparse.Namespace) -> Case:
    from PIL import Image

    from rsedge.bundle import read_bundle
    from rsedge.export.convert import export
    from rsedge.pixels import resize
    from tests.models import make_blip, random_images

    sizes = caption_gpu.TINY if options.tiny else common.BLIP_BASE
    checkpoint = options.checkpoint or common.CACHE / ("gpu-tiny" if options.tiny else "blip-base-224")
    if not (checkpoint / "preprocessor_config.json").exists():
        make_blip(checkpoint, seed=0, **sizes)
    bundle = options.bundle or common.CACHE / f"gpu-{checkpoint.name}-fp16.rsedge"
    if not bundle.exists() or "self_write" not in read_bundle(bundle).manifest.graphs:
        export(checkpoint, bundle, precision="fp16", overwrite=True)
    spec = read_bundle(bundle).manifest.image
    if options.image_folder:
        suffixes = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
        files = sorted(path for path in options.image_folder.rglob("*") if path.suffix.lower() in suffixes)
        files = files[: options.images]
        images = np.array(
            [resize(np.asarray(Image.open(file).convert("RGB")), spec.size, spec.resample) for file in files]
        )
    else:
        images = random_images(options.images, spec.size, seed=9)
    return Case(checkpoint, bundle, options.device, images, options.tokens, spec.mean, spec.std)


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, float]:
    """Share of equal tokens, position by position, and of equal captions."""
    equal = sum(a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=False))
    total = sum(max(len(x), len(y)) for x, y in zip(ours, theirs, strict=True))
    same = np.mean([x == y for x, y in zip(ours, theirs, strict=True)])
    return {"tokens": round(equal / total, 5), "captions": round(float(same), 4)}


def check_captions(case: Case, count: int) -> dict[str, Any]:
    """Against transformers in float32, and the three ways of rsedge against one another."""
    images, found = case.images[:count], {}
    batch = min(32, count)
    reference = Torch(case, dtype="float32")
    engines = [Rsedge(case, mode) for mode in ("graphs", "fixed", "values")]
    for search in case.beams:
        settings = case.settings(search, fixed=False)
        expected = reference.caption(images, batch, **settings)
        captions = {engine.name: engine.caption(images, batch, **settings) for engine in engines}
        entry: dict[str, Any] = {"fp16_against_torch_fp32": agreement(captions["rsedge graphs"], expected)}
        for name in ("rsedge fixed", "rsedge values"):
            entry[f"graphs against {name}"] = agreement(captions["rsedge graphs"], captions[name])
        again = engines[0].caption(images, batch, **settings)  # what was captured is replayed
        entry["replayed"] = agreement(again, captions["rsedge graphs"])
        # Other shapes choose other kernels, and float16 rounds: equal captions are asked of equal shapes only.
        entry["passed"] = (
            entry["fp16_against_torch_fp32"]["tokens"] >= LEAST_TOKENS
            and entry["graphs against rsedge fixed"]["captions"] == entry["replayed"]["captions"] == 1
            and entry["graphs against rsedge values"]["tokens"] >= LEAST_TOKENS
        )
        found[search] = entry
    for engine in (reference, *engines):
        engine.close()
    return {"images": count, "captured": engines[0].captures, **found}


def check_embeddings(options: argparse.Namespace) -> dict[str, Any]:
    """A CLIP of the shape of B/32 in fp16 against transformers in float32."""
    from rsedge.bundle import read_bundle
    from rsedge.export.convert import export
    from rsedge.runtime.embedder import Embedder
    from rsedge.runtime.ort import OrtBackend
    from tests.dual_encoders import TEXTS, embeddings, make_clip
    from tests.models import random_images

    name, shape, size = "gpu-clip-tiny", {}, 32
    if not options.tiny:
        wide = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
        name, shape, size = "gpu-clip-b32", {"vision": {**wide, "patch_size": 32}, "text": text, "dim": 512}, 224
    checkpoint, bundle = common.CACHE / name, common.CACHE / f"{name}-fp16.rsedge"
    if not (checkpoint / "preprocessor_config.json").exists():
        make_clip(checkpoint, image_size=size, **shape)
    if not bundle.exists():
        export(checkpoint, bundle, precision="fp16")
    images = random_images(24, size, seed=4)
    expected = embeddings(checkpoint, images)
    backend = OrtBackend("cuda:0" if options.device == "cuda" else "cpu")
    embedder = Embedder(read_bundle(bundle), backend, device_reason="a benchmark", batch_size=16)
    found = embedder.embed_images(images), embedder.embed_texts(TEXTS)
    images_cosine, texts_cosine = (float((a * b).sum(1).min()) for a, b in zip(found, expected, strict=True))
    passed = min(images_cosine, texts_cosine) >= LEAST_COSINE
    return {"images_min_cosine": images_cosine, "texts_min_cosine": texts_cosine, "passed": passed}


@contextmanager
def little_memory(case: Case) -> Any:
    """Leave room for few images: fill a GPU's memory; on a CPU let the first run fail as it would there."""
    from rsedge.bundle import read_bundle
    from rsedge.runtime.memory import bytes_per_image
    from rsedge.runtime.ort import OrtGraph

    if case.device == "cuda":
        import torch

        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        room = 2**30 + 8 * bytes_per_image(read_bundle(case.bundle).manifest, tokens=case.tokens, rows=3)
        filling = torch.empty(max(free - room, 0), dtype=torch.uint8, device="cuda")
        yield
        del filling
        torch.cuda.empty_cache()
        return
    original, failures = OrtGraph.run_on_device, ["Failed to allocate memory for requested buffer of size 1234"]

    def run(self: Any, feeds: Any, **outputs: Any) -> Any:
        if "pixels" in feeds and failures:
            raise RuntimeError(failures.pop())
        return original(self, feeds, **outputs)

    OrtGraph.run_on_device = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        OrtGraph.run_on_device = original  # type: ignore[method-assign]


def check_memory(case: Case, batch: int) -> dict[str, Any]:
    """A batch that does not fit is halved, and every image has its caption."""
    images, settings = case.images[:batch], case.settings("beam3", fixed=False)
    plain = Rsedge(case, "graphs")
    expected = plain.caption(images, min(8, batch), **settings)
    plain.close()
    del plain
    with little_memory(case):
        engine = Rsedge(case, "graphs")
        found = engine.caption(images, batch, **settings)
        ended = engine.captioner.batch_size
        engine.close()
    entry = {"from": batch, "to": ended, "captioned": len(found), **agreement(found, expected)}
    return {**entry, "passed": len(found) == batch and ended < batch and entry["tokens"] >= LEAST_TOKENS}


def pairs(case: Case, engines: list[Any], batches: list[int], rounds: int) -> dict[str, Any]:
    """Images per second of each engine at its best batch size, medians over rounds that go through all engines."""
    results: dict[str, Any] = {}
    for search in case.beams:
        rows: dict[str, dict[str, Any]] = {}
        for engine in engines:
            try:
                batch, rates = caption_gpu.best_batch(engine, case, search, batches)
            except Exception as error:  # an engine that does not run here is a result too
                rows[engine.name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                continue
            rows[engine.name] = {"batch": batch, "images_per_s_by_batch": rates, "rounds": []}
            print(f"{search} {engine.name}: {max(rates.values()):.1f} images/s at {batch}", file=sys.stderr)
        for _ in range(rounds):
            for engine in engines:
                row = rows[engine.name]
                if "error" not in row:
                    row["rounds"].append(caption_gpu.rate(engine, case, search, row["batch"], case.images))
        for row in rows.values():
            timed = [value for value in row.get("rounds", []) if value]
            if timed:
                row["rounds"], row["images_per_s"] = [round(value, 2) for value in timed], common.median(timed)
        ours = rows["rsedge graphs"].get("rounds")
        for row in rows.values():
            if ours and row.get("rounds") and len(row["rounds"]) == len(ours):
                ratios = [mine / theirs for mine, theirs in zip(ours, row["rounds"], strict=True)]
                row["rsedge_graphs_is_times"] = common.median(ratios)
        results[search] = rows
    return results


def profile(case: Case, engine: Rsedge, search: str, batch: int) -> dict[str, Any]:
    """Milliseconds per image and stage; the encoder runs beside the decoder, so stages may sum to more than the run."""
    from rsedge.runtime.fixed import FixedBatch, FixedGraphs, FixedMemory
    from rsedge.runtime.ort_cuda import FixedRun, Packed

    fixed = engine.captioner.decoder._fixed
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    stages = {
        "encoder": (FixedGraphs, "_encode"),
        "images into the cross cache": (FixedMemory, "enter"),
        "to the device": (Packed, "upload"),
        "from the device": (Packed, "download"),
        "decoder step with its transfers": (FixedBatch, "step"),
        "caches after a step with their transfers": (FixedBatch, "advance"),
    }
    originals = {name: (owner, attribute, getattr(owner, attribute)) for name, (owner, attribute) in stages.items()}
    originals["runs"] = (FixedRun, "__call__", FixedRun.__call__)

    def timed(name: str, original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            known = name
            if name == "runs":
                known = "step graph" if self._graph is fixed.step else "cache graphs"
            start = time.perf_counter()
            try:
                return original(self, *args, **kwargs)
            finally:
                spent[known] += time.perf_counter() - start
                calls[known] += 1

        return call

    images, settings = case.images, case.settings(search)
    engine.caption(images, batch, **settings)
    for name, (owner, attribute, original) in originals.items():
        setattr(owner, attribute, timed(name, original))
    start = time.perf_counter()
    engine.caption(images, batch, **settings)
    whole = time.perf_counter() - start
    for owner, attribute, original in originals.values():
        setattr(owner, attribute, original)
    stages_ms = {name: round(seconds / len(images) * 1e3, 4) for name, seconds in spent.items()}
    rest = whole - spent["decoder step with its transfers"] - spent["caches after a step with their transfers"]
    return {
        "batch": batch,
        "images": len(images),
        "ms_per_image": round(whole / len(images) * 1e3, 4),
        "stages_ms_per_image": stages_ms,
        "search, waiting for images and the rest": round(rest / len(images) * 1e3, 4),
        "steps": calls["step graph"],
        "ms_per_step_graph": round(spent["step graph"] / max(calls["step graph"], 1) * 1e3, 4),
        "images_per_s_encoder": round(len(images) / spent["encoder"], 1),
    }


def shares(case: Case, profiles: dict[str, dict[str, Any]], limits: dict[str, Any]) -> dict[str, Any]:
    """What part of the measured limits is reached: products by the encoder, memory by the decoder's steps."""
    from transformers import AutoConfig

    from rsedge.bundle import read_bundle

    bundle = read_bundle(case.bundle)
    spec, config = bundle.manifest.decoder, AutoConfig.from_pretrained(case.checkpoint)
    vision, size, seen = config.vision_config, bundle.manifest.image.size, spec.image_tokens
    width, layers, patch = vision.hidden_size, vision.num_hidden_layers, vision.patch_size
    flop = layers * seen * (8 * width**2 + 4 * width * vision.intermediate_size + 4 * seen * width)
    flop += 2 * (size // patch) ** 2 * 3 * patch**2 * width
    flop += 4 * spec.layers * seen * width * spec.heads * spec.head_dim
    values: dict[str, Any] = {"gflop_per_image_encoder": round(flop / 1e9, 2)}
    for search, found in profiles.items():
        reached = flop * found["images_per_s_encoder"] / 1e12
        rows, column = found["batch"] * case.beams[search], 2 * spec.layers * spec.heads * spec.head_dim * 2
        cross = found["batch"] * column * seen
        moved = bundle.graph_path("step").stat().st_size + cross + rows * column * case.tokens // 2
        per_second = moved / (found["ms_per_step_graph"] / 1e3) / 1e9
        values[search] = {
            "encoder_tflops": round(reached, 3),
            "encoder_share_of_gemm": round(reached / limits["gemm"]["tflops"], 4),
            "step_mbytes": round(moved / 1e6, 2),
            "step_gb_per_s": round(per_second, 2),
            "step_share_of_bandwidth": round(per_second / limits["memory"]["gb_per_s"], 4),
        }
    return values


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few images")
    parser.add_argument("--quick", action="store_true", help="fewer batch sizes, images and rounds")
    parser.add_argument("--skip-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--checkpoint", type=Path, help="a BLIP captioner in Hugging Face layout")
    parser.add_argument("--bundle", type=Path, help="its fp16 bundle")
    parser.add_argument("--image-folder", type=Path, help="real images, sought in it and below")
    parser.add_argument("--images", type=int, help="how many, at most")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON; on CUDA bench/results/gpu.json")
    options = parser.parse_args(arguments)
    options.images = options.images or (12 if options.tiny else 256 if options.quick else 512)
    if options.output is None and options.device == "cuda" and not options.tiny:
        options.output = common.RESULTS / "gpu.json"
    caption_gpu.prepare()

    batches = [4] if options.tiny else [32, 128] if options.quick else [16, 32, 64, 128, 256]
    values: dict[str, Any] = {"machine": caption_gpu.machine(options.device), "tokens": options.tokens}

    def part(name: str, value: Any) -> None:
        values[name] = value
        print(f"{name}: {json.dumps(value, indent=2)}")
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(values, indent=2) + "\n")

    case = make_case(options)
    part("model", {"checkpoint": case.checkpoint.name, "images": len(case.images), "real": bool(options.image_folder)})
    part("limits", gpu_limits.measure(options.device, small=options.tiny))
    part("captions", check_captions(case, min(len(case.images), 64 if options.quick else 256)))
    part("embeddings", check_embeddings(options))
    part("out_of_memory", check_memory(case, min(len(case.images), 64)))

    engines: list[Any] = [Torch(case, dtype="float16")]
    if not options.skip_compile:
        engines.append(Torch(case, dtype="float16", compiled=True))
    engines += [Rsedge(case, mode) for mode in ("graphs", "fixed", "values")]
    part("pairs", pairs(case, engines, batches, 1 if options.quick or options.tiny else 3))
    ours = next(engine for engine in engines if engine.name == "rsedge graphs")
    found = {search: profile(case, ours, search, rows[ours.name]["batch"]) for search, rows in values["pairs"].items()}
    part("profile", found)
    part("shares", shares(case, found, values["limits"]))
    checks = {"embeddings": values["embeddings"]["passed"], "out_of_memory": values["out_of_memory"]["passed"]}
    checks |= {f"captions {search}": values["captions"][search]["passed"] for search in case.beams}
    part("failed", [name for name, passed in checks.items() if not passed])
    return 1 if values["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
