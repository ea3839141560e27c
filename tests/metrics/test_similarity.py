"""Sentence-BERT similarity against sentence-transformers' own, with a tiny random BERT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rsedge.errors import BackendError, OptionError
from rsedge.metrics.captions import sbert_similarity, score_captions
from tests.metrics.cases import PREDICTIONS, REFERENCES, WORDS

pytest.importorskip("sentence_transformers", reason="the similarity needs the extra sbert")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer with random weights, saved by sentence-transformers."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("sbert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.tolist(), "."]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    parts = [Transformer(str(folder / "bert")), Pooling(16)]
    SentenceTransformer(modules=parts, device="cpu").save(str(folder / "sbert"))
    return folder / "sbert"


def test_sentence_transformers_cosines(model):
    from sentence_transformers import SentenceTransformer, util

    encoder = SentenceTransformer(str(model), device="cpu")
    mean, best = sbert_similarity(PREDICTIONS, REFERENCES, model=str(model), batch_size=3)
    for n, (text, texts) in enumerate(zip(PREDICTIONS[:5], REFERENCES, strict=False)):
        cosines = util.cos_sim(encoder.encode(text), encoder.encode(texts))[0].numpy()
        assert mean[n] == pytest.approx(cosines.mean(), abs=1e-6)
        assert best[n] == pytest.approx(cosines.max(), abs=1e-6)
    assert np.ptp(mean[:5]) > 0.01  # the random model tells texts apart
    assert (best > mean + 1e-4).sum() >= 3
    assert (mean[5], best[5]) == (0, 0)  # an empty prediction
    assert mean.dtype == best.dtype == np.float64


def test_among_the_scores(model):
    scores = score_captions(PREDICTIONS, REFERENCES, metrics=["sbert"], sbert=str(model))
    mean, best = sbert_similarity(PREDICTIONS, REFERENCES, model=str(model))
    assert list(scores.scores) == ["sbert_sim", "sbert_max"]
    np.testing.assert_allclose(scores["sbert_sim"].per_image, mean, atol=1e-6)
    assert scores["sbert_max"].value == pytest.approx(best.mean(), abs=1e-6)
    assert scores["sbert_sim"].library == f"sentence-transformers ({model})"
    same = score_captions(["a river"], [["a river", "a river"]], metrics=["sbert"], sbert=str(model))
    assert [score.value for score in same.scores.values()] == pytest.approx([1, 1], abs=1e-6)


def test_what_is_not_accepted(model, tmp_path, monkeypatch):
    for predictions, references in ((["a"], []), (["a", "b"], [["a"], []])):
        with pytest.raises(OptionError, match="at least one reference"):
            sbert_similarity(predictions, references, model=str(model))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OptionError, match="is no Sentence-BERT model"):
        sbert_similarity(["a"], [["a"]], model=str(tmp_path / "nothing"))
    with pytest.raises(BackendError, match="cannot be loaded on nodevice"):
        sbert_similarity(["a"], [["a"]], model=str(model), device="nodevice")
