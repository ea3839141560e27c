"""Labels, prompts and class embeddings, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rsedge.errors import OptionError
from rsedge.runtime.prompts import ENSEMBLE, TEMPLATES, as_words, class_embeddings, prompts, read_labels


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("SparseResidential", "sparse residential"),
        ("sparse_residential", "sparse residential"),
        ("storage-tanks", "storage tanks"),
        ("SeaLake", "sea lake"),
        ("baseball field", "baseball field"),
        ("Port", "port"),
    ],
)
def test_labels_as_words(label, words):
    assert as_words(label) == words


def test_prompts():
    assert prompts("SeaLake") == ["An aerial photograph of sea lake"]
    found = prompts("road", ("{category} and {category}", "a {}", "{} {category}"))
    assert found == ["road and road", "a road", "road road"]
    assert prompts("a {} b", ("{category}, {}",)) == ["a {} b, a {} b"], "what a label holds is no place"
    assert [len(prompts("road", templates)) for templates in (TEMPLATES, ENSEMBLE)] == [1, 5]
    assert ENSEMBLE[0] == TEMPLATES[0]
    with pytest.raises(OptionError, match=r"template 'a photo', 'b' has no \{category\} and no \{\}"):
        prompts("road", ("a {category}", "a photo", "b"))
    with pytest.raises(OptionError, match="there is no template"):
        prompts("road", ())


def test_class_embeddings_by_hand():
    vectors = {"a x": [3, 0], "b x": [0, 1], "a y": [-2, 0], "b y": [-1, 0]}
    found = class_embeddings(["X", "Y"], lambda texts: np.array([vectors[text] for text in texts]), ("a {}", "b {}"))
    # Of unit vectors, so the 3 weighs no more than the 1; and the mean, shorter than 1, is made a unit vector again.
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5], [-1, 0]], atol=1e-7)
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels are none"),
        (["a"], "labels are a: give at least two classes"),
        (["a", "b", "a"], r"\(a and a mean the same\)"),
        (["SeaLake", "b", "sea_lake"], r"\(SeaLake and sea_lake mean the same\)"),
    ],
)
def test_labels_that_make_no_choice(labels, message):
    with pytest.raises(OptionError, match=message):
        class_embeddings(labels, lambda texts: np.ones((len(texts), 2)))


def test_a_broken_model_is_told():
    with pytest.raises(OptionError, match="1 of 2 prompt embeddings are zero or not finite, the first is number 1"):
        class_embeddings(["a", "b"], lambda texts: np.array([[1.0, 0], [np.nan, 0]]))


def test_labels_from_a_list_and_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_labels(" forest, water ,,sand") == ["forest", "water", "sand"]
    assert len(read_labels(",".join(f"a long class number {number}" for number in range(500)))) == 500
    file = tmp_path / "labels.txt"
    file.write_bytes("\ufeffSeeufer, Kies\r\n\r\nWald \nFläche\n".encode())
    assert read_labels(str(file)) == ["Seeufer, Kies", "Wald", "Fläche"], "a line is a label, commas and all"
    file.write_bytes("Wald\nFläche\n".encode("latin-1"))
    with pytest.raises(OptionError, match=r"labels\.txt, line 2, are not UTF-8 \(byte 0xe4\): save the file as UTF-8"):
        read_labels(str(file))
    for value in ("labels.tx", "forest", ""):
        with pytest.raises(OptionError, match="neither a file nor a list"):
            read_labels(value)
