"""Export a remote-sensing captioner once, then caption whole scenes on an edge device.

The public names load on first use, so that ``import rsedge`` stays as cheap as the standard library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsedge.runtime.captioner import Captioner
    from rsedge.runtime.records import Caption, TileRecord
    from rsedge.runtime.scene import Scene

__version__ = "0.1.0"
__all__ = ["Caption", "Captioner", "Scene", "TileRecord", "__version__"]

_HOMES = {
    "Caption": "rsedge.runtime.records",
    "Captioner": "rsedge.runtime.captioner",
    "Scene": "rsedge.runtime.scene",
    "TileRecord": "rsedge.runtime.records",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rsedge' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
