"""Graphs from strangers: what the exporter writes passes, and nothing else reaches a loader."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import rsedge
from rsedge.bundle import Graph, TensorSpec, describe_graph, read_bundle
from rsedge.errors import BundleError
from rsedge.graphcheck import OPERATORS, graph_problems, read_model

BUILTIN = Path(rsedge.__file__).parent / "builtin"


# What the exporter writes


def exported(folder: Path):
    """Every graph of every family, mapper, activation, precision and way to change the size, as a path."""
    from rsedge.export.graphs.builder import ACTIVATIONS, PRECISIONS
    from rsedge.export.loading import load_checkpoint
    from tests.clipcap_models import make_clipcap
    from tests.dual_encoders import make_clip, make_siglip
    from tests.models import make_blip

    paths = [make_blip(folder / "blip", tied=False), make_clip(folder / "clip"), make_siglip(folder / "siglip")]
    paths += [make_clipcap(folder / mapper, mapper=mapper) for mapper in ("mlp", "transformer")]
    activations = [make_blip(folder / f"blip-{act}", hidden_act=act, layers=1) for act in ACTIVATIONS]
    cases = [*itertools.product(paths, PRECISIONS, (1, 2)), *itertools.product(activations, ("fp32",), (1,))]
    for path, precision, factor in cases:
        checkpoint = load_checkpoint(path)
        plan = checkpoint.model_type.plan(checkpoint, factor * checkpoint.settings.image_size)
        for role, graph in plan.graphs(precision).items():
            target = folder / f"{path.name}-{precision}-{factor}-{role}.onnx"
            graph.save(target)
            yield target


def described(path: Path) -> Graph:
    model = onnx.load(str(path), load_external_data=False)

    def ends(values):
        return [
            TensorSpec(
                name=value.name,
                dtype=np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)).name,
                shape=tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
        ]

    opset = next((entry.version for entry in model.opset_import if not entry.domain), 1)
    return describe_graph(
        path.parent, path.name, opset=opset, inputs=ends(model.graph.input), outputs=ends(model.graph.output)
    )


def test_every_graph_of_the_exporter_passes_and_makes_up_the_list_of_operators(tmp_path: Path):
    pytest.importorskip("transformers")
    written = {"Identity", "ReduceLogSumExp"}  # of earlier versions
    for path in exported(tmp_path):
        assert graph_problems(tmp_path, described(path)) == [], path.name
        # The onnx package is the oracle of the reader.
        nodes = onnx.load(str(path)).graph.node
        written |= {f"{node.domain}.{node.op_type}".lstrip(".") for node in nodes}
        model = read_model(path)
        assert [(node.kind, node.inputs, node.outputs) for node in model.nodes] == [
            (f"{node.domain}.{node.op_type}".lstrip("."), tuple(node.input), tuple(node.output)) for node in nodes
        ]
    assert written == OPERATORS


@pytest.mark.parametrize("name", ["selftest", "sentinel2-rgb"])
def test_the_built_in_bundles_pass(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RSEDGE_CACHE", str(tmp_path))
    assert read_bundle(BUILTIN / f"{name}.rsedge").manifest.graphs


def test_the_reader_agrees_with_onnx_on_weights(tmp_path: Path):
    arrays = {
        "f": np.ones((2, 3), np.float32),
        "h": np.ones(4, np.float16),
        "i": np.array([-1, 2**40, -(2**63)]),
        "empty": np.ones((0, 5), np.float32),
        "scalar": np.array(7, np.int64),
        "flag": np.array([True, False]),
    }
    write(tmp_path / "g.onnx", weights=[numpy_helper.from_array(array, name) for name, array in arrays.items()])
    found = {tensor.name: tensor for tensor in read_model(tmp_path / "g.onnx").initializers}
    assert {name: (tensor.shape, tensor.nbytes) for name, tensor in found.items()} == {
        name: (array.shape, array.nbytes) for name, array in arrays.items()
    }
    assert found["i"].values == tuple(arrays["i"])
    assert found["scalar"].values == (7,)
    assert found["f"].values is None


# What a stranger writes


def write(
    path: Path,
    *,
    nodes: list[onnx.NodeProto] | None = None,
    weights: list[TensorProto] | None = None,
    change: Callable[[onnx.ModelProto], object] = lambda model: None,
) -> Graph:
    """A small sound graph, or what is made of it, and what its manifest would say of it."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])] if nodes is None else nodes
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight] if weights is None else weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    change(model)
    path.write_bytes(model.SerializeToString())
    specs = [TensorSpec(name=name, dtype="float32", shape=("batch", 4)) for name in "xy"]
    size = path.stat().st_size
    return Graph(file=path.name, sha256="0" * 64, size=size, opset=20, inputs=(specs[0],), outputs=(specs[1],))


def ints(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def huge(**settings) -> TensorProto:
    return TensorProto(name="w", data_type=TensorProto.FLOAT, **settings)


def body() -> onnx.GraphProto:
    return helper.make_graph([], "body", [], [])


NODE = helper.make_node
HOSTILE: dict[str, tuple[dict, str]] = {
    "operator of another library": (
        {"nodes": [NODE("Run", ["x"], ["y"], domain="evil")], "change": lambda m: m.opset_import.add(domain="evil")},
        "imports operators of 'evil'",
    ),
    "operator of a library that is not imported": ({"nodes": [NODE("Run", ["x"], ["y"], domain="evil")]}, "'evil.Run'"),
    "compiled blob": (
        {"nodes": [NODE("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="/tmp/x.bin")]},
        "'com.microsoft.EPContext'",
    ),
    "python operator": ({"nodes": [NODE("PyOp", ["x"], ["y"], domain="com.microsoft")]}, "'com.microsoft.PyOp'"),
    "loop": ({"nodes": [NODE("Loop", ["n", "c"], ["y"], body=body())]}, "its Attribute has the field 6"),
    "if": ({"nodes": [NODE("If", ["c"], ["y"], then_branch=body(), else_branch=body())]}, "Attribute has the field 6"),
    "scan": ({"nodes": [NODE("Scan", ["x"], ["y"], body=body(), num_scan_inputs=1)]}, "Attribute has the field 6"),
    "loop without a body": ({"nodes": [NODE("Loop", ["n", "c"], ["y"])]}, "the operator 'Loop'"),
    "constant from a file": (
        {"nodes": [NODE("Constant", [], ["y"], value=huge(dims=[1]))]},
        "its Attribute has the field 5",
    ),
    "giant constant": ({"nodes": [NODE("ConstantOfShape", ["s"], ["y"])]}, "the operator 'ConstantOfShape'"),
    "random numbers": ({"nodes": [NODE("RandomNormal", [], ["y"], shape=[1 << 40])]}, "the operator 'RandomNormal'"),
    "function": (
        {
            "change": lambda m: m.functions.append(
                helper.make_function("", "MatMul", ["x"], ["y"], [], [helper.make_opsetid("", 20)])
            )
        },
        "its Model has the field 25",
    ),
    "settings of the loader": (
        {"change": lambda m: helper.set_model_props(m, {"ort_config": "{}"})},
        "its Model has the field 14",
    ),
    "another opset": ({"change": lambda m: setattr(m.opset_import[0], "version", 21)}, "the manifest says 20"),
    "two opsets": (
        {"change": lambda m: m.opset_import.append(helper.make_opsetid("", 7))},
        "imports two versions of the operators of ''",
    ),
    "other input": ({"change": lambda m: setattr(m.graph.input[0], "name", "z")}, "has other inputs than"),
    "other shape": (
        {"change": lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 1 << 40)},
        "has other outputs than",
    ),
    "sequence": (
        {"change": lambda m: m.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", 1, ["batch", 4]))},
        "its Type has the field 4",
    ),
    "weight without bytes": ({"weights": [huge(dims=[1 << 20, 1 << 19])]}, "has 0 bytes, its shape"),
    "weight with few bytes": ({"weights": [huge(dims=[1 << 20], raw_data=b"1234")]}, "has 4 bytes, its shape"),
    "weight beyond numbers": ({"weights": [huge(dims=[1 << 62] * 8)]}, "impossible shape"),
    "weight of negative length": ({"weights": [huge(dims=[-4, -1], raw_data=b"1234" * 4)]}, "impossible shape"),
    "weight of many axes": ({"weights": [huge(dims=[1] * 100_000, raw_data=b"1234")]}, "impossible shape"),
    "weight given twice": ({"weights": [ints("w", 1), ints("w", 2)]}, "gives an initializer twice"),
    "texts": ({"weights": [TensorProto(name="w", data_type=8, dims=[1])]}, "has the data type 8"),
    "numbers in place of bytes": ({"weights": [helper.make_tensor("w", 1, [1], [1.0])]}, "Tensor has the field 4"),
    "weight here and elsewhere": (
        {"weights": [huge(dims=[1], raw_data=b"1234", external_data=[{"key": "location", "value": "w"}])]},
        "both here and elsewhere, or nowhere",
    ),
    "weight nowhere": ({"weights": [huge(dims=[1], data_location=1)]}, "both here and elsewhere, or nowhere"),
    "weight in memory": (
        {
            "weights": [
                huge(dims=[4], data_location=1, external_data=[{"key": "location", "value": "*/_ORT_MEM_ADDR_/*"}])
            ]
        },
        "which the manifest does not list",
    ),
    "expand": (
        {
            "nodes": [NODE("Expand", ["x", "s"], ["y"])],
            "weights": [ints("s", 1 << 40, 1)],
        },
        "Expand with a constant length",
    ),
    "range of constants": (
        {"nodes": [NODE("Range", ["a", "b", "a"], ["y"])], "weights": [ints("a", 1), ints("b", 1 << 23)]},
        "Range that makes a constant of constants",
    ),
    "range of floats": (
        {
            "nodes": [NODE("Range", ["a", "x", "a"], ["y"])],
            "weights": [numpy_helper.from_array(np.array(1e-30, np.float32), "a")],
        },
        "Range with a constant length",
    ),
    "product of constants": (
        {
            "nodes": [NODE("MatMul", ["a", "b"], ["y"])],
            "weights": [
                numpy_helper.from_array(np.ones(shape, np.float32), name)
                for name, shape in (("a", (9, 1)), ("b", (1, 9)))
            ],
        },
        "MatMul that makes a constant of constants",
    ),
    "doubling": (
        {
            "nodes": [NODE("Concat", [str(i)] * 2, [str(i + 1)], axis=0) for i in range(40)],
            "weights": [ints("0", 1)],
        },
        "Concat that makes a constant of constants",
    ),
    "long name": ({"nodes": [NODE("MatMul", ["x" * 5000], ["y"])]}, "longer than 1024 bytes"),
}


def test_the_sound_graph_passes(tmp_path: Path):
    assert graph_problems(tmp_path, write(tmp_path / "g.onnx")) == []


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_is_refused_before_it_is_loaded(tmp_path: Path, name: str):
    settings, words = HOSTILE[name]
    (problem, *_) = graph_problems(tmp_path, write(tmp_path / "g.onnx", **settings))
    assert words in problem
    assert problem.startswith("g.onnx ")
    assert problem.endswith("export again")


@pytest.mark.parametrize(
    ("entries", "size", "words"),
    [
        ({}, 64, ""),
        ({"offset": "0", "length": "64"}, 64, ""),
        ({"offset": "4"}, 64, "bytes 4 to 68 of w.data, which has 64"),
        ({"length": "60"}, 64, "its shape [4, 4] needs 64"),
        ({"offset": "-4"}, 64, "no number"),
        ({"offset": "9" * 30}, 64, "no number"),
        ({"offset": "٣"}, 64, "no number"),
        ({}, 63, "bytes 0 to 64 of w.data, which has 63"),
    ],
)
def test_weights_beyond_the_file_are_refused(tmp_path: Path, entries: dict[str, str], size: int, words: str):
    external = [{"key": key, "value": value} for key, value in {"location": "w.data", **entries}.items()]
    tensor = huge(dims=[4, 4], data_location=1, external_data=external)
    graph = write(tmp_path / "g.onnx", weights=[tensor])
    (tmp_path / "w.data").write_bytes(b"0" * size)
    listed = rsedge.bundle.describe_file(tmp_path, "w.data")
    found = graph_problems(tmp_path, replace(graph, external_data=(listed,)))
    assert words in "".join(found[:1])
    assert bool(words) == bool(found)


def test_a_stretch_of_a_file_is_no_weight_of_a_thousand_tensors(tmp_path: Path):
    weights = [
        TensorProto(
            name=f"w{i}", data_type=1, dims=[16], data_location=1, external_data=[{"key": "location", "value": "w"}]
        )
        for i in range(1000)
    ]
    graph = write(tmp_path / "g.onnx", weights=weights)
    (tmp_path / "w").write_bytes(b"0" * 64)
    graph = replace(graph, external_data=(rsedge.bundle.describe_file(tmp_path, "w"),))
    assert "takes 64000 bytes of weights from w, which has 64" in graph_problems(tmp_path, graph)[0]


def test_fields_without_end_are_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rsedge.graphcheck._MOST_FIELDS", 100)
    attribute = helper.make_attribute("ints", list(range(300)))
    node = NODE("MatMul", ["x", "w"], ["y"])
    node.attribute.append(attribute)
    assert "more than 100 fields" in graph_problems(tmp_path, write(tmp_path / "g.onnx", nodes=[node]))[0]
    # Packed, the same numbers are one field of the file.
    packed = b"\x42" + b"\xac\x02" + bytes(range(100)) * 3
    message = b"\x2a" + _length(packed) + packed
    node = b"\x0a" + _length(message) + message
    graph = b"\x3a" + _length(node) + node
    (tmp_path / "packed.onnx").write_bytes(graph)
    with pytest.raises(BundleError, match="more than 100 fields"):
        read_model(tmp_path / "packed.onnx")


def _length(content: bytes) -> bytes:
    """A protobuf length."""
    low, high = len(content) & 0x7F, len(content) >> 7
    return bytes([low | 0x80, high]) if high else bytes([low])


def test_changed_bytes_are_read_as_onnx_reads_them_or_refused(tmp_path: Path):
    """Mutations: never another exception, and never other operators or files than onnx would load."""
    graph = write(tmp_path / "g.onnx", weights=[ints("a", 1, 2), ints("b", 3)])
    whole, draw, path = (tmp_path / "g.onnx").read_bytes(), random.Random(0), tmp_path / "m.onnx"
    refused = 0
    for _ in range(2_000):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(len(content))
            match draw.randrange(3):
                case 0:
                    content[place] = draw.randrange(256)
                case 1:
                    del content[place : place + draw.randrange(1, 9)]
                case _:
                    content[place:place] = draw.randbytes(draw.randrange(1, 9))
            if not content:
                break
        path.write_bytes(content)
        if graph_problems(tmp_path, replace(graph, file="m.onnx")):
            refused += 1
            continue
        model = onnx.load_from_string(bytes(content))
        assert {node.op_type for node in model.graph.node} <= OPERATORS
        assert not any(tensor.external_data for tensor in model.graph.initializer)
        assert not any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute)
    assert 1_000 < refused < 2_000
