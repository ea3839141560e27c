from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import textwrap

import pytest

from rsedge.errors import OutputError
from rsedge.runtime.outputs.records import TileResult
from rsedge.runtime.run.journal import Journal
from tests.runtime.test_writers import RECORD, RECORDS

RESULTS = [TileResult(record, "a.tif") for record in RECORDS]


def records(journal):
    return [result.record for segment in journal.segments() for result in segment]


PRINT = {"model": "fake@0123456789ab", "tile_size": 224, "scenes": [{"path": "a.tif", "size": 7}]}


def filled(path, segments=3, fingerprint=PRINT):
    with Journal.open(path, fingerprint) as journal:
        for number in range(journal.finished, segments):
            journal.append(number, RESULTS[: 1 + number % 3])
    return path


def test_what_is_appended_comes_back(tmp_path):
    path = filled(tmp_path / "j")
    with Journal.open(path, PRINT) as journal:
        assert journal.finished == 3
        assert records(journal) == [*RECORDS[:1], *RECORDS[:2], *RECORDS]
        journal.append(3, RESULTS[:1])
        assert records(journal)[-1] == RECORD


def test_each_segment_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), fsync(handle)))
    with Journal.open(tmp_path / "j", PRINT) as journal:
        journal.append(0, RESULTS[:1])
        assert synced[-1] == (tmp_path / "j").stat().st_size


def test_every_torn_end_is_cut_off(tmp_path):
    whole = filled(tmp_path / "whole").read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    for length in [*range(0, len(whole), 13), *ends, *(end - 1 for end in ends)]:
        path = tmp_path / "torn"
        path.write_bytes(whole[:length])
        with Journal.open(path, PRINT) as journal:
            assert journal.finished == max(0, sum(end <= length for end in ends) - 1)
            assert path.stat().st_size == max(end for end in ends if end <= max(length, ends[0]))
        assert filled(path).read_bytes() == whole


def test_damage_inside_costs_only_what_follows(tmp_path):
    path = filled(tmp_path / "j")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1], lines[2].replace(b"river", b"rover"), lines[3]]))
    with Journal.open(path, PRINT) as journal:
        assert journal.finished == 1
    assert filled(path).read_bytes() == whole


def test_other_run_is_refused_by_name(tmp_path):
    path = filled(tmp_path / "j")
    before = path.read_bytes()
    other = {**PRINT, "tile_size": 112, "scenes": [{"path": "a.tif", "size": 8}]}
    with pytest.raises(OutputError) as caught:
        Journal.open(path, other)
    message = str(caught.value)
    assert "tile_size: 224 in the journal, 112 now" in message
    assert "scenes[0].size: 7 in the journal, 8 now" in message
    assert "model" not in message
    assert "--overwrite" in message
    assert path.read_bytes() == before
    with Journal.open(path, other, overwrite=True) as journal:
        assert journal.finished == 0


def test_overwrite_keeps_the_work_of_the_same_run(tmp_path):
    with Journal.open(filled(tmp_path / "j"), PRINT, overwrite=True) as journal:
        assert journal.finished == 3


@pytest.mark.parametrize("notes", ["my notes\n", "my notes", '0badcafe {"x'])
def test_a_file_that_is_no_journal(tmp_path, notes):
    path = tmp_path / "j"
    path.write_text(notes)
    with pytest.raises(OutputError, match="not a journal"):
        Journal.open(path, PRINT)
    assert path.read_text() == notes


def test_order_is_kept(tmp_path):
    with Journal.open(tmp_path / "j", PRINT) as journal, pytest.raises(ValueError, match="does not follow"):
        journal.append(1, RESULTS[:1])


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "j"
    with Journal.open(path, PRINT):
        with pytest.raises(OutputError, match="in use by another run"):
            Journal.open(path, PRINT)
        script = f"""
            from pathlib import Path
            from rsedge.runtime.run.journal import Journal
            Journal.open(Path({str(path)!r}), {{}})
        """
        other = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
        )
        assert "in use by another run" in other.stderr
    Journal.open(path, PRINT).close()


def test_a_journal_removed_while_waiting_is_not_used(tmp_path, monkeypatch):
    """The run before this one ends between our opening its journal and our locking it."""
    path = filled(tmp_path / "j")
    lock = fcntl.flock

    def lock_too_late(*arguments):
        monkeypatch.undo()
        path.unlink()
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", lock_too_late)
    with Journal.open(path, PRINT) as journal:
        assert journal.finished == 0
        journal.append(0, RESULTS[:1])
    with Journal.open(path, PRINT) as journal:
        assert records(journal) == [RECORD]


def test_remove(tmp_path):
    path = filled(tmp_path / "j")
    with Journal.open(path, PRINT) as journal:
        journal.remove()
    assert not path.exists()


def test_no_folder(tmp_path):
    with pytest.raises(OutputError, match="cannot be opened"):
        Journal.open(tmp_path / "no" / "j", PRINT)
