"""Splits and subsets that depend on nothing but a seed and the examples' keys.

Each image is placed by a hash of its own: neither the order of files and captions, nor the machine, nor what other
images there are can move it, and adding images moves none. The price is that fractions are met on average, not exactly:
10 % of 1,000 images come out as 100 give or take about 10.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rsedge.datasets.examples import SPLITS, Split
from rsedge.errors import OptionError

_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "restval": "train",  # Karpathy's name for images left over from validation, which all train on
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
SPLIT_WORDS = ", ".join(_WORDS)
"""What a split column may say, as messages list it."""


def split_named(word: object) -> Split | None:
    """The split that ``word`` names in whichever case, or None."""
    return _WORDS.get(word.strip().lower()) if isinstance(word, str) else None


@dataclass(frozen=True, slots=True)
class Splitter:
    """Places images without a split of their own.

    Raises:
        OptionError: The fractions are not three that add up to 1.
    """

    seed: int = 0
    """Another seed, another split."""
    fractions: tuple[float, ...] = (0.8, 0.1, 0.1)
    """Of train, val and test."""

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        if not (len(self.fractions) == 3 and min(self.fractions) >= 0 and abs(sum(self.fractions) - 1) < 1e-6):
            raise OptionError(
                f"fractions are {list(self.fractions)}: give three for {', '.join(SPLITS)} that add up to 1"
            )

    def split(self, key: str) -> Split:
        """The split of the image ``key``."""
        place, end = uniform("split", self.seed, key), 0.0
        shares = [(name, share) for name, share in zip(SPLITS, self.fractions, strict=True) if share > 0]
        for name, share in shares:
            end += share
            if place < end:
                return name
        return shares[-1][0]  # the sum of fractions may fall short of 1 by a rounding error


def subset(keys: Iterable[str], limit: int, *, seed: int) -> set[str]:
    """At most ``limit`` of ``keys``, a random subset that every larger limit contains."""
    return set(sorted(keys, key=lambda key: (uniform("limit", seed, key), key))[:limit])


def uniform(purpose: str, seed: int, key: str) -> float:
    """A number from 0 up to, not including, 1, evenly spread over keys and independent between purposes."""
    digest = hashlib.blake2b(f"{purpose}\0{seed}\0{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def wanted_splits(splits: Sequence[str]) -> frozenset[Split]:
    """``splits`` checked.

    Raises:
        OptionError: There are none, or one is no split.
    """
    if isinstance(splits, str) or not splits or any(name not in SPLITS for name in splits):
        raise OptionError(f"splits are {splits!r}: give some of {', '.join(SPLITS)}")
    return frozenset(name for name in SPLITS if name in splits)
