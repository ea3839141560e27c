"""CLIP and SigLIP: dual encoders, fine-tuned as they were trained or with RSDiX's self-distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from rsedge.errors import BackendError, OptionError
from rsedge.manifest import ImageSpec
from rsedge.texts import first_line
from rsedge.training.losses import ExponentialAverage, RsdixLoss
from rsedge.training.models.loading import (
    config_type,
    default_image,
    image_spec,
    learn_clip_bpe,
    load_pretrained,
    merge_config,
    obtain_tokenizer,
    resize_vision,
)
from rsedge.training.models.task import Batch, ContrastiveTask, stack
from rsedge.training.recipe import ContrastiveObjective

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rsedge.datasets.examples import CaptionData
    from rsedge.manifest import ImageSpec
    from rsedge.training.data.samples import Sample
    from rsedge.training.recipe import Recipe

_KINDS: dict[str, Any] = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}
_MAX_LOG_SCALE = math.log(100)  # CLIP's own bound
_LEARNT = "loss."  # prefix of the loss's scalars and projection among the outputs


@dataclass(frozen=True)
class ClipCollate:
    """Samples → batch, with Sentence-BERT's embeddings of the texts where a table of them is given."""

    tokenizer: Any
    """Of the model."""
    max_tokens: int
    """Longest text, start and end included."""
    fixed: bool
    """Pad every text to ``max_tokens``, as SigLIP was trained."""
    sbert: Mapping[str, np.ndarray] | None
    """Text → float32 embedding."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch."""
        texts = [caption for sample in samples for caption in sample.captions]
        rows = self.tokenizer(
            texts,
            padding="max_length" if self.fixed else "longest",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
            return_attention_mask=True,
        )
        batch = {**stack(samples), "input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
        if self.sbert is not None:
            batch["sbert"] = torch.from_numpy(np.stack([self.sbert[text] for text in texts]))
        return batch


class ClipTask(ContrastiveTask):
    """CLIP or SigLIP with the losses of :class:`~rsedge.training.losses.RsdixLoss`."""

    parts: ClassVar[Mapping[str, str]] = {
        "vision": "model.vision_model.* model.visual_projection.*",
        "text": "model.text_model.* model.text_projection.*",
    }

    def __init__(
        self, model: Any, image: ImageSpec, collate: ClipCollate, tokenizer: Any, objective: ContrastiveObjective
    ) -> None:
        super().__init__(model, image, collate, tokenizer)
        settings = objective.rsdix
        self.objective = settings
        widths = {}
        if settings.teacher == "sbert":
            assert collate.sbert is not None
            config = model.config
            width = config.vision_config.hidden_size if config.model_type == "siglip" else config.projection_dim
            widths = {"sbert_width": len(next(iter(collate.sbert.values()))), "width": int(width)}
        self.rsdix = RsdixLoss(settings, **widths)
        self.teacher = ExponentialAverage(model, decay=objective.teacher_decay) if settings.teacher != "none" else None
        if settings.use_sigmoid_loss:
            # The loss learns a temperature and a bias of its own, which take the place of these when it is saved.
            self.model.logit_scale.requires_grad_(False)
            self.model.logit_bias.requires_grad_(False)
        elif model.config.model_type == "siglip":
            self.model.logit_bias.requires_grad_(False)  # the softmax does not see a bias

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Embeddings of unit length, the teacher's, Sentence-BERT's as they are, and what the loss learns."""
        pixels = self.normalize(batch["pixels"])
        outputs = {
            "image": normalize(embed_pixels(self.model, pixels), dim=-1),
            "text": normalize(embed_tokens(self.model, batch), dim=-1),
            **{f"{_LEARNT}{name}": value for name, value in self.rsdix.named_parameters()},
        }
        if not self.objective.use_sigmoid_loss:
            outputs["logit_scale"] = self.model.logit_scale.exp()
        if self.teacher is not None:
            with torch.no_grad():
                outputs["teacher_image"] = normalize(embed_pixels(self.teacher.module, pixels), dim=-1)
                if self.objective.teacher == "ema":
                    outputs["teacher_text"] = normalize(embed_tokens(self.teacher.module, batch), dim=-1)
        if "sbert" in batch:
            outputs["sbert"] = batch["sbert"]
        return outputs

    def loss(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As :class:`RsdixLoss`, its parameters taken from ``outputs``."""
        learnt = {name.removeprefix(_LEARNT): value for name, value in outputs.items() if name.startswith(_LEARNT)}
        text = outputs.get("sbert") if self.objective.teacher == "sbert" else outputs.get("teacher_text")
        arguments = (outputs["image"], outputs["text"], outputs.get("logit_scale"), outputs.get("teacher_image"), text)
        losses: dict[str, Tensor] = functional_call(self.rsdix, learnt, arguments)
        return losses

    @torch.no_grad()
    def after_step(self) -> None:
        """Bound the temperature as CLIP does, and move the teacher."""
        if not self.objective.use_sigmoid_loss:
            self.model.logit_scale.clamp_(0, _MAX_LOG_SCALE)
        if self.teacher is not None:
            self.teacher.update(self.model)

    def model_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's weights; the learnt temperature and bias become its own."""
        weights = super().model_state(state)
        if self.objective.use_sigmoid_loss:
            weights["logit_scale"] = state["rsdix.sigmoid_log_temperature"].reshape(weights["logit_scale"].shape)
            weights["logit_bias"] = state["rsdix.sigmoid_bias"].reshape(weights["logit_bias"].shape)
        return weights


def embed_pixels(model: Any, pixels: Tensor) -> Tensor:
    """Image embeddings as the model gives them: normalised pixels, float [B, 3, S, S] → float [B, D]."""
    pooled: Tensor = model.vision_model(pixel_values=pixels).pooler_output
    return model.visual_projection(pooled) if model.config.model_type == "clip" else pooled


def embed_tokens(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Text embeddings as the model gives them: ``input_ids`` and ``attention_mask`` [rows, T] → float [rows, D]."""
    if model.config.model_type != "clip":
        # SigLIP was trained on texts of one length, its padding seen like any other token.
        pooled: Tensor = model.text_model(input_ids=batch["input_ids"]).pooler_output
        return pooled
    text = model.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    projected: Tensor = model.text_projection(text.pooler_output)
    return projected


def make(recipe: Recipe, data: CaptionData) -> ClipTask:
    """The task of a recipe. Raises OptionError: the model is neither CLIP nor SigLIP, or settings do not fit it."""
    wanted = recipe.model
    objective = recipe.contrastive or ContrastiveObjective()
    tokenizer = obtain_tokenizer(wanted, wanted.init, data, learn_clip_bpe)
    if wanted.init is None:
        changes = dict(wanted.config)
        kind = changes.pop("model_type", "clip")
        if kind not in _KINDS:
            raise OptionError(f"model.config.model_type is {kind!r}: give {' or '.join(_KINDS)}")
        config_class, model_class = _KINDS[kind]
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        defaults = {
            "vision_config": {"image_size": wanted.image_size or 224},
            "text_config": {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **ids},
        }
        config = config_class(**merge_config(config_class, defaults, changes))
        if kind == "clip":  # the towers, opened alone, read it from their own configuration
            config.vision_config.projection_dim = config.text_config.projection_dim = config.projection_dim
        model, image = model_class(config), default_image(kind, config.vision_config.image_size)
    else:
        kind = config_type(wanted.init, wanted.revision)
        if kind not in _KINDS:
            raise OptionError(f"{wanted.init} is a {kind} model; rsedge train clip takes {' or '.join(_KINDS)}")
        model = load_pretrained(_KINDS[kind][1], wanted)
        image = image_spec(wanted.init, wanted.revision)
    siglip = model.config.model_type == "siglip"
    if objective.rsdix.use_sigmoid_loss and not siglip:
        raise OptionError(
            "contrastive.rsdix.use_sigmoid_loss needs a SigLIP model: CLIP has no bias that the checkpoint could keep"
        )
    size = wanted.image_size or image.size
    resize_vision(model, size)
    longest = model.config.text_config.max_position_embeddings
    if wanted.max_tokens > longest:
        raise OptionError(
            f"model.max_tokens is {wanted.max_tokens}, but the text encoder has {longest} positions: lower it"
        )
    # SigLIP reads its last position, so a text must always be as long as in its training.
    tokens = longest if siglip else wanted.max_tokens
    texts = (
        text
        for example in data.examples
        for text in (*example.captions, *(text for group in example.paraphrases for text in group))
    )
    table = sentence_embeddings(objective.sbert, texts) if objective.sbert else None
    return ClipTask(
        model, replace(image, size=size), ClipCollate(tokenizer, tokens, siglip, table), tokenizer, objective
    )


def sentence_embeddings(model: str, texts: Iterable[str]) -> dict[str, np.ndarray]:
    """Every text's Sentence-BERT embedding, computed once before the run: float32 [W] each.

    Raises:
        BackendError: sentence-transformers is not installed.
        OptionError: There is no such model.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise BackendError(f"contrastive.sbert needs {error.name}: pip install 'rsedge[sbert]'") from error
    distinct = sorted(set(texts))
    try:
        encoder = SentenceTransformer(model)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"contrastive.sbert is {model}, which cannot be had ({first_line(error)}): give a folder or hub id"
        ) from error
    rows = encoder.encode(distinct, batch_size=64, convert_to_numpy=True, show_progress_bar=False)
    return dict(zip(distinct, rows.astype(np.float32), strict=True))
