"""Other wordings of captions by translation into other languages and back, with Marian models.

Offline, into a file beside the annotations that training reads (see :mod:`rsedge.datasets.layouts`). Work is done
in fixed segments of images, and what is finished is kept in ``OUTPUT.partial``: a run that was cut off goes on, and its
file is the one an uninterrupted run writes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from rsedge.datasets.layouts import to_line
from rsedge.errors import BackendError, OptionError, OutputError
from rsedge.files import open_itself, replacing
from rsedge.runtime.outputs.files import check_target, sync_folder
from rsedge.training.models.loading import check_source, torch_device

if TYPE_CHECKING:
    from rsedge.datasets.examples import Example

FORMAT_VERSION = 1
SEGMENT = 32
"""Images whose captions are translated together. Batches never cross it: a sentence's padding sways its last bits."""


@dataclass(frozen=True, slots=True)
class BackTranslation:
    """The settings that decide the wordings. Raises OptionError: a number below 1, or a language twice or empty."""

    forward: str
    """Marian model from English: folder or hub id, such as ``Helsinki-NLP/opus-mt-en-ROMANCE``."""
    backward: str
    """Marian model back into English, such as ``Helsinki-NLP/opus-mt-ROMANCE-en``."""
    languages: tuple[str, ...] = ()
    """Codes of the languages to go through (``fr``, ``es``), one wording each, for a forward model that has several;
    none for one that has a single one."""
    num_beams: int = 1
    """Of beam search; 1 is greedy."""
    max_new_tokens: int = 128
    """Longest translation."""
    batch_size: int = 32
    """Sentences translated together."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}: give 1 or more"
            for name in ("num_beams", "max_new_tokens", "batch_size")
            if (value := getattr(self, name)) < 1
        ]
        if len(set(self.languages)) < len(self.languages) or not all(self.languages):
            problems.append(f"languages are {', '.join(map(repr, self.languages))}: name each once, such as fr,es")
        if problems:
            raise OptionError("; ".join(problems))


class Translator:
    """A Marian model and its tokenizer.

    Args:
        source: Folder or hub id.
        num_beams, max_new_tokens, batch_size: As in :class:`BackTranslation`.
        device: Of torch.

    Raises:
        OptionError: It cannot be had, or is no Marian model.
        BackendError: A library is missing.
    """

    def __init__(self, source: str, *, num_beams: int, max_new_tokens: int, batch_size: int, device: str) -> None:
        try:
            import sentencepiece  # noqa: F401 - Marian's tokenizer needs it and says so at length
            from transformers import AutoConfig, MarianMTModel, MarianTokenizer
        except ImportError as error:
            raise BackendError(f"back-translation needs {error.name}: pip install 'rsedge[translate]'") from error
        self.source = source
        try:
            check_source(source)
            kind = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
            if kind != "marian":
                raise OptionError(f"{source} is a {kind} model, not a Marian translator such as Helsinki-NLP/opus-mt-*")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")  # it is for other scripts
                self._tokenizer = MarianTokenizer.from_pretrained(source)
            self._model = MarianMTModel.from_pretrained(source).to(device).eval()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise OptionError(
                f"cannot translate with {source}: {reason}. Give a folder in Hugging Face layout or a hub id; without "
                "a network, set HF_HUB_OFFLINE=1 to use the cache"
            ) from error
        self._settings = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "do_sample": False}
        self._batch_size = batch_size

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of its target languages; none where there is a single one."""
        codes: list[str] = self._tokenizer.supported_language_codes
        return tuple(code.removeprefix(">>").removesuffix("<<") for code in codes)

    def __call__(self, texts: Sequence[str], language: str | None = None) -> list[str]:
        """Translations in the order of ``texts``, each distinct text translated once."""
        import torch

        prefix = f">>{language}<< " if language else ""
        lengths = {text: len(self._tokenizer(text).input_ids) for text in dict.fromkeys(texts)}
        ordered = sorted(lengths, key=lambda text: (lengths[text], text))  # alike in length: little padding
        found: dict[str, str] = {}
        for start in range(0, len(ordered), self._batch_size):
            batch = ordered[start : start + self._batch_size]
            marked = [prefix + text for text in batch]
            tokens = self._tokenizer(marked, return_tensors="pt", padding=True, truncation=True)
            with torch.inference_mode():
                output = self._model.generate(**tokens.to(self._model.device), **self._settings)
            written = self._tokenizer.batch_decode(output, skip_special_tokens=True)
            found.update(zip(batch, (" ".join(text.split()) for text in written), strict=True))
        return [found[text] for text in texts]


def back_translate(
    examples: Sequence[Example],
    output: Path,
    settings: BackTranslation,
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write the wordings of all captions of ``examples`` to ``output``.

    Args:
        examples: Any number, in any order; the file is ordered by key.
        output: The file, JSON lines; it appears when it is whole.
        settings: Models and search.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        overwrite: Replace an existing output, and begin anew where unfinished work is of other settings or captions.
        progress: Called with the images done and the images there are, after every segment.

    Returns:
        ``images``, ``captions`` and ``paraphrases`` (distinct wordings that differ from their caption).

    Raises:
        OptionError: A model cannot be used, or does not know a language.
        OutputError: The output exists, or cannot be written; or unfinished work beside it is of other settings.
        BackendError: A library or the device is missing.
    """
    examples = sorted((example for example in examples if example.captions), key=lambda example: example.key)
    if not examples:
        raise OptionError("there are no captions to translate")
    check_target(output)
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists already: choose another output, or pass --overwrite")
    # 1. The translators, and the languages to go through; None where the models have a single one.
    search = {name: getattr(settings, name) for name in ("num_beams", "max_new_tokens", "batch_size")}
    device = torch_device(device)
    forward, backward = (Translator(name, **search, device=device) for name in (settings.forward, settings.backward))
    known, languages = forward.languages, settings.languages
    if known and not languages:
        raise OptionError(f"{forward.source} translates into several languages: choose some of {', '.join(known)}")
    if unknown := [code for code in languages if code not in known]:
        accepted = f"choose some of {', '.join(known)}" if known else "it has a single one: leave languages out"
        raise OptionError(f"{forward.source} does not translate into {', '.join(unknown)}; {accepted}")
    # 2. What decides the work, the first line of the partial file.
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(json.dumps([example.key, example.captions]).encode())
    values = {"rsedge_back_translation": FORMAT_VERSION, **asdict(settings), "captions": digest.hexdigest()}
    header = json.dumps(values).encode() + b"\n"
    # 3. Segment by segment from where the last run ended.
    with _partial_file(output, header, overwrite=overwrite) as (stream, done):
        finished = _whole_lines(stream, done, examples)
        for start in range(finished, len(examples), SEGMENT):
            segment = examples[start : start + SEGMENT]
            for example, groups in zip(segment, _reword(segment, forward, backward, languages or (None,)), strict=True):
                stream.write(to_line(example, groups).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
            if progress is not None:
                progress(start + len(segment), len(examples))
        # 4. Finished work becomes the output, and is counted.
        counts = {"images": 0, "captions": 0, "paraphrases": 0}
        stream.flush()
        stream.seek(done)
        with replacing(output) as draft, draft.open("wb") as target:
            for line in stream:
                values = json.loads(line)
                counts["images"] += 1
                counts["captions"] += len(values["captions"])
                counts["paraphrases"] += sum(map(len, values["paraphrases"]))
                target.write(line)
            target.flush()
            os.fsync(target.fileno())
        sync_folder(output.parent)
        output.with_name(f"{output.name}.partial").unlink()
        return counts


def _reword(
    examples: Sequence[Example], forward: Translator, backward: Translator, languages: Sequence[str | None]
) -> list[list[list[str]]]:
    """For each example and caption the wordings that differ from the caption and each other."""
    texts = [caption for example in examples for caption in example.captions]
    english = "en" if "en" in backward.languages else "eng" if "eng" in backward.languages else None
    wordings: list[list[str]] = [[] for _ in texts]
    for language in languages:
        for kept, caption, text in zip(wordings, texts, backward(forward(texts, language), english), strict=True):
            if _words(text) and _words(text) not in [_words(caption), *map(_words, kept)]:
                kept.append(text)
    remaining = iter(wordings)
    return [[next(remaining) for _ in example.captions] for example in examples]


def _words(text: str) -> str:
    """A text without what makes no other wording: case, spaces, the final stop."""
    return " ".join(text.lower().split()).rstrip(" .")


@contextmanager
def _partial_file(output: Path, header: bytes, *, overwrite: bool) -> Iterator[tuple[BinaryIO, int]]:
    """The file of finished work, locked, and the offset of its records."""
    path = output.with_name(f"{output.name}.partial")
    try:
        handle = open_itself(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; choose another output") from error
    with os.fdopen(handle, "r+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{path} is in use by another run: wait for it to end") from None
        stored = stream.readline()
        if stored != header:
            if stream.read(1) and not overwrite:  # a run that finished nothing is no loss
                raise OutputError(
                    f"{path} is unfinished work of other settings or captions: run with the former ones to go on with "
                    "it, or pass --overwrite to begin anew"
                )
            stream.seek(0)
            stream.truncate()
            stream.write(header)
        try:
            yield stream, len(header)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error.strerror}; make room and run the same command to go on"
            ) from error


def _whole_lines(stream: BinaryIO, start: int, examples: Sequence[Example]) -> int:
    """The number of finished examples, in whole segments; cuts off the rest."""
    stream.seek(start)
    ends = [start]
    for example, line in zip(examples, stream, strict=False):
        try:
            fits = line.endswith(b"\n") and json.loads(line)["key"] == example.key
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            break
        ends.append(ends[-1] + len(line))
    finished = len(ends) - 1
    if finished < len(examples):
        finished -= finished % SEGMENT
    stream.seek(ends[finished])
    stream.truncate()
    return finished
