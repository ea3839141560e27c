"""Machines with a fake GPU, for tests of the TensorRT backend."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests import fake_cuda
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import FakeTensorRT
from tests.runtime.trt_api import VERSIONS

if TYPE_CHECKING:
    import pytest


@dataclass
class Machine:
    """A fake driver and the fake TensorRT on it, found by ``import``; engines are kept in ``cache``."""

    cuda: FakeCuda
    trt: FakeTensorRT
    cache: Path


def make_machine(
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    *,
    version: str = VERSIONS[-1],
    layout: str = "cuda.bindings.runtime",
    cuda: FakeCuda | None = None,
) -> Machine:
    """Put a machine under this process."""
    cuda = cuda or FakeCuda()
    fake_cuda.install(monkeypatch, cuda, layout=layout)
    trt = FakeTensorRT(version, cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setenv("RSEDGE_CACHE", str(cache))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(cache.with_name("config")))
    return Machine(cuda, trt, cache)
