"""Open a checkpoint for export: a folder in Hugging Face layout or a hub id, checked whole before any work starts.

Every problem is reported at once. No pickle is ever read and no code of the checkpoint is run.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsedge import jsonvalues
from rsedge.bundle import sha256_of
from rsedge.checkpointfiles import (
    ADAPTER,
    INDEX,
    SHARD,
    best_of_run,
    file_problems,
    kind_of_folder,
    link_problems,
    read_image_spec,
    setting_problems,
)
from rsedge.errors import CheckpointError
from rsedge.export.checkpoint import Checkpoint, ModelType, Report, Settings
from rsedge.export.models import blip, clip, clipcap
from rsedge.jsonvalues import read_object
from rsedge.texts import first_few, in_a_line

MODEL_TYPES: dict[str, ModelType] = {
    "blip": blip.BLIP,
    "clip": clip.CLIP,
    "siglip": clip.SIGLIP,
    "clipcap": clipcap.CLIPCAP,
}
"""By the ``model_type`` of ``config.json``."""
SUPPORTED = "; ".join(f"{kind.title} (model_type '{name}', {kind.architecture})" for name, kind in MODEL_TYPES.items())

_TOKENIZER_SETTINGS = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SETTINGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")
# Pickled weights are not even downloaded.
_HUB_FILES = ("model*.safetensors", INDEX, *_SETTINGS, *_VOCABULARIES, *_TOKENIZER_SETTINGS)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A vocabulary may be padded to a round size, and BLIP's [DEC] and [ENC] are missing from some tokenizers; a larger gap
# means ids without a word.
_VOCABULARY_SLACK = 256
_REMEDY = "save the tokenizer again"

SINGLE = "model.safetensors"
_NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")

_ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


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
    path, commit = _locate(best_of_run(source) or source, revision)
    problems = list(dict.fromkeys([*link_problems(path), *file_problems(path / ADAPTER)]))
    report = problems.append

    # 1. The configuration.
    config = read_object(path / "config.json", report, "save the model with save_pretrained(folder)")
    problems += setting_problems(config or {})
    kind = _model_type(config, report) if config is not None else None
    settings = None
    if kind is not None and config is not None:
        trouble: list[str] = []
        settings = kind.read_settings(config, trouble.append)
        if config.get("quantization_config"):
            trouble.append(
                "its weights are quantised (quantization_config): export the unquantised checkpoint with --int8"
            )
        if trouble:
            settings = None
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
    stored: Mapping[str, StoredTensor], kind: ModelType, config: Mapping[str, Any], report: Report
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
    named = {kind.canonical_name(name): tensor for name, tensor in stored.items()}
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
        some = "; ".join(first_few(missing))
        report(f"{len(missing)} of {len(expected)} tensors are missing: {some}; save the checkpoint again")
    wrong = [
        f"{name} is {list(named[name].shape)}, the config says {list(shape)}"
        for name, shape in expected.items()
        if name in named and named[name].shape != shape
    ]
    if wrong:
        some = "; ".join(first_few(wrong))
        report(f"{len(wrong)} tensors do not fit the config: {some}; config.json belongs to another model")
    found = {name: named[name] for name in expected if name in named}
    # Buffers of integers cannot be weights, nor can packed quantised weights.
    odd = [f"{name} is {tensor.dtype}" for name, tensor in found.items() if tensor.dtype not in _FLOATS]
    if odd:
        some = "; ".join(first_few(odd))
        report(f"{len(odd)} tensors are not floating point: {some}; export the unquantised checkpoint")
    return found


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


def vocabulary_ids(file: Path, report: Report) -> set[int] | None:
    """Every token id of the tokenizer that is kept in ``file``, or None after a report.

    ``file`` is ``tokenizer.json`` (whole), ``vocab.txt`` (BERT), ``vocab.json`` (CLIP, GPT-2) or ``spiece.model``
    (SentencePiece); beside all but the first, ``added_tokens.json`` may have more.
    """
    ids: set[int] | None = None
    try:
        if file.suffix == ".json":
            values = read_object(file, report, _REMEDY)
            if file.name == "tokenizer.json":
                if values is None:
                    return None
                vocabulary = values["model"]["vocab"]
                ids = set(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
                return ids | {int(token["id"]) for token in values.get("added_tokens") or ()}
            ids = None if values is None else _whole(values)
        elif file.name == "vocab.txt":
            # Split at newlines only: str.splitlines would also split at characters that are tokens themselves.
            ids = set(range(len(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"))))
        else:
            import sentencepiece

            ids = set(range(sentencepiece.SentencePieceProcessor(model_file=str(file)).get_piece_size()))
    except ImportError:
        report(
            f"its tokenizer is {file.name} alone, which needs the package sentencepiece: pip install sentencepiece "
            "protobuf"
        )
    except UnicodeDecodeError as error:
        report(f"{file.name} is not UTF-8 ({error}): {_REMEDY}")
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        kind = "SentencePiece model" if file.name == "spiece.model" else "vocabulary"
        report(f"{file.name} has no {kind} ({error!r}): {_REMEDY}")
    added = file.with_name("added_tokens.json")
    more = (read_object(added, report, _REMEDY) or {}) if added.is_file() else {}
    return None if ids is None else ids | _whole(more)


def _whole(values: dict[str, Any]) -> set[int]:
    return {value for value in values.values() if isinstance(value, int)}


# The weight files


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: ``nbytes`` bytes from ``offset`` of ``file``, of safetensors type ``dtype``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> NDArray[np.float32]:
        """The tensor as float32, a copy of its own."""
        raw = np.fromfile(self.file, dtype=_FLOATS[self.dtype], count=math.prod(self.shape), offset=self.offset)
        if self.dtype == "BF16":  # the upper half of a float32
            return (raw.astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        return raw.astype(np.float32).reshape(self.shape)


class Weights(Mapping[str, NDArray[np.float32]]):
    """Name → float32 array, read from disk at each access and not kept."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = dict(stored)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def find_tensors(folder: Path, report: Report) -> tuple[dict[str, StoredTensor], list[Path]]:
    """Every tensor in the weight files of ``folder``, and those files; problems go to ``report`` as sentences."""
    if (folder / SINGLE).is_file():
        return _read_header(folder / SINGLE, report), [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _read_shards(folder, report)
    if shards := _numbered_shards(folder, report):
        tensors: dict[str, StoredTensor] = {}
        for shard in shards:
            tensors |= _read_header(shard, report)
        return tensors, shards
    pickled = sorted(
        path.name for pattern in ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl") for path in folder.glob(pattern)
    )
    if meaning := kind_of_folder(folder):
        report(f"it is {meaning}")
    elif pickled:
        report(
            f"its weights are pickled only ({', '.join(pickled[:3])}), and rsedge never executes pickle: where you "
            "trust the file, load the model with transformers and save it with "
            "save_pretrained(folder, safe_serialization=True); rsedge import-rsdix converts a .ckpt of RSDiX"
        )
    else:
        report(f"it has no weights: expected {SINGLE}, or {INDEX} with its shards")
    return {}, []


def _numbered_shards(folder: Path, report: Report) -> list[Path]:
    """Shards that an index would list, by their numbers; missing ones are reported."""
    found = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        if match := _NUMBERED.fullmatch(path.name):
            found[int(match[1])] = (path, int(match[2]))
    counts = {count for _, count in found.values()}
    if len(counts) != 1:
        return []
    [count] = counts
    if missing := [number for number in range(1, count + 1) if number not in found]:
        report(f"shards {in_a_line(missing)} of {count} are missing, and {INDEX}: download them again")
    return [path for path, _ in found.values()]


def hash_files(files: list[Path]) -> str:
    """What ``sha256sum`` prints for the one file, or for the lines it prints for several, ordered by name."""
    digests = {path.name: sha256_of(path) for path in files}
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()).hexdigest()


def _read_shards(folder: Path, report: Report) -> tuple[dict[str, StoredTensor], list[Path]]:
    try:
        places: dict[str, str] = dict(jsonvalues.parse((folder / INDEX).read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        report(f"{INDEX} is damaged ({error}): download it again or save the checkpoint again")
        return {}, []
    found: dict[str, StoredTensor] = {}
    files = []
    for name in sorted({str(place) for place in places.values()}):
        path = folder / name
        if not SHARD.fullmatch(name):
            report(
                f"{INDEX} names {name!r}, which is not a safetensors file of the folder itself: save the checkpoint "
                "again"
            )
        elif not path.is_file():
            report(f"the shard {name} is missing: download it again or save the checkpoint again")
        else:
            tensors = _read_header(path, report)
            files.append(path)
            # transformers reads whatever a shard holds; a tensor promised and absent is a damaged checkpoint.
            absent = [tensor for tensor, place in places.items() if place == name and tensor not in tensors]
            if absent and tensors:
                some = in_a_line(absent)
                report(f"the shard {name} lacks {some}, which {INDEX} says it holds: download it again")
            found.update(tensors)
    return found, files


def _read_header(path: Path, report: Report) -> dict[str, StoredTensor]:
    if problems := file_problems(path):
        for problem in problems:
            report(problem)
        return {}
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length)
    end = 8 + length
    tensors = {}
    try:
        header = jsonvalues.parse(text)
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, end, entry) for name, entry in header.items()}
        # One after another, without a gap, as the format says: bytes of two tensors, or of none, are a trick.
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset != end:
                raise ValueError(
                    f"a tensor begins at byte {tensor.offset}, expected {end}: tensors overlap or leave gaps"
                )
            end += tensor.nbytes
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        report(f"the header of {path.name} is damaged ({error}): download it again or save the checkpoint again")
        return {}
    if end != size:
        fate = "cut short" if size < end else "damaged"
        report(f"{path.name} is {fate}: its header promises {end} bytes, the file has {size}; download it again")
        return {}
    return tensors


def _stored(path: Path, start: int, entry: dict[str, Any]) -> StoredTensor:
    shape, (begin, stop) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = str(entry["dtype"])[:40]
    if len(shape) > 8 or any(type(number) is not int or number > 1 << 48 for number in (*shape, begin, stop)):
        raise ValueError(f"shape {list(shape)[:8]} at {begin} to {stop} is impossible")
    expected = math.prod(shape) * _ITEM_SIZE.get(dtype, 0)
    if not 0 <= begin <= stop or min(shape, default=0) < 0 or (dtype in _ITEM_SIZE and stop - begin != expected):
        raise ValueError(f"bytes {begin} to {stop} cannot hold {dtype} {list(shape)}")
    return StoredTensor(path, dtype, shape, start + begin, stop - begin)
