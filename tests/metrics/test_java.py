"""What runs in Java, with a stand-in for it where the real thing is absent or must fail."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from rsedge.errors import BackendError
from rsedge.metrics import java
from rsedge.metrics.captions import score_captions

STAND_IN = """#!{python}
import json, os, sys
arguments = sys.argv[1:]
if arguments == ["-version"]:
    sys.exit(print('openjdk version "{version}" 2025-04-15', file=sys.stderr))
with open({log!r}, "a") as log:
    log.write(json.dumps([os.getcwd(), *arguments]) + "\\n")
{body}
"""
SPICE = """
given = json.load(open(arguments[arguments.index("spice-1.0.jar") + 1]))
assert os.path.isdir(arguments[arguments.index("-cache") + 1])
score = {"river": 0.5, "": None}
found = [{"image_id": item["image_id"], "scores": {"All": {"f": score.get(item["test"], len(item["refs"]) / 10)}}}
         for item in reversed(given)]
json.dump(found, open(arguments[arguments.index("-out") + 1], "w"))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a ``java`` of our own on the PATH, and an installed package that has SPICE's models."""
    package = tmp_path / "pycocoevalcap"
    (package / "spice" / "lib").mkdir(parents=True)
    (package / "tokenizer").mkdir()
    for name in java._SPICE_MODELS:
        (package / "spice" / "lib" / name).touch()
    monkeypatch.setattr(java, "_package", lambda: package)

    def install(body: str, version: str = "17.0.15") -> Path:
        log, program = tmp_path / "log", tmp_path / "bin" / "java"
        program.parent.mkdir()
        program.write_text(STAND_IN.format(python=sys.executable, version=version, log=str(log), body=body))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        return log

    return install


@pytest.mark.parametrize(("version", "opened"), [("17.0.15", True), ("1.8.0_392", False)])
def test_spice_is_called_and_read(stand_in, version, opened):
    log = stand_in(SPICE, version)
    scores = score_captions(["river", "", "two roads"], [["a river"], ["x"], ["two", "roads"]], metrics=["spice"])
    assert scores["spice"].per_image.tolist() == [0.5, 0.0, 0.2]  # in our order; no proposition counts as 0
    assert scores["spice"].value == pytest.approx(0.7 / 3)
    folder, *arguments = json.loads(log.read_text())
    assert folder.endswith("spice")
    assert ("--add-opens=java.base/java.lang=ALL-UNNAMED" in arguments) == opened
    given = Path(arguments[arguments.index("spice-1.0.jar") + 1])
    assert not given.parent.exists()  # nothing is left behind


def test_spice_without_its_models(stand_in, tmp_path):
    stand_in(SPICE)
    (tmp_path / "pycocoevalcap" / "spice" / "lib" / java._SPICE_MODELS[1]).unlink()
    assert "python -m pycocoevalcap.spice.get_stanford_models" in java.spice_problem()
    with pytest.raises(BackendError, match="spice: SPICE needs Stanford CoreNLP's models"):
        score_captions(["river"], [["a river"]], metrics=["spice"])
    with pytest.raises(BackendError, match="SPICE needs Stanford CoreNLP's models"):
        java.spice(["river"], [["a river"]])


def test_java_fails(stand_in):
    stand_in("sys.exit('no memory\\nat all')")
    with pytest.raises(BackendError, match="java failed with code 1: no memory; install"):
        java.ptb_tokens(["a"])
    with pytest.raises(BackendError, match="java failed with code 1: no memory"):
        java.spice(["a"], [["b"]])


def test_meteor_dies(stand_in):
    stand_in("sys.exit(3)")
    with pytest.raises(BackendError, match="METEOR's Java process failed"):
        java.meteor(["a"], [["b"]])


def test_the_tokenizer_loses_a_line(stand_in):
    stand_in("print('a')")
    with pytest.raises(BackendError, match="gave 2 lines for 3 captions: use treebank"):
        java.ptb_tokens(["a", "b", "c"])


def test_no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install a Java runtime" in java.java_problem()
    assert java.spice_problem().startswith("there is no java on this machine")
    with pytest.raises(BackendError, match="METEOR runs in Java, and there is no java"):
        java.meteor(["a"], [["b"]])
