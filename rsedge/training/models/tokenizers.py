"""Tokenizers for training: that of a checkpoint, or a vocabulary learnt from the training captions.

A learnt vocabulary is of the family's own kind, so that everything downstream (transformers, the exported
tokenizer.json) reads it like a published one: BERT's WordPiece for BLIP, CLIP's lower-cased BPE, GPT-2's byte-level
BPE.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsedge.errors import OptionError, RsedgeError
from rsedge.texts import first_line
from rsedge.tokenizerfile import no_panic

if TYPE_CHECKING:
    from rsedge.datasets.examples import CaptionData
    from rsedge.training.recipe import ModelRecipe

FROM_CAPTIONS = "captions"
"""The value of ``model.tokenizer`` that asks for a learnt vocabulary."""

_PROBE = "Two boats, parked in a harbour."
_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_BLIP = ["[DEC]", "[ENC]"]
_CLIP = ["<|startoftext|>", "<|endoftext|>"]


def open_tokenizer(source: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer in a folder or of a hub id.

    Raises:
        OptionError: There is none, or one that takes time or memory without end.
    """
    from transformers import AutoTokenizer

    from rsedge.training.models.loading import check_source

    try:
        check_source(source, revision)
        with no_panic(ValueError):
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
            tokenizer.decode(tokenizer(_PROBE).input_ids)
    except RsedgeError:
        raise
    except Exception as error:  # a stranger's files, and whatever transformers and tokenizers raise at them
        reason = first_line(error)
        raise OptionError(
            f"there is no tokenizer in {source} ({reason}): give a folder or a hub id that has one in "
            f"model.tokenizer, or "
            f"'{FROM_CAPTIONS}' to learn one"
        ) from error
    return tokenizer


def learn_wordpiece(captions: Iterable[str], size: int) -> Any:
    """BERT's tokenizer with BLIP's two tokens, its vocabulary learnt from ``captions`` (lower-cased)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts, split = sorted(captions), learner.pre_tokenizer.pre_tokenize_str
    words = (word for text in texts for word, _ in split(learner.normalizer.normalize_str(text)))
    letters = sorted({letter for word in words for letter in word})
    # The trainer numbers letters as it happens to meet them, and breaks ties by number; those it is given keep theirs.
    fixed = [*_BERT, *letters, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=size - len(_BLIP), special_tokens=fixed, show_progress=False)
    vocabulary = _ordered(learner, texts, trainer)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})
    tokenizer.add_special_tokens({"additional_special_tokens": _BLIP})
    return tokenizer


def learn_clip_bpe(captions: Iterable[str], size: int) -> Any:
    """CLIP's tokenizer, its merges learnt from ``captions``; the end token is the last of the vocabulary, as in
    CLIP.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # As in CLIP's vocabulary: every byte, then every byte that ends a word. Given, so that their numbers are fixed.
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(_CLIP),
        special_tokens=[*letters, *(f"{letter}</w>" for letter in letters)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    known = {word: number for number, word in enumerate(_ordered(learner, sorted(captions), trainer))}
    for token in _CLIP:
        known[token] = len(known)
    return CLIPTokenizer(vocab=known, merges=_merges(learner))


def learn_byte_bpe(captions: Iterable[str], size: int) -> Any:
    """GPT-2's tokenizer, its merges learnt from ``captions``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size - 1, special_tokens=letters, show_progress=False)
    known = {word: number for number, word in enumerate(_ordered(learner, sorted(captions), trainer))}
    known["<|endoftext|>"] = len(known)
    return GPT2Tokenizer(vocab=known, merges=_merges(learner))


def obtain(wanted: ModelRecipe, own: str | None, data: CaptionData, learn: Callable[[Iterable[str], int], Any]) -> Any:
    """The tokenizer a recipe asks for: named, learnt from the training captions, or that of the checkpoint ``own``.

    Raises:
        OptionError: There is none, or there are two.
    """
    if own is not None and wanted.tokenizer is not None:
        raise OptionError(f"{own} has a tokenizer of its own: leave model.tokenizer out")
    if wanted.tokenizer == FROM_CAPTIONS:
        captions = (caption for example in data.split("train") for caption in example.captions)
        return learn(captions, wanted.vocabulary_size)
    if own is not None:
        return open_tokenizer(own, revision=wanted.revision)
    if wanted.tokenizer is None:
        raise OptionError(f"model.tokenizer is not set: give a folder, a hub id or '{FROM_CAPTIONS}'")
    return open_tokenizer(wanted.tokenizer)


def _ordered(learner: Any, texts: Iterable[str], trainer: Any) -> list[str]:
    """The vocabulary learnt from ``texts``, by number."""
    learner.train_from_iterator(texts, trainer)
    vocabulary: dict[str, int] = learner.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _merges(learner: Any) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
