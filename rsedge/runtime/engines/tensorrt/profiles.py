"""Which shapes an engine is made for: a few optimisation profiles per graph, from the graph contract's dimension names.

TensorRT fixes at build time which sizes each dynamic dimension may have and which it is tuned for. The names below are
those the manifest gives for its graphs: images as ``batch``, ``images``; rows (beams of images)
as ``rows``, ``previous``; ``columns`` of the self cache; ``watched`` and ``tokens``. ``top`` and ``grow`` are inputs
whose value is a size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rsedge.errors import OptionError
from rsedge.runtime.engines.contract import CACHE_BUCKET

if TYPE_CHECKING:
    from rsedge.bundle import Manifest, TensorSpec

Range = tuple[int, int, int]
"""Smallest, tuned-for and largest size."""
Profile = dict[str, Range]
"""Dimension or value name → its range."""

SIZE_INPUTS = ("top", "grow")
"""Inputs int64 [1] that shapes depend on: TensorRT wants them in this machine's memory, and a range for their value."""

_IMAGES, _BEAMS, _TOKENS = 32, 3, 40
_IMAGES_EMBEDDED = 64
_MOST_CANDIDATES = 3839  # of TensorRT's TopK


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What engines are made for."""

    images: int = _IMAGES
    """Images computed together."""
    beams: int = _BEAMS
    """Rows per image."""
    tokens: int = _TOKENS
    """Longest caption."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, expected 1 to {most}"
            for name, value, most in (
                ("images", self.images, 4096),
                ("beams", self.beams, 64),
                ("tokens", self.tokens, 4096),
            )
            if not 1 <= value <= most
        ]
        if problems:
            raise OptionError("; ".join(problems))

    @classmethod
    def of(
        cls, manifest: Manifest, *, images: int | None = None, beams: int | None = None, tokens: int | None = None
    ) -> Limits:
        """The given limits, else what the bundle's defaults need and a little more."""
        generation, decoder = manifest.generation, manifest.decoder
        longest = decoder.max_positions if decoder else 4096
        usual = generation.max_new_tokens if generation else None
        return cls(
            images=images or (_IMAGES if generation else _IMAGES_EMBEDDED),
            beams=beams or max(_BEAMS, generation.num_beams if generation else 1),
            tokens=min(tokens or max(_TOKENS, usual or 0), longest),
        )


def profiles(role: str, limits: Limits, *, context_length: int | None = None) -> list[Profile]:
    """The optimisation profiles of the graph ``role``, the narrowest first.

    Args:
        role: As in the manifest: ``vision``, ``text``, ``step`` or ``self_cache``.
        limits: What they must serve.
        context_length: Of the text graph.
    """
    images, beams = limits.images, limits.beams
    few = max(1, images // 4)
    columns = -(-limits.tokens // CACHE_BUCKET) * CACHE_BUCKET + CACHE_BUCKET
    if role in ("vision", "text"):
        tokens = context_length or limits.tokens
        length: Profile = {"tokens": (1, min(16, tokens), tokens)}
        return _distinct([{"batch": (1, few, few), **length}, {"batch": (1, images, images), **length}])
    cache = (CACHE_BUCKET, min(2 * CACHE_BUCKET, columns), columns)
    if role == "step":
        shared: Profile = {
            "columns": cache,
            "images": (1, images, images),
            "watched": (0, 0, columns + CACHE_BUCKET),
            "top": (1, 2 * beams, min(_MOST_CANDIDATES, 2 * beams + columns + CACHE_BUCKET)),
        }
        rows = [(1, images, images), (1, images * min(beams, 3), images * beams)]
        return _distinct([{"rows": each, **shared} for each in rows])
    rows = [(1, images, images), (1, images * min(beams, 3), images * beams)]
    return _distinct(
        [{"rows": each, "previous": each, "columns": cache, "grow": (0, 0, CACHE_BUCKET)} for each in rows]
    )


def _distinct(candidates: list[Profile]) -> list[Profile]:
    return [profile for index, profile in enumerate(candidates) if profile not in candidates[:index]]


def fitting(candidates: list[Profile], sizes: Mapping[str, int]) -> int | None:
    """The first profile that allows ``sizes``, or None."""
    for index, profile in enumerate(candidates):
        if all(profile[name][0] <= size <= profile[name][2] for name, size in sizes.items() if name in profile):
            return index
    return None


def widened(candidates: list[Profile], sizes: Mapping[str, int]) -> list[Profile]:
    """The profiles with the last of them widened so that it allows ``sizes``: doubled, to widen seldom.

    Raises:
        OptionError: A size is below what any profile could start at.
    """
    last = dict(candidates[-1])
    for name, size in sizes.items():
        if name in last:
            low, tuned, high = last[name]
            if size > high:
                most = _MOST_CANDIDATES if name == "top" else 1 << 30
                if size > most:
                    raise OptionError(f"{name} is {size}, TensorRT allows at most {most}")
                last[name] = (low, tuned, min(most, 1 << (size - 1).bit_length()))
            elif size < low:
                last[name] = (size, tuned, high)
    return [*candidates[:-1], last]


def shape_of(tensor: TensorSpec, profile: Profile) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The smallest, tuned-for and largest shape of an input."""
    low, tuned, high = (
        tuple(size if isinstance(size, int) else profile[size][index] for size in tensor.shape) for index in range(3)
    )
    return low, tuned, high
