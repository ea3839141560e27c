"""RSDiX checkpoints: which tensor is which, and the model that their shapes make.

CLIP and SigLIP are stored as ``_student.*``, beside their moving average ``_teacher.*``; CLIPCap as
``_clip_encoder._student.*``, ``_clipcap.clip_project.*`` and ``_clipcap.gpt.*``. The rest (the losses' scalars, a
Sentence-BERT and its projection, a captioner's unused text tower) has no place in a model of transformers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from rsedge.errors import OptionError, RsedgeError
from rsedge.texts import in_a_line
from rsedge.training.models.clipcap_model import GPT2_FULL_STOP, ClipCapConfig, ClipCapModel
from rsedge.training.rsdix.lightning import Inert, LightningCheckpoint

Family = Literal["clip", "siglip", "clipcap"]
Weights = Literal["student", "teacher"]

_MODELS: dict[Family, Any] = {"clip": CLIPModel, "siglip": SiglipModel, "clipcap": ClipCapModel}
_HEAD_WIDTH = 64
# SigLIP so400m is the one model of these kinds with other heads.
_HEADS = {1152: 16}
# Buffers that transformers once saved and now makes itself.
BUFFER = re.compile(r"(^|\.)(position_ids|attn\.bias|attn\.masked_bias)$")


@dataclass(slots=True)
class Source:
    """The tensors of a file that make the model."""

    checkpoint: LightningCheckpoint
    """The file."""
    names: dict[str, str] = field(default_factory=dict)
    """Name in the model → name in the file."""
    mapped: Counter[str] = field(default_factory=Counter)
    """Prefix in the file → how many tensors were taken from it."""
    absent: list[str] = field(default_factory=list)
    """Tensors that were asked for and are not there, by their names in the model."""

    def take(self, prefix: str, target: str = "", only: tuple[str, ...] = ("",)) -> None:
        """Take the tensors below ``prefix`` whose names go on with one of ``only``, as ``target`` + the rest."""
        for name in self.checkpoint.tensors:
            rest = name.removeprefix(prefix)
            if rest != name and rest.startswith(only) and not BUFFER.search(rest):
                # Some versions nest a tower in a module of the same name.
                self.names[target + re.sub(r"\b(text_model|vision_model)\.\1\.", r"\1.", rest)] = name
                self.mapped[prefix] += 1

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a matrix or filter by its name in the model; where it is absent, that is noted."""
        if name not in self.names:
            self.absent.append(name)
            return (_HEAD_WIDTH, _HEAD_WIDTH)
        return self.checkpoint.tensors[self.names[name]].shape

    def layers(self, prefix: str) -> int:
        """How many numbered modules there are below ``prefix``."""
        found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in self.names)
        return len({match[1] for match in found if match})


def collect(checkpoint: LightningCheckpoint, weights: Weights) -> tuple[Family, Source]:
    """What kind of model a file holds, and its tensors.

    Raises:
        RsedgeError: It is of none of these kinds, or has no such weights.
    """
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
    """The model that shapes make, without numbers, and everything wrong with the tensors.

    ``found.names`` is brought to the names that this version of transformers has. The model is None where its sizes
    cannot be told.
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
    # From here on by the names this version of transformers has.
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


def read_weights(found: Source) -> dict[str, Tensor]:
    """The numbers by their names in the model, float32 whatever they were trained in."""
    read = found.checkpoint.read(set(found.names.values()))
    return {name: read[source].float().contiguous() for name, source in found.names.items()}
