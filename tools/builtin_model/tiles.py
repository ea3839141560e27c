"""Sets of training tiles on disk, made once and read by the trainer without decoding."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsedge.datasets.examples import CaptionData, Example
from rsedge.runtime.demo.scene import Landscape, compose_scene, compose_tile
from tools.builtin_model.chips import COVERS, SIZE, Chips, read_chips
from tools.builtin_model.compose import TILE, Tile, generated, mixture, mosaic, single, weather
from tools.builtin_model.words import WORDS, caption, covers

if TYPE_CHECKING:
    from rsedge.pixels import UInt8

_log = logging.getLogger(__name__)
_PART = 250  # tiles made from one seed, in one process
_SCENES, _SINGLES, _EACH = 14, 14, 50  # generated scenes; lots of single generated tiles, and their size
_HARD = {"Highway": 1.4, "River": 1.4}  # thin things in all kinds of land need more examples
_WEIGHTS = np.array([_HARD.get(name, 1.0) for name in COVERS])
_CHANCES = _WEIGHTS / _WEIGHTS.sum()
_VALIDATION_LANDS = 0.05  # share of the generated land that only validation tiles show


@dataclass(frozen=True, slots=True)
class Row:
    """One image of an array on disk.

    Attributes:
        path: A ``.npy`` file, uint8 [N, S, S, 3].
        index: Which of its images.
    """

    path: str
    index: int

    def read(self) -> UInt8:
        """The image, uint8 [S, S, 3]."""
        return _array(self.path)[self.index]


@dataclass(frozen=True, slots=True)
class TileSet:
    """What a set of tiles consists of.

    Attributes:
        name: Of its two files.
        size: Side of a tile in pixels.
        mix: Kind of tile → share: ``single``, ``mosaic``, ``mixture``, ``generated`` or ``weather``.
        count: Tiles to train on.
        validation: Tiles to choose checkpoints by, from chips and land of their own.
        captions: Per tile.
        plain: Name the land cover that takes up most by its first word, and nothing else.
    """

    name: str
    size: int
    mix: dict[str, float]
    count: int
    validation: int
    captions: int
    plain: bool = False


CHIPS = TileSet("chips", SIZE, {"single": 0.82, "generated": 0.10, "weather": 0.08}, 60_000, 1_000, 1, plain=True)
MOSAICS = TileSet(
    "mosaics",
    TILE // 2,
    {"single": 0.33, "mosaic": 0.22, "mixture": 0.19, "generated": 0.19, "weather": 0.07},
    20_000,
    500,
    2,
)
TILES = TileSet(
    "tiles", TILE, {"single": 0.30, "mosaic": 0.18, "mixture": 0.22, "generated": 0.23, "weather": 0.07}, 2_400, 200, 2
)
SETS = (CHIPS, MOSAICS, TILES)


def load(tiles: TileSet, folder: Path, *, seed: int) -> CaptionData:
    """A set that :func:`make` wrote, as the trainer takes it; ``seed`` words the captions."""
    path = folder / f"{tiles.name}.npy"
    records = [json.loads(line) for line in path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    return CaptionData(
        tuple(
            Example(
                f"{tiles.name}/{index:06}",
                Row(str(path), index),
                _captions(np.random.default_rng([seed, index]), tiles, record["shares"]),
                record["split"],
            )
            for index, record in enumerate(records)
        ),
        sources=(f"built-in model: {tiles.name}",),
    )


def make(tiles: TileSet, archive: Path, lands: Path, folder: Path, *, seed: int, workers: int) -> None:
    """Compose the tiles of a set, unless they are there; they do not depend on the number of processes.

    Args:
        tiles: What to compose.
        archive: Zip of EuroSAT's RGB chips.
        lands: Folder of :func:`make_lands`.
        folder: Where ``NAME.npy`` (uint8 [N, S, S, 3]) and ``NAME.jsonl`` (shares and split) go.
        seed: Of everything random.
        workers: Processes.
    """
    path = folder / f"{tiles.name}.npy"
    if path.exists():
        _log.info("%s: there already", path)
        return
    total = tiles.count + tiles.validation
    draft = path.with_suffix(".part")
    array = np.lib.format.open_memmap(draft, mode="w+", dtype=np.uint8, shape=(total, tiles.size, tiles.size, 3))
    records: list[dict[str, object]] = []
    for part in _parallel(partial(_part, tiles, archive, lands, seed), -(-total // _PART), workers):
        for tile, split in part:
            array[len(records)] = tile.image
            shares = {name: round(share, 4) for name, share in tile.shares.items()}
            records.append({"shares": shares, "split": split})
    array.flush()
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    path.with_suffix(".jsonl").write_text(lines, encoding="utf-8")
    draft.rename(path)  # last: its presence says that the set is whole
    _log.info("%s: %d tiles of %d px", path, total, tiles.size)


def make_lands(folder: Path, *, seed: int, workers: int) -> None:
    """Generate the land that tiles are cut from: ``dn.npy``, uint16 [N, 3, S, S], and ``cover.npy``, uint8 [N, S, S].

    Half is all over scenes like the one of ``rsedge demo``, half is single tiles where every class comes up often.
    """
    if (folder / "cover.npy").exists():
        _log.info("%s: there already", folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    found = [land for part in _parallel(partial(_lands, seed), _SCENES + _SINGLES, workers) for land in part]
    order = np.random.default_rng(seed).permutation(len(found))
    np.save(folder / "dn.npy", np.stack([found[index].dn for index in order]))
    np.save(folder / "cover.npy", np.stack([found[index].cover for index in order]))
    _log.info("%s: %d pieces of land", folder, len(found))


def _lands(seed: int, number: int) -> list[Landscape]:
    """All tiles of a scene, or a number of single ones."""
    if number >= _SCENES:
        rng = np.random.default_rng(seed + number)
        pieces = [compose_tile(rng, TILE) for _ in range(_EACH)]
    else:
        land = compose_scene(seed=seed + number)
        rows, cols = (length // TILE for length in land.cover.shape)
        corners = [(row * TILE, col * TILE) for row in range(rows) for col in range(cols)]
        windows = [np.s_[..., row : row + TILE, col : col + TILE] for row, col in corners]
        pieces = [Landscape(land.dn[window].copy(), land.cover[window].copy()) for window in windows]
    return [piece for piece in pieces if (piece.dn == 0).mean() < 0.5]


def _parallel(job: Callable[[int], list], count: int, workers: int) -> Iterator[list]:
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(job, range(count))


def _part(tiles: TileSet, archive: Path, lands: Path, seed: int, number: int) -> list[tuple[Tile, str]]:
    """The tiles of one seed; those of validation come last."""
    rng = np.random.default_rng([seed, tiles.size, number])
    total = tiles.count + tiles.validation
    kinds, chances = list(tiles.mix), list(tiles.mix.values())
    made = []
    for index in range(number * _PART, min((number + 1) * _PART, total)):
        split = "train" if index < tiles.count else "val"
        kind = str(rng.choice(kinds, p=chances))
        made.append((_tile(rng, kind, tiles.size, _chips(archive)[split], _land(lands, rng, split)), split))
    return made


def _tile(rng: np.random.Generator, kind: str, size: int, chips: Chips, land: Landscape) -> Tile:
    if kind == "single":
        name = str(rng.choice(tuple(COVERS), p=_CHANCES))
        return single(rng, chips, int(rng.choice(chips.of(name))), size)
    if kind == "generated":
        return generated(rng, land, size)
    return {"mosaic": mosaic, "mixture": mixture, "weather": weather}[kind](rng, chips, size)


def _captions(rng: np.random.Generator, tiles: TileSet, shares: Mapping[str, float]) -> tuple[str, ...]:
    if tiles.plain:
        by_cover = covers(shares)
        return (WORDS[max(by_cover, key=by_cover.__getitem__)][0],)
    return tuple(caption(rng, shares) for _ in range(tiles.captions))


@lru_cache(maxsize=1)
def _chips(archive: Path) -> dict[str, Chips]:
    training, validation, _ = read_chips(archive)
    return {"train": training, "val": validation}


def _land(lands: Path, rng: np.random.Generator, split: str) -> Landscape:
    dn, cover = _array(str(lands / "dn.npy")), _array(str(lands / "cover.npy"))
    border = round(len(dn) * _VALIDATION_LANDS)
    index = int(rng.integers(border)) if split == "val" else int(rng.integers(border, len(dn)))
    return Landscape(np.asarray(dn[index]), np.asarray(cover[index]))


@lru_cache(maxsize=8)
def _array(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r")
