"""The token ids a checkpoint's tokenizer has, told from its files without opening it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rsedge.jsonvalues import read_object

if TYPE_CHECKING:
    from pathlib import Path

    from rsedge.export.weights import Report

_REMEDY = "save the tokenizer again"


def vocabulary_ids(file: Path, report: Report) -> set[int] | None:
    """Every token id of the tokenizer that is kept in ``file``, or None after a report.

    Args:
        file: ``tokenizer.json`` (whole), ``vocab.txt`` (BERT), ``vocab.json`` (CLIP, GPT-2) or ``spiece.model``
            (SentencePiece); beside all but the first, ``added_tokens.json`` may have more.
        report: Called once per problem.
    """
    if file.name == "tokenizer.json":
        return _tokenizer_json(file, report)
    ids = _READERS[file.name](file, report)
    added = file.with_name("added_tokens.json")
    more = (read_object(added, report, _REMEDY) or {}) if added.is_file() else {}
    return None if ids is None else ids | _whole(more)


def _tokenizer_json(file: Path, report: Report) -> set[int] | None:
    values = read_object(file, report, _REMEDY)
    if values is None:
        return None
    try:
        vocabulary = values["model"]["vocab"]
        ids = set(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
        return ids | {int(token["id"]) for token in values.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError) as error:
        report(f"{file.name} has no vocabulary ({error!r}): {_REMEDY}")
        return None


def _lines(file: Path, report: Report) -> set[int] | None:
    try:
        # Split at newlines only: str.splitlines would also split at characters that are tokens themselves.
        return set(range(len(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"))))
    except ValueError as error:
        report(f"{file.name} is not UTF-8 ({error}): {_REMEDY}")
        return None


def _words(file: Path, report: Report) -> set[int] | None:
    values = read_object(file, report, _REMEDY)
    return None if values is None else _whole(values)


def _pieces(file: Path, report: Report) -> set[int] | None:
    try:
        import sentencepiece
    except ImportError:
        report(
            f"its tokenizer is {file.name} alone, which needs the package sentencepiece: pip install sentencepiece "
            "protobuf"
        )
        return None
    try:
        return set(range(sentencepiece.SentencePieceProcessor(model_file=str(file)).get_piece_size()))
    except (OSError, RuntimeError) as error:
        report(f"{file.name} is no SentencePiece model ({error}): {_REMEDY}")
        return None


def _whole(values: dict[str, Any]) -> set[int]:
    return {value for value in values.values() if isinstance(value, int)}


_READERS = {"vocab.txt": _lines, "vocab.json": _words, "spiece.model": _pieces}
