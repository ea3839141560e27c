"""Searches driven by a fake decoder with known logits: bookkeeping without a model."""

from __future__ import annotations

import numpy as np
import pytest

from rsedge.errors import OptionError
from rsedge.manifest import GenerationDefaults
from rsedge.runtime.decoding import StepOutput, make_search
from rsedge.runtime.options import DecodingOptions

BOS, EOS, VOCAB = 0, 1, 30


class FakeDecoder:
    """Logits that depend on the image and on all tokens of a row so far: it notices a wrong parent at once."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.images: list[int] = []
        self.history: list[list[int]] = []

    def logits(self, image: int, tokens: list[int]) -> np.ndarray:
        random = np.random.default_rng([image, *tokens])
        values = random.normal(0, 2, VOCAB).astype(np.float32)
        values[EOS] += len(tokens) - 6
        return values

    def step(self, request) -> StepOutput:
        for row, token in enumerate(request.tokens.tolist()):
            assert request.lengths[row] == len(self.history[row])
            self.history[row].append(token)
        logits = np.array([self.logits(self.images[r // self.rows], h) for r, h in enumerate(self.history)])
        order = np.argsort(-logits, axis=1, kind="stable")[:, : request.top]
        lse = np.log(np.exp(logits.astype(np.float64)).sum(1)).astype(np.float32)
        watched = np.take_along_axis(logits, request.watch, 1)
        return StepOutput(np.take_along_axis(logits, order, 1), order, lse, watched, logits if request.full else None)


def run(options: DecodingOptions, arrivals: list[int], slots: int) -> dict[int, tuple[tuple[int, ...], float]]:
    """Decode images that enter as soon as a slot is free."""
    search = make_search(options, slots=slots, bos=BOS, eos=EOS, vocab_size=VOCAB)
    decoder, waiting, results = FakeDecoder(search.rows), list(arrivals), {}
    while waiting or decoder.images:
        while waiting and len(decoder.images) < slots:
            search.start(len(decoder.images), waiting[0])
            decoder.images.append(waiting.pop(0))
            decoder.history += [[] for _ in range(search.rows)]
        count = len(decoder.images)
        parents, done = search.advance(count, decoder.step(search.request(count)))
        decoder.history = [list(decoder.history[parent]) for parent in parents]
        for slot in np.flatnonzero(done):
            results[decoder.images[slot]] = search.result(int(slot))
        stay = np.flatnonzero(~done)
        search.keep(stay)
        rows = [slot * search.rows + row for slot in stay for row in range(search.rows)]
        decoder.images = [decoder.images[slot] for slot in stay]
        decoder.history = [decoder.history[row] for row in rows]
    return results


OPTIONS = {
    "greedy": DecodingOptions(max_new_tokens=12),
    "penalised": DecodingOptions(max_new_tokens=12, repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=4),
    "beam": DecodingOptions(max_new_tokens=12, num_beams=4),
    "early": DecodingOptions(max_new_tokens=12, num_beams=3, early_stopping=True, length_penalty=0.3),
    "sample": DecodingOptions(max_new_tokens=12, do_sample=True, top_p=0.9, seed=5),
    "sample-penalised": DecodingOptions(
        max_new_tokens=12, do_sample=True, top_k=12, repetition_penalty=1.6, no_repeat_ngram_size=2, min_new_tokens=5
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_image_does_not_notice_its_company(name):
    alone = {image: run(OPTIONS[name], [image], 1)[image] for image in range(9)}
    for slots, order in ((2, range(9)), (4, [5, 3, 8, 1, 0, 7, 2, 6, 4]), (9, range(9))):
        assert run(OPTIONS[name], list(order), slots) == alone
    assert len({len(tokens) for tokens, _ in alone.values()}) > 2


def test_greedy_takes_the_best_token_each_time():
    decoder = FakeDecoder(1)
    tokens, score = run(OPTIONS["greedy"], [3], 1)[3]
    history, total = [BOS], 0.0
    for token in tokens:
        logits = decoder.logits(3, history).astype(np.float64)
        assert token == logits.argmax()
        total += logits[token] - np.log(np.exp(logits).sum())
        history.append(token)
    assert score == pytest.approx(total / len(tokens), rel=1e-5)


def test_a_wide_beam_finds_the_best_caption_of_all():
    """With as many beams as there are prefixes, beam search is exhaustive search."""
    options = DecodingOptions(max_new_tokens=2, num_beams=VOCAB, length_penalty=0.0, early_stopping="never")
    tokens, score = run(options, [4], 1)[4]
    decoder, best = FakeDecoder(1), {}
    log_softmax = lambda x: x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum())  # noqa: E731
    first = log_softmax(decoder.logits(4, [BOS]))
    for a in range(VOCAB):
        if a == EOS:
            best[(a,)] = first[a]
            continue
        second = log_softmax(decoder.logits(4, [BOS, a]))
        best |= {(a, b): first[a] + second[b] for b in range(VOCAB)}
    assert tokens == max(best, key=best.__getitem__)
    assert score == pytest.approx(max(best.values()), abs=1e-5)


def test_rules_hold_in_samples():
    for tokens, _ in run(OPTIONS["sample-penalised"], list(range(40)), 8).values():
        assert EOS not in tokens[:4]
        pairs = list(zip((BOS, *tokens), tokens, strict=False))
        assert len(set(pairs)) == len(pairs)


def test_another_seed_draws_other_captions():
    other = DecodingOptions(max_new_tokens=12, do_sample=True, top_p=0.9, seed=6)
    assert run(other, list(range(5)), 2) != run(OPTIONS["sample"], list(range(5)), 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0, expected 1"),
        ({"top_p": 1.5, "do_sample": True}, "top_p is 1.5"),
        ({"min_new_tokens": 30}, "min_new_tokens is 30"),
        ({"num_beams": 2, "do_sample": True}, "choose beams"),
        ({"temperature": 0.5}, "only act on sampling"),
        ({"seed": 3}, "only act on sampling"),
        ({"length_penalty": 2.0}, "only act on beam search"),
        ({"early_stopping": True}, "only act on beam search"),
        ({"num_beams": 0, "temperature": -1.0, "do_sample": True}, "num_beams is 0.*temperature is -1"),
    ],
)
def test_options_that_cannot_be(values, message):
    with pytest.raises(OptionError, match=message):
        DecodingOptions(**values)


def test_overrides_choose_between_search_and_sampling():
    beams = GenerationDefaults(max_new_tokens=20, min_new_tokens=5, num_beams=3)
    tuned = GenerationDefaults(max_new_tokens=20, num_beams=3, length_penalty=2.0, early_stopping=True)
    samples = GenerationDefaults(max_new_tokens=20, do_sample=True, top_p=0.9)
    resolve = DecodingOptions.resolve
    assert resolve(beams, {}).num_beams == 3
    assert resolve(beams, {"top_p": 0.5}) == resolve(beams, {"top_p": 0.5, "do_sample": True})
    assert resolve(beams, {"top_p": 0.5}).num_beams == 1
    assert not resolve(samples, {"num_beams": 2}).do_sample
    assert resolve(samples, {"temperature": 0.5, "seed": None}).top_p == 0.9
    assert resolve(tuned, {}).length_penalty == 2.0
    assert resolve(tuned, {"num_beams": 1}) == resolve(tuned, {"num_beams": 1, "early_stopping": False})
    with pytest.raises(OptionError, match="only act on beam search"):
        resolve(tuned, {"num_beams": 1, "length_penalty": 2.0})
    assert resolve(beams, {"max_new_tokens": 3}).min_new_tokens == 3
    with pytest.raises(OptionError, match=r"unknown decoding option beams; there are: .*num_beams"):
        resolve(beams, {"beams": 3})
    assert not resolve(beams, {"top_k": 0}).do_sample
    assert resolve(GenerationDefaults(max_new_tokens=20, length_penalty=2.0), {"num_beams": 3}).length_penalty == 2.0
    with pytest.raises(OptionError, match="contradicts"):
        resolve(beams, {"do_sample": False, "top_k": 3})
    with pytest.raises(OptionError, match="choose beams"):
        resolve(beams, {"top_p": 0.5, "num_beams": 3})
