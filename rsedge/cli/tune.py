"""``rsedge tune``: search for the best settings of a recipe, or suggest a learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rsedge.cli import options
from rsedge.cli.say import say, say_json, training_progress

_OF_SEARCH = (
    *("searches", "search_file", "method", "trials", "metric", "direction", "pruner", "keep", "seed", "timeout"),
    "resume",
)
_OF_FINDER = ("min_lr", "max_lr", "steps")


@click.command("tune")
@options.family
@options.sources
@options.recipe
@options.changes
@options.option("-o", "--output", type=options.FOLDER, required=True, help="Folder of the study.")
@options.option("--search", "searches", multiple=True, metavar="KEY=RANGE", help="Search this key; may be repeated.")
@options.option(
    "--search-file", type=options.OLD_FILE, help="TOML file with a table [search] of such keys; --search overrides it."
)
@options.option(
    "--method",
    type=click.Choice(["tpe", "gp", "grid"]),
    default="tpe",
    help="Bayesian search by density (tpe) or Gaussian process (gp), or every combination (grid).",
)
@options.option(
    "--trials",
    type=options.AT_LEAST_1,
    help="Number of trials, including those before a resume.  [default: 20, or the whole grid]",
)
@options.option(
    "--metric", help="Metric of metrics.jsonl; the best value of a trial counts.  [default: the recipe's loop.monitor]"
)
@options.option(
    "--direction",
    type=click.Choice(["minimize", "maximize"]),
    help="Direction of the metric.  [default: the recipe's for its own monitor; else minimize a loss, maximize others]",
)
@options.option(
    "--pruner",
    type=click.Choice(["median", "hyperband", "none"]),
    default="median",
    help="Rule that stops poor trials.",
)
@options.option(
    "--keep", type=click.Choice(["best", "all", "none"]), default="best", help="Trials whose checkpoints are kept."
)
@options.option("--seed", type=options.AT_LEAST_0, help="Seed of the search.  [default: the recipe's]")
@options.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), help="Start no trial after this many seconds."
)
@options.option("--resume", is_flag=True, help="Continue the study and its interrupted trial.")
@options.option("--find-lr", is_flag=True, help="Test growing learning rates and suggest one, without a search.")
@options.option("--min-lr", type=float, default=1e-7, help="First rate of --find-lr.")
@options.option("--max-lr", type=float, default=1.0, help="Last rate of --find-lr.")
@options.option("--steps", type=click.IntRange(min=10), default=100, help="Steps of --find-lr.")
@options.option("--cpu", is_flag=True, help="Train on the CPU even if there is a GPU.")
@options.overwrite
@options.as_json
def command(
    family: Any,
    recipe: str | None,
    output: Path,
    searches: tuple[str, ...],
    search_file: Path | None,
    resume: bool,
    find_lr: bool,
    min_lr: float,
    max_lr: float,
    steps: int,
    cpu: bool,
    overwrite: bool,
    as_json: bool,
    **others: Any,
) -> None:
    """Search for the best settings of a recipe, or suggest a learning rate.

    \b
    RANGE is one of
      float:LOW:HIGH        uniform: optimizer.weight_decay=float:0:0.2
      log:LOW:HIGH          uniform in the logarithm: learning_rate=log:1e-6:1e-3
      int:LOW:HIGH[:STEP]   whole numbers, both ends included: batch_size=int:16:64:16
      A,B,C                 choices, or a TOML list: schedule.name=linear,cosine
                            an empty choice removes the key: loop.ema_decay=,0.99

    Writes STUDY/best.toml, for rsedge train --recipe, with a table and pictures of all trials. The same command
    with --resume continues an interrupted search. With --find-lr the command raises the learning rate step by step
    until the loss diverges, and writes lr-finder.csv and lr-finder.png.
    """  # noqa: D301 - \b stands for itself: click keeps the lines below it
    from rsedge.errors import OptionError

    # Options of the other half of the command would have no effect.
    if given := options.given(_OF_SEARCH if find_lr else _OF_FINDER):
        reason = "runs no search: leave it out, or leave out" if find_lr else "is missing, and only it uses"
        raise click.UsageError(f"--find-lr {reason} {', '.join(given)}")
    if resume and overwrite:
        raise OptionError("--resume continues a study, --overwrite replaces it: give one of them")
    with options.needed_for("tuning", "tune"):
        from rsedge.training.recipe import load_recipe
        from rsedge.training.tuning import lr_finder
        from rsedge.training.tuning.search_space import read_file, read_settings
        from rsedge.training.tuning.tune import tune
    named = ("settings", "sources", "limit", "val_fraction", "skip_bad")
    changes = options.recipe_changes(**options.take(others, named))
    loaded = load_recipe(recipe, family=family, settings=changes)
    if find_lr:
        lr_finder.curve_files(output, overwrite=overwrite)  # before the work
        with training_progress() as observe:
            curve = lr_finder.find_learning_rate(
                loaded, min_rate=min_lr, max_rate=max_lr, steps=steps, cpu=cpu, observe=observe
            )
        table, picture = lr_finder.write_curve(curve, output, overwrite=overwrite)
        rates = {"suggestion": curve.suggestion, "steepest": curve.steepest, "tenth": curve.tenth_of_minimum}
        if as_json:
            say_json({**rates, "table": str(table), "picture": str(picture)})
            return
        say(f"{picture}  {len(curve.rates)} steps{'; the loss diverged' if curve.diverged else ''}")
        say(f"  steepest slope          {curve.steepest:.2e}")
        say(f"  a tenth of the minimum  {curve.tenth_of_minimum:.2e}")
        say(f"next: rsedge train {family} --set learning_rate={curve.suggestion:.1e} …")
        return
    space = {**(read_file(search_file) if search_file else {}), **read_settings(searches)}
    with training_progress() as observe:
        others |= {"resume": resume, "overwrite": overwrite, "cpu": cpu, "observe": observe}
        result = tune(loaded, space, output, **others)
    states = [trial.state for trial in result.trials]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    best = result.best
    if as_json:
        found = {"best": best.number, "value": best.value, "settings": dict(best.settings)}
        files = {"study": str(result.study), "recipe": str(result.study / "best.toml")}
        say_json({**files, **found, "trials": counts, "importances": dict(result.importances)})
        return
    say(f"{result.study}  {len(states)} trials: {', '.join(f'{n} {state}' for state, n in counts.items())}")
    say(f"best: trial {best.number}, {result.recipe.loop.monitor} {best.value:.4f}")
    for key, value in best.settings.items():
        share = f"  importance {result.importances[key]:.2f}" if key in result.importances else ""
        shown = f"{value:.4g}" if isinstance(value, float) else "left out" if value is None else value
        say(f"  {key:<28} {shown!s:<12}{share}".rstrip())
    say(f"next: rsedge train {family} --recipe {result.study / 'best.toml'} -o RUN")
