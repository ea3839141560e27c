"""The model types that can be exported, and all that differs between them; another one is one entry here.

Loading (:mod:`rsedge.export.checkpoint`) and the export itself (:mod:`rsedge.export.convert`) know no model. They ask
the entry of a checkpoint's ``model_type`` for its settings and tensors, and then for the plan of its bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rsedge.export.models import blip_layout, blip_plan, clip_layout, clip_plan, clipcap_layout, clipcap_plan

if TYPE_CHECKING:
    from rsedge.bundle import Bundle, Family, TokenSpec
    from rsedge.export.checkpoint import Checkpoint
    from rsedge.export.graphs.builder import GraphBuilder
    from rsedge.export.graphs.precision import Precision
    from rsedge.export.weights import Report, StoredTensor


class Settings(Protocol):
    """The checked settings of a checkpoint, as far as loading needs them."""

    @property
    def image_size(self) -> int:
        """Pixels along an edge, of the checkpoint itself."""

    @property
    def patch_size(self) -> int:
        """Pixels along an edge of a patch."""

    @property
    def vocab_size(self) -> int:
        """Tokens the embeddings have room for."""

    @property
    def needed_tokens(self) -> Mapping[int, str]:
        """Ids the tokenizer must have, each with what it is for: "which ends a caption (…)"."""

    @property
    def token_spec(self) -> TokenSpec | None:
        """Token ids of a captioner's decoder; None where nothing is generated."""


class Plan(Protocol):
    """One checkpoint at one image size, on its way to a bundle.

    Making one raises CheckpointError for what only then can be seen to be wrong.
    """

    def graphs(self, precision: Precision) -> Mapping[str, GraphBuilder]:
        """Role → graph."""

    def manifest_fields(self) -> dict[str, Any]:
        """The fields of :class:`~rsedge.manifest.Manifest` that only this family has."""

    def parity(self, bundle: Bundle) -> dict[str, Any]:
        """The comparison with torch, JSON values, each figure beyond its tolerance a sentence in ``problems``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelType:
    """What differs between the model types.

    Attributes:
        family: Of the bundle.
        title: What it is, for messages.
        architecture: The class of transformers, or like one, that the checkpoint must be saved from.
        otherwise: What a checkpoint of this type and another class is not.
        tokenizer_files: Files that hold a whole vocabulary; one of them must be there.
        read_settings: ``config.json`` → settings, or None after at least one report.
        resolve_tensors: The stored tensors, settings → those the model needs under the names of today.
        plan: Checkpoint and image size → plan.
    """

    family: Family
    title: str
    architecture: str
    otherwise: str
    tokenizer_files: tuple[str, ...]
    read_settings: Callable[[Mapping[str, Any], Report], Settings | None]
    resolve_tensors: Callable[[Mapping[str, StoredTensor], Any, Report], dict[str, StoredTensor]]
    plan: Callable[[Checkpoint[Any], int], Plan]


MODEL_TYPES: dict[str, ModelType] = {
    "blip": ModelType(
        family="blip",
        title="BLIP captioning",
        architecture="BlipForConditionalGeneration",
        otherwise="BLIP but no captioner",
        tokenizer_files=("tokenizer.json", "vocab.txt"),
        read_settings=blip_layout.read_settings,
        resolve_tensors=blip_layout.resolve_tensors,
        plan=blip_plan.BlipPlan,
    ),
    "clip": ModelType(
        family="clip",
        title="CLIP",
        architecture="CLIPModel",
        otherwise="CLIP but not both of its encoders",
        tokenizer_files=("tokenizer.json", "vocab.json"),
        read_settings=clip_layout.read_clip_settings,
        resolve_tensors=clip_layout.resolve_tensors,
        plan=clip_plan.DualEncoderPlan,
    ),
    "siglip": ModelType(
        family="clip",
        title="SigLIP",
        architecture="SiglipModel",
        otherwise="SigLIP but not both of its encoders",
        tokenizer_files=("tokenizer.json", "spiece.model"),
        read_settings=clip_layout.read_siglip_settings,
        resolve_tensors=clip_layout.resolve_tensors,
        plan=clip_plan.DualEncoderPlan,
    ),
    "clipcap": ModelType(
        family="clipcap",
        title="CLIPCap",
        architecture="ClipCapModel",
        otherwise="CLIPCap but no whole model",
        tokenizer_files=("tokenizer.json", "vocab.json"),
        read_settings=clipcap_layout.read_settings,
        resolve_tensors=clipcap_layout.resolve_tensors,
        plan=clipcap_plan.ClipCapPlan,
    ),
}
"""By the ``model_type`` of ``config.json``."""

SUPPORTED = "; ".join(f"{kind.title} (model_type '{name}', {kind.architecture})" for name, kind in MODEL_TYPES.items())


def model_type_of(config: Mapping[str, Any], report: Report) -> ModelType | None:
    """The entry for a ``config.json``, or None after a report."""
    name = config.get("model_type")
    found = MODEL_TYPES.get(name) if isinstance(name, str) else None
    if found is None:
        report(f"config.json says model_type {name!r}; rsedge exports {SUPPORTED}")
        return None
    architectures = config.get("architectures") or [found.architecture]  # absent in files written by hand
    if found.architecture not in architectures:
        report(f"it is {found.otherwise} ({', '.join(map(str, architectures))}); rsedge exports {SUPPORTED}")
        return None
    return found
