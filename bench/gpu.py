"""Is rsedge right on the GPU, and how fast beside transformers and the limits of the machine?

First what must hold (`bench/gpu_checks.py`): a batch that does not fit is halved with nothing lost; fp16 captions agree
with transformers in float32 on at least 99 % of tokens; CUDA graphs, fixed addresses and values that move give the same
captions; embeddings have a cosine of at least 0.999. Then pairs in one process: transformers in float16, eager and
compiled by torch, against rsedge with and without CUDA graphs, each at the batch size at which it is fastest, greedy
and beam 3. Then where the time goes, and shares of the measured limits (`bench/gpu_limits.py`).

The model is BLIP-base at 224 px, random and seeded unless `--checkpoint` names another; images are random unless
`--image-folder` names real ones. Needs onnxruntime-gpu, onnx, torch, transformers, safetensors, tokenizers, numpy and
Pillow, and no more: rsedge need not be installed. Results are written as they come. A part or an engine that fails is
named under `errors`, and the others go on; the exit code is 1 where a check or a part failed, 2 where there is no GPU.

    python bench/gpu.py [--quick] [--output FILE.json]
    python bench/gpu.py --minutes 9                  # begin nothing after 9 minutes; what was left out is named
    python bench/gpu.py --only pairs,profile         # the rest of it: what the output already has is kept
    python bench/gpu.py --device cpu --tiny          # the same on any machine, in little time and with no meaning
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import caption_gpu, common, gpu_limits
from bench.caption_gpu import Case, Engine, Rsedge, Torch
from bench.gpu_checks import check_captions, check_embeddings, check_memory

PARTS = ("limits", "out_of_memory", "captions", "embeddings", "pairs", "profile", "shares")
OURS = "rsedge graphs"


def told(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}"[:300]


@dataclass
class Run:
    """The parts of a run, written after each; one that fails is named, and the others go on.

    Attributes:
        values: What was found, by part, and ``errors`` and ``left_out`` besides.
        output: Where it is written, if anywhere.
        wanted: Parts to be run.
        until: Time of the monotonic clock after which nothing is begun.
    """

    values: dict[str, Any]
    output: Path | None = None
    wanted: tuple[str, ...] = PARTS
    until: float = float("inf")

    def late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self.until

    def save(self, name: str, value: Any) -> None:
        """Keep a part, or what there is of it so far."""
        self.values[name] = value
        if self.output:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            partial = self.output.with_name(f"{self.output.name}.partial")
            partial.write_text(json.dumps(self.values, indent=2) + "\n")
            partial.replace(self.output)

    def part(self, name: str, work: Callable[[], Any]) -> None:
        """Run a part if it is wanted and there is time."""
        if name not in self.wanted:
            return
        errors, left_out = self.values["errors"], self.values["left_out"]
        errors.pop(name, None)
        if self.late():
            left_out.append(name)
            self.save("left_out", left_out)
            return
        begin = time.monotonic()
        try:
            value = work()
        except Exception as error:
            traceback.print_exc()
            errors[name] = told(error)
            self.values.pop(name, None)
            self.save("errors", errors)
            return
        self.save(name, value)
        print(f"{name}, {time.monotonic() - begin:.0f} s: {json.dumps(value, indent=2)}", flush=True)

    def failed(self) -> list[str]:
        """Checks that did not pass and parts that ended in an error."""
        found = [name for name in ("out_of_memory", "embeddings") if not self.values.get(name, {}).get("passed", True)]
        captions = self.values.get("captions", {})
        found += [
            f"captions {search}"
            for search, entry in captions.items()
            if isinstance(entry, dict) and not entry.get("passed", True)
        ]
        return [*found, *self.values["errors"]]


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
        if not files:
            raise SystemExit(f"no image ({', '.join(sorted(suffixes))}) in {options.image_folder} or below")
        images = np.array(
            [resize(np.asarray(Image.open(file).convert("RGB")), spec.size, spec.resample) for file in files]
        )
    else:
        images = random_images(options.images, spec.size, seed=9)
    return Case(checkpoint, bundle, options.device, images, options.tokens, spec.mean, spec.std)


def pairs(
    case: Case,
    makers: dict[str, Callable[[], Engine]],
    batches: list[int],
    rounds: int,
    *,
    late: Callable[[], bool] = lambda: False,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Images per second of each engine at its best batch size, medians over rounds that go through all engines.

    Args:
        case: What is captioned.
        makers: Name → an engine; made when its turn comes. One that fails does not keep the others from running.
        batches: Sizes to try.
        rounds: How often each is timed at its best size.
        late: Whether nothing more is to be begun.
        progress: Called with what there is so far.
    """
    results: dict[str, Any] = {}
    engines: dict[str, Engine] = {}
    for search in case.beams:
        rows: dict[str, dict[str, Any]] = {}
        results[search] = rows
        for name, make in makers.items():
            if late():
                rows[name] = {"error": "left out: the time was over"}
                continue
            try:
                engines[name] = engines.get(name) or make()
                batch, rates = caption_gpu.best_batch(engines[name], case, search, batches)
            except Exception as error:  # an engine that does not run here is a result too
                rows[name] = {"error": told(error)}
            else:
                rows[name] = {"batch": batch, "images_per_s_by_batch": rates, "images_per_s": max(rates.values())}
            print(f"{search} {name}: {rows[name]}", file=sys.stderr, flush=True)
            progress(results)
        timed: dict[str, list[float | None]] = {name: [] for name, row in rows.items() if "error" not in row}
        for _ in range(rounds):
            if late():
                break
            for name, times in timed.items():
                if "error" in rows[name]:
                    continue
                try:
                    batch = rows[name]["batch"]
                    times.append(caption_gpu.rate(engines[name], case, search, batch, case.images))
                except Exception as error:
                    rows[name]["error"] = told(error)
        for name, times in timed.items():
            known = [value for value in times if value]
            if known:
                rows[name] |= {"rounds": [round(value, 2) for value in known], "images_per_s": common.median(known)}
            ratios = [
                mine / theirs for mine, theirs in zip(timed.get(OURS, []), times, strict=False) if mine and theirs
            ]
            if ratios:
                rows[name]["rsedge_graphs_is_times"] = common.median(ratios)
        progress(results)
    for engine in engines.values():
        engine.close()
    return results


def encoder_alone(case: Case, engine: Rsedge, sizes: list[int]) -> dict[str, float]:
    """Images per second of the encoder with nothing beside it, at the best of some batch sizes; outputs stay where they
    are made.
    """
    from rsedge.runtime.engines.memory import is_out_of_memory

    manifest, fixed = engine.captioner.bundle.manifest, engine.captioner.decoder._fixed
    names = [tensor.name for tensor in manifest.graphs["step"].inputs if tensor.shape[:1] == ("images",)]
    rates: dict[int, float] = {}
    for size in sizes:
        images = case.images[:size]
        try:
            taken = gpu_limits.seconds(lambda images=images: fixed.encode(images, names).result(), "cpu", least=0.2)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        rates[len(images)] = len(images) / taken
    best = max(rates, key=lambda size: rates[size])
    return {"batch": best, "images_per_s": round(rates[best], 1)}


def profiles(case: Case, rows: dict[str, Any], batches: list[int]) -> dict[str, Any]:
    """:func:`profile` of each search at the batch size that was best for it, and the encoder alone."""
    engine = Rsedge(case, "graphs")
    found = {
        search: profile(case, engine, search, rows.get(search, {}).get(OURS, {}).get("batch", batches[-1]))
        for search in case.beams
    }
    alone = encoder_alone(case, engine, batches)
    for entry in found.values():
        entry["encoder_alone"] = alone
    engine.close()
    return found


def profile(case: Case, engine: Rsedge, search: str, batch: int) -> dict[str, Any]:
    """Milliseconds per image and stage; the encoder runs beside the decoder, so stages may sum to more than the run."""
    from rsedge.runtime.decoding.fixed_batch import FixedBatch, FixedGraphs, FixedMemory
    from rsedge.runtime.engines.memory import Packed
    from rsedge.runtime.engines.ort import FixedRun

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
    try:
        engine.caption(images, batch, **settings)
    finally:
        for owner, attribute, original in originals.values():
            setattr(owner, attribute, original)
    whole = time.perf_counter() - start
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
        reached = flop * found["encoder_alone"]["images_per_s"] / 1e12
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
    parser.add_argument("--minutes", type=float, help="begin nothing after so many minutes")
    parser.add_argument("--only", help=f"parts to run, of {','.join(PARTS)}; others are kept as the output has them")
    parser.add_argument("--checkpoint", type=Path, help="a BLIP captioner in Hugging Face layout")
    parser.add_argument("--bundle", type=Path, help="its fp16 bundle")
    parser.add_argument("--image-folder", type=Path, help="real images, sought in it and below")
    parser.add_argument("--images", type=int, help="how many, at most")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON; on CUDA bench/results/gpu.json")
    options = parser.parse_args(arguments)
    wanted = tuple(options.only.split(",")) if options.only else PARTS
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only names {', '.join(sorted(unknown))}, expected some of {','.join(PARTS)}")
    until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    options.images = options.images or (12 if options.tiny else 256 if options.quick else 512)
    if options.output is None and options.device == "cuda" and not options.tiny:
        options.output = common.RESULTS / "gpu.json"
    caption_gpu.prepare()
    if problem := caption_gpu.cuda_problem() if options.device == "cuda" else "":
        parser.exit(2, f"no figures without a usable GPU: {problem}; --device cpu --tiny runs on any machine\n")

    batches = [4] if options.tiny else [32, 128] if options.quick else [16, 32, 64, 128, 256]
    values: dict[str, Any] = {}
    if options.only and options.output and options.output.exists():
        values = json.loads(options.output.read_text())
    values.pop("failed", None)  # until all is done
    values |= {"machine": caption_gpu.machine(options.device), "tokens": options.tokens, "left_out": []}
    run = Run({"errors": {}} | values, options.output, wanted, until)

    case = make_case(options)
    batches = [size for size in batches if size <= len(case.images)] or [len(case.images)]
    model = {"checkpoint": case.checkpoint.name, "images": len(case.images), "real": bool(options.image_folder)}
    run.save("model", model)
    few = min(len(case.images), 64 if options.quick else 256)
    run.part("limits", lambda: gpu_limits.measure(options.device, small=options.tiny))
    run.part("out_of_memory", lambda: check_memory(case, few))
    run.part("captions", lambda: check_captions(case, few, random=options.checkpoint is None))
    run.part("embeddings", lambda: check_embeddings(options.device, tiny=options.tiny))

    # The compiled one is last: it takes minutes before its first image.
    makers: dict[str, Callable[[], Engine]] = {
        OURS: lambda: Rsedge(case, "graphs"),
        "transformers float16": lambda: Torch(case, dtype="float16"),
        "rsedge fixed": lambda: Rsedge(case, "fixed"),
        "rsedge values": lambda: Rsedge(case, "values"),
    }
    if not options.skip_compile:
        makers["transformers float16 compiled"] = lambda: Torch(case, dtype="float16", compiled=True)
    rounds, save = 1 if options.quick or options.tiny else 3, run.save
    told_so_far = {"late": run.late, "progress": lambda found: save("pairs", found)}
    run.part("pairs", lambda: pairs(case, makers, batches, rounds, **told_so_far))
    run.part("profile", lambda: profiles(case, run.values.get("pairs", {}), batches))
    if {"profile", "limits"} <= set(run.values):
        run.part("shares", lambda: shares(case, run.values["profile"], run.values["limits"]))
    failed = run.failed()
    if failed or set(PARTS) <= set(run.values):  # of what never ran, nothing is said
        run.save("failed", failed)
    print(f"failed: {', '.join(failed) or 'nothing'}; left out: {', '.join(run.values['left_out']) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
