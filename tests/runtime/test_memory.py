"""The device's memory: how many images fit, pinned pages, and what happens when there is no more."""

from __future__ import annotations

import ctypes
import subprocess
from typing import Any

import numpy as np
import pytest

from rsedge import Captioner
from rsedge.bundle import read_bundle
from rsedge.export.convert import export
from rsedge.runtime.embedder import Embedder
from rsedge.runtime.engines import memory, ort
from rsedge.runtime.engines.memory import Cudart
from rsedge.runtime.engines.ort import OrtGraph, default_batch_size
from tests.dual_encoders import TEXTS, make_clip
from tests.models import random_images
from tests.runtime.test_ort_cuda import fixed_captioner, tokens

OUT_OF_MEMORY = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running MatMul node. Name:'MatMul_7' "
    "Status Message: bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 9437184",
    "CUDA failure 2: out of memory ; GPU=0 ; hostname=box ; file=cuda_allocator.cc ; line=19 ; expr=cudaMalloc(&p, n);",
    "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; expr=cublasCreate(&cublas_handle_);",
    "[defaultAllocator.cpp::allocateAsync::48] Error Code 1: Cuda Runtime (out of memory)",
    "std::bad_alloc",
)


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

    def __init__(self, free: int, total: int, *, fails: bool = False, integrated: bool = False) -> None:
        self.free, self.total, self.fails, self.integrated = free, total, fails, integrated
        self.devices = [0]
        self.pinned: list[tuple[int, int]] = []
        self.pending = 0

    def cudaGetDevice(self, device):
        device._obj.value = self.devices[-1]
        return 0

    def cudaSetDevice(self, device):
        self.devices.append(device.value)
        return 0

    def cudaMemGetInfo(self, free, total):
        free._obj.value, total._obj.value = self.free, self.total
        self.pending = int(self.fails)
        return self.pending

    def cudaDeviceGetAttribute(self, value, attribute, device):
        assert attribute == 18, "cudaDevAttrIntegrated"
        value._obj.value = int(self.integrated)
        return 0

    def cudaHostRegister(self, pointer, size, flags):
        assert isinstance(size, ctypes.c_size_t)
        self.pinned.append((pointer.value, self.devices[-1]))
        self.pending = int(self.fails)
        return self.pending

    def cudaHostUnregister(self, pointer):
        self.pinned = [pinned for pinned in self.pinned if pinned[0] != pointer.value]
        return 0

    def cudaGetLastError(self):
        found, self.pending = self.pending, 0
        return found


def test_free_memory_is_asked_of_the_right_device():
    library = FakeCudart(6 * 2**30, 8 * 2**30)
    assert Cudart(library).memory(2) == (6 * 2**30, 8 * 2**30)
    assert library.devices == [0, 2, 0], "the device that was current is current again"


@pytest.mark.parametrize(
    ("integrated", "available", "free"), [(False, 5, 2), (True, 5, 5), (True, 1, 2), (True, 50, 8), (True, None, 2)]
)
def test_a_device_that_shares_memory_can_have_what_linux_calls_available(monkeypatch, integrated, available, free):
    library = FakeCudart(2 * 2**30, 8 * 2**30, integrated=integrated)
    monkeypatch.setattr(Cudart, "load", classmethod(lambda cls: Cudart(library)))
    monkeypatch.setattr(memory, "memory_available", lambda: None if available is None else available * 2**30)
    assert memory.free_memory(0) == (free * 2**30, 8 * 2**30)


def test_a_failed_call_leaves_no_error_for_the_next_kernel():
    """The CUDA runtime keeps a thread's last error, and ONNX Runtime asks for it after every kernel."""
    library = FakeCudart(1, 1, fails=True)
    assert Cudart(library).memory(0) is None
    assert library.pending == 0
    assert not Cudart(library).pin(np.zeros(8, np.uint8), 0)
    assert library.pending == 0


def test_pages_are_pinned_until_the_array_is_gone():
    library = FakeCudart(1, 1)
    array = np.zeros(8, np.uint8)
    assert Cudart(library).pin(array, 2)
    assert library.pinned == [(array.ctypes.data, 2)], "by the device that reads it"
    assert library.devices == [0, 2, 0]
    del array
    assert library.pinned == []


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
