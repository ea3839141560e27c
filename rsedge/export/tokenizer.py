"""Write a checkpoint's tokenizer as one ``tokenizer.json`` that gives the same ids and text without transformers.

transformers reads ``tokenizer.json`` or a vocabulary, then settings from ``tokenizer_config.json`` change it (lower
case, accents, special tokens), and before or after it may do more in Python: clean up spaces (BERT), take the marks of
word ends away (CLIP), all of SentencePiece (SigLIP). The file written here has all of these as steps of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors

from rsedge.errors import CheckpointError
from rsedge.tokenizerfile import PUNCTUATION, no_panic

# transformers' PreTrainedTokenizerBase.clean_up_tokenization, in its order.
_CLEAN_UP = [(f" {mark}", mark) for mark in ".?!,"] + [(" ' ", "'")]
_CLEAN_UP += [(f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")]
_ENDS = [("Regex", r"\A\s+", ""), ("Regex", r"\s+\z", "")]
"""No white space at either end."""
_PROBES = (
    "",
    "two planes, parked .",
    "Many buildings' ROOFS aren't grey; it 's a café!",
    "水 12.5 km² (ca.) \t x\u0301",
)


def export_tokenizer(checkpoint: str | Path, target: Path) -> Path:
    """Write the tokenizer of the folder ``checkpoint`` to the file ``target`` and return ``target``.

    Raises:
        CheckpointError: The folder has no tokenizer that transformers loads, it is backed neither by the
            ``tokenizers`` package nor by SentencePiece, or the written file does not give transformers' ids and text.
    """
    source = _load(checkpoint)
    pieces = hasattr(source, "sp_model")
    data = json.loads((_from_sentencepiece(source) if pieces else source.backend_tokenizer).to_str())
    data["truncation"] = data["padding"] = None  # transformers sets both anew in every call
    steps: list[list[tuple[str, str, str]]] = []
    if mark := data["model"].get("end_of_word_suffix"):
        steps += [[("String", mark, " ")], _ENDS]
    if pieces:
        steps += [_ENDS]
    if source.clean_up_tokenization_spaces and data["model"]["type"] != "BPE":  # transformers spares BPE too
        steps += [[("String", old, new) for old, new in _CLEAN_UP]]
    for replacements in steps:  # in the text as a whole, since patterns may span tokens
        first = [] if data["decoder"] is None else [data["decoder"]]
        replace = [{"type": "Replace", "pattern": {kind: old}, "content": new} for kind, old, new in replacements]
        data["decoder"] = {"type": "Sequence", "decoders": [*first, {"type": "Fuse"}, *replace]}
    text = json.dumps(data, ensure_ascii=False)
    different = None
    try:
        with no_panic(ValueError):
            written = tokenizers.Tokenizer.from_str(text)
            for probe in _PROBES:
                ids = source.encode(probe)
                said = source.decode(ids, skip_special_tokens=True)
                if written.encode(probe).ids != ids or written.decode(ids, skip_special_tokens=True) != said:
                    different = probe
                    break
    except Exception as error:  # the package raises bare Exception for a file it cannot follow
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            str(checkpoint), [f"its tokenizer fails at a text ({reason}): save a plain tokenizer with its vocabulary"]
        ) from error
    if different is not None:
        problem = (
            f"{type(source).__name__} does more than its tokenizer.json says (seen on {different!r}): "
            "save a plain tokenizer of its kind with the same vocabulary beside the weights"
        )
        raise CheckpointError(str(checkpoint), [problem])
    target.write_text(text, encoding="utf-8")
    return target


def _load(checkpoint: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with no_panic(ValueError):
            source = AutoTokenizer.from_pretrained(
                str(checkpoint), use_fast=True, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # transformers raises whatever its many readers raise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            str(checkpoint),
            [f"transformers cannot load its tokenizer ({reason}): save one with processor.save_pretrained(folder)"],
        ) from error
    if not hasattr(source, "backend_tokenizer") and not hasattr(source, "sp_model"):
        raise CheckpointError(
            str(checkpoint),
            [f"{type(source).__name__} has no tokenizer.json form: save the fast variant of the tokenizer"],
        )
    return source


def _from_sentencepiece(source: Any) -> tokenizers.Tokenizer:
    """Rebuild a ``SiglipTokenizer``, Python around SentencePiece, with the tokenizers package.

    SentencePiece has more settings than are followed here, so the ids need a check. One thing differs: where a text
    itself spells a special token (``</s>``), the word behind it is taken for a word's beginning. No caption or query
    does.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(Path(source.vocab_file).read_bytes())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    result = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id))
    # SiglipTokenizer's own steps, then SentencePiece's, which takes its own sign of a space for a space.
    steps: list[Any] = [normalizers.Lowercase()] if source.do_lower_case else []
    steps.append(normalizers.Replace(Regex(PUNCTUATION), ""))
    if charsmap := proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    steps += [normalizers.Replace(Regex(r"[\s▁]+"), " "), normalizers.Strip()]
    result.normalizer = normalizers.Sequence(steps)
    result.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    result.decoder = decoders.Metaspace(prepend_scheme="always")
    end = source.eos_token
    result.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, source.eos_token_id)]
    )
    added = [token for _, token in sorted(source.added_tokens_decoder.items())]
    control = [
        AddedToken(piece.piece, normalized=False, special=True)
        for piece in proto.pieces
        if piece.type == sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
    ]
    result.add_special_tokens([*added, *(token for token in control if token not in added)])
    return result
