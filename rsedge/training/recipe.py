"""A recipe: everything that decides what a training run does, as frozen dataclasses that mirror a TOML file.

Every table checks itself; what needs two tables to judge is checked by :class:`Recipe`. What stands here decides the
run to the last bit, together with the data and the versions of the libraries; where it runs (device, number of
processes, number of workers) does not enter. :mod:`rsedge.training.recipes` reads and writes the files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rsedge.errors import OptionError
from rsedge.training.data.augment import ImageAugmentation  # noqa: TC001 - read at run time, from the annotations
from rsedge.training.losses import RsdixSettings

Family = Literal["blip", "clip", "clipcap"]
Better = Literal["min", "max"]


class _Problems:
    """Collects what is wrong with a table and raises it all at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def unless(self, accepted: bool, problem: str) -> None:
        if not accepted:
            self.found.append(problem)

    def check(self) -> None:
        if self.found:
            raise OptionError("; ".join(self.found))


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """Which examples are trained on.

    Attributes:
        sources: Caption sets, as :func:`rsedge.datasets.load_examples` takes them; ``--data`` replaces them.
        fractions: Of train, val and test, for sets without a split column.
        limit: At most so many images of each split.
        skip_bad: Leave out records that cannot be used, instead of refusing to start.
        paraphrases: File of ``rsedge back-translate`` with other wordings of the captions.
        paraphrase_probability: How often one of them takes the place of its caption.
        workers: Processes that read and augment images; 0 reads in the training process. No result depends on it.
    """

    sources: tuple[str, ...] = ()
    fractions: tuple[float, ...] = (0.8, 0.1, 0.1)
    limit: int | None = None
    skip_bad: bool = False
    paraphrases: str | None = None
    paraphrase_probability: float = 0.0
    workers: int = 2

    def __post_init__(self) -> None:
        problems = _Problems()
        problems.unless(
            len(self.fractions) == 3 and min(self.fractions) >= 0 and abs(sum(self.fractions) - 1) < 1e-6,
            f"fractions are {list(self.fractions)}: give train, val and test, adding up to 1",
        )
        problems.unless(self.limit is None or self.limit > 0, f"limit is {self.limit}: give a number of images above 0")
        problems.unless(
            0 <= self.paraphrase_probability <= 1,
            f"paraphrase_probability is {self.paraphrase_probability}: give 0 to 1",
        )
        problems.unless(
            self.paraphrases is not None or self.paraphrase_probability == 0,
            f"paraphrase_probability is {self.paraphrase_probability} but there is no file of paraphrases: make one "
            f"with "
            "rsedge back-translate and name it in data.paraphrases, or set the probability to 0",
        )
        problems.unless(self.workers >= 0, f"workers is {self.workers}: give 0 or more")
        problems.check()


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """Which model is trained.

    Attributes:
        init: Hub id or folder to start from; None makes a random model from ``config``.
        revision: Branch, tag or commit of a hub id.
        config: Settings of the model's configuration class, by section (``vision``, ``text``, ``mapper``) or at its
            top: all of a random model's, changes to a loaded one's that do not alter a weight's shape (dropout, say).
        image_size: Pixels; position embeddings are interpolated. None: as in ``init``.
        tokenizer: Folder or hub id; ``captions`` learns a vocabulary from the training captions; None: as in ``init``.
        vocabulary_size: Of a vocabulary learnt from captions, at most.
        max_tokens: Longest caption in tokens, start and end included; longer ones are cut.
        freeze: Parts (``vision``, ``text``, …) or patterns of parameter names that keep their weights.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        encoder: CLIPCap only: hub id or folder of the CLIP or SigLIP model whose images are captioned.
        language_model: CLIPCap only: hub id or folder of the GPT-2.
    """

    init: str | None = None
    revision: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    tokenizer: str | None = None
    vocabulary_size: int = 8000
    max_tokens: int = 64
    freeze: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    encoder: str | None = None
    language_model: str | None = None

    def __post_init__(self) -> None:
        problems = _Problems()
        problems.unless(
            self.image_size is None or self.image_size > 0, f"image_size is {self.image_size}: give pixels above 0"
        )
        problems.unless(self.max_tokens > 2, f"max_tokens is {self.max_tokens}: give at least 3")
        problems.unless(self.vocabulary_size >= 32, f"vocabulary_size is {self.vocabulary_size}: give at least 32")
        problems.unless(
            self.revision is None or self.init is not None,
            f"revision is {self.revision} but there is no init it could belong to: set model.init or leave it out",
        )
        problems.check()


@dataclass(frozen=True, slots=True)
class OptimizerRecipe:
    """How weights are changed.

    Attributes:
        name: ``adamw`` or ``adafactor``.
        learning_rate: The highest of the schedule. With ``adafactor`` it is relative: a weight moves by it times the
            root mean square of its tensor.
        learning_rates: Other rates for parts or patterns of parameter names; the first that fits wins.
        weight_decay: Decoupled; not for biases and other vectors (norms, learnt scalars).
        betas, eps: Of AdamW.
        clip_norm: Gradients are scaled down to this norm; None leaves them.
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = 5e-5
    learning_rates: dict[str, float] = field(default_factory=dict)
    weight_decay: float = 0.01
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        problems = _Problems()
        for name, rate in {"learning_rate": self.learning_rate, **self.learning_rates}.items():
            problems.unless(rate > 0, f"{name} is {rate}: give a rate above 0")
        problems.unless(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}: give 0 or more")
        problems.unless(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas are {list(self.betas)}: give two numbers from 0 up to, not including, 1",
        )
        problems.unless(self.eps > 0, f"eps is {self.eps}: give a number above 0")
        problems.unless(
            self.clip_norm is None or self.clip_norm > 0,
            f"clip_norm is {self.clip_norm}: give a number above 0, or leave it out",
        )
        problems.unless(
            self.name == "adamw" or (self.betas == (0.9, 0.999) and self.eps == 1e-8),
            "betas and eps belong to adamw: leave them out with adafactor",
        )
        problems.check()


@dataclass(frozen=True, slots=True)
class ScheduleRecipe:
    """How the learning rate goes over the run.

    Attributes:
        name: ``constant``; ``linear`` or ``cosine`` (both fall to 0 at the last step); ``warmup`` (constant after the
            warm-up); ``plateau`` (multiplied by ``factor`` when the monitored value has not improved for ``patience``
            evaluations). Each after a linear warm-up.
        warmup_steps: Optimiser steps of the warm-up.
        start_factor: Share of the learning rate that the warm-up starts from.
        factor, patience: Of ``plateau``.
    """

    name: Literal["constant", "linear", "cosine", "warmup", "plateau"] = "linear"
    warmup_steps: int = 0
    start_factor: float = 0.0
    factor: float = 0.1
    patience: int = 1

    def __post_init__(self) -> None:
        problems = _Problems()
        problems.unless(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}: give 0 or more")
        problems.unless(0 <= self.start_factor <= 1, f"start_factor is {self.start_factor}: give 0 to 1")
        problems.unless(0 < self.factor < 1, f"factor is {self.factor}: give a number between 0 and 1")
        problems.unless(self.patience >= 0, f"patience is {self.patience}: give 0 or more")
        problems.unless(
            self.name != "warmup" or self.warmup_steps > 0, "the schedule warmup needs warmup_steps above 0"
        )
        problems.unless(
            self.warmup_steps > 0 or self.start_factor == 0,
            f"start_factor is {self.start_factor}, but there is no warm-up: set warmup_steps above 0, or leave it out",
        )
        problems.unless(
            self.name == "plateau" or (self.factor == 0.1 and self.patience == 1),
            f"factor and patience belong to the schedule plateau, not to {self.name}: leave them out",
        )
        problems.check()


@dataclass(frozen=True, slots=True)
class LoopRecipe:
    """How long, in which portions, and how closely watched.

    Attributes:
        epochs: Times every training image is seen (with all its captions for captioners, with one of them in turn for
            CLIP); images that do not fill a last batch are left out of the epoch, other ones each time.
        max_steps: Optimiser steps to stop after, within the epochs.
        batch_size: Images of one optimiser step, over all processes and accumulation steps.
        micro_batch_size: Images of one forward pass on one device; None: all of the process. The gradient is
            accumulated over ``batch_size / (micro_batch_size × processes)`` passes.
        mixed_precision: ``no``, ``fp16`` or ``bf16``.
        evaluate_every: Optimiser steps between evaluations; None: once per epoch.
        checkpoint_every: Optimiser steps between checkpoints; None: at every evaluation.
        monitor: The value that decides which checkpoint is best, the plateau and early stopping; one of
            :func:`monitors`.
        monitor_mode: Whether a smaller (``min``) or a larger (``max``) value is better.
        early_stopping: Evaluations without improvement after which the run ends; None: never.
        ema_decay: Average the weights over the steps and evaluate and save the average; None: do not.
        captions: Validation images that are captioned and scored at every evaluation; 0: none. Not for CLIP.
        log_every: Optimiser steps between lines in ``metrics.jsonl``.
    """

    epochs: int = 5
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    monitor: str = "val_loss"
    monitor_mode: Literal["min", "max"] = "min"
    early_stopping: int | None = None
    ema_decay: float | None = None
    captions: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        problems = _Problems()
        positive = ("epochs", "max_steps", "batch_size", "micro_batch_size", "evaluate_every", "checkpoint_every")
        for name in (*positive, "early_stopping", "log_every"):
            value = getattr(self, name)
            problems.unless(value is None or value > 0, f"{name} is {value}: give a whole number above 0")
        problems.unless(self.captions >= 0, f"captions is {self.captions}: give 0 or more")
        problems.unless(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"ema_decay is {self.ema_decay}: give a number between 0 and 1, or leave it out",
        )
        if self.micro_batch_size and self.micro_batch_size > 0:
            problems.unless(
                self.batch_size % self.micro_batch_size == 0,
                f"batch_size ({self.batch_size}) is not a multiple of micro_batch_size ({self.micro_batch_size})",
            )
        problems.check()


@dataclass(frozen=True, slots=True)
class CaptionObjective:
    """The loss of BLIP and CLIPCap: cross entropy on the tokens of every caption.

    Attributes:
        label_smoothing: Share of the target spread over the vocabulary; the validation loss is without it.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise OptionError(f"label_smoothing is {self.label_smoothing}: give 0 up to, not including, 1")


@dataclass(frozen=True, slots=True)
class ContrastiveObjective:
    """The loss of CLIP and SigLIP.

    Attributes:
        rsdix: Contrastive and distillation losses and their weights.
        teacher_decay: Of the EMA teacher.
        sbert: Hub id or folder of the Sentence-BERT that is the text teacher, or that SBS-MSE compares with.
    """

    rsdix: RsdixSettings = field(default_factory=lambda: RsdixSettings(teacher="none", alpha=1.0))
    teacher_decay: float = 0.999
    sbert: str | None = None

    def __post_init__(self) -> None:
        problems = _Problems()
        problems.unless(
            0 < self.teacher_decay < 1, f"teacher_decay is {self.teacher_decay}: give 0 to 1, both excluded"
        )
        problems.unless(
            self.rsdix.teacher != "sbert" or self.sbert is not None,
            "the teacher is sbert, but contrastive.sbert names none: give a Sentence-BERT's hub id or folder",
        )
        problems.check()


def monitors(family: Family, *, captions: int, contrastive: ContrastiveObjective) -> dict[str, Better | None]:
    """The values of an evaluation within a run, in their order, each with the better direction.

    Known from the recipe, so that a misspelt monitor is refused at once; computed by
    :class:`rsedge.training.validation.Validation`.

    Args:
        family: Of the recipe.
        captions: ``loop.captions``; without any a captioner has its loss alone.
        contrastive: The objective of clip; of no account for the others.

    Returns:
        Name → ``min`` or ``max``; None where neither is better, such as for the length of captions.
    """
    found: dict[str, Better | None] = {"val_loss": "min"}
    if family == "clip":
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
    elif captions:
        scores = (*(f"bleu_{n}" for n in range(1, 5)), "rouge_l", "cider_d")
        found |= {f"val_{score}": "max" for score in scores}
        found |= {"val_words": None, "val_distinct": None}
    return found


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole training run.

    Attributes:
        family: ``blip``, ``clip`` (SigLIP too) or ``clipcap``.
        seed: Of everything random: first weights, order, augmentation, dropout, splits.
        data, model, optimizer, schedule, loop: The tables.
        augmentation: Of training images; None: none.
        caption: Objective of blip and clipcap.
        contrastive: Objective of clip.

    Raises:
        OptionError: Values that are impossible or contradict each other, all of a table named at once.
    """

    family: Family
    seed: int = 0
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    augmentation: ImageAugmentation | None = None
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    loop: LoopRecipe = field(default_factory=LoopRecipe)
    caption: CaptionObjective | None = None
    contrastive: ContrastiveObjective | None = None

    def __post_init__(self) -> None:
        problems = _Problems()
        model = self.model
        captioner = self.family != "clip"
        problems.unless(self.seed >= 0, f"seed is {self.seed}: give 0 or more")
        problems.unless(
            self.contrastive is None or not captioner, f"[contrastive] belongs to clip, not to {self.family}: remove it"
        )
        problems.unless(
            self.caption is None or captioner, "[caption] belongs to blip and clipcap, not to clip: remove it"
        )
        problems.unless(
            captioner or self.loop.captions == 0,
            f"loop.captions is {self.loop.captions}, but clip writes no captions: 0",
        )
        known = monitors(
            self.family, captions=self.loop.captions, contrastive=self.contrastive or ContrastiveObjective()
        )
        monitor, mode = self.loop.monitor, self.loop.monitor_mode
        scores = ", or set loop.captions above 0 to score generated captions" * (captioner and not self.loop.captions)
        problems.unless(
            monitor in known,
            f"loop.monitor is {monitor}, but an evaluation gives {', '.join(known)}: choose one{scores}",
        )
        better = known.get(monitor) or mode
        problems.unless(
            better == mode,
            f"loop.monitor_mode is {mode}, but {monitor} is better the {'larger' if better == 'max' else 'smaller'} it "
            f"is: set loop.monitor_mode to {better}",
        )
        if self.family == "clipcap":
            parts = (model.encoder, model.language_model)
            problems.unless(
                model.init is None or parts == (None, None),
                "model.init is a whole CLIPCap; model.encoder and model.language_model are its parts: give one or "
                "the other",
            )
        else:
            problems.unless(
                model.encoder is None and model.language_model is None,
                f"model.encoder and model.language_model belong to clipcap, not to {self.family}: use model.init",
            )
        if model.tokenizer is None and model.init is None and model.language_model is None:
            problems.unless(
                False,
                "there is no tokenizer: model.init is not set, so set model.tokenizer to a folder, a hub id, or "
                "'captions' to learn one from the training captions",
            )
        problems.check()
