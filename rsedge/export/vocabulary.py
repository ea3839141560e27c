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
    ids: set[int] | None = None
    try:
        if file.name == "tokenizer.json":
            values = read_object(file, report, _REMEDY)
            if values is None:
                return None
            vocabulary = values["model"]["vocab"]
            ids = set(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
            return ids | {int(token["id"]) for token in values.get("added_tokens") or ()}
        if file.name == "vocab.txt":
            # Split at newlines only: str.splitlines would also split at characters that are tokens themselves.
            ids = set(range(len(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"))))
        elif file.name == "vocab.json":
            values = read_object(file, report, _REMEDY)
            ids = None if values is None else _whole(values)
        else:
            import sentencepiece

            ids = set(range(sentencepiece.SentencePieceProcessor(model_file=str(file)).get_piece_size()))
    except ImportError:
        report(
            f"its tokenizer is {file.name} alone, which needs the package sentencepiece: pip install sentencepiece "
            "protobuf"
        )
    except UnicodeDecodeError as error:
        report(f"{file.name} is not UTF-8 ({error}): {_REMEDY}")
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        kind = "SentencePiece model" if file.name == "spiece.model" else "vocabulary"
        report(f"{file.name} has no {kind} ({error!r}): {_REMEDY}")
    added = file.with_name("added_tokens.json")
    more = (read_object(added, report, _REMEDY) or {}) if added.is_file() else {}
    return None if ids is None else ids | _whole(more)


def _whole(values: dict[str, Any]) -> set[int]:
    return {value for value in values.values() if isinstance(value, int)}
