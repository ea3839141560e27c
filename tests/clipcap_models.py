"""Seeded generators of CLIPCap checkpoints, and captions of them by recomputing everything: the oracle of its tests.

As in :mod:`tests.models`, the weights are random but not timid: captions differ between images, words vary within a
caption, and captions end at different lengths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Tokenizer

from rsedge.checkpointfiles import write_image_spec
from rsedge.manifest import ImageSpec
from rsedge.training.models.clipcap_model import ClipCapConfig, ClipCapModel

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 24, **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER}
TEXT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}

Caption = tuple[tuple[int, ...], float]


def make_clipcap(
    path: Path,
    *,
    seed: int = 0,
    mapper: str = "mlp",
    vision: dict[str, Any] = CLIP,
    text: dict[str, Any] | None = None,
    vocab: int = 300,
    ends: float = 0.12,
    mapper_gain: float = 4.0,
    max_shard_size: str = "1GB",
    **settings: Any,
) -> Path:
    """Save a random CLIPCap to ``path`` (made if absent) and return ``path``.

    Args:
        path: Checkpoint folder: config, safetensors weights, tokenizer and image processor.
        seed: Equal seeds and sizes give equal weights.
        mapper: ``mlp`` or ``transformer``.
        vision, text: Configurations of the image encoder and of GPT-2.
        vocab: Tokens, at least the 256 bytes and the end of text.
        ends: At how many of the steps of a greedy caption the stop token wins, a share; 0: it never does.
        mapper_gain: How loud the mapper's weights are; a deep mapper of loud ones makes chaos of a rounding error.
        max_shard_size: As in ``save_pretrained``.
        settings: Of :class:`~rsedge.training.models.clipcap_model.ClipCapConfig`.
    """
    tokenizer = byte_tokenizer(vocab)
    end = tokenizer.eos_token_id
    config = ClipCapConfig(
        vision,
        {**TEXT, **(text or {}), "vocab_size": vocab, "bos_token_id": end, "eos_token_id": end},
        mapper=mapper,
        stop_token_id=tokenizer.encode(".")[0],
        **{"prefix_length": 5, "mapper_layers": 2, "mapper_heads": 4, **settings},
    )
    model = ClipCapModel(config).eval()
    _fill(model, np.random.default_rng(seed), mapper_gain)
    _end_sometimes(model, ends)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(path)
    size = config.vision_config.image_size
    write_image_spec(path, ImageSpec(size=size, mean=MEAN, std=STD), model_type=vision["model_type"].split("_")[0])
    return path


def byte_tokenizer(size: int) -> GPT2Tokenizer:
    """GPT-2's tokenizer with every byte, then made-up words that nothing is split into, then the end of text."""
    from tokenizers.pre_tokenizers import ByteLevel

    random, words = np.random.default_rng(7), dict.fromkeys(sorted(ByteLevel.alphabet()))
    while len(words) < size - 1:
        letters = random.integers(97, 123, random.integers(3, 8))
        words["Ġ" + "".join(map(chr, letters.tolist()))] = None
    return GPT2Tokenizer(vocab={word: number for number, word in enumerate([*words, "<|endoftext|>"])}, merges=[])


@torch.no_grad()
def _fill(model: ClipCapModel, random: np.random.Generator, mapper_gain: float) -> None:
    width = model.config.text_config.n_embd
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if parameter.ndim == 1:
            norm = any(part in name for part in ("ln_", "norm"))
            values = random.uniform(0.6, 1.4, shape) if norm and "weight" in name else random.normal(0, 0.1, shape)
        elif "wte" in name:  # the head too, being tied: about the standard deviation of the logits
            values = random.normal(0, 3 / np.sqrt(width), shape)
        elif "wpe" in name:
            values = random.normal(0, 6 / np.sqrt(width), shape)
        elif "position_embedding" in name or "probe" in name or "prefix_const" in name:
            values = random.normal(0, 1, shape)
        else:
            inputs = shape[0] if "c_" in name else int(np.prod(shape[1:]))  # GPT-2 keeps [inputs, outputs]
            gain = mapper_gain if name.startswith("mapper") else 4.0 if "patch_embedding" in name else 1.5
            values = random.normal(0, gain / np.sqrt(inputs), shape)
        parameter.copy_(torch.from_numpy(values))


@torch.no_grad()
def _end_sometimes(model: ClipCapModel, share: float) -> None:
    """Make the stop token's embedding so loud that it wins at that share of steps; there is no bias to raise."""
    stop, words = model.config.stop_token_id, model.language_model.transformer.wte.weight
    direction, ratios = words[stop].clone(), []
    words[stop] = 0
    if not share:
        return
    images = torch.randn(16, model.config.image_width, generator=torch.Generator().manual_seed(1))
    inputs = model.prefix(torch.nn.functional.normalize(images, dim=-1))
    for _ in range(10):
        hidden = model.language_model.transformer(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1]
        best = (hidden @ words.T).max(dim=1)
        own = hidden @ direction
        ratios.append((best.values / own).masked_fill(own <= 0, torch.inf))
        inputs = torch.cat([inputs, words[best.indices][:, None]], dim=1)
    ordered = torch.cat(ratios).sort().values
    usable = int(ordered.isfinite().sum())
    words[stop] = direction * ordered[min(int(share * len(ordered)), usable - 1)]


@torch.no_grad()
def embed(model: ClipCapModel, images: np.ndarray) -> torch.Tensor:
    """Unit-length embeddings [N, D] of uint8 [N, H, W, 3]; positions are interpolated to another size."""
    values = ((images / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32)
    pixels = torch.from_numpy(values).permute(0, 3, 1, 2)
    output = model.encoder(pixel_values=pixels, interpolate_pos_encoding=True)
    raw = output.image_embeds if "projection_dim" in model.config.vision_config.to_dict() else output.pooler_output
    return torch.nn.functional.normalize(raw, dim=-1)


@torch.no_grad()
def next_log_probs(model: ClipCapModel, prefix: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """Log-probabilities [rows, V] of the token after each of ``rows`` (of one length), nothing kept from before."""
    words = model.language_model.transformer.wte(torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1))
    inputs = torch.cat([prefix.expand(len(rows), -1, -1), words], dim=1)
    logits = model.language_model(inputs_embeds=inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits.float().log_softmax(-1)


def beam_caption(model: ClipCapModel, image: torch.Tensor, beams: int, longest: int) -> Caption:
    """ClipCap's beam search of one image [D]; one beam is greedy search."""
    stop, prefix = model.config.stop_token_id, model.prefix(image[None]).detach()
    values, ids = next_log_probs(model, prefix, [[]])[0].topk(beams)
    rows = [([token], value) for token, value in zip(ids.tolist(), values, strict=True)]
    for _ in range(longest - 1):
        going = [tokens for tokens, _ in rows if tokens[-1] != stop]
        if not going:
            break
        following = iter(zip(*next_log_probs(model, prefix, going).topk(beams), strict=True))
        candidates = []
        for tokens, total in rows:
            if tokens[-1] == stop:
                candidates.append((tokens, total))
                continue
            values, ids = next(following)
            candidates += [([*tokens, token], total + value) for token, value in zip(ids.tolist(), values, strict=True)]
        candidates.sort(key=lambda entry: -float(entry[1] / len(entry[0])))
        rows = candidates[:beams]
    tokens, total = max(rows, key=lambda entry: float(entry[1] / len(entry[0])))
    return tuple(tokens), float(total / len(tokens))
