"""The process that opens hostile inputs: one after another, as told on a pipe, so that start-up is paid once.

Run as ``python -m tests.security.worker ASK ANSWER`` with the numbers of two inherited pipes; a line of JSON asks for a
run and one answers it. Runs are the commands of rsedge in this process, and ``raw``: GDAL with nothing in its way.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import rasterio
from rasterio.enums import Resampling

import rsedge.runtime.embedder
from rsedge.cli import options
from rsedge.cli.main import run
from rsedge.datasets.images import FileImage
from rsedge.errors import RsedgeError
from rsedge.runtime.captioner import Captioner
from tests import scenes
from tests.fakes import FakeEmbedder
from tests.security.watch import MARK

_TRACEBACK = 70
"""What a run ends with whose error is none of rsedge's."""


class Embedder(FakeEmbedder):
    """What the commands want of an embedder, without a bundle: opening inputs is what is tried."""

    device, device_reason, backend, batch_size = "cpu", "a test", "onnxruntime", 4
    logit_scale, logit_bias = 10.0, None

    @classmethod
    def load(cls, *_: object, **__: object) -> Embedder:
        return cls()

    def token_ids(self, texts: list[str]) -> np.ndarray:
        return np.array([[len(text)] for text in texts])

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        return super().embed_images(np.ascontiguousarray(images[:, : self.image_size, : self.image_size]))

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        return np.eye(self.dim, dtype=np.float32)[: len(texts)]


def _raw(argument: str) -> int:
    """Everything a careless reader does with a file."""
    done = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with rasterio.open(argument) as dataset:
                target = dataset.subdatasets[0] if dataset.count == 0 and dataset.subdatasets else ""
                for opened in [rasterio.open(target)] if target else [dataset]:
                    done = _read(opened)
        except Exception:  # what GDAL makes of the file is not the question
            traceback.print_exc()
    return done


def _read(dataset: Any) -> int:
    attempts: tuple[Callable[[], object], ...] = (
        dataset.read,
        dataset.dataset_mask,
        lambda: dataset.read(out_shape=(dataset.count, 20, 20), resampling=Resampling.nearest),
        lambda: [dataset.overviews(band) for band in dataset.indexes],
        lambda: rasterio.warp.transform_bounds(dataset.crs, "EPSG:4326", *dataset.bounds),
    )
    return min([_failed(attempt) for attempt in attempts])  # one that fails stops none of the others


def _failed(attempt: Callable[[], object]) -> int:
    try:
        attempt()
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _image(argument: str) -> int:
    try:
        FileImage(Path(argument)).read()
    except RsedgeError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_code
    return 0


def _command(use: str, argument: str, more: list[str], out: Path, index: Path) -> list[str]:
    clean = str(index.with_suffix(".tif"))
    return {
        "info": ["info", argument, "--no-probe", *more],
        "caption": ["caption", argument, "--as", "scene", "-o", f"{out}/tiles.geojson", *more],
        "html": ["caption", argument, "-o", f"{out}/tiles.geojson", "--html", f"{out}/page.html", *more],
        "embed": ["embed", argument, "-o", f"{out}/tiles.parquet", *more],
        "scene": ["embed", argument, "--as", "scene", "-o", f"{out}/tiles.parquet", *more],
        "scl": ["caption", clean, "--scl", argument, "-o", f"{out}/tiles.geojson", *more],
        "mask": ["info", clean, "--no-probe", "--cloud-mask", argument, *more],
        "locate": ["locate", argument, "--text", "a river", "--contrast", "a field", "-o", f"{out}/heat.tif", *more],
        "search": ["search", str(index), "--image", argument],
    }[use]


def _captions(out: Path) -> list[list[Any]]:
    """What each tile of the output says."""
    file = out / "tiles.geojson"
    if not file.exists():
        return []
    keys = ("status", "caption", "score", "nodata_fraction")
    return [[feature["properties"].get(key) for key in keys] for feature in json.loads(file.read_bytes())["features"]]


def main() -> None:
    ask, answer = (os.fdopen(int(number), mode) for number, mode in zip(sys.argv[1:3], "rw", strict=True))
    rsedge.runtime.embedder.Embedder = Embedder  # type: ignore[misc, assignment]
    options.chosen_embedder = lambda _model: Path("fake.rsedge")
    Captioner.load = cache(Captioner.load)  # type: ignore[method-assign]
    private = Path(os.environ["RSEDGE_TEST_PRIVATE"])
    clean = scenes.write(private / "index.tif", scenes.pixels(3, 224, 224), photometric="RGB")
    index = private / "index.parquet"
    if not index.exists() and run(["-q", "embed", str(clean), "-o", str(index)]):
        raise SystemExit("the harmless scene cannot be embedded")
    with tempfile.TemporaryFile(dir=private) as stdout, tempfile.TemporaryFile(dir=private) as stderr:
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        _serve(ask, answer, index, [stdout.fileno(), stderr.fileno()])


def _serve(ask: TextIO, answer: TextIO, index: Path, said: list[int]) -> None:
    """Answer each line; ``said`` are the files that hold what this process prints."""
    for line in ask:
        asked = json.loads(line)
        for number in said:
            os.lseek(number, 0, os.SEEK_SET)
            os.ftruncate(number, 0)
        use, argument, out = asked["use"], asked["argument"], Path(asked["out"])
        os.chdir(asked["cwd"])
        Path(MARK, asked["run"]).exists()
        try:
            if use == "raw":
                code = _raw(argument)
            elif use == "image":
                code = _image(argument)
            else:
                code = run(_command(use, argument, asked["more"], out, index))
        except BaseException:
            traceback.print_exc()
            code = _TRACEBACK
        Path(MARK, "end").exists()
        sys.stdout.flush()
        sys.stderr.flush()
        texts = [os.pread(number, 1 << 20, 0).decode("utf-8", "replace") for number in said]
        found = {"code": code, "stdout": texts[0], "stderr": texts[1], "captions": _captions(out)}
        answer.write(json.dumps(found) + "\n")
        answer.flush()


if __name__ == "__main__":
    main()
