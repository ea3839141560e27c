"""Tensors of a checkpoint's safetensors files: checked before use, read one at a time, never through pickle.

The format is an 8-byte little-endian length, a JSON header of that length with each tensor's type, shape and byte
range, then the bytes (https://github.com/huggingface/safetensors#format). It is read here directly because numpy has no
bfloat16, which safetensors' own numpy reader refuses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsedge import jsonvalues
from rsedge.bundle import sha256_of
from rsedge.checkpointfiles import INDEX, SHARD, file_problems

SINGLE = "model.safetensors"

_ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: ``nbytes`` bytes from ``offset`` of ``file``, of safetensors type ``dtype``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def is_float(self) -> bool:
        """Whether it can be a weight; buffers of integers cannot, nor can packed quantised weights."""
        return self.dtype in _FLOATS

    def read(self) -> NDArray[np.float32]:
        """The tensor as float32, a copy of its own."""
        raw = np.fromfile(self.file, dtype=_FLOATS[self.dtype], count=math.prod(self.shape), offset=self.offset)
        if self.dtype == "BF16":  # the upper half of a float32
            return (raw.astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        return raw.astype(np.float32).reshape(self.shape)


class Weights(Mapping[str, NDArray[np.float32]]):
    """Name → float32 array, read from disk at each access and not kept."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = dict(stored)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def find_tensors(folder: Path, report: Report) -> tuple[dict[str, StoredTensor], list[Path]]:
    """Every tensor in the weight files of ``folder``, and those files; problems go to ``report`` as sentences."""
    if (folder / SINGLE).is_file():
        return _read_header(folder / SINGLE, report), [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _read_shards(folder, report)
    pickled = sorted(
        path.name for pattern in ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl") for path in folder.glob(pattern)
    )
    if pickled:
        report(
            f"its weights are pickled only ({', '.join(pickled[:3])}), and rsedge never executes pickle: where you "
            "trust the file, load the model with transformers and save it with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    else:
        report(f"it has no weights: expected {SINGLE}, or {INDEX} with its shards")
    return {}, []


def hash_files(files: list[Path]) -> str:
    """What ``sha256sum`` prints for the one file, or for the lines it prints for several, ordered by name."""
    digests = {path.name: sha256_of(path) for path in files}
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()).hexdigest()


def _read_shards(folder: Path, report: Report) -> tuple[dict[str, StoredTensor], list[Path]]:
    try:
        places: dict[str, str] = dict(jsonvalues.parse((folder / INDEX).read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        report(f"{INDEX} is damaged ({error}): download it again or save the checkpoint again")
        return {}, []
    found: dict[str, StoredTensor] = {}
    files = []
    for name in sorted({str(place) for place in places.values()}):
        path = folder / name
        if not SHARD.fullmatch(name):
            report(
                f"{INDEX} names {name!r}, which is not a safetensors file of the folder itself: save the checkpoint "
                "again"
            )
        elif not path.is_file():
            report(f"the shard {name} is missing: download it again or save the checkpoint again")
        else:
            tensors = _read_header(path, report)
            files.append(path)
            # transformers reads whatever a shard holds; a tensor promised and absent is a damaged checkpoint.
            absent = [tensor for tensor, place in places.items() if place == name and tensor not in tensors]
            if absent and tensors:
                more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
                some = ", ".join(absent[:5]) + more
                report(f"the shard {name} lacks {some}, which {INDEX} says it holds: download it again")
            found.update(tensors)
    return found, files


def _read_header(path: Path, report: Report) -> dict[str, StoredTensor]:
    if problems := file_problems(path):
        for problem in problems:
            report(problem)
        return {}
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length)
    end = 8 + length
    tensors = {}
    try:
        header = jsonvalues.parse(text)
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, end, entry) for name, entry in header.items()}
        # One after another, without a gap, as the format says: bytes of two tensors, or of none, are a trick.
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset != end:
                raise ValueError(
                    f"a tensor begins at byte {tensor.offset}, expected {end}: tensors overlap or leave gaps"
                )
            end += tensor.nbytes
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        report(f"the header of {path.name} is damaged ({error}): download it again or save the checkpoint again")
        return {}
    if end != size:
        fate = "cut short" if size < end else "damaged"
        report(f"{path.name} is {fate}: its header promises {end} bytes, the file has {size}; download it again")
        return {}
    return tensors


def _stored(path: Path, start: int, entry: dict[str, Any]) -> StoredTensor:
    shape, (begin, stop) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = str(entry["dtype"])[:40]
    if len(shape) > 8 or any(type(number) is not int or number > 1 << 48 for number in (*shape, begin, stop)):
        raise ValueError(f"shape {list(shape)[:8]} at {begin} to {stop} is impossible")
    expected = math.prod(shape) * _ITEM_SIZE.get(dtype, 0)
    if not 0 <= begin <= stop or min(shape, default=0) < 0 or (dtype in _ITEM_SIZE and stop - begin != expected):
        raise ValueError(f"bytes {begin} to {stop} cannot hold {dtype} {list(shape)}")
    return StoredTensor(path, dtype, shape, start + begin, stop - begin)
