"""Running commands over hostile inputs under watch."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.security import watch
from tests.security.places import Base, Case, Ground

ROOT = Path(__file__).resolve().parents[2]
_FAR = ("rsedge-decoy", "rsedge-nobody", "169.254.169.254")  # an address names what is wrong with an item, too
PATIENCE_S = 10.0
"""Seconds one run may take before its process is ended."""


@dataclass
class Outcome:
    """What one command did with one input.

    Attributes:
        code: Exit code; None where the process died or was ended.
        touched: What the watchers saw.
        captions: What each tile came out as.
        wanted: What they come out as where nothing hostile is there; None where that is not known.
        shown: What a message has to name.
    """

    case: Case
    use: str
    code: int | None
    stdout: str = ""
    stderr: str = ""
    touched: list[str] = field(default_factory=list)
    captions: list[list[object]] = field(default_factory=list)
    wanted: list[list[object]] | None = None
    shown: str = ""
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        """Everything that is not right about it."""
        found = list(self.touched)
        if self.code is None:
            return [*found, f"the process died or hung: {self.stderr[-200:]}"]
        if self.code not in (0, 1, 2, 3) or "Traceback (most recent" in self.stderr or "error in rsedge" in self.stderr:
            found.append(f"ended in a fault ({self.code}): {self.stderr.strip()[-300:]}")
        if self.code == 0 and not self.case.own:
            found.append("opened it")
        if self.code in (1, 2) and not any(text in self.stderr for text in (self.shown, self.case.name, *_FAR)):
            found.append(f"the message does not name {self.shown}: {self.stderr.strip()[:200]}")
        if self.use == "caption" and self.code == 0 and self.wanted is not None and self.captions != self.wanted:
            found.append("its captions are not those of its own pixels")
        return found


class Runner:
    """One process that opens inputs, started again where one kills it, and what watches it."""

    def __init__(self, root: Path) -> None:
        self.listener = watch.Listener()
        self.ground = ground = Ground(root, self.listener.port, self.listener.port6)
        self.listener.content = (ground.outside / "secret.tif").read_bytes()
        self._bases = ground.bases
        self._private = root / "private"
        self._private.mkdir()
        self._decoys = [ground.outside, ground.outside / "below", ground.victim, ground.home / ".aws"]
        self._inotify = watch.Inotify(self._decoys)
        self._traces: list[Path] = []
        self._guarded: dict[str, tuple[str, ...]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted: dict[Base, list[list[object]]] = {}

    def run(self, cases: Iterable[Case], *, uses: Sequence[str] | None = None) -> list[Outcome]:
        """Write each input and give it to its commands, or to ``uses``."""
        outcomes = []
        for case in cases:
            place = self.ground.place(case.name)
            argument = os.fspath(case.make(place))
            for use in case.uses if uses is None else uses:
                outcome = self._one(case, use, argument, place.folder)
                if use == "caption" and case.own and case.own != "any":
                    outcome.wanted = self._captions_of(case.own)
                outcomes.append(outcome)
            shutil.rmtree(place.folder)
        self._stop()
        traced: dict[str, list[str]] = {}
        for trace in self._traces:
            traced |= watch.read_trace(trace, self._decoys, self._guarded)
        for outcome in outcomes:
            outcome.touched += [f"traced {line}" for line in traced.get(f"{outcome.case.name}.{outcome.use}", [])]
        return outcomes

    def close(self) -> None:
        self._stop()
        self.listener.close()
        self._inotify.close()

    def _captions_of(self, base: Base) -> list[list[object]]:
        if base not in self._wanted:
            case = Case(f"clean-{base}", "clean", lambda _: self._bases[base])
            clean = self._one(case, "caption", os.fspath(self._bases[base]), self.ground.cwd)
            if clean.code != 0 or not clean.captions:
                raise RuntimeError(f"the harmless {base} gives no captions: {clean.stderr}")
            self._wanted[base] = clean.captions
        return self._wanted[base]

    def _one(self, case: Case, use: str, argument: str, folder: Path) -> Outcome:
        ground = self.ground
        run = f"{case.name}.{use}"
        self._guarded[run] = case.guarded
        outcome = Outcome(case, use, None, shown=case.told or Path(argument).name[:60])
        watched = [folder, ground.victim, ground.home, ground.temporary, ground.cwd]
        # Its own record of bundles whose hashes it has checked.
        ignored = [ground.home / ".cache"]
        before = watch.snapshot(watched, ignored=ignored)
        process = self._started()
        self._inotify.events()
        self.listener.taken()
        out = ground.out / run
        out.mkdir()
        cwd = ground.cwd if Path(argument).is_absolute() else folder
        asked = {"use": use, "argument": argument, "more": case.options, "out": str(out), "cwd": str(cwd), "run": run}
        began = time.monotonic()
        os.write(self._ask, json.dumps(asked).encode() + b"\n")
        if (line := self._line()) is None:
            outcome.stderr = f"exit status {self._end(process)}"
        else:
            found = json.loads(line)
            outcome.code, outcome.stdout, outcome.stderr = found["code"], found["stdout"], found["stderr"]
            outcome.captions = found["captions"]
        outcome.seconds = time.monotonic() - began
        outcome.touched = self._inotify.events() + self.listener.taken()
        changed = watch.changes(before, watch.snapshot(watched, ignored=ignored))
        outcome.touched += changed
        if changed:
            ground.restore_victim()
        shutil.rmtree(out)
        return outcome

    def _line(self) -> bytes | None:
        content, until = b"", time.monotonic() + PATIENCE_S
        while not content.endswith(b"\n"):
            ready = select.select([self._answer], [], [], max(0.0, until - time.monotonic()))[0]
            part = os.read(self._answer, 1 << 16) if ready else b""
            if not part:
                return None
            content += part
        return content

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        theirs_ask, self._ask = os.pipe()
        self._answer, theirs_answer = os.pipe()
        command = [sys.executable, "-m", "tests.security.worker", str(theirs_ask), str(theirs_answer)]
        if tracing := watch.strace():
            self._traces.append(self._private / f"trace{len(self._traces)}")
            command = [*tracing, str(self._traces[-1]), *command]
        environment = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LD_LIBRARY_PATH")}
        environment |= {
            "HOME": str(self.ground.home),
            "TMPDIR": str(self.ground.temporary),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "RSEDGE_TEST_PRIVATE": str(self._private),
            "OMP_NUM_THREADS": "1",
        }
        with (self.ground.outside / "stdin.tif").open("rb") as stdin, (self._private / "worker.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=log,
                stderr=log,
                cwd=self.ground.cwd,
                env=environment,
                pass_fds=(theirs_ask, theirs_answer),
                start_new_session=True,
            )
        os.close(theirs_ask)
        os.close(theirs_answer)
        # Its start-up is not watched: what it does before the first answer is the harmless run.
        os.write(self._ask, json.dumps(_HARMLESS | {"cwd": str(self.ground.cwd)}).encode() + b"\n")
        if self._line() is None:
            raise RuntimeError("the worker did not start: " + (self._private / "worker.log").read_text()[-2000:])
        return self._process

    def _stop(self) -> None:
        if self._process is None:
            return
        os.close(self._ask)
        try:
            self._process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._end(self._process)
        else:
            os.close(self._answer)
            self._process = None

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        """End the process and what traces it, which would leave it running; the exit status."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(OSError):
            os.close(self._ask)
        os.close(self._answer)
        self._process = None
        return process.wait()


_HARMLESS = {"use": "raw", "argument": "", "more": (), "out": "/nonexistent", "run": "start"}


def run_all(cases: Sequence[Case], folder: Path, *, uses: Sequence[str] | None = None) -> dict[str, list[Outcome]]:
    """What all inputs do, by their names: two processes share them."""

    def share(number: int) -> list[Outcome]:
        runner = Runner(folder / f"ground{number}")
        try:
            return runner.run(cases[number::2], uses=uses)
        finally:
            runner.close()

    with ThreadPoolExecutor(2) as pool:
        outcomes = [outcome for part in pool.map(share, (0, 1)) for outcome in part]
    found: dict[str, list[Outcome]] = {case.name: [] for case in cases}
    for outcome in outcomes:
        found[outcome.case.name].append(outcome)
    return found
