"""Train a small BLIP, CLIP and CLIPCap on RSICD, export them, and evaluate checkpoint and bundles: docs/results.md.

    python bench/rsicd.py --data dataset_rsicd.json@RSICD_images --work out/rsicd

Everything goes through the commands a user has. What a run folder holds already is not made again; about an hour on two
CPU cores. `--only FAMILY` leaves the results of the others as they stand.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import RESULTS, machine

PRECISIONS = ("fp32", "int8")
CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True)
class Experiment:
    """What one family is trained and measured by.

    Attributes:
        family: As ``rsedge train`` names it.
        train: More arguments of training.
        tasks: Kind of evaluation → its arguments.
    """

    family: str
    train: tuple[str, ...]
    tasks: dict[str, tuple[str, ...]]


CAPTIONS = {"captions": ("--split", "val", "--metrics", "bleu,rouge_l,cider_d")}
EXPERIMENTS = (
    Experiment("blip", ("--limit", "4000"), CAPTIONS),
    Experiment(
        "clip", (), {"retrieval": ("--split", "val"), "zero-shot": ("--split", "val", "--skip-bad", "--ensemble")}
    ),
    Experiment("clipcap", ("--limit", "4000", "--set", "model.encoder={work}/clip/best"), CAPTIONS),
)


def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="RSICD as rsedge takes it: ANNOTATIONS.json@IMAGES")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs, bundles and predictions")
    parser.add_argument("--only", choices=[experiment.family for experiment in EXPERIMENTS])
    options = parser.parse_args()
    path = RESULTS / "rsicd.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for experiment in EXPERIMENTS:
        if options.only in (None, experiment.family):
            values[experiment.family] = measure(experiment, options.data, options.work)
            values["machine"] = machine()
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def measure(experiment: Experiment, data: str, work: Path) -> dict[str, Any]:
    """Train, export and evaluate one family."""
    work.mkdir(parents=True, exist_ok=True)
    family, run = experiment.family, work / experiment.family
    extra = [argument.format(work=work) for argument in experiment.train]
    train = ["train", family, "--recipe", f"{family}-cpu", *extra, "--data", data, "-o", str(run)]
    if not (run / "best").exists():
        rsedge(*train)
    models = {CHECKPOINT: run}
    for precision in PRECISIONS:
        models[precision] = work / f"{family}-{precision}.rsedge"
        if not models[precision].exists():
            rsedge("export", str(run / "best"), "-o", str(models[precision]), f"--{precision}")
    found: dict[str, Any] = {"train": _public(train, data, work), "run": _run(run), "tasks": {}}
    for task, arguments in experiment.tasks.items():
        predictions = {name: work / f"{family}-{name}.jsonl" for name in models}
        written = {
            name: ["--predictions", str(file)] if task == "captions" else [] for name, file in predictions.items()
        }
        reports = {
            name: json.loads(
                rsedge("evaluate", task, str(model), "--data", data, *arguments, *written[name], "--json", quiet=True)
            )
            for name, model in models.items()
        }
        found["tasks"][task] = {name: _figures(task, report) for name, report in reports.items()}
        if task == "captions":
            found["tasks"][task]["baselines"] = _baselines(reports[CHECKPOINT])
            for name in PRECISIONS:
                same = _same(predictions[CHECKPOINT], predictions[name])
                found["tasks"][task][name]["identical_captions"] = same
        else:
            found["tasks"][task]["chance"] = _chance(task, reports[CHECKPOINT])
    return found


def rsedge(*arguments: str, quiet: bool = False) -> str:
    """Run a command and give its standard output."""
    print("rsedge", shlex.join(arguments), flush=True)
    command = [sys.executable, "-m", "rsedge", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE if quiet else None, text=True, check=True)
    return done.stdout or ""


def _public(arguments: list[str], data: str, work: Path) -> str:
    """The command without this machine's folders."""
    return shlex.join(["rsedge", *arguments]).replace(shlex.quote(data), "RSICD").replace(str(work), "RUNS")


def _run(run: Path) -> dict[str, float]:
    """Length and speed of the training."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = sorted(record["samples_per_second"] for record in records if "samples_per_second" in record)
    return {
        "steps": records[-1]["step"],
        "epochs": round(records[-1]["epoch"], 2),
        "images_per_second": round(speeds[len(speeds) // 2], 1),
    }


def _figures(task: str, report: dict[str, Any]) -> dict[str, Any]:
    if task == "captions":
        return {"images": report["text"]["predictions"]["captions"], **_values(report["scores"])}
    if task == "retrieval":
        return {"images": report["images"], **_recalls(report)}
    return {"images": report["images"], "classes": len(report["labels"]), **_top(report)}


def _values(scores: dict[str, Any]) -> dict[str, float]:
    return {name: round(score["value"], 4) for name, score in scores.items()}


def _baselines(report: dict[str, Any]) -> dict[str, Any]:
    return {name: _values(baseline["scores"]) for name, baseline in report["baselines"].items()}


def _recalls(report: dict[str, Any]) -> dict[str, float]:
    ways = {"i2t": report["image_to_text"], "t2i": report["text_to_image"]}
    recalls = {f"{way}_{k}": round(found[f"recall_{k}"], 4) for way, found in ways.items() for k in (1, 5, 10)}
    return {**recalls, "mean_recall": round(report["mean_recall"], 4)}


def _top(report: dict[str, Any]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in report.items() if name.startswith("top_")}


def _chance(task: str, report: dict[str, Any]) -> dict[str, float]:
    if task == "retrieval":
        return _recalls(report["chance"])
    classes = len(report["labels"])
    return {name: round(int(name.removeprefix("top_")) / classes, 4) for name in _top(report)}


def _same(first: Path, second: Path) -> float:
    """Share of images with the same caption in both files."""
    texts = [
        {(line := json.loads(text))["key"]: line["caption"] for text in path.read_text(encoding="utf-8").splitlines()}
        for path in (first, second)
    ]
    return round(sum(texts[1].get(key) == caption for key, caption in texts[0].items()) / len(texts[0]), 4)


if __name__ == "__main__":
    main()
