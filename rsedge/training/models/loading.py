"""Load models and tokenizers for training: hub ids and folders, configurations changed by a recipe, other image sizes.

A tokenizer can be learnt from the training captions. It is of the family's own kind, so that everything downstream
(transformers, the exported tokenizer.json) reads it like a published one: BERT's WordPiece for BLIP, CLIP's lower-cased
BPE, GPT-2's byte-level BPE.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rsedge.checkpointfiles import CONFIG, file_problems, read_image_spec, source_problems
from rsedge.errors import BackendError, OptionError, RsedgeError
from rsedge.manifest import ImageSpec
from rsedge.texts import first_line
from rsedge.tokenizerfile import no_panic

if TYPE_CHECKING:
    from rsedge.datasets.examples import CaptionData
    from rsedge.training.recipe import ModelRecipe

FROM_CAPTIONS = "captions"
"""The value of ``model.tokenizer`` that asks for a learnt vocabulary."""

_PROBE = "Two boats, parked in a harbour."
_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_BLIP = ["[DEC]", "[ENC]"]
_CLIP = ["<|startoftext|>", "<|endoftext|>"]
_STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Kind of image encoder → mean and deviation it was trained with."""


def default_image(kind: str, size: int) -> ImageSpec:
    """Images of ``size`` pixels with the mean and deviation of ``clip``, which BLIP has too, or ``siglip``."""
    mean, std = _STATISTICS[kind]
    return ImageSpec(size=size, mean=mean, std=std)


def load_pretrained(
    cls: Any, wanted: ModelRecipe, *, source: str | None = None, changes: Mapping[str, Any] | None = None
) -> Any:
    """The model of class ``cls`` at ``source`` (else ``wanted.init``) in float32. No pickled weights are read.

    Args:
        cls: Of transformers, or like one.
        wanted: Its ``config`` changes the model's configuration; ``revision`` is that of ``init``.
        source: Folder or hub id in place of ``wanted.init``.
        changes: In place of ``wanted.config``.

    Raises:
        OptionError: It cannot be loaded, is of another kind, lacks weights, or the changes do not fit them.
    """
    origin = source or str(wanted.init)
    revision = wanted.revision if source is None else None
    try:
        check_source(origin, revision)
        config = cls.config_class.from_pretrained(origin, revision=revision)
        kind = config_type(origin, revision)
        if source is None and kind != cls.config_class.model_type:
            raise OptionError(
                f"{origin} is a {kind} model, not {cls.config_class.model_type}: choose another model.init"
            )
        config = cls.config_class(
            **merge_config(cls.config_class, config.to_dict(), wanted.config if changes is None else changes)
        )
        _check_size(cls, config, origin)
        model, report = cls.from_pretrained(
            origin, revision=revision, config=config, use_safetensors=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise OptionError(f"the weights in {origin} are damaged ({error}): copy or download them again") from error
    except RsedgeError:
        raise
    except Exception as error:  # a stranger's settings, and whatever the constructors raise at them
        reason = " ".join(str(error).split())[:300]
        raise OptionError(
            f"cannot start from {origin}: {reason}. Give a folder in Hugging Face layout with safetensors weights, "
            "or a hub id; without a network, set HF_HUB_OFFLINE=1 to use the cache"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise OptionError(
            f"{origin} lacks {len(missing)} weights of {cls.__name__} ({', '.join(missing[:3])}, …): it is another "
            "kind of model"
        )
    return model.float()


def _check_size(cls: Any, config: Any, origin: str) -> None:
    """Refuse a folder whose configuration asks for more weights than its files can hold: all would be made first."""
    files = list(Path(origin).glob("*.safetensors")) if Path(origin).is_dir() else []
    if not files:  # a hub id, or a folder without weights, which transformers names
        return
    with torch.device("meta"):
        empty = cls(config)
    empty.tie_weights()
    wanted = sum(tensor.numel() for tensor in empty.parameters())
    stored = sum(file.stat().st_size for file in files)
    if wanted > stored:  # each takes a byte at least
        raise OptionError(
            f"cannot start from {origin}: its configuration asks for {wanted} weights, and its files have {stored} "
            "bytes: it is another model's, or files are missing"
        )


def check_source(source: str | Path, revision: str | None = None) -> None:
    """Check that transformers may open a folder or hub id. Raises OptionError: every problem of its files."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def find(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(str(source), name, revision=revision))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE:
                raise  # not asked again for every other file: each time takes half a minute
            return None

    if problems := source_problems(str(source), find):
        raise OptionError("\n".join([f"cannot start from {source}:", *(f"  - {problem}" for problem in problems)]))


def config_type(source: str, revision: str | None = None) -> str:
    """``model_type`` of a folder or hub id. Raises OptionError: its configuration cannot be used."""
    from transformers import PretrainedConfig

    if problems := file_problems(Path(source) / CONFIG):
        raise OptionError(f"cannot open {source}: {'; '.join(problems)}")
    values, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    return str(values.get("model_type"))


def image_spec(source: str, revision: str | None = None) -> ImageSpec:
    """The image processor's settings of a folder or hub id. Raises OptionError: none, or one rsedge cannot follow."""
    folder = Path(source)
    if not folder.is_dir():
        from transformers.utils import cached_file

        found = cached_file(
            source, "preprocessor_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
        )
        folder = Path(found).parent if found else folder
    problems: list[str] = []
    spec = read_image_spec(folder, problems.append)
    if spec is None:
        raise OptionError(f"cannot start from {source}: {'; '.join(problems)}")
    return spec


def torch_device(name: str) -> str:
    """Torch's name of a device; ``auto`` is the first GPU, else the CPU.

    Raises:
        OptionError: It is no name of a device.
        BackendError: There is no such GPU here.
    """
    kind, colon, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and not (kind == "cuda" and number.isdecimal())):
        raise OptionError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if kind == "auto":
        return "cuda" if count else "cpu"
    if kind == "cuda" and int(number or 0) >= count:
        raise BackendError(f"device {name} is not here: torch sees {count or 'no'} CUDA GPUs; use --device cpu")
    return name


def merge_config(cls: Any, base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``base`` with ``changes``; ``vision``, ``text`` and the like stand for ``vision_config`` …

    Raises:
        OptionError: A change that the configuration class does not know; all are named.
    """
    from transformers import AutoConfig

    merged = {name: dict(value) if isinstance(value, Mapping) else value for name, value in base.items()}
    sections: dict[str, Any] = dict(getattr(cls, "sub_configs", {}))
    unknown = []
    for name, value in changes.items():
        section = name if name in sections else f"{name}_config"
        if section in sections and isinstance(value, Mapping):
            section_class = sections[section]
            if section_class is AutoConfig:  # its class depends on its model_type
                kind = {**merged.get(section, {}), **value}.get("model_type", "clip_vision_model")
                section_class = type(AutoConfig.for_model(kind))
            known = section_class().to_dict()
            unknown += [f"{name}.{key}" for key in value if key not in known]
            merged.setdefault(section, {}).update(value)
        elif name in cls().to_dict():
            merged[name] = value
        else:
            unknown.append(name)
    if unknown:
        raise OptionError(
            f"model.config has {', '.join(unknown)}, which {cls.__name__} does not know; its sections are "
            f"{', '.join(key.removesuffix('_config') for key in sections) or 'none'}"
        )
    return merged


def interpolate(positions: Tensor, grid: int, *, class_token: bool) -> Tensor:
    """Position embeddings for ``grid`` × ``grid`` patches, by bicubic interpolation as in transformers.

    Args:
        positions: [N, D], that of the class token first if there is one; the patches are a square.
        grid: Patches per side.
        class_token: Whether there is one; it stays as it is.

    Returns:
        [grid² (+ 1), D] in the dtype of ``positions``.
    """
    first, patches = positions[: int(class_token)], positions[int(class_token) :]
    side = round(len(patches) ** 0.5)
    square = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([first, resized.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(positions.dtype)])


@torch.no_grad()
def resize_vision(model: Any, image_size: int) -> None:
    """Give a vision tower, or its model, another image size. Raises OptionError: no multiple of the patch size."""
    tower = getattr(model, "vision_model", model)
    config, embeddings = tower.config, tower.embeddings
    patch = config.patch_size
    if image_size % patch:
        raise OptionError(
            f"model.image_size is {image_size}, not a multiple of the patch size {patch}: choose "
            f"{image_size // patch * patch or patch}"
        )
    if image_size == config.image_size:
        return
    grid, positions = image_size // patch, embeddings.position_embedding
    if isinstance(positions, nn.Embedding):  # CLIP with a class token, SigLIP without
        rows = interpolate(positions.weight, grid, class_token=hasattr(embeddings, "class_embedding"))
        embeddings.position_embedding = nn.Embedding(rows.shape[0], rows.shape[1], _weight=rows)
        numbers = torch.arange(len(rows), device=rows.device)[None]
        embeddings.register_buffer("position_ids", numbers, persistent=False)
    else:
        rows = interpolate(positions[0], grid, class_token=True)
        embeddings.position_embedding = nn.Parameter(rows[None])
    embeddings.num_patches, embeddings.num_positions = grid * grid, len(rows)
    embeddings.image_size = config.image_size = image_size
    if hasattr(model.config, "vision_config"):
        model.config.vision_config.image_size = image_size


def open_tokenizer(source: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a folder or hub id. Raises OptionError: none, or one that takes endless time or memory."""
    from transformers import AutoTokenizer

    try:
        check_source(source, revision)
        with no_panic(ValueError):
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
            tokenizer.decode(tokenizer(_PROBE).input_ids)
    except RsedgeError:
        raise
    except Exception as error:  # a stranger's files, and whatever transformers and tokenizers raise at them
        raise OptionError(
            f"there is no tokenizer in {source} ({first_line(error)}): give a folder or a hub id that has one in "
            f"model.tokenizer, or '{FROM_CAPTIONS}' to learn one"
        ) from error
    return tokenizer


def learn_wordpiece(captions: Iterable[str], size: int) -> Any:
    """BERT's tokenizer with BLIP's two tokens, its vocabulary learnt from ``captions`` (lower-cased)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts, split = sorted(captions), learner.pre_tokenizer.pre_tokenize_str
    words = (word for text in texts for word, _ in split(learner.normalizer.normalize_str(text)))
    letters = sorted({letter for word in words for letter in word})
    # The trainer numbers letters as it happens to meet them, and breaks ties by number; those it is given keep theirs.
    fixed = [*_BERT, *letters, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=size - len(_BLIP), special_tokens=fixed, show_progress=False)
    vocabulary, _ = _learn(learner, texts, trainer)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})
    tokenizer.add_special_tokens({"additional_special_tokens": _BLIP})
    return tokenizer


def learn_clip_bpe(captions: Iterable[str], size: int) -> Any:
    """CLIP's tokenizer, its merges learnt from ``captions``; the end token is the last of the vocabulary."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # As in CLIP's vocabulary: every byte, then every byte that ends a word. Given, so that their numbers are fixed.
    fixed = [*letters, *(f"{letter}</w>" for letter in letters)]
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(_CLIP), special_tokens=fixed, end_of_word_suffix="</w>", show_progress=False
    )
    vocabulary, merges = _learn(learner, sorted(captions), trainer)
    return CLIPTokenizer(vocab={word: i for i, word in enumerate([*vocabulary, *_CLIP])}, merges=merges)


def learn_byte_bpe(captions: Iterable[str], size: int) -> Any:
    """GPT-2's tokenizer, its merges learnt from ``captions``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size - 1, special_tokens=letters, show_progress=False)
    vocabulary, merges = _learn(learner, sorted(captions), trainer)
    return GPT2Tokenizer(vocab={word: i for i, word in enumerate([*vocabulary, "<|endoftext|>"])}, merges=merges)


def obtain_tokenizer(
    wanted: ModelRecipe, own: str | None, data: CaptionData, learn: Callable[[Iterable[str], int], Any]
) -> Any:
    """The tokenizer of a recipe: named, learnt, or that of ``own``. Raises OptionError: none is named, or two are."""
    if own is not None and wanted.tokenizer is not None:
        raise OptionError(f"{own} has a tokenizer of its own: leave model.tokenizer out")
    if wanted.tokenizer == FROM_CAPTIONS:
        captions = (caption for example in data.split("train") for caption in example.captions)
        return learn(captions, wanted.vocabulary_size)
    if own is not None:
        return open_tokenizer(own, revision=wanted.revision)
    if wanted.tokenizer is None:
        raise OptionError(f"model.tokenizer is not set: give a folder, a hub id or '{FROM_CAPTIONS}'")
    return open_tokenizer(wanted.tokenizer)


def _learn(learner: Any, texts: Iterable[str], trainer: Any) -> tuple[list[str], list[tuple[str, str]]]:
    """The vocabulary learnt from ``texts``, by number, and the merges of BPE."""
    learner.train_from_iterator(texts, trainer)
    vocabulary: dict[str, int] = learner.get_vocab()
    merges = json.loads(learner.to_str())["model"].get("merges", ())
    return sorted(vocabulary, key=vocabulary.__getitem__), [tuple(pair) for pair in merges]
