"""PyTorch Lightning checkpoints, read without executing what they hold.

A ``.ckpt`` is a file of ``torch.save``: a zip archive of ``data.pkl``, a pickle of everything but the numbers, and one
file per tensor storage (https://docs.pytorch.org/docs/stable/notes/serialization.html). Unpickling calls whatever the
pickle names; here no name is ever looked up. Tensors are described by functions of this module, dictionaries and the
like are Python's own, and every other name becomes an :class:`Inert` object that records how it was to be made.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from rsedge.errors import RsedgeError

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# They only hold what they are given; bytes and bytearray would make as many bytes as they are told, and a tuple made by
# a call would not be weighed. Their attributes cannot be set, so that no pickle can change them for the rest of the
# program.
_CONTAINERS: dict[str, type] = {kind.__name__: kind for kind in (dict, list, set)}
_LARGEST_TUPLE = 100_000
_MOST_NAMES = 10_000
# Opcodes that torch.save never writes.
_REFUSED = {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}


class Inert:
    """An object of a class that is not ours: a record, without behaviour.

    Attributes:
        name: The class or function, ``module.name``.
        args, kwargs: What it was to be called with.
        state: What it was to be filled with, or None.
        items: What was to be put into it, values or (key, value) pairs.
    """

    name = ""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:  # noqa: D102
        made = object.__new__(cls)
        made.args, made.kwargs, made.state, made.items = args, kwargs, None, []
        return made

    @property
    def value(self) -> Any:
        """The sole argument, which for a member of an enumeration is its value; None where there is no such."""
        return self.args[0] if len(self.args) == 1 else None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, value: Any) -> None:
        """Record a value."""
        self.items.append(value)

    add = append

    def extend(self, values: Iterable[Any]) -> None:
        """Record values."""
        self.items.extend(values)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        return f"<inert {self.name}>"


@dataclass(frozen=True, slots=True)
class Storage:
    """A file of numbers in the archive: ``count`` of ``dtype``."""

    member: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that lies in a :class:`Storage`; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Its element type."""
        return self.storage.dtype


@dataclass(frozen=True, slots=True, eq=False)
class LightningCheckpoint:
    """The content of a ``.ckpt``, the numbers still in the file."""

    path: Path
    tensors: dict[str, StoredTensor]
    """The entries of ``state_dict``."""
    hyper_parameters: dict[str, Any]
    """As saved; empty where there are none. Values may be :class:`Inert`."""

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Tensors of ``state_dict``; those that share numbers in the file share them here.

        Args:
            names: Which; None: all.

        Raises:
            RsedgeError: The file is damaged or has changed.
        """
        buffers: dict[str, Tensor] = {}
        found = {}
        with _refusing(self.path), zipfile.ZipFile(self.path) as archive:
            for name in self.tensors if names is None else names:
                tensor = self.tensors[name]
                storage = tensor.storage
                if storage.member not in buffers:
                    content = bytearray(archive.read(storage.member))
                    buffers[storage.member] = (
                        torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0)
                    )
                numbers = buffers[storage.member].view(storage.dtype) if storage.count else torch.empty(0)
                found[name] = numbers.to(storage.dtype).as_strided(tensor.shape, tensor.stride, tensor.offset)
        return found


def read_lightning(path: str | Path) -> LightningCheckpoint:
    """Open a Lightning checkpoint; nothing in it is executed, and no tensor is read yet.

    Raises:
        RsedgeError: It is missing, of the format before torch 1.6, damaged, has no ``state_dict``, or describes tensors
            that its storages cannot hold.
    """
    path = Path(path)
    if not path.is_file():
        raise RsedgeError(f"cannot read {path}: there is no such file")
    with path.open("rb") as stream:
        start = stream.read(4)
    if start[:1] == b"\x80":
        _refuse(
            path,
            "it is of the format that torch.save had before version 1.6: where you trust the file, load it with "
            "torch.load and save it again with torch.save",
        )
    if not start.startswith(b"PK"):
        _refuse(path, "it is no file of torch.save: give a Lightning .ckpt")
    with _refusing(path), zipfile.ZipFile(path) as archive:
        content = _unpickle(path, archive)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        keys = sorted(str(key) for key in content)[:8] if isinstance(content, dict) else type(content).__name__
        _refuse(path, f"it has no state_dict (found {keys}): give a Lightning .ckpt")
    # dict's own method: a pickle may have put an attribute named items on an OrderedDict.
    entries = dict.items(state)
    strange = [str(name) for name, value in entries if not (isinstance(name, str) and isinstance(value, StoredTensor))]
    if strange:
        _refuse(path, f"entries of its state_dict are no plain tensors: {', '.join(strange[:5])}")
    found = content.get("hyper_parameters")
    # Lightning's own dictionaries are classes of its own.
    pairs = found.items if isinstance(found, Inert) else list(dict.items(found)) if isinstance(found, dict) else []
    return LightningCheckpoint(
        path=path,
        tensors={str(name): value for name, value in entries},
        hyper_parameters={str(pair[0]): pair[1] for pair in pairs if isinstance(pair, tuple) and len(pair) == 2},
    )


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or hostile file provokes into one error."""
    try:
        yield
    except RsedgeError:
        raise
    except Exception as error:
        reason = str(error)[:500] or type(error).__name__
        raise RsedgeError(f"cannot read {path}: it is damaged ({reason}): download it again") from error


def _refuse(path: Path, reason: str) -> NoReturn:
    raise RsedgeError(f"cannot read {path}: {reason}")


def _unpickle(path: Path, archive: zipfile.ZipFile) -> Any:
    members = archive.infolist()
    # torch.save compresses nothing; so nothing in the file can be larger than the file.
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in members):
        _refuse(path, "its archive is compressed, which torch.save never does: do not use it")
    if sum(entry.file_size for entry in members) > path.stat().st_size:
        _refuse(path, "its archive promises more bytes than the file has: download it again")
    pickles = [entry.filename for entry in members if entry.filename.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        _refuse(path, "it is a zip archive, but none of torch.save: give a Lightning .ckpt")
    root = pickles[0].removesuffix("data.pkl")
    sizes = {entry.filename: entry.file_size for entry in members}
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in sizes else b"little"
    if order != b"little":
        _refuse(path, f"its numbers are stored {order.decode(errors='replace')}-endian: save it on a usual machine")
    data = archive.read(pickles[0])
    # What only a crafted pickle has is refused before anything is interpreted.
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in _REFUSED:
            _refuse(path, f"its pickle has the opcode {opcode.name}, which torch.save never writes: do not use it")
        # Room is made for as many objects as the highest number given to one.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            _refuse(path, "its pickle numbers its objects as torch.save never does: do not use it")
    return _Unpickler(data, root, sizes).load()


class _Unpickler(pickle._Unpickler):  # the one in Python, whose steps can be watched
    """An unpickler for which every name is one of few, or inert."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(self, data: bytes, root: str, sizes: dict[str, int]) -> None:
        super().__init__(io.BytesIO(data))
        self._root, self._sizes = root, sizes
        # Functions of this object alone: a pickle can set attributes of what it is given.
        self._known = _rebuilders()
        self._tuples: dict[int, tuple[Any, int]] = {}  # id → the tuple, kept so that the id stays its own; its size

    def _weigh(self) -> None:
        """See how large the tuple on the stack is, its parts counted as often as they occur.

        A tuple of twice the same tuple, forty times over, takes nobody's memory and, as a key or in a message, more
        time than anyone has.
        """
        made = self.stack[-1]
        size = 1 + sum(self._tuples[id(part)][1] if id(part) in self._tuples else 1 for part in made)
        if size > _LARGEST_TUPLE:
            raise ValueError("it holds tuples in tuples without end")
        self._tuples[id(made)] = made, size

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in _CONTAINERS:
            return _CONTAINERS[name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        full = f"{module}.{name}"
        if full not in self._known:
            if len(self._known) > _MOST_NAMES:
                raise ValueError(f"it names more than {_MOST_NAMES} classes")
            self._known[full] = type("Inert", (Inert,), {"name": full})
        return self._known[full]

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), _, int(count)) if count >= 0:
                member = f"{self._root}data/{key}"
            case _:
                raise ValueError("a storage is not described as torch.save does")
        if member not in self._sizes:
            raise ValueError(f"the storage {key} is missing")
        if self._sizes[member] != count * dtype.itemsize:
            raise ValueError(
                f"the storage {key} has {self._sizes[member]} bytes, expected {count} numbers of {dtype.itemsize}"
            )
        return Storage(member, dtype, count)


def _load_and_weigh(load: Callable[[Any], None], unpickler: Any) -> None:
    """Make the tuple of an opcode, and weigh it."""
    load(unpickler)
    unpickler._weigh()


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _Unpickler.dispatch[_code[0]] = partial(_load_and_weigh, _Unpickler.dispatch[_code[0]])


def _rebuilders() -> dict[str, Callable[..., Any]]:
    """The functions that torch.save names, as functions that describe tensors; new ones at each call."""

    def tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        numbers = (offset, *shape, *stride)
        if not isinstance(storage, Storage) or len(shape) != len(stride) or len(shape) > 64:
            raise ValueError("a tensor is not described as torch.save does")
        if any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
            raise ValueError("a tensor's shape, strides or offset are no such numbers")  # which need not fit on a line
        elements = math.prod(shape)
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        # More elements than numbers are repeats, which a weight never has and which take memory without bound.
        if elements and (last >= storage.count or elements > storage.count):
            raise ValueError(
                f"a tensor of shape {list(shape)}, strides {list(stride)} and offset {offset} does not fit its storage "
                f"of {storage.count} numbers"
            )
        return StoredTensor(storage, offset, tuple(shape), tuple(stride))

    return {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    }
