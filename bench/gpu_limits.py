"""What can this machine do at best: the rate of its matrix products and of its memory, as torch reaches them.

The shares that `bench/gpu.py` reports are of these figures, measured in the same run, not of a data sheet.

    python bench/gpu_limits.py [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any


def synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str, *, rounds: int = 5, least: float = 0.1) -> float:
    """Median time of ``work`` on the clock, over rounds of at least ``least`` seconds after one to warm up."""
    work()
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    repeats = max(1, int(least / max(time.perf_counter() - start, 1e-6)))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)


def products(device: str, *, small: bool = False) -> dict[str, float]:
    """TFLOP/s of the fastest of a few square products, float16 on CUDA (accumulated in float32), float32 on the CPU."""
    import torch

    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    rates = {}
    for size in (256, 512) if small else (4096, 8192, 12288):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        taken = seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, least=0.01 if small else 0.2)
        rates[size] = 2 * size**3 / taken / 1e12
    best = max(rates, key=lambda size: rates[size])
    return {"tflops": round(rates[best], 3), "size": best}


def bandwidth(device: str, *, small: bool = False) -> dict[str, float]:
    """GB/s of reading and writing memory: a copy of much more than any cache holds."""
    import torch

    size = 2**24 if small else 2**31
    a = torch.zeros(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    taken = seconds(lambda: b.copy_(a), device, least=0.01 if small else 0.2)
    return {"gb_per_s": round(2 * size / taken / 1e9, 1), "bytes": size}


def transfers(device: str, *, small: bool = False) -> dict[str, float]:
    """GB/s from this machine's memory to the device's, pageable and pinned; empty on the CPU."""
    import torch

    if not device.startswith("cuda"):
        return {}
    size = 2**22 if small else 2**28
    there = torch.empty(size, dtype=torch.uint8, device=device)
    rates = {}
    for name in ("pageable", "pinned"):
        here = torch.zeros(size, dtype=torch.uint8, pin_memory=name == "pinned")
        rates[name] = round(size / seconds(lambda here=here: there.copy_(here), device) / 1e9, 2)
    return rates


def measure(device: str, *, small: bool = False) -> dict[str, Any]:
    """All limits of a device."""
    found = {
        "gemm": products(device, small=small),
        "memory": bandwidth(device, small=small),
        "to_device_gb_per_s": transfers(device, small=small),
    }
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()  # what is measured next shares the device
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    print(json.dumps(measure(parser.parse_args().device), indent=2))
