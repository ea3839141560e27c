"""``rsedge train``: fine-tune a model on images and captions."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from rsedge.cli import options
from rsedge.cli.say import say, say_json, training_progress


def _list(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print the built-in recipes or the keys of a recipe, and exit."""
    if value:
        from rsedge.training.recipe import describe_keys, presets

        if param.name == "list_recipes":
            say("\n".join(f"{name:<24} {text}" for name, text in presets().items()))
        else:
            say("\n".join(describe_keys()))
        ctx.exit()


_listing = functools.partial(options.option, is_flag=True, is_eager=True, expose_value=False, callback=_list)


@click.command("train")
@options.family
@options.sources
@options.recipe
@options.option("--init", help="Hub id or folder of the initial model, instead of the recipe's model.init.")
@options.option("-o", "--output", type=options.FOLDER, required=True, help="Folder of the run.")
@options.changes
@options.option("--resume", is_flag=True, help="Continue the run from its last checkpoint.")
@options.option(
    "--trackers",
    default="tensorboard",
    help="Trackers for metrics beside metrics.jsonl: tensorboard, wandb …, separated by commas, or none.",
)
@options.option("--cpu", is_flag=True, help="Train on the CPU even if there is a GPU.")
@options.overwrite
@options.as_json
@_listing("--list-recipes", help="Print the built-in recipes and exit.")
@_listing("--list-keys", help="Print the keys of a recipe, their defaults and meaning, and exit.")
def command(
    family: Any,
    recipe: str | None,
    output: Path,
    resume: bool,
    trackers: str,
    cpu: bool,
    overwrite: bool,
    as_json: bool,
    **changes: Any,
) -> None:
    """Fine-tune a captioner (blip, clipcap) or a dual encoder (clip, which is SigLIP too).

    Writes checkpoints in Hugging Face layout, RUN/best and RUN/last, with metrics, curves and sample captions.
    --resume continues an interrupted run with the same steps as an uninterrupted one. For several GPUs:
    accelerate launch -m rsedge train …
    """
    from rsedge.errors import OptionError

    with options.needed_for("training", "train"):
        from rsedge.training.recipe import load_recipe
        from rsedge.training.run_folder import RunFolder
        from rsedge.training.train import train
    if resume and overwrite:
        raise OptionError("--resume continues a run, --overwrite replaces it: give one of them")
    # A resumed run has its recipe; options given again must agree with it.
    base: Any = recipe if recipe or not resume else RunFolder(output).recipe_path
    loaded = load_recipe(base, family=family, settings=options.recipe_changes(**changes))
    chosen = [] if trackers == "none" else [name.strip() for name in trackers.split(",") if name.strip()]
    with training_progress() as observe:
        result = train(loaded, output, resume=resume, overwrite=overwrite, cpu=cpu, trackers=chosen, observe=observe)
    if not result.main:
        return
    if as_json:
        values = {"run": str(result.run), "best": str(result.best), "best_step": result.progress.best_step}
        say_json({**values, "steps": result.progress.step, "values": result.values})
        return
    say(f"{result.best}  step {result.progress.best_step} of {result.progress.step}")
    for name, value in result.values.items():
        if name.startswith("val_"):
            say(f"  {name.removeprefix('val_'):<22} {value:.4f}")
    say(f"next: rsedge export {result.best} -o {output.name}.rsedge")
