"""`rsedge evaluate`: a checkpoint and its bundle get the same figures, and nothing leaves the denominator unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from rsedge.cli.main import run
from rsedge.errors import OptionError
from rsedge.evaluation.models import locate, open_captioner, open_embedder
from rsedge.training.train import train
from tests.training.tiny import caption_data, tiny_recipe, write_set

METRICS = ["--metrics", "bleu,rouge_l,cider_d"]
_WITHOUT_TORCH = """
import sys

class Missing:  # None in sys.modules would confuse SciPy, which looks there for torch
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "onnx", "rsedge.export", "rsedge.training"):
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
from rsedge.cli.main import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> dict[str, Path]:
    """A data set, runs of BLIP, CLIP and CLIPCap on it, and BLIP's bundle."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = caption_data()
    found = {"data": write_set(folder / "set", data)}
    for family in ("blip", "clip", "clipcap"):
        recipe = tiny_recipe(family, "loop.epochs=8", "loop.evaluate_every=24")
        found[family] = train(recipe, folder / family, data=data, cpu=True, trackers=()).run
    assert run(["export", str(found["blip"] / "best"), "-o", str(folder / "blip.rsedge")]) == 0
    return {**found, "bundle": folder / "blip.rsedge"}


def evaluate(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert run(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_checkpoint_and_its_bundle_write_the_same_captions(work, tmp_path, capsys):
    for name, beams in (("greedy", 1), ("beam", 3)):
        files = []
        for model in ("blip", "bundle"):
            files.append(tmp_path / f"{name}-{model}.jsonl")
            common = ["--data", work["data"], "--split", "val", "--predictions", files[-1], "--beams", beams, *METRICS]
            report = evaluate(capsys, "captions", work[model], *common)
            assert report["model"]["kind"] == ("bundle" if model == "bundle" else "checkpoint")
        assert files[0].read_text() == files[1].read_text()
        assert len(files[0].read_text().splitlines()) == 8


def test_a_bundle_needs_no_torch(work, tmp_path):
    command = [sys.executable, "-c", _WITHOUT_TORCH, "evaluate", "captions", str(work["bundle"]), "--split", "val"]
    done = subprocess.run(
        [*command, "--data", str(work["data"]), *METRICS, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["precision"] == "fp32"


def test_predictions_are_scored_again_and_compared(work, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    first = evaluate(
        capsys, "captions", work["clipcap"], "--data", work["data"], "--split", "val", "--predictions", file, *METRICS
    )
    again = evaluate(capsys, "captions", "--from", file, *METRICS)
    assert first["scores"] == again["scores"]
    assert {"library", "version", "tokenizer"} <= first["scores"]["bleu_4"].keys()
    report = evaluate(capsys, "compare", file, file, *METRICS)
    assert "bleu_4" in json.dumps(report)


def test_retrieval_and_zero_shot_of_a_checkpoint(work, tmp_path, capsys):
    report = evaluate(capsys, "retrieval", work["clip"], "--data", work["data"], "--split", "val")
    line = json.loads((work["clip"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert report["mean_recall"] == pytest.approx(line["val_mean_recall"])  # the loop's own figure
    images = [example.image.read() for example in caption_data().split("val")]
    embedder = open_embedder(work["clip"], device="cpu")
    model = CLIPModel.from_pretrained(work["clip"] / "best").eval()
    from rsedge.evaluation.checkpoints import normalized
    from rsedge.training.models.loading import image_spec

    with torch.no_grad():
        pixels = normalized(images, image_spec(str(work["clip"] / "best")))
        expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(torch.from_numpy(embedder.embed_images(images)), expected)


def test_what_cannot_be_evaluated(work, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="neither a bundle"):
        locate(tmp_path / "empty")
    with pytest.raises(OptionError, match="writes no captions"):
        open_captioner(work["clip"])
    with pytest.raises(OptionError, match="does not embed"):
        open_embedder(work["blip"])
    with pytest.raises(OptionError, match="sample with the bundle"):
        open_captioner(work["blip"], top_p=0.9)
