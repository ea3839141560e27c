"""Token ids ↔ text from a bundle's ``tokenizer.json``, with the ``tokenizers`` package alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers

from rsedge.errors import BundleError, OptionError
from rsedge.tokenizerfile import no_panic

LONGEST_TEXT = 10_000
"""Characters of the longest text that is encoded; a model reads some hundred at most."""


class Tokenizer:
    """What the checkpoint's own tokenizer gives, id for id and character for character.

    The file holds everything, the clean-up of spaces included (see ``rsedge.export.tokenizer``), so nothing here knows
    one tokenizer from another. Instances may be shared between threads.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    @classmethod
    def load(cls, path: str | Path, *, longest: int | None = None) -> Tokenizer:
        """The tokenizer in the file ``path``.

        Args:
            path: A ``tokenizer.json``.
            longest: Tokens that :meth:`encode` cuts a text to, the special ones kept; None: it cuts none.

        Raises:
            BundleError: The file is missing or is no ``tokenizer.json``.
        """
        try:
            with no_panic(_broken):
                backend = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
        except Exception as error:  # the package raises bare Exception for a file it cannot parse
            raise BundleError(
                f"cannot read the tokenizer {path} ({error}): copy the bundle again or export again"
            ) from error
        if longest is not None:
            backend.enable_truncation(longest)
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` with the special tokens around it, not padded.

        Raises:
            OptionError: It has more than ``LONGEST_TEXT`` characters.
        """
        if len(text) > LONGEST_TEXT:
            raise OptionError(f"a text has {len(text)} characters, at most {LONGEST_TEXT} are read: shorten it")
        with no_panic(_broken):
            return list(self._backend.encode(text).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens and ids the vocabulary does not have leave nothing behind."""
        with no_panic(_broken):
            return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)


def _broken(reason: str) -> BundleError:
    return BundleError(f"the bundle's tokenizer is broken ({reason}): do not use this bundle, export again")
