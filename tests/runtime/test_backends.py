"""The choice of a backend: by what works, said aloud; by name, or not at all."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rsedge.bundle import EmbeddingSpec, read_bundle
from rsedge.errors import BackendError, BundleError, OptionError
from rsedge.runtime.engines.choose import choose_backend, end_problems, open_bundle
from rsedge.runtime.engines.tensorrt.backend import TrtBackend
from rsedge.runtime.engines.tensorrt.build import Limits
from tests.fake_cuda import FakeCuda
from tests.runtime.trt_machines import make_machine

USUAL = {"cpu": 16, "cuda": 32}


def test_auto_takes_tensorrt_where_it_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    make_machine(monkeypatch, tmp_path / "cache")
    choice = choose_backend("auto", "auto", "fp16")
    assert (choice.kind, choice.device, choice.reason) == ("tensorrt", "cuda:0", "TensorRT is usable")
    assert choose_backend("tensorrt", "cuda", "fp32").reason == "TensorRT was asked for"
    assert choose_backend("onnxruntime", "auto", "fp16").kind == "onnxruntime"


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_auto_goes_on_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str):
    make_machine(monkeypatch, tmp_path / "cache", cuda=FakeCuda(devices=0))
    choice = choose_backend("auto", device, "fp16")
    assert choice.kind == "onnxruntime"
    why = "; without TensorRT: there is no CUDA device 0: the driver knows 0"
    assert choice.reason.endswith(why) == (device == "auto"), choice.reason


@pytest.mark.parametrize(
    ("device", "precision", "cuda", "reason"),
    [
        ("cpu", "fp16", FakeCuda(), "runs on NVIDIA GPUs only"),
        ("auto", "int8", FakeCuda(), "an int8 bundle is made for CPUs"),
        ("auto", "fp16", FakeCuda(devices=0), "the driver knows 0"),
        ("cuda:3", "fp16", FakeCuda(), "there is no CUDA device 3: the driver knows 1"),
        ("auto", "fp16", FakeCuda(error=35), "driver version is insufficient"),
    ],
)
def test_by_name_it_never_falls_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, precision: str, cuda: FakeCuda, reason: str
):
    make_machine(monkeypatch, tmp_path / "cache", cuda=cuda)
    with pytest.raises(BackendError, match=reason):
        choose_backend("tensorrt", device, precision)


def test_values_are_checked():
    with pytest.raises(OptionError, match="backend is 'torch', expected auto, onnxruntime, tensorrt"):
        choose_backend("torch", "auto", "fp16")
    with pytest.raises(OptionError, match="device is 'tpu'"):
        choose_backend("auto", "tpu", "fp16")


def test_without_cuda_python_nothing_breaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    assert choose_backend("auto", "auto", "fp16").kind == "onnxruntime"
    with pytest.raises(BackendError, match="cuda-python is not installed"):
        choose_backend("tensorrt", "auto", "fp16")


def test_a_bundle_is_opened_and_its_engines_are_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "rsedge")
    machine = make_machine(monkeypatch, tmp_path / "cache")
    _, backend, _, size = open_bundle(bundle_path, device="auto", threads=None, batch_size=4, usual=USUAL)
    assert (backend.name, size) == ("tensorrt", 4)
    assert len(machine.trt.builds) == 3
    assert "on cuda:0 with tensorrt: TensorRT is usable" in caplog.text
    open_bundle(bundle_path, device="auto", threads=None, batch_size=2, usual=USUAL)
    assert len(machine.trt.builds) == 3, "a smaller batch runs on the engines that are there"


def test_where_a_build_fails_auto_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path, caplog: pytest.LogCaptureFixture
):
    machine = make_machine(monkeypatch, tmp_path / "cache")
    machine.trt.problem = "Could not find any implementation"
    arguments = {"device": "auto", "threads": 1, "batch_size": 4, "usual": USUAL}
    _, backend, _, _ = open_bundle(bundle_path, **arguments)  # type: ignore[arg-type]
    assert backend.name == "onnxruntime"
    assert "TensorRT fails, going on with ONNX Runtime" in caplog.text
    assert "Could not find any implementation" in caplog.text
    with pytest.raises(BackendError, match="Could not find any implementation"):
        open_bundle(bundle_path, backend="tensorrt", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", ["an engine is refused", "another engine is refused", "no runtime"])
def test_where_engines_do_not_load_auto_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path, caplog: pytest.LogCaptureFixture, fault: str
):
    machine = make_machine(monkeypatch, tmp_path / "cache")
    if fault == "no runtime":
        machine.trt.refuse_runtime, said = True, "factory function returned nullptr"
    else:
        machine.trt.refuse = said = "Serialization assertion failed"
        machine.trt.accepts = int("another" in fault)
    arguments = {"device": "auto", "threads": 1, "batch_size": 4, "usual": USUAL}
    _, backend, reason, _ = open_bundle(bundle_path, **arguments)  # type: ignore[arg-type]
    assert backend.name == "onnxruntime"
    assert "; without TensorRT: TensorRT 11.4.0.106 " in reason
    assert "TensorRT fails, going on with ONNX Runtime" in caplog.text
    assert said in caplog.text
    assert not machine.cuda.device, "the memory of what failed is there for what takes its place"
    assert not machine.cuda.streams
    with pytest.raises(BackendError, match=re.escape(said)):
        open_bundle(bundle_path, backend="tensorrt", **arguments)  # type: ignore[arg-type]


def test_what_was_opened_ahead_is_handed_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path):
    machine = make_machine(monkeypatch, tmp_path / "cache")
    bundle, backend, _, _ = open_bundle(bundle_path, device="auto", threads=None, batch_size=4, usual=USUAL)
    contexts = machine.trt.contexts
    graphs = [backend.open(bundle.graph_path("vision")) for _ in range(2)]
    assert machine.trt.contexts == contexts + 1, "the first was there"
    assert graphs[0] is not graphs[1]


def test_engines_built_ahead_for_no_more_than_the_defaults_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path
):
    machine, bundle = make_machine(monkeypatch, tmp_path / "cache"), read_bundle(bundle_path)
    usual = bundle.manifest.generation
    assert usual
    tight = Limits(images=4, beams=usual.num_beams, tokens=usual.max_new_tokens)
    assert tight != Limits.of(bundle.manifest, images=4), "else this proves nothing"
    TrtBackend(bundle, limits=tight).prepare(exact=True)
    open_bundle(bundle_path, device="auto", threads=None, batch_size=4, usual=USUAL)
    assert len(machine.trt.builds) == 3
    open_bundle(bundle_path, device="auto", threads=None, batch_size=4, usual=USUAL, beams=usual.num_beams + 1)
    assert len(machine.trt.builds) > 3


def test_graphs_that_lack_what_a_captioner_asks_for_are_refused(bundle_path: Path, tmp_path: Path):
    manifest = read_bundle(bundle_path).manifest
    assert end_problems(manifest) == []
    swapped = {**manifest.graphs, "vision": manifest.graphs["step"], "step": manifest.graphs["vision"]}
    assert [problem[:23] for problem in end_problems(replace(manifest, graphs=swapped))] == [
        "its graph vision lacks ",
        "its graph step lacks le",
    ]
    folder = Path(shutil.copytree(bundle_path, tmp_path / "x.rsedge"))
    (folder / "manifest.json").write_bytes(replace(manifest, graphs=swapped).to_json())
    with pytest.raises(BundleError, match="its graph vision lacks pixels"):
        open_bundle(folder, device="cpu", threads=1, batch_size=1, usual=USUAL)


def test_embeddings_of_another_length_are_refused(bundle_path: Path):
    manifest = read_bundle(bundle_path).manifest
    embedding = replace(manifest, family="clip", decoder=None, tokens=None, embedding=EmbeddingSpec(dim=7))
    assert end_problems(embedding) == ["its graph vision gives no embeddings of 7 numbers"]


def test_a_graph_that_fails_is_an_error_of_the_bundle_and_prints_nothing(bundle_path: Path, capfd):
    from rsedge.runtime.engines.ort import OrtBackend

    graph = OrtBackend("cpu", threads=1).open(bundle_path / "vision.onnx")
    with pytest.raises(BundleError, match=r"cannot run .*vision\.onnx"):
        graph.run({"pixels": np.zeros((1, 3, 3, 3), np.uint8)}, ["cross_k.0"])
    onnx = pytest.importorskip("onnx")
    ends = [onnx.helper.make_tensor_value_info(name, kind, ["n"]) for name, kind in (("x", 1), ("i", 7), ("y", 1))]
    node = onnx.helper.make_node("Gather", ["x", "i"], ["y"], name="\x1b]0;title\x07")
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", ends[:2], ends[2:]), opset_imports=[onnx.helper.make_opsetid("", 20)]
    )
    model.ir_version = 9
    path = bundle_path.parent / "hostile.onnx"
    onnx.save(model, path)
    graph = OrtBackend("cpu", threads=1).open(path)
    with pytest.raises(BundleError, match="out of data bounds"):
        graph.run({"x": np.zeros(1, np.float32), "i": np.array([9])}, ["y"])
    assert capfd.readouterr().err == ""
