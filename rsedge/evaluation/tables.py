"""Reports as lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsedge.evaluation.captions import CaptionReport
    from rsedge.evaluation.embeddings import RetrievalReport, ZeroShotReport
    from rsedge.metrics.compare import Comparison
    from rsedge.metrics.retrieval import Direction

_WORST = 5


def caption_lines(report: CaptionReport) -> list[str]:
    """Scores beside the baselines', then what the captions look like."""
    names = list(report.baselines)
    head = ["metric", "value", "mean of images", *(name.replace("_", " ") for name in names), "computed by"]
    rows = [
        [
            metric,
            f"{score.value:.4f}",
            f"{score.mean_of_images:.4f}",
            *(f"{report.baselines[name].scores[metric].value:.4f}" for name in names),
            f"{score.library} {score.version}; {score.tokenizer}",
        ]
        for metric, score in report.scores.scores.items()
    ]
    text = [
        ["", "captions", "words", "sd", "vocabulary", "unseen words", "distinct", "most frequent"],
        *(
            [
                name,
                str(part.captions),
                f"{part.words_mean:.2f}",
                f"{part.words_sd:.2f}",
                str(part.vocabulary),
                "-" if part.unseen_share is None else f"{part.unseen_share:.2%}",
                f"{part.distinct_share:.1%}",
                f"{part.most_frequent_share:.1%}",
            ]
            for name, part in (("predictions", report.predictions), ("references", report.references))
        ),
    ]
    missing = [f"{metric} left out: {reason}" for metric, reason in report.scores.missing.items()]
    return [*aligned([head, *rows]), "", *aligned(text), *([""] if missing else []), *missing]


def zero_shot_lines(report: ZeroShotReport) -> list[str]:
    """Top-k accuracy, and the classes that went worst."""
    scores = report.scores
    rows = [[f"top-{k}", f"{value:.4f}"] for k, value in scores.top.items()]
    rows += [["mean per class", f"{scores.mean_per_class:.4f}"], ["chance", f"{1 / len(scores.labels):.4f}"]]
    worst = sorted(scores.per_class.items(), key=lambda item: (item[1], item[0]))[:_WORST]
    listed = ", ".join(f"{label} {share:.0%}" for label, share in worst)
    return [*aligned(rows), f"worst of {len(scores.labels)} classes: {listed}"]


def retrieval_lines(report: RetrievalReport) -> list[str]:
    """Recall both ways beside chance."""
    scores, chance = report.scores, report.chance
    ks = list(scores.image_to_text.recall)

    def row(name: str, direction: Direction) -> list[str]:
        rank = "-" if direction.median_rank is None else f"{direction.median_rank:g}"
        return [name, *(f"{direction.recall[k]:.4f}" for k in ks), rank]

    rows = [
        ["", *(f"R@{k}" for k in ks), "median rank"],
        row("image → text", scores.image_to_text),
        row("  chance", chance.image_to_text),
        row("text → image", scores.text_to_image),
        row("  chance", chance.text_to_image),
    ]
    return [*aligned(rows), f"mean recall {scores.mean_recall:.4f} (chance {chance.mean_recall:.4f})"]


def comparison_lines(found: Mapping[str, Comparison]) -> list[str]:
    """A, B and their difference with its interval and p-values."""
    confidence = next(iter(found.values())).confidence
    head = ["metric", "A", "B", "B - A", f"{confidence:.0%} interval", "t-test p", "Wilcoxon p", "better", "worse"]
    rows = [
        [
            name,
            f"{item.a:.4f}",
            f"{item.b:.4f}",
            f"{item.difference:+.4f}",
            f"{item.low:+.4f} to {item.high:+.4f}",
            f"{item.t_test_p:.2g}",
            f"{item.wilcoxon_p:.2g}",
            str(item.better),
            str(item.worse),
        ]
        for name, item in found.items()
    ]
    return [*aligned([head, *rows]), "BLEU of the corpus, the others as means over images"]


def sensitivity_lines(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Share of each metric that is left after each perturbation."""
    metrics = list(next(iter(found.values())))
    rows = [
        [kind, *("-" if part[name]["kept"] is None else f"{part[name]['kept']:.1%}" for name in metrics)]
        for kind, part in found.items()
    ]
    return aligned([["kept after", *metrics], *rows])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with columns of equal width: the first to the left, the others to the right, but for a last one
    of words.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    words = len(rows) > 1 and rows[1][-1][:1].isalpha()
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        if words and len(row) > 1:
            cells[-1] = row[-1]
        lines.append("  ".join(cells).rstrip())
    return lines
