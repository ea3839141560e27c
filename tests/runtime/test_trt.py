"""The TensorRT backend on a stand-in that enforces the call protocol, against ONNX Runtime on the same graphs."""

from __future__ import annotations

import gc
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rsedge.bundle import read_bundle
from rsedge.errors import BackendError
from rsedge.runtime.captioner import Captioner
from rsedge.runtime.embedder import Embedder
from rsedge.runtime.engines.ort import OrtBackend
from rsedge.runtime.engines.tensorrt import graph as trt_graph
from rsedge.runtime.engines.tensorrt.backend import TrtBackend
from rsedge.runtime.engines.tensorrt.build import Limits
from tests.fake_cuda import FakeCuda
from tests.models import random_images
from tests.runtime.trt_api import VERSIONS
from tests.runtime.trt_machines import Machine, make_machine


@pytest.fixture(params=VERSIONS)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return make_machine(monkeypatch, tmp_path / "cache", version=request.param)


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return make_machine(monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="session")
def half_path(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny captioner in fp16."""
    from rsedge.export.convert import export

    return export(checkpoint, tmp_path_factory.mktemp("half") / "half.rsedge", precision="fp16").path


def captioner(path: Path, backend: object, *, batch_size: int = 4) -> Captioner:
    return Captioner(read_bundle(path), backend, device_reason="", batch_size=batch_size)  # type: ignore[arg-type]


def on_cpu(path: Path, images: np.ndarray, **options: object) -> list[tuple[int, ...]]:
    made = captioner(path, OrtBackend("cpu", threads=1))
    return [caption.token_ids for caption in made.caption(images, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}, {"top_p": 0.9, "seed": 3}], ids=str)
def test_captions_are_those_of_onnx_runtime(machine: Machine, half_path: Path, options: dict[str, object]):
    images = random_images(7, 32)
    backend = TrtBackend(read_bundle(half_path), limits=Limits(images=4, beams=3, tokens=16))
    found = captioner(half_path, backend).caption(images, max_new_tokens=12, **options)  # type: ignore[arg-type]
    assert [caption.token_ids for caption in found] == on_cpu(half_path, images, max_new_tokens=12, **options)
    assert len({caption.token_ids for caption in found}) > 1, "equal captions prove nothing"
    assert sorted(Path(path).stem for path in machine.trt.builds) == ["self_cache", "step", "vision"]


def test_fp32_and_the_old_layout_of_cuda_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path, half_path: Path
):
    machine = make_machine(monkeypatch, tmp_path / "cache", version=VERSIONS[0], layout="cuda.cudart")
    images = random_images(3, 32)
    found = captioner(bundle_path, TrtBackend(read_bundle(bundle_path))).caption(images, num_beams=1)
    assert [caption.token_ids for caption in found] == on_cpu(bundle_path, images, num_beams=1)
    assert machine.trt.tf32 == [False] * 3, "fp32 means fp32"
    TrtBackend(read_bundle(half_path)).prepare()
    assert machine.trt.tf32[3:] == [True] * 3


def test_watched_tokens_and_penalties(newest: Machine, half_path: Path):
    images, options = random_images(3, 32), {"num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    backend = TrtBackend(read_bundle(half_path), limits=Limits(images=4, beams=2, tokens=16))
    found = captioner(half_path, backend).caption(images, max_new_tokens=10, **options)  # type: ignore[arg-type]
    assert [caption.token_ids for caption in found] == on_cpu(half_path, images, max_new_tokens=10, **options)


def test_larger_sizes_get_a_larger_engine(newest: Machine, half_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "rsedge")
    images = random_images(6, 32)
    backend = TrtBackend(read_bundle(half_path), limits=Limits(images=2, beams=1, tokens=8))
    found = captioner(half_path, backend, batch_size=6).caption(images, num_beams=4, max_new_tokens=20)
    assert [caption.token_ids for caption in found] == on_cpu(half_path, images, num_beams=4, max_new_tokens=20)
    assert "a larger engine takes its place" in caplog.text
    assert len(newest.trt.builds) > 3


def test_embeddings_are_those_of_onnx_runtime(newest: Machine, tmp_path: Path):
    from rsedge.export.convert import export
    from tests.dual_encoders import make_clip

    path = export(make_clip(tmp_path / "clip"), tmp_path / "clip.rsedge", precision="fp16").path
    bundle, images, texts = read_bundle(path), random_images(5, 32), ["a river", "an airport by the sea", "forest"]
    found, expected = (
        Embedder(bundle, backend, device_reason="", batch_size=2)  # type: ignore[arg-type]
        for backend in (TrtBackend(bundle), OrtBackend("cpu", threads=1))
    )
    np.testing.assert_allclose(found.embed_images(images), expected.embed_images(images), atol=1e-6)
    np.testing.assert_allclose(found.embed_texts(texts), expected.embed_texts(texts), atol=1e-6)


def test_recurring_runs_are_captured_and_replayed(newest: Machine, half_path: Path):
    bundle, images = read_bundle(half_path), random_images(8, 32)
    made = captioner(half_path, TrtBackend(bundle, limits=Limits(images=4, beams=3, tokens=16)))
    expected = on_cpu(half_path, images, num_beams=3, max_new_tokens=14)
    for _ in range(3):
        found = made.caption(images, num_beams=3, max_new_tokens=14)
        assert [caption.token_ids for caption in found] == expected
    assert newest.cuda.launches > 20
    without = captioner(half_path, TrtBackend(bundle, capture=False))
    launches = newest.cuda.launches
    assert [caption.token_ids for caption in without.caption(images, num_beams=3, max_new_tokens=14)] == expected
    assert newest.cuda.launches == launches


def test_what_cannot_be_captured_runs_without(newest: Machine, half_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "rsedge")
    newest.cuda.capture_problem = "a layer that cannot"
    made, images = captioner(half_path, TrtBackend(read_bundle(half_path))), random_images(2, 32)
    for _ in range(3):
        found = made.caption(images, num_beams=1)
    assert [caption.token_ids for caption in found] == on_cpu(half_path, images, num_beams=1)
    assert newest.cuda.launches == 0
    assert "runs without CUDA graphs" in caplog.text


def test_a_moved_arena_is_captured_anew(newest: Machine, half_path: Path):
    bundle = read_bundle(half_path)
    backend = TrtBackend(bundle)
    vision, images = backend.open(bundle.graph_path("vision")), random_images(2, 32)
    (expected,) = vision.run({"pixels": images}, ["image_embeds"])
    for _ in range(4):
        vision.run({"pixels": images}, ["image_embeds"])
    launches = newest.cuda.launches
    assert launches > 0
    backend.cuda.arena(1 << 20)  # as opening a larger engine does
    for _ in range(4):
        np.testing.assert_array_equal(vision.run({"pixels": images}, ["image_embeds"])[0], expected)
    assert newest.cuda.launches > launches
    assert len(newest.cuda.graphs) == 1, "what was captured before is freed"


def test_captures_that_do_not_pay_become_rare(newest: Machine, half_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trt_graph, "_MOST_CAPTURED", 2)
    bundle = read_bundle(half_path)
    backend = TrtBackend(bundle, limits=Limits(images=6, beams=1, tokens=8))
    vision, images = backend.open(bundle.graph_path("vision")), random_images(6, 32)
    expected = [vision.run({"pixels": images[: 1 + size]}, ["image_embeds"])[0] for size in range(6)]
    contexts = newest.trt.contexts
    for run in range(60):
        size = run % 6
        (found,) = vision.run({"pixels": images[: 1 + size]}, ["image_embeds"])
        np.testing.assert_array_equal(found, expected[size])
    assert newest.trt.contexts - contexts < 15, "each makes an execution context and computes twice more"


def test_where_a_larger_engine_does_not_fit_the_one_there_goes_on(newest: Machine, half_path: Path):
    bundle = read_bundle(half_path)
    backend = TrtBackend(bundle, limits=Limits(images=2, beams=1, tokens=8))
    vision, images = backend.open(bundle.graph_path("vision")), random_images(5, 32)
    expected = vision.run({"pixels": images[:2]}, ["image_embeds"])[0]
    newest.trt.memory = 1 << 40
    with pytest.raises(BackendError, match="out of memory"):
        vision.run({"pixels": images}, ["image_embeds"])
    assert not newest.cuda.last_error
    for _ in range(4):
        np.testing.assert_array_equal(vision.run({"pixels": images[:2]}, ["image_embeds"])[0], expected)


def test_all_memory_goes_back_with_the_backend(newest: Machine, half_path: Path):
    made = captioner(half_path, TrtBackend(read_bundle(half_path)))
    for _ in range(3):
        made.caption(random_images(3, 32), num_beams=2, max_new_tokens=6)
    assert newest.cuda.device
    assert newest.cuda.graphs
    del made
    gc.collect()
    assert not newest.cuda.device
    assert not newest.cuda.pinned
    assert not newest.cuda.graphs
    assert not newest.cuda.streams


def test_other_threads_use_the_device_that_was_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, half_path: Path):
    machine, images = make_machine(monkeypatch, tmp_path / "cache", cuda=FakeCuda(devices=2)), random_images(4, 32)
    made = captioner(half_path, TrtBackend(read_bundle(half_path), "cuda:1"))
    expected = [caption.token_ids for caption in made.caption(images, num_beams=2, max_new_tokens=6)]
    machine.cuda.used_devices.clear()
    machine.cuda.cudaSetDevice(0)  # as another library may
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(made.caption, images, num_beams=2, max_new_tokens=6) for _ in range(6)]
        made.caption(random_images(8, 32), num_beams=3, max_new_tokens=7)
    assert all([caption.token_ids for caption in run.result()] == expected for run in runs)
    assert machine.cuda.used_devices <= {1}


def test_memory_is_shared_and_comes_back(newest: Machine, half_path: Path):
    made, images = captioner(half_path, TrtBackend(read_bundle(half_path))), random_images(6, 32)
    used = []
    for _ in range(4):
        made.caption(images, num_beams=3, max_new_tokens=10)
        used.append(newest.cuda.used)
    assert used[-1] == used[-2], "memory must not grow with the number of runs"
    backend = made.decoder._backend
    assert backend.cuda.arena_generation <= 3, "one arena for all contexts"  # type: ignore[attr-defined]


def test_out_of_memory_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, half_path: Path):
    from rsedge.host import is_out_of_memory

    make_machine(monkeypatch, tmp_path / "cache", cuda=FakeCuda(limit=300_000))
    backend = TrtBackend(read_bundle(half_path))
    vision = backend.open(read_bundle(half_path).graph_path("vision"))
    with pytest.raises(BackendError, match="--batch-size") as caught:
        vision.run({"pixels": random_images(32, 32)}, ["image_embeds"])
    assert is_out_of_memory(caught.value), "the batch is halved where this is recognised"


def test_what_tensorrt_says_of_memory_is_recognised(newest: Machine, half_path: Path):
    from rsedge.host import is_out_of_memory

    bundle = read_bundle(half_path)
    vision = TrtBackend(bundle).open(bundle.graph_path("vision"))
    newest.trt.enqueue_problem = "[checkMacros.cpp::catchCudaError::203] Error Code 1: Cuda Runtime (out of memory)"
    with pytest.raises(BackendError, match="TensorRT refuses the execution") as caught:
        vision.run({"pixels": random_images(1, 32)}, ["image_embeds"])
    assert is_out_of_memory(caught.value)


def test_wrong_feeds_are_refused_by_name(newest: Machine, half_path: Path):
    bundle = read_bundle(half_path)
    vision = TrtBackend(bundle).open(bundle.graph_path("vision"))
    with pytest.raises(BackendError, match="vision takes pixels"):
        vision.run({"images": random_images(1, 32)}, ["image_embeds"])
    with pytest.raises(BackendError, match=r"pixels of the graph vision is float32 \[1, 32, 32, 3\], expected uint8"):
        vision.run({"pixels": random_images(1, 32).astype(np.float32)}, ["image_embeds"])
    with pytest.raises(BackendError, match="not for TensorRT"):
        TrtBackend(bundle).open(bundle.graph_path("self_write"))
