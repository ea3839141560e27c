"""Building engines: what is reported, what is refused, and what the graphs ask of TensorRT's parser."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from rsedge.bundle import Bundle, read_bundle
from rsedge.errors import BackendError, OptionError
from rsedge.runtime.engines.tensorrt.backend import ENGINES, TrtBackend
from rsedge.runtime.engines.tensorrt.build import (
    BuildProgress,
    BuildSettings,
    Limits,
    fitting,
    import_tensorrt,
    profiles,
    widened,
)
from tests.runtime.trt_api import VERSIONS
from tests.runtime.trt_machines import Machine, make_machine
from tests.runtime.trt_operators import CONSTANT_INPUTS, PARSER_OPERATORS


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return make_machine(monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="module")
def half_bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """One fp16 bundle of every family."""
    from rsedge.export.convert import export
    from tests.clipcap_models import make_clipcap
    from tests.dual_encoders import make_clip, make_siglip
    from tests.models import make_blip

    root = tmp_path_factory.mktemp("families")
    makers = {"blip": make_blip, "clip": make_clip, "siglip": make_siglip, "clipcap": make_clipcap}
    made = []
    for name, make in makers.items():
        made.append(export(make(root / name), root / f"{name}.rsedge", precision="fp16"))
    return made


def graphs(bundles: list[Bundle]) -> Iterator[tuple[str, onnx.GraphProto]]:
    for bundle in bundles:
        for role in bundle.manifest.graphs:
            if role in ENGINES:
                yield f"{bundle.path.name}/{role}", onnx.load(bundle.graph_path(role)).graph


@pytest.mark.parametrize("version", PARSER_OPERATORS)
def test_the_parser_knows_every_operator_of_every_family(half_bundles: list[Bundle], version: str):
    unknown = {
        f"{name}: {node.domain or 'ai.onnx'} {node.op_type}"
        for name, graph in graphs(half_bundles)
        for node in graph.node
        if node.domain or node.op_type not in PARSER_OPERATORS[version]
    }
    assert unknown == set()


def test_inputs_that_must_be_constant_are(half_bundles: list[Bundle]):
    wrong = []
    for name, graph in graphs(half_bundles):
        constants = {tensor.name for tensor in graph.initializer}
        wrong += [
            f"{name}: input {index} of {node.name}"
            for node in graph.node
            for index in CONSTANT_INPUTS.get(node.op_type, ())
            if len(node.input) > index and node.input[index] not in constants
        ]
    assert wrong == []


def test_types_are_in_the_graph(half_bundles: list[Bundle]):
    """A strongly typed network takes the graph's types: weights of matrix products must be float16 there."""
    for name, graph in graphs(half_bundles):
        weights = {tensor.name: numpy_helper.to_array(tensor).dtype for tensor in graph.initializer}
        found = {weights[node.input[1]] for node in graph.node if node.op_type == "Gemm"}
        assert found <= {np.dtype(np.float16)}, name


@pytest.mark.parametrize("version", VERSIONS)
def test_every_family_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, half_bundles: list[Bundle], version: str):
    machine = make_machine(monkeypatch, tmp_path / "cache", version=version)
    for bundle in half_bundles:
        TrtBackend(bundle).prepare()
    assert len(machine.trt.builds) == 3 + 2 + 2 + 3


def test_progress_tells_graph_phase_and_steps(machine: Machine, bundle_path: Path):
    seen: list[BuildProgress] = []
    threads = set()

    def report(progress: BuildProgress) -> None:
        seen.append(progress)
        threads.add(threading.get_ident())

    TrtBackend(read_bundle(bundle_path), report=report).prepare()
    assert {progress.role for progress in seen} == {"vision", "step", "self_cache"}
    assert [p.step for p in seen if p.role == "vision"] == [0, 1, 2], "the phases within are not told"
    assert threading.get_ident() not in threads


def test_a_refused_graph_names_every_node(machine: Machine, bundle_path: Path, monkeypatch: pytest.MonkeyPatch):
    missing = PARSER_OPERATORS["10.15"] - {"Gelu", "TopK"}
    monkeypatch.setitem(PARSER_OPERATORS, "10.15", missing)
    bundle = read_bundle(bundle_path)
    with pytest.raises(BackendError) as caught:
        TrtBackend(bundle).open(bundle.graph_path("step"))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("TensorRT 11.4.0.106 does not accept ")
    assert any("(TopK): No importer registered" in line for line in lines)
    assert sum("(Gelu)" in line for line in lines) >= 2


def test_a_failed_build_says_what_tensorrt_said(machine: Machine, bundle_path: Path):
    machine.trt.problem = "Could not find any implementation for node MatMul_7"
    bundle = read_bundle(bundle_path)
    with pytest.raises(BackendError, match="MatMul_7"):
        TrtBackend(bundle).open(bundle.graph_path("vision"))
    assert not list((machine.cache / "engines").glob("*.plan"))


def test_an_interrupt_ends_the_build(machine: Machine, bundle_path: Path):
    machine.trt.slow = lambda: signal.raise_signal(signal.SIGINT) or threading.Event().wait(0.5)
    with pytest.raises(KeyboardInterrupt):
        TrtBackend(read_bundle(bundle_path)).prepare()
    assert machine.trt.builds == []
    machine.trt.slow = lambda: None
    TrtBackend(read_bundle(bundle_path)).prepare()
    assert len(machine.trt.builds) == 3


def test_old_and_missing_tensorrt(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    machine.trt.__version__ = "8.6.1"
    with pytest.raises(BackendError, match=r"TensorRT is 8.6.1, rsedge needs 10.3"):
        import_tensorrt()
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(BackendError, match="system-site-packages"):
        import_tensorrt()


def test_a_tensorrt_without_its_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    folder = tmp_path / "site" / "tensorrt"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(__import__("sys").modules, "tensorrt", raising=False)
    with pytest.raises(BackendError, match=r"libnvinfer\.so\.10"):
        import_tensorrt()


def test_profiles_go_from_narrow_to_wide():
    made = profiles("step", Limits(images=8, beams=3, tokens=20))
    assert [profile["rows"] for profile in made] == [(1, 8, 8), (1, 24, 24)]
    assert made[0]["columns"] == (16, 32, 48), "the cache is never wider than the caption, rounded up, and a bucket"
    sizes = {"rows": 9, "columns": 16, "images": 3, "watched": 0, "top": 6}
    assert fitting(made, sizes) == 1
    assert fitting(made, sizes | {"rows": 25}) is None
    wider = widened(made, sizes | {"rows": 25})
    assert wider[-1]["rows"] == (1, 24, 32)
    assert fitting(wider, sizes | {"rows": 25}) == 1
    with pytest.raises(OptionError, match="at most 3839"):
        widened(made, {"top": 4000})


@pytest.mark.parametrize("wrong", [{"images": 0}, {"beams": 65}, {"tokens": 0}])
def test_limits_and_settings_are_checked(wrong: dict[str, int]):
    with pytest.raises(OptionError):
        Limits(**wrong)
    with pytest.raises(OptionError):
        BuildSettings(level=6)
    with pytest.raises(OptionError):
        BuildSettings(workspace=5)
