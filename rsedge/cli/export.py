"""``rsedge export``: checkpoint → bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from rsedge.cli import options

PRECISION = {"fp32": "32-bit floats (default)", "fp16": "16-bit floats, for GPUs", "int8": "8-bit integers, for CPUs"}


@click.command("export")
@click.argument("checkpoint")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Bundle to make, NAME.rsedge.")
@click.option("--fp32", "precision", flag_value="fp32", default="fp32", help=PRECISION["fp32"])
@click.option("--fp16", "precision", flag_value="fp16", help=PRECISION["fp16"])
@click.option("--int8", "precision", flag_value="int8", help=PRECISION["int8"])
@click.option("--image-size", type=click.IntRange(min=1), help="Pixels.  [default: the checkpoint's]")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@options.overwrite
@options.as_json
def command(
    checkpoint: str,
    output: Path,
    precision: Any,
    image_size: int | None,
    revision: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT to a bundle and prove it against torch.

    CHECKPOINT is a BLIP captioning model: a folder in Hugging Face layout, or a hub id such as
    Salesforce/blip-image-captioning-base. Nothing is written if the bundle's encoder output or captions
    stray from torch's beyond the tolerance of the precision.
    """
    from rsedge.errors import BackendError

    try:
        from rsedge.export.convert import export
    except ImportError as error:
        raise BackendError(f"exporting needs {error.name}: pip install 'rsedge[export]'") from error
    bundle = export(
        checkpoint,
        output,
        precision=precision,
        image_size=image_size,
        revision=revision,
        overwrite=overwrite,
        progress=options.note,
    )
    report = bundle.manifest.parity
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle.path), "model": bundle.model, "parity": report}))
        return
    click.echo(f"{output}  {bundle.model}  {precision}  {bundle.manifest.image.size} px")
    click.echo(f"parity with torch on {report['images']} seeded images ({report['device']}):")
    encoder, limits = report["encoder"], report["tolerance"]
    limit = limits["encoder_mean_over_magnitude"] * encoder["mean_magnitude"]
    click.echo(
        f"  encoder output   max error {encoder['max']:.3g}, mean {encoder['mean']:.3g} (accepted mean {limit:.3g})"
    )
    click.echo(f"  next token       {report['next_token']:.2%} equal (accepted {limits['next_token']:.0%})")
    for search in ("greedy", "beam3"):
        agreement = report[search]
        click.echo(
            f"  {search:<7} captions {agreement['captions']:.2%} identical, tokens {agreement['caption_tokens']:.2%} "
            f"equal (accepted {limits['caption_tokens']:.0%})"
        )
