"""Decoding settings of a captioner as its bundle carries them; a part of :mod:`rsedge.manifest`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rsedge.errors import BundleError

MAX_BEAMS = 64
_MOST_NEW_TOKENS = 1 << 17  # no decoder has as many positions
_DEFAULT_NEW_TOKENS = 20  # what transformers generates where nothing else is said


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Decoding settings used where the caller gives none; each means what it means to ``transformers.generate``.

    Attributes:
        max_new_tokens, min_new_tokens: Counted without the start token, the end token included.
        num_beams: Hypotheses kept per image; 1 is greedy search, or sampling with ``do_sample``.
        length_penalty: Exponent of the length a beam's score is divided by.
        early_stopping: ``True`` ends when ``num_beams`` captions are complete, ``False`` when a better one is
            unlikely, ``"never"`` when none can come.
        repetition_penalty: Above 1 makes tokens already present less likely; 1 does nothing.
        no_repeat_ngram_size: No n-gram of this size occurs twice; 0 does nothing.
        do_sample: Draw each token from the filtered distribution instead of searching.
        temperature, top_k, top_p: The filter, applied in this order; ``top_k`` 0 and ``top_p`` 1 keep every token.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise BundleError("; ".join(problems))

    @staticmethod
    def from_transformers(config: Mapping[str, Any], *, positions: int) -> GenerationDefaults:
        """What ``generation_config.json`` says; there lengths count the start token, and sampling without a ``top_k``
        keeps 50 tokens.

        Args:
            config: The file's object, empty where there is none.
            positions: What the decoder has; no caption is longer.

        Raises:
            BundleError: Values that no caption can have.
            TypeError: Values of the wrong kind.
        """
        names = ("num_beams", "length_penalty", "early_stopping", "repetition_penalty", "no_repeat_ngram_size")
        given = {name: config[name] for name in names if config.get(name) is not None}
        if config.get("do_sample"):
            sampling = ("do_sample", "temperature", "top_k", "top_p")
            given = {name: value for name, value in given.items() if name != "num_beams"}
            given |= {"top_k": 50} | {name: config[name] for name in sampling if config.get(name) is not None}
        longest = config.get("max_new_tokens") or (config.get("max_length") or _DEFAULT_NEW_TOKENS + 1) - 1
        shortest = config.get("min_new_tokens") or max((config.get("min_length") or 1) - 1, 0)
        return GenerationDefaults(max_new_tokens=min(longest, positions), min_new_tokens=shortest, **given)

    def problems(self) -> list[str]:
        """Every value that is not accepted, as a sentence."""
        checks = (
            ("num_beams", 1 <= self.num_beams <= MAX_BEAMS, f"1 (greedy) to {MAX_BEAMS}"),
            ("max_new_tokens", 1 <= self.max_new_tokens <= _MOST_NEW_TOKENS, f"1 to {_MOST_NEW_TOKENS}"),
            (
                "min_new_tokens",
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"0 to max_new_tokens ({self.max_new_tokens})",
            ),
            ("early_stopping", self.early_stopping in (True, False, "never"), "True, False or 'never'"),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a finite number above 0"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (off) or more"),
            ("temperature", 1e-3 <= self.temperature < math.inf, "a finite number, 0.001 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "a share above 0 and at most 1"),
        )
        return [
            f"{name} is {getattr(self, name)!r}, expected {accepted}" for name, holds, accepted in checks if not holds
        ]
