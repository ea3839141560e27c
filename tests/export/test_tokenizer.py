"""The exported tokenizer against transformers: equal ids, equal text, on every path a checkpoint can take."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rsedge.errors import CheckpointError
from rsedge.export.tokenizer import export_tokenizer
from rsedge.runtime.decoding.tokenizer import Tokenizer
from tests.conftest import shared_data
from tests.models import bert_vocabulary, save_tokenizer

ODD = [
    "",
    "   ",
    "it ' s n't here do not , you 've we 're ' ' i 'm",
    "don't can't won 't .",
    "a.b,c!d?e'f (12) 3-4",
    "x" * 500,
    "word " * 2000,
    "café naïve Ünïcödé ß Ångström x\u0301",
    "水域 и поле 😀 \u200b \x00 \x07 \ufffd",
    "tab\tnew\nline\r\n end",
    "[SEP] [DEC] x [MASK] [ENC] [PAD] [dec]",
    "##ab ##c",
    "MANY Planes ARE parked",
]


def write_vocabulary(folder: Path, vocabulary: list[str], **settings: Any) -> Path:
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
    values = {"tokenizer_class": "BertTokenizer", "additional_special_tokens": ["[DEC]", "[ENC]"], **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def assert_same_as_transformers(folder: Path, texts: list[str], target: Path, *, seed: int = 0) -> None:
    expected = AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.load(export_tokenizer(folder, target))
    assert tokenizer.vocab_size == len(expected)
    sequences = [expected.encode(text) for text in texts]
    for text, ids in zip(texts, sequences, strict=True):
        assert tokenizer.encode(text) == ids, text
    # What a decoder emits is not what encoding gives: any order, special tokens anywhere, ids beyond the vocabulary.
    draw = random.Random(seed)
    sequences += [[draw.randrange(len(expected) + 5) for _ in range(draw.randrange(30))] for _ in range(500)]
    texts_back = expected.batch_decode(sequences, skip_special_tokens=True)
    for ids, text in zip(sequences, texts_back, strict=True):
        assert tokenizer.decode(ids) == text, ids
        assert expected.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("source", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("clean_up", [False, True, None])
@pytest.mark.parametrize("lower", [True, False])
def test_ids_and_text_are_those_of_transformers(tmp_path: Path, source: str, clean_up: bool | None, lower: bool):
    settings = {"do_lower_case": lower} | ({} if clean_up is None else {"clean_up_tokenization_spaces": clean_up})
    folder = write_vocabulary(tmp_path / "checkpoint", [*bert_vocabulary(300), "n't", "'s"], **settings)
    if source == "tokenizer.json":
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "vocab.txt").unlink(missing_ok=True)
        folder = tmp_path / "saved"
    assert_same_as_transformers(folder, ODD, tmp_path / "tokenizer.json")


def test_clean_up_changes_text_only_where_the_checkpoint_asks(tmp_path: Path):
    texts = {}
    for clean_up in (False, True):
        folder = write_vocabulary(tmp_path / str(clean_up), bert_vocabulary(300), clean_up_tokenization_spaces=clean_up)
        tokenizer = Tokenizer.load(export_tokenizer(folder, tmp_path / f"{clean_up}.json"))
        texts[clean_up] = tokenizer.decode(tokenizer.encode("ba ' s la ."))
    assert texts == {False: "ba ' s la.", True: "ba's la."}


def test_dec_and_enc_outside_the_vocabulary_leave_no_text(tmp_path: Path):
    folder = write_vocabulary(tmp_path / "checkpoint", bert_vocabulary(300)[:-2], additional_special_tokens=[])
    tokenizer = Tokenizer.load(export_tokenizer(folder, tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("ba la")
    assert tokenizer.vocab_size == 298
    assert tokenizer.decode([298, *ids, 299]) == "ba la"


def test_truncation_and_padding_stored_by_training_are_dropped(tmp_path: Path):
    folder = tmp_path / "checkpoint"
    save_tokenizer(folder, bert_vocabulary(300))
    values = json.loads((folder / "tokenizer.json").read_text())
    values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert_same_as_transformers(folder, ["ba", "ba la ba la ba la ba la"], tmp_path / "tokenizer.json")


def test_the_real_vocabulary_on_real_captions(tmp_path: Path):
    vocabulary = shared_data("vocab/bert-base-uncased-vocab.txt").read_text(encoding="utf-8").split("\n")[:30522]
    images = json.loads(shared_data("rsicd/dataset_rsicd.json").read_text())["images"]
    captions = [sentence["raw"] for image in images for sentence in image["sentences"]]
    assert len(captions) > 40_000
    texts = random.Random(0).sample(captions, 3000) + ODD
    folder = write_vocabulary(tmp_path / "checkpoint", vocabulary)
    assert_same_as_transformers(folder, texts, tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode("[DEC] [ENC]") == [101, 30522, 30523, 102]


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"cannot load its tokenizer .*processor\.save_pretrained"):
        export_tokenizer(tmp_path, tmp_path / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_does_more_than_its_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import BertTokenizer

    save_tokenizer(tmp_path / "checkpoint", bert_vocabulary(300))
    original = BertTokenizer._decode
    monkeypatch.setattr(BertTokenizer, "_decode", lambda *args, **options: original(*args, **options).upper())
    with pytest.raises(CheckpointError, match=r"BertTokenizer does more than its tokenizer\.json says"):
        export_tokenizer(tmp_path / "checkpoint", tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()


def test_the_checkpoint_is_left_as_it_was(tmp_path: Path):
    folder = write_vocabulary(tmp_path / "checkpoint", bert_vocabulary(300))
    before = shutil.copytree(folder, tmp_path / "copy")
    export_tokenizer(folder, tmp_path / "tokenizer.json")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in before.iterdir()
    }
