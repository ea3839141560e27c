"""``rsedge import-rsdix``: convert a published RSDiX checkpoint to Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import click

from rsedge.cli import options
from rsedge.cli.say import note, say, say_json


@click.command("import-rsdix")
@click.argument("file", type=options.PATH)
@options.option("-o", "--output", type=options.PATH, required=True, help="Checkpoint folder to write.")
@options.option("--tokenizer", help="Folder or hub id to copy the tokenizer from.  [default: the published models']")
@options.option(
    "--weights",
    type=click.Choice(["student", "teacher"]),
    default="student",
    help="The trained model (student) or its moving average (teacher).",
)
@options.overwrite
@options.as_json
def command(file: Path, output: Path, tokenizer: str | None, weights: str, overwrite: bool, as_json: bool) -> None:
    """Convert FILE, a published RSDiX checkpoint, to a folder in Hugging Face layout.

    FILE is a PyTorch Lightning .ckpt of RSDiX-CLIP (S-BERT variant too), RSDiX-SigLIP or RSDiX-CLIPCap. The command
    executes no code in it.
    """
    with options.needed_for("importing", "train"):
        from rsedge.training.rsdix.import_rsdix import import_rsdix
    report = import_rsdix(
        file,
        output,
        tokenizer=tokenizer,
        weights="teacher" if weights == "teacher" else "student",
        overwrite=overwrite,
        progress=note,
    )
    if as_json:
        names = ("family", "weights", "parameters", "settings", "mapped", "unused")
        say_json({"checkpoint": str(report.path), **{name: getattr(report, name) for name in names}})
        return
    say(f"{output}  {report.family}  {report.parameters / 1e6:.1f} M parameters, of the {report.weights}")
    say("  " + ", ".join(f"{name} {value}" for name, value in report.settings.items()))
    for title, counts in (("used", report.mapped), ("not used", report.unused)):
        for prefix, count in counts.items():
            say(f"  {title:<9} {prefix.rstrip('.')}.*  {count} tensors")
