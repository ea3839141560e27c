"""Predicted captions as files: JSON lines of our own, and COCO's results for tools that score those.

A line is ``{"key": …, "caption": …, "references": […]}``, and ``"error"`` where there is no caption.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rsedge import jsonvalues
from rsedge.errors import OptionError, OutputError
from rsedge.files import write_text
from rsedge.texts import in_lines

_ABSENT = "there is no prediction of this image"


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model said of one image; OptionError where the key is empty."""

    key: str
    """Of the example."""
    caption: str
    """Empty where there is none."""
    references: tuple[str, ...] = ()
    """The captions it is scored against; perhaps none in a file written elsewhere."""
    error: str | None = None
    """Why there is no caption."""

    def __post_init__(self) -> None:
        if not self.key:
            raise OptionError("a prediction has an empty key, expected that of its image")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        values: dict[str, Any] = {"key": self.key, "caption": self.caption, "references": list(self.references)}
        return values if self.error is None else {**values, "error": self.error}


def check_outputs(*paths: Path | None) -> None:
    """Refuse now, with OutputError, paths in folders that are not there: they could not be written after an hour of
    work.
    """
    if wrong := [path for path in paths if path is not None and not path.parent.is_dir()]:
        raise OutputError("\n".join(f"cannot write {path}: there is no folder {path.parent}" for path in wrong))


def write_predictions(path: str | Path, predictions: Sequence[Prediction]) -> None:
    """Write JSON lines, or for a name that ends in ``.json`` COCO's results, with the references as COCO annotations
    beside them in ``NAME.references.json``. Nothing is left half written; OutputError where it cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        # Images are numbered from 1 in order, their keys are the file names.
        numbered = list(enumerate(predictions, 1))
        results = [{"image_id": number, "caption": prediction.caption} for number, prediction in numbered]
        texts = [(number, text) for number, prediction in numbered for text in prediction.references]
        annotations = {
            "info": {},
            "licenses": [],
            "type": "captions",
            "images": [{"id": number, "file_name": prediction.key} for number, prediction in numbered],
            "annotations": [
                {"id": i, "image_id": number, "caption": text} for i, (number, text) in enumerate(texts, 1)
            ],
        }
        _write(_beside(path), json.dumps(annotations) + "\n")
        _write(path, json.dumps(results) + "\n")
    else:
        lines = (json.dumps(prediction.to_dict()) for prediction in predictions)
        _write(path, "".join(f"{line}\n" for line in lines))


def read_predictions(path: str | Path) -> tuple[Prediction, ...]:
    """The predictions in a file of JSON lines, or in COCO's results with ``NAME.references.json`` beside them, as
    :func:`write_predictions` writes them (COCO has no place for why a caption is missing).

    Raises:
        OptionError: It cannot be read, is empty, or has bad lines or a key twice; all are listed.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        return _from_coco(path)
    found: list[Prediction] = []
    problems: list[str] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        try:
            if line.strip():
                found.append(_prediction(jsonvalues.loads(line)))
        except (OptionError, ValueError) as error:  # noqa: PERF203 - a line takes far longer
            problems.append(f"line {number}: {error}")
    problems += [f"{key} is there {n} times" for key, n in Counter(p.key for p in found).items() if n > 1]
    if not found and not problems:
        problems.append("it is empty")
    if problems:
        head = f"{path} is no file of predictions; a line is {{'key': …, 'caption': …, 'references': […]}}:"
        raise OptionError("\n".join([head, *in_lines(problems)]))
    return tuple(found)


def with_references(
    predictions: Sequence[Prediction], references: Mapping[str, Sequence[str]]
) -> tuple[Prediction, ...]:
    """The predictions against other references, in the order of these. An image without a prediction gets an empty
    one with an error: it counts. OptionError where a prediction is of an image that has no references.
    """
    known = {prediction.key: prediction for prediction in predictions}
    if strange := [key for key in known if key not in references]:
        head = f"{len(strange)} of {len(known)} predictions are of images that are not in this data and split:"
        raise OptionError("\n".join([head, *in_lines(strange)]))
    found = {key: Prediction(key, "", error=_ABSENT) for key in references} | known
    return tuple(replace(found[key], references=tuple(texts)) for key, texts in references.items())


def _prediction(values: Any) -> Prediction:
    if not isinstance(values, dict):
        raise OptionError("expected a JSON object")
    problems = [f"it has no {name}" for name in ("key", "caption") if name not in values]
    problems += [f"unknown field {name}" for name in values if name not in ("key", "caption", "references", "error")]
    problems += [
        f"{name} is {values[name]!r}, expected a text"
        for name in ("key", "caption", "error")
        if name in values and not isinstance(values[name], str)
    ]
    references = values.get("references", [])
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        problems.append("references must be a list of texts")
    if problems:
        raise OptionError("; ".join(problems))
    return Prediction(values["key"], values["caption"], tuple(references), values.get("error"))


def _from_coco(path: Path) -> tuple[Prediction, ...]:
    """A prediction per image of the annotations, in their order; one without a result counts, with an error."""
    beside = _beside(path)
    if not beside.is_file():
        raise OptionError(
            f"{path} has image numbers and captions, and {beside.name}, which says what images they are of, is not "
            "beside it: copy it too, or give a file of JSON lines"
        )
    try:
        results, annotations = jsonvalues.loads(_text(path)), jsonvalues.loads(_text(beside))
        names = {image["id"]: image["file_name"] for image in annotations["images"]}
        texts: dict[Any, list[str]] = {number: [] for number in names}
        for annotation in annotations["annotations"]:
            texts[annotation["image_id"]].append(annotation["caption"])
        numbers = [result["image_id"] for result in results]
        captions = {result["image_id"]: result["caption"] for result in results}
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(
            f"{path} and {beside.name} are no COCO results with their annotations ({type(error).__name__}: {error})"
        ) from error
    problems = [f"image {number} is there {n} times" for number, n in Counter(numbers).items() if n > 1]
    problems += [f"image {number} is not in {beside.name}" for number in captions if number not in names]
    problems += [f"{name} is the file of {n} images" for name, n in Counter(names.values()).items() if n > 1]
    spoken = [*names.values(), *captions.values(), *(text for group in texts.values() for text in group)]
    problems += [f"{text!r} is no text" for text in spoken if not isinstance(text, str)]
    if not names:
        problems.append(f"{beside.name} has no image")
    if problems:
        raise OptionError("\n".join([f"{path} cannot be used:", *in_lines(problems)]))
    return tuple(
        Prediction(name, captions.get(number, ""), tuple(texts[number]), None if number in captions else _ABSENT)
        for number, name in names.items()
    )


def _beside(path: Path) -> Path:
    """Where the annotations of COCO results are."""
    return path.with_name(f"{path.stem}.references.json")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the predictions {path}: {error}") from error


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
