"""What must hold on a GPU before its speed means anything; called by `bench/gpu.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bench import common
from bench.caption_gpu import Case, Rsedge, Torch, device_of

LEAST_TOKENS, LEAST_COSINE = 0.99, 0.999


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, float]:
    """Share of equal tokens, position by position, and of equal captions."""
    equal = sum(a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=False))
    total = sum(max(len(x), len(y)) for x, y in zip(ours, theirs, strict=True))
    same = np.mean([x == y for x, y in zip(ours, theirs, strict=True)])
    return {"tokens": round(equal / total, 5), "captions": round(float(same), 4)}


def check_captions(case: Case, count: int, *, random: bool) -> dict[str, Any]:
    """Against transformers in float32, and the three ways of rsedge against one another.

    A model whose weights are random may put tokens within float16's rounding of each other; of one, no more is asked
    than that transformers in float16 agrees no better.
    """
    images, found = case.images[:count], {}
    batch = min(32, count)
    reference, half = Torch(case, dtype="float32"), Torch(case, dtype="float16")
    engines = [Rsedge(case, mode) for mode in ("graphs", "fixed", "values")]
    for search in case.beams:
        settings = case.settings(search, fixed=False)
        expected = reference.caption(images, batch, **settings)
        captions = {engine.name: engine.caption(images, batch, **settings) for engine in engines}
        entry: dict[str, Any] = {
            "fp16_against_torch_fp32": agreement(captions["rsedge graphs"], expected),
            "torch_fp16_against_torch_fp32": agreement(half.caption(images, batch, **settings), expected),
        }
        for name in ("rsedge fixed", "rsedge values"):
            entry[f"graphs against {name}"] = agreement(captions["rsedge graphs"], captions[name])
        again = engines[0].caption(images, batch, **settings)  # what was captured is replayed
        entry["replayed"] = agreement(again, captions["rsedge graphs"])
        asked = min(LEAST_TOKENS, entry["torch_fp16_against_torch_fp32"]["tokens"]) if random else LEAST_TOKENS
        # Other shapes choose other kernels, and float16 rounds: equal captions are asked of equal shapes only.
        entry["passed"] = (
            entry["fp16_against_torch_fp32"]["tokens"] >= asked
            and entry["graphs against rsedge fixed"]["captions"] == entry["replayed"]["captions"] == 1
            and entry["graphs against rsedge values"]["tokens"] >= asked
        )
        found[search] = entry
    captured = engines[0].captures
    for engine in (reference, half, *engines):
        engine.close()
    return {"images": count, "captured": captured, **found}


def check_embeddings(device: str, *, tiny: bool) -> dict[str, Any]:
    """A CLIP of the shape of B/32 in fp16 against transformers in float32."""
    from rsedge.bundle import read_bundle
    from rsedge.export.convert import export
    from rsedge.runtime.embedder import Embedder
    from rsedge.runtime.engines.ort import OrtBackend
    from tests.dual_encoders import TEXTS, embeddings, make_clip
    from tests.models import random_images

    name, shape, size = "gpu-clip-tiny", {}, 32
    if not tiny:
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
    backend = OrtBackend(device_of(device))
    embedder = Embedder(read_bundle(bundle), backend, device_reason="a benchmark", batch_size=16)
    found = embedder.embed_images(images), embedder.embed_texts(TEXTS)
    images_cosine, texts_cosine = (float((a * b).sum(1).min()) for a, b in zip(found, expected, strict=True))
    passed = min(images_cosine, texts_cosine) >= LEAST_COSINE
    return {"images_min_cosine": images_cosine, "texts_min_cosine": texts_cosine, "passed": passed}


def check_memory(case: Case, batch: int) -> dict[str, Any]:
    """A batch that does not fit is halved, and every image has its caption.

    The first check to be run: memory that ONNX Runtime once took for caches it keeps, and the batch would fit into it.
    """
    images, settings = case.images[:batch], case.settings("beam3", fixed=False)
    engine = Rsedge(case, "graphs")  # its weights, kernels and handles are there before memory is taken
    expected = engine.caption(images, min(8, batch), **settings)
    with little_memory(case, max(2, batch // 16)):
        found = engine.caption(images, batch, **settings)
    ended = engine.captioner.batch_size
    engine.close()
    entry = {"from": batch, "to": ended, "captioned": len(found), **agreement(found, expected)}
    return {**entry, "passed": len(found) == batch and ended < batch and entry["tokens"] >= LEAST_TOKENS}


@contextmanager
def little_memory(case: Case, count: int) -> Iterator[None]:
    """Leave room for about ``count`` images: fill a GPU's memory; on a CPU let the first run fail as it would there."""
    from rsedge.bundle import read_bundle
    from rsedge.runtime.engines.memory import bytes_per_image
    from rsedge.runtime.engines.ort import OrtGraph

    if case.device == "cuda":
        import torch

        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        room = count * bytes_per_image(read_bundle(case.bundle).manifest, tokens=case.tokens, rows=3)
        filling = torch.empty(max(free - room, 0), dtype=torch.uint8, device="cuda")
        try:
            yield
        finally:
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
