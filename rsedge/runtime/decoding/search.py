"""Greedy search, beam search and sampling over a batch of images that come and go.

A search handles token ids and scores, no cache and no backend. It holds its images in slots 0 to n − 1, each with as
many rows (hypotheses) as the search has beams; rows of a slot are adjacent. One round is: :meth:`Search.request`
describes a decoder run, a decoder runs it, :meth:`Search.advance` takes its output and returns the row that each new
row continues and the slots that are done. Slots are at different lengths: images enter and leave at any round.

Greedy and beam search give what ``transformers.generate`` gives for the same scores; the beam bookkeeping follows its
``GenerationMixin._beam_search`` (transformers 5) image by image. CLIPCap has a beam search of its own, whose scores are
averages over the length. Sampling filters as transformers does; each draw comes from a counter-based generator (Philox)
keyed by the seed and the image's key, with the position in the caption as its counter. So an image's caption is the
same in whatever batch, order or thread it is decoded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rsedge.runtime.decoding.options import DecodingOptions

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

# What transformers adds to the score of a hypothesis to rule it out.
_RULED_OUT = np.float32(-1e9)
# Enough of the most likely tokens that a top-p filter seldom needs the whole vocabulary sorted.
_HEAD = 512


@dataclass(frozen=True, slots=True)
class Request:
    """What one decoder run must compute for R rows."""

    tokens: Ints
    """int64 [R], each row's latest token."""
    lengths: Ints
    """int64 [R], how many tokens each row has in its cache, which is also the position of ``tokens``."""
    top: int
    """Best tokens wanted per row."""
    watch: Ints
    """int64 [R, W], tokens whose logits are wanted besides (W may be 0)."""
    full: bool
    """Whether the logits of the whole vocabulary are wanted instead."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a decoder run gave, float32 and int64."""

    top_logits: Floats
    top_ids: Ints
    """[R, top] both, best first."""
    logsumexp: Floats
    """[R], over the vocabulary."""
    watched: Floats
    """[R, W], logits of ``Request.watch``."""
    logits: Floats | None = None
    """[R, V] if asked for in full."""


def make_search(
    options: DecodingOptions, *, slots: int, bos: int, eos: int, vocab_size: int, averaged: bool = False
) -> Search:
    """The search that ``options`` ask for.

    Args:
        options: What to generate.
        slots: Images at once, at most.
        bos, eos: What every row starts from, and what ends a caption.
        vocab_size: Tokens there are.
        averaged: Whether beams are CLIPCap's (see :class:`_AveragedBeam`) rather than transformers'; ``options`` then
            passed :meth:`~rsedge.runtime.decoding.options.DecodingOptions.averaged_problems`.
    """
    beam = _AveragedBeam if averaged else _Beam
    kind = beam if options.num_beams > 1 else _Sample if options.do_sample else _Greedy
    return kind(options, slots=slots, bos=bos, eos=eos, vocab_size=vocab_size)


class Search(ABC):
    """A search over up to ``slots`` images at once, each with ``rows`` rows.

    ``tokens`` [slots, rows, 1 + max_new_tokens] begins with the start token; ``length`` [slots] counts the tokens
    generated so far; ``score`` [slots, rows] sums log-probabilities. Every array of a search has one entry per slot.
    """

    _per_row = 1
    """Candidates wanted of a row, for each row of its image."""
    _full = False
    """Whether the logits of the whole vocabulary are wanted."""

    def __init__(self, options: DecodingOptions, *, slots: int, bos: int, eos: int, vocab_size: int) -> None:
        self.options, self.bos, self.eos, self.vocab_size = options, bos, eos, vocab_size
        self.rows = options.num_beams
        self.tokens = np.full((slots, self.rows, 1 + options.max_new_tokens), bos, np.int64)
        self.length = np.zeros(slots, np.int64)
        self.score = np.zeros((slots, self.rows), np.float32)
        self.key = np.zeros(slots, np.uint64)
        # Whether anything stands between a logit and its use.
        self._processes = (
            options.repetition_penalty != 1 or options.no_repeat_ngram_size > 0 or options.min_new_tokens > 0
        )

    def start(self, slot: int, key: int) -> None:
        """Put a new image into ``slot``; ``key`` seeds its draws."""
        self.tokens[slot], self.length[slot], self.score[slot], self.key[slot] = self.bos, 0, 0.0, key

    def keep(self, sources: Ints) -> None:
        """Let slot i hold what slot ``sources[i]`` holds; later slots become free."""
        for array in vars(self).values():
            if isinstance(array, np.ndarray):
                array[: len(sources)] = array[sources]

    def request(self, count: int) -> Request:
        """What to run for slots 0 to ``count`` − 1."""
        lengths = np.repeat(self.length[:count], self.rows)
        history = self._history(count)
        tokens = np.take_along_axis(history, lengths[:, None], axis=1)[:, 0]
        best, watch = self._per_row * self.rows, history[:, :0]
        if self._processes and not self._full:
            # Processing can only demote tokens seen before and the end token (or promote those watched): with as many
            # candidates more, enough untouched ones remain.
            best += int(lengths.max()) + 2
            if self.options.repetition_penalty != 1:
                watch = self._seen(count)
        return Request(tokens, lengths, min(best, self.vocab_size), watch, self._full)

    @abstractmethod
    def advance(self, count: int, output: StepOutput) -> tuple[Ints, Flags]:
        """Take one round's output.

        Returns:
            For each row the row whose cache it continues, int64 [R], and for each slot whether it is done, bool [n].
        """

    @abstractmethod
    def result(self, slot: int) -> tuple[tuple[int, ...], float]:
        """The token ids of a finished slot, end token included, and their score."""

    def _history(self, count: int) -> Ints:
        return self.tokens[:count].reshape(count * self.rows, -1)

    def _seen(self, count: int) -> Ints:
        """Every row's tokens so far, int64 [R, W]; shorter rows are filled up with the start token they begin with."""
        lengths = np.repeat(self.length[:count], self.rows)[:, None]
        longest = int(lengths.max()) + 1
        return np.where(np.arange(longest) <= lengths, self._history(count)[:, :longest], self.bos)

    def _candidates(self, count: int, output: StepOutput, *, log_probs: bool) -> tuple[Ints, Floats, Floats]:
        """Token ids, processed scores and the model's own log-probabilities of the candidates, each [R, K].

        Log-probabilities are processed (beam search) or logits (greedy search), as transformers does.
        """
        base = output.logsumexp[:, None]
        ids, logits = output.top_ids, output.top_logits
        if not self._processes:
            return ids, (logits - base if log_probs else logits), logits - base
        options, lengths = self.options, np.repeat(self.length[:count], self.rows)
        if options.repetition_penalty != 1:
            watch = self._seen(count)
            seen_before = np.zeros((len(ids), self.vocab_size), np.bool_)
            np.put_along_axis(seen_before, watch, True, axis=1)
            repeated = np.take_along_axis(seen_before, ids, axis=1)
            duplicate = np.tril(watch[:, :, None] == watch[:, None, :], -1).any(-1)
            ids = np.concatenate([ids, watch], axis=1)
            hidden = np.concatenate([repeated, duplicate], axis=1)
            logits = np.concatenate([logits, output.watched], axis=1)
        own = logits - base
        scores = own.copy() if log_probs else logits.copy()
        if options.repetition_penalty != 1:
            tail = scores[:, -output.watched.shape[1] :]
            penalty = np.float32(options.repetition_penalty)
            tail[:] = np.where(tail < 0, tail * penalty, tail / penalty)
            scores[hidden] = -np.inf
        if size := options.no_repeat_ngram_size:
            for row, (history, length) in enumerate(zip(self._history(count), lengths, strict=True)):
                if length + 1 >= size:  # tokens that would complete an n-gram already there
                    grams = np.lib.stride_tricks.sliding_window_view(history[: length + 1], size)
                    context = history[length + 2 - size : length + 1]
                    banned = grams[(grams[:, :-1] == context).all(axis=1), -1]
                    scores[row, np.isin(ids[row], banned)] = -np.inf
        scores[(ids == self.eos) & (lengths < options.min_new_tokens)[:, None]] = -np.inf
        return ids, scores, own


class _Single(Search):
    """Searches with one row per image: each round picks one token."""

    def _append(self, count: int, tokens: Ints, log_probs: Floats) -> tuple[Ints, Flags]:
        slots = np.arange(count)
        self.length[:count] += 1
        self.tokens[slots, 0, self.length[:count]] = tokens
        self.score[:count, 0] += log_probs
        done = (tokens == self.eos) | (self.length[:count] >= self.options.max_new_tokens)
        return slots, done

    def result(self, slot: int) -> tuple[tuple[int, ...], float]:
        length = int(self.length[slot])
        return tuple(self.tokens[slot, 0, 1 : length + 1].tolist()), float(self.score[slot, 0]) / length


class _Greedy(_Single):
    """The most likely token at each position."""

    def advance(self, count: int, output: StepOutput) -> tuple[Ints, Flags]:
        ids, scores, own = self._candidates(count, output, log_probs=False)
        # Of equal scores the lowest id, as argmax over the vocabulary has it.
        best = np.where(scores == scores.max(axis=1, keepdims=True), ids, self.vocab_size).argmin(axis=1)
        rows = np.arange(count)
        return self._append(count, ids[rows, best], own[rows, best])


class _Sample(_Single):
    """A draw from the filtered distribution at each position."""

    _full = True

    def advance(self, count: int, output: StepOutput) -> tuple[Ints, Flags]:
        logits = output.logits
        if logits is None:
            raise ValueError("sampling needs the logits of the whole vocabulary: run the request with full=True")
        scores = logits  # [R, V]
        if self._processes:
            every = np.broadcast_to(np.arange(self.vocab_size), logits.shape)
            watch = self._seen(count)
            watched = np.take_along_axis(logits, watch, axis=1)
            full = StepOutput(logits, every, output.logsumexp, watched)
            _, scores, _ = self._candidates(count, full, log_probs=False)
            if self.options.repetition_penalty != 1:
                # The penalised copies stand behind the vocabulary; bring each to its own place.
                tail = scores[:, self.vocab_size :]
                scores = scores[:, : self.vocab_size]
                rows, columns = np.nonzero(tail > -np.inf)
                scores[rows, watch[rows, columns]] = tail[rows, columns]
        draws = zip(scores, self.key[:count], self.length[:count], strict=True)
        tokens = np.array(
            [draw(row, self.options, key=int(key), position=int(position)) for row, key, position in draws], np.int64
        )
        return self._append(count, tokens, logits[np.arange(count), tokens] - output.logsumexp)


class _Beam(Search):
    """Beam search as transformers 5 does it, each image on its own clock.

    ``finished`` [slots, beams, 1 + max_new_tokens] with ``finished_score``, ``finished_length`` and ``is_finished``
    are the complete captions so far, best first; ``open`` [slots] says whether one may still come that beats them.
    """

    _per_row = 2

    def __init__(self, options: DecodingOptions, *, slots: int, bos: int, eos: int, vocab_size: int) -> None:
        super().__init__(options, slots=slots, bos=bos, eos=eos, vocab_size=vocab_size)
        self.finished = self.tokens.copy()
        self.finished_score = np.full((slots, self.rows), _RULED_OUT, np.float32)
        self.finished_length = np.zeros((slots, self.rows), np.int64)
        self.is_finished = np.zeros((slots, self.rows), np.bool_)
        self.open = np.ones(slots, np.bool_)

    def start(self, slot: int, key: int) -> None:
        super().start(slot, key)
        # All beams begin alike; only the first may go on, or all would go the same way.
        self.score[slot, 1:] = _RULED_OUT
        self.finished_score[slot], self.finished_length[slot], self.is_finished[slot] = _RULED_OUT, 0, False
        self.open[slot] = True

    def advance(self, count: int, output: StepOutput) -> tuple[Ints, Flags]:
        # 1. Of each image the 2 · beams best continuations [n, 2 · beams]: even if each beam's best token is the end
        # token, enough go on.
        beams, options = self.rows, self.options
        ids, scores, _ = self._candidates(count, output, log_probs=True)
        width = ids.shape[1]
        total = (scores.reshape(count, beams, width) + self.score[:count, :, None]).reshape(count, -1)
        top = np.argsort(-total, axis=1, kind="stable")[:, : 2 * beams]
        top_score = np.take_along_axis(total, top, axis=1)
        top_beam = top // width
        top_token = np.take_along_axis(ids.reshape(count, -1), top, axis=1)
        sequences = np.take_along_axis(self.tokens[:count], top_beam[:, :, None], axis=1)
        self.length[:count] += 1
        length = self.length[:count]
        np.put_along_axis(sequences, length[:, None, None], top_token[:, :, None], axis=2)
        ends = (top_token == self.eos) | (length >= options.max_new_tokens)[:, None]

        # 2. The best that do not end go on.
        running_score = top_score + ends * _RULED_OUT
        running = np.argsort(-running_score, axis=1, kind="stable")[:, :beams]
        self.tokens[:count] = np.take_along_axis(sequences, running[:, :, None], axis=1)
        self.score[:count] = np.take_along_axis(running_score, running, axis=1)
        parents = np.take_along_axis(top_beam, running, axis=1) + np.arange(count)[:, None] * beams

        # 3. Those that end are merged into the finished ones.
        ended = ends & (np.arange(2 * beams) < beams)
        full = self.is_finished[:count].all(axis=1) & (options.early_stopping is True)
        normalized = top_score / self._divisor(length)[:, None]
        normalized = normalized + (full | ~self.open[:count])[:, None] * _RULED_OUT + ~ended * _RULED_OUT
        merged = np.concatenate([self.finished_score[:count], normalized], axis=1)
        best = np.argsort(-merged, axis=1, kind="stable")[:, :beams]
        lengths = np.broadcast_to(length[:, None], ended.shape)
        for array, new in (
            (self.finished_score, normalized),
            (self.finished_length, lengths),
            (self.is_finished, ended),
        ):
            array[:count] = np.take_along_axis(np.concatenate([array[:count], new], axis=1), best, axis=1)
        everything = np.concatenate([self.finished[:count], sequences], axis=1)
        self.finished[:count] = np.take_along_axis(everything, best[:, :, None], axis=1)

        # 4. A slot is done when no running hypothesis can beat its worst finished one, by transformers' heuristic.
        reach = length
        if options.early_stopping == "never" and options.length_penalty > 0:
            reach = np.full_like(reach, options.max_new_tokens)
        possible = self.score[:count, :1] / self._divisor(reach)[:, None]
        finished = self.finished_score[:count]
        worst = np.where(self.is_finished[:count], finished.min(axis=1, keepdims=True), _RULED_OUT)
        self.open[:count] &= (possible > worst).any(axis=1)
        complete = self.is_finished[:count].all(axis=1) & (options.early_stopping is True)
        return parents.reshape(-1), ~self.open[:count] | complete | ends.all(axis=1)

    def _divisor(self, length: Ints) -> Floats:
        """What a score of that length is divided by; rounded once, as Python's own power is in transformers."""
        return (length.astype(np.float64) ** self.options.length_penalty).astype(np.float32)

    def result(self, slot: int) -> tuple[tuple[int, ...], float]:
        length = int(self.finished_length[slot, 0])
        return tuple(self.finished[slot, 0, 1 : length + 1].tolist()), float(self.finished_score[slot, 0])


class _AveragedBeam(Search):
    """CLIPCap's beam search: a hypothesis scores the mean log-probability of its tokens, end token included.

    A hypothesis that ended keeps its place and its score, and competes with the others until all have ended or are
    ``max_new_tokens`` long; its rows run on, and nobody looks at what comes out. ``count`` [slots, rows] is how many
    tokens each has, ``ended`` [slots, rows] which have ended; ``score`` is the sum over tokens. The semantics are those
    written out in :mod:`rsedge.training.models.clipcap_model`.
    """

    def __init__(self, options: DecodingOptions, *, slots: int, bos: int, eos: int, vocab_size: int) -> None:
        super().__init__(options, slots=slots, bos=bos, eos=eos, vocab_size=vocab_size)
        self.count = np.zeros((slots, self.rows), np.int64)
        self.ended = np.zeros((slots, self.rows), np.bool_)

    def start(self, slot: int, key: int) -> None:
        super().start(slot, key)
        self.count[slot], self.ended[slot] = 0, False
        # All rows begin alike; only the first may go on, or all would go the same way.
        self.score[slot, 1:] = -np.inf

    def advance(self, count: int, output: StepOutput) -> tuple[Ints, Flags]:
        beams, ended = self.rows, self.ended[:count]
        ids = output.top_ids[:, :beams].reshape(count, beams, beams)
        steps = (output.top_logits[:, :beams] - output.logsumexp[:, None]).reshape(count, beams, beams)
        total = self.score[:count, :, None] + steps
        # What has ended has one candidate, itself.
        total[ended] = -np.inf
        total[:, :, 0] = np.where(ended, self.score[:count], total[:, :, 0])
        tokens = np.where(ended[:, :, None], self.eos, ids)
        length = self.count[:count] + ~ended
        mean = (total / length[:, :, None].astype(np.float32)).reshape(count, -1)

        # Stable: of equal means the better ranked hypothesis, then its more likely token.
        best = np.argsort(-mean, axis=1, kind="stable")[:, :beams]
        source = best // beams
        token = np.take_along_axis(tokens.reshape(count, -1), best, axis=1)
        self.score[:count] = np.take_along_axis(total.reshape(count, -1), best, axis=1)
        self.count[:count] = np.take_along_axis(length, source, axis=1)
        self.tokens[:count] = np.take_along_axis(self.tokens[:count], source[:, :, None], axis=1)
        self.length[:count] += 1
        np.put_along_axis(self.tokens[:count], self.length[:count, None, None], token[:, :, None], axis=2)
        self.ended[:count] = token == self.eos
        done = self.ended[:count].all(axis=1) | (self.length[:count] >= self.options.max_new_tokens)
        return (source + np.arange(count)[:, None] * beams).reshape(-1), done

    def result(self, slot: int) -> tuple[tuple[int, ...], float]:
        mean = self.score[slot] / self.count[slot].astype(np.float32)
        row = int(mean.argmax())  # they are in order but for rounding
        return tuple(self.tokens[slot, row, 1 : self.count[slot, row] + 1].tolist()), float(mean[row])


def filtered(logits: Floats, options: DecodingOptions) -> tuple[Ints, NDArray[np.float64]]:
    """The distribution that is drawn from.

    Args:
        logits: float32 [V], repetition and length rules already applied; −inf rules a token out.
        options: ``temperature``, ``top_k`` and ``top_p``.

    Returns:
        The tokens that can be drawn, ascending, and their probabilities, which sum to 1.
    """
    scaled = logits.astype(np.float64) / options.temperature
    keep = np.arange(len(scaled))
    if 0 < options.top_k < len(scaled):
        keep = np.flatnonzero(scaled >= np.partition(scaled, -options.top_k)[-options.top_k])
    weights = np.exp(scaled[keep] - scaled[keep].max())
    weights /= weights.sum()
    if options.top_p < 1:
        order: Ints = np.arange(len(weights))
        if len(weights) > _HEAD:
            head = np.argpartition(-weights, _HEAD)[:_HEAD]
            if weights[head].sum() >= options.top_p:
                order = np.sort(head)
        order = order[np.argsort(-weights[order], kind="stable")]
        before = np.cumsum(weights[order]) - weights[order]
        nucleus = np.sort(order[(before < options.top_p) | (np.arange(len(order)) == 0)])
        keep, weights = keep[nucleus], weights[nucleus]
        weights /= weights.sum()
    possible = weights > 0
    return keep[possible], weights[possible]


def draw(logits: Floats, options: DecodingOptions, *, key: int, position: int) -> int:
    """One token from the filtered distribution.

    Args:
        logits: float32 [V].
        options: The filter and the seed.
        key: The image's key, 0 to 2**64 − 1.
        position: The token's position in the caption, from 0.
    """
    tokens, weights = filtered(logits, options)
    # Inverting the cumulative sum in order of id, not of likelihood: two tokens of nearly equal likelihood then do not
    # trade places with the last bit of a logit.
    edges = np.cumsum(weights)
    chosen = np.searchsorted(edges, uniform(options.seed, key, position) * edges[-1], side="right")
    return int(tokens[min(int(chosen), len(tokens) - 1)])


def uniform(seed: int, key: int, position: int) -> float:
    """The draw in [0, 1) of an image's key at a position, the same for ever."""
    bits = np.random.Philox(key=[seed, key], counter=[position, 0, 0, 0]).random_raw()
    return (int(bits) >> 11) * 2.0**-53
