"""`rsedge evaluate captions --from` and `compare`: files of predictions, scored and tested without any model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rsedge.cli.main import run
from rsedge.evaluation.predictions import Prediction, read_predictions, write_predictions
from rsedge.metrics.captions import score_captions
from rsedge.metrics.compare import PERTURBATIONS, perturb
from tests.training.tiny import caption_data, write_set

METRICS = ["--metrics", "bleu,rouge_l"]
THINGS = ("forest", "river", "airport", "harbour", "farmland", "desert", "stadium", "meadow", "school", "bridge")


def references(thing: str) -> tuple[str, ...]:
    return f"a large {thing} is near some green trees .", f"there is a {thing} beside a grey road"


def predictions(number: int, skill: float) -> list[Prediction]:
    """Captions of ``number`` images, of which the share ``skill`` names what is there."""
    random = np.random.default_rng(7)
    found = []
    for index in range(number):
        thing = THINGS[index % len(THINGS)]
        said = thing if random.random() < skill else "building"
        found.append(Prediction(f"set/{index}.png", f"a {said} is near some trees", references(thing)))
    return found


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """A, and B that is better; B's lines in another order."""
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_predictions(a, predictions(24, 0.3))
    write_predictions(b, predictions(24, 0.9)[::-1])
    return a, b


def evaluate(capsys, *arguments: object, code: int = 0) -> dict:
    capsys.readouterr()
    assert run(["evaluate", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: object, code: int = 2) -> str:
    capsys.readouterr()
    assert run(["evaluate", *map(str, arguments)]) == code
    return capsys.readouterr().err


def test_compare_tests_in_pairs(files, capsys):
    a, b = files
    found = evaluate(capsys, "compare", a, b, *METRICS)["comparison"]["rouge_l"]
    each = [
        score_captions([p.caption for p in side], [p.references for p in side], metrics=["rouge_l"])["rouge_l"]
        for side in (predictions(24, 0.3), predictions(24, 0.9))
    ]
    change = each[1].per_image - each[0].per_image
    assert (found["a"], found["b"]) == pytest.approx((each[0].value, each[1].value))
    assert found["t_test_p"] == pytest.approx(stats.ttest_rel(each[1].per_image, each[0].per_image).pvalue)
    assert found["wilcoxon_p"] == pytest.approx(stats.wilcoxon(change).pvalue)
    assert found["better"] == (change > 0).sum() > 5
    assert (found["worse"], found["equal"]) == (0, (change == 0).sum())
    # The textbook interval of a mean, which a bootstrap of 24 images comes near.
    expected = change.mean() + 1.96 * change.std() / np.sqrt(24) * np.array([-1, 1])
    assert (found["low"], found["high"]) == pytest.approx(expected, abs=0.02)


def test_compare_is_seeded_and_its_options_count(files, capsys):
    def interval(*options: object) -> tuple[float, float]:
        found = evaluate(capsys, "compare", *files, "--metrics", "bleu", *options)["comparison"]["bleu_2"]
        return found["low"], found["high"]

    assert interval() == interval("--seed", 0)
    assert interval() != interval("--seed", 1)
    assert interval() != interval("--resamples", 100)
    low, high = interval("--confidence", 0.5)
    assert interval()[0] < low < high < interval()[1]


def test_compare_says_which_images_disagree(files, tmp_path, capsys):
    a, _ = files
    other = predictions(24, 0.9)
    other[0] = Prediction(other[0].key, other[0].caption, ("another reference",))
    write_predictions(tmp_path / "c.jsonl", [*other[:-1], Prediction("set/new.png", "a road", ("a road",))])
    error = refused(capsys, "compare", a, tmp_path / "c.jsonl", *METRICS)
    assert "1 images are in A and not in B: set/23.png" in error
    assert "1 images are in B and not in A: set/new.png" in error
    assert "1 images have other references in A than in B: set/0.png" in error


def test_sensitivity(files, capsys):
    a, b = files
    found = evaluate(capsys, "compare", a, "--metrics", "rouge_l", "--seed", 3)
    assert "comparison" not in found
    captions, texts = zip(*((p.caption, p.references) for p in predictions(24, 0.3)), strict=True)
    whole = score_captions(captions, texts, metrics=["rouge_l"])["rouge_l"].value
    for kind in PERTURBATIONS:
        value = score_captions(perturb(captions, kind, seed=3), texts, metrics=["rouge_l"])["rouge_l"].value
        assert found["sensitivity"][kind]["rouge_l"] == pytest.approx({"value": value, "kept": value / whole})
    assert found["sensitivity"]["shuffle"]["rouge_l"]["kept"] < 0.95
    both = evaluate(capsys, "compare", a, b, "--metrics", "rouge_l", "--seed", 3, "--sensitivity")
    assert both["sensitivity"] == found["sensitivity"]
    assert both["comparison"]
    assert run(["evaluate", "compare", str(a), "--metrics", "rouge_l"]) == 0
    assert "kept after" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["out.jsonl", "out.json"])
def test_predictions_go_out_and_come_back(files, tmp_path, capsys, name):
    out = tmp_path / name
    first = evaluate(capsys, "captions", "--from", files[1], "--predictions", out, *METRICS)
    again = evaluate(capsys, "captions", "--from", out, *METRICS)
    assert read_predictions(out) == tuple(predictions(24, 0.9)[::-1])
    assert again["scores"] == first["scores"]
    assert again["text"] == first["text"]


def test_coco_reads_what_was_written(files, tmp_path, capsys):
    coco = pytest.importorskip("pycocotools.coco")
    evaluate(capsys, "captions", "--from", files[0], "--predictions", tmp_path / "out.json", *METRICS)
    known = coco.COCO(str(tmp_path / "out.references.json"))
    results = known.loadRes(str(tmp_path / "out.json"))
    for number, prediction in enumerate(predictions(24, 0.3), 1):
        assert known.imgs[number]["file_name"] == prediction.key
        assert [item["caption"] for item in known.imgToAnns[number]] == list(prediction.references)
        assert [item["caption"] for item in results.imgToAnns[number]] == [prediction.caption]


def test_an_image_without_a_prediction_counts(tmp_path, capsys):
    data = write_set(tmp_path / "set", caption_data(train=4, val=4))
    made = [Prediction(e.key.replace("plain/", "set/"), e.captions[0]) for e in caption_data(4, 4).split("val")]
    write_predictions(tmp_path / "some.jsonl", made[1:])
    settings = ("--data", data, "--split", "val", "--metrics", "rouge_l")
    found = evaluate(capsys, "captions", "--from", tmp_path / "some.jsonl", *settings, code=3)
    assert (found["images"], list(found["failed"])) == (4, [made[0].key])
    assert found["scores"]["rouge_l"]["value"] == pytest.approx(3 / 4)
    assert found["baselines"].keys() == {"most_frequent", "consensus"}
    write_predictions(tmp_path / "strange.jsonl", [*made, Prediction("set/x.png", "a field")])
    error = refused(capsys, "captions", "--from", tmp_path / "strange.jsonl", *settings)
    assert "1 of 5 predictions are of images that are not in this data and split:\n  set/x.png" in error


def test_a_coco_result_without_a_caption_counts_and_a_strange_one_does_not(files, tmp_path, capsys):
    out = tmp_path / "out.json"
    evaluate(capsys, "captions", "--from", files[0], "--predictions", out, *METRICS)
    results = json.loads(out.read_text())
    out.write_text(json.dumps(results[1:]))
    assert list(evaluate(capsys, "captions", "--from", out, *METRICS, code=3)["failed"]) == ["set/0.png"]
    out.write_text(json.dumps([*results, results[0], {"image_id": 99, "caption": "a road"}]))
    error = refused(capsys, "captions", "--from", out, *METRICS)
    assert "image 1 is there 2 times" in error
    assert "image 99 is not in out.references.json" in error
    (tmp_path / "out.references.json").unlink()
    assert "out.references.json, which says what images" in refused(capsys, "captions", "--from", out, *METRICS)


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("empty.jsonl", b"", ["it is empty"]),
        ("bytes.jsonl", b"\xff\xfe\x00", ["cannot read the predictions"]),
        (
            "bad.jsonl",
            b'{"key": "a"\n[1]\n{"key": "b", "caption": 3, "more": 1}\n{"key": "", "caption": ""}\n'
            b'{"key": "z", "caption": "x"}\n{"key": "z", "caption": "y", "references": "one"}\n'
            b'{"key": "z", "caption": "y"}\n',
            [
                "line 1: Expecting",
                "line 2: expected a JSON object",
                "line 3: unknown field more; caption is 3, expected a text",
                "line 4: a prediction has an empty key",
                "line 6: references must be a list of texts",
                "z is there 2 times",
            ],
        ),
        ("bad.json", b'{"image_id": 1}', ["are no COCO results"]),
        ("bad.json", b"[", ["are no COCO results"]),
    ],
)
def test_damaged_predictions(tmp_path, capsys, name, content, messages):
    file = tmp_path / name
    file.write_bytes(content)
    (tmp_path / "bad.references.json").write_text('{"images": [{"id": 1, "file_name": "a"}], "annotations": []}')
    for command in (["captions", "--from", file], ["compare", file]):
        error = refused(capsys, *command, *METRICS)
        assert [message for message in messages if message not in error] == []
        assert "unexpected" not in error


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--metrics", "bleu,blue"], 2, "unknown metrics blue"),
        (["--metrics", ","], 2, "no metric was named"),
        (["--metrics", "sbert"], 1, "no Sentence-BERT model is named"),
        (["--beams", "3", "--top-p", "0.5"], 2, "leave out --beams, --top-p"),
        (["--split", "test", "--no-baselines"], 2, "need --data"),
        (["--device", "cpu"], 2, "only --sbert uses --device"),
        (["--predictions", "nowhere/a.jsonl", "-o", "nowhere/b.json", *METRICS], 1, "nowhere/a.jsonl"),
        (["a-model"], 2, "give either a MODEL or"),
    ],
)
def test_what_captions_from_a_file_refuses(files, tmp_path, capsys, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "captions", "--from", files[0], *options, code=code)


def test_predictions_without_references(tmp_path, capsys):
    write_predictions(tmp_path / "bare.jsonl", [Prediction("a", "a road"), Prediction("b", "a field")])
    error = refused(capsys, "captions", "--from", tmp_path / "bare.jsonl", *METRICS)
    assert "2 of 2 predictions have no references, the first is of a: give the data set" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--confidence", "95"], "95"),
        (["--resamples", "10"], "10"),
        (["--metrics", "blue"], "unknown metrics blue"),
    ],
)
def test_what_compare_refuses(files, capsys, options, message):
    assert message in refused(capsys, "compare", *files, *options)


def test_bootstrap_options_need_b(files, capsys):
    error = refused(capsys, "compare", files[0], "--resamples", 500, "--confidence", 0.9)
    assert "--resamples, --confidence need B" in error


def test_half_a_character_is_written_as_json_escapes_it(tmp_path):
    one = [Prediction("a\udcff.png", "a \ud800 road", ("a road",))]
    for name in ("a.jsonl", "a.json"):
        write_predictions(tmp_path / name, one)
        assert list(read_predictions(tmp_path / name)) == one
