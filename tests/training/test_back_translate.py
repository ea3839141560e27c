"""Back-translation with tiny random Marian models: languages, cleaning, resuming."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from rsedge.datasets.examples import Example
from rsedge.datasets.layouts import attach_paraphrases
from rsedge.errors import BackendError, OptionError, OutputError
from rsedge.training.data import back_translate as module
from rsedge.training.data.back_translate import BackTranslation, Translator, back_translate
from tests.marian import make_marian

SEARCH = {"num_beams": 1, "max_new_tokens": 8, "batch_size": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("marian")
    forward = make_marian(folder / "en-romance", languages=("fr", "es"), seed=1)
    return str(forward), str(make_marian(folder / "romance-en", languages=(), seed=2))


class NoImage:
    def read(self):
        raise AssertionError


def examples(count: int) -> list[Example]:
    things = ["houses", "green fields", "a long river", "an airport", "many white boats"]
    return [
        Example(
            f"s/{i:03d}.jpg",
            NoImage(),
            tuple(f"{things[(i + j) % 5]} near {things[(i * j + 2) % 5]}" for j in range(1 + i % 3)),
            "train",
        )
        for i in range(count)
    ]


def test_translations_are_those_of_transformers_one_by_one(models):
    from transformers import MarianMTModel, MarianTokenizer

    tokenizer, model = MarianTokenizer.from_pretrained(models[0]), MarianMTModel.from_pretrained(models[0]).eval()
    texts = ["houses near a long river", "an airport", "houses near a long river", "many white boats near green fields"]
    for beams in (1, 3):
        expected = []
        for text in texts:
            tokens = tokenizer([f">>es<< {text}"], return_tensors="pt")
            assert tokenizer.convert_ids_to_tokens(tokens.input_ids[0])[0] == ">>es<<"
            output = model.generate(**tokens, num_beams=beams, max_new_tokens=8, do_sample=False)
            expected.append(" ".join(tokenizer.decode(output[0], skip_special_tokens=True).split()))
        translate = Translator(models[0], **{**SEARCH, "num_beams": beams})
        assert translate.languages == ("fr", "es")
        assert translate(texts, "es") == expected
        assert len(set(expected)) > 1


def test_wordings_are_new_and_distinct():
    class Says:
        languages = ()

        def __init__(self, answers):
            self.answers = iter(answers)

        def __call__(self, texts, language=None):
            return next(self.answers)

    sample = [Example("s/a", NoImage(), ("A river.", "some boats"), "train"), examples(1)[0]]
    forward = Says([["x"] * 3] * 3)
    backward = Says([["a  River", "boats", "A"], ["a stream", "Boats .", ""], ["a stream", "two boats", "A"]])
    assert module._reword(sample, forward, backward, ("fr", "es", "it")) == [
        [["a stream"], ["boats", "two boats"]],
        [["A"]],
    ]


def test_the_file_is_what_training_reads(models, tmp_path: Path):
    data = examples(40)
    output = tmp_path / "out.jsonl"
    seen = []
    settings = BackTranslation(*models, languages=("fr", "es"), max_new_tokens=6)
    counts = back_translate(data[::-1], output, settings, device="cpu", progress=lambda *at: seen.append(at))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["key"] for line in lines] == [example.key for example in data]
    assert [tuple(line["captions"]) for line in lines] == [example.captions for example in data]
    wordings = sum(len(group) for line in lines for group in line["paraphrases"])
    assert counts == {"images": 40, "captions": sum(len(example.captions) for example in data), "paraphrases": wordings}
    assert wordings > 40  # so the models do write various things
    assert seen == [(32, 40), (40, 40)]
    assert list(tmp_path.iterdir()) == [output]
    attached = attach_paraphrases(data, output, known={example.key for example in data})
    assert sum(len(group) for example in attached for group in example.paraphrases) == wordings

    with pytest.raises(OutputError, match="exists already"):
        back_translate(data, output, settings)
    before = output.read_bytes()
    back_translate(data, output, settings, device="cpu", overwrite=True)
    assert output.read_bytes() == before


@pytest.mark.parametrize("cut", [0.0, 0.4, 0.99, 1.0])
def test_an_interrupted_run_goes_on(models, tmp_path: Path, monkeypatch, cut):
    monkeypatch.setattr(module, "SEGMENT", 4)
    data, settings = examples(10), BackTranslation(*models, languages=("fr",), max_new_tokens=3)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    back_translate(data, whole, settings, device="cpu")

    def stop(done, total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        back_translate(data, output, settings, device="cpu", progress=stop)
    partial = tmp_path / "cut.jsonl.partial"
    assert not output.exists()
    header, _, records = partial.read_bytes().partition(b"\n")
    partial.write_bytes(header + b"\n" + records[: int(len(records) * cut)])
    kept = records[: int(len(records) * cut)].count(b"\n") // 4 * 4
    seen = []
    back_translate(data, output, settings, device="cpu", progress=lambda done, total: seen.append(done))
    assert output.read_bytes() == whole.read_bytes()
    assert seen == [*range(kept + 4, 10, 4), 10]
    assert not partial.exists()


def test_unfinished_work_of_another_run_is_kept(models, tmp_path: Path):
    data, output = examples(3), tmp_path / "o.jsonl"
    partial = tmp_path / "o.jsonl.partial"
    settings = BackTranslation(*models, languages=("fr",), max_new_tokens=3)
    partial.write_text('{"other": 1}\n{"key": 2}\n')
    with pytest.raises(OutputError, match="unfinished work of other settings"):
        back_translate(data, output, settings, device="cpu")
    assert partial.read_text() == '{"other": 1}\n{"key": 2}\n'
    back_translate(data, output, settings, device="cpu", overwrite=True)
    output.unlink()
    partial.write_text('{"other": 1}\n')  # nothing was finished
    back_translate(data, output, settings, device="cpu")
    assert output.exists()


def test_two_runs_at_once(models, tmp_path: Path):
    import fcntl

    output = tmp_path / "o.jsonl"
    with (tmp_path / "o.jsonl.partial").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="in use by another run"):
            back_translate(examples(2), output, BackTranslation(*models, languages=("fr",)), device="cpu")


def test_languages_are_checked(models, tmp_path: Path):
    output = tmp_path / "o.jsonl"
    for languages, message in [((), "several languages: choose some of fr, es"), (("fr", "de"), "into de; choose")]:
        with pytest.raises(OptionError, match=message):
            back_translate(examples(1), output, BackTranslation(*models, languages=languages), device="cpu")
    with pytest.raises(OptionError, match="a single one: leave languages out"):
        back_translate(examples(1), output, BackTranslation(models[1], models[1], languages=("fr",)), device="cpu")
    assert list(tmp_path.iterdir()) == []
    back_translate(examples(1), output, BackTranslation(models[1], models[1], max_new_tokens=3), device="cpu")


def test_settings_are_checked():
    with pytest.raises(
        OptionError, match=r"num_beams is 0: give 1 or more; batch_size is -1.*languages are 'fr', 'fr'"
    ):
        BackTranslation("a", "b", languages=("fr", "fr"), num_beams=0, batch_size=-1)


def test_other_models_and_devices_are_refused(models, checkpoint: Path, tmp_path: Path):
    with pytest.raises(OptionError, match="is a blip model, not a Marian translator"):
        Translator(str(checkpoint), **SEARCH)
    with pytest.raises(OptionError, match="cannot translate with"):
        Translator(str(tmp_path / "nowhere"), **SEARCH)
    settings = BackTranslation(*models, languages=("fr",))
    with pytest.raises(OptionError, match="device is 'gpu'"):
        back_translate(examples(1), tmp_path / "o", settings, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="device cuda:3 is not here"):
            back_translate(examples(1), tmp_path / "o", settings, device="cuda:3")
    with pytest.raises(OptionError, match="no captions"):
        back_translate([], tmp_path / "o", settings)
    with pytest.raises(OutputError, match="is not a folder"):
        back_translate(examples(1), tmp_path / "no" / "o", settings)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(models, tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        back_translate(examples(1), tmp_path / "o", BackTranslation(*models, languages=("fr",)), device="cpu")
