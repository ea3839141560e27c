"""What runs in Java: the PTB tokenizer, METEOR and SPICE, as pycocoevalcap ships them. Optional everywhere."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsedge.errors import BackendError

_GET_JAVA = "install a Java runtime (Debian and Ubuntu: apt install default-jre-headless) and have java on the PATH"
_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_GET_SPICE = (
    "fetch them once with 'python -m pycocoevalcap.spice.get_stanford_models', which downloads "
    "http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip (about half a gigabyte) and puts "
    f"{' and '.join(_SPICE_MODELS)} into"
)
_OPENED = (
    "java.lang", "java.util", "java.util.concurrent", "java.math", "java.net", "java.text", "java.io", "java.nio",
    "sun.nio.ch",
)  # fmt: skip


def java_problem() -> str | None:
    """Why Java cannot be used and what to do, or None where it can."""
    return None if shutil.which("java") else f"there is no java on this machine: {_GET_JAVA}"


def spice_problem() -> str | None:
    """Why SPICE cannot be computed and what to do, or None where it can. Nothing is ever downloaded here."""
    folder = _package() / "spice" / "lib"
    problems = [java_problem()]
    if not all((folder / name).is_file() for name in _SPICE_MODELS):
        need = "SPICE needs Stanford CoreNLP's models, which pycocoevalcap does not hold"
        problems.append(f"{need}: {_GET_SPICE} {folder}")
    return "; ".join(filter(None, problems)) or None


def ptb_tokens(captions: Sequence[str]) -> list[list[str]]:
    """Stanford's PTB tokens of each caption, lower-cased, punctuation still there; BackendError where Java is missing
    or fails.

    The jar, version 3.4.1, and its flags are those of pycocoevalcap's ``PTBTokenizer``, which would write temporary
    files into the installed package and read anything but ASCII by the locale.
    """
    if problem := java_problem():
        raise BackendError(f"the PTB tokenizer runs in Java, and {problem}; or choose the tokenizer treebank")
    folder = _package() / "tokenizer"
    # A line per caption: whatever Java takes for the end of a line becomes a space.
    lines = [re.sub(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", " ", caption) for caption in captions]
    command = ["java", "-cp", "stanford-corenlp-3.4.1.jar", "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    output = _run(command, cwd=folder, stdin="".join(f"{line}\n" for line in lines))
    found = [line.split(" ") for line in output.split("\n")[: len(lines)]]
    if len(found) != len(lines):
        raise BackendError(f"the PTB tokenizer gave {len(found)} lines for {len(lines)} captions: use treebank instead")
    return [[token for token in tokens if token.strip()] for tokens in found]


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """METEOR 1.5 (English, normalised) of tokenized captions: of the corpus, and of each image. BackendError where Java
    is missing or fails.
    """
    if problem := java_problem():
        raise BackendError(f"METEOR runs in Java, and {problem}")
    from pycocoevalcap.meteor.meteor import Meteor

    scorer: Any = None
    try:
        scorer = Meteor()
        answers = {index: [text] for index, text in enumerate(predictions)}
        value, each = scorer.compute_score({index: list(texts) for index, texts in enumerate(references)}, answers)
    except (OSError, ValueError) as error:  # a process that died answers with an empty line
        if scorer is not None:
            scorer.meteor_p.kill()
            with contextlib.suppress(OSError):  # what was still to be written; or the scorer's end would raise it
                scorer.meteor_p.stdin.close()
        raise BackendError(
            f"METEOR's Java process failed ({error}): it needs 2 GB of memory; see 'java -version'"
        ) from error
    finally:
        if scorer is not None and scorer.lock.locked():
            scorer.lock.release()
    return float(value), [float(score) for score in each]


def spice(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """SPICE 1.0 of tokenized captions: the mean F-score, and that of each image.

    The jar is pycocoevalcap's; its cache and files live in a temporary folder, not in the installed package. An image
    whose captions have no proposition at all has no F-score; it counts as 0. BackendError where Java or the CoreNLP
    models are missing, or it fails.
    """
    if problem := spice_problem():
        raise BackendError(problem)
    pairs = enumerate(zip(predictions, references, strict=True))
    items = [{"image_id": index, "test": text, "refs": list(texts)} for index, (text, texts) in pairs]
    folder = _package() / "spice"
    with tempfile.TemporaryDirectory(prefix="spice-") as scratch:
        given, result = Path(scratch, "in.json"), Path(scratch, "out.json")
        given.write_text(json.dumps(items), encoding="utf-8")
        Path(scratch, "cache").mkdir()
        # Its serialiser looks into java.lang and more, which Java 16 and later forbid unless told otherwise.
        told = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
        modern = (major := re.search(r'version "(?:1\.)?(\d+)', told)) is not None and int(major[1]) > 8
        opened = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _OPENED] if modern else []
        command = ["java", *opened, "-Xmx8G", "-jar", "spice-1.0.jar", str(given), "-cache", f"{scratch}/cache"]
        _run([*command, "-out", str(result), "-subset", "-silent"], cwd=folder)
        found = {item["image_id"]: item["scores"]["All"]["f"] for item in json.loads(result.read_bytes())}
    each = [float(found[index] or 0) for index in range(len(items))]
    return sum(each) / len(each), each


def _package() -> Path:
    """Where pycocoevalcap lies; it has no ``__init__`` of its own."""
    import pycocoevalcap

    return Path(next(iter(pycocoevalcap.__path__)))


def _run(command: Sequence[str], *, cwd: Path, stdin: str = "") -> str:
    try:
        done = subprocess.run(command, cwd=cwd, input=stdin.encode(), capture_output=True, check=True)
    except OSError as error:
        raise BackendError(f"java cannot be started ({error}): {_GET_JAVA}") from error
    except subprocess.CalledProcessError as error:
        told = error.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise BackendError(f"java failed with code {error.returncode}: {told[0][:300]}; {_GET_JAVA}") from error
    return done.stdout.decode("utf-8")
