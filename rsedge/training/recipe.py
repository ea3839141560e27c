"""A recipe: everything that decides what a training run does, as frozen dataclasses that mirror a TOML file.

Every table checks itself; :class:`Recipe` checks what needs two tables. Together with the data and the versions of the
libraries a recipe decides the run to the last bit; where it runs (device, number of processes, number of workers) does
not enter. The functions read and write the files: presets, TOML, ``--set key=value``.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from rsedge.errors import OptionError
from rsedge.jsonvalues import build, describe_type
from rsedge.tomlfile import parse_toml, read_toml, write_toml
from rsedge.training.data.augment import ImageAugmentation  # noqa: TC001 - read at run time, from the annotations
from rsedge.training.losses import RsdixSettings

Family = Literal["blip", "clip", "clipcap"]
Better = Literal["min", "max"]
_ORIGINS = ("init", "language_model", "tokenizer")  # keys of [model] that a small model from scratch cannot take


def _require(table: Any, *checks: tuple[bool, str] | tuple[bool, str, str]) -> None:
    """Raise what is wrong with a table, all at once: the problem of every check that does not hold.

    A check is followed by its problem, or by the name of a field and what to give there.
    """
    problems = []
    for accepted, *texts in checks:
        if not accepted:
            name, remedy = texts[0], "".join(texts[1:])
            problems.append(f"{name} is {getattr(table, name)}: give {remedy}" if remedy else name)
    if problems:
        raise OptionError("; ".join(problems))


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """Which examples are trained on."""

    sources: tuple[str, ...] = ()
    """Caption sets, files or folders; ``--data`` replaces them."""
    fractions: tuple[float, ...] = (0.8, 0.1, 0.1)
    """Of train, val and test, for sets without a split column."""
    val_fraction: float = 0.0
    """Share of the training images that become validation images, for sets with splits but without val."""
    limit: int | None = None
    """At most so many images of each split."""
    skip_bad: bool = False
    """Leave out records that cannot be used, instead of refusing to start."""
    paraphrases: str | None = None
    """File of ``rsedge back-translate`` with other wordings of the captions."""
    paraphrase_probability: float = 0.0
    """How often one of them takes the place of its caption."""
    workers: int = 2
    """Processes that read and augment images; 0 reads in the training process. No result depends on it."""

    def __post_init__(self) -> None:
        shares = self.fractions
        _require(
            self,
            (
                len(shares) == 3 and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6,
                f"fractions are {list(shares)}: give train, val and test, adding up to 1",
            ),
            (0 <= self.val_fraction < 1, "val_fraction", "a share from 0 to 1, such as 0.1"),
            (self.limit is None or self.limit > 0, "limit", "a number of images above 0"),
            (0 <= self.paraphrase_probability <= 1, "paraphrase_probability", "0 to 1"),
            (
                self.paraphrases is not None or self.paraphrase_probability == 0,
                f"paraphrase_probability is {self.paraphrase_probability} but there is no file of paraphrases: make "
                "one with rsedge back-translate and name it in data.paraphrases, or set the probability to 0",
            ),
            (self.workers >= 0, "workers", "0 or more"),
        )


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """Which model is trained."""

    init: str | None = None
    """Hub id or folder to start from; without it a random model is made from ``config``."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    config: dict[str, Any] = field(default_factory=dict)
    """Settings of the model's configuration class, by section (``vision``, ``text``, ``mapper``) or at its top: all of
    a random model's, changes to a loaded one's that do not alter a weight's shape (dropout, say)."""
    image_size: int | None = None
    """Pixels; position embeddings are interpolated. None: as in ``init``."""
    tokenizer: str | None = None
    """Folder or hub id; ``captions`` learns a vocabulary from the training captions; None: as in ``init``."""
    vocabulary_size: int = 8000
    """Of a vocabulary learnt from captions, at most."""
    max_tokens: int = 64
    """Longest caption in tokens, start and end included; longer ones are cut."""
    freeze: tuple[str, ...] = ()
    """Parts (``vision``, ``text``, …) or patterns of parameter names that keep their weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    encoder: str | None = None
    """CLIPCap only: hub id or folder of the CLIP or SigLIP model whose images are captioned."""
    language_model: str | None = None
    """CLIPCap only: hub id or folder of the GPT-2."""

    def __post_init__(self) -> None:
        _require(
            self,
            (self.image_size is None or self.image_size > 0, "image_size", "pixels above 0"),
            (self.max_tokens > 2, "max_tokens", "at least 3"),
            (self.vocabulary_size >= 32, "vocabulary_size", "at least 32"),
            (
                self.revision is None or self.init is not None,
                f"revision is {self.revision} but there is no init it could belong to: set model.init or leave it out",
            ),
        )


@dataclass(frozen=True, slots=True)
class OptimizerRecipe:
    """How weights are changed."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """``adamw`` or ``adafactor``."""
    learning_rate: float = 5e-5
    """The highest of the schedule. With ``adafactor`` it is relative: a weight moves by it times the root mean square
    of its tensor."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Other rates for parts or patterns of parameter names; the first that fits wins."""
    weight_decay: float = 0.01
    """Decoupled; not for biases and other vectors (norms, learnt scalars)."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Of AdamW: decay of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Of AdamW: added to the denominator."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this norm; without it they stay."""

    def __post_init__(self) -> None:
        rates = {"learning_rate": self.learning_rate, **self.learning_rates}
        betas = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(
            self,
            *((rate > 0, f"{name} is {rate}: give a rate above 0") for name, rate in rates.items()),
            (self.weight_decay >= 0, "weight_decay", "0 or more"),
            (betas, f"betas are {list(self.betas)}: give two numbers from 0 up to, not including, 1"),
            (self.eps > 0, "eps", "a number above 0"),
            (self.clip_norm is None or self.clip_norm > 0, "clip_norm", "a number above 0, or leave it out"),
            (
                self.name == "adamw" or (self.betas == (0.9, 0.999) and self.eps == 1e-8),
                "betas and eps belong to adamw: leave them out with adafactor",
            ),
        )


@dataclass(frozen=True, slots=True)
class ScheduleRecipe:
    """How the learning rate goes over the run."""

    name: Literal["constant", "linear", "cosine", "warmup", "plateau"] = "linear"
    """``constant``; ``linear`` or ``cosine`` (both fall to 0 at the last step); ``warmup`` (constant after the
    warm-up); ``plateau`` (multiplied by ``factor`` when the monitored value has not improved for ``patience``
    evaluations). Each after a linear warm-up."""
    warmup_steps: int = 0
    """Optimiser steps of the warm-up."""
    start_factor: float = 0.0
    """Share of the learning rate that the warm-up starts from."""
    factor: float = 0.1
    """Of ``plateau``: what the rate is multiplied by."""
    patience: int = 1
    """Of ``plateau``: evaluations without improvement before that."""

    def __post_init__(self) -> None:
        _require(
            self,
            (self.warmup_steps >= 0, "warmup_steps", "0 or more"),
            (0 <= self.start_factor <= 1, "start_factor", "0 to 1"),
            (0 < self.factor < 1, "factor", "a number between 0 and 1"),
            (self.patience >= 0, "patience", "0 or more"),
            (self.name != "warmup" or self.warmup_steps > 0, "the schedule warmup needs warmup_steps above 0"),
            (
                self.warmup_steps > 0 or self.start_factor == 0,
                f"start_factor is {self.start_factor}, but there is no warm-up: set warmup_steps above 0, or leave it "
                "out",
            ),
            (
                self.name == "plateau" or (self.factor == 0.1 and self.patience == 1),
                f"factor and patience belong to the schedule plateau, not to {self.name}: leave them out",
            ),
        )


@dataclass(frozen=True, slots=True)
class LoopRecipe:
    """How long, in which portions, and how closely watched."""

    epochs: int = 5
    """Times every training image is seen (with all its captions for captioners, with one of them in turn for CLIP);
    images that do not fill a last batch are left out of the epoch, other ones each time."""
    max_steps: int | None = None
    """Optimiser steps to stop after, within the epochs."""
    batch_size: int = 16
    """Images of one optimiser step, over all processes and accumulation steps."""
    micro_batch_size: int | None = None
    """Images of one forward pass on one device; None: all of the process. The gradient is accumulated over ``batch_size
    / (micro_batch_size × processes)`` passes."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """``no``, ``fp16`` or ``bf16``."""
    evaluate_every: int | None = None
    """Optimiser steps between evaluations; None: once per epoch."""
    checkpoint_every: int | None = None
    """Optimiser steps between checkpoints; None: at every evaluation."""
    monitor: str = "val_loss"
    """The value that decides which checkpoint is best, the plateau and early stopping, such as val_loss, val_cider_d or
    val_mean_recall."""
    monitor_mode: Better = "min"
    """Whether a smaller (``min``) or a larger (``max``) value is better."""
    early_stopping: int | None = None
    """Evaluations without improvement after which the run ends; None: never."""
    ema_decay: float | None = None
    """Average the weights over the steps and evaluate and save the average; None: do not."""
    captions: int = 0
    """Validation images that are captioned and scored at every evaluation; 0: none. Not for CLIP."""
    log_every: int = 10
    """Optimiser steps between lines in ``metrics.jsonl``."""

    def __post_init__(self) -> None:
        positive = ("epochs", "max_steps", "batch_size", "micro_batch_size", "evaluate_every", "checkpoint_every")
        names = (*positive, "early_stopping", "log_every")
        micro, decay = self.micro_batch_size, self.ema_decay
        _require(
            self,
            *(((value := getattr(self, name)) is None or value > 0, name, "a whole number above 0") for name in names),
            (self.captions >= 0, "captions", "0 or more"),
            (decay is None or 0 < decay < 1, "ema_decay", "a number between 0 and 1, or leave it out"),
            (
                not micro or micro < 0 or self.batch_size % micro == 0,
                f"batch_size ({self.batch_size}) is not a multiple of micro_batch_size ({micro})",
            ),
        )


@dataclass(frozen=True, slots=True)
class CaptionObjective:
    """The loss of BLIP and CLIPCap: cross entropy on the tokens of every caption."""

    label_smoothing: float = 0.0
    """Share of the target spread over the vocabulary; the validation loss is without it."""

    def __post_init__(self) -> None:
        _require(self, (0 <= self.label_smoothing < 1, "label_smoothing", "0 up to, not including, 1"))


@dataclass(frozen=True, slots=True)
class ContrastiveObjective:
    """The loss of CLIP and SigLIP."""

    rsdix: RsdixSettings = field(default_factory=lambda: RsdixSettings(teacher="none", alpha=1.0))
    """Contrastive and distillation losses and their weights."""
    teacher_decay: float = 0.999
    """Of the EMA teacher."""
    sbert: str | None = None
    """Hub id or folder of the Sentence-BERT that is the text teacher, or that SBS-MSE compares with."""

    def __post_init__(self) -> None:
        _require(
            self,
            (0 < self.teacher_decay < 1, "teacher_decay", "0 to 1, both excluded"),
            (
                self.rsdix.teacher != "sbert" or self.sbert is not None,
                "the teacher is sbert, but contrastive.sbert names none: give a Sentence-BERT's hub id or folder",
            ),
        )


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole training run. Raises OptionError: impossible values or contradictions, all of a table at once."""

    family: Family
    """``blip``, ``clip`` (SigLIP too) or ``clipcap``."""
    seed: int = 0
    """Of everything random: first weights, order, augmentation, dropout, splits."""
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    augmentation: ImageAugmentation | None = None
    """Of training images; None: none."""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    loop: LoopRecipe = field(default_factory=LoopRecipe)
    caption: CaptionObjective | None = None
    """Objective of blip and clipcap."""
    contrastive: ContrastiveObjective | None = None
    """Objective of clip."""

    def __post_init__(self) -> None:
        family, loop, model = self.family, self.loop, self.model
        captioner = family != "clip"
        known = monitors(self)
        scores = ", or set loop.captions above 0 to score generated captions" * (captioner and not loop.captions)
        better = known.get(loop.monitor) or loop.monitor_mode
        parts = (model.encoder, model.language_model)
        _require(
            self,
            (self.seed >= 0, "seed", "0 or more"),
            (
                self.contrastive is None or not captioner,
                f"[contrastive] belongs to clip, not to {family}: remove it",
            ),
            (self.caption is None or captioner, "[caption] belongs to blip and clipcap, not to clip: remove it"),
            (captioner or not loop.captions, f"loop.captions is {loop.captions}, but clip writes no captions: 0"),
            (
                loop.monitor in known,
                f"loop.monitor is {loop.monitor}, but an evaluation gives {', '.join(known)}: choose one{scores}",
            ),
            (
                better == loop.monitor_mode,
                f"loop.monitor_mode is {loop.monitor_mode}, but {loop.monitor} is better the "
                f"{'larger' if better == 'max' else 'smaller'} it is: set loop.monitor_mode to {better}",
            ),
            (
                family != "clipcap" or model.init is None or parts == (None, None),
                "model.init is a whole CLIPCap; model.encoder and model.language_model are its parts: give one or "
                "the other",
            ),
            (
                family == "clipcap" or parts == (None, None),
                f"model.encoder and model.language_model belong to clipcap, not to {family}: use model.init",
            ),
            (
                (model.tokenizer, model.init, model.language_model) != (None, None, None),
                "there is no tokenizer: model.init is not set, so set model.tokenizer to a folder, a hub id, or "
                "'captions' to learn one from the training captions",
            ),
        )


def monitors(recipe: Recipe) -> dict[str, Better | None]:
    """The values that :class:`rsedge.training.validation.Validation` computes, in their order, each with the better
    direction, or None where neither is better, such as for the length of captions.

    Known from the recipe, so that a misspelt monitor is refused at once.
    """
    found: dict[str, Better | None] = {"val_loss": "min"}
    if recipe.family == "clip":
        contrastive = recipe.contrastive or ContrastiveObjective()
        rsdix = contrastive.rsdix
        parts = ["sigmoid"] if rsdix.use_sigmoid_loss else ["contrastive"]
        parts += ["distillation"] if rsdix.teacher != "none" else []
        parts += ["projection"] if rsdix.teacher == "sbert" else []
        found |= {f"val_{part}": "min" for part in parts}
        found["val_accuracy"] = "max"
        if contrastive.sbert is not None:
            found["val_sbs_mse"] = "min"
        for direction in ("image_to_text", "text_to_image"):
            found |= {f"val_{direction}_r{k}": "max" for k in (1, 5, 10)}
        found["val_mean_recall"] = "max"
    elif recipe.loop.captions:
        scores = (*(f"bleu_{n}" for n in range(1, 5)), "rouge_l", "cider_d")
        found |= {f"val_{score}": "max" for score in scores}
        found |= {"val_words": None, "val_distinct": None}
    return found


def presets() -> dict[str, str]:
    """Name → first comment line of every recipe that comes with rsedge."""
    folder = files("rsedge.training") / "recipes"
    texts = {file.name: file.read_text("utf-8") for file in folder.iterdir() if file.name.endswith(".toml")}
    return {
        name.removesuffix(".toml"): text.partition("\n")[0].removeprefix("#").strip()
        for name, text in sorted(texts.items())
    }


def load_recipe(source: str | Path | None, *, family: Family, settings: Sequence[str] = ()) -> Recipe:
    """The recipe ``source`` with ``settings`` applied.

    Args:
        source: A TOML file or the name of a preset; None is the preset ``FAMILY-cpu``, a small model from scratch, or
            a recipe of defaults where ``settings`` name a model or a tokenizer.
        family: What is to be trained; a recipe of another family is refused.
        settings: ``key=value`` each: the key ``table.name``, or the name alone where only one table has it; the value
            as TOML writes it, text without quotes too; ``key=`` takes the key out of the recipe.

    Raises:
        OptionError: Everything wrong at once: unknown keys by name, values of the wrong kind, contradictions.
    """
    problems: list[str] = []
    changes: list[tuple[tuple[str, ...], str, Any]] = []
    for setting in settings:
        key, equals, text = setting.partition("=")
        try:
            if not equals:
                raise OptionError(f"{setting!r} is no setting: write key=value")
            changes.append((*locate(key.strip()), parse_value(text)))
        except OptionError as error:
            problems.append(str(error))
    if source is None and any(at == ("model",) and name in _ORIGINS and value != "" for at, name, value in changes):
        values: dict[str, Any] = {}
    elif source is not None and Path(source).is_file():
        values = read_toml(Path(source))
        _take_unknown(values, problems)
    else:
        name, known = source or f"{family}-cpu", presets()
        if name not in known:
            raise OptionError(f"there is no recipe {name}: give a TOML file or one of {', '.join(known)}")
        values = parse_toml((files("rsedge.training") / "recipes" / f"{name}.toml").read_text(encoding="utf-8"))
    if (stated := values.setdefault("family", family)) != family and stated in get_args(Family):
        raise OptionError(f"{source} is a recipe for {stated}, not for {family}: run rsedge train {stated}")
    for at, name, value in changes:
        try:
            place = _table(values, at)
        except OptionError as error:
            problems.append(str(error))
            continue
        if value == "":  # TOML has no word for nothing; a recipe leaves the key out
            place.pop(name, None)
        else:
            place[name] = value
    recipe = build(Recipe, values, "", problems.append)
    if problems or recipe is None:
        origin = f"recipe {source}" if source is not None else "the recipe"
        raise refusal(f"{origin} cannot be used:", problems)
    return recipe


def _take_unknown(values: dict[str, Any], problems: list[str]) -> None:
    """Remove the keys that no recipe has and report them as those of settings."""
    known = [(*at, name) for at, name, _ in _keys()]

    def take(table: dict[str, Any], at: tuple[str, ...]) -> None:
        for name in list(table):
            place = (*at, name)
            if place in known:
                continue
            if not any(key[: len(place)] == place for key in known):
                problems.append(_unknown(".".join(place)))
                del table[name]
            elif isinstance(table[name], dict):
                take(table[name], place)

    take(values, ())


def refusal(heading: str, problems: Sequence[str]) -> OptionError:
    """The error of a list of problems; one alone needs no heading."""
    return OptionError("\n".join([heading, *(f"  - {text}" for text in problems)]) if problems[1:] else problems[0])


def save_recipe(path: Path, recipe: Recipe) -> None:
    """Write the whole recipe, defaults included, so that it means the same when defaults change."""
    write_toml(path, to_dict(recipe))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested tables; what is None is left out, as TOML has no such value."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items() if entry is not None}
        return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    values: dict[str, Any] = plain(dataclasses.asdict(recipe))
    return values


def from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that :func:`to_dict` gave ``values`` for. Raises OptionError: as :func:`load_recipe`."""
    problems: list[str] = []
    recipe = build(Recipe, values, "", problems.append)
    if recipe is None:
        raise OptionError("; ".join(problems))
    return recipe


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with other values for dotted keys. Raises OptionError: an unknown key, or values not accepted."""
    values = to_dict(recipe)
    for key, value in settings.items():
        table, name = locate(key)
        _table(values, table)[name] = list(value) if isinstance(value, tuple) else value
    return from_dict(values)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differences(was: Mapping[str, Any], now: Mapping[str, Any], *, free: Sequence[str]) -> list[str]:
    """What differs between nested tables, a text for each dotted key that is not ``free``."""
    was, now = flat(was), flat(now)
    return [
        f"{key} was {was.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and key not in free
    ]


def keys() -> list[str]:
    """Every key a recipe has, ``table.name``."""
    return [".".join((*at, name)) for at, name, _ in _keys()]


def describe_keys() -> list[str]:
    """A line for each key: type, default and meaning, as the fields of the tables and the texts below them give."""
    lines = []
    for at, name, table in _keys():
        default = next(item.default for item in dataclasses.fields(table) if item.name == name)
        kind = describe_type(get_type_hints(table)[name]).replace(" or null", "").replace("an object", "a table")
        if isinstance(default, (str, int, float, tuple)):
            kind += f"; default {json.dumps(default)}"
        meaning = ""
        body = ast.parse(inspect.getsource(table)).body[0].body  # type: ignore[attr-defined]
        at_field = next(i for i, node in enumerate(body) if getattr(getattr(node, "target", None), "id", None) == name)
        for node in body[at_field + 1 :]:  # one text may stand for several fields
            if isinstance(node, ast.Expr):
                meaning = re.sub(r":\w+:`(?:[\w.]*\.)?(\w+)`", r"\1", ast.literal_eval(node.value))
                meaning = meaning.replace("``", "").replace("None:", "left out:")
                break
        lines.append(f"{'.'.join((*at, name))}  ({kind})  {' '.join(meaning.split())}")
    return lines


@functools.cache
def _keys(cls: Any = Recipe, at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str, Any]]:
    """(table, name, dataclass of the table) of every key."""
    found = []
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kinds = (hints[item.name], *get_args(hints[item.name]))
        inner = next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)
        found += _keys(inner, (*at, item.name)) if inner else [(at, item.name, cls)]
    return found


def locate(key: str) -> tuple[tuple[str, ...], str]:
    """Table and name of a dotted key, or of a name only one table has. Raises OptionError: no such key, or several."""
    *table, name = key.split(".")
    known = [entry[:2] for entry in _keys()]
    # A table such as model.config has open keys.
    free = any((tuple(table[:end]), table[end]) in known for end in range(len(table)))
    if free or (tuple(table), name) in known:
        return tuple(table), name
    homes = [entry for entry in known if entry[1] == name]
    if not table and len(homes) == 1:
        return homes[0]
    if not table and homes:
        raise OptionError(f"{key} is in several tables: say {' or '.join('.'.join((*at, name)) for at, name in homes)}")
    raise OptionError(_unknown(key))


def _unknown(key: str) -> str:
    known = [*keys(), *(".".join(at) for at, _, _ in _keys()), *(name for _, name, _ in _keys() if "." not in key)]
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "rsedge train --list-keys shows them all"
    return f"{key} is not a key of a recipe: {hint}"


def _table(values: dict[str, Any], table: Sequence[str]) -> dict[str, Any]:
    for end, name in enumerate(table, 1):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise OptionError(f"{'.'.join(table[:end])} is {values!r}, expected a table")
    return values


def parse_value(text: str) -> Any:
    """A value as TOML writes it; a word needs no quotes."""
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text.strip()
