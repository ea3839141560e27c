"""The runtime tokenizer by itself: a file in, ids and text out, no transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rsedge.errors import BundleError
from rsedge.runtime.decoding.tokenizer import Tokenizer

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "plane", "##s", "park", "##ed", ".", "[DEC]"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    cls, sep = ({"id": token, "ids": [VOCABULARY.index(token)], "tokens": [token]} for token in ("[CLS]", "[SEP]"))
    ends = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}]
    values = {
        "version": "1.0",
        "added_tokens": [{"id": VOCABULARY.index(token), "content": token, **flags} for token in SPECIAL],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [ends[0], {"Sequence": {"id": "A", "type_id": 0}}, ends[1]],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"[CLS]": cls, "[SEP]": sep},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: index for index, token in enumerate(VOCABULARY)},
        },
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    return path


def test_ids_come_with_special_tokens_and_text_without(file: Path):
    tokenizer = Tokenizer.load(str(file))
    assert tokenizer.encode("Planes parked.") == [2, 5, 6, 7, 8, 9, 3]
    assert tokenizer.decode([10, 5, 6, 7, 8, 9, 3, 0, 0]) == "planes parked."
    assert tokenizer.encode("") == [2, 3]
    assert tokenizer.decode([]) == ""
    assert tokenizer.vocab_size == len(VOCABULARY)


def test_numpy_ids_are_ids(file: Path):
    assert Tokenizer.load(file).decode(np.array([4, 5], dtype=np.int64)) == "a plane"


def test_ids_beyond_the_vocabulary_leave_nothing(file: Path):
    assert Tokenizer.load(file).decode([4, 11, 30522, 5]) == "a plane"


def test_threads_may_share_one(file: Path):
    tokenizer = Tokenizer.load(file)
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda count: tokenizer.decode([5] * count), range(1, 200)))
    assert texts == [" ".join(["plane"] * count) for count in range(1, 200)]


@pytest.mark.parametrize("content", [None, "", "{}", "\xff"])
def test_an_unreadable_file_is_a_bundle_error(tmp_path: Path, content: str | None):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(BundleError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        Tokenizer.load(path)


def test_neither_torch_nor_transformers_is_imported(file: Path):
    code = (
        "import sys; from rsedge.runtime.decoding.tokenizer import Tokenizer; "
        "Tokenizer.load(sys.argv[1]).encode('a plane'); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)
