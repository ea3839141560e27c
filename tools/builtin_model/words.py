"""Captions of the built-in model: which words name which land cover, and sentences that follow from its shares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

WORDS: dict[str, tuple[str, ...]] = {
    "fields": ("fields", "cropland", "farmland"),
    "forest": ("forest", "woodland", "trees"),
    "grassland": ("grassland", "scrub", "shrubs"),
    "road": ("road", "roads", "highway"),
    "industry": ("industrial", "warehouses", "factories"),
    "pasture": ("pasture", "pastures", "meadows"),
    "orchards": ("orchards", "vineyards", "plantations"),
    "homes": ("residential", "houses", "town"),
    "river": ("river",),
    "water": ("lake", "sea"),
    "desert": ("desert", "sand"),
    "snow": ("snow", "ice"),
    "cloud": ("cloud", "clouds"),
}
"""Land cover → words that name it in a caption; no word names two covers."""

# What a tile mostly is. The first word says which cover it is, and every cover has two of equal chance: a caption is
# chosen word by word, and a cover whose sentences began alike would win against one whose sentences began in many ways.
_MOST: dict[str, tuple[str, str]] = {
    "fields": ("fields of crops", "cropland in large fields"),
    "forest": ("forest of dark trees", "woodland with dense trees"),
    "grassland": ("grassland with shrubs", "scrub and open grassland"),
    "road": ("road through open land", "highway and its surroundings"),
    "industry": ("industrial area with large buildings", "warehouses and factories"),
    "pasture": ("pasture with hedges", "meadows and green pasture"),
    "orchards": ("orchards in small plots", "vineyards and orchards"),
    "homes": ("residential area with streets", "houses and streets of a town"),
    "river": ("river and its banks", "banks of a wide river"),
    "lake": ("lake", "lake with calm water"),
    "sea": ("sea", "sea with open water"),
    "water": ("lake or sea with calm water", "sea or lake with open water"),
    "desert": ("desert of bare sand", "sand of a dry desert"),
    "snow": ("snow and ice", "ice and snow"),
    "cloud": ("cloud in thick layers", "clouds"),
}
# What else is in it.
_ALSO: dict[str, tuple[str, ...]] = {
    "fields": ("fields", "farmland"),
    "forest": ("forest", "woodland"),
    "grassland": ("grassland", "scrub"),
    "road": ("a road", "a highway"),
    "industry": ("an industrial area", "warehouses"),
    "pasture": ("pasture", "meadows"),
    "orchards": ("orchards", "vineyards"),
    "homes": ("a residential area", "houses"),
    "river": ("a river",),
    "lake": ("a lake",),
    "sea": ("the sea",),
    "water": ("a lake or sea",),
    "desert": ("desert", "sand"),
    "snow": ("snow", "ice"),
    "cloud": ("clouds", "some cloud"),
}
# How a tile lies by the one other thing in it.
_BY: dict[str, tuple[str, ...]] = {
    "road": ("crossed by a road", "crossed by a highway"),
    "river": ("crossed by a river", "along a river"),
    "lake": ("on the shore of a lake",),
    "sea": ("on the coast of the sea",),
    "cloud": ("under some cloud", "partly under clouds"),
}
_COVER = {"lake": "water", "sea": "water"}  # names of the palette that are more exact than a cover
_LINES = {"river": 0.015, "road": 0.01}  # shares worth a word: thin things are small but catch the eye
_AREA = 0.07
_EVEN = 0.6  # from this share of the largest on, another thing stands beside it on equal terms


def caption(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    """A caption that follows from the shares; the wording varies, what is named does not.

    Args:
        rng: Chooses the wording.
        shares: Share of each thing in the tile: a cover of :data:`WORDS`, ``lake`` or ``sea``.
    """

    def choose(table: Mapping[str, tuple[str, ...]], name: str) -> str:
        return str(rng.choice(table[name]))

    most, *others = sorted(shares, key=lambda name: -shares[name])
    named = [name for name in others if shares[name] >= _LINES.get(name, _AREA)][:3]
    head = choose(_MOST, most)
    if not named:
        return head
    if len(named) == 1:
        other = named[0]
        if shares[other] > _EVEN * shares[most]:
            return f"{head} and {choose(_MOST, other)}"
        if other in _BY and rng.random() < 0.8:
            return f"{head} {choose(_BY, other)}"
    *first, last = [choose(_ALSO, name) for name in named]
    return f"{head} with {', '.join(first)} and {last}" if first else f"{head} with {last}"


def phrases() -> tuple[str, ...]:
    """Texts that hold every word a caption can have."""
    tables = [choices for table in (_MOST, _ALSO, _BY, WORDS) for choices in table.values()]
    return ("and", "with", ",", *(phrase for choices in tables for phrase in choices))


def covers(shares: Mapping[str, float]) -> dict[str, float]:
    """The shares by the covers of :data:`WORDS`, lakes and seas together."""
    sums: dict[str, float] = {}
    for name, share in shares.items():
        cover = _COVER.get(name, name)
        sums[cover] = sums.get(cover, 0.0) + share
    return sums


def worth_naming(cover: str, share: float) -> bool:
    """Whether a cover takes up enough of a tile for a caption to name it."""
    return share >= _LINES.get(cover, _AREA)


def named_covers(text: str) -> set[str]:
    """The covers that a caption names."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return {cover for cover, names in WORDS.items() if words & set(names)}
