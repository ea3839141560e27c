"""Export a remote-sensing model once, then caption, embed and search whole scenes on an edge device.

The public names load on first use, so that ``import rsedge`` stays as cheap as the standard library.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsedge.runtime.captioner import Captioner
    from rsedge.runtime.classify import Classifier
    from rsedge.runtime.diagnostics.benchmark import benchmark
    from rsedge.runtime.embedder import Embedder
    from rsedge.runtime.locate import locate
    from rsedge.runtime.outputs.records import Caption, TileRecord
    from rsedge.runtime.scenes.opening import open_scenes
    from rsedge.runtime.scenes.scene import Scene
    from rsedge.runtime.search.index import Index

# The Linux wheels of ONNX Runtime 1.31 keep a database of their use and look up a server of Microsoft's, seconds after
# a session is made; disable_telemetry_events() comes too late. Here, so that it is set before anyone imports it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = [
    "Caption", "Captioner", "Classifier", "Embedder", "Index", "Scene", "TileRecord", "__version__", "benchmark",
    "locate", "open_scenes",
]  # fmt: skip

_HOMES = {
    "Caption": "rsedge.runtime.outputs.records",
    "Captioner": "rsedge.runtime.captioner",
    "Classifier": "rsedge.runtime.classify",
    "Embedder": "rsedge.runtime.embedder",
    "Index": "rsedge.runtime.search.index",
    "Scene": "rsedge.runtime.scenes.scene",
    "TileRecord": "rsedge.runtime.outputs.records",
    "benchmark": "rsedge.runtime.diagnostics.benchmark",
    "locate": "rsedge.runtime.locate",
    "open_scenes": "rsedge.runtime.scenes.opening",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rsedge' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
