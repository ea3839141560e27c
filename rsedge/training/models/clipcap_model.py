"""CLIPCap: a CLIP or SigLIP image embedding, mapped to a prefix of input embeddings that GPT-2 continues to a caption.
:func:`generate` decodes in torch; every other runtime must give the same.

The design is ClipCap's (Mokady et al., "ClipCap: CLIP Prefix for Image Captioning", 2021); the mappers hold their
parameters under the names and in the shapes of that code, so that its checkpoints load by renaming.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils import ModelOutput

from rsedge.errors import OptionError
from rsedge.runtime.decoding.options import DecodingOptions
from rsedge.runtime.decoding.search import draw
from rsedge.training.losses import IGNORED, caption_loss_sum

Mapper = Literal["mlp", "transformer"]

GPT2_FULL_STOP = 13
"""The token id of "." in GPT-2's vocabulary."""

_ENCODERS = {
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModelWithProjection),
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
}


class ClipCapConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """Sizes of a :class:`ClipCapModel`.

    Args:
        vision_config: Of the image encoder: a CLIPVisionConfig or SiglipVisionConfig, or its dict with ``model_type``.
        text_config: Of GPT-2: a GPT2Config or its dict; the dropouts of GPT-2 are set there.
        prefix_length: Input embeddings of GPT-2 that stand for the image.
        mapper: ``mlp`` (Linear, Tanh, Linear) or ``transformer``.
        clip_length: Tokens the transformer mapper makes of the image embedding; None: ``prefix_length``.
        mapper_layers, mapper_heads, mapper_ratio: Of the transformer mapper: layers, attention heads, and width of its
            MLPs over its own.
        mapper_dropout: In the transformer mapper's MLPs.
        stop_token_id: Ends a caption and is part of it.

    Raises:
        OptionError: Every value that is not accepted.
    """

    model_type = "clipcap"
    sub_configs = {"vision_config": AutoConfig, "text_config": GPT2Config}  # noqa: RUF012 - as transformers declares it

    def __init__(
        self,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        *,
        prefix_length: int = 40,
        mapper: Mapper = "mlp",
        clip_length: int | None = None,
        mapper_layers: int = 8,
        mapper_heads: int = 8,
        mapper_ratio: float = 2.0,
        mapper_dropout: float = 0.0,
        stop_token_id: int = GPT2_FULL_STOP,
        **kwargs: Any,
    ) -> None:
        # Copies: transformers resets the attention implementation of the parts' configurations below.
        self.vision_config = _vision_config(copy.deepcopy(vision_config))
        text_config = copy.deepcopy(text_config)
        self.text_config = text_config if isinstance(text_config, GPT2Config) else GPT2Config(**(text_config or {}))
        self.prefix_length = prefix_length
        self.mapper = mapper
        self.clip_length = prefix_length if clip_length is None else clip_length
        self.mapper_layers = mapper_layers
        self.mapper_heads = mapper_heads
        self.mapper_ratio = mapper_ratio
        self.mapper_dropout = mapper_dropout
        self.stop_token_id = stop_token_id
        if problems := self._problems():
            raise OptionError("; ".join(problems))
        # GPT-2 ties its head to its word embeddings, inside itself; there is nothing to tie at this level.
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    @property
    def image_width(self) -> int:
        """Length of an image embedding."""
        clip = self.vision_config.model_type == "clip_vision_model"
        return int(self.vision_config.projection_dim if clip else self.vision_config.hidden_size)

    def _problems(self) -> list[str]:
        problems = [
            f"{name} is {value}, expected a whole number above 0"
            for name in ("prefix_length", "clip_length", "mapper_layers", "mapper_heads")
            if not isinstance(value := getattr(self, name), int) or value < 1
        ]
        width, positions, words = (getattr(self.text_config, name) for name in ("n_embd", "n_positions", "vocab_size"))
        if self.mapper not in get_args(Mapper):
            problems.append(f"mapper is {self.mapper!r}, expected one of {', '.join(get_args(Mapper))}")
        elif not problems and self.mapper == "transformer" and width % self.mapper_heads:
            problems.append(f"mapper_heads is {self.mapper_heads}, which does not divide GPT-2's width {width}")
        if not 0 <= self.mapper_dropout < 1:
            problems.append(f"mapper_dropout is {self.mapper_dropout}, expected 0 up to, not including, 1")
        if self.mapper_ratio <= 0:
            problems.append(f"mapper_ratio is {self.mapper_ratio}, expected a number above 0, such as 2")
        if not problems and self.prefix_length >= positions:
            problems.append(f"prefix_length is {self.prefix_length}, but GPT-2 has {positions} positions in all")
        if not 0 <= self.stop_token_id < words:
            problems.append(f"stop_token_id is {self.stop_token_id}, but GPT-2 has {words} tokens")
        return problems


def _vision_config(value: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig:
    if value is None:
        return CLIPVisionConfig()
    kind = value.get("model_type", "clip_vision_model") if isinstance(value, dict) else value.model_type
    if kind not in _ENCODERS:
        raise OptionError(f"vision_config has model_type {kind!r}, expected one of {', '.join(_ENCODERS)}")
    return _ENCODERS[kind][0](**value) if isinstance(value, dict) else value


@dataclass
class ClipCapOutput(ModelOutput):  # type: ignore[misc]
    """Result of :meth:`ClipCapModel.forward`."""

    loss: Tensor | None = None
    """Mean cross entropy per learnt token, a float32 scalar; None without labels."""
    logits: Tensor | None = None
    """[rows, T, vocabulary]; position t is the prediction of token t."""
    image_embeds: Tensor | None = None
    """Unit length, [images, D]."""


class ClipCapModel(PreTrainedModel):  # type: ignore[misc]
    """Image encoder, mapper and GPT-2.

    Args:
        config: The sizes.
        encoder, language_model: Trained parts of those sizes, taken as they are; None makes random ones.

    Attributes:
        encoder: CLIPVisionModelWithProjection or SiglipVisionModel.
        mapper: :class:`MlpMapper` or :class:`TransformerMapper`.
        language_model: GPT2LMHeadModel.
    """

    config_class = ClipCapConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["CLIPEncoderLayer", "SiglipEncoderLayer", "GPT2Block", "MapperLayer"]  # noqa: RUF012

    def __init__(
        self,
        config: ClipCapConfig,
        encoder: PreTrainedModel | None = None,
        language_model: GPT2LMHeadModel | None = None,
    ) -> None:
        super().__init__(config)
        self.encoder = encoder or _ENCODERS[config.vision_config.model_type][1](config.vision_config)
        self.language_model = language_model or GPT2LMHeadModel(config.text_config)
        self.mapper: nn.Module = TransformerMapper(config) if config.mapper == "transformer" else MlpMapper(config)
        self.post_init()

    @classmethod
    def from_parts(cls, encoder: PreTrainedModel, language_model: GPT2LMHeadModel, **settings: Any) -> ClipCapModel:
        """A model of trained parts and a random mapper; ``settings`` as :class:`ClipCapConfig` takes them."""
        config = ClipCapConfig(encoder.config, language_model.config, **settings)
        return cls(config, encoder, language_model)

    def _init_weights(self, module: nn.Module) -> None:
        # As torch makes them, which is what ClipCap trains from; the parts have their own rules.
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, TransformerMapper):
            nn.init.normal_(module.prefix_const)

    def train(self, mode: bool = True) -> ClipCapModel:
        """Switch to training; parts without a trainable parameter stay in evaluation mode."""
        super().train(mode)
        for part in (self.encoder, self.language_model):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """Image embeddings of unit length: normalised pixels, float [N, 3, H, W] → float [N, D]."""
        output = self.encoder(pixel_values=pixel_values)
        clip = self.config.vision_config.model_type == "clip_vision_model"
        return functional.normalize(output.image_embeds if clip else output.pooler_output, dim=-1)

    def prefix(self, image_embeds: Tensor) -> Tensor:
        """Input embeddings of GPT-2: unit-length image embeddings, [N, D] → [N, prefix_length, width]."""
        return cast("Tensor", self.mapper(image_embeds))

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        image_embeds: Tensor | None = None,
        captions_per_image: Tensor | Sequence[int] | None = None,
    ) -> ClipCapOutput:
        """Predict every token of captions from the image and the tokens before it.

        Args:
            pixel_values: float [N, 3, H, W], normalised; or else
            image_embeds: float [N, D], of unit length.
            input_ids: int64 [rows, T], stop token included; padding comes last.
            attention_mask: int [rows, T], 0 at padding; None where there is none.
            labels: int64 [rows, T]: ``input_ids``, with −100 where a token is not learnt (padding).
            captions_per_image: How many adjacent rows belong to each image, N numbers that sum to ``rows``; None: one.
                Encoder and mapper run once per image whatever it is.

        Raises:
            ValueError: Inputs that do not fit together.
        """
        if input_ids is None:
            raise ValueError("input_ids are missing: ClipCapModel predicts the tokens of captions")
        if pixel_values is not None and image_embeds is None:
            image_embeds = self.embed_images(pixel_values)
        elif pixel_values is not None or image_embeds is None:
            raise ValueError("give either pixel_values or image_embeds")
        prefix = self.prefix(image_embeds)
        if captions_per_image is not None:
            prefix = prefix.repeat_interleave(torch.as_tensor(captions_per_image, device=prefix.device), dim=0)
        rows, length = input_ids.shape
        if len(prefix) != rows:
            raise ValueError(f"{rows} rows of input_ids for {len(prefix)} of images: check captions_per_image")
        limit = self.config.text_config.n_positions - prefix.shape[1] + 1
        if length > limit:
            raise ValueError(
                f"captions of {length} tokens; GPT-2 has positions for {limit} behind the prefix: cut them"
            )
        # The last token predicts nothing, so it is not run; the last prefix position predicts the first token.
        words = self.language_model.get_input_embeddings()(input_ids[:, :-1])
        if attention_mask is not None:
            seen = attention_mask.new_ones(rows, prefix.shape[1])
            attention_mask = torch.cat([seen, attention_mask[:, :-1]], dim=1)
        logits = self.language_model(
            inputs_embeds=torch.cat([prefix, words.to(prefix.dtype)], dim=1),
            attention_mask=attention_mask,
            use_cache=False,
            logits_to_keep=length,
        ).logits
        loss = None
        if labels is not None:
            loss = caption_loss_sum(logits, labels) / (labels != IGNORED).sum().clamp(min=1)
        return ClipCapOutput(loss=loss, logits=logits, image_embeds=image_embeds)


class MlpMapper(nn.Module):
    """Linear → Tanh → Linear, hidden width half the output's: [N, D] → [N, prefix_length, width]."""

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__()
        self.prefix_length = config.prefix_length
        output = config.prefix_length * config.text_config.n_embd
        self.model = nn.Sequential(
            nn.Linear(config.image_width, output // 2), nn.Tanh(), nn.Linear(output // 2, output)
        )

    def forward(self, image_embeds: Tensor) -> Tensor:
        """The prefix."""
        return cast("Tensor", self.model(image_embeds)).view(len(image_embeds), self.prefix_length, -1)


class TransformerMapper(nn.Module):
    """A transformer over ``clip_length`` tokens of the image and learnt constants, which it turns into the prefix."""

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__()
        width = config.text_config.n_embd
        self.clip_length = config.clip_length
        self.linear = nn.Linear(config.image_width, config.clip_length * width)
        self.prefix_const = nn.Parameter(torch.randn(config.prefix_length, width))
        layers = nn.ModuleList(MapperLayer(config) for _ in range(config.mapper_layers))
        self.transformer = nn.ModuleDict({"layers": layers})

    def forward(self, image_embeds: Tensor) -> Tensor:
        """The prefix: [N, D] → [N, prefix_length, width]."""
        tokens: Tensor = self.linear(image_embeds).view(len(image_embeds), self.clip_length, -1)
        constants = self.prefix_const.to(tokens.dtype).expand(len(tokens), -1, -1)
        tokens = torch.cat([tokens, constants], dim=1)
        for layer in self.transformer["layers"].children():
            tokens = layer(tokens)
        return tokens[:, self.clip_length :]


class MapperLayer(nn.Module):
    """Pre-norm self-attention and ReLU MLP. Dropout acts in the MLP alone, as in the published models."""

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__()
        width = config.text_config.n_embd
        self.norm1 = nn.LayerNorm(width)
        self.attn = MapperAttention(width, config.mapper_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MapperMlp(width, int(width * config.mapper_ratio), config.mapper_dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T, width] → the same shape."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return cast("Tensor", tokens + self.mlp(self.norm2(tokens)))


class MapperAttention(nn.Module):
    """Multi-head self-attention, each token seeing all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T, width] → the same shape."""
        rows, length, _ = tokens.shape
        queries = self.to_queries(tokens).view(rows, length, self.heads, -1).transpose(1, 2)
        keys, values = self.to_keys_values(tokens).view(rows, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values)
        return cast("Tensor", self.project(mixed.transpose(1, 2).flatten(2)))


class MapperMlp(nn.Module):
    """Linear → ReLU → Linear, dropout after each."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T, width] → the same shape."""
        return cast("Tensor", self.dropout(self.fc2(self.dropout(functional.relu(self.fc1(tokens))))))


def register_auto_classes() -> None:
    """Let AutoConfig and AutoModel of transformers know ``clipcap``; may be called again."""
    AutoConfig.register("clipcap", ClipCapConfig, exist_ok=True)
    AutoModel.register(ClipCapConfig, ClipCapModel, exist_ok=True)


@dataclass(frozen=True, slots=True)
class CaptionTokens:
    """A generated caption."""

    token_ids: tuple[int, ...]
    """Stop token included, if it came to that."""
    score: float
    """Mean log-probability of the tokens under the model, whatever filter they were drawn through."""


DEFAULTS = DecodingOptions(num_beams=5, max_new_tokens=67)
"""ClipCap's own search."""


@torch.no_grad()
def generate(
    model: ClipCapModel,
    image_embeds: Tensor,
    options: DecodingOptions = DEFAULTS,
    *,
    keys: Sequence[int] | None = None,
) -> list[CaptionTokens]:
    """Captions of images, in evaluation mode; ``model`` stays in the mode it is in.

    Greedy and beam search are ClipCap's ``generate_beam``, of a batch and with a cache of keys and values. The score of
    a hypothesis is the mean log-probability of its tokens, stop token included. For each image:

    1. The prefix is run; the ``num_beams`` most likely first tokens make the hypotheses.
    2. A hypothesis whose last token is the stop token is finished: it keeps its tokens and its score, and stays a
       candidate. Every other one is extended by each of its ``num_beams`` most likely next tokens; a candidate's score
       is the sum of its tokens' log-probabilities divided by how many they are.
    3. The ``num_beams`` candidates of the highest score become the hypotheses; of equal scores, the one of the higher
       ranked hypothesis, then the more likely token. Step 2 repeats until all hypotheses are finished or have
       ``max_new_tokens`` tokens.
    4. The hypothesis of the highest score is the caption, finished or not.

    Log-probabilities and sums are float32. One beam is greedy search. Sampling draws each token from the distribution
    that ``temperature``, ``top_k`` and ``top_p`` leave, until the stop token or ``max_new_tokens``. A draw depends on
    the seed, the image's key and the position alone, by the runtime's own generator
    (:mod:`rsedge.runtime.decoding.search`), so an image's caption is the same in any batch and on either side.

    There is no start token: the prefix takes its place. A caption's stop token, "." of GPT-2, is part of its text.

    Args:
        model: The model.
        image_embeds: float [N, D], of unit length: ``model.embed_images(pixel_values)``.
        options: How to search: ``num_beams`` and ``max_new_tokens``, or ``do_sample`` with ``top_p``, ``top_k``,
            ``temperature`` and ``seed``. Anything else is refused.
        keys: Of the draws, one per image, 0 to 2**64 − 1; None: 0 to N − 1. Only sampling uses them.

    Raises:
        OptionError: Every option that is not accepted here.
    """
    keys = range(len(image_embeds)) if keys is None else keys
    text = model.config.text_config
    problems = options.averaged_problems(text.vocab_size)
    room = text.n_positions - model.config.prefix_length + 1  # the last token is not run
    if options.max_new_tokens > room:
        problems.append(f"max_new_tokens is {options.max_new_tokens}; behind its prefix GPT-2 has room for {room}")
    if len(keys) != len(image_embeds):
        problems.append(f"there are {len(keys)} keys for {len(image_embeds)} images: give one per image")
    if problems:
        raise OptionError("; ".join(problems))
    if not len(image_embeds):
        return []
    stop, training = model.config.stop_token_id, model.training
    model.eval()
    try:
        runner = _Runner(model, image_embeds)
        if options.do_sample:
            return _sample(runner, options, stop, keys)
        return _beam_search(runner, options.num_beams, options.max_new_tokens, stop)
    finally:
        model.train(training)


class _Runner:
    """GPT-2 with the cache of the rows that are still at work."""

    def __init__(self, model: ClipCapModel, image_embeds: Tensor) -> None:
        self.gpt, self.cache = model.language_model, DynamicCache()
        self.logits = self._run(inputs_embeds=model.prefix(image_embeds))

    def _run(self, **inputs: Tensor) -> Tensor:
        output = self.gpt(past_key_values=self.cache, use_cache=True, logits_to_keep=1, **inputs)
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def step(self, parents: Tensor, tokens: Tensor) -> None:
        """Let row i go on from row ``parents[i]`` with ``tokens[i]``; ``logits`` [rows, vocabulary] follow."""
        self.cache.reorder_cache(parents)
        self.logits = self._run(input_ids=tokens[:, None])


def _beam_search(runner: _Runner, beams: int, longest: int, stop: int) -> list[CaptionTokens]:
    images, device = len(runner.logits), runner.logits.device
    found: dict[int, CaptionTokens] = {}
    image = torch.arange(images, device=device)  # which image each place of the batch holds
    sums, tokens = runner.logits.log_softmax(-1).topk(beams)
    history = tokens[:, :, None]  # int64 [places, beams, longest so far]
    lengths = torch.ones_like(tokens)
    ended = tokens == stop
    parents = torch.arange(images, device=device)[:, None].expand(-1, beams)  # row of the cache each goes on from
    while True:
        # Those that are done leave the batch, so that a short caption does not pay for a long one.
        done = ended.all(dim=1) | (history.shape[2] >= longest)
        for place in done.nonzero()[:, 0].tolist():
            scores = sums[place] / lengths[place]
            best = int(scores.argmax())  # they are in order but for rounding
            ids = history[place, best, : int(lengths[place, best])].tolist()
            found[int(image[place])] = CaptionTokens(tuple(ids), float(scores[best]))
        if done.all():
            return [found[index] for index in range(images)]
        image, sums, history, lengths, ended, parents = (
            kept[~done] for kept in (image, sums, history, lengths, ended, parents)
        )
        runner.step(parents.flatten(), history[:, :, -1].flatten())

        places = len(image)
        steps, tokens = (part.view(places, beams, beams) for part in runner.logits.log_softmax(-1).topk(beams))
        totals = sums[:, :, None] + steps
        # A finished hypothesis has one candidate, itself.
        totals[ended] = -torch.inf
        totals[:, :, 0] = torch.where(ended, sums, totals[:, :, 0])
        lengths = lengths + ~ended
        order = (totals / lengths[:, :, None]).flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :beams]
        source = order // beams
        sums, tokens = totals.flatten(1).gather(1, order), tokens.flatten(1).gather(1, order)
        lengths, ended = lengths.gather(1, source), ended.gather(1, source)
        history = history.gather(1, source[:, :, None].expand(-1, -1, history.shape[2]))
        history = torch.cat([history, tokens.where(~ended, stop)[:, :, None]], dim=2)
        ended = ended | (tokens == stop)
        parents = source + torch.arange(places, device=device)[:, None] * beams


def _sample(runner: _Runner, options: DecodingOptions, stop: int, keys: Sequence[int]) -> list[CaptionTokens]:
    images, device = len(runner.logits), runner.logits.device
    tokens: list[list[int]] = [[] for _ in range(images)]
    scores = np.zeros(images, np.float32)
    rows = list(range(images))  # which image each row of the batch holds
    while True:
        logits = runner.logits.cpu().numpy()
        log_probs = runner.logits.log_softmax(-1).cpu().numpy()
        for row, index in enumerate(rows):
            token = draw(logits[row], options, key=keys[index], position=len(tokens[index]))
            tokens[index].append(token)
            scores[index] += log_probs[row, token]
        longest = options.max_new_tokens
        kept = [row for row, i in enumerate(rows) if tokens[i][-1] != stop and len(tokens[i]) < longest]
        if not kept:
            found = zip(tokens, scores, strict=True)
            return [CaptionTokens(tuple(ids), float(score) / len(ids)) for ids, score in found]
        rows = [rows[row] for row in kept]
        latest = torch.tensor([tokens[index][-1] for index in rows], device=device)
        runner.step(torch.tensor(kept, device=device), latest)
