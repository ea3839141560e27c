"""EuroSAT chips: reading them, keeping some apart, and bringing them to the look of the images that rsedge feeds.

EuroSAT: Helber et al., 2019, MIT licence; 64 × 64 pixels at 10 m of Sentinel-2, one land cover each.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from rsedge.pixels import ReflectanceRule

if TYPE_CHECKING:
    import numpy.typing as npt

    from rsedge.pixels import UInt8

    Floats = npt.NDArray[np.float32]

SIZE = 64
COVERS = {
    "AnnualCrop": "fields",
    "Forest": "forest",
    "HerbaceousVegetation": "grassland",
    "Highway": "road",
    "Industrial": "industry",
    "Pasture": "pasture",
    "PermanentCrop": "orchards",
    "Residential": "homes",
    "River": "river",
    "SeaLake": "water",
}
"""EuroSAT's classes → land covers of :mod:`tools.builtin_model.words`."""

VALIDATION = 220  # chips of each class that choose checkpoints and settings
HELD_OUT = 100  # chips of each class that only the last measurement sees

# Measured on chips whose 13 bands are known: 8-bit = 255 * DN / 2750, DN being reflectance at the top of the
# atmosphere. The runtime sees reflectance at the ground, by ReflectanceRule.
_FULL_SCALE = 2750
_AIR = np.array([238.0, 388.0, 669.0], np.float32)  # DN that clear air adds in red, green and blue
_THROUGH = 0.93  # share of the light that passes


@dataclass(frozen=True, slots=True)
class Chips:
    """Chips of one split.

    Attributes:
        pixels: As EuroSAT has them, uint8 [N, 64, 64, 3].
        classes: Number of each chip's class in ``tuple(COVERS)``, int64 [N].
        means: Mean colour of each, float32 [N, 3].
    """

    pixels: UInt8
    classes: npt.NDArray[np.int64]
    means: Floats

    def __len__(self) -> int:
        return len(self.pixels)

    def of(self, name: str) -> npt.NDArray[np.int64]:
        """Where the chips of a class are, int64 [n]."""
        return np.flatnonzero(self.classes == tuple(COVERS).index(name))

    def cover(self, index: int) -> str:
        """The land cover of a chip."""
        return tuple(COVERS.values())[self.classes[index]]


def read_chips(archive: Path) -> tuple[Chips, Chips, Chips]:
    """The chips to train on, those of validation, and those held out; the hash of its file name places a chip.

    Args:
        archive: Zip of EuroSAT's RGB images, a folder per class.

    Raises:
        SystemExit: A class is missing or has too few chips.
    """
    names: dict[str, list[str]] = {name: [] for name in COVERS}
    held_out: list[tuple[str, str]] = []
    validation: list[tuple[str, str]] = []
    training: list[tuple[str, str]] = []
    with zipfile.ZipFile(archive) as files:
        for path in map(PurePosixPath, files.namelist()):
            if path.suffix == ".jpg" and path.parent.name in names:
                names[path.parent.name].append(str(path))
        for name, paths in names.items():
            if len(paths) <= HELD_OUT + VALIDATION:
                raise SystemExit(f"{archive} has {len(paths)} chips of {name}, too few to keep some apart")
            paths.sort(key=lambda path: hashlib.sha256(PurePosixPath(path).name.encode()).digest())
            members = [(name, path) for path in paths]
            validation += members[:VALIDATION]
            held_out += members[VALIDATION : VALIDATION + HELD_OUT]
            training += members[VALIDATION + HELD_OUT :]
        return _load(files, training), _load(files, validation), _load(files, held_out)


def to_runtime_look(image: Floats, *, clearing: float = 1.0, air: Floats | None = None) -> Floats:
    """A chip as :class:`rsedge.pixels.ReflectanceRule` would have rendered it, float32 [..., 3], not clipped.

    Args:
        image: EuroSAT's grey levels, float32 [..., 3].
        clearing: How much of the air's light is taken away: 1 is ground reflectance (L2A), 0 the top of the
            atmosphere (L1C).
        air: Digital numbers that the air adds to red, green and blue; None: those of a clear day.
    """
    air = _AIR if air is None else air
    dn = image * np.float32(_FULL_SCALE / 255)
    dn = (dn - clearing * air) / np.float32(1 - clearing * (1 - _THROUGH))
    return np.asarray(1 + dn * np.float32(254 / ReflectanceRule().full_scale), np.float32)


def random_air(rng: np.random.Generator) -> tuple[float, Floats]:
    """A clearing and an air for :func:`to_runtime_look`, from none taken away to slightly too much."""
    return rng.uniform(0, 1.1), (_AIR * rng.normal(1, 0.08, 3)).astype(np.float32)


def to_uint8(image: Floats) -> UInt8:
    """Grey levels 1 to 255, as the runtime's rule gives them."""
    return np.clip(np.rint(image), 1, 255).astype(np.uint8)


def _load(files: zipfile.ZipFile, part: list[tuple[str, str]]) -> Chips:
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(files.read(path))).convert("RGB")) for _, path in part])
    if pixels.shape[1:] != (SIZE, SIZE, 3):
        raise SystemExit(f"the chips are {pixels.shape[1:]}, expected ({SIZE}, {SIZE}, 3)")
    order = tuple(COVERS)
    classes = np.array([order.index(name) for name, _ in part], np.int64)
    return Chips(pixels, classes, pixels.mean((1, 2), dtype=np.float32))
