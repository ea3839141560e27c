"""Export, the whole policy: load and check → write graphs → tokenizer → compare with torch → manifest → atomic save."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from rsedge.bundle import (
    Bundle,
    DecoderSpec,
    GenerationDefaults,
    Graph,
    ImageSpec,
    Manifest,
    Provenance,
    TensorSpec,
    describe_file,
    describe_graph,
    write_bundle,
)
from rsedge.errors import BundleError, CheckpointError, OptionError
from rsedge.export import blip, caches, verify
from rsedge.export.card import model_card, stac_item
from rsedge.export.checkpoint import Checkpoint, load_checkpoint
from rsedge.export.graph import OPSET, GraphBuilder
from rsedge.export.precision import PRECISIONS, Layers, Precision
from rsedge.export.tokenizer import export_tokenizer
from rsedge.pixels import ReflectanceRule
from rsedge.tomlfile import read_toml

TOKENIZER = "tokenizer.json"

_LIBRARIES = ("rsedge", "torch", "transformers", "tokenizers", "onnx", "numpy")


def export(
    source: str | Path,
    target: str | Path,
    *,
    precision: Precision = "fp32",
    image_size: int | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Export a BLIP captioning checkpoint to a bundle, and prove it against torch before it is saved.

    Args:
        source: A folder in Hugging Face layout, or a hub id ``owner/name``.
        target: The bundle directory to make, ``NAME.rsedge``.
        precision: ``fp32``, ``fp16`` (typed in the graph) or ``int8`` (for CPUs).
        image_size: Pixels along an edge; None keeps the checkpoint's. Position embeddings are interpolated.
        revision: Branch, tag or commit of a hub id.
        overwrite: Replace a bundle that is there already.
        progress: Called with a line before each stage.

    Raises:
        CheckpointError: Everything that keeps the checkpoint from being exported.
        ParityError: The graphs stray from torch by more than the precision's tolerance; nothing is written.
        OptionError, OutputError: ``target``, ``precision`` or ``image_size`` is not accepted.
    """
    if precision not in PRECISIONS:
        raise OptionError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    progress(f"checking {source}")
    checkpoint = load_checkpoint(source, revision=revision)
    size = image_size or checkpoint.settings.vision["image_size"]
    if size < checkpoint.settings.vision["patch_size"]:
        patch = checkpoint.settings.vision["patch_size"]
        raise OptionError(f"image size is {size}, expected at least one patch of {patch} pixels, such as 224")

    shape = blip.BlipShape.from_checkpoint(checkpoint, size)
    generation, recipe = _generation(checkpoint, shape.positions), _recipe(checkpoint)

    def build(root: Path) -> Manifest:
        progress(f"writing {precision} graphs at {size} px")
        graphs = {name: _save(graph, root) for name, graph in _graphs(shape, checkpoint, precision).items()}
        export_tokenizer(checkpoint.path, root / TOKENIZER)
        name = Path(target).name.removesuffix(".rsedge")
        draft = _manifest(root, name, checkpoint, shape, graphs, precision, generation, recipe)
        progress(f"comparing with torch on {verify.IMAGES} seeded images")
        report = verify.parity_report(checkpoint, Bundle(path=root, manifest=draft, hash="0" * 64))
        verify.check(report, precision)
        manifest = dataclasses.replace(draft, parity=report)
        (root / "stac-item.json").write_text(json.dumps(stac_item(manifest), indent=2) + "\n", encoding="utf-8")
        (root / "README.md").write_text(model_card(manifest), encoding="utf-8")
        return manifest

    return write_bundle(target, build, overwrite=overwrite)


def _graphs(shape: blip.BlipShape, checkpoint: Checkpoint, precision: Precision) -> dict[str, GraphBuilder]:
    positions = checkpoint.tensors["vision_model.embeddings.position_embedding"][0]
    positions = blip.interpolate_positions(positions, shape.grid)
    image = checkpoint.image
    dtype = Layers(GraphBuilder(""), precision).dtype
    sizes = {"layers": shape.layers, "heads": shape.heads, "head_dim": shape.head_dim}
    return {
        "vision": blip.vision_graph(shape, checkpoint.tensors, positions, image.mean, image.std, precision),
        "step": blip.step_graph(shape, checkpoint.tensors, precision),
        "self_cache": caches.self_cache_graph(**sizes, dtype=dtype),
        "cross_cache": caches.cross_cache_graph(**sizes, image_tokens=shape.image_tokens, dtype=dtype),
    }


def _save(graph: GraphBuilder, root: Path) -> Graph:
    """Write a graph and describe it for the manifest."""
    path = root / f"{graph.name}.onnx"
    graph.save(path)
    onnx.checker.check_model(path, full_check=False)
    model = onnx.load(path, load_external_data=False)
    return describe_graph(
        root, path.name, opset=OPSET, inputs=_tensors(model.graph.input), outputs=_tensors(model.graph.output)
    )


def _tensors(values: Any) -> list[TensorSpec]:
    def spec(value: onnx.ValueInfoProto) -> TensorSpec:
        tensor = value.type.tensor_type
        dtype: Any = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
        return TensorSpec(
            name=value.name, dtype=dtype, shape=tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        )

    return [spec(value) for value in values]


def _manifest(
    root: Path,
    name: str,
    checkpoint: Checkpoint,
    shape: blip.BlipShape,
    graphs: dict[str, Graph],
    precision: Precision,
    generation: GenerationDefaults,
    recipe: dict[str, Any] | None,
) -> Manifest:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "blip"
    image = ImageSpec(
        size=shape.image_size,
        mean=checkpoint.image.mean,
        std=checkpoint.image.std,
        resample=checkpoint.image.resample,
        reflectance={**ReflectanceRule().to_dict(), "formula": ReflectanceRule().describe()},
    )
    return Manifest(
        name=name[:100],
        family=checkpoint.family,
        precision=precision,
        graphs=graphs,
        image=image,
        tokens=checkpoint.tokens,
        generation=generation,
        decoder=DecoderSpec(
            layers=shape.layers,
            heads=shape.heads,
            head_dim=shape.head_dim,
            max_positions=shape.positions,
            image_tokens=shape.image_tokens,
        ),
        tokenizer=describe_file(root, TOKENIZER),
        provenance=Provenance(
            source=_public_name(checkpoint.source),
            source_sha256=checkpoint.sha256,
            source_revision=checkpoint.revision,
            exported_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            # onnxruntime goes by another distribution name on a GPU machine.
            versions={**{name: version(name) for name in _LIBRARIES}, "onnxruntime": onnxruntime.__version__},
            recipe=recipe,
        ),
    )


def _public_name(source: str) -> str:
    """A hub id as it is; of a folder only its name: the path says nothing elsewhere and may tell who made it."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def _recipe(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The training recipe saved with the checkpoint, if any."""
    path = checkpoint.path / "recipe.toml"
    try:
        return read_toml(path) if path.exists() else None
    except OptionError as error:
        raise CheckpointError(checkpoint.source, [f"{error}; mend or delete it"]) from error


def _generation(checkpoint: Checkpoint, positions: int) -> GenerationDefaults:
    try:
        return GenerationDefaults.from_transformers(checkpoint.generation_config, positions=positions)
    except (BundleError, TypeError) as error:
        problem = f"generation_config.json asks for what no caption can be: {error}; mend or delete it"
        raise CheckpointError(checkpoint.source, [problem]) from error
