"""SigLIP's tokenizer, in transformers Python around SentencePiece, as one of the tokenizers package.

One thing differs: where a text itself spells a special token (``</s>``), the word behind it is taken for a word's
beginning. No caption or query does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors

from rsedge.tokenizerfile import PUNCTUATION


def from_sentencepiece(source: Any) -> tokenizers.Tokenizer:
    """The same tokenizer without transformers and SentencePiece.

    Whether it gives the same ids is for the caller to check: models of SentencePiece have more settings than are
    followed here.

    Args:
        source: A ``SiglipTokenizer``.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(Path(source.vocab_file).read_bytes())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    result = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id))
    result.normalizer = normalizers.Sequence(_normalizers(source, proto.normalizer_spec.precompiled_charsmap))
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


def _normalizers(source: Any, charsmap: bytes) -> list[Any]:
    """What SiglipTokenizer does to a text before SentencePiece sees it, then SentencePiece's own."""
    steps: list[Any] = [normalizers.Lowercase()] if source.do_lower_case else []
    steps.append(normalizers.Replace(Regex(PUNCTUATION), ""))
    if charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    # SentencePiece takes its own sign of a space for a space.
    steps += [normalizers.Replace(Regex(r"[\s▁]+"), " "), normalizers.Strip()]
    return steps
