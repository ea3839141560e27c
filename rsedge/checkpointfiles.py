"""The files of a checkpoint in Hugging Face layout: whether transformers may open them, and the settings of its images.

A checkpoint may come from a stranger. Code beside it (``auto_map``) is not run, since nothing here ever says
``trust_remote_code``; but settings can also name kernels that are fetched and run, shards that are pickles, an adapter
of another model, and a tokenizer that takes time or memory without end.

Export, training and evaluation read the settings of images here, so that all three show a model the same pixels.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rsedge import jsonvalues
from rsedge.errors import BundleError
from rsedge.manifest import ImageSpec
from rsedge.tokenizerfile import tokenizer_problems

_log = logging.getLogger("rsedge")

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "source.spm", "target.spm")
CHECKED = (CONFIG, INDEX, ADAPTER, "tokenizer_config.json", TOKENIZER, *VOCABULARIES)
"""Every file that :func:`file_problems` knows."""

MOST_HEADER_BYTES = 10 << 20
"""Longest header of a safetensors file: a thousand tensors take 100 kB."""
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
"""What a file with weights is called: a file of the folder itself, and no pickle."""

_LAYERS = re.compile(r"(\w*_)?n?_?layers?")
_MOST_LAYERS = 1000
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")

# Filters of PIL by number, as image processors store them; the others have no counterpart in the runtime.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
PROCESSORS = {"blip": "BlipImageProcessor", "clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}
"""Model type → the class of transformers that reads the file."""


def file_problems(path: Path) -> list[str]:
    """Everything that keeps one file of a checkpoint from being given to transformers, each a sentence with its name.

    The file need not be there; what it is follows from its name, see :data:`CHECKED`.
    """
    if problem := _link_problem(path):
        return [problem]
    if not path.exists():
        return []
    if not path.is_file():
        return [f"{path.name} is no file: save the checkpoint again"]
    if path.name == ADAPTER:
        return [
            f"{ADAPTER} makes it an adapter of another model (LoRA): merge it with peft (merge_and_unload) and save "
            "the whole"
        ]
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        if size >= 8 and length <= min(size - 8, MOST_HEADER_BYTES):
            return []
        return [
            f"{path.name} is cut short or not a safetensors file: its header needs {length + 8} bytes, the file has "
            f"{size}, and at most {MOST_HEADER_BYTES} are read; download it again or save the checkpoint again"
        ]
    if size > jsonvalues.MOST_BYTES:
        return [f"{path.name} has {size} bytes, at most {jsonvalues.MOST_BYTES} are read"]
    if path.name == TOKENIZER:
        return [f"{path.name} {problem}: save a plain tokenizer" for problem in tokenizer_problems(path.read_bytes())]
    if path.name in VOCABULARIES:
        return []
    problems: list[str] = []
    values = jsonvalues.read_object(path, problems.append, "save the checkpoint again")
    if values is not None and path.name == INDEX:
        problems += _index_problems(values)
    if values is not None and path.name == CONFIG:
        problems += setting_problems(values)
    return problems


def folder_problems(folder: Path) -> list[str]:
    """:func:`file_problems` of every file in ``folder`` that it knows, and :func:`link_problems`."""
    paths = [folder / name for name in CHECKED] + sorted(folder.glob("*.safetensors"))
    problems = [problem for path in paths for problem in file_problems(path)]
    return list(dict.fromkeys([*link_problems(folder), *problems]))


def link_problems(folder: Path) -> list[str]:
    """What in ``folder`` is a link to a file elsewhere, a sentence each: its text could end up in a bundle.

    The cache of the hub is made of such links, to its own folder of blobs.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        return [f"the folder cannot be listed ({error.strerror}): check its permissions"]
    return [problem for path in paths if (problem := _link_problem(path))]


def _link_problem(path: Path) -> str | None:
    if not path.is_symlink():
        return None
    home = path.parent.resolve()
    own = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # a circle of links
        real = Path()
    if any(real.is_relative_to(place) for place in own):
        return None
    return f"{path.name} is a link that leads outside the folder: copy the checkpoint with 'cp -rL'"


def source_problems(source: str, find: Callable[[str], Path | None]) -> list[str]:
    """Problems of the folder ``source``, or of the hub id, if there is no such folder.

    ``find`` locates a file of the hub id by name, None where it has none. Its OSError or ValueError, for a hub that
    cannot be reached or an id that is none, ends the search: what opens the files next says it better.
    """
    if Path(source).is_dir():
        return folder_problems(Path(source))
    problems: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        # Each is a request, so the vocabularies of a hub id are not among them.
        for name in (TOKENIZER, CONFIG, INDEX, ADAPTER):
            path = find(name)
            problems += file_problems(path) if path is not None else []
    return problems


def _index_problems(values: dict[str, Any]) -> list[str]:
    places = values.get("weight_map")
    if not isinstance(places, dict):
        return [f"{INDEX} has no weight_map: save the checkpoint again"]
    wrong = [name for name in sorted({str(place) for place in places.values()}) if not SHARD.fullmatch(name)]
    what = "which is not a safetensors file of the folder itself: save the checkpoint again"
    return [f"{INDEX} names {name[:200]!r}, {what}" for name in wrong]


def setting_problems(values: dict[str, Any]) -> list[str]:
    """What a ``config.json`` would make transformers do beyond building the model, each a sentence."""
    found = []
    for name, value in values.items():
        if _LAYERS.fullmatch(name) and isinstance(value, int) and value > _MOST_LAYERS:  # each is made before a weight
            limit = f"at most {_MOST_LAYERS} are read: save the checkpoint again"
            found.append(f"{CONFIG} says that {name} is {value}, {limit}")
        if _IMPLEMENTATION.fullmatch(name):
            chosen = value.values() if isinstance(value, dict) else [value]
            if any("/" in str(one) for one in chosen):  # a repository of the hub, whose code is run
                kernel = f"{str(value)[:200]!r}, which rsedge never runs: delete {name}"
                found.append(f"{CONFIG} asks for the kernel {kernel}")
        elif name == "quantization_config" and value is not None:
            found.append(f"{CONFIG} says that its weights are quantized, which rsedge cannot read: save it dequantized")
        elif isinstance(value, dict):
            found += setting_problems(value)
    return list(dict.fromkeys(found))


def read_image_spec(path: Path, report: Callable[[str], None]) -> ImageSpec | None:
    """The image processor's settings in the folder ``path``, from the file transformers would prefer.

    They are without a reflectance rule, which no processor states. None after at least one report, each a sentence with
    its remedy.
    """
    name, values = "processor_config.json", None
    if (path / name).is_file():
        values = (jsonvalues.read_object(path / name, report, "save the processor again") or {}).get("image_processor")
    if values is None:
        name = "preprocessor_config.json"
        if not (path / name).is_file():
            report(
                "it has no image processor (preprocessor_config.json, or image_processor in processor_config.json): "
                "save one with processor.save_pretrained(folder)"
            )
            return None
        values = jsonvalues.read_object(path / name, report, "save the processor again")
    if values is None:
        return None
    try:
        spec = _image_spec(values)
        # A model takes images of one size; a processor of another size belongs to a model before a change.
        size = _model_size(path)
        if size is not None and size != spec.size:
            stated = f"{path.name}: its image processor states {spec.size} px and the model {size} px"
            _log.warning("Warning: %s: %d px it is", stated, size)
            spec = replace(spec, size=size)
        return spec
    except (BundleError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        report(
            f"{name} cannot be used ({error}): save the processor again with the settings that the model was trained "
            "with"
        )
        return None


def _model_size(path: Path) -> int | None:
    """The side of the images that ``config.json`` builds the model for, or None."""
    if not (path / CONFIG).is_file():
        return None
    try:
        config = jsonvalues.parse((path / CONFIG).read_bytes())
    except (OSError, ValueError):
        return None  # reported where the configuration is read
    while isinstance(config, dict):
        nested = next((config[name] for name in ("vision_config", "clip_config") if name in config), None)
        if nested is None:
            size = config.get("image_size")
            return size if type(size) is int and size > 0 else None
        config = nested
    return None


def _image_spec(values: Mapping[str, Any]) -> ImageSpec:
    if not isinstance(values, dict):
        raise TypeError("its settings are no object")
    if values.get("do_pad"):
        raise ValueError("do_pad is set, which rsedge does not do")
    if values.get("do_resize") is False:
        raise ValueError("do_resize is off, so images keep their sizes, and the model takes one")
    size, whole = _edge(values["size"]), isinstance(values["size"], dict) and "height" in values["size"]
    crops = bool(values.get("do_center_crop"))
    if isinstance(values["size"], dict) and "shortest_edge" in values["size"] and not crops:
        raise ValueError(
            "it scales the shorter side (shortest_edge) without do_center_crop, and the model takes squares"
        )
    if values.get("do_center_crop") and _edge(values.get("crop_size", size)) != size:
        raise ValueError(f"it cuts {values['crop_size']} out of {values['size']}, which rsedge does not do")
    resample = values.get("resample", 3)
    if resample not in _RESAMPLE:
        raise ValueError(f"resample is {resample!r}; rsedge knows {_RESAMPLE}")
    mean, std = [0.0] * 3, [1.0] * 3
    if values.get("do_normalize", True):
        mean, std = list(values["image_mean"]), list(values["image_std"])
    # (x · rescale − mean) / std = (x / 255 − mean / f) / (std / f) with f = 255 · rescale, which is 1 as a rule.
    factor = 255 * float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 255.0
    factor = 1.0 if abs(factor - 1) < 1e-9 else factor
    return ImageSpec(
        size=int(size),
        resample=_RESAMPLE[resample],  # type: ignore[arg-type]  # its values are all of Resample
        mean=tuple(float(value) / factor for value in mean),
        std=tuple(float(value) / factor for value in std),
        crop=crops and not whole,
    )


def _edge(size: Any) -> int:
    """The side of a square size, in any of the ways processors write one."""
    if isinstance(size, dict):
        edges = {size["height"], size["width"]} if "height" in size else {size["shortest_edge"]}
        if len(edges) != 1:
            raise ValueError(f"size {size} is not square")
        size = edges.pop()
    return int(size)


KINDS = (
    ("manifest.json", "a bundle of rsedge, which is exported already: pass it with -m"),
    (ADAPTER, "a LoRA adapter of another model: merge it with peft (merge_and_unload) and save the whole"),
    ("open_clip_config.json", "a model of open_clip: convert it to CLIP of transformers, then export that"),
    ("open_clip_*", "weights of open_clip: convert them to CLIP of transformers, then export that"),
    ("tf_model.h5", "weights of TensorFlow: load them with from_pretrained(folder, from_tf=True) and save the model"),
    (
        "flax_model.msgpack",
        "weights of Flax: load them with from_pretrained(folder, from_flax=True) and save the model",
    ),
    ("*.gguf", "quantised weights of llama.cpp (GGUF): export the checkpoint they were made from"),
    ("*.onnx", "graphs of ONNX: export the checkpoint they were made from"),
    ("*/config.json", "a folder of several checkpoints: name one of them"),
)
"""Pattern of a file → what a folder without usable weights is, and the way out."""


def kind_of_folder(folder: Path) -> str | None:
    """Return what a folder without usable weights is, with the way out, or None."""
    return next((meaning for pattern, meaning in KINDS if next(folder.glob(pattern), None) is not None), None)


def best_of_run(source: str | Path) -> Path | None:
    """Return the best checkpoint of a run of training, ``source/best``, or None if ``source`` is no run."""
    best = Path(source) / "best"
    if (Path(source) / CONFIG).is_file() or not (best / CONFIG).is_file():
        return None
    return best if best.resolve().is_relative_to(Path(source).resolve()) else None


def write_image_spec(path: Path, spec: ImageSpec, *, model_type: str) -> None:
    """Write ``preprocessor_config.json`` into the folder ``path``, as the processor of ``model_type`` reads it."""
    numbers = {name: number for number, name in _RESAMPLE.items()}
    values = {
        "do_center_crop": spec.crop,
        "crop_size": {"height": spec.size, "width": spec.size},
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(spec.mean),
        "image_processor_type": PROCESSORS[model_type],
        "image_std": list(spec.std),
        "resample": numbers[spec.resample],
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": spec.size} if spec.crop else {"height": spec.size, "width": spec.size},
    }
    (path / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
