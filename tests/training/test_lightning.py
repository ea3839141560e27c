"""Lightning checkpoints: the same as torch.load of files of our own, and nothing executed of files of others."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import struct
import zipfile
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from rsedge.errors import RsedgeError
from rsedge.training.rsdix.lightning import Inert, read_lightning


class Mapping(Enum):
    MLP = "mlp"


class Options(dict):
    """Stands for Lightning's AttributeDict."""


class Filled:
    def __init__(self) -> None:
        self.rate = 0.1


def tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    kinds = {
        str(dtype): (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    }
    return {
        **kinds,
        "base": base,
        "transposed": base.t(),
        "column": base[:, 2],
        "corner": base[1:3, ::2],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2, 2) * 3),
        "constant": torch.nn.Parameter(torch.ones(2), requires_grad=False),
    }


def save(path: Path, content=None, **more) -> Path:
    torch.save({"state_dict": collections.OrderedDict(tensors()), **(content or {}), **more}, path)
    return path


def test_tensors_are_those_of_torch_load(tmp_path: Path):
    path = save(tmp_path / "a.ckpt")
    expected = torch.load(path, weights_only=False)["state_dict"]
    checkpoint = read_lightning(path)
    found = checkpoint.read()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].stride() == value.stride(), name
        assert torch.equal(found[name], value.detach()), name
        stored = checkpoint.tensors[name]
        assert (stored.dtype, stored.shape) == (value.dtype, tuple(value.shape))
    found["base"][0, 0] = 99
    assert found["transposed"][0, 0] == found["corner"].as_strided((1,), (1,), 0)[0] == 99  # they share numbers


def test_only_what_is_asked_for_is_read(tmp_path: Path):
    path = save(tmp_path / "a.ckpt", optimizer_states=[{"state": {0: {"exp_avg": torch.ones(5)}}}])
    assert list(read_lightning(path).read(["base", "scalar"])) == ["base", "scalar"]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_hyper_parameters_are_plain_and_classes_are_inert(tmp_path: Path, protocol: int):
    values = {
        "prefix_length": 40,
        "betas": (0.9, 0.99),
        "mapping_type": Mapping.MLP,
        "model": "clip",
        "none": None,
        "places": {Path("here")},
        "made": Filled(),
        "options": Options(a=1),
    }
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": tensors(), "hyper_parameters": values}, path, pickle_protocol=protocol)
    found = read_lightning(path).hyper_parameters
    assert {name: found[name] for name in ("prefix_length", "betas", "model", "none")} == {
        "prefix_length": 40,
        "betas": (0.9, 0.99),
        "model": "clip",
        "none": None,
    }
    kind = found["mapping_type"]
    assert isinstance(kind, Inert)
    assert (kind.name, kind.value) == (f"{__name__}.Mapping", "mlp")
    assert found["made"].state == {"rate": 0.1}
    assert found["options"].items == [("a", 1)]
    assert "Filled" in repr(found["made"])


def test_hyper_parameters_in_a_dictionary_of_lightnings_own(tmp_path: Path):
    path = save(tmp_path / "a.ckpt", hyper_parameters=Options(lr=0.1, mapping_type=Mapping.MLP))
    found = read_lightning(path).hyper_parameters
    assert found["lr"] == 0.1
    assert found["mapping_type"].value == "mlp"
    assert read_lightning(save(tmp_path / "b.ckpt")).hyper_parameters == {}


# Hostile files


class Command:
    """Runs a shell command when unpickled by Python."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


class Opener:
    """Makes a file when unpickled by Python, without any import of a shell."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


class Evaluated:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return eval, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.parametrize("kind", [Command, Opener, Evaluated])
@pytest.mark.parametrize("place", ["hyper_parameters", "callbacks", "key"])
def test_nothing_of_a_pickle_is_run(tmp_path: Path, kind, place):
    target = tmp_path / "run"
    content = (
        {"hyper_parameters": {"x": kind(target)}} if place == "hyper_parameters" else {"callbacks": [kind(target)]}
    )
    if place == "key":
        content = {"callbacks": {1: [kind(target)]}}
    path = save(tmp_path / "a.ckpt", content)
    found = read_lightning(path)
    assert not target.exists()
    assert torch.equal(found.read(["base"])["base"], tensors()["base"])
    if place == "hyper_parameters":
        assert isinstance(found.hyper_parameters["x"], Inert)
    torch.load(path, weights_only=False)  # the file does run in torch: the test can fail
    assert target.exists()


def rewrite(source: Path, target: Path, pickled: bytes, **more: bytes) -> Path:
    """``source`` with another data.pkl, stored as torch.save stores."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
        for name, content in more.items():
            new.writestr(f"{root}/{name}", content)
    return target


class Global:
    """Pickles as a call of any name with any arguments."""

    def __init__(self, name: str, *args) -> None:
        self.name, self.args = name, args


class Crafter(pickle._Pickler):
    """Writes names without looking them up."""

    def persistent_id(self, value):
        return value.args if isinstance(value, Global) and value.name == "persistent" else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Global) and value.name != "persistent":
            module, _, name = value.name.rpartition(".")
            self.write(f"c{module}\n{name}\n".encode())
            if value.args != (None,):
                self.save(value.args)
                self.write(b"R")
            return
        super().save(value, save_persistent_id)


def craft(value) -> bytes:
    stream = io.BytesIO()
    Crafter(stream, 2).dump(value)
    return stream.getvalue()


def storage(kind: str = "FloatStorage", key: str = "0", count: object = 24):
    return Global("persistent", "storage", Global(f"torch.{kind}", None), key, "cpu", count)


def tensor(place, offset=0, shape=(4, 6), stride=(6, 1)):
    return Global("torch._utils._rebuild_tensor_v2", place, offset, shape, stride, False, {})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.ckpt"
    torch.save({"state_dict": {"base": tensors()["base"]}}, path)
    return path


def test_a_crafted_tensor_is_read_if_it_is_sound(base: Path, tmp_path: Path):
    path = rewrite(base, tmp_path / "x.ckpt", craft({"state_dict": {"x": tensor(storage(), 2, (2, 3), (6, 2))}}))
    expected = tensors()["base"].flatten().as_strided((2, 3), (6, 2), 2)
    assert torch.equal(read_lightning(path).read()["x"], expected)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (tensor(storage(count=10**15)), "has 96 bytes, expected 1000000000000000 numbers"),
        (tensor(storage(count=-1)), "storage is not described"),
        (tensor(storage(count="24")), "storage is not described"),
        (tensor(storage(key="7")), "storage 7 is missing"),
        (tensor(storage(key="../../version")), "is missing"),
        (tensor(storage("DoubleStorage")), "expected 24 numbers of 8"),
        (tensor(storage("EvilStorage")), "storage is not described"),
        (tensor(storage(), 1), "does not fit its storage"),
        (tensor(storage(), 0, (4, 6), (6, 2)), "does not fit its storage"),
        (tensor(storage(), 0, (10**6, 10**6), (0, 0)), "does not fit its storage"),
        (tensor(storage(), 0, (4, 6), (6,)), "not described"),
        (tensor(storage(), -4), "offset"),
        (tensor(storage(), 0, (-4, 6)), "shape"),
        (tensor(storage(), 0, (4, 6), (-6, 1)), "strides"),
        (tensor(storage(), 0, (4.0, 6)), "shape"),
        (tensor(storage(), 0, (2**61, 2**61, 2**61), (1, 1, 1)), "does not fit its storage"),
        (tensor("storage"), "not described"),
        (Global("builtins.bytearray", 10**15), "no plain tensors: x"),
        (Global("torch.storage._load_from_bytes", b"x"), "no plain tensors: x"),
        (Global("torch.FloatStorage", 10**15), "damaged"),
    ],
)
def test_a_tensor_that_its_storage_cannot_hold_is_refused(base: Path, tmp_path: Path, value, words):
    path = rewrite(base, tmp_path / "x.ckpt", craft({"state_dict": {"x": value}}))
    with pytest.raises(RsedgeError) as error:
        read_lightning(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


PUT_FAR = b"\x80\x02}r\xff\xff\xff\x7f."  # an object numbered 2**31 - 1: room for as many would be made


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (PUT_FAR, "numbers its objects"),
        (b"\x80\x02(ios\nsystem\n.", "opcode INST"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02]" + b"]" * 3 + b".", "no state_dict"),
        (craft([1, 2]), "no state_dict (found list)"),
        (craft({"model": 1}), "no state_dict (found ['model'])"),
    ],
)
def test_a_crafted_or_broken_pickle_is_refused(base: Path, tmp_path: Path, pickled, words):
    path = rewrite(base, tmp_path / "x.ckpt", pickled)
    with pytest.raises(RsedgeError) as error:
        read_lightning(path)
    assert words in str(error.value)


@pytest.mark.parametrize("name", [b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict", b"os\nsystem"])
def test_a_pickle_cannot_change_this_program(base: Path, tmp_path: Path, name: bytes):
    """BUILD sets attributes of whatever stands on the stack: of our functions, and of the containers."""
    attack = b"c" + name + b"\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b0"
    path = rewrite(base, tmp_path / "x.ckpt", b"\x80\x02" + attack + craft({"state_dict": {}})[2:])
    with contextlib.suppress(RsedgeError):
        read_lightning(path)
    assert torch.equal(read_lightning(base).read()["base"], tensors()["base"])
    assert "__defaults__" not in vars(Inert)
    assert not hasattr(collections.OrderedDict, "__defaults__")


def test_an_attribute_named_items_misleads_nobody(base: Path, tmp_path: Path):
    state = b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb"
    pickled = b"\x80\x02}X\x0a\x00\x00\x00state_dict" + state + b"s."
    assert read_lightning(rewrite(base, tmp_path / "x.ckpt", pickled)).tensors == {}


class NestedGlobals:
    """The names of a command, a call of a call, and state for what stands there: all that a pickle can reach."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def crafted(self) -> list[Global]:
        touch = f"touch {self.target}"
        return [
            Global("os.system", touch),
            Global("posix.system", touch),
            Global("builtins.eval", f"__import__('os').system({touch!r})"),
            Global("builtins.exec", f"__import__('os').system({touch!r})"),
            Global("builtins.getattr", Global("os.path", None), "os"),
            Global("operator.methodcaller", "system", touch),
            Global("functools.partial", Global("os.system", None), touch),
            Global("torch.hub.load", "stranger/model", "x"),
            Global("torch.jit.load", str(self.target)),
            Global("numpy.f2py.crackfortran.eval_call", touch),
            Global("pickle.loads", b"cos\nsystem\n(X\x01\x00\x00\x00xtR."),
            Global("rsedge.training.rsdix.lightning._rebuilders", ()),
        ]


def test_no_name_in_a_pickle_is_looked_up(base: Path, tmp_path: Path):
    import sys

    target = tmp_path / "run"
    before = set(sys.modules)
    for value in NestedGlobals(target).crafted():
        path = rewrite(base, tmp_path / "x.ckpt", craft({"state_dict": {}, "callbacks": [value, {1: (value,)}]}))
        assert read_lightning(path).tensors == {}, value.name
    assert not target.exists()
    assert set(sys.modules) == before
    # The first is a payload where pickle itself reads it.
    pickle.loads(craft(NestedGlobals(target).crafted()[0]))
    assert target.exists()


def test_setstate_of_what_a_pickle_makes_runs_nothing(base: Path, tmp_path: Path):
    """BUILD calls __setstate__, or fills __dict__; here both only record."""
    target = tmp_path / "run"
    made = b"cos\nPopen\n(X\x01\x00\x00\x00xtR"
    state = b"}X\x0c\x00\x00\x00__setstate__" + b"cos\nsystem\ns"
    again = b"X" + struct.pack("<I", len(f"touch {target}")) + f"touch {target}".encode()
    attack = made + state + b"b" + again + b"b0"
    path = rewrite(base, tmp_path / "x.ckpt", b"\x80\x02" + attack + craft({"state_dict": {}})[2:])
    assert read_lightning(path).tensors == {}
    assert not target.exists()


@pytest.mark.parametrize("place", ["key", "shape", "element"])
def test_tuples_in_tuples_take_no_time(base: Path, tmp_path: Path, place: str):
    """Of forty steps each; as a key it would be hashed, and in a message be written out, 2**40 times."""
    nested = b"K\x01" + b"".join(b"\x85q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(40))
    content = {"key": b"}" + nested + b"K\x01s", "element": b"c__builtin__\nset\n(](" + nested + b"etR"}
    shape = craft(tensor(storage()))[2:-1].replace(b"K\x04K\x06\x86", nested, 1)
    assert nested in shape
    pickled = b"\x80\x02}X\x0a\x00\x00\x00state_dict}X\x01\x00\x00\x00x" + content.get(place, shape) + b"ss."
    with pytest.raises(RsedgeError, match="tuples in tuples without end"):
        read_lightning(rewrite(base, tmp_path / "x.ckpt", pickled))


def test_large_promises_take_no_memory(base: Path, tmp_path: Path):
    """Read in a process of its own that may take 300 MB more than it has."""
    import subprocess
    import sys

    bombs = {
        "declared storage": craft({"state_dict": {"x": tensor(storage(count=10**14))}}),
        "declared shape": craft({"state_dict": {"x": tensor(storage(), 0, (10**7, 10**7), (0, 0))}}),
        "bytearray": craft({"state_dict": {}, "x": Global("builtins.bytearray", 10**13)}),
        "range": craft({"state_dict": {}, "x": Global("builtins.list", Global("builtins.range", 10**12))}),
        "number of an object": PUT_FAR,
        "frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",
        "long text": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
        "long number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "depth": b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
    }
    files = [rewrite(base, tmp_path / f"{i}.ckpt", bomb) for i, bomb in enumerate(bombs.values())]
    squeezed = tmp_path / "squeezed.ckpt"
    with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(400 << 20))
    overlapping = tmp_path / "overlapping.ckpt"
    with zipfile.ZipFile(overlapping, "w") as archive:
        archive.writestr("archive/data.pkl", craft({"state_dict": {}}))
        for index in range(200):
            archive.writestr(f"archive/data/{index}", b"1234")
        for entry in archive.filelist[1:]:  # each is said to be a hundred megabytes at the same place
            entry.file_size = entry.compress_size = 100 << 20
    script = """
import resource, sys
from rsedge.errors import RsedgeError
from rsedge.training.rsdix.lightning import read_lightning
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        read_lightning(path).read()
    except RsedgeError as error:
        assert len(str(error)) < 1000, error
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    arguments = [sys.executable, "-c", script, *map(str, files), str(squeezed), str(overlapping)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 300 << 10  # KiB


def test_archives_that_are_not_torchs_are_refused(base: Path, tmp_path: Path):
    squeezed = tmp_path / "squeezed.ckpt"
    with zipfile.ZipFile(base) as old, zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    other = tmp_path / "other.ckpt"
    with zipfile.ZipFile(other, "w") as new:
        new.writestr("readme.txt", "x")
    big = rewrite(base, tmp_path / "big.ckpt", craft({"state_dict": {}}))
    with zipfile.ZipFile(base) as old, zipfile.ZipFile(big, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    legacy = tmp_path / "legacy.ckpt"
    torch.save({"state_dict": tensors()}, legacy, _use_new_zipfile_serialization=False)
    text = tmp_path / "text.ckpt"
    text.write_text("hello")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(base.read_bytes()[:-40])
    for path, words in (
        (squeezed, "compressed"),
        (other, "none of torch.save"),
        (big, "big-endian"),
        (legacy, "before version 1.6"),
        (text, "no file of torch.save"),
        (cut, "damaged"),
        (tmp_path / "none.ckpt", "no such file"),
    ):
        with pytest.raises(RsedgeError) as error:
            read_lightning(path)
        assert words in str(error.value), path


def test_numbers_that_changed_are_noticed(base: Path):
    content = base.read_bytes()
    number = tensors()["base"].numpy().tobytes()[:40]
    assert content.count(number) == 1
    base.write_bytes(content.replace(number, b"\x01" * 40))
    checkpoint = read_lightning(base)
    with pytest.raises(RsedgeError, match="CRC"):
        checkpoint.read()


def test_a_shape_that_no_message_could_show(base: Path, tmp_path: Path):
    nested: Any = [1]
    for _ in range(40):
        nested = [nested, nested]
    path = rewrite(base, tmp_path / "x.ckpt", craft({"state_dict": {"x": tensor(storage(), 0, nested, nested)}}))
    with pytest.raises(RsedgeError, match="tensor"):
        read_lightning(path)


def test_a_name_makes_one_class_and_there_are_at_most_ten_thousand(base: Path, tmp_path: Path):
    same = b"\x80\x02(" + b"ca\nb\n" * 20_000 + b"l."
    with pytest.raises(RsedgeError, match="no state_dict"):
        read_lightning(rewrite(base, tmp_path / "x.ckpt", same))
    many = b"\x80\x02(" + b"".join(b"ca\nb%d\n" % number for number in range(10_100)) + b"l."
    with pytest.raises(RsedgeError, match="more than 10000 classes"):
        read_lightning(rewrite(base, tmp_path / "x.ckpt", many))
