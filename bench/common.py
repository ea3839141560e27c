"""What the benchmarks share: the machine's name, models made from a seed, peak memory, medians, results as JSON."""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
CACHE = Path(os.environ.get("RSEDGE_BENCH_CACHE", ROOT / ".cache"))
"""Random models of several hundred MB, made once."""

LIBRARIES = ("rsedge", "onnxruntime", "onnxruntime-gpu", "torch", "transformers", "numpy")
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
    from rsedge.host import usable_cores
    from rsedge.runtime.diagnostics.doctor import version_of

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
        "cores": usable_cores(),
        "instructions": flags,
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := version_of(name))},
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
    """Peak resident memory of this process, in units of 2**20 bytes."""
    from rsedge.host import memory_peak

    return (memory_peak() or 0) / 2**20


def worker(script: str, *arguments: str) -> dict[str, Any]:
    """Run a benchmark script in a process of its own, so that memory and threads are its own, and read its JSON."""
    command = [sys.executable, script, "--worker", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return values


class Process:
    """A benchmark script in a process of its own that answers lines with lines of JSON, the first when it is ready."""

    def __init__(self, script: str, *arguments: str) -> None:
        command = [sys.executable, script, "--worker", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        """End it, whatever it does, also where it is paused."""
        self._process.kill()
        self._process.communicate()

    def read(self) -> dict[str, Any]:
        """Its next line."""
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"{' '.join(map(str, self._process.args))} ended with code {self._process.wait()}")  # type: ignore[arg-type]
        values: dict[str, Any] = json.loads(line)
        return values

    def ask(self, question: int) -> dict[str, Any]:
        """Its answer to a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        return self.read()

    def pause(self) -> None:
        """Let none of its threads run."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them run again."""
        self._process.send_signal(signal.SIGCONT)


def median(values: list[float]) -> float:
    """The median, to 4 figures."""
    return float(f"{statistics.median(values):.4g}")


def save(name: str, values: dict[str, Any]) -> Path:
    """Write results beside the benchmarks."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(values, indent=2) + "\n")
    return path
