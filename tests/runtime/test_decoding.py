"""Searches driven by a fake decoder with known logits: bookkeeping without a model."""

from __future__ import annotations

import numpy as np
import pytest

from rsedge.errors import OptionError
from rsedge.manifest import GenerationDefaults
from rsedge.runtime.decoding.options import DecodingOptions
from rsedge.runtime.decoding.search import StepOutput, make_search

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


class EndsAnytime(FakeDecoder):
    """Hypotheses of one image end at quite different lengths, so that what is done about lengths decides."""

    def logits(self, image: int, tokens: list[int]) -> np.ndarray:
        random = np.random.default_rng([image, *tokens])
        values = random.normal(0, 2, VOCAB).astype(np.float32)
        values[EOS] += random.uniform(0, 4)
        return values


def run(
    options: DecodingOptions,
    arrivals: list[int],
    slots: int,
    *,
    averaged: bool = False,
    kind: type[FakeDecoder] = FakeDecoder,
) -> dict[int, tuple[tuple[int, ...], float]]:
    """Decode images that enter as soon as a slot is free."""
    search = make_search(options, slots=slots, bos=BOS, eos=EOS, vocab_size=VOCAB, averaged=averaged)
    decoder, waiting, results = kind(search.rows), list(arrivals), {}
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


def averaged_beams(image: int, beams: int, longest: int) -> tuple[tuple[int, ...], float]:
    """CLIPCap's search of one image, every candidate of the whole vocabulary ranked."""
    decoder = EndsAnytime(1)

    def log_probs(tokens: tuple[int, ...]) -> np.ndarray:
        logits = decoder.logits(image, [BOS, *tokens])
        return logits - np.log(np.exp(logits.astype(np.float64)).sum()).astype(np.float32)

    rows = [((), np.float32(0))]
    for _ in range(longest):
        candidates = []
        for tokens, total in rows:
            if tokens[-1:] == (EOS,):
                candidates.append((tokens, total))
            else:
                candidates += [((*tokens, token), total + value) for token, value in enumerate(log_probs(tokens))]
        rows = sorted(candidates, key=lambda entry: -entry[1] / len(entry[0]))[:beams]
        if all(tokens[-1] == EOS for tokens, _ in rows):
            break
    tokens, total = max(rows, key=lambda entry: entry[1] / len(entry[0]))
    return tokens, float(total / len(tokens))


@pytest.mark.parametrize(("beams", "longest"), [(2, 12), (5, 12), (3, 1), (VOCAB, 3)])
def test_averaged_beams_are_those_written_out(beams, longest):
    options = DecodingOptions(max_new_tokens=longest, num_beams=beams)
    found = run(options, list(range(25 if beams < VOCAB else 5)), 4, averaged=True, kind=EndsAnytime)
    for image, (tokens, score) in found.items():
        expected, expected_score = averaged_beams(image, beams, longest)
        assert tokens == expected
        assert score == pytest.approx(expected_score, abs=1e-5)
    if longest == 12:
        assert len({len(tokens) for tokens, _ in found.values()}) > 4
        for slots, order in ((1, range(9)), (2, [5, 3, 8, 1, 0, 7, 2, 6, 4])):
            again = run(options, list(order), slots, averaged=True, kind=EndsAnytime)
            assert again == {image: found[image] for image in range(9)}


class Scripted(FakeDecoder):
    """Token 3 after 2 is unlikely at first and sure to go on later; ending at once is likely."""

    def logits(self, image: int, tokens: list[int]) -> np.ndarray:
        tables = {(): {2: 0.3, EOS: 0.5}, (2,): {3: 0.16}, (EOS,): {2: 0.5, EOS: 0.49}}
        table = tables.get(tuple(tokens[1:]), {3: 0.999})
        values = np.full(VOCAB, (1 - sum(table.values())) / (VOCAB - len(table)))
        values[list(table)] = list(table.values())
        return np.log(values).astype(np.float32)


def test_a_hypothesis_that_ended_takes_one_place_only():
    """What would follow the end of the one must not push the other out."""
    tokens, score = run(DecodingOptions(max_new_tokens=10, num_beams=2), [0], 1, averaged=True, kind=Scripted)[0]
    assert tokens == (2, *[3] * 9)
    assert score == pytest.approx((np.log(0.3) + np.log(0.16) + 8 * np.log(0.999)) / 10, abs=1e-4)
    short = run(DecodingOptions(max_new_tokens=2, num_beams=2), [0], 1, averaged=True, kind=Scripted)[0]
    assert short[0] == (EOS,)


def test_averaged_searches_refuse_what_they_do_not_know():
    options = DecodingOptions(
        num_beams=40, max_new_tokens=9, min_new_tokens=3, length_penalty=2.0, early_stopping=True,
        repetition_penalty=1.5, no_repeat_ngram_size=2,
    )  # fmt: skip
    problems = options.averaged_problems(VOCAB)
    names = ("min_new_tokens", "length_penalty", "early_stopping", "repetition_penalty", "no_repeat_ngram_size")
    assert [problem.split()[0] for problem in problems] == [*names, "num_beams"]
    assert DecodingOptions(num_beams=5, max_new_tokens=67).averaged_problems(VOCAB) == []
    assert DecodingOptions(do_sample=True, top_p=0.8, seed=3).averaged_problems(VOCAB) == []


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
