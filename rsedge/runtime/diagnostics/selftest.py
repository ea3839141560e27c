"""The self test of ``rsedge doctor --selftest``: build, run and compare a tiny captioner on this machine.

The model has random weights. Its expected results are stored beside it, so that the test needs nothing but the engine:
it also tests a Jetson with TensorRT and without ONNX Runtime.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsedge.bundle import read_bundle
from rsedge.errors import BackendError, OptionError, RsedgeError
from rsedge.runtime.engines.contract import parse_device

if TYPE_CHECKING:
    from rsedge.bundle import Bundle
    from rsedge.runtime.captioner import Captioner
    from rsedge.runtime.engines.contract import Backend
    from rsedge.runtime.engines.tensorrt.build import Report

UInt8 = NDArray[np.uint8]

IMAGES = 6
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1, "min_new_tokens": 6, "max_new_tokens": 12},
    "beam3": {"num_beams": 3, "min_new_tokens": 6, "max_new_tokens": 12},
}
SAMPLED = 64
"""Stored values of the encoder's output."""

TOKENS_EQUAL = 0.9
"""Least share of equal tokens: engines round float16 differently, which may change near ties."""
ENCODER_ERROR = 0.01
"""Largest error of the encoder's output, as a share of its largest value."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result for one engine."""

    name: str
    """Such as ``TensorRT 10.3.0 on Orin``."""
    passed: bool | None
    """None if the engine cannot be tested here."""
    detail: str
    """Figures, or the reason."""
    seconds: dict[str, float]
    """Stage → time."""

    def to_json(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        return asdict(self)


def selftest_bundle() -> Bundle:
    """Return the tiny captioner that is installed with rsedge, fp16, 0.2 MB."""
    return read_bundle(Path(str(files("rsedge").joinpath("builtin", "selftest.rsedge"))))


def expected_results() -> dict[str, Any]:
    """Return its stored :func:`results`."""
    values: dict[str, Any] = json.loads(files("rsedge").joinpath("builtin", "selftest.json").read_text("utf-8"))
    return values


def test_images(size: int) -> UInt8:
    """Return images of integer arithmetic alone, the same on every machine, uint8 [6, size, size, 3]."""
    image, y, x, channel = np.ogrid[:IMAGES, :size, :size, :3]
    values = y * (3 + image) + x * (5 + 2 * image) + channel * (40 + 7 * image) + (y * x) // (4 + image)
    made: UInt8 = (values * (image + 2) % 256).astype(np.uint8)
    return made


def results(bundle: Bundle, backend: Backend) -> dict[str, Any]:
    """Return the results of a backend for the test images: tokens by search, and values of the encoder's output."""
    return _answers(_captioner(bundle, backend))


def _captioner(bundle: Bundle, backend: Backend) -> Captioner:
    from rsedge.runtime.captioner import Captioner

    return Captioner(bundle, backend, device_reason="selftest", batch_size=4)


def _answers(captioner: Captioner) -> dict[str, Any]:
    images = test_images(captioner.image_size)
    encoded = captioner.decoder.encode(images[:2]).reshape(-1)
    places = np.linspace(0, encoded.size - 1, SAMPLED).astype(np.int64)
    captions = {
        name: [list(caption.token_ids) for caption in captioner.caption(images, **options)]
        for name, options in SEARCHES.items()
    }
    return {"encoder": [round(float(value), 4) for value in encoded[places]], **captions}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> tuple[bool, str]:
    """Return whether results are close enough to the stored ones, and the figures in a line."""
    wanted = np.asarray(expected["encoder"])
    error = float(np.abs(np.asarray(found["encoder"]) - wanted).max() / np.abs(wanted).max())
    passed = bool(np.isfinite(error)) and error <= ENCODER_ERROR
    parts = [f"encoder error {error:.2%} (accepted {ENCODER_ERROR:.0%})"]
    for name in SEARCHES:
        pairs = list(zip(found[name], expected[name], strict=True))
        total = sum(max(len(ours), len(theirs)) for ours, theirs in pairs)
        equal = sum(a == b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=False))
        passed = passed and equal >= TOKENS_EQUAL * total
        parts.append(f"{name} {equal} of {total} tokens equal")
    return passed, ", ".join(parts) + f" (accepted {TOKENS_EQUAL:.0%})"


def selftest(
    *,
    device: str = "auto",
    backend: str = "auto",
    report: Report | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Check]:
    """Test every engine, or the chosen one; return a check per engine and device.

    Args:
        device: ``auto`` (the CPU, and CUDA device 0), ``cpu``, ``cuda`` or ``cuda:N``.
        backend: ``auto`` (all), ``onnxruntime`` or ``tensorrt``.
        report: Called with the progress of TensorRT's builds.
        progress: Called with a line before each test.

    Raises:
        OptionError: A value is not accepted.
    """
    from rsedge.runtime.engines.choose import BACKENDS

    if backend not in BACKENDS:
        raise OptionError(f"backend is {backend!r}, expected {', '.join(BACKENDS)}")
    kind, number = parse_device(device)
    cuda = f"cuda:{number}"
    checks = []
    if backend != "tensorrt":
        places = ["cpu"] * (kind in ("auto", "cpu")) + [cuda] * (kind in ("auto", "cuda"))
        for place in places:
            progress(f"testing ONNX Runtime on {place}")
            checks.append(_checked(f"ONNX Runtime on {place}", lambda place=place: _ort(place)))  # type: ignore[misc]
    if backend != "onnxruntime" and kind != "cpu":
        progress(f"testing TensorRT on {cuda}: building engines of a tiny model")
        checks.append(_checked(f"TensorRT on {cuda}", lambda: _tensorrt(cuda, report)))
    return checks


class _Unavailable(Exception):  # noqa: N818 - no error: nothing to test
    """The engine cannot be tested here."""


def _checked(name: str, run: Callable[[], Check]) -> Check:
    """Return the check, also if the engine fails: a failing test must not hide the next."""
    try:
        return run()
    except _Unavailable as error:
        return Check(name, None, f"not tested: {error}", {})
    except RsedgeError as error:
        return Check(name, False, str(error), {})
    except Exception as error:  # engines raise types of their own
        return Check(name, False, f"unexpected {type(error).__name__}: {error}", {})


def _ort(device: str) -> Check:
    from rsedge.runtime.engines.ort import OrtBackend, choose_device

    bundle = selftest_bundle()
    try:
        choose_device(device, bundle.manifest.precision)
        made = OrtBackend(device)
    except BackendError as error:
        raise _Unavailable(error) from error
    import onnxruntime

    return _run(f"ONNX Runtime {onnxruntime.__version__} on {device}", bundle, made, {})


def _tensorrt(device: str, report: Report | None) -> Check:
    from rsedge.runtime.engines.tensorrt.backend import TrtBackend, device_summary, tensorrt_problem
    from rsedge.runtime.engines.tensorrt.build import Limits
    from rsedge.runtime.engines.tensorrt.cache import EngineStore

    bundle = selftest_bundle()
    if problem := tensorrt_problem(parse_device(device)[1], bundle.manifest.precision):
        raise _Unavailable(problem)
    with tempfile.TemporaryDirectory(prefix="rsedge-selftest-") as folder:
        # Engines of its own: the test includes the build.
        made = TrtBackend(
            bundle,
            device,
            limits=Limits(images=4, beams=3, tokens=12),
            store=EngineStore(Path(folder) / "engines", Path(folder) / "engine.key"),
            report=report,
        )
        started = time.monotonic()
        made.prepare()
        seconds = {"build": round(time.monotonic() - started, 3)}
        return _run(f"TensorRT {made.version} on {device_summary(made.cuda)}", bundle, made, seconds)


def _run(name: str, bundle: Bundle, backend: Backend, seconds: dict[str, float]) -> Check:
    """Run twice: the second run replays what the first captures."""
    expected, passed, detail = expected_results(), True, ""
    captioner = _captioner(bundle, backend)
    for stage in ("first run", "second run"):
        started = time.monotonic()
        found = _answers(captioner)
        seconds[stage] = round(time.monotonic() - started, 3)
        good, detail = compare(found, expected)
        if not good:
            passed, detail = False, f"{stage}: {detail}"
            break
    return Check(name, passed, detail, seconds)
