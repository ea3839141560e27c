"""What precision costs an embedding: CLIP and SigLIP in their published shapes against transformers in float32.

Weights are random and seeded, images real. A random network gives every image nearly the same embedding, so each cosine
is also told with the mean embedding taken away from both sides: there only what tells images apart is left.

    python -m bench.embed_parity IMAGES_FOLDER [--count 16] [--models clip-b32,siglip-b16]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.common import machine, save

_B = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_TEXT_B = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
_TEXT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "clip-b32": ("clip", {**_B, "patch_size": 32}, _TEXT_B, 512),
    "clip-b16": ("clip", {**_B, "patch_size": 16}, _TEXT_B, 512),
    "siglip-b16": ("siglip", {**_B, "patch_size": 16}, _TEXT_L, 768),
    "clip-l14": ("clip", {**_L, "patch_size": 14}, _TEXT_L, 768),
}
"""Kind, image encoder, text encoder and embedding length; SigLIP's text encoder is as wide as CLIP L/14's."""

SEED = 4
TEXTS = (
    "",
    "an airport",
    "An aerial photograph of a dense residential area",
    "many planes are parked next to a long building in an airport .",
    "a green river with a bridge over it is between two pieces of farmland and some houses " * 6,
)


def make(path: Path, name: str) -> Path:
    """A random model of a published shape, its tokenizer learnt from a few words."""
    import torch
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    from rsedge.bundle import ImageSpec
    from rsedge.checkpointfiles import write_image_spec
    from rsedge.training.models.loading import learn_clip_bpe

    kind, vision, text, dim = MODELS[name]
    tokenizer = learn_clip_bpe(TEXTS, 600)
    tokenizer.save_pretrained(path)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    torch.manual_seed(SEED)
    if kind == "clip":
        config = CLIPConfig(
            vision_config={**vision, "image_size": 224}, text_config={**text, **ids}, projection_dim=dim
        )
        model: Any = CLIPModel(config)
        spec = ImageSpec(size=224, mean=(0.4815, 0.4578, 0.4082), std=(0.2686, 0.2613, 0.2758))
    else:
        padding = {"pad_token_id": tokenizer.pad_token_id}
        config = SiglipConfig(vision_config={**vision, "image_size": 224}, text_config={**text, **ids, **padding})
        model = SiglipModel(config)
        spec = ImageSpec(size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    model.save_pretrained(path)
    write_image_spec(path, spec, model_type=kind)
    return path


def measure(name: str, images: np.ndarray, precisions: list[str]) -> list[dict[str, Any]]:
    """One row per precision."""
    from rsedge.export.convert import export
    from rsedge.export.loading import load_checkpoint
    from rsedge.export.models.clip import torch_embeddings
    from rsedge.export.verify import compare
    from rsedge.runtime.embedder import Embedder

    rows, expected = [], None
    with tempfile.TemporaryDirectory(prefix="embed-parity-") as folder:
        path = make(Path(folder) / name, name)
        for precision in precisions:
            bundle = export(path, Path(folder) / f"{precision}.rsedge", precision=precision)  # type: ignore[arg-type]
            embedder = Embedder.load(bundle.path, device="cpu", batch_size=4)
            if expected is None:
                ids = [embedder.token_ids([text])[0].tolist() for text in TEXTS]
                expected = torch_embeddings(load_checkpoint(path), images, bundle.manifest.image, ids)
            size = sum(ref.size for graph in bundle.manifest.graphs.values() for ref in graph.files)
            rows.append(
                {
                    "model": name,
                    "precision": precision,
                    "graphs_mb": round(size / 1e6, 1),
                    "images": compare(embedder.embed_images(images), expected[0]),
                    "texts": compare(embedder.embed_texts(TEXTS), expected[1]),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(bundle.path)
    return rows


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--precisions", default="fp32,fp16,int8")
    options = parser.parse_args()
    files = sorted(path for path in options.folder.rglob("*") if path.suffix in (".jpg", ".png", ".tif"))
    chosen = files[:: max(1, len(files) // options.count)][: options.count]
    images = np.stack([np.asarray(Image.open(file).convert("RGB").resize((224, 224))) for file in chosen])
    note = f"random weights, seed {SEED}; {len(images)} real images; {len(TEXTS)} texts of 2 to 77 tokens"
    rows: list[dict[str, Any]] = []
    for name in options.models.split(","):
        rows += measure(name, images, options.precisions.split(","))
        path = save("embed_parity", {"machine": machine(), "note": note, "rows": rows})
    print(path)


if __name__ == "__main__":
    main()
