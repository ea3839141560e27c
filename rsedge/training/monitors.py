"""What an evaluation within a run gives, known from the recipe, so that a misspelt monitor is refused at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rsedge.training.recipe import ContrastiveObjective, Family

Better = Literal["min", "max"]


def monitors(family: Family, *, captions: int, contrastive: ContrastiveObjective) -> dict[str, Better | None]:
    """The values of :class:`rsedge.training.validation.Validation` in their order, each with the better direction.

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
