"""Open a checkpoint for export: a folder in Hugging Face layout or a hub id, checked whole before any work starts.

Every problem is reported at once. No pickle is ever read and no code of the checkpoint is run.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsedge.checkpointfiles import ADAPTER, file_problems, link_problems, read_image_spec, setting_problems
from rsedge.errors import CheckpointError
from rsedge.export.checkpoint import Checkpoint, ModelType, Settings
from rsedge.export.models import blip, clip, clipcap
from rsedge.export.vocabulary import vocabulary_ids
from rsedge.export.weights import Weights, find_tensors, hash_files
from rsedge.jsonvalues import read_object

if TYPE_CHECKING:
    from rsedge.export.weights import Report, StoredTensor

MODEL_TYPES: dict[str, ModelType] = {
    "blip": blip.BLIP,
    "clip": clip.CLIP,
    "siglip": clip.SIGLIP,
    "clipcap": clipcap.CLIPCAP,
}
"""By the ``model_type`` of ``config.json``."""
SUPPORTED = "; ".join(f"{kind.title} (model_type '{name}', {kind.architecture})" for name, kind in MODEL_TYPES.items())

# Pickled weights are not even downloaded.
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)
_TOKENIZER_SETTINGS = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A vocabulary may be padded to a round size, and BLIP's [DEC] and [ENC] are missing from some tokenizers; a larger gap
# means ids without a word.
_VOCABULARY_SLACK = 256
_SHOWN = 8


def load_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint[Any]:
    """Return the checkpoint in the folder ``source``, or of the hub id ``source`` (``owner/name``).

    Hub files come from the Hugging Face cache where they are there, and with ``HF_HUB_OFFLINE=1`` only from there.

    Args:
        source: Folder or hub id; a folder of that name wins.
        revision: Branch, tag or commit, for a hub id only.

    Raises:
        CheckpointError: Everything that keeps it from being exported: not there, another model, pickled or
            damaged weights, tensors missing or misshapen, unsupported settings, no tokenizer or one of another model,
            no image processor.
    """
    path, commit = _locate(source, revision)
    problems = list(dict.fromkeys([*link_problems(path), *file_problems(path / ADAPTER)]))
    report = problems.append

    # 1. The configuration.
    config = read_object(path / "config.json", report, "save the model with save_pretrained(folder)")
    problems += setting_problems(config or {})
    kind = _model_type(config, report) if config is not None else None
    settings = None
    if kind is not None and config is not None:
        trouble: list[str] = []
        read = kind.read_settings(config, trouble.append)
        if config.get("quantization_config"):
            trouble.append(
                "its weights are quantised (quantization_config): export the unquantised checkpoint with --int8"
            )
        settings = None if trouble else read
        problems += dict.fromkeys(trouble)  # a number that others follow from is read several times

    # 2. The tensors, where the configuration says which.
    found, files = find_tensors(path, report)
    stored = {}
    if kind is not None and config is not None and files and not problems:
        stored = _resolve(found, kind, config, report)

    # 3. The files beside them.
    tokenizer_files = _tokenizer(path, kind, settings, report)
    image = read_image_spec(path, report)
    generation_config = {}
    if (path / "generation_config.json").exists():
        generation_config = read_object(path / "generation_config.json", report, "delete it or save it again") or {}

    if problems or config is None or kind is None or settings is None or image is None:
        raise CheckpointError(str(source), problems)
    return Checkpoint(
        path=path,
        source=str(source),
        revision=commit,
        config=config,
        settings=settings,
        model_type=kind,
        tensors=Weights(stored),
        tokenizer_files=tokenizer_files,
        image=image,
        generation_config=generation_config,
        sha256=hash_files(files),
    )


def _locate(source: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """The folder with the files, and the hub commit if it came from there."""
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(str(source), ["it is a folder, which has no revision: leave the revision out"])
        return path.resolve(), None
    if path.exists():
        raise CheckpointError(str(source), ["it is a file: give the folder that holds config.json and the weights"])
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            str(source),
            [
                "there is no such folder, and it is no hub id: give a folder in Hugging Face layout, or an id like "
                "owner/name"
            ],
        )
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(_HUB_FILES))
    except Exception as error:  # the hub, its cache and its transports each have their own errors
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            source,
            [
                f"there is no folder of that name, and the Hugging Face hub did not give it ({reason}): check the "
                "spelling and the network, log in with 'hf auth login' if it is private, or unset HF_HUB_OFFLINE if it "
                f"is not in the cache; or fetch it elsewhere with 'hf download {source}' and give the folder"
            ],
        ) from error
    return Path(folder), Path(folder).name


def _model_type(config: Mapping[str, Any], report: Report) -> ModelType | None:
    """The entry for a ``config.json``, or None after a report."""
    name = config.get("model_type")
    kind = MODEL_TYPES.get(name) if isinstance(name, str) else None
    if kind is None:
        report(f"config.json says model_type {name!r}; rsedge exports {SUPPORTED}")
        return None
    architectures = config.get("architectures") or [kind.architecture]  # absent in files written by hand
    if kind.architecture not in architectures:
        report(f"it is {kind.otherwise} ({', '.join(map(str, architectures))}); rsedge exports {SUPPORTED}")
        return None
    return kind


def _resolve(
    found: Mapping[str, StoredTensor], kind: ModelType, config: Mapping[str, Any], report: Report
) -> dict[str, StoredTensor]:
    """The tensors of the model under their canonical names; missing, misshapen and packed ones are reported.

    Tensors the model does not use (``position_ids`` of older files, heads for other tasks) are left out.
    """
    # 1. Build the model without memory: its names and shapes, and which of its tensors are one.
    import torch

    model_class = getattr(importlib.import_module(kind.module), kind.architecture)
    try:
        with torch.device("meta"):
            model = model_class(model_class.config_class.from_dict(copy.deepcopy(dict(config))))
        model.tie_weights()
    except Exception as error:  # a stranger's settings, and whatever the constructors raise at them
        reason = " ".join(str(error).split())[:300]
        report(f"transformers makes no {kind.architecture} of config.json ({reason}): save the checkpoint again")
        return {}
    parameters = {kind.canonical_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in parameters.items() if name not in kind.unused}

    # 2. Any name of a tied tensor may be stored; where several are, each stands for itself, as in transformers.
    named = {kind.canonical_name(name): tensor for name, tensor in found.items()}
    tied: dict[int, StoredTensor] = {}
    for name, tensor in parameters.items():
        if name in named:
            tied.setdefault(id(tensor), named[name])
    for name, tensor in parameters.items():
        if id(tensor) in tied:
            named.setdefault(name, tied[id(tensor)])

    # 3. Compare.
    missing = [name for name in expected if name not in named]
    if missing:
        report(f"{len(missing)} of {len(expected)} tensors are missing: {_listed(missing)}; save the checkpoint again")
    wrong = [
        f"{name} is {list(named[name].shape)}, the config says {list(shape)}"
        for name, shape in expected.items()
        if name in named and named[name].shape != shape
    ]
    if wrong:
        report(f"{len(wrong)} tensors do not fit the config: {_listed(wrong)}; config.json belongs to another model")
    odd = [f"{name} is {named[name].dtype}" for name in expected if name in named and not named[name].is_float]
    if odd:
        report(f"{len(odd)} tensors are not floating point: {_listed(odd)}; export the unquantised checkpoint")
    return {name: named[name] for name in expected if name in named}


def _listed(texts: list[str]) -> str:
    shown = "; ".join(texts[:_SHOWN])
    return shown if len(texts) <= _SHOWN else f"{shown}; and {len(texts) - _SHOWN} more"


def _tokenizer(path: Path, kind: ModelType | None, settings: Settings | None, report: Report) -> tuple[Path, ...]:
    """The tokenizer's files; its vocabulary is compared with the model's."""
    if kind is None:
        return ()
    files = tuple(path / name for name in (*kind.tokenizer_files, *_TOKENIZER_SETTINGS) if (path / name).is_file())
    if not set(kind.tokenizer_files) & {file.name for file in files}:
        report(
            f"it has no tokenizer (neither {' nor '.join(kind.tokenizer_files)}): save one with "
            "processor.save_pretrained(folder)"
        )
        return ()
    if refused := [problem for file in files for problem in file_problems(file)]:
        for problem in refused:
            report(problem)
        return files
    ids = vocabulary_ids(files[0], report)
    if ids is None or settings is None:
        return files
    vocab, size = settings.vocab_size, max(ids, default=-1) + 1
    if size > vocab:
        report(
            f"its tokenizer has token ids up to {size - 1}, the model's vocab_size is {vocab}: the tokenizer belongs "
            "to another model, or the embeddings were not resized"
        )
    elif size + _VOCABULARY_SLACK < vocab:
        report(f"its tokenizer has {size} tokens, the model {vocab}: the tokenizer belongs to another model")
    for token, purpose in settings.needed_tokens.items():
        if token not in ids:
            report(f"its tokenizer has no token {token}, {purpose}: save them together")
    return files
