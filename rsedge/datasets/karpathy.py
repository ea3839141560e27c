"""The JSON layout of Karpathy's splits, in which RSICD, UCM-Captions, RSITMD, NWPU-Captions and Sydney are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rsedge.datasets.records import Record


def read_karpathy(images: Sequence[Any], report: Callable[[str, str], None]) -> list[Record]:
    """The records of ``[{"filename", "split", "sentences": [{"raw"}]}]``.

    Args:
        images: The entry ``images`` of the file.
        report: Told where an entry stands and why it is left out.
    """
    records = []
    for number, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(sentences := image.get("sentences", []), list):
            report(f"images[{number}]", "it is no object with a list of sentences")
            continue
        name = image.get("filename")
        captions = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in sentences]
        where = name if isinstance(name, str) and name else f"images[{number}]"
        records.append(Record(where, name, captions, image.get("split"), image.get("label")))
    return records
