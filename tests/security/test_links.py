"""A folder of a stranger may hold links at the names of outputs: they are replaced or refused, never followed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rsedge.cli.main import run
from rsedge.errors import OptionError, OutputError, RsedgeError
from rsedge.evaluation.models import locate
from rsedge.evaluation.predictions import Prediction, write_predictions
from rsedge.files import replacing, write_text
from rsedge.runtime.outputs.files import write_bytes
from rsedge.runtime.outputs.records import TileRecord
from rsedge.runtime.outputs.report.sheet import write_sheet
from rsedge.runtime.run.journal import Journal
from rsedge.tomlfile import write_toml
from tests import scenes


@pytest.fixture(params=["existing", "dangling"])
def outside(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    path = tmp_path / "home" / "precious"
    if request.param == "existing":
        path.write_text("precious")
    return path


def unchanged(outside: Path, begun: bool) -> bool:
    return outside.read_text() == "precious" if begun else not outside.exists()


@pytest.mark.parametrize("suffix", [".config.toml", ".journal"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_run_writes_through_no_link(outside, bundle_path, tmp_path, suffix, more):
    begun = outside.exists()
    (folder := tmp_path / "download").mkdir()
    scene = scenes.write(folder / "scene.tif", scenes.pixels(3, 32, 32))
    (folder / f"scene.geojson{suffix}").symlink_to(outside)
    arguments = ["-m", str(bundle_path), "--device", "cpu", "-o", str(folder / "scene.geojson"), *more]
    code = run(["caption", str(scene), *arguments])
    assert unchanged(outside, begun)
    assert code == (0 if suffix == ".config.toml" else 1)


RECORD = TileRecord("s", 0, 0, 0, 0, 8, 8, None, "a", None, "ok", 0.0, None, None, "m@0", None)

WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text(path, "x"),
    "bytes": lambda path: write_bytes(path, b"x"),
    "toml": lambda path: write_toml(path, {"a": 1}),
    "sheet": lambda path: write_sheet(path, [(np.zeros((8, 8, 3), np.uint8), RECORD)], columns=1),
    "predictions": lambda path: write_predictions(path, [Prediction("a", "b", ("c",))]),
}


@pytest.mark.parametrize("where", ["file", "draft"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_link_at_a_name_or_its_draft_is_replaced(outside, tmp_path, name, where):
    begun = outside.exists()
    path = tmp_path / "out.jsonl"
    (path if where == "file" else tmp_path / ".out.jsonl.tmp").symlink_to(outside)
    WRITERS[name](path)
    assert unchanged(outside, begun)
    assert path.is_file()
    assert not path.is_symlink()


def test_a_journal_is_no_link(outside, tmp_path):
    begun = outside.exists()
    (tmp_path / "a.journal").symlink_to(outside)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="cannot be opened"):
            Journal.open(tmp_path / "a.journal", {"model": "x"}, overwrite=overwrite)
    assert unchanged(outside, begun)


def test_a_failed_write_leaves_no_draft(tmp_path):
    def fail() -> None:
        with replacing(tmp_path / "a.txt") as draft:
            draft.write_text("half")
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - any
        fail()
    assert not any(tmp_path.iterdir())


def test_the_best_checkpoint_of_a_run_lies_in_it(tmp_path):
    (private := tmp_path / "private").mkdir()
    (private / "config.json").write_text("{}")
    (folder := tmp_path / "run").mkdir()
    (folder / "best").symlink_to(private)
    with pytest.raises(OptionError, match="leads out of the run"):
        locate(folder)


def test_a_run_deletes_and_reads_nothing_through_links(tmp_path):
    pytest.importorskip("torch")
    from rsedge.training.optim import Progress
    from rsedge.training.run_folder import RunFolder
    from tests.training.tiny import tiny_recipe

    loaded = tiny_recipe("clip")
    home = tmp_path / "home"
    (home / "thesis").mkdir(parents=True)
    (home / "thesis" / "text").write_text("precious")

    # 1. The folder of the checkpoints is a link.
    folder = RunFolder(tmp_path / "run")
    folder.create(loaded, {"fingerprint": "x"}, overwrite=False)
    folder.checkpoints.rmdir()
    folder.checkpoints.symlink_to(home)
    with pytest.raises(OptionError, match="no run"):
        _ = folder.recipe_path

    # 2. Links among the checkpoints, the metrics, and a draft; a folder that is no checkpoint.
    folder.checkpoints.unlink()
    folder.checkpoints.mkdir()
    (folder.checkpoints / "step-00000001").symlink_to(home / "thesis")
    (folder.checkpoints / "notes").mkdir()
    (folder.checkpoints / ".step-00000002.tmp").symlink_to(home / "thesis")
    folder.metrics.symlink_to(home / "thesis" / "text")
    folder.publish(folder.draft(2), Progress(step=2), loaded, best=True)
    assert sorted(path.name for path in home.rglob("*")) == ["text", "thesis"]
    assert (folder.checkpoints / "notes").is_dir()
    with pytest.raises(OSError, match="symbolic"):
        folder.append({"step": 2})
    assert (home / "thesis" / "text").read_text() == "precious"

    # 3. The last checkpoint is elsewhere.
    (folder.path / "last").unlink()
    (folder.path / "last").symlink_to(home)
    with pytest.raises(RsedgeError, match="leads out of the run"):
        folder.last()
