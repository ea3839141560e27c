"""Run many scenes, each into a file of its own; a later run does what is missing.

A scene is finished when its output exists: outputs appear by rename. The footer of an output names the models, the
options and the input that it came from. Nothing else is kept, so several processes can share a folder, also on a
network file system without locks, when each has its own shard.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from rsedge.errors import BatchError, InUseError, OptionError, SceneError
from rsedge.files import open_itself
from rsedge.jsonvalues import parse_json
from rsedge.runtime.outputs.files import Target, file_target, whole_file
from rsedge.runtime.outputs.geoparquet import EmbeddingsInfo, GeoParquetWriter, embeddings_table
from rsedge.runtime.outputs.records import RESULTS, Table, TileResult
from rsedge.runtime.run.pipeline import Models, Summary, Work, execute_run
from rsedge.runtime.run.sources import TileOptions
from rsedge.runtime.scenes.scene import Scene
from rsedge.texts import plain, redact

if TYPE_CHECKING:
    from rsedge.runtime.run.batch_catalog import Entry
    from rsedge.runtime.scenes.products.product import Product

ORIGIN_KEY = "rsedge:origin"
"""Key in the footer of an output. Its value is JSON: ``run`` (models and options), ``scene`` (the input) and
``unreadable`` (the number of unreadable tiles)."""

State = Literal["missing", "finished", "stale", "failed", "elsewhere"]
"""State of a scene. ``stale``: finished with other models or options, or from another input. ``failed``: an earlier run
could not finish it, or finished it with unreadable tiles. ``elsewhere``: of another shard."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``number`` of ``count`` of a catalogue. A scene's part depends on its id alone: it stays the same when the
    catalogue grows. Raises OptionError unless 0 <= number < count.
    """

    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise OptionError(
                f"shard {self.number}/{self.count} does not exist: the shards of {self.count} are 0 to {self.count - 1}"
            )

    def __contains__(self, entry: Entry) -> bool:
        return entry.key % self.count == self.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is done with each scene of a batch."""

    models: Models
    tiling: TileOptions = field(default_factory=TileOptions)
    scene: Mapping[str, Any] = field(default_factory=dict)
    """The options of ``Scene.open``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other values that decide the results, as JSON values."""
    beside: Callable[[Scene, Path], Sequence[Target]] = lambda _scene, _output: ()
    """Returns further outputs of a scene, given its main output."""

    def origin(self) -> dict[str, Any]:
        """Return the models and options that decide the results, as JSON values."""
        tiling = {name: value for name, value in asdict(self.tiling).items() if name != "readers"}
        found = Work([], self.models).fingerprint({**tiling, "settings": dict(self.settings)})
        return {name: value for name, value in json.loads(json.dumps(found)).items() if name != "scenes"}

    def run(self, entry: Entry, output: Path, progress: Callable[[Any], None] | None = None) -> Summary:
        """Run one scene into ``output``, GeoParquet, continuing an interrupted run of it. Raises the errors of
        :func:`rsedge.runtime.run.pipeline.run`, and SceneError for an entry that cannot be used.
        """
        if entry.source is None:
            raise SceneError(entry.error or f"{entry.name} cannot be used")
        scene = Scene.open(entry.source, **self.scene)
        origin = {"run": self.origin(), "scene": scene.identity()}
        info, models = None, self.models
        if models.embedder is not None:
            info = EmbeddingsInfo(
                model=models.embedder.model,
                model_hash=models.embedder.hash,
                dim=models.embedder.dim,
                dtype=models.dtype,
                caption_model=models.captioner.model if models.captioner else None,
            )
        writer = partial(_SceneWriter, table=embeddings_table(info) if info else RESULTS, info=info, origin=origin)
        output.parent.mkdir(parents=True, exist_ok=True)
        targets = [file_target(output, writer), *self.beside(scene, output)]
        return execute_run([scene], models, targets, self.tiling, True, self.settings, progress)


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """Progress of a batch."""

    scene: str
    """Scene in work."""
    scenes_done: int
    """Scenes of this run that are finished or failed."""
    scenes_total: int
    """Scenes of this run."""
    failed: int
    tiles: int
    """Records written by this run."""
    seconds: float
    """Time since its start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSummary:
    """Result of a batch."""

    folder: str
    model: str
    """``name@hash12`` of the bundle."""
    scenes: int
    """Scenes of the catalogue, those of other shards included."""
    done: int
    """Scenes that this run finished."""
    finished_before: int
    failed: int
    """Scenes that this run could not finish, or finished with unreadable tiles."""
    failed_before: int
    """Scenes that an earlier run could not finish, and this run left alone."""
    stale: int
    """Scenes finished earlier with other models or options, and left alone."""
    other_shards: int
    in_use: int
    """Scenes that another process was working on."""
    tiles: int
    """Records written by this run."""
    seconds: float
    failures: str | None
    """File that lists the failed scenes, or None if there are none."""

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return asdict(self)


class Batch:
    """A catalogue, a job and a folder.

    Args:
        entries: Returns the scenes; called once for the plan and once for the run.
        job: What is done with each scene.
        folder: Folder of the outputs, made by :meth:`run`.
        shard: Part of the catalogue to do.
        retry_failed: Also do scenes that failed in an earlier run.
        redo_stale: Also do scenes finished with other models or options, or from another state of the input.
    """

    def __init__(
        self,
        entries: Callable[[], Iterable[Entry]],
        job: Job,
        folder: Path,
        *,
        shard: Shard | None = None,
        retry_failed: bool = False,
        redo_stale: bool = False,
    ) -> None:
        self._entries, self._job, self.folder, self._shard = entries, job, folder, shard or Shard()
        self._retry, self._redo, self._origin = retry_failed, redo_stale, job.origin()
        name = "failed" if self._shard.count == 1 else f"failed-{self._shard.number}-of-{self._shard.count}"
        self.failures = folder / f"{name}.jsonl"
        """File of this shard's failures; every shard reads the files of all."""

    def plan(self) -> Iterator[tuple[Entry, State]]:
        """Yield every scene with its state; reads footers, and opens scenes only with ``redo_stale``."""
        failed = {str(line["scene"]) for path in self.folder.glob("failed*.jsonl") for line in read_failures(path)}
        for entry in self._entries():
            yield entry, self._state(entry, failed)

    def sample(self, most: int = 16) -> tuple[Counter[State], list[Scene]]:
        """Return the number of scenes by state, and up to ``most`` scenes that :meth:`run` would do, drawn with a fixed
        seed. Scenes that cannot be opened are left out.
        """
        drawn: list[Entry]
        random, states, drawn, wanted = Random(0), Counter[State](), [], 0
        for entry, state in self.plan():
            states[state] += 1
            if not self.wanted(state) or entry.source is None:
                continue
            wanted += 1
            if len(drawn) < most:
                drawn.append(entry)
            elif (place := random.randrange(wanted)) < most:
                drawn[place] = entry
        scenes = []
        for entry in drawn:
            with suppress(SceneError):
                scenes.append(Scene.open(cast("str | Product", entry.source), **self._job.scene))
        return states, scenes

    def wanted(self, state: State) -> bool:
        """Return whether :meth:`run` does a scene in this state."""
        return state == "missing" or (state == "failed" and self._retry) or (state == "stale" and self._redo)

    def run(
        self, *, max_failures: int | None = None, progress: Callable[[BatchProgress], None] | None = None
    ) -> BatchSummary:
        """Do the scenes that are wanted, in the order of the catalogue.

        Raises:
            OptionError: An option does not fit a scene.
            BatchError: More than ``max_failures`` scenes failed.
            OutputError: An output cannot be written: no later scene's could.
        """
        # 1. The plan: how many scenes there are in each state.
        self.folder.mkdir(parents=True, exist_ok=True)
        states = Counter(state for _, state in self.plan())
        total = sum(count for state, count in states.items() if self.wanted(state))
        began, tiles, done, failed, in_use = time.monotonic(), 0, 0, 0, 0

        # 2. One scene after the other; failures are listed as they happen.
        listed = {str(line["scene"]): line for line in read_failures(self.failures)}
        for entry, state in self.plan():
            if not self.wanted(state):
                continue
            if progress:
                progress(BatchProgress(entry.id, done + failed, total, failed, tiles, time.monotonic() - began))
            listed.pop(entry.id, None)
            try:
                summary = self._job.run(entry, self.folder / entry.output)
            except InUseError:
                in_use += 1
                continue
            except SceneError as error:
                reason = str(error)
            else:
                tiles += summary.tiles
                reason = f"{summary.read_errors} of {summary.tiles} tiles are unreadable" if summary.read_errors else ""
            if not reason:
                done += 1
                continue
            failed += 1
            listed[entry.id] = {"scene": entry.id, "name": plain(entry.name), "error": redact(plain(reason))}
            with self.failures.open("a", encoding="utf-8") as stream:
                stream.write(_line(listed[entry.id]))
            if max_failures is not None and failed > max_failures:
                raise BatchError(
                    f"{failed} scenes failed, more than {max_failures} (--max-failures): {self.failures} lists them; "
                    "the same command continues with the others"
                )

        # 3. The list without the scenes that this run finished.
        if listed:
            with whole_file(self.failures) as draft:
                draft.write_text("".join(map(_line, listed.values())), "utf-8")
        else:
            self.failures.unlink(missing_ok=True)
        return BatchSummary(
            folder=str(self.folder),
            model=self._job.models.model,
            scenes=states.total(),
            done=done,
            finished_before=states["finished"],
            failed=failed,
            failed_before=0 if self._retry else states["failed"],
            stale=0 if self._redo else states["stale"],
            other_shards=states["elsewhere"],
            in_use=in_use,
            tiles=tiles,
            seconds=round(time.monotonic() - began, 3),
            failures=str(self.failures) if self.failures.exists() else None,
        )

    def _state(self, entry: Entry, failed: set[str]) -> State:
        if entry not in self._shard:
            return "elsewhere"
        output = self.folder / entry.output
        if not output.exists():
            return "failed" if entry.id in failed else "missing"
        origin = read_origin(output)
        if origin is None or origin.get("run") != self._origin:
            return "stale"
        if self._redo and entry.source is not None:
            try:
                scene = Scene.open(entry.source, **self._job.scene).identity()
            except SceneError:
                return "finished"  # the input is gone, the result is there
            if origin.get("scene") != json.loads(json.dumps(scene)):
                return "stale"
        return "failed" if origin.get("unreadable") else "finished"


class _SceneWriter(GeoParquetWriter):
    """Writes the results of one scene, with their origin in the footer."""

    def __init__(self, stream: BinaryIO, table: Table, info: EmbeddingsInfo | None, origin: Mapping[str, Any]) -> None:
        super().__init__(stream, table, info)
        self._origin, self._unreadable = origin, 0

    def write(self, records: Iterable[TileResult]) -> None:
        """Append records."""
        results = list(records)
        self._unreadable += sum(result.record.status == "read_error" for result in results)
        super().write(results)

    def finish(self) -> None:
        """Write the last rows, the metadata and the footer."""
        self._metadata[ORIGIN_KEY] = json.dumps({**self._origin, "unreadable": self._unreadable})
        super().finish()


def read_origin(output: Path) -> dict[str, Any] | None:
    """Return what the footer of an output states of its origin; None if it states nothing or is no Parquet."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with open(output, "rb", opener=open_itself) as stream:
            found = (parquet.read_metadata(stream).metadata or {}).get(ORIGIN_KEY.encode())
        origin = parse_json(found) if found else None
    except (OSError, ValueError, pa.ArrowException):
        return None
    return origin if isinstance(origin, dict) else None


def read_failures(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a list of failures; lines that are not whole, which a killed run left, are skipped."""
    if path.exists():
        with open(path, "rb", opener=open_itself) as stream:
            for text in stream:
                with suppress(ValueError):
                    line = parse_json(text)
                    if isinstance(line, dict) and "scene" in line:
                        yield line


def _line(failure: Mapping[str, Any]) -> str:
    return json.dumps(failure, ensure_ascii=False) + "\n"
