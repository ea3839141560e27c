"""The table of TensorRT's names against real bindings, where any are installed (they need no GPU to be imported)."""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

import rsedge.runtime
from rsedge.runtime.engines.tensorrt.build import Loggers, _monitor
from tests.runtime.trt_api import API, CUDA, CUDA_VALUES, SIGNATURES, VERSIONS

SOURCES = sorted((Path(rsedge.runtime.__file__).parent / "engines" / "tensorrt").glob("*.py"))


def installed(*names: str) -> ModuleType:
    for name in names:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    pytest.skip(f"none of {', '.join(names)} is installed")


def nearest(version: str) -> str:
    """The column of the table for an installed version."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(".")[:2])

    return max((v for v in VERSIONS if numbers(v) <= numbers(version)), key=numbers, default=VERSIONS[0])


@pytest.fixture(params=[("tensorrt", "tensorrt_bindings"), ("tensorrt_lean", "tensorrt_lean_bindings")], ids=str)
def bindings(request: pytest.FixtureRequest) -> ModuleType:
    return installed(*request.param)


def test_the_table_says_what_the_bindings_have(bindings: ModuleType):
    version, wrong = nearest(bindings.__version__), []
    for cls, members in API.items():
        real = getattr(bindings, cls, None)
        if real is None and "lean" in bindings.__name__:
            continue  # the lean runtime has no builder
        wrong += [
            f"{cls}.{member}" for member, versions in members.items() if hasattr(real, member) != (version in versions)
        ]
    assert wrong == []


def test_arguments_are_the_documented_ones(bindings: ModuleType):
    wrong = []
    for path, expected in SIGNATURES.items():
        cls, member = path.split(".")
        real = getattr(bindings, cls, None)
        if real is None:
            assert "lean" in bindings.__name__, cls
            continue
        overloads = re.findall(rf"{member}\(self: [\w.]+,? ?(.*?)\) ->", getattr(real, member).__doc__)
        names = [tuple(re.findall(r"(\w+): ", text)) for text in overloads]
        if not any(given[: len(expected)] == expected for given in names):
            wrong.append(f"{path}{expected}: {names}")
    assert wrong == []


def test_our_logger_and_monitor_are_the_real_ones_children(bindings: ModuleType):
    loggers, seen = Loggers(bindings), []
    for severity in (
        bindings.ILogger.Severity.INFO,
        bindings.ILogger.Severity.WARNING,
        bindings.ILogger.Severity.ERROR,
    ):
        loggers.logger.log(severity, str(severity))
    assert loggers.taken() == f"  - {bindings.ILogger.Severity.ERROR}"
    monitor = _monitor(bindings, "step", seen.append)
    monitor.phase_start("Building", None, 2)
    assert monitor.step_complete("Building", 0)
    monitor.cancelled.set()
    assert not monitor.step_complete("Building", 1)
    assert [progress.step for progress in seen] == [0, 1, 2]


def test_cuda_python_has_what_is_used():
    cudart = installed("cuda.bindings.runtime", "cuda.cudart")
    assert [name for name in CUDA if not callable(getattr(cudart, name, None))] == []
    for cls, members in CUDA_VALUES.items():
        assert [name for name in members if not hasattr(getattr(cudart, cls), name)] == []
    assert int(cudart.cudaStreamNonBlocking) == 1


def test_every_cuda_function_used_is_in_the_table():
    used = {
        node.attr
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and re.match(r"cuda[A-Z]", node.attr)
    }
    known = {*CUDA, *CUDA_VALUES, *(name for names in CUDA_VALUES.values() for name in names), "cudaStreamNonBlocking"}
    assert used <= known
    assert set(CUDA) <= used, "the table lists what nobody uses"


def test_nothing_used_is_missing_from_a_version():
    """Names of the table that some version lacks must not stand in the code."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    partial = {member for members in API.values() for member, versions in members.items() if versions != VERSIONS}
    assert [name for name in sorted(partial) if re.search(rf"\.{name}\b", text)] == []
