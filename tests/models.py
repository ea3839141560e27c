"""Seeded generators of tiny BLIP checkpoints in Hugging Face layout, for tests that compare with transformers.

The weights are random but not timid: with the usual small initialisation every image would get the same caption, one
token over and over, and a parity test over such captions proves nothing. Here scales are chosen so that captions differ
between images, words vary within a caption, and captions end at different lengths.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORD_SCALE = 6.0  # about the standard deviation of the logits
_POSITION_SCALE = 24.0  # positions louder than words, or the decoder would fall into repeating one word
# Queries and keys are sharp, so that attention picks rather than averages; the image comes in loud.
_GAINS = {"crossattention.self.value": 2.0, "query": 2.0, "key": 2.0, "qkv": 1.5, "patch_embedding": 3.0}


def bert_vocabulary(size: int) -> list[str]:
    """A BERT WordPiece vocabulary of ``size`` ≥ 100 tokens, BLIP's ``[DEC]`` and ``[ENC]`` the last two.

    Every lower-case letter is there, alone and as a continuation, so that any lower-case word can be spelt.
    """
    if size < 100:
        raise ValueError(f"a vocabulary needs at least 100 tokens to spell every word, got {size}")
    base = [*SPECIAL, *".,'-!?()0123456789", *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    syllables = [a + b for a, b in itertools.product("bdfgklmnprstvz", "aeiou")]
    made = itertools.chain(
        ("a", "##s", "##'"),
        syllables,
        (f"##{syllable}" for syllable in syllables),
        (first + second for first, second in itertools.product(syllables, syllables)),
        (f"##{first}{second}" for first, second in itertools.product(syllables, syllables)),
        (a + b + c for a, b, c in itertools.product(syllables, syllables, syllables)),
    )
    tokens = dict.fromkeys(base)
    while len(tokens) < size - 2:
        tokens[next(made)] = None
    return [*tokens, "[DEC]", "[ENC]"]


def save_tokenizer(path: Path, vocabulary: list[str]) -> None:
    """Save a BertTokenizer for ``vocabulary`` the way BLIP's processor does."""
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(vocabulary)})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[DEC]", "[ENC]"]})
    tokenizer.save_pretrained(path)


def save_image_processor(path: Path, image_size: int) -> None:
    """Write BLIP's ``preprocessor_config.json``; by hand, as its class wants torchvision on some versions."""
    values = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "BlipImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": image_size, "width": image_size},
    }
    (path / "preprocessor_config.json").write_text(json.dumps(values, indent=2))


def make_blip(
    path: Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    vocab: int = 300,
    image_size: int = 32,
    patch: int = 8,
    text_hidden: int | None = None,
    text_layers: int | None = None,
    text_heads: int | None = None,
    max_positions: int = 64,
    hidden_act: str = "gelu",
    mlp_ratio: int = 2,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
) -> Path:
    """Save a random BLIP captioner to ``path`` (made if absent) and return ``path``.

    Args:
        path: Checkpoint folder: config, safetensors weights, tokenizer and image processor.
        seed: Equal seeds and sizes give equal weights.
        hidden, layers, heads: Of the vision tower, and of the decoder unless its own are given.
        vocab: Tokens, ``[DEC]`` (the start token) and ``[ENC]`` included.
        image_size, patch: Pixels.
        text_hidden, text_layers, text_heads: Of the decoder.
        max_positions: Longest token sequence.
        hidden_act: Activation of both towers.
        mlp_ratio: Width of the feed-forward layers over the model's.
        tied: Whether the language-model head shares the word embeddings.
        dtype: Type the weights are stored in.
        max_shard_size: As in ``save_pretrained``; a small one gives several weight files and an index.
    """
    path.mkdir(parents=True, exist_ok=True)
    vocabulary = bert_vocabulary(vocab)
    config = BlipConfig(
        vision_config={
            "hidden_size": hidden,
            "intermediate_size": mlp_ratio * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": image_size,
            "patch_size": patch,
            "hidden_act": hidden_act,
        },
        text_config={
            "hidden_size": text_hidden or hidden,
            "intermediate_size": mlp_ratio * (text_hidden or hidden),
            "num_hidden_layers": text_layers or layers,
            "num_attention_heads": text_heads or heads,
            "vocab_size": vocab,
            "max_position_embeddings": max_positions,
            "hidden_act": hidden_act,
            "bos_token_id": vocabulary.index("[DEC]"),
            "sep_token_id": vocabulary.index("[SEP]"),
            "pad_token_id": vocabulary.index("[PAD]"),
            "tie_word_embeddings": tied,
        },
        tie_word_embeddings=tied,
    )
    model = BlipForConditionalGeneration(config).eval()
    _fill(model, np.random.default_rng(seed))
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    save_tokenizer(path, vocabulary)
    save_image_processor(path, image_size)
    return path


def random_images(count: int, size: int, *, seed: int = 0) -> np.ndarray:
    """``count`` smooth random images, uint8 [count, size, size, 3], as different as aerial images are."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 255, (count, 4, 4, 3))
    repeat = -(-size // 4)
    fine = coarse.repeat(repeat, axis=1).repeat(repeat, axis=2)[:, :size, :size]
    return np.clip(fine + random.normal(0, 20, fine.shape), 0, 255).astype(np.uint8)


@torch.no_grad()
def _fill(model: BlipForConditionalGeneration, random: np.random.Generator) -> None:
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if "norm" in name.lower() and name.endswith("weight"):
            values = random.uniform(0.6, 1.4, shape)
        elif "norm" in name.lower():
            values = random.normal(0, 0.3, shape)
        elif name.endswith("bias"):
            values = random.normal(0, 0.1, shape)
        elif "position_embedding" in name:
            values = random.normal(0, _POSITION_SCALE / np.sqrt(shape[-1]), shape)
        elif "word_embeddings" in name or "predictions.decoder" in name or "class_embedding" in name:
            values = random.normal(0, _WORD_SCALE / np.sqrt(shape[-1]), shape)
        else:
            gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
            values = random.normal(0, gain / np.sqrt(np.prod(shape[1:])), shape)
        parameter.copy_(torch.from_numpy(values))
    _end_sometimes(model)


def _end_sometimes(model: BlipForConditionalGeneration) -> None:
    """Raise the end token's bias until it wins about one step in seven of captions of random images."""
    text, vision = model.config.text_config, model.config.vision_config
    images = random_images(8, vision.image_size, seed=1)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    bias = model.text_decoder.cls.predictions.decoder.bias  # the one the head adds; tied or not
    bias[text.sep_token_id] = -1e3
    found = model.generate(
        pixels, max_new_tokens=min(12, text.max_position_embeddings), output_scores=True, return_dict_in_generate=True
    )
    scores = torch.stack(found.scores)
    margins = scores.amax(-1) - scores[..., text.sep_token_id] - 1e3
    bias[text.sep_token_id] = round(float(margins.quantile(0.15)), 3)
