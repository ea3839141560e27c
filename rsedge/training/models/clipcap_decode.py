"""Captions of a :class:`~rsedge.training.models.clipcap_model.ClipCapModel` in torch: what its other runtimes must give
too.

Greedy and beam search are ClipCap's ``generate_beam``, of a batch and with a cache of keys and values. The score of a
hypothesis is the mean log-probability of its tokens, stop token included. For each image:

1. The prefix is run; the ``num_beams`` most likely first tokens make the hypotheses.
2. A hypothesis whose last token is the stop token is finished: it keeps its tokens and its score, and stays a
   candidate. Every other one is extended by each of its ``num_beams`` most likely next tokens; a candidate's score is
   the sum of its tokens' log-probabilities divided by how many they are.
3. The ``num_beams`` candidates of the highest score become the hypotheses; of equal scores, the one of the higher
   ranked hypothesis, then the more likely token. Step 2 repeats until all hypotheses are finished or have
   ``max_new_tokens`` tokens.
4. The hypothesis of the highest score is the caption, finished or not.

Log-probabilities and sums are float32. One beam is greedy search.

Sampling draws each token from the distribution that ``temperature``, ``top_k`` and ``top_p`` leave, until the stop
token or ``max_new_tokens``. A draw depends on the seed, the image's key and the position alone, by the runtime's own
generator (:mod:`rsedge.runtime.decoding.search`), so that an image's caption is the same in any batch and on either
side.

There is no start token: the prefix takes its place. A caption's stop token, "." of GPT-2, is part of its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from rsedge.errors import OptionError
from rsedge.runtime.decoding.options import DecodingOptions
from rsedge.runtime.decoding.search import draw

if TYPE_CHECKING:
    from rsedge.training.models.clipcap_model import ClipCapModel


@dataclass(frozen=True, slots=True)
class CaptionTokens:
    """A generated caption."""

    token_ids: tuple[int, ...]
    """Stop token included, if it came to that."""
    score: float
    """Mean log-probability of the tokens under the model, whatever filter they were drawn through."""


DEFAULTS = DecodingOptions(num_beams=5, max_new_tokens=67)
"""How ClipCap searches where nothing else is asked for."""


@torch.no_grad()
def generate(
    model: ClipCapModel,
    image_embeds: Tensor,
    options: DecodingOptions = DEFAULTS,
    *,
    keys: Sequence[int] | None = None,
) -> list[CaptionTokens]:
    """Captions of images, in evaluation mode whatever mode ``model`` is in.

    Args:
        model: The model; it is left in the mode it is in.
        image_embeds: float [N, D], of unit length: ``model.embed_images(pixel_values)``.
        options: How to search: ``num_beams`` and ``max_new_tokens``, or ``do_sample`` with ``top_p``, ``top_k``,
            ``temperature`` and ``seed``. Anything else is refused.
        keys: Of the draws, one per image, 0 to 2**64 − 1; None: 0 to N − 1. Only sampling heeds them.

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
            best = int((sums[place] / lengths[place]).argmax())  # they are in order but for rounding
            ids = history[place, best, : int(lengths[place, best])]
            found[int(image[place])] = CaptionTokens(
                tuple(ids.tolist()), float(sums[place, best] / lengths[place, best])
            )
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
        kept = [
            row
            for row, index in enumerate(rows)
            if tokens[index][-1] != stop and len(tokens[index]) < options.max_new_tokens
        ]
        if not kept:
            return [
                CaptionTokens(tuple(ids), float(score) / len(ids)) for ids, score in zip(tokens, scores, strict=True)
            ]
        rows = [rows[row] for row in kept]
        latest = torch.tensor([tokens[index][-1] for index in rows], device=device)
        runner.step(torch.tensor(kept, device=device), latest)
