"""``rsedge back-translate``: paraphrase captions by translation and back-translation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rsedge.cli import options
from rsedge.cli.say import note, say, say_json


@click.command("back-translate")
@click.argument("sources", nargs=-1, required=True)
@options.option("-o", "--output", type=options.PATH, required=True, help="Output file, .jsonl.")
@options.option("--forward", required=True, help="Marian model from English: folder or hub id.")
@options.option("--backward", required=True, help="Marian model back into English.")
@options.option("--languages", help="Intermediate languages, such as fr,es,it,pt, for a multilingual model.")
@options.option("--splits", default="train", help="Splits to translate, such as train,val.")
@options.option("--seed", type=options.AT_LEAST_0, default=0, help="Seed of the splits, as in training.")
@options.option("--limit", type=options.AT_LEAST_1, help="Largest number of images per split.")
@options.option("--skip-bad", is_flag=True, help="Skip unusable records.")
@options.option(
    "--beams", "num_beams", type=click.IntRange(1, 64), default=1, help="Width of the beam search; 1 is greedy search."
)
@options.option("--max-new-tokens", type=options.AT_LEAST_1, default=128, help="Longest translation, in tokens.")
@options.option("--batch-size", type=options.AT_LEAST_1, default=32, help="Sentences per batch.")
@options.device
@options.overwrite
@options.as_json
@options.config
def command(
    sources: tuple[str, ...],
    output: Path,
    languages: str | None,
    splits: str,
    seed: int,
    limit: int | None,
    skip_bad: bool,
    device: str,
    overwrite: bool,
    as_json: bool,
    **translation: Any,
) -> None:
    """Paraphrase the captions of SOURCES by translation into other languages and back.

    SOURCES are caption sets, as for rsedge train. A recipe names the output file as data.paraphrases. The same command
    continues an interrupted run.
    """
    with options.needed_for("back-translation", "translate"):
        from rsedge.datasets import load_examples
        from rsedge.training.data.back_translate import BackTranslation, back_translate
    settings = BackTranslation(languages=_listed(languages), **translation)
    data = load_examples(
        sources, seed=seed, limit=limit, splits=_listed(splits), skip_bad=skip_bad, check=False, progress=note
    )
    counts = back_translate(
        data.examples,
        output,
        settings,
        device=device,
        overwrite=overwrite,
        progress=lambda done, total: note(f"{done} of {total} images"),
    )
    if as_json:
        say_json({"output": str(output), **counts, "bad": len(data.bad)})
        return
    say(f"{output}  {counts['paraphrases']} paraphrases of {counts['captions']} captions, {counts['images']} images")


def _listed(text: str | None) -> tuple[str, ...]:
    """Split ``fr, es`` at the commas."""
    return tuple(part.strip() for part in text.split(",")) if text else ()
