"""Open a checkpoint for export: a folder in Hugging Face layout or a hub id, checked whole before any work starts.

Everything wrong is told at once. No pickle is ever read and no code of the checkpoint is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsedge.bundle import Family, ImageSpec, TokenSpec
from rsedge.errors import CheckpointError
from rsedge.export import blip_layout
from rsedge.export.weights import Report, Weights, find_tensors, hash_files
from rsedge.jsonvalues import read_object
from rsedge.preprocessor import read_image_spec

SUPPORTED = "BLIP captioning (model_type 'blip', BlipForConditionalGeneration)"

_CAPTIONER = "BlipForConditionalGeneration"
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
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A vocabulary may be padded to a round size, and BLIP's [DEC] and [ENC] are missing from some tokenizers; a larger gap
# means ids without a word.
_VOCABULARY_SLACK = 256


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint that can be exported.

    Attributes:
        path: The folder with its files.
        source: The folder or hub id as given.
        revision: The hub commit, or None for a folder.
        config: ``config.json`` as it is; ``settings`` has the defaults filled in.
        settings: The checked sizes.
        family: The bundle family it becomes.
        tensors: Name in transformers' model → float32 array, read at access; complete, shapes checked, and a tied head
            present under its own names.
        tokens: Start, end and padding ids, and the vocabulary size of the model.
        tokenizer_files: What the tokenizer is read from.
        image: Size, filter, mean and deviation of its image processor; no reflectance rule, the checkpoint knows none.
        generation_config: ``generation_config.json``, empty where there is none.
        sha256: Hash over the weight files: what ``sha256sum`` prints for one file, or for its own lines for several.
    """

    path: Path
    source: str
    revision: str | None
    config: dict[str, Any]
    settings: blip_layout.BlipSettings
    family: Family
    tensors: Weights
    tokens: TokenSpec
    tokenizer_files: tuple[Path, ...]
    image: ImageSpec
    generation_config: dict[str, Any]
    sha256: str


def load_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """The checkpoint in the folder ``source``, or of the hub id ``source`` (``owner/name``).

    Hub files come from the Hugging Face cache where they are there, and with ``HF_HUB_OFFLINE=1`` only from there.

    Args:
        source: Folder or hub id; a folder of that name wins.
        revision: Branch, tag or commit, for a hub id only.

    Raises:
        CheckpointError: Everything that keeps it from being exported: not there, not BLIP captioning, pickled or
            damaged weights, tensors missing or misshapen, unsupported settings, no tokenizer or one of another model,
            no image processor.
    """
    path, commit = _locate(source, revision)
    problems: list[str] = []
    report = problems.append

    config = read_object(path / "config.json", report, "save the model with save_pretrained(folder)")
    settings = _settings(config, report) if config is not None else None
    found, files = find_tensors(path, report)
    stored = blip_layout.resolve_tensors(found, settings, report) if settings and files and not problems else {}
    tokenizer_files = _tokenizer(path, settings, report)
    image = read_image_spec(path, report)
    generation_config = {}
    if (path / "generation_config.json").exists():
        generation_config = read_object(path / "generation_config.json", report, "delete it or save it again") or {}

    if problems or config is None or settings is None or image is None:
        raise CheckpointError(str(source), problems)
    return Checkpoint(
        path=path,
        source=str(source),
        revision=commit,
        config=config,
        settings=settings,
        family="blip",
        tensors=Weights(stored),
        tokens=TokenSpec(
            bos=settings.tokens["bos_token_id"],
            eos=settings.tokens["sep_token_id"],
            pad=settings.tokens["pad_token_id"],
            vocab_size=settings.text["vocab_size"],
        ),
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
    return _download(source, revision)


def _download(repository: str, revision: str | None) -> tuple[Path, str]:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(_HUB_FILES))
    except Exception as error:  # the hub, its cache and its transports each have their own errors
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            repository,
            [
                f"there is no folder of that name, and the Hugging Face hub did not give it ({reason}): check the "
                "spelling and the network, log in with 'hf auth login' if it is private, or unset HF_HUB_OFFLINE if it "
                f"is not in the cache; or fetch it elsewhere with 'hf download {repository}' and give the folder"
            ],
        ) from error
    return Path(folder), Path(folder).name


def _settings(config: Mapping[str, Any], report: Report) -> blip_layout.BlipSettings | None:
    kind = config.get("model_type")
    if kind != "blip":
        report(f"config.json says model_type {kind!r}; rsedge exports {SUPPORTED}")
        return None
    architectures = config.get("architectures") or [_CAPTIONER]  # absent in files written by hand
    if _CAPTIONER not in architectures:
        report(f"it is BLIP but no captioner ({', '.join(map(str, architectures))}); rsedge exports {SUPPORTED}")
        return None
    return blip_layout.read_settings(config, report)


def _tokenizer(path: Path, settings: blip_layout.BlipSettings | None, report: Report) -> tuple[Path, ...]:
    """The tokenizer's files; its vocabulary is compared with the model's."""
    names = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    files = tuple(path / name for name in names if (path / name).is_file())
    if not {"tokenizer.json", "vocab.txt"} & {file.name for file in files}:
        report(
            "it has no tokenizer (neither tokenizer.json nor vocab.txt): save one with "
            "processor.save_pretrained(folder)"
        )
        return ()
    ids = _vocabulary(path, report)
    if ids is None or settings is None:
        return files
    vocab, size = settings.text["vocab_size"], max(ids, default=-1) + 1
    if size > vocab:
        report(
            f"its tokenizer has token ids up to {size - 1}, the model's vocab_size is {vocab}: the tokenizer belongs "
            "to another model, or the embeddings were not resized"
        )
    elif size + _VOCABULARY_SLACK < vocab:
        report(f"its tokenizer has {size} tokens, the model {vocab}: the tokenizer belongs to another model")
    end = settings.tokens["sep_token_id"]
    if end not in ids:
        report(f"its tokenizer has no token {end}, which ends a caption (text_config.sep_token_id): save them together")
    return files


def _vocabulary(path: Path, report: Report) -> set[int] | None:
    """Every token id of the tokenizer, or None after a report; the same files transformers would read."""
    if (path / "tokenizer.json").is_file():
        values = read_object(path / "tokenizer.json", report, "save the tokenizer again")
        if values is None:
            return None
        try:
            vocabulary = values["model"]["vocab"]
            ids = set(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
            return ids | {int(token["id"]) for token in values.get("added_tokens") or ()}
        except (KeyError, TypeError, ValueError) as error:
            report(f"tokenizer.json has no vocabulary ({error!r}): save the tokenizer again")
            return None
    try:
        # Split at newlines only: str.splitlines would also split at characters that are tokens themselves.
        lines = (path / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except ValueError as error:
        report(f"vocab.txt is not UTF-8 ({error}): save the tokenizer again")
        return None
    added = path / "added_tokens.json"
    more = (read_object(added, report, "save the tokenizer again") or {}) if added.is_file() else {}
    return set(range(len(lines))) | {value for value in more.values() if isinstance(value, int)}
