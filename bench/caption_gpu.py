"""The engines that `bench/gpu.py` compares, the model they run, and how one of them is timed.

All engines have the same weights, images and generation settings. transformers runs in float16, eager or with its
encoder and decoder compiled by torch; rsedge runs its fp16 bundle in ONNX Runtime. One process holds them all, so that
rounds go through all engines and each round is a pair.
"""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TINY = {"hidden": 32, "layers": 2, "heads": 4, "vocab": 300, "image_size": 32, "patch": 8, "max_positions": 64}


class _Absent(MetaPathFinder, Loader):
    """Empty modules in place of packages that only reading scenes and writing tables needs."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self._names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = lambda name: type(name, (Exception,), {})  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def prepare() -> None:
    """Let rsedge be imported from this checkout, on a machine where it is not installed and has no raster library."""
    sys.path.insert(0, str(ROOT))
    absent = tuple(name for name in ("rasterio", "pyarrow", "rich", "affine") if not importlib.util.find_spec(name))
    if absent:
        sys.meta_path.insert(0, _Absent(absent))
    try:
        version("rsedge")
    except PackageNotFoundError:  # bundles record the version that made them
        import rsedge

        folder = Path(tempfile.mkdtemp()) / f"rsedge-{rsedge.__version__}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rsedge\nVersion: {rsedge.__version__}\n")
        sys.path.append(str(folder.parent))


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    import onnxruntime
    import torch
    import transformers

    import rsedge

    values: dict[str, Any] = {"python": platform.python_version(), "cpu": platform.processor() or platform.machine()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        values |= {"cpu": names[0] if names else values["cpu"], "cores": len(names)}
    modules = {"rsedge": rsedge, "onnxruntime": onnxruntime, "torch": torch, "transformers": transformers, "numpy": np}
    values["versions"] = {name: module.__version__ for name, module in modules.items()}
    values["date"] = datetime.now(timezone.utc).date().isoformat()
    if device == "cuda":
        number = torch.cuda.current_device()
        values |= {"gpu": torch.cuda.get_device_name(number), "cuda": torch.version.cuda}
        values["gpu_memory_gib"] = round(torch.cuda.get_device_properties(number).total_memory / 2**30, 1)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            values["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            values["driver"] = "unknown"
    return values


def device_of(device: str) -> str:
    """The device as rsedge names it.

    Raises:
        BackendError: ``device`` is ``cuda``, and ONNX Runtime cannot use one.
    """
    from rsedge.runtime.engines.ort import choose_device

    return choose_device(device, "fp16")[0]  # loads CUDA's libraries from their packages besides


def cuda_problem() -> str:
    """Why torch or ONNX Runtime cannot use a GPU here, or an empty string."""
    import torch

    from rsedge.errors import BackendError

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    try:
        device_of("cuda")
    except BackendError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Case:
    """What is captioned, and how.

    Attributes:
        checkpoint, bundle: The model, and its export.
        device: ``cpu`` or ``cuda``.
        images: uint8 [N, S, S, 3].
        tokens: New tokens of every caption.
        beams: Search → beams.
        mean, std: Of the image processor.
    """

    checkpoint: Path
    bundle: Path
    device: str
    images: np.ndarray
    tokens: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    beams: dict[str, int] = field(default_factory=lambda: {"greedy": 1, "beam3": 3})

    def settings(self, search: str, *, fixed: bool = True) -> dict[str, Any]:
        """Of generation; ``fixed`` makes every caption as long as can be, so that engines do equal work."""
        least = self.tokens if fixed else 0
        return {"num_beams": self.beams[search], "max_new_tokens": self.tokens, "min_new_tokens": least}


class Engine(Protocol):
    """Something that captions."""

    name: str

    def caption(self, images: np.ndarray, batch: int, **settings: Any) -> list[list[int]]:
        """Token ids of each image's caption."""

    def close(self) -> None:
        """Give memory back."""


class Torch:
    """transformers, in one precision, eager or compiled."""

    def __init__(self, case: Case, *, dtype: str = "float16", compiled: bool = False) -> None:
        import torch
        from transformers import BlipForConditionalGeneration

        self.name = f"transformers {dtype}" + " compiled" * compiled
        self._torch, self._case, self._dtype = torch, case, getattr(torch, dtype)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.model = BlipForConditionalGeneration.from_pretrained(case.checkpoint, dtype=self._dtype)
        self.model = self.model.to(case.device).eval()
        self._mean, self._std = (
            torch.tensor(values, device=case.device).view(1, 3, 1, 1) for values in (case.mean, case.std)
        )
        if compiled:
            # The cache grows at every step: without dynamic shapes each length would be compiled anew.
            self.model.vision_model.forward = torch.compile(self.model.vision_model.forward)
            self.model.text_decoder.bert.forward = torch.compile(self.model.text_decoder.bert.forward, dynamic=True)

    def pixels(self, images: np.ndarray) -> Any:
        """uint8 [B, S, S, 3] → normalised [B, 3, S, S] on the device; not slower than it must be."""
        values = self._torch.from_numpy(images).to(self._case.device).permute(0, 3, 1, 2).float() / 255
        return ((values - self._mean) / self._std).to(self._dtype)

    def caption(self, images: np.ndarray, batch: int, **settings: Any) -> list[list[int]]:
        """As :class:`Engine` has it."""
        end = self.model.config.text_config.sep_token_id
        captions = []
        with self._torch.inference_mode():
            for first in range(0, len(images), batch):
                pixels = self.pixels(images[first : first + batch])
                rows = self.model.generate(pixel_values=pixels, do_sample=False, **settings)[:, 1:].tolist()
                captions += [row[: row.index(end) + 1] if end in row else row for row in rows]
        return captions

    def close(self) -> None:
        """As :class:`Engine` has it."""
        del self.model
        if self._case.device == "cuda":
            self._torch.cuda.empty_cache()


class Rsedge:
    """rsedge's bundle in ONNX Runtime.

    Args:
        case: What is run.
        mode: ``graphs`` (fixed addresses, CUDA graphs), ``fixed`` (without the graphs) or ``values`` (neither).
    """

    def __init__(self, case: Case, mode: str = "graphs") -> None:
        from rsedge.bundle import read_bundle
        from rsedge.runtime.captioner import Captioner
        from rsedge.runtime.engines.ort import OrtBackend

        self.name = f"rsedge {mode}"
        backend = OrtBackend(device_of(case.device), cuda_graphs=None if mode == "graphs" else False)
        backend.fixed_addresses = mode != "values"
        self.captioner = Captioner(read_bundle(case.bundle), backend, device_reason="a benchmark", batch_size=1)
        if mode == "values" and not backend.on_cuda:
            self.captioner.decoder.keep_on_device(self.captioner.bundle)

    @property
    def captures(self) -> bool:
        """Whether what is run at every step is replayed as CUDA graphs."""
        fixed = self.captioner.decoder._fixed
        return fixed is not None and fixed.step.captures and fixed.self_write.captures

    def caption(self, images: np.ndarray, batch: int, **settings: Any) -> list[list[int]]:
        """As :class:`Engine` has it."""
        if batch != self.captioner.batch_size:
            # Memory of a larger batch would be used again, and a quarter of its rows computed in vain.
            self.captioner.decoder.release()
            self.captioner.batch_size = batch
        return [list(caption.token_ids) for caption in self.captioner.caption(images, **settings)]

    def close(self) -> None:
        """As :class:`Engine` has it."""
        self.captioner.decoder.release()


def rate(engine: Engine, case: Case, search: str, batch: int, images: np.ndarray) -> float | None:
    """Images per second, or None where the batch does not fit into memory."""
    from rsedge.runtime.engines.memory import is_out_of_memory

    try:
        start = time.perf_counter()
        engine.caption(images, batch, **case.settings(search))
        taken = time.perf_counter() - start
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        taken = None
    if taken is None:
        if case.device == "cuda":
            import torch

            torch.cuda.empty_cache()  # the others shall have what this one had
        return None
    captioner = getattr(engine, "captioner", None)
    if captioner is not None and captioner.batch_size != batch:  # it halved the batch and went on
        return None
    return len(images) / taken


def best_batch(engine: Engine, case: Case, search: str, batches: list[int]) -> tuple[int, dict[int, float]]:
    """The batch size at which an engine is fastest, and the images per second of all that were tried.

    Larger ones are not tried once two in a row did not help.
    """
    rates: dict[int, float] = {}
    for batch in batches:
        images = case.images[: max(2 * batch, min(len(case.images), 64))]
        if len(images) < batch:
            break
        rate(engine, case, search, batch, images)  # kernels are chosen, compiled or captured here
        found = rate(engine, case, search, batch, images)
        if found is None:
            break
        rates[batch] = round(found, 1)
        if len(rates) > 2 and max(rates, key=lambda size: rates[size]) not in list(rates)[-2:]:
            break
    if not rates:
        raise RuntimeError(f"{engine.name} does not run with batch size {batches[0]}: it does not fit into memory")
    return max(rates, key=lambda size: rates[size]), rates
