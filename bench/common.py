"""What the benchmarks share: the machine's name, models made from a seed, peak memory, medians, results as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
CACHE = Path(os.environ.get("RSEDGE_BENCH_CACHE", ROOT / ".cache"))
"""Random models of several hundred MB, made once."""

BLIP_BASE = {
    "hidden": 768,
    "layers": 12,
    "heads": 12,
    "vocab": 30524,
    "image_size": 224,
    "patch": 16,
    "max_positions": 512,
    "mlp_ratio": 4,
}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    flags: list[str] = []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
        present = next((line for line in lines if line.startswith("flags")), "").split()
        flags = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if flag in present]
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "instructions": flags,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("rsedge", "onnxruntime", "torch", "transformers", "numpy")},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def checkpoint(name: str = "blip-base-224", **sizes: Any) -> Path:
    """A random BLIP in Hugging Face layout, made on first use."""
    path = CACHE / name
    if not (path / "preprocessor_config.json").exists():
        sys.path.insert(0, str(ROOT.parent))
        from tests.models import make_blip

        make_blip(path, seed=0, **(sizes or BLIP_BASE))
    return path


def bundle(precision: str, name: str = "blip-base-224", **sizes: Any) -> Path:
    """That model as a bundle, exported on first use."""
    path = CACHE / f"{name}-{precision}.rsedge"
    if not path.exists():
        from rsedge.export.convert import export

        export(checkpoint(name, **sizes), path, precision=precision)  # type: ignore[arg-type]
    return path


def peak_rss_mb() -> float:
    """Peak resident memory of this process, MB (from /proc: getrusage would count what the parent had)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def worker(script: str, *arguments: str) -> dict[str, Any]:
    """Run a benchmark script in a process of its own, so that memory and threads are its own, and read its JSON."""
    command = [sys.executable, script, "--worker", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return values


def median(values: list[float]) -> float:
    """The median, to 4 figures."""
    return float(f"{statistics.median(values):.4g}")


def save(name: str, values: dict[str, Any]) -> Path:
    """Write results beside the benchmarks."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(values, indent=2) + "\n")
    return path
