"""What runs on CUDA, as far as a CPU goes: fixed addresses, few shapes, and captured graphs."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from rsedge import Captioner
from rsedge.bundle import read_bundle, write_bundle
from rsedge.export.convert import export
from rsedge.runtime.decoding.fixed_batch import FixedBatch, FixedMemory
from rsedge.runtime.engines import ort
from rsedge.runtime.engines.ort import FixedRun, OrtBackend, OrtGraph
from tests.clipcap_models import make_clipcap
from tests.models import random_images

SETTINGS = (
    {"num_beams": 1},
    {"num_beams": 3, "max_new_tokens": 40},
    {"num_beams": 4, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "max_new_tokens": 30},
    {"top_k": 5, "seed": 1},
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
    assert "CUDA graphs cannot be captured here, running without them" in caplog.text
    assert "CUDA failure 900" in caplog.text


def test_a_graph_is_captured_under_the_lock_in_every_thread(monkeypatch):
    """Also in one that was given the id of a thread that ended; and what was captured is freed, whatever came later."""
    monkeypatch.setattr(ort, "threading", SimpleNamespace(local=threading.local, get_ident=lambda: 1))
    lock, locked, released = threading.Lock(), [], []

    class Graph:
        captures = True

        def bind(self, inputs, outputs):
            return "binding"

        def run_binding(self, binding, number):
            locked.append(lock.locked())

        def release_captured(self, number):
            released.append(number)

    run = FixedRun(Graph(), {}, {}, graph_id=7, capture_lock=lock)

    def twice():
        run()
        run()

    for _ in range(2):
        thread = threading.Thread(target=twice)
        thread.start()
        thread.join()
    assert locked == [True, False] * 2
    run._graph.captures = False
    run.release()
    assert released == [7]


@pytest.mark.parametrize(("settings", "most"), [({"num_beams": 1}, 4), ({"num_beams": 3}, 4)])
def test_searches_that_want_ever_more_candidates_run_at_few_shapes(bundle_path, settings, most, monkeypatch):
    tops, original = set(), FixedMemory.step
    monkeypatch.setattr(FixedMemory, "step", lambda self, *a: (tops.add(a[2]), original(self, *a))[1])
    fixed_captioner(bundle_path).caption(random_images(8, 32), min_new_tokens=20, max_new_tokens=20, **settings)
    assert len(tops) <= most


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
