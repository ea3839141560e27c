"""``rsedge evaluate``: how good a checkpoint or a bundle is, or a file of predictions."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from rsedge.cli import options
from rsedge.cli.progress import image_progress
from rsedge.cli.say import say

if TYPE_CHECKING:
    from rsedge.datasets.examples import BadRecord, CaptionData, Example
    from rsedge.evaluation.predictions import Prediction

SOME_FAILED = 3
_METRICS = "bleu, meteor, rouge_l, cider_d, spice, sbert"

_sources = click.option("--data", "sources", multiple=True, help="Data set; may be given several times.")
_limit = click.option("--limit", type=click.IntRange(min=1), help="At most so many images of the split.")
_skip_bad = click.option(
    "--skip-bad", is_flag=True, help="Leave out bad records, saying which, and count unreadable images as failed."
)
_output = click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the report to this file, as JSON."
)
_metrics = click.option("--metrics", help=f"Some of {_METRICS}, with commas.  [default: all that can be computed here]")
_tokenizer = click.option(
    "--tokenizer",
    type=click.Choice(["treebank", "ptb"]),
    default="treebank",
    show_default=True,
    help="What cuts captions into words; ptb needs Java.",
)
_sbert = click.option("--sbert", help="Sentence-BERT model, folder or hub id, for the metric sbert.")


def _split(default: str) -> Callable[[options.Decorated], options.Decorated]:
    return click.option(
        "--split", type=click.Choice(["train", "val", "test"]), default=default, show_default=True, help="Evaluated."
    )


@click.group("evaluate")
def command() -> None:
    """Score a MODEL: a checkpoint (with torch) or a bundle (without), in the numbers the field reports.

    MODEL is a bundle, a checkpoint folder, the folder of a training run (its best checkpoint) or a hub id. Exit code 3
    says that some images failed; they count as wrong.
    """


@command.command("captions")
@click.argument("model", required=False)
@_sources
@_split("val")
@_limit
@_skip_bad
@click.option(
    "--from",
    "predicted",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Score this file of predictions instead of a model.",
)
@click.option(
    "--predictions",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the captions to this file: JSON lines, or COCO results if it ends in .json.",
)
@options.generation
@_metrics
@_tokenizer
@_sbert
@click.option("--baselines/--no-baselines", default=True, show_default=True, help="Score fixed training captions too.")
@_output
@options.as_json
@options.device
@options.threads
@options.batch_size
def captions(
    model: str | None,
    sources: tuple[str, ...],
    split: str,
    limit: int | None,
    skip_bad: bool,
    predicted: Path | None,
    predictions: Path | None,
    metrics: str | None,
    tokenizer: Any,
    sbert: str | None,
    baselines: bool,
    output: Path | None,
    as_json: bool,
    device: str,
    threads: int | None,
    batch_size: int | None,
    **generation: Any,
) -> int:
    """Caption the images of a data set and score the captions.

    With --from FILE the captions are read instead; --data then gives their references, unless the file has them, and
    images without a prediction count with an empty one.
    """
    if (model is None) == (predicted is None):
        raise click.UsageError("give a MODEL, or predictions with --from: one of them")
    if model is not None and not sources:
        raise click.UsageError("a MODEL needs --data to be evaluated on")
    if predicted is not None:
        if named := _given(*generation, "threads", "batch_size"):
            raise click.UsageError(f"with --from no captions are made: leave out {', '.join(named)}")
        if not sources and (named := _given("split", "limit", "skip_bad", "baselines")):
            raise click.UsageError(f"{', '.join(named)} are about --data, which is not given")
        if sbert is None and _given("device"):
            raise click.UsageError("with --from only --sbert runs on a --device: leave it out")
    from rsedge.evaluation.captions import predict_captions, score_predictions
    from rsedge.evaluation.models import open_captioner
    from rsedge.evaluation.predictions import check_outputs, read_predictions, with_references, write_predictions
    from rsedge.evaluation.tables import caption_lines
    from rsedge.metrics.captions import check_metrics

    chosen = _names(metrics)
    check_metrics(chosen, sbert=sbert, tokenizer=tokenizer)  # before captioning for an hour
    check_outputs(output, predictions)
    found: Sequence[Prediction]
    about: dict[str, Any] | None = None
    captioner = None
    if model is not None:
        captioner = open_captioner(model, device=device, threads=threads, batch_size=batch_size, **generation)
        about = captioner.info.to_dict()
    data = _load(sources, split, limit=limit, skip_bad=skip_bad) if sources else None
    if captioner is not None:
        assert data is not None
        with image_progress() as progress:
            found = predict_captions(captioner, data.examples, skip_bad=skip_bad, progress=progress)
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
        device=_torch_device(device),
        training_captions=_training_captions(sources) if baselines and sources else (),
    )
    values = {
        "task": "captions",
        "model": about,
        "predictions": None if predicted is None else str(predicted),
        "data": _about(data, split, limit),
        **report.to_dict(),
    }
    name = about["name"] if about else str(predicted)
    title = f"{name}: {report.scores.images} images{_of(sources, split)}"
    return _finish(values, [title, *caption_lines(report)], report.failed, output=output, as_json=as_json)


@command.command("zero-shot")
@click.argument("model")
@click.option("--data", "source", required=True, help="Class folders, or a caption set whose records have classes.")
@_split("test")
@_limit
@_skip_bad
@click.option("--labels", help="File with a class per line, or classes with commas.  [default: those of the data]")
@click.option(
    "--template", "templates", multiple=True, metavar="TEXT", help="Prompt with {category}; several are averaged."
)
@click.option("--ensemble", is_flag=True, help="Average five wordings of the prompt.")
@_output
@options.as_json
@options.device
@options.threads
@options.batch_size
def zero_shot(
    model: str,
    source: str,
    split: str,
    limit: int | None,
    skip_bad: bool,
    labels: str | None,
    templates: tuple[str, ...],
    ensemble: bool,
    output: Path | None,
    as_json: bool,
    device: str,
    threads: int | None,
    batch_size: int | None,
) -> int:
    """Classify images by the prompt that is nearest to them.

    The default prompt is "An aerial photograph of {category}". Images of class folders are all of the split test.
    """
    from rsedge.evaluation.embeddings import classes_of, evaluate_zero_shot
    from rsedge.evaluation.models import open_embedder
    from rsedge.evaluation.predictions import check_outputs
    from rsedge.evaluation.tables import zero_shot_lines
    from rsedge.runtime.prompts import ENSEMBLE, TEMPLATES, read_labels

    if ensemble and templates:
        raise click.UsageError("--ensemble has templates of its own: leave --template out")
    check_outputs(output)
    classes = None if labels is None else read_labels(labels)
    embedder = open_embedder(model, device=device, threads=threads, batch_size=batch_size)
    examples, left_out = _load_labelled(source, split, limit=limit, skip_bad=skip_bad)
    if classes is None and limit is not None:
        classes = classes_of(source, split)
    with image_progress() as progress:
        report = evaluate_zero_shot(
            embedder,
            examples,
            labels=classes,
            templates=ENSEMBLE if ensemble else templates or TEMPLATES,
            skip_bad=skip_bad,
            progress=progress,
        )
    about = embedder.info.to_dict()
    values = {
        "task": "zero-shot",
        "model": about,
        "data": {"sources": [source], "split": split, "limit": limit, "left_out": left_out},
        **report.to_dict(),
    }
    title = f"{about['name']}: {report.scores.images} images{_of((source,), split)}"
    return _finish(values, [title, *zero_shot_lines(report)], report.failed, output=output, as_json=as_json)


@command.command("retrieval")
@click.argument("model")
@_sources
@_split("val")
@_limit
@_skip_bad
@_output
@options.as_json
@options.device
@options.threads
@options.batch_size
def retrieval(
    model: str,
    sources: tuple[str, ...],
    split: str,
    limit: int | None,
    skip_bad: bool,
    output: Path | None,
    as_json: bool,
    device: str,
    threads: int | None,
    batch_size: int | None,
) -> int:
    """Find captions by image and images by caption: recall at 1, 5 and 10, and the median rank.

    Ties count against the model, so images that share a caption cannot all find it first.
    """
    if not sources:
        raise click.UsageError("a MODEL needs --data to be evaluated on")
    from rsedge.evaluation.embeddings import evaluate_retrieval
    from rsedge.evaluation.models import open_embedder
    from rsedge.evaluation.predictions import check_outputs
    from rsedge.evaluation.tables import retrieval_lines

    check_outputs(output)
    embedder = open_embedder(model, device=device, threads=threads, batch_size=batch_size)
    data = _load(sources, split, limit=limit, skip_bad=skip_bad)
    with image_progress() as progress:
        report = evaluate_retrieval(embedder, data.examples, skip_bad=skip_bad, progress=progress)
    about = embedder.info.to_dict()
    values = {"task": "retrieval", "model": about, "data": _about(data, split, limit), **report.to_dict()}
    title = f"{about['name']}: {report.images} images, {report.captions} captions{_of(sources, split)}"
    return _finish(values, [title, *retrieval_lines(report)], report.failed, output=output, as_json=as_json)


@command.command("compare")
@click.argument("a", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("b", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@_metrics
@_tokenizer
@_sbert
@click.option(
    "--resamples", type=click.IntRange(min=100), default=2000, show_default=True, help="Of the bootstrap over images."
)
@click.option(
    "--confidence",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="Of the intervals.",
)
@click.option(
    "--sensitivity", is_flag=True, help="Score A's captions spoilt in several ways too; the default without B."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of bootstrap and spoiling.")
@_output
@options.as_json
def compare(
    a: Path,
    b: Path | None,
    metrics: str | None,
    tokenizer: Any,
    sbert: str | None,
    resamples: int,
    confidence: float,
    sensitivity: bool,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> int:
    """Test whether the predictions B are better than A, image by image: paired t-test, Wilcoxon, bootstrap.

    A and B are files of evaluate captions --predictions, for the same images. With A alone, or --sensitivity, it is
    shown how far each metric falls when A's captions are spoilt.
    """
    if b is None and (named := _given("resamples", "confidence")):
        raise click.UsageError(f"{', '.join(named)} are about the difference to B, which is not given")
    from rsedge.evaluation.captions import compare_predictions
    from rsedge.evaluation.predictions import check_outputs, read_predictions
    from rsedge.evaluation.tables import comparison_lines, sensitivity_lines
    from rsedge.metrics.captions import score_captions
    from rsedge.metrics.perturb import sensitivity as spoil

    check_outputs(output)
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
        lines += (
            ["", *sensitivity_lines(spoilt)] if lines else [f"{a}: {whole.images} images", *sensitivity_lines(spoilt)]
        )
    lines += [f"{metric} left out: {reason}" for metric, reason in whole.missing.items()]
    return _finish(values, lines, {}, output=output, as_json=as_json)


def _load(sources: Sequence[str], split: str, *, limit: int | None, skip_bad: bool) -> CaptionData:
    """The split of a caption set. With ``skip_bad`` an image that does not decode stays, to count as failed."""
    from rsedge.datasets.layouts import load_examples

    data = load_examples(
        sources, limit=limit, splits=(split,), skip_bad=skip_bad, check=not skip_bad, progress=options.note
    )
    _say_left_out(data.bad)
    return data


def _load_labelled(
    source: str, split: str, *, limit: int | None, skip_bad: bool
) -> tuple[tuple[Example, ...], str | None]:
    """The split of a set with classes, and what was left out of it, as text."""
    from rsedge.datasets.layouts import load_labelled
    from rsedge.errors import OptionError

    settings: dict[str, Any] = {"limit": limit, "splits": (split,), "check": not skip_bad}
    try:
        return load_labelled(source, progress=options.note, **settings), None
    except OptionError as error:
        if not skip_bad:
            raise
        left_out = str(error)
        examples = load_labelled(source, skip_bad=True, **settings)  # raises what cannot be skipped
    logging.getLogger("rsedge").warning("Warning: left out: %s", left_out)
    return examples, left_out


def _training_captions(sources: Sequence[str]) -> list[str]:
    """Captions of the split train, or none where it has none that can be read."""
    from rsedge.datasets.layouts import load_examples
    from rsedge.errors import OptionError

    try:
        data = load_examples(sources, splits=("train",), skip_bad=True, check=False)
    except OptionError as error:
        options.note(f"no baselines: {str(error).splitlines()[0]}")
        return []
    return [caption for example in data.examples for caption in example.captions]


def _say_left_out(bad: Sequence[BadRecord]) -> None:
    for record in bad:
        logging.getLogger("rsedge").warning("Warning: left out: %s", record)


def _about(data: CaptionData | None, split: str, limit: int | None) -> dict[str, Any] | None:
    if data is None:
        return None
    left_out = [str(record) for record in data.bad]
    return {"sources": list(data.sources), "split": split, "limit": limit, "left_out": left_out}


def _of(sources: Sequence[str], split: str) -> str:
    return f" of {', '.join(sources)} ({split})" if sources else ""


def _names(metrics: str | None) -> list[str] | None:
    return None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]


def _given(*names: str) -> list[str]:
    """Those of the options that the caller gave, as they are written."""
    context = click.get_current_context()
    named = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    return [parameter.opts[0] for parameter in context.command.params if parameter.name in named]


def _torch_device(device: str) -> str:
    """Where the Sentence-BERT model runs: on a GPU only if one is named."""
    return device if device.startswith("cuda") else "cpu"


def _finish(
    values: dict[str, Any], lines: Sequence[str], failed: dict[str, str], *, output: Path | None, as_json: bool
) -> int:
    """Write and print the report; the exit code."""
    from rsedge.errors import OutputError

    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    if output is not None:
        try:
            output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {output}: {error.strerror or error}") from error
    say(text if as_json else "\n".join(lines))
    for key, reason in failed.items():
        logging.getLogger("rsedge").warning("Warning: failed: %s: %s", key, reason)
    return SOME_FAILED if failed else 0
