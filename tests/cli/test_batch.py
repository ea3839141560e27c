"""`rsedge batch` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pyarrow import parquet

from rsedge.cli.main import run
from tests import scenes


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for number in range(4):
        scenes.write(tmp_path / "in" / f"s{number}.tif", scenes.pixels(3, 40, 70, seed=number))
    (tmp_path / "in" / "bad.tif").write_bytes(b"II*")
    return tmp_path / "in"


def batch(bundle: Path, *arguments: object) -> int:
    return run(
        ["batch", "in", "-o", "out", "-m", str(bundle), "--device", "cpu", "--tile-size", "32", *map(str, arguments)]
    )


def test_scenes_get_the_captions_that_the_command_caption_writes(catalog, bundle_path, capsys):
    assert batch(bundle_path, "--json", "--also", "sheet") == 3
    summary = json.loads(capsys.readouterr().out)
    assert (summary["scenes"], summary["done"], summary["failed"], summary["tiles"]) == (5, 4, 1, 24)
    arguments = ["caption", "in/s1.tif", "-m", str(bundle_path), "-o", "one.parquet", "--tile-size", "32"]
    assert run([*arguments, "--device", "cpu"]) == 0
    folder = Path("out/scenes/no-mgrs-tile")
    assert parquet.read_table(folder / "s1.parquet").to_pylist() == parquet.read_table("one.parquet").to_pylist()
    assert (folder / "s1.png").exists()
    assert json.loads(Path("out/failed.jsonl").read_text())["scene"] == "bad"
    assert batch(bundle_path, "--json", "--also", "sheet") == 3
    again = json.loads(capsys.readouterr().out)
    assert (again["done"], again["finished_before"], again["failed_before"]) == (0, 4, 1)


def test_array_jobs_share_a_folder(catalog, bundle_path, monkeypatch, capsys):
    done = 0
    for number in range(1, 4):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
        assert batch(bundle_path, "--shard", "auto", "--json") in (0, 3)
        done += json.loads(capsys.readouterr().out)["done"]
    assert done == 4
    assert len(list(Path("out").rglob("*.parquet"))) == 4


def test_a_dry_run_writes_nothing(catalog, bundle_path, capsys):
    assert batch(bundle_path, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["scenes"], plan["to_do"], plan["tiles"]) == ({"missing": 5}, 5, 30)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--shard", "4/4"], 2, "the shards of 4 are 0 to 3"),
        (["--shard", "half"], 2, "give I/N"),
        (["--shard", "auto"], 2, "none of SLURM_ARRAY_TASK_ID"),
        (["--dtype", "float32"], 2, "pass --embedder"),
        (["--max-failures", "0"], 1, "1 scenes failed, more than 0"),
    ],
)
def test_what_is_refused(catalog, bundle_path, capsys, options, code, said):
    assert batch(bundle_path, *options) == code
    assert said in capsys.readouterr().err
