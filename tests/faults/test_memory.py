"""Runs with less memory than they take."""

from __future__ import annotations

import resource

import numpy as np
import pytest

from rsedge.cli import main
from rsedge.errors import BackendError
from rsedge.host import is_out_of_memory, memory_limits
from rsedge.runtime.diagnostics.selftest import selftest_bundle
from rsedge.runtime.engines.choose import check_memory
from tests.faults.machine import caption, done, write_scene


@pytest.mark.parametrize("mebibytes", [160, 250, 400])
def test_limit_below_need(tmp_path, mebibytes):
    found = done(
        caption(write_scene(tmp_path / "a.tif", 32), "-o", tmp_path / "a.csv"), {resource.RLIMIT_AS: mebibytes << 20}
    )
    assert found.returncode == 1
    assert "memory" in found.stderr
    assert not [word for word in ("Traceback", "unexpected", "error in rsedge") if word in found.stderr]


def files_of(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": f"{100 << 20}\n"}),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": f"{100 << 20}\n"}),
        ("4:memory:/not/here\n", {"memory/memory.limit_in_bytes": f"{100 << 20}\n"}),  # as in a container
    ],
)
def test_limit_of_the_control_group(tmp_path, monkeypatch, groups, files):
    files_of(tmp_path, {**files, "groups": groups})
    from rsedge import host

    lines = host._lines
    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    monkeypatch.setattr(host, "_lines", lambda path: lines(tmp_path / "groups" if "proc" in str(path) else path))
    assert 100 << 20 in [limit for _, limit in memory_limits()]
    with pytest.raises(BackendError, match="control group's limit is 100 MiB"):
        check_memory(selftest_bundle())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (ImportError("x.so: failed to map segment from shared object"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 9"), True),
        (RuntimeError("bad_alloc"), True),
        (RuntimeError("invalid graph"), False),
        (np.linalg.LinAlgError("singular"), False),
    ],
)
def test_what_means_out_of_memory(error, expected, monkeypatch, capsys):
    assert is_out_of_memory(error) is expected

    def fail(**_):
        raise error

    monkeypatch.setattr(main.cli, "main", fail)
    assert main.run([]) == 1
    printed = capsys.readouterr().err
    assert ("out of memory" in printed, "error in rsedge" in printed) == (expected, not expected)
    assert ("--batch-size" in printed) is expected
