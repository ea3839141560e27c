"""The embedder as its users call it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rsedge.bundle import EmbeddingSpec
from rsedge.errors import BundleError, OptionError
from rsedge.pixels import resize
from rsedge.runtime.decoding.tokenizer import Tokenizer
from rsedge.runtime.embedder import Embedder
from tests.dual_encoders import TEXTS, make_clip, make_siglip
from tests.models import random_images


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rsedge.export.convert import export

    folder = tmp_path_factory.mktemp("clip")
    return export(make_clip(folder / "model"), folder / "clip.rsedge").path


@pytest.fixture(scope="module")
def siglip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rsedge.export.convert import export

    folder = tmp_path_factory.mktemp("siglip")
    return export(make_siglip(folder / "model"), folder / "siglip.rsedge").path


@pytest.fixture(scope="module")
def embedder(clip_path: Path) -> Embedder:
    return Embedder.load(clip_path, device="cpu", batch_size=2)


def test_what_it_says_of_itself(embedder: Embedder):
    assert embedder.model == f"clip@{embedder.hash[:12]}"
    assert len(embedder.hash) == 64
    assert (embedder.device, embedder.batch_size, embedder.image_size, embedder.dim) == ("cpu", 2, 32, 24)
    assert embedder.device_reason
    assert embedder.logit_scale == pytest.approx(np.exp(2.6))
    assert embedder.logit_bias is None


def test_any_number_of_images_and_texts(embedder: Embedder):
    images = random_images(5, 32)
    together = embedder.embed_images(images)
    assert (together.shape, together.dtype) == ((5, 24), np.float32)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert embedder.embed_images(images[:0]).shape == embedder.embed_texts([]).shape == (0, 24)


def test_texts_keep_their_order(embedder: Embedder):
    """They are computed by length, and must come back as they were given."""
    rows = embedder.embed_texts(TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        np.testing.assert_allclose(embedder.embed_texts([text])[0], row, atol=1e-6)
    np.testing.assert_array_equal(embedder.embed_texts(TEXTS[::-1]), rows[::-1])


def test_long_texts_are_cut_and_keep_their_end(embedder: Embedder):
    [ids] = embedder.token_ids([TEXTS[-1]])
    assert len(ids) == 20
    assert ids[-1] == 559
    np.testing.assert_array_equal(embedder.embed_texts([TEXTS[-1]]), embedder.embed_texts([TEXTS[-1] * 2]))


def test_texts_are_filled_by_the_rule_of_the_bundle(embedder: Embedder, siglip_path: Path):
    siglip = Embedder.load(siglip_path, device="cpu")
    plain = Tokenizer.load(siglip.bundle.tokenizer_path)
    short, long = plain.encode("river"), plain.encode("a bridge over the river")
    assert [row.tolist() for row in siglip.token_ids(["river"])] == [short + [559] * (16 - len(short))]
    assert embedder.token_ids(["river", "a bridge over the river"]).tolist() == [
        short + [559] * (len(long) - len(short)),
        long,
    ]
    assert siglip.logit_bias == -9.5


def test_other_sizes_are_resized(embedder: Embedder):
    large = random_images(2, 50)
    small = np.array([resize(image, 32) for image in large])
    np.testing.assert_array_equal(embedder.embed_images(large), embedder.embed_images(small))


def test_what_cannot_be_embedded_is_refused(embedder: Embedder, clip_path: Path):
    with pytest.raises(OptionError, match=r"float32 \[2, 32, 32, 3\], expected uint8 \[B, H, W, 3\]"):
        embedder.embed_images(np.zeros((2, 32, 32, 3), np.float32))
    with pytest.raises(OptionError, match=r"pass image\[None\]"):
        embedder.embed_images(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(OptionError, match=r"expected a list of strings: pass \[text\]"):
        embedder.embed_texts("an airport")
    with pytest.raises(OptionError, match="batch_size is 0"):
        Embedder.load(clip_path, batch_size=0)


def test_nothing_is_no_image_and_no_text(embedder: Embedder):
    with pytest.raises(OptionError, match="nothing to see"):
        embedder.embed_images(np.zeros((1, 0, 5, 3), np.uint8))
    with pytest.raises(OptionError, match="hold 1, expected strings"):
        embedder.embed_texts(["a", 1])


def test_a_captioner_is_no_embedder(bundle_path: Path):
    with pytest.raises(BundleError, match="is a blip bundle and cannot embed"):
        Embedder.load(bundle_path, device="cpu")


def test_a_bundle_for_images_only_says_so(clip_path: Path, tmp_path: Path):
    import json
    import shutil

    path = Path(shutil.copytree(clip_path, tmp_path / "images.rsedge"))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["graphs"].pop("text")
    manifest["tokenizer"] = None
    manifest["embedding"].update(context_length=None, pad_id=None)
    (path / "manifest.json").write_text(json.dumps(manifest))
    embedder = Embedder.load(path, device="cpu")
    assert embedder.embed_images(random_images(1, 32)).shape == (1, 24)
    with pytest.raises(BundleError, match="no text encoder: it embeds images only"):
        embedder.embed_texts(["an airport"])


def test_it_needs_no_torch(clip_path: Path):
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx", "accelerate", "safetensors", "sentencepiece"):
            raise ImportError(f"{{name}} is blocked")
        if name.startswith(("rsedge.training", "rsedge.export")):
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
import numpy as np
from rsedge.runtime.embedder import Embedder
embedder = Embedder.load({str(clip_path)!r}, device="cpu")
images = embedder.embed_images(np.zeros((2, 40, 40, 3), np.uint8))
print(images.shape, embedder.embed_texts(["an airport"]).shape)
from rsedge.evaluation.models import open_embedder
print(open_embedder({str(clip_path)!r}, device="cpu").info.kind)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines() == ["(2, 24) (1, 24)", "bundle"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 0}, "dim must be positive, got 0"),
        ({"context_length": 77}, "context_length and pad_id belong together"),
        ({"pad_id": 1}, "context_length and pad_id belong together"),
        (
            {"context_length": 0, "pad_id": -1},
            "context_length must be positive, got 0; pad_id must be 0 or more, got -1",
        ),
        ({"pad_to_context": True}, "pad_to_context needs a context_length"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(fields: dict[str, int], message: str):
    with pytest.raises(BundleError, match=message):
        EmbeddingSpec(**{"dim": 8, **fields})
