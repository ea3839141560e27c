"""Runs that share an output, end in mid-record, or are repeated."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import threading
import zlib

import pyarrow.parquet
import pytest

from rsedge.errors import OutputError
from rsedge.runtime.run.pipeline import run
from rsedge.runtime.scenes.opening import open_scenes
from tests.fakes import FakeCaptioner
from tests.faults.machine import caption, done, segments, started, wait_for, write_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """48 × 48 tiles, in 36 segments."""
    return write_scene(tmp_path_factory.mktemp("scene") / "scene.tif", 768)


def test_two_processes_on_one_output(tmp_path, scene):
    output = tmp_path / "out.csv"
    first = started(caption(scene, "-o", output))
    wait_for(lambda: segments(output) > 0, first)
    first.send_signal(signal.SIGSTOP)  # until the other one has ended
    try:
        second = done(caption(scene, "-o", output, "--overwrite"))
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert f"in use by another run, process {first.pid}: wait for it to end, or choose another output" in second.stderr
    assert first.wait(60) == 0, first.stderr.read()
    assert len(output.read_bytes().splitlines()) == 48 * 48 + 1


def test_a_finished_run_is_not_repeated(tmp_path, scene):
    output = tmp_path / "out.csv"
    captioner, opened = FakeCaptioner(16), open_scenes([scene])
    run(opened, captioner, output, tile_size=16)
    state, batches = output.stat(), len(captioner.batches)
    with pytest.raises(OutputError, match="exists already: pass --overwrite"):
        run(opened, captioner, output, tile_size=16)
    assert (output.stat().st_mtime_ns, len(captioner.batches)) == (state.st_mtime_ns, batches)
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def interrupted(scene, output, after=2):
    def stop(progress):
        if progress.tiles_done >= after * 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(open_scenes([scene]), FakeCaptioner(16), output, tile_size=16, progress=stop)
    return output.with_name(f"{output.name}.journal")


@pytest.mark.parametrize("cut", [1, 10, 5000])
def test_a_journal_cut_in_mid_record(tmp_path, scene, cut):
    output = tmp_path / "out.csv"
    journal = interrupted(scene, output)
    with journal.open("rb+") as stream:
        stream.truncate(journal.stat().st_size - cut)
    captioner = FakeCaptioner(16)
    summary = run(open_scenes([scene]), captioner, output, tile_size=16)
    assert summary.resumed_tiles == 64
    assert sum(captioner.batches) == 48 * 48 - 64  # nothing but the torn segment is computed twice


def test_a_resume_with_another_input_or_model_is_refused_by_name(tmp_path, scene):
    output = tmp_path / "out.csv"
    journal = interrupted(scene, output)
    before = journal.read_bytes()
    with pytest.raises(OutputError, match='model: "fake@0123456789ab" in the journal, "other@0123456789ab" now'):
        run(open_scenes([scene]), FakeCaptioner(16, "other@0123456789ab"), output, tile_size=16)
    os.utime(scene, ns=(5, 5))
    with pytest.raises(OutputError, match=r"scenes\[0\]\.files\[0\]\[2\]: \d+ in the journal, 5 now"):
        run(open_scenes([scene]), FakeCaptioner(16), output, tile_size=16)
    assert journal.read_bytes() == before


RECORDS = (b"[]", b"{", b"\xff", b'{"segment":2}', b'{"segment":2,"results":[{}]}', b"[" * 9999)


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_with_a_fitting_checksum(tmp_path, scene, record):
    """Another program wrote it: no traceback, and what is read is never half a record."""
    output = tmp_path / "out.csv"
    journal = interrupted(scene, output)
    assert segments(output) == 2
    with journal.open("ab") as stream:
        stream.write(b"%08x %s\n" % (zlib.crc32(record), record))
    if b"segment" in record:
        with pytest.raises(OutputError, match="is damaged: run again with --overwrite"):
            run(open_scenes([scene]), FakeCaptioner(16), output, tile_size=16)
    else:
        assert run(open_scenes([scene]), FakeCaptioner(16), output, tile_size=16).resumed_tiles == 128


def whole_file(path):
    """Fail unless a file is whole, as a reader of its format sees it; True if it was there."""
    if not path.exists():
        return False
    if path.suffix == ".geojson":
        assert len(json.loads(path.read_bytes())["features"]) == 256
    elif path.suffix == ".parquet":
        assert pyarrow.parquet.read_table(path).num_rows == 256
    elif path.suffix == ".gpkg":
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            assert database.execute("SELECT count(*) FROM tiles").fetchone() == (256,)
    else:
        assert path.read_text().rstrip().endswith("</html>")
    return True


@pytest.mark.parametrize("suffix", ["geojson", "parquet", "gpkg", "html"])
def test_a_reader_never_sees_half_a_file(tmp_path, suffix):
    from rsedge.runtime.outputs.report.report import report_target

    small = open_scenes([write_scene(tmp_path / "scene.tif", 256)])
    output, ended, seen, failures = tmp_path / f"out.{suffix}", threading.Event(), [0], []

    def read():
        while not ended.is_set():
            try:
                seen[0] += whole_file(output)
            except Exception as error:  # noqa: PERF203 - whatever it is, the test reports it
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(4):
            beside = [report_target(output, small)] if suffix == "html" else []
            records = tmp_path / "records.csv" if suffix == "html" else output
            run(small, FakeCaptioner(16), records, tile_size=16, overwrite=True, beside=beside)
    finally:
        ended.set()
        reader.join()
    assert not failures
    assert whole_file(output)
    assert seen[0] > 0
