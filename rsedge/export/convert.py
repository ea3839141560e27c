"""Export, the whole policy: load and check → write graphs → tokenizer → compare with torch → manifest → atomic save."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime

from rsedge.bundle import (
    Bundle,
    Graph,
    Manifest,
    Provenance,
    TensorSpec,
    check_target,
    describe_file,
    describe_graph,
    write_bundle,
)
from rsedge.checkpointfiles import best_of_run
from rsedge.errors import BundleError, CheckpointError, OptionError
from rsedge.export import verify
from rsedge.export.card import model_card, stac_item
from rsedge.export.graphs.builder import OPSET, PRECISIONS, GraphBuilder, Precision
from rsedge.export.loading import load_checkpoint
from rsedge.export.tokenizer import export_tokenizer
from rsedge.pixels import ReflectanceRule
from rsedge.tomlfile import read_toml

if TYPE_CHECKING:
    from rsedge.export.checkpoint import Checkpoint
    from rsedge.manifest import Domain, GenerationDefaults

TOKENIZER = "tokenizer.json"

_LARGEST_RECIPE = 2**14  # bytes; TOML takes seconds for keys of thousands of parts
_LIBRARIES = ("rsedge", "torch", "transformers", "tokenizers", "onnx", "numpy")


def export(
    source: str | Path,
    target: str | Path,
    *,
    precision: Precision = "fp32",
    image_size: int | None = None,
    revision: str | None = None,
    generation: Mapping[str, Any] | None = None,
    domain: Domain | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Export a checkpoint to a bundle, and prove it against torch before it is saved.

    Args:
        source: A folder in Hugging Face layout, or a hub id ``owner/name``, of one of the models of
            :data:`rsedge.export.loading.MODEL_TYPES`.
        target: The bundle directory to make, ``NAME.rsedge``.
        precision: ``fp32``, ``fp16`` (typed in the graph) or ``int8`` (for CPUs).
        image_size: Pixels along an edge; None keeps the checkpoint's. Position embeddings are interpolated.
        revision: Branch, tag or commit of a hub id.
        generation: Defaults of decoding by the names of :class:`~rsedge.manifest.GenerationDefaults`, over those of the
            checkpoint.
        domain: What the model was trained on, if that is known.
        overwrite: Replace a bundle that is there already.
        progress: Called with a line before each stage.

    Raises:
        CheckpointError: Everything that keeps the checkpoint from being exported.
        ParityError: The graphs stray from torch by more than the precision's tolerance; nothing is written.
        OptionError, OutputError: ``target``, ``precision`` or ``image_size`` is not accepted.
    """
    if precision not in PRECISIONS:
        raise OptionError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if (best := best_of_run(source)) is not None:
        progress(f"best checkpoint of the run: {best}")
    check_target(target, overwrite=overwrite)  # before a model is downloaded
    progress(f"checking {source}")
    checkpoint = load_checkpoint(source, revision=revision)
    size = image_size or checkpoint.settings.image_size
    if size < checkpoint.settings.patch_size:
        patch = checkpoint.settings.patch_size
        raise OptionError(f"image size is {size}, expected at least one patch of {patch} pixels, such as 224")
    plan, recipe = checkpoint.model_type.plan(checkpoint, size), _recipe(checkpoint)
    rule = ReflectanceRule()
    reflectance = {**rule.to_dict(), "formula": rule.describe()}
    # Of a folder only the name: its path says nothing elsewhere and may tell who made it.
    folder = Path(checkpoint.source).expanduser()
    public_name = folder.resolve().name if folder.exists() else checkpoint.source

    stem = Path(target).name.removesuffix(".rsedge")

    def build(root: Path) -> Manifest:
        progress(f"writing {precision} graphs at {size} px")
        graphs = {role: _save(graph, root) for role, graph in plan.graphs(precision).items()}
        export_tokenizer(checkpoint.path, root / TOKENIZER)
        fields = plan.manifest_fields()
        if generation:
            fields["generation"] = changed_defaults(fields.get("generation"), generation)
        draft = Manifest(
            name=(re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or checkpoint.family)[:100],
            family=checkpoint.family,
            precision=precision,
            graphs=graphs,
            image=dataclasses.replace(checkpoint.image, size=size, reflectance=reflectance),
            tokenizer=describe_file(root, TOKENIZER),
            provenance=Provenance(
                source=public_name,
                source_sha256=checkpoint.sha256,
                source_revision=checkpoint.revision,
                exported_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                # onnxruntime goes by another distribution name on a GPU machine.
                versions={**{name: version(name) for name in _LIBRARIES}, "onnxruntime": onnxruntime.__version__},
                recipe=recipe,
            ),
            domain=domain,
            **fields,
        )
        progress("comparing with torch on seeded images")
        report = plan.parity(Bundle(path=root, manifest=draft, hash="0" * 64))
        verify.check(report, precision)
        manifest = dataclasses.replace(draft, parity=report)
        (root / "stac-item.json").write_text(json.dumps(stac_item(manifest), indent=2) + "\n", encoding="utf-8")
        (root / "README.md").write_text(model_card(manifest), encoding="utf-8")
        return manifest

    return write_bundle(target, build, overwrite=overwrite)


def changed_defaults(defaults: GenerationDefaults | None, changes: Mapping[str, Any]) -> GenerationDefaults:
    """Return the defaults of decoding with ``changes``. Raises OptionError for names and values that are not accepted,
    and for a model that writes no captions.
    """
    if defaults is None:
        raise OptionError(f"--generation {', '.join(changes)}: the model writes no captions; leave it out")
    known = {each.name for each in dataclasses.fields(defaults)}
    if unknown := [name for name in changes if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1)
        meant = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(known))}"
        raise OptionError(f"{unknown[0]} is no setting of generation: {meant}")
    for name, value in changes.items():
        if (
            not isinstance(value, type(getattr(defaults, name)))
            and not (isinstance(getattr(defaults, name), float) and type(value) is int)
            and not (name == "early_stopping" and value == "never")
        ):
            raise OptionError(f"{name} is {value!r}, expected a value such as {getattr(defaults, name)!r}")
    try:
        return dataclasses.replace(defaults, **changes)
    except BundleError as error:
        raise OptionError(f"--generation: {error}") from error


def _save(graph: GraphBuilder, root: Path) -> Graph:
    """Write a graph and describe it for the manifest."""
    path = root / f"{graph.name}.onnx"
    graph.save(path)
    onnx.checker.check_model(path, full_check=False)

    def spec(value: onnx.ValueInfoProto) -> TensorSpec:
        tensor = value.type.tensor_type
        dtype: Any = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
        return TensorSpec(
            name=value.name, dtype=dtype, shape=tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        )

    model = onnx.load(path, load_external_data=False)
    inputs, outputs = ([spec(value) for value in side] for side in (model.graph.input, model.graph.output))
    return describe_graph(root, path.name, opset=OPSET, inputs=inputs, outputs=outputs)


def _recipe(checkpoint: Checkpoint[Any]) -> dict[str, Any] | None:
    """The training recipe saved with the checkpoint, if any."""
    path = checkpoint.path / "recipe.toml"
    try:
        if not path.is_file():  # a pipe would be waited for without end
            return None
        if path.stat().st_size > _LARGEST_RECIPE:
            raise OptionError(f"{path} has more than {_LARGEST_RECIPE} bytes, as no recipe has")
        return read_toml(path)
    except OptionError as error:
        raise CheckpointError(checkpoint.source, [f"{error}; mend or delete it"]) from error
