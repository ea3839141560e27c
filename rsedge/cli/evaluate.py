"""``rsedge evaluate``: score a checkpoint, a bundle or a file of predictions."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rsedge.cli import options
from rsedge.cli.say import image_progress, note, say, warn

if TYPE_CHECKING:
    from rsedge.datasets.examples import CaptionData, Example
    from rsedge.evaluation.predictions import Prediction

SOME_FAILED = 3
SPLITS = ("train", "val", "test")
_METRICS = "bleu, meteor, rouge_l, cider_d, spice, sbert"

_sources = options.option("--data", "sources", multiple=True, help="Data set; may be repeated.")
_val_fraction = options.option(
    "--val-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of the training images that are val, as in training, for sets with splits but without val.",
)
_limit = options.option("--limit", type=options.AT_LEAST_1, help="Largest number of images of the split.")
_skip_bad = options.option(
    "--skip-bad", is_flag=True, help="Skip bad records, with a warning each, and count unreadable images as failed."
)
_output = options.option("-o", "--output", type=options.NEW_FILE, help="Write the report to this file as JSON.")
_metrics = options.option("--metrics", help=f"Some of {_METRICS}, separated by commas.  [default: all that work here]")
_tokenizer = options.option(
    "--tokenizer",
    type=click.Choice(["treebank", "ptb"]),
    default="treebank",
    help="Tokenizer for captions; ptb needs Java.",
)
_sbert = options.option("--sbert", help="Sentence-BERT model for the metric sbert: folder or hub id.")


def _split(default: str) -> Callable[[options.Decorated], options.Decorated]:
    return options.option("--split", type=click.Choice(SPLITS), default=default, help="Split to evaluate.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """The options that most of the commands have."""

    output: Path | None
    as_json: bool
    sources: tuple[str, ...] = ()
    split: str = ""
    limit: int | None = None
    val_fraction: float | None = None
    skip_bad: bool = False
    device: str = "cpu"
    threads: int | None = None
    batch_size: int | None = None

    @property
    def engine(self) -> dict[str, Any]:
        """The options that open a model."""
        return {"device": self.device, "threads": self.threads, "batch_size": self.batch_size}

    def load(self) -> CaptionData:
        """Load the split of the caption set. With ``skip_bad`` an undecodable image stays and counts as failed."""
        from rsedge.datasets.layouts import load_examples

        chosen: dict[str, Any] = {"limit": self.limit, "splits": (self.split,), "skip_bad": self.skip_bad}
        chosen["val_fraction"] = self.val_fraction or 0.0
        data = load_examples(self.sources, check=not self.skip_bad, progress=note, **chosen)
        for record in data.bad:
            warn(f"left out: {record}")
        return data

    def about(self, left_out: Any) -> dict[str, Any]:
        """Return the data set for the report."""
        return {"sources": list(self.sources), "split": self.split, "limit": self.limit, "left_out": left_out}

    def title(self, name: str, counted: str) -> str:
        """Return the first line of the report."""
        return f"{name}: {counted}" + (f" of {', '.join(self.sources)}, split {self.split}" if self.sources else "")

    def finish(self, values: dict[str, Any], lines: Sequence[str], failed: dict[str, str]) -> int:
        """Write and print the report and return the exit code."""
        from rsedge.errors import OutputError
        from rsedge.files import write_text

        text = json.dumps(values, allow_nan=False)
        if self.output is not None:
            try:
                write_text(self.output, text + "\n")
            except OSError as error:
                raise OutputError(f"cannot write {self.output}: {error.strerror or error}") from error
        say(text if self.as_json else "\n".join(lines))
        for key, reason in failed.items():
            warn(f"failed: {key}: {reason}")
        return SOME_FAILED if failed else 0


def _filled(function: Callable[..., int]) -> Callable[..., int]:
    """Wrap the callback of a command: it gets its options of :class:`_Given` as one object."""

    @functools.wraps(function)
    def call(**values: Any) -> int:
        return function(_Given(**options.take(values, [field.name for field in fields(_Given)])), **values)

    return call


@click.group("evaluate")
def command() -> None:
    """Score a MODEL, a checkpoint (with torch) or a bundle (without torch), with the metrics of the field.

    MODEL is a bundle, a checkpoint folder, the folder of a training run (its best checkpoint) or a hub id. The exit
    code is 3 if some images failed; they count as wrong.
    """


@command.command("captions")
@click.argument("model", required=False)
@_sources
@_split("test")
@_limit
@_val_fraction
@_skip_bad
@options.option("--from", "predicted", type=options.OLD_FILE, help="Score this file of predictions instead of a model.")
@options.option(
    "--predictions",
    type=options.NEW_FILE,
    help="Write the captions to this file: JSON lines, or COCO results if it ends in .json.",
)
@options.generation
@_metrics
@_tokenizer
@_sbert
@options.option("--baselines/--no-baselines", default=True, help="Score fixed training captions too.")
@_output
@options.as_json
@options.device
@options.threads
@options.batch_size
@_filled
def captions(
    given: _Given,
    *,
    model: str | None,
    predicted: Path | None,
    predictions: Path | None,
    metrics: str | None,
    tokenizer: Any,
    sbert: str | None,
    baselines: bool,
    **generation: Any,
) -> int:
    """Caption the images of a data set and score the captions.

    With --from FILE the command reads the captions from a file. --data then provides the references, unless the file
    contains them; an image without a prediction gets an empty caption.
    """
    if (model is None) == (predicted is None):
        raise click.UsageError("give either a MODEL or a file of predictions with --from")
    if model is not None and not given.sources:
        raise click.UsageError("evaluating a MODEL needs --data")
    if predicted is not None:
        if named := options.given([*generation, "threads", "batch_size"]):
            raise click.UsageError(f"--from reads captions and computes none: leave out {', '.join(named)}")
        if not given.sources and (named := options.given(["split", "limit", "skip_bad", "baselines"])):
            raise click.UsageError(f"{', '.join(named)} need --data: give it, or leave them out")
        if sbert is None and options.given(["device"]):
            raise click.UsageError("with --from only --sbert uses --device: leave it out")
    from rsedge.evaluation.captions import predict_captions, score_predictions
    from rsedge.evaluation.models import open_captioner
    from rsedge.evaluation.predictions import check_outputs, read_predictions, with_references, write_predictions
    from rsedge.evaluation.tables import caption_lines
    from rsedge.metrics.captions import check_metrics

    chosen = _names(metrics)
    check_metrics(chosen, sbert=sbert, tokenizer=tokenizer)  # before captioning for an hour
    check_outputs(given.output, predictions)
    found: Sequence[Prediction]
    about: dict[str, Any] | None = None
    captioner = None
    if model is not None:
        captioner = open_captioner(model, **given.engine, **generation)
        about = captioner.info.to_dict()
    data = given.load() if given.sources else None
    if captioner is not None:
        assert data is not None
        with image_progress() as progress:
            found = predict_captions(captioner, data.examples, skip_bad=given.skip_bad, progress=progress)
    else:
        assert predicted is not None
        found = read_predictions(predicted)
        if data is not None:
            found = with_references(found, {example.key: example.captions for example in data.examples})
    if predictions is not None:
        write_predictions(predictions, found)
    report = score_predictions(
        found,
        metrics=chosen,
        tokenizer=tokenizer,
        sbert=sbert,
        device=given.device if given.device.startswith("cuda") else "cpu",  # a GPU only if the user names one
        training_captions=_training_captions(given.sources) if baselines and given.sources else (),
    )
    values = {
        "task": "captions",
        "model": about,
        "predictions": None if predicted is None else str(predicted),
        "data": given.about([str(record) for record in data.bad]) if data else None,
        **report.to_dict(),
    }
    title = given.title(about["name"] if about else str(predicted), f"{report.scores.images} images")
    return given.finish(values, [title, *caption_lines(report)], report.failed)


@command.command("zero-shot")
@click.argument("model")
@options.option("--data", "source", required=True, help="Class folders, or a caption set with classes.")
@_split("test")
@_limit
@_val_fraction
@_skip_bad
@options.option("--labels", help="File with a class per line, or classes with commas.  [default: classes of the data]")
@options.option(
    "--template", "templates", multiple=True, metavar="TEXT", help="Prompt with {category}; several are averaged."
)
@options.option("--ensemble", is_flag=True, help="Average five wordings of the prompt.")
@_output
@options.as_json
@options.device
@options.threads
@options.batch_size
@_filled
def zero_shot(
    given: _Given, *, model: str, source: str, labels: str | None, templates: tuple[str, ...], ensemble: bool
) -> int:
    """Classify images by their most similar prompt and score the classes.

    The default prompt is "An aerial photograph of {category}". All images of class folders belong to the split test.
    """
    from rsedge.evaluation.embeddings import classes_of, evaluate_zero_shot
    from rsedge.evaluation.models import open_embedder
    from rsedge.evaluation.predictions import check_outputs
    from rsedge.evaluation.tables import zero_shot_lines
    from rsedge.runtime.prompts import ENSEMBLE, TEMPLATES, read_labels

    if ensemble and templates:
        raise click.UsageError("--ensemble has its own templates: leave --template out")
    check_outputs(given.output)
    classes = None if labels is None else read_labels(labels)
    embedder = open_embedder(model, **given.engine)
    given = replace(given, sources=(source,))
    examples, left_out = _load_labelled(source, given)
    if classes is None and given.limit is not None:
        classes = classes_of(source, given.split)
    with image_progress() as progress:
        report = evaluate_zero_shot(
            embedder,
            examples,
            labels=classes,
            templates=ENSEMBLE if ensemble else templates or TEMPLATES,
            skip_bad=given.skip_bad,
            progress=progress,
        )
    about = embedder.info.to_dict()
    values = {"task": "zero-shot", "model": about, "data": given.about(left_out), **report.to_dict()}
    title = given.title(about["name"], f"{report.scores.images} images")
    return given.finish(values, [title, *zero_shot_lines(report)], report.failed)


@command.command("retrieval")
@click.argument("model")
@_sources
@_split("test")
@_limit
@_val_fraction
@_skip_bad
@_output
@options.as_json
@options.device
@options.threads
@options.batch_size
@_filled
def retrieval(given: _Given, *, model: str) -> int:
    """Retrieve captions by image and images by caption; score recall at 1, 5 and 10 and the median rank.

    Ties count against the model, so images with the same caption cannot all rank it first.
    """
    if not given.sources:
        raise click.UsageError("evaluating a MODEL needs --data")
    from rsedge.evaluation.embeddings import evaluate_retrieval
    from rsedge.evaluation.models import open_embedder
    from rsedge.evaluation.predictions import check_outputs
    from rsedge.evaluation.tables import retrieval_lines

    check_outputs(given.output)
    embedder = open_embedder(model, **given.engine)
    data = given.load()
    with image_progress() as progress:
        report = evaluate_retrieval(embedder, data.examples, skip_bad=given.skip_bad, progress=progress)
    about = embedder.info.to_dict()
    left_out = [str(record) for record in data.bad]
    values = {"task": "retrieval", "model": about, "data": given.about(left_out), **report.to_dict()}
    title = given.title(about["name"], f"{report.images} images, {report.captions} captions")
    return given.finish(values, [title, *retrieval_lines(report)], report.failed)


@command.command("compare")
@click.argument("a", type=options.OLD_FILE)
@click.argument("b", type=options.OLD_FILE, required=False)
@_metrics
@_tokenizer
@_sbert
@options.option("--resamples", type=click.IntRange(min=100), default=2000, help="Bootstrap samples of images.")
@options.option(
    "--confidence",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.95,
    help="Confidence of the intervals.",
)
@options.option("--sensitivity", is_flag=True, help="Score perturbed captions of A too; the default without B.")
@options.option("--seed", type=options.AT_LEAST_0, default=0, help="Random seed.")
@_output
@options.as_json
@_filled
def compare(
    given: _Given,
    *,
    a: Path,
    b: Path | None,
    metrics: str | None,
    tokenizer: Any,
    sbert: str | None,
    resamples: int,
    confidence: float,
    sensitivity: bool,
    seed: int,
) -> int:
    """Test whether predictions B are better than predictions A, image by image: paired t-test, Wilcoxon, bootstrap.

    A and B are files of evaluate captions --predictions, for the same images. With A alone, or with --sensitivity, the
    command shows the drop of each metric for perturbed captions of A.
    """
    if b is None and (named := options.given(["resamples", "confidence"])):
        raise click.UsageError(f"{', '.join(named)} need B: give it, or leave them out")
    from rsedge.evaluation.captions import compare_predictions
    from rsedge.evaluation.predictions import check_outputs, read_predictions
    from rsedge.evaluation.tables import comparison_lines, sensitivity_lines
    from rsedge.metrics.captions import score_captions
    from rsedge.metrics.compare import sensitivity as spoil

    check_outputs(given.output)
    first, chosen = read_predictions(a), _names(metrics)
    settings: dict[str, Any] = {"metrics": chosen, "tokenizer": tokenizer, "sbert": sbert}
    values: dict[str, Any] = {"task": "compare", "a": str(a), "b": None if b is None else str(b)}
    lines: list[str] = []
    captions_of_a = [prediction.caption for prediction in first]
    references = [prediction.references for prediction in first]
    if b is not None:
        found, whole, other = compare_predictions(
            first, read_predictions(b), resamples=resamples, confidence=confidence, seed=seed, **settings
        )
        comparisons = {name: item.to_dict() for name, item in found.items()}
        values |= {"comparison": comparisons, "a_scores": whole.to_dict(), "b_scores": other.to_dict()}
        lines += [f"A {a}, B {b}: {whole.images} images", *comparison_lines(found)]
    else:
        whole = score_captions(captions_of_a, references, **settings)
        values["a_scores"] = whole.to_dict()
    if sensitivity or b is None:
        spoilt = spoil(captions_of_a, references, seed=seed, original=whole, **settings)
        values["sensitivity"] = spoilt
        lines += ["" if lines else f"{a}: {whole.images} images", *sensitivity_lines(spoilt)]
    lines += [f"{metric} left out: {reason}" for metric, reason in whole.missing.items()]
    return given.finish(values, lines, {})


def _load_labelled(source: str, given: _Given) -> tuple[tuple[Example, ...], str | None]:
    """Load the split of a set with classes; return it with the skipped records as text."""
    from rsedge.datasets.layouts import load_labelled
    from rsedge.errors import OptionError

    settings: dict[str, Any] = {"limit": given.limit, "splits": (given.split,), "check": not given.skip_bad}
    settings["val_fraction"] = given.val_fraction or 0.0
    try:
        return load_labelled(source, progress=note, **settings), None
    except OptionError as error:
        if not given.skip_bad:
            raise
        left_out = str(error)
        examples = load_labelled(source, skip_bad=True, **settings)  # raises errors that skipping cannot avoid
    warn(f"left out: {left_out}")
    return examples, left_out


def _training_captions(sources: Sequence[str]) -> list[str]:
    """Return the captions of the split train, or none if it has no readable ones."""
    from rsedge.datasets.layouts import load_examples
    from rsedge.errors import OptionError

    try:
        data = load_examples(sources, splits=("train",), skip_bad=True, check=False)
    except OptionError as error:
        note(f"no baselines: {str(error).splitlines()[0]}")
        return []
    return [caption for example in data.examples for caption in example.captions]


def _names(metrics: str | None) -> list[str] | None:
    return None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
