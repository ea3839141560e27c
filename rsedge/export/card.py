"""What a bundle says to catalogues and to people: a STAC item and a model card, both from the manifest alone."""

from __future__ import annotations

import html
import json
import re
from datetime import datetime, timezone
from typing import Any

from rsedge.bundle import SUFFIX, FileRef, Manifest
from rsedge.texts import plain

MLM_SCHEMA = "https://stac-extensions.github.io/mlm/v1.5.1/schema.json"
FILE_SCHEMA = "https://stac-extensions.github.io/file/v2.1.0/schema.json"

_ARCHITECTURES = {"blip": "BLIP", "clip": "CLIP", "clipcap": "ClipCap"}
_TASKS = {"blip": "image-captioning", "clip": "similarity-search", "clipcap": "image-captioning"}
_PIPELINES = {"blip": "image-to-text", "clip": "zero-shot-image-classification", "clipcap": "image-to-text"}
_RESIZE = {
    "nearest": "interpolation-nearest",
    "bilinear": "interpolation-linear",
    "bicubic": "interpolation-cubic",
    "lanczos": "interpolation-lanczos4",
}
_PRECISIONS = {
    "fp32": "32-bit floating point",
    "fp16": "16-bit floating point, normalisation and softmax in 32 bit",
    "int8": "8-bit integer weights",
}

_MLM_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_.-]+[a-zA-Z0-9]")


# The STAC item


def stac_item(manifest: Manifest) -> dict[str, Any]:
    """A STAC 1.1 Item with the Machine Learning Model extension 1.5, every asset relative to the bundle directory.

    It has no geometry: the manifest does not know where on Earth the training images lay. Parameter count and
    pretraining data are left out for the same reason.
    """
    image, embedding, task = manifest.image, manifest.embedding, _TASKS[manifest.family]
    bands = [{"name": band} for band in image.bands]
    model_input: dict[str, Any] = {
        "name": "image",
        "description": "8-bit pixels; the graph scales them by 1/255, subtracts mean and divides by deviation itself",
        "bands": list(image.bands),
        "input": {
            "shape": [-1, image.size, image.size, len(image.bands)],
            "dim_order": ["batch", "height", "width", "bands"],
            "data_type": "uint8",
        },
        "value_scaling": None,
        "resize_type": _RESIZE[image.resample],
    }
    if image.reflectance:
        # offset → scale → clip is one rule for all bands, which value_scaling (one step per band) cannot say.
        model_input["pre_processing_function"] = {"format": "rsedge-reflectance", "expression": image.reflectance}
    result: dict[str, Any] = {"shape": [-1, -1], "dim_order": ["batch", "token"], "data_type": "int64"}
    if embedding is not None:
        result = {"shape": [-1, embedding.dim], "dim_order": ["batch", "embedding"], "data_type": "float32"}
    name = manifest.name  # the extension's pattern: a letter first, a letter or digit last, three at least
    # Python 3.10 reads neither Z nor every length of fraction.
    exported = re.sub(r"\.\d+", "", manifest.provenance.exported_at.upper()).replace("Z", "+00:00")
    moment = datetime.fromisoformat(exported).astimezone(timezone.utc)
    properties: dict[str, Any] = {
        "datetime": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "description": _summary(manifest),
        "bands": bands,
        "mlm:name": name if _MLM_NAME.fullmatch(name) else f"model-{name.rstrip('._-')}",
        "mlm:architecture": _ARCHITECTURES[manifest.family],
        "mlm:tasks": [task],
        "mlm:framework": "ONNX",
        "mlm:accelerator": None,
        "mlm:accelerator_constrained": False,
        "mlm:input": [model_input],
        "mlm:output": [{"name": "caption" if embedding is None else "embedding", "tasks": [task], "result": result}],
    }
    version = manifest.provenance.versions.get("onnx", "")
    if re.fullmatch(r"\d+\.\d+\.\d+", version):  # the extension admits semantic versions only
        properties["mlm:framework_version"] = version
    links = []
    source, revision = manifest.provenance.source, manifest.provenance.source_revision
    if revision is not None:  # only hub checkpoints have one
        page = f"https://huggingface.co/{source}/tree/{revision}"
        links.append({"rel": "derived_from", "href": page, "type": "text/html"})
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": [MLM_SCHEMA, FILE_SCHEMA],
        "id": name,
        "geometry": None,
        "properties": properties,
        "assets": _assets(manifest, bands),
        "links": links,
    }


def _assets(manifest: Manifest, bands: list[dict[str, str]]) -> dict[str, Any]:
    def asset(ref: FileRef, title: str, media_type: str, role: str) -> dict[str, Any]:
        return {
            "href": f"./{ref.file}",
            "title": title,
            "type": media_type,
            "roles": [role],
            "file:size": ref.size,
            "file:checksum": f"1220{ref.sha256}",  # a multihash: SHA-256 (12), 32 bytes (20)
        }

    assets: dict[str, Any] = {}
    octets = "application/octet-stream"
    for role, graph in manifest.graphs.items():
        entry = asset(graph.files[0], f"ONNX graph: {role}", f"{octets}; framework=onnx", "mlm:model")
        # STAC admits bands in an Item's properties, where MLM looks, only beside an asset that has some.
        assets[role] = entry | {"mlm:artifact_type": "onnx"} | ({} if assets else {"bands": bands})
        for ref in graph.external_data:
            assets[ref.file] = asset(ref, f"Tensors of the {role} graph", octets, "mlm:weights")
    if manifest.tokenizer is not None:
        assets["tokenizer"] = asset(manifest.tokenizer, "Tokenizer", "application/json", "metadata")
    for name, href, title, media_type, role in (
        ("manifest", "./manifest.json", "Manifest", "application/json", "metadata"),
        ("card", "./README.md", "Model card", "text/markdown", "overview"),
    ):
        assets[name] = {"href": href, "title": title, "type": media_type, "roles": [role]}
    return assets


# The model card


def model_card(manifest: Manifest) -> str:
    """``README.md`` of the bundle: Markdown with YAML front matter, and nothing that was not measured or recorded."""
    image, provenance = manifest.image, manifest.provenance
    front = ["---", "library_name: rsedge", f"pipeline_tag: {_PIPELINES[manifest.family]}", "tags:"]
    front += [f"- {tag}" for tag in ("remote-sensing", "onnx", manifest.family, manifest.precision)]
    if provenance.source_revision is not None:
        front.append(f"base_model: {json.dumps(provenance.source)}")  # a JSON string is a YAML string
    image_rows = [
        ("size", f"{image.size} × {image.size} pixels, resized with {image.resample}"),
        *([("trained on", manifest.domain.describe())] if manifest.domain else []),
        ("bands", ", ".join(image.bands)),
        ("input", "uint8; scaled by 1/255 and normalised inside the graph"),
        ("mean", _show(image.mean)),
        ("standard deviation", _show(image.std)),
        *((f"reflectance: {key}", _show(value)) for key, value in image.reflectance.items()),
    ]
    graphs = ["| graph | file | opset | bytes | inputs | outputs |", "| --- | --- | ---: | ---: | --- | --- |"]
    for role, graph in manifest.graphs.items():
        size = sum(ref.size for ref in graph.files)
        names = [", ".join(f"`{tensor.name}`" for tensor in side) for side in (graph.inputs, graph.outputs)]
        graphs.append(f"| {role} | `{graph.file}` | {graph.opset} | {size} | {names[0]} | {names[1]} |")
    sections = [
        "\n".join([*front, "---"]),
        f"# {manifest.name}\n\n{_summary(manifest)}",
        f"## Use\n\n{_usage(manifest)}",
        f"## Image\n\n{_table('', image_rows)}",
        "## Graphs\n\n" + "\n".join(graphs),
    ]
    for title, heading, spec in (
        ("Embedding", "", manifest.embedding),
        ("Decoding defaults", "setting", manifest.generation),
    ):
        if spec is not None:
            rows = [(name, _show(getattr(spec, name))) for name in spec.__slots__]
            sections.append(f"## {title}\n\n{_table(heading, rows)}")
    parity = "Not measured."
    if manifest.parity:
        parity = "Measured at export, on the exporting machine.\n\n"
        parity += _table("measure", _flatten("", manifest.parity))
    provenance_rows = [
        ("checkpoint", _show(provenance.source)),
        ("revision", provenance.source_revision or "none (a folder)"),
        ("SHA-256 of its weights", provenance.source_sha256),
        ("exported", provenance.exported_at),
        *sorted(provenance.versions.items()),
        *_flatten("recipe", provenance.recipe or {}),
    ]
    sections += [f"## Parity with torch\n\n{parity}", f"## Provenance\n\n{_table('', provenance_rows)}"]
    return "\n\n".join(sections) + "\n"


def _summary(manifest: Manifest) -> str:
    what = "writes one caption per image"
    if manifest.embedding is not None:
        what = "puts images and texts into one space" if "text" in manifest.graphs else "embeds images"
    return (
        f"A {_ARCHITECTURES[manifest.family]} model that {what}, exported to ONNX by rsedge "
        f"in {_PRECISIONS[manifest.precision]} ({manifest.precision})."
    )


def _usage(manifest: Manifest) -> str:
    bundle = f"{manifest.name}{SUFFIX}"
    if manifest.embedding is not None:
        command = f"rsedge embed scene.tif -m {bundle} -o tiles.parquet"
        code = f'from rsedge import Embedder\n\nembedder = Embedder.load("{bundle}")\nembedder.embed_images(images)'
        if "text" in manifest.graphs:
            command += (
                f'\nrsedge search tiles.parquet -m {bundle} --text "an airport"'
                f"\nrsedge classify scene.tif -m {bundle} --labels forest,water,city -o classes.geojson"
            )
            texts = '\nembedder.embed_texts(["an airport"])  # both float32 [B, D] of unit length'
            return f"```sh\n{command}\n```\n\n```python\n{code}  # uint8 [B, H, W, 3]{texts}\n```"
    else:
        command = f"rsedge caption scene.tif -m {bundle} -o captions.geojson"
        code = f'from rsedge import Captioner\n\ncaptioner = Captioner.load("{bundle}")\ncaptioner.caption(images)'
    return f"```sh\n{command}\n```\n\n```python\n{code}  # uint8 [B, H, W, 3]\n```"


def _flatten(prefix: str, value: Any) -> list[tuple[str, str]]:
    """Nested objects as rows named by the path to each value."""
    if isinstance(value, dict):
        return [row for key, item in value.items() for row in _flatten(f"{prefix}.{key}" if prefix else str(key), item)]
    return [(prefix, _show(value))]


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_show(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(heading: str, rows: list[tuple[str, str]]) -> str:
    def cell(text: str) -> str:
        return re.sub(r"([|\[\]!`])", r"\\\1", html.escape(plain(text), quote=False))

    lines = [f"| {heading} | |" if heading else "| | |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {cell(name)} | {cell(text)} |" for name, text in rows)])
