"""How a checkpoint in Hugging Face layout wants its images: ``preprocessor_config.json`` to ImageSpec and back.

Export, training and evaluation read it here, so that all three show a model the same pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rsedge.errors import BundleError
from rsedge.jsonvalues import read_object
from rsedge.manifest import ImageSpec

# Filters of PIL by number, as image processors store them; the others have no counterpart in the runtime.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
PROCESSORS = {"blip": "BlipImageProcessor", "clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}
"""Model type → the class of transformers that reads the file."""


def read_image_spec(path: Path, report: Callable[[str], None]) -> ImageSpec | None:
    """The image processor's settings in the folder ``path``, from the file transformers would prefer.

    Returns:
        The settings without a reflectance rule, which no processor states; None after at least one report, each a
        sentence with its remedy.
    """
    values: dict[str, Any] | None = None
    if (path / "processor_config.json").is_file():
        nested = read_object(path / "processor_config.json", report, "save the processor again")
        values = (nested or {}).get("image_processor")
    name = "processor_config.json" if values is not None else "preprocessor_config.json"
    if values is None:
        if not (path / name).is_file():
            report(
                "it has no image processor (preprocessor_config.json, or image_processor in processor_config.json): "
                "save one with processor.save_pretrained(folder)"
            )
            return None
        values = read_object(path / name, report, "save the processor again")
    if values is None:
        return None
    try:
        return _image_spec(values)
    except (BundleError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        report(
            f"{name} cannot be used ({error}): save the processor again with the settings that the model was trained "
            "with"
        )
        return None


def _image_spec(values: Mapping[str, Any]) -> ImageSpec:
    if not isinstance(values, dict):
        raise TypeError("its settings are no object")
    if values.get("do_pad"):
        raise ValueError("do_pad is set, which rsedge does not do")
    size = _edge(values["size"])
    # CLIP's processor scales the shorter side and cuts out the middle: for square images, as tiles are, the same thing.
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
    )


def _edge(size: Any) -> int:
    """The side of a square size, in any of the ways processors write one."""
    if isinstance(size, dict):
        edges = {size["height"], size["width"]} if "height" in size else {size["shortest_edge"]}
        if len(edges) != 1:
            raise ValueError(f"size {size} is not square")
        size = edges.pop()
    return int(size)


def write_image_spec(path: Path, spec: ImageSpec, *, model_type: str) -> None:
    """Write ``preprocessor_config.json`` into the folder ``path``, as the processor of ``model_type`` reads it."""
    numbers = {name: number for number, name in _RESAMPLE.items()}
    values = {
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(spec.mean),
        "image_processor_type": PROCESSORS[model_type],
        "image_std": list(spec.std),
        "resample": numbers[spec.resample],
        "rescale_factor": 1 / 255,
        "size": {"height": spec.size, "width": spec.size},
    }
    (path / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
