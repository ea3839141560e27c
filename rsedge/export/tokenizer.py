"""A checkpoint's tokenizer as one ``tokenizer.json`` that needs no transformers to give the same ids and text.

transformers reads ``tokenizer.json`` or a vocabulary, then settings from ``tokenizer_config.json`` change it (lower
case, accents, special tokens), and before or after it may do more in Python: clean up spaces (BERT), take the marks of
word ends away (CLIP), all of SentencePiece (SigLIP, :mod:`rsedge.export.siglip_tokenizer`). The file written here is
what transformers holds after all that, with what Python does turned into steps of the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from rsedge.errors import CheckpointError
from rsedge.export.siglip_tokenizer import from_sentencepiece

# transformers' PreTrainedTokenizerBase.clean_up_tokenization, in its order.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
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
    data = json.loads((from_sentencepiece(source) if pieces else source.backend_tokenizer).to_str())
    data["truncation"] = data["padding"] = None  # transformers sets both anew in every call
    if data["model"].get("end_of_word_suffix"):
        data["decoder"] = _with_word_ends(data["decoder"], data["model"]["end_of_word_suffix"])
    if pieces:
        data["decoder"] = _trimmed(data["decoder"])
    if source.clean_up_tokenization_spaces and data["model"]["type"] != "BPE":  # transformers spares BPE too
        data["decoder"] = _with_clean_up(data["decoder"])
    text = json.dumps(data, ensure_ascii=False)
    _check(str(checkpoint), source, tokenizers.Tokenizer.from_str(text))
    target.write_text(text, encoding="utf-8")
    return target


def _load(checkpoint: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
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


def _with_clean_up(decoder: dict[str, Any] | None) -> dict[str, Any]:
    """``decoder`` followed by the clean-up, on the text as a whole: some of its patterns span tokens."""
    steps = [] if decoder is None else [decoder]
    replace = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in _CLEAN_UP]
    return {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}, *replace]}


def _with_word_ends(decoder: dict[str, Any] | None, mark: str) -> dict[str, Any]:
    """``decoder``, then spaces in place of the ``mark`` that ends words."""
    steps = [] if decoder is None else [decoder]
    replace = {"type": "Replace", "pattern": {"String": mark}, "content": " "}
    return _trimmed({"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}, replace]})


def _trimmed(decoder: dict[str, Any] | None) -> dict[str, Any]:
    """``decoder``, then no white space at either end of the text as a whole."""
    steps = [] if decoder is None else [decoder]
    ends = [{"type": "Replace", "pattern": {"Regex": pattern}, "content": ""} for pattern in (r"\A\s+", r"\s+\z")]
    return {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}, *ends]}


def _check(checkpoint: str, source: Any, written: tokenizers.Tokenizer) -> None:
    """Refuse a tokenizer whose Python side does something that the file cannot say."""
    for probe in _PROBES:
        ids = source.encode(probe)
        text = source.decode(ids, skip_special_tokens=True)
        if written.encode(probe).ids != ids or written.decode(ids, skip_special_tokens=True) != text:
            raise CheckpointError(
                checkpoint,
                [
                    f"{type(source).__name__} does more than its tokenizer.json says (seen on {probe!r}): "
                    "save a plain tokenizer of its kind with the same vocabulary beside the weights"
                ],
            )
