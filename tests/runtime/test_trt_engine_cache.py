"""Engines on disk: found again, rebuilt where they do not fit, never trusted unchecked."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from rsedge.bundle import read_bundle
from rsedge.errors import BackendError
from rsedge.runtime.engines.tensorrt.backend import TrtBackend
from rsedge.runtime.engines.tensorrt.build import Limits
from rsedge.runtime.engines.tensorrt.cache import EngineKey, EngineStore
from tests.fake_cuda import FakeCuda, Properties
from tests.runtime.trt_api import VERSIONS
from tests.runtime.trt_machines import make_machine

LIMITS = Limits(images=2, beams=1, tokens=8)
KEY = EngineKey(
    role="step",
    graph_sha256="a" * 64,
    external_sha256=(),
    tensorrt="11.4.0",
    gpu="Fake",
    sm="8.7",
    multiprocessors=8,
    precision="fp16",
    profiles=((("rows", (1, 4, 4)), ("columns", (8, 16, 24))),),
)


@pytest.fixture(autouse=True)
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RSEDGE_ENGINE_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "rsedge" / "engine.key"


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "cache" / "engines")


def test_what_is_saved_is_found_and_private(store: EngineStore):
    assert store.load(KEY) is None
    path = store.save(KEY, b"plan", seconds=1, level=3)
    assert store.load(KEY) == b"plan"
    assert store.root.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in store.root.iterdir()} == {0o600}
    assert path.with_suffix(".json").exists()
    assert store.level(KEY) == 3


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EngineKey)])
def test_every_part_of_the_key_matters(store: EngineStore, field: str):
    store.save(KEY, b"plan", seconds=1, level=3)
    value = {"external_sha256": ("b" * 64,), "profiles": ((("rows", (1, 4, 5)), ("columns", (8, 16, 24))),)}
    other = dataclasses.replace(KEY, **{field: value.get(field, "other")})
    assert store.load(other) is None
    assert store.covering(other) == other


@pytest.mark.parametrize("damage", ["cut", "changed", "no note", "note of another", "note is no JSON"])
def test_a_damaged_engine_is_not_used(store: EngineStore, damage: str, caplog: pytest.LogCaptureFixture):
    path = store.save(KEY, b"a whole plan", seconds=1, level=3)
    note = path.with_suffix(".json")
    if damage == "cut":
        path.write_bytes(b"a whole")
    elif damage == "changed":
        path.write_bytes(b"A whole plan")
    elif damage == "no note":
        note.unlink()
    elif damage == "note of another":
        other = store.save(dataclasses.replace(KEY, gpu="Other"), b"a whole plan", seconds=1, level=3)
        note.write_bytes(other.with_suffix(".json").read_bytes())
    else:
        note.write_bytes(b"{")
    assert store.load(KEY) is None
    assert "building it again" in caplog.text


def test_what_others_could_have_put_there_is_deleted(store: EngineStore, caplog: pytest.LogCaptureFixture):
    store.save(KEY, b"plan", seconds=1, level=3)
    store.root.chmod(0o777)
    assert store.load(KEY) is None
    assert store.root.stat().st_mode & 0o777 == 0o700
    assert "others could write" in caplog.text


def test_the_timings_others_could_have_written_go_too_and_readers_are_shut_out(store: EngineStore):
    store.save(KEY, b"plan", seconds=1, level=3)
    store.save_timing(KEY, b"times")
    store.root.chmod(0o755)
    assert (store.load(KEY), store.load_timing(KEY)) == (b"plan", b"times")
    assert store.root.stat().st_mode & 0o777 == 0o700
    store.root.chmod(0o730)
    assert store.load_timing(KEY) == b""


def test_an_engine_of_another_user_or_machine_is_not_used(
    store: EngineStore, secret: Path, caplog: pytest.LogCaptureFixture
):
    """Its files are whole and its hash is right, as anyone can write them; the seal is what only this user makes."""
    path = store.save(KEY, b"plan", seconds=1, level=3)
    assert secret.stat().st_mode & 0o777 == 0o600
    assert len(secret.read_bytes()) == 32
    note = path.with_suffix(".json")
    sealed = json.loads(note.read_bytes())
    evil = hashlib.sha256(b"evil").hexdigest()
    for change in ({"seal": None}, {"seal": "0" * 64}, {"seal": "ü"}, {"sha256": evil}):
        path.write_bytes(b"evil" if "sha256" in change else b"plan")
        note.write_text(json.dumps({**sealed, **change}))
        assert store.load(KEY) is None, change
    assert caplog.text.count("it was not made by this user on this machine") == 4
    path.write_bytes(b"plan")
    note.write_text(json.dumps(sealed))
    assert store.load(KEY) == b"plan"
    store.save_timing(KEY, b"times")
    secret.unlink()
    assert (store.load(KEY), store.load_timing(KEY)) == (None, b"")
    store.save(KEY, b"plan", seconds=1, level=3)
    assert store.load(KEY) == b"plan"


@pytest.mark.parametrize("fault", ["open to others", "link", "short", "pipe"])
def test_a_secret_that_others_may_know_seals_nothing(store: EngineStore, secret: Path, tmp_path: Path, fault: str):
    store.save(KEY, b"plan", seconds=1, level=3)
    if fault == "open to others":
        secret.chmod(0o644)
    elif fault == "link":
        secret.rename(tmp_path / "elsewhere")
        secret.symlink_to(tmp_path / "elsewhere")
    elif fault == "short":
        secret.write_bytes(b"")
    else:
        secret.unlink()
        os.mkfifo(secret, 0o600)
    assert store.load(KEY) is None
    with pytest.raises(BackendError, match="set RSEDGE_ENGINE_KEY to a file that you alone can read and write"):
        store.save(KEY, b"plan", seconds=1, level=3)


def test_the_secret_may_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RSEDGE_ENGINE_KEY", str(tmp_path / "volume" / "key"))
    store = EngineStore(tmp_path / "cache" / "engines")
    store.save(KEY, b"plan", seconds=1, level=3)
    assert store.load(KEY) == b"plan"
    assert (tmp_path / "volume" / "key").exists()
    assert not (tmp_path / "config").exists()


@pytest.mark.parametrize("fault", ["link", "writable plan", "writable note", "pipe"])
def test_files_that_others_can_write_or_that_lead_elsewhere_are_not_engines(
    store: EngineStore, tmp_path: Path, fault: str
):
    path = store.save(KEY, b"plan", seconds=1, level=3)
    if fault == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif fault == "pipe":
        path.unlink()
        os.mkfifo(path, 0o600)
    else:
        (path if fault == "writable plan" else path.with_suffix(".json")).chmod(0o666)
    assert store.load(KEY) is None


def test_engines_in_a_bundle_of_a_stranger_are_never_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path
):
    """As good as the user's own, seal included: a bundle is not where engines are looked for."""
    machine = make_machine(monkeypatch, tmp_path / "cache")
    bundle = read_bundle(shutil.copytree(bundle_path, tmp_path / "stranger.rsedge"))
    TrtBackend(bundle, limits=LIMITS).prepare()
    built = len(machine.trt.builds)
    (tmp_path / "cache" / "engines").rename(bundle.path / "engines")
    TrtBackend(read_bundle(bundle.path), limits=LIMITS).prepare()
    assert len(machine.trt.builds) == 2 * built


def test_a_cache_that_came_with_a_bundle_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path, secret: Path
):
    """Unpacked from an archive it is this user's own, closed to others, with keys and hashes that fit."""
    machine = make_machine(monkeypatch, tmp_path / "cache")
    bundle = read_bundle(bundle_path)
    TrtBackend(bundle, limits=LIMITS).prepare()
    built = len(machine.trt.builds)
    secret.unlink()  # who made them had another
    TrtBackend(bundle, limits=LIMITS).prepare()
    assert len(machine.trt.builds) == 2 * built


def test_a_file_system_without_locks_will_do(store: EngineStore, monkeypatch: pytest.MonkeyPatch):
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with store.building(KEY):
        store.save(KEY, b"plan", seconds=1, level=3)
    assert store.load(KEY) == b"plan"


def test_a_directory_of_another_user_is_refused(store: EngineStore, monkeypatch: pytest.MonkeyPatch):
    store.save(KEY, b"plan", seconds=1, level=3)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(BackendError, match="belong to another user"):
        store.load(KEY)


def test_a_larger_engine_serves_and_the_narrowest_is_taken(store: EngineStore):
    def sized(rows: int) -> EngineKey:
        return dataclasses.replace(KEY, profiles=((("rows", (1, rows, rows)), ("columns", (8, 16, 24))),))

    for rows in (64, 16, 8):
        store.save(sized(rows), b"plan", seconds=1, level=3)
    assert store.covering(sized(12)) == sized(16)
    assert store.covering(sized(8)) == sized(8)
    assert store.covering(sized(65)) == sized(65)


def test_the_timing_cache_is_checked_too(store: EngineStore):
    assert store.load_timing(KEY) == b""
    store.save_timing(KEY, b"times")
    assert store.load_timing(KEY) == b"times"
    (path,) = store.root.glob("timing-*")
    path.write_bytes(path.read_bytes() + b"!")
    assert store.load_timing(KEY) == b""


def _build_slowly(root: str, log: str) -> None:
    import time

    store = EngineStore(Path(root))
    with store.building(KEY):
        if store.load(KEY) is None:
            time.sleep(0.2)
            store.save(KEY, b"plan", seconds=1, level=3)
            with Path(log).open("a") as stream:
                stream.write("built\n")


def test_two_processes_build_once(store: EngineStore, tmp_path: Path):
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    processes = [context.Process(target=_build_slowly, args=(str(store.root), str(log))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert log.read_text() == "built\n"


def test_built_once_and_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path):
    machine = make_machine(monkeypatch, tmp_path / "cache")
    bundle = read_bundle(bundle_path)
    assert all(TrtBackend(bundle, limits=LIMITS).prepare().values())
    assert machine.trt.timing_given[:2] == [b"", b"timings"], "the second engine is built with the timings of the first"
    assert set(TrtBackend(bundle, limits=LIMITS).prepare().values()) == {0.0}
    assert set(TrtBackend(bundle, limits=Limits(images=1, beams=1, tokens=8)).prepare().values()) == {0.0}
    assert len(machine.trt.builds) == 3
    assert not list(bundle.path.glob("**/*.plan")), "a bundle is passed on, and plans are code"


def test_useless_timings_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path):
    machine = make_machine(monkeypatch, tmp_path / "cache")
    backend = TrtBackend(read_bundle(bundle_path), limits=LIMITS)
    backend.store.save_timing(backend._key("vision", backend._profiles("vision")), b"garbage")
    backend.prepare()
    assert machine.trt.timing_given[:2] == [b"garbage", b""]


@pytest.mark.parametrize("change", ["TensorRT", "GPU", "power mode"])
def test_another_machine_gets_its_own_engines_and_is_told_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path, caplog: pytest.LogCaptureFixture, change: str
):
    caplog.set_level(logging.INFO, "rsedge")
    make_machine(monkeypatch, tmp_path / "cache", version=VERSIONS[0])
    TrtBackend(read_bundle(bundle_path), limits=LIMITS).prepare()
    if change == "TensorRT":
        machine = make_machine(monkeypatch, tmp_path / "cache", version=VERSIONS[-1])
    else:
        properties = Properties(name=b"Thor\0") if change == "GPU" else Properties(multiProcessorCount=4)
        machine = make_machine(
            monkeypatch, tmp_path / "cache", version=VERSIONS[0], cuda=FakeCuda(properties=properties)
        )
    TrtBackend(read_bundle(bundle_path), limits=LIMITS).prepare()
    assert len(machine.trt.builds) == 3
    expected = {
        "TensorRT": "TensorRT 10.3.0, not 11.4.0.106",
        "GPU": "GPU Fake Orin, not Thor",
        "power mode": "GPU cores (SM) 8, not 4",
    }
    assert f"its TensorRT engine is for {expected[change]}: building another" in caplog.text


def test_an_engine_that_tensorrt_refuses_is_built_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path, caplog: pytest.LogCaptureFixture
):
    machine = make_machine(monkeypatch, tmp_path / "cache")
    bundle = read_bundle(bundle_path)
    backend = TrtBackend(bundle, limits=LIMITS)
    key = backend._key("vision", backend._profiles("vision"))
    backend.store.save(key, b"whole, but not what TensorRT expects", seconds=1, level=3)
    backend.open(bundle.graph_path("vision"))
    assert "refuses the kept engine of vision: building it again" in caplog.text
    assert len(machine.trt.builds) == 1
    machine.trt.refuse = "Cuda Runtime (out of memory)"
    with pytest.raises(BackendError, match="out of memory"):
        backend.open(bundle.graph_path("vision"))
    assert len(machine.trt.builds) == 1, "for want of memory nothing is built again: that takes more of it"
    machine.trt.refuse = "Serialization assertion failed"
    with pytest.raises(BackendError, match="refuses the engine of vision it has just built"):
        TrtBackend(bundle, limits=LIMITS).open(bundle.graph_path("vision"))


def test_a_longer_search_replaces_a_shorter_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path):
    from rsedge.runtime.engines.tensorrt.build import BuildSettings

    machine = make_machine(monkeypatch, tmp_path / "cache")
    for level in (1, 4, 2):
        TrtBackend(read_bundle(bundle_path), limits=LIMITS, settings=BuildSettings(level=level)).prepare(exact=True)
    assert machine.trt.levels == [1] * 3 + [4] * 3
