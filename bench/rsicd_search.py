"""Whether `rsedge embed`, `search` and `classify` on a bundle give the figures of `rsedge evaluate` on its checkpoint.

    python bench/rsicd_search.py --data dataset_rsicd.json@RSICD_images --work out/rsicd

Takes the CLIP and the figures of bench/rsicd.py. Every validation caption is a query; top-1 classes come from the CSV
of `rsedge classify`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import RESULTS, machine
from bench.rsicd import rsedge
from rsedge.datasets.images import FileImage
from rsedge.datasets.layouts import load_examples, load_labelled
from rsedge.runtime.embedder import Embedder
from rsedge.runtime.search.index import Index

KS = (1, 5, 10)


def main() -> None:
    """Embed, search, classify, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="RSICD as rsedge takes it: ANNOTATIONS.json@IMAGES")
    parser.add_argument("--work", type=Path, required=True, help="that of bench/rsicd.py")
    options = parser.parse_args()
    bundle = options.work / "clip-fp32.rsedge"
    reference = json.loads((RESULTS / "rsicd.json").read_text(encoding="utf-8"))["clip"]["tasks"]
    with tempfile.TemporaryDirectory() as scratch:
        values = {
            "machine": machine(),
            "search": search(options.data, bundle, Path(scratch)),
            "evaluate_retrieval": {f"t2i_{k}": reference["retrieval"]["checkpoint"][f"t2i_{k}"] for k in KS},
            "classify": classify(options.data, bundle, Path(scratch)),
            "evaluate_zero_shot": {"top_1": reference["zero-shot"]["checkpoint"]["top_1"]},
        }
    (RESULTS / "rsicd_search.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(values, indent=2))


def search(data: str, bundle: Path, scratch: Path) -> dict[str, float]:
    """Recall of images by caption."""
    examples = load_examples([data], splits=("val",)).split("val")
    folder = scratch / "images"
    folder.mkdir()
    for number, example in enumerate(examples):
        source = _file(example.image)
        (folder / f"{number:05}{source.suffix}").symlink_to(source)
    embeddings = scratch / "images.parquet"
    rsedge("embed", str(folder), "-m", str(bundle), "-o", str(embeddings), "--dtype", "float32")
    index, embedder = Index.open(embeddings), Embedder.load(bundle)
    hits = dict.fromkeys(KS, 0)
    texts = [(number, text) for number, example in enumerate(examples) for text in example.captions]
    queries = embedder.embed_texts([text for _, text in texts])
    for (number, _), query in zip(texts, queries, strict=True):
        found = [int(hit.record.scene) for hit in index.search(query, top=max(KS))]
        for k in KS:
            hits[k] += number in found[:k]
    return {f"t2i_{k}": round(count / len(texts), 4) for k, count in hits.items()}


def classify(data: str, bundle: Path, scratch: Path) -> dict[str, float]:
    """Share of images whose class is the one that `rsedge classify` names."""
    examples = load_labelled(data, splits=("val",), skip_bad=True)
    labels = sorted({str(example.label) for example in examples})
    names = scratch / "labels.txt"
    names.write_text("\n".join(labels), encoding="utf-8")
    # GDAL and Pillow decode JPEG a little differently; of PNG both sides see the same pixels.
    files = [str(scratch / f"{_file(example.image).stem}.png") for example in examples]
    for example, file in zip(examples, files, strict=True):
        Image.fromarray(example.image.read()).save(file)
    output = scratch / "classes.csv"
    rsedge("classify", *files, "--labels", str(names), "--ensemble", "-m", str(bundle), "-o", str(output))
    with output.open(encoding="utf-8", newline="") as stream:
        found = {row["scene"]: row["class"] for row in csv.DictReader(stream)}
    right = [found[Path(file).stem] == example.label for file, example in zip(files, examples, strict=True)]
    return {"top_1": round(sum(right) / len(right), 4)}


def _file(image: object) -> Path:
    assert isinstance(image, FileImage)
    return image.path.resolve()


if __name__ == "__main__":
    main()
