"""What a caption set is once read: examples, the records that could not become one, splits and subsets.

Splits and subsets depend on nothing but a seed and the examples' keys. Each image is placed by a hash of its own:
neither the order of files, nor the machine, nor what other images there are can move it. The price is that fractions
are met on average, not exactly: 10 % of 1,000 images come out as 100 give or take about 10.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from rsedge.errors import OptionError

if TYPE_CHECKING:
    from rsedge.pixels import UInt8

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_WORDS: dict[str, Split] = {
    "train": "train", "training": "train",
    "restval": "train",  # Karpathy's name for images left over from validation, which all train on
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
SPLIT_WORDS = ", ".join(_WORDS)
"""What a split column may say, as messages list it."""


class ImageSource(Protocol):
    """Where an image comes from. Picklable, so that the workers of a data loader can open it."""

    def read(self) -> UInt8:
        """The image, uint8 [H, W, 3], RGB.

        Raises:
            SceneError: It is missing, damaged, or of a kind that has no RGB; the message names the image.
        """
        ...


@dataclass(frozen=True, slots=True)
class Example:
    """One image with all its captions. Fields that break the rules below raise OptionError."""

    key: str
    """``<set>/<relative file name>``, the same whatever the order of files or the machine."""
    image: ImageSource
    """Reads the pixels when they are wanted."""
    captions: tuple[str, ...]
    """At least one, without white space around it; none only where there is a ``label`` instead."""
    split: Split
    """``train``, ``val`` or ``test``."""
    paraphrases: tuple[tuple[str, ...], ...] = ()
    """For each caption its rewordings by back-translation, perhaps none; ``()`` where no caption has any."""
    label: str | None = None
    """The class, where the set has one."""

    def __post_init__(self) -> None:
        if not self.key:
            raise OptionError("an example has an empty key, expected <set>/<file name>")
        problems = []
        if self.split not in SPLITS:
            problems.append(f"split is {self.split!r}, expected {', '.join(SPLITS)}")
        if not self.captions and self.label is None:
            problems.append("it has neither a caption nor a label")
        texts = [*self.captions, *(text for group in self.paraphrases for text in group)]
        if bad := [text for text in texts if not isinstance(text, str) or not text or text != text.strip()]:
            problems.append(f"captions must be text without white space around it, got {bad[0]!r}")
        if self.paraphrases and len(self.paraphrases) != len(self.captions):
            problems.append(
                f"there are paraphrases of {len(self.paraphrases)} captions, but {len(self.captions)} captions: "
                "give one group per caption, empty where a caption has none"
            )
        if self.label is not None and not self.label:
            problems.append("the label is empty: give None where there is none")
        if problems:
            raise OptionError(f"{self.key}: {'; '.join(problems)}")


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record of an annotation file that cannot be used."""

    source: str
    """The set as the user named it."""
    record: str
    """Which of its records: a file name or a line, enough to find it."""
    reason: str
    """What is wrong with it."""

    def __str__(self) -> str:
        return f"{self.source}: {self.record}: {self.reason}"


@dataclass(frozen=True, slots=True)
class CaptionData:
    """What one or several caption sets hold; OptionError where two examples have the same key."""

    examples: tuple[Example, ...]
    """Ordered by key, so that neither files nor file systems decide the order."""
    bad: tuple[BadRecord, ...] = ()
    """Records left out, where that was asked for."""
    sources: tuple[str, ...] = ()
    """The sets, as the user named them."""

    def __post_init__(self) -> None:
        keys: set[str] = set()
        for example in self.examples:
            if example.key in keys:
                raise OptionError(f"two examples have the key {example.key}: every image needs its own")
            keys.add(example.key)

    def split(self, name: str) -> tuple[Example, ...]:
        """The examples of one split, perhaps none; OptionError where there is no such split."""
        if name not in SPLITS:
            raise OptionError(f"there is no split {name!r}, expected {', '.join(SPLITS)}")
        return tuple(example for example in self.examples if example.split == name)

    def summary(self) -> dict[str, Any]:
        """Sizes, ready for JSON: ``sources``, ``bad`` (a count), and for each split that has images ``images``,
        ``captions``, ``words_per_caption`` (mean; None without captions) and ``paraphrases``.
        """
        splits = {}
        for name in SPLITS:
            if examples := self.split(name):
                words = [len(caption.split()) for example in examples for caption in example.captions]
                splits[name] = {
                    "images": len(examples),
                    "captions": len(words),
                    "words_per_caption": round(fmean(words), 2) if words else None,
                    "paraphrases": sum(len(group) for example in examples for group in example.paraphrases),
                }
        return {"sources": list(self.sources), "bad": len(self.bad), "splits": splits}


def split_named(word: object) -> Split | None:
    """The split that ``word`` names in whichever case, or None."""
    return _WORDS.get(word.strip().lower()) if isinstance(word, str) else None


@dataclass(frozen=True, slots=True)
class Splitter:
    """Places images without a split of their own; OptionError where the fractions are not three that add up to 1."""

    seed: int = 0
    """Another seed, another split."""
    fractions: tuple[float, ...] = (0.8, 0.1, 0.1)
    """Of train, val and test."""
    val_fraction: float = 0.0
    """Share of the training images that become val, for a set with splits but without val."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise OptionError(f"val_fraction is {self.val_fraction}: give a share from 0 to 1, such as 0.1")
        # Written so that NaN fails too.
        if not (len(self.fractions) == 3 and min(self.fractions) >= 0 and abs(sum(self.fractions) - 1) < 1e-6):
            raise OptionError(
                f"fractions are {list(self.fractions)}: give three for {', '.join(SPLITS)} that add up to 1"
            )

    def is_val(self, key: str) -> bool:
        """Whether the training image ``key`` becomes one for validation."""
        return uniform("val", self.seed, key) < self.val_fraction

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
    """``splits`` checked; OptionError where there are none, or one is no split."""
    if isinstance(splits, str) or not splits or any(name not in SPLITS for name in splits):
        raise OptionError(f"splits are {splits!r}: give some of {', '.join(SPLITS)}")
    return frozenset(name for name in SPLITS if name in splits)
