"""What runs on CUDA, as far as a CPU goes: fixed addresses, few shapes, captured graphs, and memory that runs out."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from rsedge import Captioner
from rsedge.bundle import read_bundle, write_bundle
from rsedge.export.convert import export
from rsedge.runtime import memory, ort
from rsedge.runtime.embedder import Embedder
from rsedge.runtime.fixed import FixedBatch
from rsedge.runtime.ort import OrtBackend, OrtGraph, default_batch_size
from rsedge.runtime.ort_cuda import Cudart
from tests.clipcap_models import make_clipcap
from tests.dual_encoders import TEXTS, make_clip
from tests.models import random_images

SETTINGS = (
    {"num_beams": 1},
    {"num_beams": 3, "max_new_tokens": 40},
    {"num_beams": 4, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "max_new_tokens": 30},
    {"top_k": 5, "seed": 1},
)
OUT_OF_MEMORY = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running MatMul node. Name:'MatMul_7' "
    "Status Message: bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 9437184",
    "CUDA failure 2: out of memory ; GPU=0 ; hostname=box ; file=cuda_allocator.cc ; line=19 ; expr=cudaMalloc(&p, n);",
    "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; expr=cublasCreate(&cublas_handle_);",
    "[defaultAllocator.cpp::allocateAsync::48] Error Code 1: Cuda Runtime (out of memory)",
    "std::bad_alloc",
)


@pytest.fixture(scope="module")
def clipcap_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clipcap")
    return export(make_clipcap(folder / "model", seed=2), folder / "clipcap.rsedge").path


@pytest.fixture(params=["blip", "clipcap"])
def path(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("bundle_path" if request.param == "blip" else "clipcap_path")


def fixed_captioner(path: Path, batch_size: int = 8, *, cuda_graphs: bool = False) -> Captioner:
    """A captioner on the CPU that keeps its caches as it would on CUDA."""
    backend = OrtBackend("cpu", threads=1, cuda_graphs=cuda_graphs)
    backend.fixed_addresses = True
    return Captioner(read_bundle(path), backend, device_reason="a test", batch_size=batch_size)


def tokens(captioner: Captioner, images: np.ndarray, **settings: Any) -> list[tuple[int, ...]]:
    return [caption.token_ids for caption in captioner.caption(images, **settings)]


def of_family(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, less what CLIPCap's search does not know."""
    known = read_bundle(path).manifest.family == "blip"
    unknown = set() if known else {"repetition_penalty", "no_repeat_ngram_size"}
    return {name: min(value, 14) if name == "max_new_tokens" and not known else value
            for name, value in settings.items() if name not in unknown}  # fmt: skip


class Replays:
    """ONNX Runtime's way with CUDA graphs: a binding runs three times to be captured, then it is what is replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured: dict[tuple[int, int, int], Any] = {}
        self.runs = 0
        self.plain = 0
        self._run = onnxruntime.InferenceSession.run_with_iobinding
        replays = self

        def run(session: Any, binding: Any, options: Any = None) -> None:
            number = int(options.get_run_config_entry("gpu_graph_id")) if options is not None else None
            if number in (None, -1):
                replays.plain += 1
                replays._run(session, binding, options)
                return
            replays.runs += 1
            key = (id(session), threading.get_ident(), number)
            for _ in range(1 if key in replays.captured else 3):
                replays._run(session, replays.captured.setdefault(key, binding), options)

        monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", run)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_fixed_addresses_and_few_shapes_change_no_token(path: Path, settings):
    images = random_images(21, 32, seed=2)
    settings = of_family(path, settings)
    expected = tokens(Captioner.load(path, device="cpu", threads=1, batch_size=4), images, **settings)
    assert len({len(caption) for caption in expected}) > 1, "captions must end at different times"
    for batch_size in (1, 3, 8, 32):
        assert tokens(fixed_captioner(path, batch_size), images, **settings) == expected


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_captured_graphs_are_replayed_with_the_same_result(path: Path, settings, monkeypatch):
    images = random_images(21, 32, seed=2)
    settings = of_family(path, settings)
    expected = tokens(fixed_captioner(path), images, **settings)
    replays = Replays(monkeypatch)
    captioner = fixed_captioner(path, cuda_graphs=True)
    assert tokens(captioner, images, **settings) == expected
    first = len(replays.captured)
    assert replays.runs > 2 * first, "a graph must be worth its capture"
    assert tokens(captioner, images, **settings) == expected
    assert len(replays.captured) == first, "the second time nothing is captured"
    assert tokens(captioner, images[:3], **settings) == expected[:3]


def test_what_is_captured_is_bounded_by_shapes_not_by_images(bundle_path, monkeypatch):
    replays = Replays(monkeypatch)
    captioner = fixed_captioner(bundle_path, cuda_graphs=True)
    tokens(captioner, random_images(40, 32, seed=3), num_beams=3, max_new_tokens=40)
    widths, batches, moves = 3, 4, 3  # 16, 32, 48 columns; 8, 4, 2, 1 slots; quarters of the rows that are copied
    assert len(replays.captured) <= widths * batches * (1 + moves)
    bindings = list(replays.captured.values())
    assert len({id(binding) for binding in bindings}) == len(bindings), "an id belongs to one binding"


def test_other_beams_and_larger_batches_get_memory_of_their_own(bundle_path, monkeypatch):
    replays = Replays(monkeypatch)
    captioner, images = fixed_captioner(bundle_path, cuda_graphs=True), random_images(8, 32, seed=4)
    plain = Captioner.load(bundle_path, device="cpu", batch_size=8)
    for count, beams in ((2, 1), (8, 1), (8, 3), (2, 3), (8, 1)):
        assert tokens(captioner, images[:count], num_beams=beams) == tokens(plain, images[:count], num_beams=beams)
    assert replays.runs


def test_only_hypotheses_continued_twice_are_copied(bundle_path, monkeypatch):
    copied: list[int] = []
    advance, write = FixedBatch.advance, FixedBatch._write

    def counted(self, lengths, origins, targets):
        assert not set(origins.tolist()) & set(targets.tolist()), "running again must change nothing"
        copied.append(len(origins))
        write(self, lengths, origins, targets)

    def counting(self, parents):
        monkeypatch.setattr(FixedBatch, "_write", counted)
        advance(self, parents)
        monkeypatch.setattr(FixedBatch, "_write", write)
        twice = len(parents) - len(set(parents.tolist()))
        assert copied[-1] == twice

    monkeypatch.setattr(FixedBatch, "advance", counting)
    captioner, images = fixed_captioner(bundle_path, 16), random_images(16, 32, seed=2)
    captioner.caption(images, num_beams=1, min_new_tokens=8, max_new_tokens=8)
    assert set(copied) == {0}
    captioner.caption(images, num_beams=3, min_new_tokens=8, max_new_tokens=8)
    assert max(copied) > 0


def test_the_next_images_are_encoded_meanwhile_and_once(bundle_path, monkeypatch):
    captioner, images = fixed_captioner(bundle_path), random_images(21, 32, seed=2)
    seen: list[tuple[str, int]] = []
    original = OrtGraph.run_on_device

    def run_on_device(self, feeds, **outputs):
        if "pixels" in feeds:
            seen.append((threading.current_thread().name, len(feeds["pixels"])))
        return original(self, feeds, **outputs)

    monkeypatch.setattr(OrtGraph, "run_on_device", run_on_device)
    captioner.caption(images)
    assert sum(count for _, count in seen) == 21
    assert all(name.startswith("rsedge-encoder") for name, _ in seen)
    assert {count for _, count in seen} == {2, 1}, "a quarter of the batch at a time"


def test_a_batch_is_kept_full(bundle_path, monkeypatch):
    used = []
    original = FixedBatch.step
    monkeypatch.setattr(FixedBatch, "step", lambda self, r: (used.append(len(r.tokens)), original(self, r))[1])
    fixed_captioner(bundle_path).caption(random_images(64, 32, seed=2), num_beams=1)
    steady = used[4 : used.index(max(used)) + len(used) // 2]
    assert np.mean(steady) > 0.75 * 8


def test_bundles_without_graphs_in_place_still_run(bundle_path, tmp_path):
    bundle = read_bundle(bundle_path)
    graphs = {role: graph for role, graph in bundle.manifest.graphs.items() if not role.endswith("_write")}

    def build(root: Path):
        for file in ("tokenizer.json", *(graph.file for graph in graphs.values())):
            (root / file).write_bytes((bundle_path / file).read_bytes())
        return dataclasses.replace(bundle.manifest, graphs=graphs)

    old = write_bundle(tmp_path / "old.rsedge", build)
    images = random_images(5, 32)
    assert tokens(fixed_captioner(old.path), images) == tokens(Captioner.load(bundle_path, device="cpu"), images)


def test_where_graphs_cannot_be_captured_captions_go_on_without(bundle_path, monkeypatch, caplog):
    images = random_images(9, 32)
    expected = tokens(fixed_captioner(bundle_path), images, num_beams=2)
    original = onnxruntime.InferenceSession.run_with_iobinding

    def run(session, binding, options=None):
        if options is not None and options.get_run_config_entry("gpu_graph_id") != "-1":
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
        original(session, binding, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", run)
    assert tokens(fixed_captioner(bundle_path, cuda_graphs=True), images, num_beams=2) == expected
    assert "running without them: CUDA failure 900" in caplog.text


def test_a_session_that_refuses_cuda_graphs_is_opened_without(bundle_path, monkeypatch, caplog):
    backend, asked = OrtBackend("cpu", cuda_graphs=True), []
    original = OrtBackend._session

    def session(self, path, capture):
        asked.append(capture)
        if capture:
            raise RuntimeError("This session cannot use the CUDA Graph feature as requested by the user")
        return original(self, path, capture)

    monkeypatch.setattr(OrtBackend, "_session", session)
    assert not backend.open(bundle_path / "step.onnx", capture=True).captures
    assert asked == [True, False]
    assert "step.onnx runs without CUDA graphs" in caplog.text


@pytest.mark.parametrize(("version", "sound"), [("1.30.0", False), ("1.31.1", True), ("2.0.0", True)])
def test_graphs_are_captured_only_where_that_is_sound(version, sound, monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", version)
    assert ort._captures_soundly(onnxruntime) is sound
    assert not OrtBackend("cpu").cuda_graphs


# --- memory that runs out ---------------------------------------------------------------------------------------------


def fail_beyond(monkeypatch: pytest.MonkeyPatch, most: int, message: str, names: tuple[str, ...]) -> list[int]:
    """Let runs whose first dimension exceeds ``most`` fail as an engine does; returns the sizes that went through."""
    sizes: list[int] = []
    run, fixed = OrtGraph.run, OrtGraph.run_on_device

    def check(feeds: Any) -> None:
        for name in names:
            if name in feeds:
                if len(feeds[name]) > most:
                    raise RuntimeError(message)
                sizes.append(len(feeds[name]))

    def checked_run(self, feeds, outputs):
        check(feeds)
        return run(self, feeds, outputs)

    def checked_fixed(self, feeds, **outputs):
        check({name: value for name, value in feeds.items() if isinstance(value, np.ndarray)})
        return fixed(self, feeds, **outputs)

    monkeypatch.setattr(OrtGraph, "run", checked_run)
    monkeypatch.setattr(OrtGraph, "run_on_device", checked_fixed)
    return sizes


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_batch_and_loses_nothing(bundle_path, message, monkeypatch, caplog):
    images, keys = random_images(23, 32, seed=2), list(range(50, 73))
    captioner = Captioner.load(bundle_path, device="cpu", batch_size=16)
    settings = {"top_k": 5, "seed": 3}
    expected = [caption.token_ids for caption in captioner.caption(images, keys=keys, **settings)]
    fail_beyond(monkeypatch, 5, message, ("tokens",))
    found = [caption.token_ids for caption in captioner.caption(images, keys=keys, **settings)]
    assert found == expected
    assert captioner.batch_size == 4
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [text.split(": ")[0] for text in warnings] == [
        f"captioning with {captioner.model} ran out of memory with batch size {size}, going on with {size // 2}"
        for size in (16, 8)
    ]
    caplog.clear()
    captioner.caption(images)
    assert not caplog.records, "the smaller batch stays"


def test_out_of_memory_in_the_encoder_beside_the_decoder(bundle_path, monkeypatch, caplog):
    images = random_images(40, 32, seed=2)
    captioner = fixed_captioner(bundle_path, 32)
    expected = tokens(captioner, images, num_beams=3)
    sizes = fail_beyond(monkeypatch, 3, OUT_OF_MEMORY[0], ("pixels",))
    assert tokens(captioner, images, num_beams=3) == expected
    assert captioner.batch_size == 8
    assert sum(sizes) == 40
    assert "going on with 8" in caplog.text


def test_one_image_that_does_not_fit_is_an_error(bundle_path, monkeypatch):
    captioner = Captioner.load(bundle_path, device="cpu", batch_size=4)
    fail_beyond(monkeypatch, 0, OUT_OF_MEMORY[1], ("tokens",))
    with pytest.raises(RuntimeError, match="out of memory"):
        captioner.caption(random_images(2, 32))


def test_other_errors_are_not_taken_for_memory(bundle_path, monkeypatch):
    captioner = Captioner.load(bundle_path, device="cpu", batch_size=4)
    fail_beyond(monkeypatch, 0, "Got invalid dimensions for input: tokens", ("tokens",))
    with pytest.raises(RuntimeError, match="invalid dimensions"):
        captioner.caption(random_images(2, 32))
    assert captioner.batch_size == 4


def test_embeddings_go_on_too(tmp_path, monkeypatch, caplog):
    path = export(make_clip(tmp_path / "model"), tmp_path / "clip.rsedge").path
    embedder, images = Embedder.load(path, device="cpu", batch_size=8), random_images(13, 32)
    seen, read = embedder.embed_images(images), embedder.embed_texts(TEXTS)
    sizes = fail_beyond(monkeypatch, 2, OUT_OF_MEMORY[0], ("pixels", "input_ids"))
    np.testing.assert_allclose(embedder.embed_images(images), seen, atol=1e-6)
    assert sizes == [2] * 6 + [1]
    assert embedder.batch_size == 2
    np.testing.assert_allclose(embedder.embed_texts(TEXTS), read, atol=1e-6)
    assert "embedding with" in caplog.text


# --- the device's memory ----------------------------------------------------------------------------------------------


class FakeCudart:
    """The CUDA runtime's C functions, each giving 0 for success."""

    def __init__(self, free: int, total: int, *, fails: bool = False) -> None:
        self.free, self.total, self.fails = free, total, fails
        self.devices = [0]
        self.pinned: list[int] = []

    def cudaGetDevice(self, device):
        device._obj.value = self.devices[-1]
        return 0

    def cudaSetDevice(self, device):
        self.devices.append(device.value)
        return 0

    def cudaMemGetInfo(self, free, total):
        free._obj.value, total._obj.value = self.free, self.total
        return int(self.fails)

    def cudaHostRegister(self, pointer, size, flags):
        assert isinstance(size, ctypes.c_size_t)
        self.pinned.append(pointer.value)
        return int(self.fails)

    def cudaHostUnregister(self, pointer):
        self.pinned.remove(pointer.value)
        return 0


def test_free_memory_is_asked_of_the_right_device():
    library = FakeCudart(6 * 2**30, 8 * 2**30)
    assert Cudart(library).memory(2) == (6 * 2**30, 8 * 2**30)
    assert library.devices == [0, 2, 0], "the device that was current is current again"
    assert Cudart(FakeCudart(1, 1, fails=True)).memory(0) is None


def test_pages_are_pinned_until_the_array_is_gone():
    library = FakeCudart(1, 1)
    array = np.zeros(8, np.uint8)
    assert Cudart(library).pin(array)
    assert library.pinned == [array.ctypes.data]
    del array
    assert library.pinned == []
    assert not Cudart(FakeCudart(1, 1, fails=True)).pin(np.zeros(8, np.uint8))


def test_without_the_cuda_runtime_the_driver_tool_is_asked(monkeypatch):
    monkeypatch.setattr(Cudart, "load", classmethod(lambda cls: None))

    def answer(command, **options):
        assert "--id=1" in command
        return subprocess.CompletedProcess(command, 0, "3000, 8000\n")

    monkeypatch.setattr(memory.subprocess, "run", answer)
    assert memory.free_memory(1) == (3000 * 2**20, 8000 * 2**20)

    def absent(command, **options):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(memory.subprocess, "run", absent)
    assert memory.free_memory(1) is None


def test_the_batch_fits_into_the_free_memory(bundle_path, monkeypatch, caplog):
    manifest, usual = read_bundle(bundle_path).manifest, {"cpu": 16, "cuda": 32}
    assert default_batch_size(manifest, "cpu", usual) == 16
    one = memory.bytes_per_image(manifest, tokens=32, rows=3)
    caplog.set_level("INFO", logger="rsedge")
    for images, expected in ((1000, 32), (20, 16), (9, 8), (1, 1), (0, 1)):
        monkeypatch.setattr(ort, "free_memory", lambda number, n=images: (int(n * one / memory.SHARE) + 1, 8 * 2**30))
        assert default_batch_size(manifest, "cuda:0", usual) == expected
    assert "batch size 16: cuda:0 has 0.0 of 8.0 GiB free" in caplog.text
    monkeypatch.setattr(ort, "free_memory", lambda number: None)
    assert default_batch_size(manifest, "cuda:1", usual) == 32
    assert "free memory is unknown" in caplog.text


def test_a_blip_of_base_size_takes_about_what_its_caches_and_activations_take():
    """197 image tokens, 12 layers of 768 in float16: a cross cache of 7.3 MB an image."""
    from rsedge.bundle import DecoderSpec, Graph, ImageSpec, TensorSpec, TokenSpec

    outputs = [TensorSpec(name=f"cross_k.{i}", dtype="float16", shape=("batch", 12, 64, 197)) for i in range(12)]
    outputs += [TensorSpec(name=f"cross_v.{i}", dtype="float16", shape=("batch", 12, 197, 64)) for i in range(12)]
    pixels = TensorSpec(name="pixels", dtype="uint8", shape=("batch", 224, 224, 3))
    vision = Graph(file="vision.onnx", sha256="0" * 64, size=1, opset=20, inputs=(pixels,), outputs=tuple(outputs))

    past = TensorSpec(name="self_k.0", dtype="float16", shape=("rows", 12, "columns", 64))
    new = TensorSpec(name="new_kv", dtype="float16", shape=(24, "rows", 12, 64))
    step = Graph(file="step.onnx", sha256="0" * 64, size=1, opset=20, inputs=(past,), outputs=(new,))

    class Manifest:
        graphs = {"vision": vision, "step": step}  # noqa: RUF012
        image = ImageSpec(size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
        decoder = DecoderSpec(layers=12, heads=12, head_dim=64, max_positions=512, image_tokens=197)
        tokens = TokenSpec(bos=1, eos=2, pad=0, vocab_size=30524)

    one = memory.bytes_per_image(Manifest, tokens=32, rows=3)
    cross = 12 * 2 * 12 * 64 * 197 * 2
    assert 3 * cross < one < 8 * cross
    assert memory.fitting_batch(Manifest, 4 * 2**30, most=32) == 32  # half of a Jetson with 8 GB
