"""``rsedge export``: export a checkpoint to a bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from rsedge.cli import options
from rsedge.cli.say import note, say, say_json


@click.command("export")
@click.argument("checkpoint")
@options.option("-o", "--output", type=options.PATH, required=True, help="Bundle to write, NAME.rsedge.")
@options.option("--fp32", is_flag=True, help="32-bit floats (default).")
@options.option("--fp16", is_flag=True, help="16-bit floats, for GPUs.")
@options.option("--int8", is_flag=True, help="8-bit integers, for CPUs.")
@options.option("--tensorrt", is_flag=True, help="Build engines for this machine's GPU too; not for int8.")
@options.option(
    "--image-size", type=options.AT_LEAST_1, help="Edge of an image, in pixels.  [default: the checkpoint's]"
)
@options.option("--revision", help="Branch, tag or commit of a hub id.")
@options.option(
    "--generation",
    multiple=True,
    metavar="KEY=VALUE",
    help="Default of decoding in the bundle, such as repetition_penalty=1.3; may be repeated.",
)
@options.option(
    "--resolution",
    type=click.FloatRange(0, min_open=True),
    help="Ground resolution of the training images, metres per pixel. Runs warn about scenes far from it.",
)
@options.overwrite
@options.as_json
def command(
    checkpoint: str,
    output: Path,
    fp32: bool,
    fp16: bool,
    int8: bool,
    tensorrt: bool,
    image_size: int | None,
    revision: str | None,
    generation: tuple[str, ...],
    resolution: float | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT to a bundle and compare it with torch.

    CHECKPOINT is a BLIP, CLIPCap, CLIP or SigLIP model: a folder in Hugging Face layout, as rsedge train and
    rsedge import-rsdix write it, or a hub id such as Salesforce/blip-image-captioning-base or
    openai/clip-vit-base-patch32. The command writes no bundle if its captions or embeddings differ from torch's by
    more than the tolerance of the precision.
    """
    from importlib.util import find_spec

    from rsedge.errors import BackendError
    from rsedge.manifest import Domain

    chosen = [name for name, given in (("fp32", fp32), ("fp16", fp16), ("int8", int8)) if given]
    if len(chosen) > 1:
        raise click.UsageError(f"--{' and --'.join(chosen)}: a bundle has one precision; give one of them")
    precision: Any = chosen[0] if chosen else "fp32"
    if tensorrt:
        from rsedge.runtime.engines.tensorrt.backend import tensorrt_problem

        if problem := tensorrt_problem(0, precision):  # before the export, which takes minutes
            raise BackendError(f"--tensorrt: {problem}; leave it out, and run rsedge build on the machine that has it")
    changes = {}
    for each in generation:
        name, separator, value = each.partition("=")
        if not separator:
            raise click.UsageError(f"--generation {each!r}: give KEY=VALUE, such as repetition_penalty=1.3")
        try:
            changes[name.strip().replace("-", "_")] = json.loads(value)
        except ValueError:
            changes[name.strip().replace("-", "_")] = value.strip()
    remedy = "pip install 'rsedge[export,cpu]'"
    # The export imports them late, after it has written the first graphs.
    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        raise BackendError(f"exporting needs {' and '.join(missing)}: {remedy}")
    with options.needed_for("exporting", "export,cpu"):
        from rsedge.export.convert import export
    bundle = export(
        checkpoint,
        output,
        precision=precision,
        image_size=image_size,
        revision=revision,
        generation=changes,
        domain=Domain(resolution=(resolution, resolution)) if resolution else None,
        overwrite=overwrite,
        progress=note,
    )
    if tensorrt:
        from rsedge.cli.build import build_engines

        build_engines(bundle)
    report = bundle.manifest.parity
    if as_json:
        say_json({"bundle": str(bundle.path), "model": bundle.model, "parity": report})
        return
    say(f"{output}  {bundle.model}  {precision}  {bundle.manifest.image.size} px")
    say(f"parity with torch on {report['images']} seeded images ({report['device']}):")
    for line in _lines(report):
        say(f"  {line}")


def _lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the comparison, of captions or of embeddings."""
    limits = report["tolerance"]
    if "encoder" not in report:
        for key, name in (("image_embeds", "images"), ("text_embeds", "texts ")):
            cosine = f"{report[key]['cosine_min']:.7f} at least, {report[key]['cosine_mean']:.7f} on average"
            centred = f"{report[key]['centred_min']:.5f} at least without the mean embedding"
            yield f"{name}  cosine {cosine} (accepted {limits['cosine_min']:g}); {centred}"
        return
    encoder = report["encoder"]
    limit = limits["encoder_mean_over_magnitude"] * encoder["mean_magnitude"]
    yield f"encoder output   max error {encoder['max']:.3g}, mean {encoder['mean']:.3g} (accepted mean {limit:.3g})"
    yield f"next token       {report['next_token']:.2%} equal (accepted {limits['next_token']:.0%})"
    for search in ("greedy", "beam3"):
        captions, tokens = (f"{report[search][name]:.2%}" for name in ("captions", "caption_tokens"))
        accepted = f"(accepted {limits['caption_tokens']:.0%})"
        yield f"{search:<7} captions {captions} identical, tokens {tokens} equal {accepted}"
