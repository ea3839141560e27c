"""What a caption set is once read: examples, and the records that could not become one. No torch, no files."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from rsedge.errors import OptionError

if TYPE_CHECKING:
    from rsedge.pixels import UInt8

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


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
    """One image with all its captions.

    Raises:
        OptionError: A field breaks one of the rules above.
    """

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
    """What one or several caption sets hold.

    Raises:
        OptionError: Two examples have the same key.
    """

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
        """The examples of one split, perhaps none.

        Raises:
            OptionError: There is no such split.
        """
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
