"""Published RSDiX checkpoints (https://github.com/NeuRoNeLab/RSDiX-CLIP) → Hugging Face layout.

They are PyTorch Lightning files. No code in them is run; see :mod:`rsedge.training.rsdix.lightning`. What their tensors
are is known to :mod:`rsedge.training.rsdix.rsdix_layout`; here stand the files around the weights, and the order of
things.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from transformers import AutoTokenizer, GenerationConfig

from rsedge.bundle import sha256_of
from rsedge.checkpointfiles import write_image_spec
from rsedge.errors import OptionError, OutputError, RsedgeError
from rsedge.manifest import ImageSpec
from rsedge.texts import first_line
from rsedge.training.models.clipcap_decode import DEFAULTS
from rsedge.training.models.clipcap_model import ClipCapModel
from rsedge.training.models.loading import STATISTICS, check_source
from rsedge.training.rsdix.lightning import Inert, read_lightning
from rsedge.training.rsdix.rsdix_layout import BUFFER, Family, Weights, build, collect, groups, read_weights

TOKENIZERS: dict[Family, str] = {
    "clip": "openai/clip-vit-base-patch32",
    "siglip": "google/siglip-base-patch16-224",
    "clipcap": "gpt2",
}
"""Hub ids of the tokenizers the published models were trained with."""

_PROVENANCE = "import.json"
_SLACK = 256  # a vocabulary may be padded to a round size


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What was imported."""

    path: Path
    """The checkpoint written."""
    family: Family
    """Its kind."""
    weights: Weights
    """``student`` or ``teacher``."""
    parameters: int
    """How many numbers it has."""
    mapped: dict[str, int]
    """Where its tensors came from: prefix in the file → how many."""
    unused: dict[str, int]
    """What was left out, likewise."""
    settings: dict[str, Any]
    """The sizes that were inferred."""


def import_rsdix(
    source: str | Path,
    target: str | Path,
    *,
    tokenizer: str | Path | None = None,
    weights: Weights = "student",
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Imported:
    """Turn a published RSDiX checkpoint into a folder that transformers, and ``rsedge export``, read.

    Args:
        source: The Lightning file, ``.ckpt``; nothing in it is executed.
        target: The folder to make; its parent exists. Written beside it and renamed, so it is whole or not there.
        tokenizer: Folder or hub id to copy the tokenizer from; None: the one the published models have,
            :data:`TOKENIZERS`.
        weights: Those of the student, or of the teacher, its moving average.
        overwrite: Replace an imported checkpoint that is there already.
        progress: Called with a line before each stage.

    Raises:
        RsedgeError: The file cannot be read, or everything in it that does not make up one of the models.
        OptionError: ``weights`` or ``tokenizer`` is not accepted.
        OutputError: ``target`` is there already, or cannot be written.
    """
    source, target = Path(source), Path(target)
    if weights not in get_args(Weights):
        raise OptionError(f"weights is {weights!r}, expected {' or '.join(get_args(Weights))}")
    _check_target(target, overwrite)
    progress(f"reading {source}")
    checkpoint = read_lightning(source)
    family, found = collect(checkpoint, weights)
    model, problems = build(family, found)
    words = _tokenizer(family, tokenizer, model, problems)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise RsedgeError(f"cannot import {source}: {len(problems)} problem{'s' * (len(problems) > 1)}\n{listed}")

    progress(f"writing {family} to {target}")
    model.load_state_dict(read_weights(found), assign=True)
    model.tie_weights()
    used = set(found.names.values())
    vision, text = model.config.vision_config, model.config.text_config
    settings = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "vision_width": vision.hidden_size,
        "vision_layers": vision.num_hidden_layers,
        "text_width": text.hidden_size,
        "text_layers": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
    }
    if family == "clipcap":
        settings |= {"mapper": model.config.mapper, "prefix_length": model.config.prefix_length}
    report = Imported(
        path=target,
        family=family,
        weights=weights,
        parameters=sum(value.numel() for value in model.parameters()),
        mapped=dict(found.mapped),
        unused=groups(name for name in checkpoint.tensors if name not in used and not BUFFER.search(name)),
        settings=settings,
    )

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        kind = "siglip" if vision.model_type.startswith("siglip") else "clip"
        mean, std = STATISTICS[kind]
        write_image_spec(folder, ImageSpec(size=vision.image_size, mean=mean, std=std), model_type=kind)
        if family == "clipcap":
            GenerationConfig(
                num_beams=DEFAULTS.num_beams,
                max_new_tokens=DEFAULTS.max_new_tokens,
                eos_token_id=model.config.stop_token_id,
            ).save_pretrained(folder)
        provenance = {
            "source": source.name,
            "sha256": sha256_of(source),
            "family": family,
            "weights": weights,
            "mapped": report.mapped,
            "unused": report.unused,
            "hyper_parameters": {name: _plain(value) for name, value in checkpoint.hyper_parameters.items()},
            "versions": {name: version(name) for name in ("rsedge", "torch", "transformers")},
        }
        (folder / _PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", "utf-8")

    _write(target, fill)
    return report


# What stands beside the weights


def _tokenizer(family: Family, source: str | Path | None, model: Any, problems: list[str]) -> Any:
    """The tokenizer, the token that ends a caption told to the model; what is wrong with it goes to ``problems``."""
    wanted = str(source or TOKENIZERS[family])
    try:
        check_source(wanted)
        tokenizer = AutoTokenizer.from_pretrained(wanted, trust_remote_code=False)
    except Exception as error:  # the hub, its transports and the tokenizers each have their own errors
        problems.append(
            f"there is no tokenizer {wanted} ({first_line(error)}): give a folder or a hub id with --tokenizer; the "
            f"published models have that of {TOKENIZERS[family]}"
        )
        return None
    if model is None:
        return tokenizer
    size, vocabulary = len(tokenizer), model.config.text_config.vocab_size
    if not vocabulary - _SLACK <= size <= vocabulary:
        problems.append(
            f"the tokenizer has {size} tokens, the model {vocabulary}: it belongs to another model, choose one with "
            "--tokenizer"
        )
    if isinstance(model, ClipCapModel):
        stop = tokenizer.encode(".", add_special_tokens=False)
        if len(stop) == 1:
            model.config.stop_token_id = stop[0]
        else:
            problems.append("the tokenizer has no token '.', which ends a caption: choose another with --tokenizer")
    return tokenizer


def _plain(value: Any) -> Any:
    """A hyper-parameter as JSON has it; what it has not is named."""
    if isinstance(value, Inert):
        value = value.value
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [item if isinstance(item, str | int | float) else type(item).__name__ for item in value]
    return type(value).__name__


# The folder


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.resolve().parent.is_dir():
        raise OutputError(f"the folder {target.resolve().parent} does not exist: create it first")
    if not target.exists():
        return
    if not (target / _PROVENANCE).is_file():  # a config.json is in many folders that are someone's work
        raise OutputError(
            f"{target} exists and is not a checkpoint of import-rsdix: rsedge will not replace it; choose another name"
        )
    if not overwrite:
        raise OutputError(f"{target} exists already: choose another name, or allow overwriting with --overwrite")


def _write(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside ``target`` and give it that name; the old one goes once the new one is whole."""
    target = target.resolve()
    draft, old = (target.with_name(f".{target.name}-{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        try:
            draft.mkdir()
            fill(draft)
            if target.exists():
                target.rename(old)
            draft.rename(target)
        except OSError as error:
            raise OutputError(f"cannot write {target}: {error.strerror or error}; choose another folder") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
