"""Greedy search, beam search and sampling over a batch of images that come and go.

A search knows token ids and scores, no cache and no backend. It holds its images in slots 0 to n − 1, each with as
many rows (hypotheses) as the search has beams; rows of a slot are adjacent. One round is: :meth:`Search.request` says
what to run, a decoder runs it, :meth:`Search.advance` takes what came out and says which row each new row continues
and which slots are done. Slots are at different lengths: images enter and leave the batch at any round.

Greedy and beam search give what ``transformers.generate`` gives for the same scores; the beam bookkeeping follows its
``GenerationMixin._beam_search`` (transformers 5) image by image. CLIPCap has a beam search of its own, whose scores are
averages over the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rsedge.runtime.decoding.sampling import draw

if TYPE_CHECKING:
    from rsedge.runtime.decoding.options import DecodingOptions

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

# What transformers adds to the score of a hypothesis to rule it out.
_RULED_OUT = np.float32(-1e9)


@dataclass(frozen=True, slots=True)
class Request:
    """What one decoder run must compute for R rows.

    Attributes:
        tokens: int64 [R], each row's latest token.
        lengths: int64 [R], how many tokens each row has in its cache, which is also the position of ``tokens``.
        top: How many best tokens are wanted per row.
        watch: int64 [R, W], tokens whose logits are wanted besides (W may be 0).
        full: Whether the logits of the whole vocabulary are wanted instead.
    """

    tokens: Ints
    lengths: Ints
    top: int
    watch: Ints
    full: bool


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a decoder run gave, float32 and int64.

    Attributes:
        top_logits, top_ids: [R, top], best first.
        logsumexp: [R], over the vocabulary.
        watched: [R, W], logits of ``Request.watch``.
        logits: [R, V] if asked for in full, else None.
    """

    top_logits: Floats
    top_ids: Ints
    logsumexp: Floats
    watched: Floats
    logits: Floats | None = None


class Search(Protocol):
    """A search over up to ``slots`` images at once."""

    rows: int
    """Rows per image."""

    def start(self, slot: int, key: int) -> None:
        """Put a new image into ``slot``; ``key`` seeds its draws."""

    def keep(self, sources: Ints) -> None:
        """Let slot i hold what slot ``sources[i]`` holds; later slots become free."""

    def request(self, count: int) -> Request:
        """What to run for slots 0 to ``count`` − 1."""

    def advance(self, count: int, output: StepOutput) -> tuple[Ints, NDArray[np.bool_]]:
        """Take one round's output.

        Returns:
            For each row the row whose cache it continues, int64 [R], and for each slot whether it is done, bool [n].
        """

    def result(self, slot: int) -> tuple[tuple[int, ...], float]:
        """The token ids of a finished slot, end token included, and their score."""


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


class _State:
    """Token histories and scores of all slots, and the processing of candidates all searches share.

    ``tokens`` [slots, rows, 1 + max_new_tokens] begins with the start token; ``length`` [slots] counts the tokens
    generated so far; ``score`` [slots, rows] sums log-probabilities.
    """

    def __init__(self, options: DecodingOptions, *, slots: int, bos: int, eos: int, vocab_size: int) -> None:
        self.options, self.bos, self.eos, self.vocab_size = options, bos, eos, vocab_size
        self.rows = options.num_beams
        self.tokens = np.full((slots, self.rows, 1 + options.max_new_tokens), bos, np.int64)
        self.length = np.zeros(slots, np.int64)
        self.score = np.zeros((slots, self.rows), np.float32)
        self.key = np.zeros(slots, np.uint64)

    def start(self, slot: int, key: int) -> None:
        self.tokens[slot], self.length[slot], self.score[slot], self.key[slot] = self.bos, 0, 0.0, key

    def _arrays(self) -> list[NDArray[Any]]:
        return [self.tokens, self.length, self.score, self.key]

    def keep(self, sources: Ints) -> None:
        for array in self._arrays():
            array[: len(sources)] = array[sources]

    @property
    def _processes(self) -> bool:
        """Whether anything stands between a logit and its use."""
        options = self.options
        return options.repetition_penalty != 1 or options.no_repeat_ngram_size > 0 or options.min_new_tokens > 0

    def _request(self, count: int, best: int, *, full: bool = False) -> Request:
        lengths = np.repeat(self.length[:count], self.rows)
        history = self._history(count)
        tokens = np.take_along_axis(history, lengths[:, None], axis=1)[:, 0]
        watch = history[:, :0]
        if self._processes and not full:
            # Processing can only demote tokens seen before and the end token (or promote those watched): with as many
            # candidates more, enough untouched ones remain.
            longest = int(lengths.max()) + 1
            best += longest + 1
            if self.options.repetition_penalty != 1:
                watch = self._seen(count)
        return Request(tokens, lengths, min(best, self.vocab_size), watch, full)

    def _history(self, count: int) -> Ints:
        return self.tokens[:count].reshape(count * self.rows, -1)

    def _seen(self, count: int) -> Ints:
        """Every row's tokens so far, int64 [R, W]; shorter rows are filled up with the start token they begin with."""
        lengths = np.repeat(self.length[:count], self.rows)[:, None]
        longest = int(lengths.max()) + 1
        return np.where(np.arange(longest) <= lengths, self._history(count)[:, :longest], self.bos)

    def _candidates(self, count: int, output: StepOutput, *, log_probs: bool) -> tuple[Ints, Floats, Floats]:
        """Token ids, processed scores and the model's own log-probabilities of the candidates, each [R, K].

        Args:
            count: Slots in use.
            output: The round's output.
            log_probs: Process log-probabilities (beam search) rather than logits (greedy search), as transformers does.
        """
        base = output.logsumexp[:, None]
        ids, logits = output.top_ids, output.top_logits
        if not self._processes:
            return ids, (logits - base if log_probs else logits), logits - base
        options, lengths = self.options, np.repeat(self.length[:count], self.rows)
        seen = output.watched.shape[1]
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
            tail = scores[:, -seen:]
            penalty = np.float32(options.repetition_penalty)
            tail[:] = np.where(tail < 0, tail * penalty, tail / penalty)
            scores[hidden] = -np.inf
        if options.no_repeat_ngram_size:
            for row, (history, length) in enumerate(zip(self._history(count), lengths, strict=True)):
                banned = _ngram_ends(history[: length + 1], options.no_repeat_ngram_size)
                scores[row, np.isin(ids[row], banned)] = -np.inf
        scores[(ids == self.eos) & (lengths < options.min_new_tokens)[:, None]] = -np.inf
        return ids, scores, own


def _ngram_ends(history: Ints, size: int) -> Ints:
    """The tokens that would complete an n-gram of ``size`` already present in ``history``."""
    if len(history) < size:
        return history[:0]
    grams = np.lib.stride_tricks.sliding_window_view(history, size)
    context = history[len(history) - size + 1 :]
    ends: Ints = grams[(grams[:, :-1] == context).all(axis=1), -1]
    return ends


class _Single(_State):
    """Searches with one row per image: each round picks one token."""

    def _append(self, count: int, tokens: Ints, log_probs: Floats) -> tuple[Ints, NDArray[np.bool_]]:
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

    def request(self, count: int) -> Request:
        return self._request(count, 1)

    def advance(self, count: int, output: StepOutput) -> tuple[Ints, NDArray[np.bool_]]:
        ids, scores, own = self._candidates(count, output, log_probs=False)
        # Of equal scores the lowest id, as argmax over the vocabulary has it.
        best = np.where(scores == scores.max(axis=1, keepdims=True), ids, self.vocab_size).argmin(axis=1)
        rows = np.arange(count)
        return self._append(count, ids[rows, best], own[rows, best])


class _Sample(_Single):
    """A draw from the filtered distribution at each position."""

    def request(self, count: int) -> Request:
        return self._request(count, 1, full=True)

    def advance(self, count: int, output: StepOutput) -> tuple[Ints, NDArray[np.bool_]]:
        logits = output.logits
        if logits is None:
            raise ValueError("sampling needs the logits of the whole vocabulary: run the request with full=True")
        every = np.broadcast_to(np.arange(self.vocab_size), logits.shape)
        processed = logits
        if self._processes:
            processed = self._process_full(count, logits, output, every)
        tokens = np.array(
            [
                draw(row, self.options, key=int(key), position=int(position))
                for row, key, position in zip(processed, self.key[:count], self.length[:count], strict=True)
            ],
            np.int64,
        )
        return self._append(count, tokens, logits[np.arange(count), tokens] - output.logsumexp)

    def _process_full(self, count: int, logits: Floats, output: StepOutput, every: Ints) -> Floats:
        """The processed logits of the whole vocabulary, [R, V]."""
        watch = self._seen(count)
        watched = np.take_along_axis(logits, watch, axis=1)
        _, scores, _ = self._candidates(count, StepOutput(logits, every, output.logsumexp, watched), log_probs=False)
        if self.options.repetition_penalty != 1:
            # The penalised copies stand behind the vocabulary; bring each to its own place.
            tail = scores[:, self.vocab_size :]
            scores = scores[:, : self.vocab_size]
            rows, columns = np.nonzero(tail > -np.inf)
            scores[rows, watch[rows, columns]] = tail[rows, columns]
        return scores


class _Beam(_State):
    """Beam search as transformers 5 does it, each image on its own clock.

    ``finished`` [slots, beams, 1 + max_new_tokens] with ``finished_score``, ``finished_length`` and ``is_finished``
    are the complete captions so far, best first; ``open`` [slots] says whether one may still come that beats them.
    """

    def __init__(self, options: DecodingOptions, *, slots: int, bos: int, eos: int, vocab_size: int) -> None:
        super().__init__(options, slots=slots, bos=bos, eos=eos, vocab_size=vocab_size)
        self.finished = self.tokens.copy()
        self.finished_score = np.full((slots, self.rows), _RULED_OUT, np.float32)
        self.finished_length = np.zeros((slots, self.rows), np.int64)
        self.is_finished = np.zeros((slots, self.rows), np.bool_)
        self.open = np.ones(slots, np.bool_)

    def _arrays(self) -> list[NDArray[Any]]:
        arrays = super()._arrays()
        arrays += [self.finished, self.finished_score, self.finished_length, self.is_finished, self.open]
        return arrays

    def start(self, slot: int, key: int) -> None:
        super().start(slot, key)
        # All beams begin alike; only the first may go on, or all would go the same way.
        self.score[slot, 1:] = _RULED_OUT
        self.finished_score[slot], self.finished_length[slot], self.is_finished[slot] = _RULED_OUT, 0, False
        self.open[slot] = True

    def request(self, count: int) -> Request:
        return self._request(count, 2 * self.rows)

    def advance(self, count: int, output: StepOutput) -> tuple[Ints, NDArray[np.bool_]]:
        beams, options = self.rows, self.options
        ids, scores, _ = self._candidates(count, output, log_probs=True)
        width = ids.shape[1]
        total = (scores.reshape(count, beams, width) + self.score[:count, :, None]).reshape(count, -1)
        # Twice as many as beams: even if each beam's best token is the end token, enough go on.
        top = np.argsort(-total, axis=1, kind="stable")[:, : 2 * beams]
        top_score = np.take_along_axis(total, top, axis=1)
        top_beam = top // width
        top_token = np.take_along_axis(ids.reshape(count, -1), top, axis=1)
        sequences = np.take_along_axis(self.tokens[:count], top_beam[:, :, None], axis=1)
        self.length[:count] += 1
        length = self.length[:count]
        np.put_along_axis(sequences, length[:, None, None], top_token[:, :, None], axis=2)
        ends = (top_token == self.eos) | (length >= options.max_new_tokens)[:, None]

        running_score = top_score + ends * _RULED_OUT
        running = np.argsort(-running_score, axis=1, kind="stable")[:, :beams]
        self.tokens[:count] = np.take_along_axis(sequences, running[:, :, None], axis=1)
        self.score[:count] = np.take_along_axis(running_score, running, axis=1)
        parents = np.take_along_axis(top_beam, running, axis=1) + np.arange(count)[:, None] * beams

        self._collect(count, sequences, top_score, ends)
        self.open[:count] &= self._can_improve(count)
        complete = self.is_finished[:count].all(axis=1) & (options.early_stopping is True)
        done = ~self.open[:count] | complete | ends.all(axis=1)
        return parents.reshape(-1), done

    def _collect(self, count: int, sequences: Ints, scores: Floats, ends: NDArray[np.bool_]) -> None:
        """Merge the hypotheses that just ended, [n, 2 · beams, …], into the finished ones."""
        beams = self.rows
        length = self.length[:count]
        ended = ends & (np.arange(2 * beams) < beams)
        normalized = scores / self._divisor(length)[:, None]
        full = self.is_finished[:count].all(axis=1) & (self.options.early_stopping is True)
        normalized = normalized + (full | ~self.open[:count])[:, None] * _RULED_OUT + ~ended * _RULED_OUT
        merged_score = np.concatenate([self.finished_score[:count], normalized], axis=1)
        merged_length = np.concatenate(
            [self.finished_length[:count], np.broadcast_to(length[:, None], ended.shape)], axis=1
        )
        best = np.argsort(-merged_score, axis=1, kind="stable")[:, :beams]
        merged = np.concatenate([self.finished[:count], sequences], axis=1)
        self.finished[:count] = np.take_along_axis(merged, best[:, :, None], axis=1)
        self.finished_score[:count] = np.take_along_axis(merged_score, best, axis=1)
        self.finished_length[:count] = np.take_along_axis(merged_length, best, axis=1)
        flags = np.concatenate([self.is_finished[:count], ended], axis=1)
        self.is_finished[:count] = np.take_along_axis(flags, best, axis=1)

    def _divisor(self, length: Ints) -> Floats:
        """What a score of that length is divided by; rounded once, as Python's own power is in transformers."""
        return (length.astype(np.float64) ** self.options.length_penalty).astype(np.float32)

    def _can_improve(self, count: int) -> NDArray[np.bool_]:
        """Whether a running hypothesis may still beat the worst finished one, by transformers' heuristic, bool [n]."""
        options = self.options
        reach = self.length[:count]
        if options.early_stopping == "never" and options.length_penalty > 0:
            reach = np.full_like(reach, options.max_new_tokens)
        best = self.score[:count, :1] / self._divisor(reach)[:, None]
        finished = self.finished_score[:count]
        worst = np.where(self.is_finished[:count], finished.min(axis=1, keepdims=True), _RULED_OUT)
        return np.asarray((best > worst).any(axis=1))

    def result(self, slot: int) -> tuple[tuple[int, ...], float]:
        length = int(self.finished_length[slot, 0])
        return tuple(self.finished[slot, 0, 1 : length + 1].tolist()), float(self.finished_score[slot, 0])


class _AveragedBeam(_State):
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

    def _arrays(self) -> list[NDArray[Any]]:
        return [*super()._arrays(), self.count, self.ended]

    def start(self, slot: int, key: int) -> None:
        super().start(slot, key)
        self.count[slot], self.ended[slot] = 0, False
        # All rows begin alike; only the first may go on, or all would go the same way.
        self.score[slot, 1:] = -np.inf

    def request(self, count: int) -> Request:
        return self._request(count, self.rows)

    def advance(self, count: int, output: StepOutput) -> tuple[Ints, NDArray[np.bool_]]:
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
