"""Published RSDiX checkpoints (https://github.com/NeuRoNeLab/RSDiX-CLIP) → Hugging Face layout.

They are Lightning files. No code in them is run; see :mod:`rsedge.training.rsdix.lightning`. CLIP and SigLIP are stored
as ``_student.*``, beside their moving average ``_teacher.*``; CLIPCap as ``_clip_encoder._student.*``,
``_clipcap.clip_project.*`` and ``_clipcap.gpt.*``. The rest (the losses' scalars, a Sentence-BERT and its projection, a
captioner's unused text tower) has no place in a model of transformers.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, GenerationConfig, SiglipConfig, SiglipModel

from rsedge.bundle import sha256_of
from rsedge.checkpointfiles import write_image_spec
from rsedge.errors import OptionError, OutputError, RsedgeError
from rsedge.texts import first_line, in_a_line
from rsedge.training.models.clipcap_model import DEFAULTS, GPT2_FULL_STOP, ClipCapConfig, ClipCapModel
from rsedge.training.models.loading import check_source, default_image
from rsedge.training.rsdix.lightning import Inert, LightningCheckpoint, read_lightning

Family = Literal["clip", "siglip", "clipcap"]
Weights = Literal["student", "teacher"]

_MODELS: dict[Family, Any] = {"clip": CLIPModel, "siglip": SiglipModel, "clipcap": ClipCapModel}
_HEAD_WIDTH = 64
# SigLIP so400m is the one model of these kinds with other heads.
_HEADS = {1152: 16}
# Buffers that transformers once saved and now makes itself.
BUFFER = re.compile(r"(^|\.)(position_ids|attn\.bias|attn\.masked_bias)$")

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
    """The result of an import."""

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
    """Tensors left out, likewise."""
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
    """Convert a published RSDiX checkpoint to a folder that transformers and ``rsedge export`` read.

    Args:
        source: The Lightning file, ``.ckpt``; nothing in it is executed.
        target: The folder to make; its parent exists. Written beside it and renamed, so it is whole or not there.
        tokenizer: Folder or hub id to copy the tokenizer from; None: that of the published models, :data:`TOKENIZERS`.
        weights: Those of the student, or of the teacher, its moving average.
        overwrite: Replace an imported checkpoint that is there already.
        progress: Called with a line before each stage.

    Raises:
        RsedgeError: The file cannot be read, or everything in it that is not of one of the models.
        OptionError: ``weights`` or ``tokenizer`` is not accepted.
        OutputError: ``target`` is there already, or cannot be written.
    """
    source, target = Path(source), Path(target)
    if weights not in get_args(Weights):
        raise OptionError(f"weights is {weights!r}, expected {' or '.join(get_args(Weights))}")
    if not target.resolve().parent.is_dir():
        raise OutputError(f"the folder {target.resolve().parent} does not exist: create it first")
    if target.exists() and not (target / _PROVENANCE).is_file():  # a config.json is in many folders of someone's work
        raise OutputError(
            f"{target} exists and is not a checkpoint of import-rsdix: rsedge will not replace it; choose another name"
        )
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists already: choose another name, or allow overwriting with --overwrite")
    progress(f"reading {source}")
    checkpoint = read_lightning(source)
    family, found = collect(checkpoint, weights)
    model, problems = build(family, found)
    words = _tokenizer(family, tokenizer, model, problems)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise RsedgeError(f"cannot import {source}: {len(problems)} problem{'s' * (len(problems) > 1)}\n{listed}")

    progress(f"writing {family} to {target}")
    used = set(found.names.values())
    read = checkpoint.read(used)
    # In float32, whatever they were trained in.
    model.load_state_dict({name: read[held].float().contiguous() for name, held in found.names.items()}, assign=True)
    del read
    model.tie_weights()
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

    with _whole_folder(target) as folder:
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        kind = "siglip" if vision.model_type.startswith("siglip") else "clip"
        write_image_spec(folder, default_image(kind, vision.image_size), model_type=kind)
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
    return report


def _tokenizer(family: Family, source: str | Path | None, model: Any, problems: list[str]) -> Any:
    """The tokenizer; sets the token that ends a caption in the model, and adds what is wrong to ``problems``."""
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
    """A hyper-parameter in JSON; other values become the name of their type."""
    if isinstance(value, Inert):
        value = value.value
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [item if isinstance(item, str | int | float) else type(item).__name__ for item in value]
    return type(value).__name__


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that gets its name when it is filled; the old one goes once the new one is whole."""
    target = target.resolve()
    draft, old = (target.with_name(f".{target.name}-{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        draft.mkdir()
        yield draft
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


@dataclass(slots=True)
class Source:
    """The tensors of a file that make the model."""

    checkpoint: LightningCheckpoint
    names: dict[str, str] = field(default_factory=dict)
    """Name in the model → name in the file."""
    mapped: Counter[str] = field(default_factory=Counter)
    """Prefix in the file → how many tensors were taken from it."""
    absent: list[str] = field(default_factory=list)
    """Missing tensors, by their names in the model."""

    def take(self, prefix: str, target: str = "", only: tuple[str, ...] = ("",)) -> None:
        """Take the tensors below ``prefix`` whose names continue with one of ``only``, as ``target`` + the rest."""
        for name in self.checkpoint.tensors:
            rest = name.removeprefix(prefix)
            if rest != name and rest.startswith(only) and not BUFFER.search(rest):
                # Some versions nest a tower in a module of the same name.
                self.names[target + re.sub(r"\b(text_model|vision_model)\.\1\.", r"\1.", rest)] = name
                self.mapped[prefix] += 1

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a matrix or filter by its name in the model; notes an absent one."""
        if name not in self.names:
            self.absent.append(name)
            return (_HEAD_WIDTH, _HEAD_WIDTH)
        return self.checkpoint.tensors[self.names[name]].shape

    def layers(self, prefix: str) -> int:
        """The number of numbered modules below ``prefix``."""
        found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in self.names)
        return len({match[1] for match in found if match})


def collect(checkpoint: LightningCheckpoint, weights: Weights) -> tuple[Family, Source]:
    """The kind of a file's model, and its tensors. Raises RsedgeError: there is none of these kinds or weights."""
    names, found = checkpoint.tensors, Source(checkpoint)
    captioner = any(name.startswith("_clipcap.") for name in names)
    prefix = f"{'_clip_encoder.' if captioner else ''}_{weights}."
    if captioner:
        found.take(prefix, "encoder.", ("vision_model.", "visual_projection."))
        found.take("_clipcap.clip_project.", "mapper.")
        found.take("_clipcap.gpt.", "language_model.")
        head, words = "language_model.lm_head.weight", "language_model.transformer.wte.weight"
        if words in found.names:
            found.names.setdefault(head, found.names[words])
    else:
        found.take(prefix)
    if not any(name.startswith(prefix) for name in names):
        other = "student" if weights == "teacher" else "teacher"
        held = prefix.replace(weights, other)
        remedy = (
            f"it holds a {other} alone: use --weights {other}"
            if any(name.startswith(held) for name in names)
            else "expected the keys of RSDiX-CLIP, _student.* and _teacher.*, or of RSDiX-CLIPCap, "
            "_clip_encoder._student.*, _clipcap.clip_project.* and _clipcap.gpt.*"
        )
        held = ", ".join(f"{name}.* ({count})" for name, count in list(groups(names).items())[:8]) or "nothing"
        raise RsedgeError(f"cannot import {checkpoint.path}: it has no {prefix}*, but {held}: {remedy}")
    if captioner:
        return "clipcap", found
    return ("siglip" if "vision_model.head.probe" in found.names else "clip"), found


def groups(names: Iterable[str]) -> dict[str, int]:
    """Names by their first parts, counted."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        depth = 3 if parts[0] == "_clip_encoder" and len(parts) > 3 else 2 if parts[0] == "_clipcap" else 1
        counts[".".join(parts[:depth])] += 1
    return dict(counts)


def build(family: Family, found: Source) -> tuple[Any, list[str]]:
    """The model that the shapes make, without numbers, and everything wrong with the tensors.

    Renames ``found.names`` to the names in this version of transformers. The model is None where its sizes are unclear.
    """
    try:
        config, problems = _clipcap_config(found) if family == "clipcap" else (_dual_config(found, family), [])
        with torch.device("meta"):
            model = _MODELS[family](config)
    except (OptionError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        reason = f"its tensors are not shaped like a {family} model's: {error}"
        if found.absent:
            reason = f"it lacks {in_a_line(found.absent)}, from which the model's sizes follow: download it again"
        return None, [reason]
    expected = {_key(name): (name, tuple(value.shape)) for name, value in model.state_dict().items()}
    given = {_key(name): name for name in found.names}
    if missing := [name for key, (name, _) in expected.items() if key not in given]:
        problems.append(f"it lacks {in_a_line(missing)}: download it again")
    if strange := [found.names[name] for key, name in given.items() if key not in expected]:
        problems.append(f"it has tensors a {family} model has not: {in_a_line(strange)}")
    problems += [
        f"{found.names[given[key]]} is {list(found.shape(given[key]))}, expected {list(shape)}"
        for key, (_, shape) in expected.items()
        if key in given and found.shape(given[key]) != shape
    ]
    found.names = {expected[key][0]: found.names[name] for key, name in given.items() if key in expected}
    if family == "clipcap" and not problems:
        names = [found.names[f"language_model.{part}.weight"] for part in ("lm_head", "transformer.wte")]
        head, words = (found.checkpoint.read([name])[name] for name in names)
        if not torch.equal(head, words):
            problems.append("its GPT-2 has a head apart from its word embeddings, which GPT2LMHeadModel has not")
    return model, problems


def _key(name: str) -> str:
    """A name without what versions of transformers differ in: an encoder alone may or may not be nested."""
    return name.replace("vision_model.", "") if name.startswith("encoder.") else name


def _dual_config(found: Source, family: Literal["clip", "siglip"]) -> Any:
    """The configuration of a CLIP or SigLIP."""
    vocabulary, width = found.shape("text_model.embeddings.token_embedding.weight")
    text: dict[str, Any] = {
        **_tower(found, "text_model"),
        "vocab_size": vocabulary,
        "max_position_embeddings": found.shape("text_model.embeddings.position_embedding.weight")[0],
        "hidden_size": width,
    }
    vision = _vision(found, "", family)
    if family == "siglip":
        projection = found.shape("text_model.head.weight")[0]
        # </s> ends and fills texts; there is no start token.
        text |= {"projection_size": projection, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
        return SiglipConfig(text_config=text, vision_config=vision)
    projection = found.shape("visual_projection.weight")[0]
    # CLIP's vocabulary ends with its start and its end token; the text is read off at the end token.
    text |= {"projection_dim": projection, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    text["hidden_act"] = vision["hidden_act"]
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


def _vision(found: Source, prefix: str, family: Literal["clip", "siglip"]) -> dict[str, Any]:
    """The settings of an image encoder; CLIP's has a class token and a projection."""
    embeddings = f"{prefix}vision_model.embeddings"
    patch = found.shape(f"{embeddings}.patch_embedding.weight")[-1]
    positions, width = found.shape(f"{embeddings}.position_embedding.weight")
    patches = positions - (family == "clip")
    side = math.isqrt(patches)
    if side * side != patches or not side:
        raise ValueError(f"{patches} image positions do not make a square")
    settings = {
        "model_type": f"{family}_vision_model",
        **_tower(found, f"{prefix}vision_model"),
        "hidden_size": width,
        "patch_size": patch,
        "image_size": side * patch,
    }
    if family == "clip":
        # OpenAI's CLIP has another activation than the open ones, which no shape tells.
        laion = "laion" in str(found.checkpoint.hyper_parameters.get("model", "")).lower()
        settings["projection_dim"] = found.shape(f"{prefix}visual_projection.weight")[0]
        settings["hidden_act"] = "gelu" if laion else "quick_gelu"
    return settings


def _tower(found: Source, prefix: str) -> dict[str, int]:
    intermediate, width = found.shape(f"{prefix}.encoder.layers.0.mlp.fc1.weight")
    return {
        "num_hidden_layers": found.layers(f"{prefix}.encoder.layers"),
        "num_attention_heads": _heads(width),
        "intermediate_size": intermediate,
    }


def _heads(width: int) -> int:
    if width % _HEAD_WIDTH:
        raise ValueError(f"a width of {width} is no multiple of {_HEAD_WIDTH}, the width of a head")
    return _HEADS.get(width, width // _HEAD_WIDTH)


def _clipcap_config(found: Source) -> tuple[Any, list[str]]:
    vision = _vision(found, "encoder.", "siglip" if "encoder.vision_model.head.probe" in found.names else "clip")
    vocabulary, width = found.shape("language_model.transformer.wte.weight")
    text = {
        "vocab_size": vocabulary,
        "n_embd": width,
        "n_positions": found.shape("language_model.transformer.wpe.weight")[0],
        "n_layer": found.layers("language_model.transformer.h"),
        "n_head": _heads(width),
        "bos_token_id": vocabulary - 1,
        "eos_token_id": vocabulary - 1,
    }
    given = found.checkpoint.hyper_parameters
    mapper: dict[str, Any]
    if "mapper.model.0.weight" in found.names:
        mapper = {"mapper": "mlp", "prefix_length": found.shape("mapper.model.2.weight")[0] // width}
        said = {"prefix_length": given.get("prefix_length")}
    else:
        mapper = {
            "mapper": "transformer",
            "prefix_length": found.shape("mapper.prefix_const")[0],
            "clip_length": found.shape("mapper.linear.weight")[0] // width,
            "mapper_layers": found.layers("mapper.transformer.layers"),
            "mapper_ratio": found.shape("mapper.transformer.layers.0.mlp.fc1.weight")[0] / width,
        }
        said = {name: given.get(name) for name in ("prefix_length", "clip_length")}
        said["mapper_layers"] = given.get("num_layers")
        dropout = given.get("dropout_transformer")
        mapper["mapper_dropout"] = float(dropout) if isinstance(dropout, int | float) else 0.0
    kind = given.get("mapping_type")
    said["mapper"] = kind.value if isinstance(kind, Inert) else kind
    problems = [
        f"its hyper-parameters say {name} {value!r}, its tensors {mapper[name]!r}: it is of two models"
        for name, value in said.items()
        if isinstance(value, int | str) and value != mapper[name]
    ]
    return ClipCapConfig(vision, text, stop_token_id=min(GPT2_FULL_STOP, vocabulary - 1), **mapper), problems
