"""Open a checkpoint for export: a folder in Hugging Face layout or a hub id, checked whole before any work starts.

Everything wrong is told at once. No pickle is ever read and no code of the checkpoint is run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rsedge.checkpointfiles import ADAPTER, file_problems, setting_problems
from rsedge.errors import CheckpointError
from rsedge.export.families import ModelType, Settings, model_type_of
from rsedge.export.vocabulary import vocabulary_ids
from rsedge.export.weights import Report, Weights, find_tensors, hash_files
from rsedge.jsonvalues import read_object
from rsedge.preprocessor import read_image_spec

if TYPE_CHECKING:
    from rsedge.bundle import Family, ImageSpec, TokenSpec

S = TypeVar("S", bound=Settings)

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


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint(Generic[S]):
    """A checkpoint that can be exported.

    Attributes:
        path: The folder with its files.
        source: The folder or hub id as given.
        revision: The hub commit, or None for a folder.
        config: ``config.json`` as it is; ``settings`` has the defaults filled in.
        settings: The checked sizes.
        model_type: What is particular to its kind of model.
        tensors: Name in transformers' model → float32 array, read at access; complete, shapes checked, and a tied head
            present under its own names.
        tokenizer_files: What the tokenizer is read from.
        image: Size, filter, mean and deviation of its image processor; no reflectance rule, the checkpoint knows none.
        generation_config: ``generation_config.json``, empty where there is none.
        sha256: Hash over the weight files: what ``sha256sum`` prints for one file, or for its own lines for several.
    """

    path: Path
    source: str
    revision: str | None
    config: dict[str, Any]
    settings: S
    model_type: ModelType
    tensors: Weights
    tokenizer_files: tuple[Path, ...]
    image: ImageSpec
    generation_config: dict[str, Any]
    sha256: str

    @property
    def family(self) -> Family:
        """The bundle family it becomes."""
        return self.model_type.family

    @property
    def tokens(self) -> TokenSpec | None:
        """Start, end and padding ids, and the vocabulary size, of a captioner."""
        return self.settings.token_spec


def load_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint[Any]:
    """The checkpoint in the folder ``source``, or of the hub id ``source`` (``owner/name``).

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
    problems = file_problems(path / ADAPTER)
    report = problems.append

    config = read_object(path / "config.json", report, "save the model with save_pretrained(folder)")
    problems += setting_problems(config or {})
    kind = model_type_of(config, report) if config is not None else None
    settings = kind.read_settings(config, report) if kind is not None and config is not None else None
    found, files = find_tensors(path, report)
    stored = {}
    if kind is not None and settings is not None and files and not problems:
        stored = kind.resolve_tensors(found, settings, report)
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
