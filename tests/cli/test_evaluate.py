"""`rsedge evaluate zero-shot` and `retrieval` as a user runs them, against CLIP of transformers and plain NumPy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPModel
from transformers.utils import logging

from rsedge.cli.main import run
from rsedge.runtime.prompts import ENSEMBLE
from rsedge.training.models.loading import learn_clip_bpe
from tests.models import random_images, save_image_processor

CLASSES = {"AnnualCrop": "annual crop", "Forest": "forest", "River": "river", "SeaLake": "sea lake"}
EACH = 4
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A random CLIP for 32 px; its weights are loud, so that answers differ between images."""
    path = tmp_path_factory.mktemp("clip")
    tokenizer = learn_clip_bpe([f"An aerial photograph of {words}" for words in CLASSES.values()], 560)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 24},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    random = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 or parameter is model.vision_model.embeddings.class_embedding:
                parameter.normal_(0, 1.5 / np.sqrt(parameter[0].numel()), generator=random)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    save_image_processor(path, 32)
    return path


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return random_images(len(CLASSES) * EACH, 32, seed=5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, pixels) -> Path:
    """Class folders as EuroSAT has them, ``Forest/Forest_1.png``."""
    root = tmp_path_factory.mktemp("set") / "classes"
    for number, image in enumerate(pixels):
        name = list(CLASSES)[number // EACH]
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name / f"{name}_{number % EACH}.png")
    return root


@pytest.fixture
def captioned(tmp_path, pixels) -> Path:
    """The first six images with two captions each, all different."""
    lines = []
    for number, image in enumerate(pixels[:6]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        texts = [f"{word} {number} {'by a river' * (number % 2)}" for word in ("crop", "lake")]
        lines.append(json.dumps({"filename": f"{number}.png", "captions": texts, "split": "test"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return tmp_path / "captions.jsonl"


class Reference:
    """Embeddings by transformers, of images that need no resizing."""

    def __init__(self, path: Path) -> None:
        self.model, self.tokenizer = CLIPModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)

    @torch.no_grad()
    def images(self, pixels: np.ndarray) -> np.ndarray:
        values = torch.from_numpy((pixels / 255 - MEAN) / STD).float().permute(0, 3, 1, 2)
        return unit(self.model.visual_projection(self.model.vision_model(pixel_values=values).pooler_output).numpy())

    @torch.no_grad()
    def texts(self, texts: list[str]) -> np.ndarray:
        rows = [self.model.text_model(**self.tokenizer(text, return_tensors="pt")).pooler_output for text in texts]
        return unit(self.model.text_projection(torch.cat(rows)).numpy())


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def report(capsys, *arguments: object, code: int = 0) -> dict:
    capsys.readouterr()
    assert run(["evaluate", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def top(similarity: np.ndarray, k: int) -> float:
    """Share of rows whose class, ``EACH`` images of each in order, is among the first k."""
    nearest = np.argsort(-similarity, axis=1)[:, :k]
    return float((nearest == np.repeat(np.arange(len(CLASSES)), EACH)[:, None]).any(axis=1).mean())


def test_zero_shot_is_what_transformers_gives(clip, folders, pixels, capsys):
    reference = Reference(clip)
    prompts = [f"An aerial photograph of {words}" for words in CLASSES.values()]
    similarity = reference.images(pixels) @ reference.texts(prompts).T
    found = report(capsys, "zero-shot", clip, "--data", folders)
    assert (found["images"], found["labels"]) == (16, list(CLASSES))
    assert found["top_1"] == top(similarity, 1)
    assert found["top_3"] == top(similarity, 3)
    assert not {"top_5", "top_10"} & found.keys()  # of four classes they would be 1 whatever the model
    answers = similarity.argmax(axis=1)
    assert len(set(answers)) > 2  # or this would prove little
    expected = [[int((answers[row * EACH :][:EACH] == column).sum()) for column in range(4)] for row in range(4)]
    assert [row[:4] for row in found["confusion"]] == expected
    assert run(["evaluate", "zero-shot", str(clip), "--data", str(folders)]) == 0
    assert f"top-1           {found['top_1']:.4f}" in capsys.readouterr().out


def test_templates_are_averaged(clip, folders, pixels, capsys):
    reference = Reference(clip)
    texts = [[f"{words} from above", f"some {words}"] for words in CLASSES.values()]
    anchors = unit(np.stack([reference.texts(pair).mean(axis=0) for pair in texts]))
    similarity = reference.images(pixels) @ anchors.T
    given = ("--template", "{category} from above", "--template", "some {category}")
    found = report(capsys, "zero-shot", clip, "--data", folders, *given)
    assert found["templates"] == ["{category} from above", "some {category}"]
    assert (found["top_1"], found["top_3"]) == (top(similarity, 1), top(similarity, 3))
    answers = np.eye(4, dtype=int)[similarity.argmax(axis=1)].sum(axis=0).tolist()
    assert np.sum(found["confusion"], axis=0).tolist() == [*answers, 0]

    found = report(capsys, "zero-shot", clip, "--data", folders, "--ensemble")
    spelt = [part for template in ENSEMBLE for part in ("--template", template)]
    assert found == report(capsys, "zero-shot", clip, "--data", folders, *spelt)


def test_classes_from_file_names_as_in_rsicd(clip, folders, tmp_path, capsys):
    lines = []
    for path in sorted(folders.rglob("*.png")):
        shutil.copy(path, tmp_path / path.name)
        lines.append(json.dumps({"filename": path.name, "captions": ["some land"], "split": "test"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    by_name = report(capsys, "zero-shot", clip, "--data", tmp_path / "captions.jsonl")
    by_folder = report(capsys, "zero-shot", clip, "--data", folders)
    assert by_name["labels"] == list(CLASSES)
    assert by_name["confusion"] == by_folder["confusion"]


def test_a_limit_leaves_all_classes_to_choose_from(clip, folders, capsys):
    found = report(capsys, "zero-shot", clip, "--data", folders, "--limit", 2)
    assert (found["images"], found["labels"]) == (2, list(CLASSES))


def test_labels_from_a_list_and_from_a_file(clip, folders, tmp_path, capsys):
    many = [*CLASSES, *"abcdefgh"]
    (tmp_path / "labels.txt").write_text("\n".join(many) + "\n")
    listed = report(capsys, "zero-shot", clip, "--data", folders, "--labels", ", ".join(many))
    assert listed["labels"] == many
    assert listed["top_1"] <= listed["top_5"] <= listed["top_10"] <= 1
    assert listed == report(capsys, "zero-shot", clip, "--data", folders, "--labels", tmp_path / "labels.txt")


def test_an_unreadable_image_counts_as_wrong(clip, folders, tmp_path, capsys):
    shutil.copytree(folders, tmp_path / "set")
    broken = tmp_path / "set/Forest/Forest_0.png"
    broken.write_bytes(broken.read_bytes()[:100])
    assert run(["evaluate", "zero-shot", str(clip), "--data", str(tmp_path / "set")]) == 2
    assert "Forest_0.png" in capsys.readouterr().err
    found = report(capsys, "zero-shot", clip, "--data", tmp_path / "set", "--skip-bad", code=3)
    assert [row[-1] for row in found["confusion"]] == [0, 1, 0, 0]
    assert list(found["failed"]) == ["set/Forest/Forest_0.png"]


def test_retrieval_both_ways_is_what_transformers_gives(clip, captioned, pixels, capsys):
    reference = Reference(clip)
    texts = [text for line in captioned.read_text().splitlines() for text in json.loads(line)["captions"]]
    similarity = reference.images(pixels[:6]) @ reference.texts(texts).T
    owner = np.repeat(np.arange(6), 2)
    image_ranks = np.array(
        [1 + min(np.flatnonzero(owner[np.argsort(-row)] == own)) for own, row in enumerate(similarity)]
    )
    text_ranks = np.array([1 + int((row > row[owner[n]]).sum()) for n, row in enumerate(similarity.T)])
    assert len(set(image_ranks)) > 1
    assert len(set(text_ranks)) > 1
    found = report(capsys, "retrieval", clip, "--data", captioned)
    for name, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        assert found[name]["median_rank"] == np.median(ranks)
        for k in (1, 5, 10):
            assert found[name][f"recall_{k}"] == pytest.approx((ranks <= k).mean())
    assert (found["images"], found["captions"]) == (6, 12)


def test_queries_of_an_unreadable_image_are_misses(clip, captioned, capsys):
    (captioned.parent / "2.png").write_bytes(b"no image")
    found = report(capsys, "retrieval", clip, "--data", captioned, "--skip-bad", code=3)
    assert found["text_to_image"]["recall_10"] == pytest.approx(10 / 12)
    assert found["image_to_text"]["recall_10"] <= 5 / 6
    assert len(found["failed"]) == 1


@pytest.mark.parametrize("shown", [True, False])
def test_no_bar_for_weights(clip, folders, capsys, shown):
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        assert run(["-q", "evaluate", "zero-shot", str(clip), "--data", str(folders), "--limit", "2"]) == 0
        assert logging.is_progress_bar_enabled() is shown  # as it was before
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--labels", "Forest,River"], 2, "AnnualCrop, SeaLake, which is not among the labels Forest, River"),
        (["--labels", "labels.txt"], 2, "neither a file nor a list"),
        (["--labels", "Forest,Forest,AnnualCrop,River,SeaLake"], 2, "each once"),
        (["--template", "a photo"], 2, "'a photo' has no {category}"),
        (["--template", "{category}", "--ensemble"], 2, "leave --template out"),
        (["--split", "val"], 2, "no usable image of the splits val"),
        (["--device", "tpu"], 2, "expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], 1, "use --device cpu"),
        (["-o", "nowhere/report.json"], 1, "there is no folder nowhere"),
    ],
)
def test_what_zero_shot_refuses(clip, folders, tmp_path, capsys, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", "zero-shot", str(clip), "--data", str(folders), *options]) == code
    assert message in capsys.readouterr().err


def test_images_without_a_class(clip, captioned, capsys):
    assert run(["evaluate", "zero-shot", str(clip), "--data", str(captioned)]) == 2
    error = capsys.readouterr().err
    assert "6 records cannot be used" in error
    assert "has no class" in error


def test_class_folders_have_no_captions_to_retrieve(clip, folders, capsys):
    assert run(["evaluate", "retrieval", str(clip), "--data", str(folders)]) == 2
    assert "layout cannot be told" in capsys.readouterr().err
    assert run(["evaluate", "retrieval", str(clip)]) == 2
    assert "needs --data" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["/no/such/folder", "./run", "clip.rsedge", "a/b/c"])
def test_a_model_that_is_not_there(folders, capsys, missing):
    assert run(["evaluate", "zero-shot", missing, "--data", str(folders)]) == 2
    assert f"there is no {missing}: give" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"\xff" * 200, "model.safetensors"),
        ("model.safetensors", None, "model.safetensors"),
        ("config.json", b"{", "config"),
        ("tokenizer.json", b"{", "tokenizer"),
        ("preprocessor_config.json", None, "preprocessor_config.json"),
    ],
)
def test_a_damaged_checkpoint(clip, folders, tmp_path, capsys, file, content, message):
    model = tmp_path / "model"
    shutil.copytree(clip, model)
    (model / file).unlink()
    if content is not None:
        (model / file).write_bytes(content)
    assert run(["evaluate", "zero-shot", str(model), "--data", str(folders)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "unexpected" not in error
