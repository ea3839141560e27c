"""CLIP and SigLIP as two graphs: vision (pixels → embedding) and text (token ids → embedding), both of unit length.

Weights are the tensors of ``CLIPModel`` and ``SiglipModel`` by their names there; shapes use B images or texts, S image
tokens, T text tokens, D numbers to an embedding.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rsedge.bundle import EmbeddingSpec
from rsedge.errors import CheckpointError
from rsedge.export import verify
from rsedge.export.checkpoint import ModelType, Section, Settings
from rsedge.export.graphs.builder import GraphBuilder, Layers, Precision, Tensors
from rsedge.export.graphs.encoder import (
    Encoder,
    Reading,
    Tower,
    attend,
    embed_patches,
    interpolate_positions,
    mlp,
    prepend_token,
    split_heads,
    unit_length,
)

if TYPE_CHECKING:
    from rsedge.bundle import Bundle, ImageSpec
    from rsedge.export.checkpoint import Checkpoint, Report

Kind = Literal["clip", "siglip"]

# Configurations written before transformers 4.31 say 2 whatever the end token is; see TextSettings.end.
_LEGACY_END = 2


# The checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSettings:
    """An image encoder."""

    kind: Kind
    """CLIP reads a class token and projects it, SigLIP pools with attention."""
    tower: Tower
    image_size: int
    patch_size: int
    """Pixels along an edge, of the checkpoint's images and of a patch."""
    dim: int
    """Length of an embedding."""

    @property
    def extra_tokens(self) -> int:
        """Tokens beside the patches."""
        return 1 if self.kind == "clip" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSettings:
    """A text encoder."""

    kind: Kind
    """CLIP's is causal and read at the end token, SigLIP's sees all of a padded text and is read at the last."""
    tower: Tower
    vocab_size: int
    """Rows of the token embeddings."""
    context_length: int
    """Rows of the position embeddings."""
    dim: int
    """Length of an embedding."""
    end: int | None
    """CLIP's end token; a text is read at its first place. None: at the first place of the largest id, as transformers
    does for configurations with an ``eos_token_id`` of 2, which is wrong but widespread.
    """
    pad: int
    """Fills a text: SigLIP's padding, which is seen; for CLIP an id that moves neither place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DualEncoderSettings(Settings):
    """The checked settings of a CLIP or SigLIP model, transformers' defaults filled in."""

    vision: VisionSettings
    text: TextSettings

    @classmethod
    def of(cls, vision: VisionSettings, text: TextSettings) -> DualEncoderSettings:
        """The settings of a model of these two encoders."""
        needed = {} if text.end is None else {text.end: "which ends a text (text_config.eos_token_id)"}
        if text.kind == "siglip":
            needed = {text.pad: "which fills a text (text_config.pad_token_id)"}
        return cls(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            vocab_size=text.vocab_size,
            needed_tokens=needed,
            vision=vision,
            text=text,
        )


def read_clip_settings(config: Mapping[str, Any], report: Report) -> DualEncoderSettings:
    """Read CLIP's settings in ``config.json``."""
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    def section(name: str, defaults: Any) -> Section:
        values, old = config.get(name), config.get(f"{name}_dict")
        if isinstance(old, dict):  # old files have a second copy that, defaults included, wins in transformers
            values = {**(values if isinstance(values, dict) else {}), **defaults.to_dict(), **old}
        return Section(values, defaults, name, report)

    dim = Section(config, CLIPConfig(), "config", report).size("projection_dim")
    vision = read_vision(section("vision_config", CLIPVisionConfig()), "clip", dim)
    text = section("text_config", CLIPTextConfig())
    vocab = text.size("vocab_size")
    end = text.token("eos_token_id", vocab)
    legacy = end == _LEGACY_END
    return DualEncoderSettings.of(
        vision,
        TextSettings(
            kind="clip",
            tower=text.tower(),
            vocab_size=vocab,
            context_length=text.size("max_position_embeddings"),
            dim=dim,
            end=None if legacy else end,
            pad=0 if legacy else end,
        ),
    )


def read_siglip_settings(config: Mapping[str, Any], report: Report) -> DualEncoderSettings:
    """Read SigLIP's settings in ``config.json``."""
    from transformers import SiglipTextConfig, SiglipVisionConfig

    vision = read_vision(Section(config.get("vision_config"), SiglipVisionConfig(), "vision_config", report), "siglip")
    text = Section(config.get("text_config"), SiglipTextConfig(), "text_config", report)
    vocab, tower = text.size("vocab_size"), text.tower()
    dim = tower.width if text.given.get("projection_size") is None else text.size("projection_size")
    if vision.dim != dim:
        report(
            f"its images have embeddings of {vision.dim} numbers, its texts of {dim} (text_config.projection_size): "
            "the config is damaged"
        )
    return DualEncoderSettings.of(
        vision,
        TextSettings(
            kind="siglip",
            tower=tower,
            vocab_size=vocab,
            context_length=text.size("max_position_embeddings"),
            dim=dim,
            end=None,
            pad=text.token("pad_token_id", vocab),
        ),
    )


def read_vision(section: Section, kind: Kind, dim: int | None = None) -> VisionSettings:
    """Read an image encoder's ``vision_config``; ``dim`` is the length of an embedding, None: the encoder's width."""
    tower, size, patch = section.tower(), section.size("image_size"), section.size("patch_size")
    if section.get("num_channels", 3) != 3:
        section.report(
            f"{section.name}.num_channels is {section.get('num_channels')!r}; rsedge exports red, green and blue"
        )
    if not section.get("vision_use_head", True):
        section.report(f"{section.name}.vision_use_head is false, so it gives no embedding of an image")
    if patch > size:
        section.report(f"{section.name}.patch_size ({patch}) is larger than image_size ({size}): the config is damaged")
    return VisionSettings(kind=kind, tower=tower, image_size=size, patch_size=patch, dim=dim or tower.width)


def canonical_name(name: str) -> str:
    """The name a tensor has in transformers' model today: some versions prefix the model, or nest a tower in itself."""
    name = re.sub(r"^(clip|siglip)\.", "", name)
    return re.sub(r"\b(text_model|vision_model)\.\1\.", r"\1.", name)


class DualEncoderPlan:
    """One CLIP or SigLIP model at one image size; see :class:`rsedge.export.checkpoint.Plan`."""

    def __init__(self, checkpoint: Checkpoint[DualEncoderSettings], image_size: int) -> None:
        self._checkpoint = checkpoint
        self._image = dataclasses.replace(checkpoint.image, size=image_size)
        tensors, text = checkpoint.tensors, checkpoint.settings.text
        scale = float(tensors["logit_scale"].reshape(-1)[0])
        bias = float(tensors["logit_bias"].reshape(-1)[0]) if "logit_bias" in tensors else None
        if not (math.isfinite(scale) and scale < math.log(1e6)) or not math.isfinite(bias or 0.0):
            raise CheckpointError(
                checkpoint.source,
                [f"its logit_scale is exp({scale:g}), its bias {bias}: training diverged, take an earlier checkpoint"],
            )
        self._embedding = EmbeddingSpec(
            dim=text.dim,
            logit_scale=math.exp(scale),
            logit_bias=bias,
            context_length=text.context_length,
            pad_to_context=text.kind == "siglip",
            pad_id=text.pad if text.kind == "clip" else _padding(checkpoint),
        )

    def graphs(self, precision: Precision) -> dict[str, GraphBuilder]:
        """The two encoders."""
        settings, tensors = self._checkpoint.settings, self._checkpoint.tensors
        return {
            "vision": vision_graph(settings.vision, tensors, self._image, precision),
            "text": text_graph(settings.text, tensors, precision),
        }

    def manifest_fields(self) -> dict[str, Any]:
        """What an embedding is, and how a text is brought to the graph."""
        return {"embedding": self._embedding}

    def parity(self, bundle: Bundle) -> dict[str, Any]:
        """See :func:`rsedge.export.verify.embedder_report`; a tokenizer must also end texts where CLIP reads them."""
        from transformers import AutoTokenizer

        text, path = self._checkpoint.settings.text, self._checkpoint.path
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        padding = "max_length" if text.kind == "siglip" else False
        rows = tokenizer(list(verify.TEXTS), padding=padding, truncation=True, max_length=text.context_length)
        ids: list[list[int]] = rows["input_ids"]
        report = verify.embedder_report(
            bundle, ids, lambda images, image: torch_embeddings(self._checkpoint, images, image, ids)
        )
        if text.kind == "clip" and any(row[-1] != (max(row) if text.end is None else text.end) for row in ids):
            wanted = "the largest id" if text.end is None else f"token {text.end} (text_config.eos_token_id)"
            report["problems"].append(
                f"the model reads a text at {wanted}, but the tokenizer does not end texts with it: save them together"
            )
        return report


def _padding(checkpoint: Checkpoint[DualEncoderSettings]) -> int:
    """The id that fills the texts of SigLIP: the tokenizer's, which the configuration need not repeat."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a stranger's tokenizer, and whatever transformers raises at it
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            checkpoint.source, [f"its tokenizer cannot be loaded ({reason}): save it again"]
        ) from error
    found = tokenizer.pad_token_id
    return checkpoint.settings.text.pad if found is None else int(found)


def torch_embeddings(
    checkpoint: Checkpoint[DualEncoderSettings], images: verify.UInt8, image: ImageSpec, ids: list[list[int]]
) -> tuple[verify.Float32, verify.Float32]:
    """Transformers' embeddings of unit length of ``images`` uint8 [B, S, S, 3] and of texts given by their tokens."""
    import torch
    import transformers

    settings = checkpoint.settings
    model = verify.torch_model(getattr(transformers, checkpoint.model_type.architecture), checkpoint.path)
    pixels, resized = verify.torch_images(images, image), settings.image_size != image.size
    with torch.no_grad():
        image_embeds = model.vision_model(pixel_values=pixels, interpolate_pos_encoding=resized).pooler_output
        # One by one: texts differ in length, and transformers' own padding is not in question here.
        text_embeds = torch.cat([model.text_model(input_ids=torch.tensor([row])).pooler_output for row in ids])
        if settings.text.kind == "clip":
            image_embeds = model.visual_projection(image_embeds)
            text_embeds = model.text_projection(text_embeds)
    normalize = torch.nn.functional.normalize
    return normalize(image_embeds, dim=-1).numpy(), normalize(text_embeds, dim=-1).numpy()


CLIP = ModelType(
    family="clip",
    title="CLIP",
    architecture="CLIPModel",
    otherwise="CLIP but not both of its encoders",
    tokenizer_files=("tokenizer.json", "vocab.json"),
    read_settings=read_clip_settings,
    canonical_name=canonical_name,
    plan=DualEncoderPlan,
)
SIGLIP = ModelType(
    family="clip",
    title="SigLIP",
    architecture="SiglipModel",
    otherwise="SigLIP but not both of its encoders",
    tokenizer_files=("tokenizer.json", "spiece.model"),
    read_settings=read_siglip_settings,
    canonical_name=canonical_name,
    plan=DualEncoderPlan,
)


# The graphs


def vision_graph(settings: VisionSettings, tensors: Tensors, image: ImageSpec, precision: Precision) -> GraphBuilder:
    """The image encoder.

    Inputs: ``pixels`` uint8 [B, size, size, 3].
    Outputs: ``image_embeds`` float32 [B, D] of unit length.
    Position embeddings are interpolated to the size of ``image``.
    """
    graph = GraphBuilder("vision")
    nn = Layers(graph, precision, tensors)
    embeds = unit_length(nn, encode_images(nn, settings, image))
    graph.output(embeds, "image_embeds", "float32", ["batch", settings.dim])
    return graph


def encode_images(nn: Layers, settings: VisionSettings, image: ImageSpec) -> str:
    """Declare the input ``pixels`` and encode it, [B, D] as the model gives it; arguments as :func:`vision_graph`."""
    graph, tensors, tower, name = nn.graph, nn.tensors, settings.tower, "vision_model.embeddings"
    grid = image.size // settings.patch_size
    tokens = grid**2 + settings.extra_tokens
    clip = settings.kind == "clip"
    bias = None if clip else tensors[f"{name}.patch_embedding.bias"]
    x = embed_patches(nn, image, settings.patch_size, tensors[f"{name}.patch_embedding.weight"], bias)
    if clip:
        x = prepend_token(nn, x, tensors[f"{name}.class_embedding"])
    table = tensors[f"{name}.position_embedding.weight"]
    positions = interpolate_positions(table, grid, extra=settings.extra_tokens)
    x = graph.reshape(graph.op("Add", x, nn.array("positions", positions)), -1, tower.width)
    encoder = Encoder(nn, tower, "vision_model", graph.ints(-1, tokens))
    if not clip:
        return _attention_pool(nn, tower, nn.norm(encoder.run(x), "vision_model.post_layernorm", tower.eps), tokens)

    def class_token(rows: str) -> str:
        return graph.op("Gather", graph.reshape(rows, -1, tokens, tower.width), graph.const(0, "int64"), axis=1)

    x = encoder.run(nn.norm(x, "vision_model.pre_layrnorm", tower.eps), reading=Reading(class_token))
    return nn.linear(nn.norm(x, "vision_model.post_layernorm", tower.eps), "visual_projection")


def _attention_pool(nn: Layers, tower: Tower, x: str, tokens: int) -> str:
    """SigLIP's head: a learnt query over all tokens, then an MLP, [B·S, W] → [B, W]."""
    graph, tensors, name = nn.graph, nn.tensors, "vision_model.head"
    width, heads, head_dim = tower.width, tower.heads, tower.head_dim
    weight, bias = tensors[f"{name}.attention.in_proj_weight"], tensors[f"{name}.attention.in_proj_bias"]
    # The query is the same for every image, so it is worked out here.
    query = (tensors[f"{name}.probe"].reshape(width) @ weight[:width].T + bias[:width]) * np.float32(head_dim**-0.5)
    both = nn.linear(x, f"{name}.attention.in_proj", weight[width:], bias[width:])
    k, v = split_heads(graph, both, tokens, heads, head_dim, 2)
    context = attend(nn, nn.array(f"{name}.query", query.reshape(1, heads, 1, head_dim)), k, v)
    x = nn.linear(graph.reshape(context, -1, width), f"{name}.attention.out_proj")
    hidden = nn.norm(x, f"{name}.layernorm", tower.eps)
    return graph.op("Add", x, mlp(nn, hidden, f"{name}.mlp", tower.act))


def text_graph(settings: TextSettings, tensors: Tensors, precision: Precision) -> GraphBuilder:
    """The text encoder.

    Inputs: ``input_ids`` int64 [B, T]; T is at most the context length for CLIP, and the context length for SigLIP.
    Outputs: ``text_embeds`` float32 [B, D] of unit length.
    """
    graph = GraphBuilder("text")
    nn = Layers(graph, precision, tensors)
    tower, name, clip = settings.tower, "text_model.embeddings", settings.kind == "clip"
    ids = graph.input("input_ids", "int64", ["batch", "tokens" if clip else settings.context_length])
    shape = graph.op("Shape", ids)
    words = nn.embedding(ids, "token_embedding", tensors[f"{name}.token_embedding.weight"])
    count = graph.op("Shape", ids, start=1, end=2)
    places = nn.array("positions", tensors[f"{name}.position_embedding.weight"])
    places = graph.op("Slice", places, graph.ints(0), count, graph.ints(0))
    x = graph.reshape(graph.op("Add", words, places), -1, tower.width)
    encoder = Encoder(nn, tower, "text_model", shape)
    tokens = graph.op("Concat", shape, graph.ints(tower.width), axis=0)
    if clip:
        mask = _causal_mask(graph, settings.context_length, count)
        # Where each text is read off, int64 [B, 1]: the first end token, or the first of the largest ids. In float32,
        # which holds every id exactly: more backends have its ArgMax than that of integers.
        end = settings.end
        marks = ids if end is None else graph.op("Equal", ids, graph.const(end, "int64"))
        place = graph.op("ArgMax", graph.cast(marks, "float32"), axis=1, keepdims=1)

        def end_token(rows: str) -> str:
            return graph.op("GatherND", graph.op("Reshape", rows, tokens), place, batch_dims=1)

        seen = graph.op("Unsqueeze", graph.op("Gather", mask, place, axis=0), graph.ints(1))
        x = encoder.run(x, mask=mask, reading=Reading(end_token, seen))
    else:

        def last_token(rows: str) -> str:
            return graph.op("Gather", graph.op("Reshape", rows, tokens), graph.const(-1, "int64"), axis=1)

        x = encoder.run(x, reading=Reading(last_token))
    x = nn.norm(x, "text_model.final_layer_norm", tower.eps)
    x = nn.linear(x, "text_projection" if clip else "text_model.head")
    graph.output(unit_length(nn, x), "text_embeds", "float32", ["batch", settings.dim])
    return graph


def _causal_mask(graph: GraphBuilder, longest: int, count: str) -> str:
    """0 where a token (row) may see another (column), very negative elsewhere; float32 [T, T]."""
    whole = np.triu(np.full((longest, longest), -1e30, np.float32), 1)
    both = graph.op("Concat", count, count, axis=0)
    return graph.op("Slice", graph.weight("causal_mask", whole), graph.ints(0, 0), both, graph.ints(0, 1))
