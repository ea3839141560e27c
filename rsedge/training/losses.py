"""Losses of captions and of contrastive training with RSDiX-CLIP's self-distillation, teacher weights, and monitors.

Embeddings are of unit length and of a whole batch, gathered from all processes: row i of the images and row i of the
texts belong together. Everything is computed in float32, under autocast too.

The soft targets of RSDiX-CLIP follow OTTER (Wu et al., "OTTER: Data Efficient Language-Supervised Zero-Shot Recognition
with Optimal Transport Distillation", 2021): the teacher's similarities are the negative cost of an optimal transport
between the images and the captions of a batch; the rows of its entropy-regularised plan, normalised, are the targets.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from rsedge.errors import OptionError

Teacher = Literal["none", "ema", "sbert"]

LOG_TEMPERATURE = 3.9
"""Where the learnt temperature of the distillation starts, before exp."""
SIGMOID_LOG_TEMPERATURE, SIGMOID_BIAS = math.log(10), -10.0
"""Where the learnt scalars of the sigmoid loss start (Zhai et al., "Sigmoid Loss for Language Image Pre-Training")."""

IGNORED = -100
"""The label of a token that is not learnt."""

_TEMPERATURE_RANGE = (1.0, 100.0)
_SHAPING = ("sinkhorn_lambda", "iterations", "ii_coeff", "tt_coeff", "remove_diag")  # settings of teacher_targets
_DIAGONAL = 1e2  # what remove_diag subtracts: far more than any cosine similarity


def similarities(first: Tensor, second: Tensor) -> Tensor:
    """Dot products of all rows, float [M, D] and [N, D] → [M, N], in float32 (or float64) under autocast too."""
    with torch.autocast(first.device.type, enabled=False):
        return at_least_float32(first) @ at_least_float32(second).T


def at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor``, or its float32 copy where it is of half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's loss, a scalar: the cross entropy of images over all texts, and of texts over all images, averaged.

    Args:
        image, text: float [N, D], of unit length.
        logit_scale: Scalar, already exponentiated.
    """
    logits = similarities(image, text) * logit_scale
    labels = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2


def sigmoid_loss(image: Tensor, text: Tensor, log_temperature: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss: a binary decision for each of the N² pairs.

    Args:
        image, text: float [N, D], of unit length.
        log_temperature, bias: Scalars; the logit of a pair is cosine · exp(log_temperature) + bias.

    Returns:
        The sum over the N² pairs divided by N, a scalar.
    """
    logits = similarities(image, text) * log_temperature.exp() + bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -functional.logsigmoid(signs * logits).sum(dim=1).mean()


def sinkhorn(cost: Tensor, *, regulariser: float = 0.1, iterations: int = 4) -> Tensor:
    """The transport plan of ``cost`` after some Sinkhorn iterations, its rows scaled to sum 1.

    It starts from exp(−cost / regulariser); each iteration scales every row to 1/m, then every column to 1/n. The work
    is done on logarithms, which gives the same numbers but neither overflows nor loses a row where costs are large.

    Args:
        cost: float [m, n].
        regulariser: λ > 0; the smaller, the sharper the plan.
        iterations: At least 0.

    Returns:
        [m, n], of float32 or float64; each row sums to 1.
    """
    # The sums 1/m, 1/n and that of the start are factors common to all; the last scaling would take them out.
    plan = at_least_float32(cost) / -regulariser
    for _ in range(iterations):
        plan = plan - plan.logsumexp(dim=1, keepdim=True)
        plan = plan - plan.logsumexp(dim=0, keepdim=True)
    return plan.softmax(dim=1)


@torch.no_grad()
def teacher_targets(
    image: Tensor,
    text: Tensor,
    *,
    ii_coeff: float = 1.0,
    tt_coeff: float = 1.0,
    remove_diag: bool = False,
    sinkhorn_lambda: float = 0.1,
    iterations: int = 4,
) -> tuple[Tensor, Tensor]:
    """Targets of the student's softmax over captions, and over images; no gradient flows back.

    Args:
        image, text: The teacher's embeddings, float [N, D], of unit length; row i of each belong together.
        ii_coeff, tt_coeff: Weights of the similarities among images, and among captions.
        remove_diag: Subtract 100 from the similarity of each image, and each caption, to itself, so that pairs are no
            target by identity alone.
        sinkhorn_lambda, iterations: See :func:`sinkhorn`.

    Returns:
        Targets of the images (over captions) and of the captions (over images), each [N, N] with rows of sum 1.
    """
    ii, tt, it = similarities(image, image), similarities(text, text), similarities(image, text)
    if remove_diag:
        diagonal = _DIAGONAL * torch.eye(len(ii), dtype=ii.dtype, device=ii.device)
        ii, tt = ii - diagonal, tt - diagonal
    among = ii * ii_coeff + tt * tt_coeff
    settings: dict[str, Any] = {"regulariser": sinkhorn_lambda, "iterations": iterations}
    return sinkhorn(-(among + it), **settings), sinkhorn(-(among + it.T), **settings)


def distillation_loss(
    image: Tensor, text: Tensor, image_targets: Tensor, text_targets: Tensor, log_temperature: Tensor
) -> Tensor:
    """Divergence of the student from the teacher's targets.

    Args:
        image, text: The student's embeddings, float [N, D], of unit length.
        image_targets, text_targets: Of :func:`teacher_targets`, [N, N].
        log_temperature: Scalar t; the temperature is exp(t), kept within 1 to 100.

    Returns:
        KL(targets ‖ softmax(cosine · temperature)), the mean over the batch, averaged over images and texts.
    """
    logits = similarities(image, text) * log_temperature.exp().clamp(*_TEMPERATURE_RANGE)
    image_part, text_part = (
        functional.kl_div(rows.log_softmax(dim=1), targets.to(rows.dtype), reduction="batchmean")
        for rows, targets in ((logits, image_targets), (logits.T, text_targets))
    )
    return (image_part + text_part) / 2


def caption_loss_sum(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The cross entropy of caption tokens, added up, float32 [].

    Args:
        logits: [rows, T, V]; position t is the prediction of token t.
        labels: int64 [rows, T]; −100 where nothing is to be predicted.
        label_smoothing: Share of the target spread evenly over the vocabulary.
    """
    return functional.cross_entropy(
        logits.float().flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


@dataclass(frozen=True, slots=True)
class RsdixSettings:
    """The losses that train a CLIP or SigLIP, and the making of its teacher's targets.

    The defaults are RSDiX-CLIP's. Plain CLIP is ``alpha=1, teacher="none"``; RSDiX-SigLIP is that with
    ``use_sigmoid_loss=True``. A setting without effect is refused.

    Raises:
        OptionError: Every value that is not accepted, else the first contradiction.
    """

    alpha: float = 0.5
    """Share of the contrastive loss, 0 to 1; the distillation has the rest."""
    sinkhorn_lambda: float = 0.1
    """Entropy of the teacher's targets (Sinkhorn); larger ones are smoother."""
    iterations: int = 4
    """Of Sinkhorn."""
    ii_coeff: float = 1.0
    """Weight of the teacher's similarities between images."""
    tt_coeff: float = 1.0
    """Weight of the teacher's similarities between texts."""
    remove_diag: bool = False
    """Leave out the similarity of each with itself."""
    use_sigmoid_loss: bool = False
    """The sigmoid loss takes the place of both."""
    teacher: Teacher = "ema"
    """Whose embeddings make the targets: ``none``; ``ema``, a moving average of the student; ``sbert``, that average
    for images and a frozen Sentence-BERT, with a learnt projection, for texts."""

    def __post_init__(self) -> None:
        values = [
            (self.teacher in get_args(Teacher), "teacher", f"one of {', '.join(get_args(Teacher))}"),
            (0 <= self.alpha <= 1, "alpha", "0 to 1"),
            (0 < self.sinkhorn_lambda < math.inf, "sinkhorn_lambda", "a number above 0, such as 0.1"),
            (self.iterations >= 0, "iterations", "0 or more, such as 4"),
            (math.isfinite(self.ii_coeff), "ii_coeff", "a finite number"),
            (math.isfinite(self.tt_coeff), "tt_coeff", "a finite number"),
        ]
        problems = [f"{name} is {getattr(self, name)!r}, expected {text}" for holds, name, text in values if not holds]
        plain = self.teacher == "none"
        changed = [
            item.name for item in fields(self) if item.name in _SHAPING and getattr(self, item.name) != item.default
        ]
        contradictions = [
            (
                self.use_sigmoid_loss and not (plain and self.alpha == 1),
                "use_sigmoid_loss takes the place of the contrastive loss and of the distillation, so it goes with "
                f"teacher 'none' and alpha 1 (teacher is {self.teacher!r}, alpha {self.alpha}): set those, or leave it "
                "out",
            ),
            (
                plain and self.alpha != 1,
                f"alpha is {self.alpha}, but with teacher 'none' nothing is distilled: set alpha 1 or name a teacher",
            ),
            (
                not plain and self.alpha == 1,
                f"alpha is 1, so nothing is learnt from teacher {self.teacher!r}: set alpha below 1 or teacher 'none'",
            ),
            (
                plain and bool(changed),
                f"{', '.join(changed)} only shape a teacher's targets, and teacher is 'none': name one or leave it out",
            ),
        ]
        problems = problems or [text for wrong, text in contradictions if wrong][:1]
        if problems:
            raise OptionError("; ".join(problems))


class RsdixLoss(nn.Module):
    """The whole objective, with the scalars and the projection it learns.

    Total: α · contrastive + (1 − α) · distillation, or the sigmoid loss alone.

    With teacher ``sbert``, texts are embedded by ``projection``, one linear layer from Sentence-BERT's width to CLIP's,
    and scaled to unit length. The targets carry no gradient, for a target that may follow the student is met by
    becoming uniform; so the distillation cannot teach the projection. It learns from a contrastive loss of its own
    between its texts and the student's images, in which image embeddings and scale are constants: the student's
    gradient is that of the total alone. The value is ``projection`` in the result and part of ``loss``.

    Args:
        settings: What to compute.
        sbert_width, width: Of Sentence-BERT's and CLIP's embeddings; for teacher ``sbert``, and only then.

    Attributes:
        log_temperature: float32 scalar of the distillation; absent without a teacher.
        sigmoid_log_temperature, sigmoid_bias: float32 scalars, with ``use_sigmoid_loss`` alone.
        projection: ``nn.Linear(sbert_width, width)``, with teacher ``sbert`` alone.
    """

    def __init__(self, settings: RsdixSettings, *, sbert_width: int | None = None, width: int | None = None) -> None:
        super().__init__()
        self.settings = settings
        if settings.use_sigmoid_loss:
            self.sigmoid_log_temperature = nn.Parameter(torch.tensor(SIGMOID_LOG_TEMPERATURE))
            self.sigmoid_bias = nn.Parameter(torch.tensor(SIGMOID_BIAS))
        if settings.teacher != "none":
            self.log_temperature = nn.Parameter(torch.tensor(LOG_TEMPERATURE))
        if (settings.teacher == "sbert") != (sbert_width is not None and width is not None):
            raise OptionError(
                f"teacher is {settings.teacher!r}, sbert_width {sbert_width}, width {width}: give both widths for "
                "teacher 'sbert', and neither for another"
            )
        if sbert_width is not None and width is not None:
            self.projection = nn.Linear(sbert_width, width)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor | None,
        teacher_image: Tensor | None = None,
        teacher_text: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch and its parts.

        Args:
            image, text: The student's embeddings, float [N, D], of unit length.
            logit_scale: CLIP's, a scalar already exponentiated; None with the sigmoid loss, which has its own.
            teacher_image: The teacher's, [N, D], of unit length; None without a teacher.
            teacher_text: Likewise; with teacher ``sbert`` its raw embeddings, [N, sbert_width].

        Returns:
            Scalars: ``loss``, to be minimised, and its parts of ``contrastive``, ``distillation``, ``projection`` and
            ``sigmoid``.

        Raises:
            ValueError: An input that the settings need is None, or one that they do not use is given.
        """
        settings, distils = self.settings, self.settings.teacher != "none"
        if (logit_scale is None) != settings.use_sigmoid_loss:
            raise ValueError(
                "logit_scale belongs to the contrastive loss: give it there, and None for the sigmoid loss"
            )
        if logit_scale is None:
            sigmoid = sigmoid_loss(image, text, self.sigmoid_log_temperature, self.sigmoid_bias)
            return {"loss": sigmoid, "sigmoid": sigmoid}
        if (teacher_image is not None, teacher_text is not None) != (distils, distils):
            raise ValueError(
                f"teacher is {settings.teacher!r}: give both of its embeddings, or none where there is none"
            )
        contrastive = contrastive_loss(image, text, logit_scale)
        if teacher_image is None or teacher_text is None:
            return {"loss": contrastive, "contrastive": contrastive}

        parts = {}
        if settings.teacher == "sbert":
            with torch.autocast(teacher_text.device.type, enabled=False):
                teacher_text = functional.normalize(self.projection(at_least_float32(teacher_text)), dim=1)
            parts["projection"] = contrastive_loss(image.detach(), teacher_text, logit_scale.detach())
        targets = teacher_targets(teacher_image, teacher_text, **{name: getattr(settings, name) for name in _SHAPING})
        distillation = distillation_loss(image, text, *targets, self.log_temperature)
        loss = settings.alpha * contrastive + (1 - settings.alpha) * distillation + sum(parts.values())
        return {"loss": loss, "contrastive": contrastive, "distillation": distillation, **parts}


def ema_decay(step: int, decay: float = 0.999) -> float:
    """The share of the average to keep at update ``step`` = 1, 2, …: little at first, ``decay`` later."""
    return min(decay, (1 + step) / (10 + step))


class ExponentialAverage(nn.Module):
    """The moving average of a module's parameters: RSDiX's teacher, or smoother weights to evaluate.

    A copy of the module, in float32, in evaluation mode and without gradients. ``state_dict`` holds its weights and the
    number of updates.

    Args:
        module: What to average; copied.
        decay: Kept of the average at each update, once :func:`ema_decay` has warmed up; 0 to 1.

    Attributes:
        module: The averaged copy. Calling the average calls it.
        steps: Updates so far, int64 scalar.
    """

    steps: Tensor

    def __init__(self, module: nn.Module, *, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise OptionError(f"decay is {decay}, expected 0 to 1, such as 0.999")
        self.decay = decay
        self.module = copy.deepcopy(module).float().requires_grad_(False).eval()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._step = 0  # on the host, so that an update does not wait for the device
        self.register_load_state_dict_post_hook(_resume)  # type: ignore[no-untyped-call]
        self.eval()

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Move the average towards ``source``, a module of the same layout on the same device; buffers are copied."""
        self._step += 1
        self.steps.fill_(self._step)
        share = 1 - ema_decay(self._step, self.decay)
        for average, value in zip(self.module.parameters(), source.parameters(), strict=True):
            average.lerp_(value.to(average.dtype), share)
        for kept, buffer in zip(self.module.buffers(), source.buffers(), strict=True):
            kept.copy_(buffer)

    def train(self, mode: bool = True) -> ExponentialAverage:  # noqa: ARG002
        """Stay in evaluation mode: a teacher has no dropout."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the averaged module gives."""
        return self.module(*args, **kwargs)


def _resume(average: nn.Module, _: object) -> None:
    """After weights were loaded: go on counting from their step."""
    assert isinstance(average, ExponentialAverage)
    average._step = int(average.steps)


@torch.no_grad()
def in_batch_accuracy(image: Tensor, text: Tensor) -> Tensor:
    """Mean share of images and of texts whose counterpart is the most similar; float [N, D] of unit length."""
    scores = similarities(image, text)
    labels = torch.arange(len(scores), device=scores.device)
    found = (scores.argmax(dim=1) == labels).float().mean() + (scores.argmax(dim=0) == labels).float().mean()
    return found / 2


@torch.no_grad()
def similarity_mse(image: Tensor, text: Tensor, sbert: Tensor) -> Tensor:
    """SBS-MSE: the mean squared error of image–image, image–text and text–text cosine similarities to Sentence-BERT's.

    Args:
        image, text: float [N, D]; of any length.
        sbert: Sentence-BERT's embeddings of the same texts, float [N, S]; of any length.
    """
    image, text, sbert = (functional.normalize(at_least_float32(rows), dim=1) for rows in (image, text, sbert))
    wanted = similarities(sbert, sbert)
    pairs = ((image, image), (image, text), (text, text))
    return torch.stack([functional.mse_loss(similarities(*pair).to(wanted.dtype), wanted) for pair in pairs]).mean()
