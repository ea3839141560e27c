"""Which engine runs a bundle: ONNX Runtime or TensorRT, chosen by what works here, or by name."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rsedge.bundle import Bundle, read_bundle
from rsedge.errors import BackendError, BundleError, OptionError
from rsedge.host import ADDRESSES, memory_limits
from rsedge.runtime.engines.contract import Backend, parse_device
from rsedge.texts import first_few

if TYPE_CHECKING:
    from rsedge.manifest import Manifest

_NVIDIA = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/proc/driver/nvidia", "/dev/dxg")
"""Files that NVIDIA's drivers make: on a PC, on a Jetson, and in WSL."""
_LEAST_MEMORY, _LEAST_ADDRESSES = 140 << 20, 600 << 20
"""What the libraries and the smallest bundle took, less a little: below it no run ended well (docs/reliability.md)."""

_log = logging.getLogger("rsedge")

BACKENDS = ("auto", "onnxruntime", "tensorrt")
"""What ``--backend`` takes."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs a bundle."""

    kind: Literal["onnxruntime", "tensorrt"]
    device: str
    """``cpu`` or ``cuda:N``."""
    reason: str
    """Why, as a sentence for people."""


def choose_backend(backend: str, device: str, precision: str) -> Choice:
    """The backend and device for a bundle.

    Args:
        backend: ``auto`` takes TensorRT where it works, else ONNX Runtime, and the reason says why; ``onnxruntime`` or
            ``tensorrt`` takes that or fails.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: Of the bundle.

    Raises:
        OptionError: A value that is none of these.
        BackendError: What was asked for by name cannot be used here; the message says why.
    """
    from rsedge.runtime.engines.ort import choose_device

    if backend not in BACKENDS:
        raise OptionError(f"backend is {backend!r}, expected {', '.join(BACKENDS)}")
    kind, number = parse_device(device)
    problem = "it was not asked for"
    if backend != "onnxruntime":
        problem = "TensorRT runs on NVIDIA GPUs only, and the device asked for is cpu"
        if kind != "cpu":
            from rsedge.runtime.engines.tensorrt.backend import tensorrt_problem

            problem = tensorrt_problem(number, precision)
        if not problem:
            why = "TensorRT was asked for" if backend == "tensorrt" else "TensorRT is usable"
            return Choice("tensorrt", f"cuda:{number}", why)
        if backend == "tensorrt":
            raise BackendError(
                f"backend tensorrt cannot be used: {problem}; see rsedge doctor, or use --backend onnxruntime"
            )
    chosen, reason = choose_device(device, precision)
    # Where the CPU was asked for, or its only kind of bundle given, the reason says it all already.
    plain = backend == "onnxruntime" or kind == "cpu" or precision == "int8"
    without = "" if plain else f"; without TensorRT: {problem}"
    return Choice("onnxruntime", chosen, reason + without)


def end_problems(manifest: Manifest) -> list[str]:
    """Inputs and outputs that a runtime will ask a bundle's graphs for and that they lack, each a sentence."""
    needed: dict[str, tuple[set[str], set[str]]] = {}
    problems: list[str] = []
    if manifest.embedding is not None:
        needed = {"vision": ({"pixels"}, {"image_embeds"}), "text": ({"input_ids"}, {"text_embeds"})}
    elif manifest.decoder is not None:
        parts = range(manifest.decoder.layers)
        caches = {kind: {f"{kind}_{part}.{layer}" for part in "kv" for layer in parts} for kind in ("self", "cross")}
        inputs = {"tokens", "lengths", *caches["self"], *caches["cross"]}
        needed = {"vision": ({"pixels"}, caches["cross"]), "step": (inputs, {"new_kv"})}
    for role, (inputs, outputs) in needed.items():
        graph = manifest.graphs.get(role)
        if graph is None:  # a model for images only has no text graph; the others are missed when they are opened
            continue
        found = {tensor.name: tensor.shape for tensor in (*graph.inputs, *graph.outputs)}
        if missing := sorted((inputs | outputs) - found.keys()):
            problems.append(f"its graph {role} lacks {', '.join(first_few(missing))}")
        elif manifest.embedding is not None and found[min(outputs)][1:] != (manifest.embedding.dim,):
            problems.append(f"its graph {role} gives no embeddings of {manifest.embedding.dim} numbers")
    return problems


def check_memory(bundle: Bundle) -> None:
    """Raise BackendError where a limit on this process's memory is below what the bundle takes at least."""
    weights = sum(file.size for graph in bundle.manifest.graphs.values() for file in graph.files)
    for name, limit in memory_limits():
        least = weights + (_LEAST_ADDRESSES if name == ADDRESSES else _LEAST_MEMORY)
        if limit < least:
            raise BackendError(
                f"{bundle.path} takes at least {least >> 20} MiB of memory, and {name} limit is {limit >> 20} MiB: "
                "raise it, or use a smaller bundle, such as one of rsedge export --int8"
            )


def open_bundle(
    path: str | Path,
    *,
    device: str,
    threads: int | None,
    batch_size: int | None,
    usual: Mapping[str, int],
    backend: str = "auto",
    beams: int | None = None,
    tokens: int | None = None,
) -> tuple[Bundle, Backend, str, int]:
    """A bundle with what runs it; what that is, and why, is logged.

    Engines that TensorRT needs are built here if they are not there. Where ``auto`` chose TensorRT and an engine
    cannot be built or loaded, ONNX Runtime takes its place with a warning.

    Args:
        path: A ``NAME.rsedge`` directory.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads of ONNX Runtime; None takes the cores this process may use.
        batch_size: Images computed together, or None.
        usual: ``cpu`` and ``cuda`` → batch size where none is given; on CUDA it is halved until it fits.
        backend: ``auto``, ``onnxruntime`` or ``tensorrt``.
        beams, tokens: Rows per image and longest caption that TensorRT engines have to serve, if that is more than the
            bundle's defaults. Still more at run time means another build then.

    Returns:
        The bundle, its backend, why it runs there, and the batch size.

    Raises:
        BundleError: The bundle is damaged.
        BackendError: The device or backend cannot be used, or a limit on memory is too low for the bundle.
        OptionError: A value that is not accepted.
    """
    from rsedge.runtime.engines.ort import OrtBackend, default_batch_size

    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}, expected at least 1")
    bundle = read_bundle(path)
    if problems := end_problems(bundle.manifest):
        raise BundleError(
            f"cannot use the bundle {path}: {'; '.join(first_few(problems))}; do not use this bundle, export again"
        )
    check_memory(bundle)
    choice = choose_backend(backend, device, bundle.manifest.precision)
    size = batch_size or default_batch_size(bundle.manifest, choice.device, usual)
    made: Backend | None = None
    problem = ""
    if choice.kind == "tensorrt":
        try:
            made = _tensorrt(bundle, choice.device, size, beams, tokens)
        except BackendError as error:
            if backend == "tensorrt":
                raise
            problem = str(error)
        if made is None:  # out of the except clause, where the error keeps what it left on the GPU
            _log.warning("Warning: TensorRT fails, going on with ONNX Runtime: %s", problem)
            choice = choose_backend("onnxruntime", device, bundle.manifest.precision)
            first = problem.partition("\n")[0]
            choice = replace(choice, reason=f"{choice.reason}; without TensorRT: {first}")
            size = batch_size or default_batch_size(bundle.manifest, choice.device, usual)
    if made is None:
        made = OrtBackend(choice.device, threads=threads)
    # What CUDA and TensorRT lack is of no interest on a machine without a GPU.
    why = f": {choice.reason}" if made.device != "cpu" or any(map(os.path.exists, _NVIDIA)) else ""
    _log.info("running %s on %s with %s%s", bundle.model, made.device, made.name, why)
    return bundle, made, choice.reason, size


def _tensorrt(bundle: Bundle, device: str, images: int, beams: int | None, tokens: int | None) -> Backend:
    from rsedge.runtime.engines.tensorrt.backend import ENGINES, TrtBackend
    from rsedge.runtime.engines.tensorrt.build import Limits

    manifest, usual, least = bundle.manifest, bundle.manifest.generation, None
    if usual:  # engines made for no more than these, by rsedge build, are not to be built again for being tight
        sizes = (beams or usual.num_beams, tokens or usual.max_new_tokens)
        least = Limits.of(manifest, images=images, beams=sizes[0], tokens=sizes[1])
    limits = Limits.of(manifest, images=images)
    if beams or tokens:
        asked = Limits.of(manifest, images=images, beams=beams, tokens=tokens)
        limits = replace(limits, beams=max(limits.beams, asked.beams), tokens=max(limits.tokens, asked.tokens))
    made = TrtBackend(bundle, device, limits=limits, least=least)
    made.prepare()
    # What fails to load should fail here, where another backend can take its place. Texts are not always embedded.
    made.open_ahead(role for role in ENGINES if role != "text")
    return made
