"""The STAC item and the model card say what the manifest says, in the form their readers require."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from rsedge.bundle import (
    DecoderSpec,
    EmbeddingSpec,
    FileRef,
    GenerationDefaults,
    Graph,
    ImageSpec,
    Manifest,
    Provenance,
    TensorSpec,
    TokenSpec,
)
from rsedge.export.card import model_card, stac_item


def graph(file: str, external: tuple[FileRef, ...] = ()) -> Graph:
    return Graph(
        file=file,
        sha256="a" * 64,
        size=1000,
        opset=20,
        inputs=(TensorSpec(name="pixels", dtype="uint8", shape=("batch", 224, 224, 3)),),
        outputs=(TensorSpec(name="cross_0", dtype="float32", shape=("batch", 8)),),
        external_data=external,
    )


def captioner(**changes: Any) -> Manifest:
    manifest = Manifest(
        name="blip-rsicd",
        family="blip",
        precision="fp16",
        graphs={
            "vision": graph("vision.onnx", (FileRef(file="w.data", sha256="b" * 64, size=7),)),
            "step": graph("step.onnx"),
        },
        image=ImageSpec(
            size=224,
            mean=(0.4, 0.5, 0.6),
            std=(0.2, 0.3, 0.25),
            reflectance={"full_scale": 2500, "boa_offset": 0, "formula": "clip(255 · (DN + offset) / 2500) | round"},
        ),
        tokens=TokenSpec(bos=1, eos=2, pad=0, vocab_size=3),
        generation=GenerationDefaults(max_new_tokens=30, num_beams=3),
        decoder=DecoderSpec(layers=1, heads=1, head_dim=8, max_positions=64, image_tokens=197),
        tokenizer=FileRef(file="tokenizer.json", sha256="c" * 64, size=5),
        provenance=Provenance(
            source="owner/captioner",
            source_sha256="d" * 64,
            source_revision="0123abcd",
            exported_at="2026-01-02T01:04:05.25+02:00",
            versions={"torch": "2.9.1", "onnx": "1.19.0"},
            recipe={"epochs": 5, "optimizer": {"lr": 5e-7}},
        ),
        parity={"greedy": {"captions": 64, "equal": 64}, "encoder": {"max_abs_error": 1.25e-05}},
    )
    return dataclasses.replace(manifest, **changes)


def embedder() -> Manifest:
    return dataclasses.replace(
        captioner(),
        family="clip",
        tokens=None,
        generation=None,
        decoder=None,
        embedding=EmbeddingSpec(dim=512),
        provenance=dataclasses.replace(captioner().provenance, source="runs/clip", source_revision=None),
        parity={},
    )


# STAC


def test_required_fields_of_a_stac_item():
    item = stac_item(captioner())
    assert json.loads(json.dumps(item, allow_nan=False)) == item
    assert (item["type"], item["stac_version"], item["id"]) == ("Feature", "1.1.0", "blip-rsicd")
    assert item["geometry"] is None
    assert "bbox" not in item  # STAC forbids it beside a null geometry
    assert item["properties"]["datetime"] == "2026-01-01T23:04:05Z"
    assert item["links"] == [
        {
            "rel": "derived_from",
            "href": "https://huggingface.co/owner/captioner/tree/0123abcd",
            "type": "text/html",
        }
    ]


def test_required_fields_of_the_mlm_extension():
    item = stac_item(captioner())
    properties = item["properties"]
    assert "https://stac-extensions.github.io/mlm/v1.5.1/schema.json" in item["stac_extensions"]
    assert {"mlm:name", "mlm:architecture", "mlm:tasks", "mlm:input", "mlm:output"} <= set(properties)
    assert (properties["mlm:architecture"], properties["mlm:tasks"]) == ("BLIP", ["image-captioning"])
    assert (properties["mlm:framework"], properties["mlm:framework_version"]) == ("ONNX", "1.19.0")
    (entry,) = properties["mlm:input"]
    assert entry["bands"] == ["red", "green", "blue"]
    assert entry["input"] == {
        "shape": [-1, 224, 224, 3],
        "dim_order": ["batch", "height", "width", "bands"],
        "data_type": "uint8",
    }
    assert entry["resize_type"] == "interpolation-cubic"
    assert set(entry["pre_processing_function"]) == {"format", "expression"}
    assert entry["pre_processing_function"]["expression"]["full_scale"] == 2500
    (output,) = properties["mlm:output"]
    assert {"name", "tasks", "result"} <= set(output)
    assert len(output["result"]["shape"]) == len(output["result"]["dim_order"])


def test_bands_are_described_where_mlm_looks_and_where_stac_allows():
    item = stac_item(captioner())
    bands = [{"name": "red"}, {"name": "green"}, {"name": "blue"}]
    assert item["properties"]["bands"] == bands
    assert item["assets"]["vision"]["bands"] == bands


def test_artifact_type_goes_with_the_model_role_and_only_with_it():
    assets = stac_item(captioner())["assets"]
    assert set(assets) == {"vision", "w.data", "step", "tokenizer", "manifest", "card"}
    models = {name for name, asset in assets.items() if "mlm:model" in asset["roles"]}
    assert models == {"vision", "step"}
    assert models == {name for name, asset in assets.items() if "mlm:artifact_type" in asset}
    item_only = {"mlm:name", "mlm:input", "mlm:output", "mlm:hyperparameters"}
    assert not any(item_only & set(asset) for asset in assets.values())


def test_assets_carry_size_and_multihash():
    asset = stac_item(captioner())["assets"]["tokenizer"]
    assert (asset["href"], asset["file:size"], asset["file:checksum"]) == ("./tokenizer.json", 5, "1220" + "c" * 64)


@pytest.mark.parametrize("name", ["a", "7b", "x-", "2024_blip.", "blip-rsicd"])
def test_the_model_name_fits_the_pattern_of_the_extension(name: str):
    found = stac_item(captioner(name=name))["properties"]["mlm:name"]
    assert re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_.\-\s]+[a-zA-Z0-9]", found)
    assert name.rstrip("-.") in found


def test_a_version_that_is_not_semantic_is_left_out():
    provenance = dataclasses.replace(captioner().provenance, versions={"onnx": "1.20.0rc1"})
    assert "mlm:framework_version" not in stac_item(captioner(provenance=provenance))["properties"]


def test_an_embedding_model_says_so():
    item = stac_item(embedder())
    assert item["properties"]["mlm:tasks"] == ["similarity-search"]
    assert item["properties"]["mlm:output"][0]["result"]["shape"] == [-1, 512]
    assert item["links"] == []


# The card


def front_matter(card: str) -> list[str]:
    _, matter, _ = card.split("---\n", 2)
    return matter.splitlines()


def rows(card: str) -> dict[str, str]:
    cells = [re.split(r"(?<!\\)\|", line) for line in card.splitlines() if line.startswith("| ")]
    return {row[1].strip(): row[2].strip() for row in cells if len(row) == 4}


def test_the_front_matter_is_what_the_hub_reads():
    assert front_matter(model_card(captioner())) == [
        "library_name: rsedge",
        "pipeline_tag: image-to-text",
        "tags:",
        "- remote-sensing",
        "- onnx",
        "- blip",
        "- fp16",
        'base_model: "owner/captioner"',
    ]
    assert not any("base_model" in line for line in front_matter(model_card(embedder())))


def test_the_card_tells_what_was_measured_and_recorded():
    card = model_card(captioner())
    found = rows(card)
    assert found["greedy.captions"] == found["greedy.equal"] == "64"
    assert found["encoder.max_abs_error"] == "1.25e-05"
    assert found["size"] == "224 × 224 pixels, resized with bicubic"
    assert found["reflectance: formula"] == r"clip(255 · (DN + offset) / 2500) \| round"
    assert found["num_beams"] == "3"
    assert found["early_stopping"] == "false"
    assert found["recipe.optimizer.lr"] == "5e-07"
    assert found["onnx"] == "1.19.0"
    assert "| vision | `vision.onnx` | 20 | 1007 | `pixels` | `cross_0` |" in card
    assert "rsedge caption scene.tif -m blip-rsicd.rsedge -o captions.geojson" in card


def test_the_card_claims_nothing_unmeasured():
    card = model_card(embedder())
    assert "## Parity with torch\n\nNot measured." in card
    assert "Decoding defaults" not in card
    assert "rsedge embed scene.tif -m blip-rsicd.rsedge" in card
    assert rows(card)["revision"] == "none (a folder)"


def test_texts_of_strangers_are_no_markdown():
    manifest = captioner()
    provenance = dataclasses.replace(
        manifest.provenance, recipe={"a": "![x](http://host/p.png)", "b": "[y](javascript:z)", "c": "`d`"}
    )
    found = rows(model_card(dataclasses.replace(manifest, provenance=provenance)))
    assert found["recipe.a"] == r"\!\[x\](http://host/p.png)"
    assert found["recipe.b"] == r"\[y\](javascript:z)"
    assert found["recipe.c"] == r"\`d\`"
