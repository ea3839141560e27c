"""Make the tiny captioner of ``rsedge doctor --selftest`` and what it must say: ``python -m tools.selftest_bundle``.

Run it again when the graph contract changes; the results are those of ONNX Runtime on the CPU.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rsedge.export.convert import export
from rsedge.runtime.diagnostics.selftest import results
from rsedge.runtime.engines.ort import OrtBackend
from tests.models import make_blip

BUILT_IN = Path(__file__).resolve().parents[1] / "rsedge" / "builtin"


def main() -> None:
    """Write the bundle and its results."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_blip(Path(folder) / "selftest", seed=4, hidden=32, layers=2, heads=4, vocab=200)
        bundle = export(checkpoint, BUILT_IN / "selftest.rsedge", precision="fp16", overwrite=True)
    found = results(bundle, OrtBackend("cpu", threads=1))
    (BUILT_IN / "selftest.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{bundle.path}: {sum(path.stat().st_size for path in bundle.path.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
