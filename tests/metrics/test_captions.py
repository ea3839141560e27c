"""Scores against pycocoevalcap itself, against nltk, and against formulas written out here."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu as nltk_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from rsedge.errors import BackendError, OptionError
from rsedge.metrics import captions, java
from rsedge.metrics.captions import METRICS, CaptionScores, Score, corpus_bleu, score_captions
from rsedge.metrics.text import tokenize
from tests.conftest import shared_data
from tests.metrics.cases import PREDICTIONS, REFERENCES, random_captions

needs_java = pytest.mark.skipif(not shutil.which("java"), reason="METEOR and PTB run in Java, which is not here")
PYTHON = ("bleu", "rouge_l", "cider_d")


def pycocoevalcap(predictions: list[str], references: list[list[str]]) -> dict[str, tuple[float, np.ndarray]]:
    """Metric → corpus value and images' values, of tokenized text, as its own evaluation calls it."""
    theirs, ours = dict(enumerate(references)), {n: [text] for n, text in enumerate(predictions)}
    values, each = Bleu(4).compute_score(theirs, ours, verbose=0)
    found = {f"bleu_{n + 1}": (values[n], np.array(each[n])) for n in range(4)}
    return found | {
        "rouge_l": Rouge().compute_score(theirs, ours),
        "cider_d": Cider().compute_score(theirs, ours),
    }


def check(scores: CaptionScores, oracle: dict[str, tuple[float, np.ndarray]], tolerance: float) -> None:
    assert list(scores.scores) == list(oracle)
    for name, (value, each) in oracle.items():
        assert scores[name].value == pytest.approx(value, abs=tolerance), name
        np.testing.assert_allclose(scores[name].per_image, each, rtol=0, atol=tolerance, err_msg=name)


def test_pycocoevalcap_itself():
    cut = tokenize(PREDICTIONS), [tokenize(texts) for texts in REFERENCES]
    assert cut[0][3] == "many boats in the port near houses"
    check(score_captions(PREDICTIONS, REFERENCES, metrics=PYTHON), pycocoevalcap(*cut), 1e-12)


@pytest.mark.parametrize("tokenizer", ["treebank", pytest.param("ptb", marks=needs_java)])
def test_pycocoevalcap_itself_on_rsicd(tokenizer):
    """500 validation images: the first caption scored against the other four. In one of them a reference is a dot."""
    with shared_data("rsicd/dataset_rsicd.json").open(encoding="utf-8") as file:
        images = [image for image in json.load(file)["images"] if image["split"] == "val"][:500]
    texts = [[sentence["raw"] for sentence in image["sentences"]] for image in images]
    predictions, references = [first for first, *_ in texts], [rest for _, *rest in texts]
    assert sum(text == "." for group in references for text in group) == 1
    if tokenizer == "ptb":  # the whole chain is pycocoevalcap's
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        cut = PTBTokenizer().tokenize({n: [{"caption": text} for text in group] for n, group in enumerate(texts)})
    else:
        cut = {n: tokenize(group) for n, group in enumerate(texts)}
    oracle = pycocoevalcap([cut[n][0] for n in range(500)], [cut[n][1:] for n in range(500)])
    assert 0.7 < oracle["bleu_4"][0] < 0.8
    check(score_captions(predictions, references, metrics=PYTHON, tokenizer=tokenizer), oracle, 1e-6)


def test_bleu_is_nltks():
    predictions, _, references = random_captions(1, 40)
    cut = [[text.split() for text in group] for group in references]
    scores = score_captions(predictions, references, metrics=["bleu"])
    for n in range(1, 5):
        expected = nltk_bleu(cut, [text.split() for text in predictions], weights=[1 / n] * n)
        assert 0.01 < expected < 1
        assert scores[f"bleu_{n}"].value == pytest.approx(expected, abs=1e-8)


def test_bleu_of_added_counts():
    written = score_captions(PREDICTIONS, REFERENCES, metrics=["bleu"])
    assert written.bleu_counts.tolist()[1] == [
        5,
        8,
        5,
        4,
        3,
        2,
        4,
        1,
        0,
        0,
    ]  # two roads (by) a bridge | two roads near the bridge …
    names = [f"bleu_{n}" for n in range(1, 5)]
    for scores in (written, score_captions(*random_captions(5, 40)[::2], metrics=["bleu"])):
        counts = scores.bleu_counts
        np.testing.assert_allclose(corpus_bleu(counts.sum(axis=0)), [scores[name].value for name in names], atol=1e-12)
        np.testing.assert_allclose(corpus_bleu(counts).T, [scores[name].per_image for name in names], atol=1e-12)


def rouge_l(prediction: list[str], references: list[list[str]]) -> float:
    def common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
        @lru_cache(None)
        def longest(i: int, j: int) -> int:
            if i == len(a) or j == len(b):
                return 0
            return 1 + longest(i + 1, j + 1) if a[i] == b[j] else max(longest(i + 1, j), longest(i, j + 1))

        return longest(0, 0)

    shared = [common(tuple(prediction), tuple(words)) for words in references]
    precision = max(shared) / max(len(prediction), 1)
    recall = max(n / max(len(words), 1) for n, words in zip(shared, references, strict=True))
    beta = 1.2**2
    return (1 + beta) * precision * recall / (recall + beta * precision) if precision else 0.0


def cider_d(predictions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """Vedantam et al. 2015, equations 1 to 4 and section 6.3, length in bigrams as the reference code has it."""

    def grams(words: list[str], n: int) -> Counter:
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    found = []
    for words, texts in zip(predictions, references, strict=True):
        total = 0.0
        for n in range(1, 5):
            frequency = Counter(gram for group in references for gram in {g for text in group for g in grams(text, n)})
            weight = {gram: math.log(len(references) / count) for gram, count in frequency.items()}

            def vector(text: list[str], n: int = n, weight: dict = weight) -> dict:
                unseen = math.log(len(references))
                return {gram: count * weight.get(gram, unseen) for gram, count in grams(text, n).items()}

            for text in texts:
                h, r = vector(words), vector(text)
                lengths = math.hypot(*h.values()) * math.hypot(*r.values())
                dot = sum(min(value, r.get(gram, 0.0)) * r.get(gram, 0.0) for gram, value in h.items())
                away = max(len(words) - 1, 0) - max(len(text) - 1, 0)
                total += math.exp(-(away**2) / 72) * (dot / lengths if lengths else 0.0) / 4 / len(texts)
        found.append(10 * total)
    return found


@pytest.mark.parametrize("case", ["written", "random"])
def test_rouge_l_and_cider_d_written_out(case):
    predictions, references = (PREDICTIONS, REFERENCES) if case == "written" else random_captions(2, 15)[::2]
    scores = score_captions(predictions, references, metrics=["rouge_l", "cider_d"])
    words = [text.split() for text in tokenize(predictions)]
    cut = [[text.split() for text in tokenize(texts)] for texts in references]
    expected = cider_d(words, cut)
    assert max(expected) > 0.5
    np.testing.assert_allclose(scores["cider_d"].per_image, expected, atol=1e-9)
    expected = [rouge_l(a, b) for a, b in zip(words, cut, strict=True)]
    np.testing.assert_allclose(scores["rouge_l"].per_image, expected, atol=1e-12)
    for name in ("cider_d", "rouge_l"):
        assert scores[name].value == pytest.approx(scores[name].mean_of_images)


def test_limits():
    texts = ["a river near a field", "two roads by the port", "many green trees here"]
    perfect = score_captions(texts, [[text] for text in texts], metrics=PYTHON)
    assert [score.value for score in perfect.scores.values()] == pytest.approx([1, 1, 1, 1, 1, 10], abs=1e-6)
    nothing = score_captions(["", "."], [["a road"], ["two trees"]], metrics=PYTHON)
    for name, score in nothing.scores.items():
        assert (score.value, *score.per_image) == pytest.approx((0, 0, 0), abs=1e-12), name
    assert nothing.images == 2
    one = score_captions(["a road"], [["a road"]], metrics=["cider_d"])
    assert one["cider_d"].value == 0  # every word is in every image: none says anything


def test_order_of_images_does_not_matter():
    order = [3, 0, 5, 1, 4, 2]
    first = score_captions(PREDICTIONS, REFERENCES, metrics=PYTHON)
    second = score_captions([PREDICTIONS[i] for i in order], [REFERENCES[i] for i in order], metrics=PYTHON)
    for name, score in first.scores.items():
        assert second[name].value == pytest.approx(score.value, abs=1e-12)
        np.testing.assert_allclose(second[name].per_image, score.per_image[order], atol=1e-12)


@needs_java
def test_meteor_is_pycocoevalcaps(monkeypatch):
    from pycocoevalcap.meteor import meteor

    scorer = meteor.Meteor()  # it reads its tables for seconds, so one process serves both
    monkeypatch.setattr(meteor, "Meteor", lambda: scorer)
    theirs = {n: tokenize(texts) for n, texts in enumerate(REFERENCES)}
    value, each = scorer.compute_score(theirs, {n: [text] for n, text in enumerate(tokenize(PREDICTIONS))})
    score = score_captions(PREDICTIONS, REFERENCES, metrics=["meteor"])["meteor"]
    assert (score.value, score.per_image.tolist()) == (value, each)
    assert score.per_corpus
    assert 0.1 < value < 0.9
    assert each[5] == 0


def test_what_computed_it_stands_beside_each():
    found = json.loads(json.dumps(score_captions(PREDICTIONS, REFERENCES, metrics=PYTHON).to_dict()))
    assert found["images"] == 6
    assert list(found["scores"]) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"]
    assert found["scores"]["bleu_4"]["library"] == "pycocoevalcap"
    assert found["scores"]["bleu_4"]["version"] == "1.2"
    assert "NLTKWordTokenizer" in found["scores"]["bleu_4"]["tokenizer"]
    assert found["scores"]["bleu_1"]["value"] != found["scores"]["bleu_1"]["mean_of_images"]


def test_the_default_says_what_it_left_out(monkeypatch):
    monkeypatch.setattr(java.shutil, "which", lambda name: None)
    scores = score_captions(PREDICTIONS, REFERENCES)
    assert list(scores.scores) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"]
    assert list(scores.missing) == ["meteor", "spice", "sbert"]
    assert "no java on this machine: install" in scores.missing["meteor"]
    assert "give a folder or hub id" in scores.to_dict()["missing"]["sbert"]


def test_what_is_named_must_be_had(monkeypatch):
    monkeypatch.setattr(java.shutil, "which", lambda name: None)
    with pytest.raises(BackendError) as caught:
        score_captions(PREDICTIONS, REFERENCES, metrics=METRICS, tokenizer="ptb")
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["meteor", "spice", "sbert", "tokenizer ptb"]
    with pytest.raises(BackendError, match="tokenizer ptb: there is no java"):
        score_captions(PREDICTIONS, REFERENCES, metrics=["bleu"], tokenizer="ptb")
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"sbert: .*pip install 'rsedge\[sbert\]'"):
        score_captions(PREDICTIONS, REFERENCES, sbert="somewhere")
    monkeypatch.setattr("rsedge.metrics.text.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"pip install 'rsedge\[evaluate\]'"):
        score_captions(PREDICTIONS, REFERENCES)


@pytest.mark.parametrize(
    ("predictions", "references", "options", "message"),
    [
        (["a"], [["a"], ["b"]], {}, "1 predictions for 2 images: give one per image"),
        ([], [], {}, "there is no prediction to score"),
        (["a", "b"], [["a"], []], {}, "1 of 2 images have no reference with a word in it, the first is number 1"),
        (["a", "b"], [["."], [" "]], {}, "2 of 2 images have no reference"),
        (["a"], ["a"], {}, "wrap it in a list"),
        (["a"], [["a"]], {"metrics": ["bleu", "wer", "ter"]}, "unknown metrics ter, wer; there are bleu, meteor"),
        (["a"], [["a"]], {"metrics": []}, "no metric was named"),
        (["a"], [["a"]], {"sbert": "x"}, "sbert is not among the metrics"),
        (["a"], [["a"]], {"tokenizer": "moses"}, "tokenizer is 'moses'"),
    ],
)
def test_what_is_not_accepted(predictions, references, options, message):
    with pytest.raises(OptionError, match=message):
        score_captions(predictions, references, **{"metrics": ["bleu"], **options})


def test_scores_that_do_not_fit_together():
    score = Score(metric="bleu_1", value=0, per_image=np.zeros(3), library="x", version="1", tokenizer="y")
    with pytest.raises(OptionError, match=r"bleu_1 has 3 scores for 2 images; bleu_counts is None, expected \(2, 10\)"):
        CaptionScores(scores={"bleu_1": score}, images=2)
