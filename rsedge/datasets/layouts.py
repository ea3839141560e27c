"""Caption sets of any layout → examples: the whole policy, from the sources as a user names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rsedge.datasets.checks import keys_of, read_examples, undecodable
from rsedge.datasets.examples import SPLITS, BadRecord, CaptionData, Example
from rsedge.datasets.paraphrases import attach_paraphrases
from rsedge.datasets.records import CaptionSet, Record, tell_apart
from rsedge.datasets.sources import label_of, read_classes, read_set
from rsedge.datasets.splits import Splitter, subset, wanted_splits
from rsedge.errors import OptionError
from rsedge.texts import in_lines


def load_examples(
    sources: Sequence[str | Path],
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    limit: int | None = None,
    splits: Sequence[str] = SPLITS,
    skip_bad: bool = False,
    paraphrases: Path | None = None,
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> CaptionData:
    """Read one or several caption sets.

    A set's own splits come first; without such, each image is placed by a hash of the seed and its key (see
    :mod:`rsedge.datasets.splits`), so that all its captions are on one side.

    Args:
        sources: ``FILE``, ``FILE@FOLDER`` (with the folder of its images), ``FOLDER`` or ``hf:OWNER/NAME``; see
            :mod:`rsedge.datasets.sources` for the layouts.
        seed: Of splits and of ``limit``.
        fractions: Of train, val and test, for sets without splits; met on average, not exactly.
        limit: At most so many images of each split over all sets: a random subset, the same whatever else there is.
        splits: Read only these; images of the others need not be there.
        skip_bad: Leave out records that cannot be used, and list them in the result, instead of refusing all.
        paraphrases: File of ``rsedge back-translate`` with other wordings of the captions.
        check: Decode every image once, in a few threads, so that a damaged one is found now and not in mid-training.
        progress: Told what takes a while.

    Raises:
        OptionError: A set cannot be read, its layout cannot be told, an option is out of range, or records cannot be
            used: a missing image, no caption, an undecodable file, an unknown split, a file named twice or outside the
            folder. All of them are listed at once.
    """
    return _load(
        _read_all([str(source) for source in sources], read_set),
        splitter=Splitter(seed, fractions),
        limit=limit,
        splits=splits,
        skip_bad=skip_bad,
        paraphrases=paraphrases,
        check=check,
        progress=progress,
        label=None,
    )


def load_labelled(
    source: str | Path,
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    limit: int | None = None,
    splits: Sequence[str] = SPLITS,
    skip_bad: bool = False,
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> tuple[Example, ...]:
    """Read images with a class each, for zero-shot classification.

    Args:
        source: A folder with one folder a class, or with files named ``class_number.ext``; or a caption set whose
            records have a ``label`` or such file names (captions are kept, but not needed).
        seed, fractions, limit, splits, skip_bad, check, progress: As in :func:`load_examples`. The images of a folder
            without folders for splits are all for testing.

    Raises:
        OptionError: As :func:`load_examples`, and where an image has no class.
    """
    data = _load(
        _read_all([str(source)], lambda name: read_classes(name) or read_set(name)),
        splitter=Splitter(seed, fractions),
        limit=limit,
        splits=splits,
        skip_bad=skip_bad,
        paraphrases=None,
        check=check,
        progress=progress,
        label=label_of,
    )
    return data.examples


def _read_all(sources: Sequence[str], read: Callable[[str], CaptionSet]) -> list[CaptionSet]:
    """All sets, with distinct names; what is wrong with any is said of all."""
    if not sources:
        raise OptionError("no caption set is named: give at least one")
    problems: list[str] = []

    def attempt(source: str) -> list[CaptionSet]:
        try:
            return [read(source)]
        except OptionError as error:
            problems.append(str(error))
            return []

    sets = [caption_set for source in sources for caption_set in attempt(source)]
    if problems:
        raise OptionError("\n".join(problems))
    return tell_apart(sets)


def _load(
    sets: Sequence[CaptionSet],
    *,
    splitter: Splitter,
    limit: int | None,
    splits: Sequence[str],
    skip_bad: bool,
    paraphrases: Path | None,
    check: bool,
    progress: Callable[[str], None] | None,
    label: Callable[[Record], str | None] | None,
) -> CaptionData:
    wanted = wanted_splits(splits)
    if limit is not None and limit < 1:
        raise OptionError(f"limit is {limit}: give a number of images above 0")
    examples: list[Example] = []
    bad: list[BadRecord] = []
    source_of: dict[str, str] = {}
    for caption_set in sets:
        found, unusable = read_examples(caption_set, splitter=splitter, splits=wanted, label=label)
        examples += found
        bad += unusable
        source_of.update((example.key, caption_set.source) for example in found)
    examples.sort(key=lambda example: example.key)
    if limit is not None:
        by_split = ([example.key for example in examples if example.split == split] for split in wanted)
        kept = set().union(*(subset(keys, limit, seed=splitter.seed) for keys in by_split))
        examples = [example for example in examples if example.key in kept]
    if check:
        if progress is not None:
            progress(f"checking {len(examples)} images")
        broken = undecodable(examples, lambda example: source_of[example.key])
        examples = [example for example in examples if example.key not in broken]
        bad += broken.values()
    if bad and not skip_bad:
        count = "1 record cannot be used" if len(bad) == 1 else f"{len(bad)} records cannot be used"
        raise OptionError("\n".join([f"{count}:", *in_lines(bad), "mend them, or leave them out with --skip-bad"]))
    if not examples:
        left = f"all {len(bad)} records are left out" if bad else "there are no records"
        names = ", ".join(caption_set.source for caption_set in sets)
        raise OptionError(f"{names} hold no usable image of the splits {', '.join(sorted(wanted))}: {left}")
    if paraphrases is not None:
        known = set().union(*map(keys_of, sets))
        examples = attach_paraphrases(examples, paraphrases, known=known)
    return CaptionData(tuple(examples), tuple(bad), tuple(caption_set.source for caption_set in sets))
