"""Write docs/results.md from the results of bench/; with --check only say if it is what it would be."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "bench" / "results"

_NAMES = {"blip": "BLIP", "clip": "CLIP", "clipcap": "CLIPCap"}
_COLUMNS = {
    "captions": {
        "bleu_1": "BLEU-1",
        "bleu_4": "BLEU-4",
        "rouge_l": "ROUGE-L",
        "cider_d": "CIDEr-D",
        "identical_captions": "same caption as the checkpoint",
    },
    "retrieval": {
        "i2t_1": "image → text R@1",
        "i2t_5": "R@5",
        "i2t_10": "R@10",
        "t2i_1": "text → image R@1",
        "t2i_5": "R@5",
        "t2i_10": "R@10",
        "mean_recall": "mean",
    },
    "zero-shot": {"top_1": "top-1", "top_3": "top-3", "top_5": "top-5", "top_10": "top-10"},
}
_ROWS = {
    "checkpoint": "checkpoint, torch fp32",
    "fp32": "bundle, fp32",
    "fp16": "bundle, fp16",
    "int8": "bundle, int8",
    "chance": "chance",
    "most_frequent": "most frequent training caption",
    "consensus": "training caption most like the others",
}


def page() -> str:
    """The page's text."""
    values = read("rsicd")
    lines = [
        "# Results",
        "",
        *_paragraph(
            "Small models trained from scratch on RSICD's training images, measured on its validation images: what the "
            "code reaches on a CPU in minutes, not what the models can do. `python bench/rsicd.py --data RSICD --work "
            f"RUNS` runs the commands shown; this page is made from `bench/results/` by `make docs`. {_where(values)} "
            "The full-size recipes never ran: no GPU was at hand. What the built-in model is worth stands on its card, "
            "`rsedge/builtin/sentinel2-rgb.rsedge/README.md`."
        ),
    ]
    for family, name in _NAMES.items():
        lines += ["", f"## {name}", "", *_family(values[family])]
    sections = (_through_the_commands(), _parity(), _true_colour(), _decoding_speed(), _search_speed())
    return "\n".join([*lines, *(line for section in sections for line in ("", *section)), ""])


def read(name: str) -> dict[str, Any]:
    """One benchmark's results."""
    values: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return values


def _where(values: dict[str, Any]) -> str:
    machine = values["machine"]
    instructions = ", ".join(machine["instructions"])
    return f"{machine['cores']} cores of an {machine['cpu']} ({instructions}), {machine['date']}."


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def _through_the_commands() -> Iterable[str]:
    found = read("rsicd_search")
    yield from ("## The same figures through search and classify", "")
    yield from _paragraph(
        "The CLIP above as fp32 bundle: every validation caption searched in the file that `rsedge embed` wrote, and "
        "the first class of `rsedge classify`, against `rsedge evaluate` on the checkpoint (`bench/rsicd_search.py`). "
        "`classify` was given lossless copies, as GDAL and Pillow decode JPEG a little differently: with the JPEG "
        "files one image of 1027 goes to another class."
    )
    yield from ("", "| | R@1 | R@5 | R@10 | top-1 |", "| --- | ---: | ---: | ---: | ---: |")
    for title, search, classes in (
        ("`rsedge evaluate`, checkpoint", "evaluate_retrieval", "evaluate_zero_shot"),
        ("`rsedge search`, `rsedge classify`, bundle", "search", "classify"),
    ):
        recalls = " | ".join(f"{found[search][f't2i_{k}']:.4f}" for k in (1, 5, 10))
        yield f"| {title} | {recalls} | {found[classes]['top_1']:.4f} |"


def _parity() -> Iterable[str]:
    found = read("embed_parity")
    yield from ("## Embeddings against transformers", "")
    yield from _paragraph(
        f"Smallest cosine ({found['note']}), and in brackets the smallest once the mean embedding is taken away "
        f"(`bench/embed_parity.py`). {_where(found)}"
    )
    yield from ("", "| model | precision | images | texts | MB |", "| --- | --- | --- | --- | ---: |")
    for row in found["rows"]:
        cells = [f"{row[key]['cosine_min']:.6f} ({row[key]['centred_min']:.4f})" for key in ("images", "texts")]
        yield f"| {row['model']} | {row['precision']} | {' | '.join(cells)} | {row['graphs_mb']:.0f} |"


def _true_colour() -> Iterable[str]:
    found = read("tci")
    clear, far = found["not_saturated"], found["none_saturated_near"]
    yield from ("## The rule for reflectance against a product's own true-colour image", "")
    yield from _paragraph(
        f"{found['product']}, resampled to 100 m, rendered by `{found['rule']}` (`bench/tci.py`). Where the TCI is not "
        f"saturated ({clear['share_of_values']:.0%} of its values) the mean absolute difference is "
        f"{clear['mean_absolute_difference']:.2f} grey levels, {clear['within_2']:.1%} are within 2. The rest lies "
        "beside saturated pixels, as the TCI was clipped before it was resampled: where nothing within two pixels is "
        f"saturated the mean is {far['mean_absolute_difference']:.2f}, and {far['within_2']:.1%} are within 2."
    )


def _decoding_speed() -> Iterable[str]:
    found = read("clipcap")
    yield from ("## CLIPCap's decoding", "")
    yield from _paragraph(
        f"GPT-2 small, random weights, {found['tokens']} tokens forced, {found['images']} images in a batch against "
        f"torch without a cache, one image at a time ({found['reference_images']} images, {found['rounds']} rounds, "
        f"{found['threads']} threads; `bench/clipcap.py`). Other work kept the machine busy, hence processor time too. "
        f"{_where(found)} The captions of random weights turn on the smallest difference, so none of int8's is equal "
        "in all tokens; the table above shows a trained model."
    )
    yield from ("", "| search | engine | ms per image | ratio | ratio of processor time | equal captions |")
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for row in found["rows"]:
        yield (
            f"| {row['search']} | {row['engine']} | {row['ms_per_image']:.0f} | {row['ratio']:.1f} | "
            f"{row['cpu_ratio']:.1f} | {row['equal_captions']:.0%} |"
        )


def _search_speed() -> Iterable[str]:
    found = read("search")
    wall, near = found["wall_s"], found.get("approximate")
    text = (
        f"{found['rows']:,} embeddings of {found['dim']} numbers as float16 in a file of {found['file_mb']} MB: exact "
        f"search takes {wall['search']:.2f} s, {wall['ratio_to_float32']:.2f} times NumPy's product of the same "
        f"numbers as float32 in memory ({wall['numpy_float32_in_memory']:.2f} s), peak RSS "
        f"{found['peak_rss_mb']:.0f} MB. Medians of {found['rounds']} rounds, "
        f"load {found['load']} (`bench/search.py`). "
    )
    if near:
        text += (
            f"On embeddings in clusters the FAISS index finds {near['recall_at_20']:.1%} of the exact top 20, in "
            f"{near['search_s'] * 1000:.0f} ms. "
        )
    yield from ("## Search", "")
    yield from _paragraph(text + _where(found))


def _family(found: dict[str, Any]) -> Iterable[str]:
    run = found["run"]
    yield from ("```sh", found["train"], "```", "")
    yield f"{run['steps']} steps, {run['epochs']:g} epochs, {run['images_per_second']:g} images/s."
    for task, rows in found["tasks"].items():
        count = rows["checkpoint"]["images"]
        classes = f" of {rows['checkpoint']['classes']} classes" if "classes" in rows["checkpoint"] else ""
        yield from ("", f"`rsedge evaluate {task}`, {count} validation images{classes}:", "")
        flat = {name: row for name, row in rows.items() if name != "baselines"} | rows.get("baselines", {})
        yield from _table(task, flat)


def _table(task: str, rows: dict[str, dict[str, float]]) -> Sequence[str]:
    columns = {key: title for key, title in _COLUMNS[task].items() if any(key in row for row in rows.values())}
    lines = [f"| | {' | '.join(columns.values())} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, row in rows.items():
        lines.append(f"| {_ROWS[name]} | {' | '.join(_cell(key, row) for key in columns)} |")
    return lines


def _cell(key: str, row: dict[str, float]) -> str:
    if key not in row:
        return ""
    return f"{row[key]:.1%}" if key == "identical_captions" else f"{row[key]:.3f}"


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/results.md does not show what is in bench/results: run 'make docs'", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
