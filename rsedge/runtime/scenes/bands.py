"""Which bands of a raster are red, green and blue, and how one knows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from rsedge.errors import OptionError

ROLES = ("red", "green", "blue")

# First words of a band description that name a role, in order of trust: Sentinel-2 numbers and colours, then channels
# of a true-colour image, which Earth Engine exports beside the bands.
_NAMES = (
    {"red": {"b04", "b4", "red", "r"}, "green": {"b03", "b3", "green", "g"}, "blue": {"b02", "b2", "blue", "b"}},
    {"red": {"tci_r"}, "green": {"tci_g"}, "blue": {"tci_b"}},
)


@dataclass(frozen=True, slots=True)
class BandChoice:
    """The bands to read and why.

    Attributes:
        indexes: 1-based band numbers of red, green and blue; a single one for a palette.
        reason: Why, as one clause.
        palette: True where the one band holds indexes into a colour table.
    """

    indexes: tuple[int, ...]
    reason: str
    palette: bool = False


def find_bands(descriptions: Sequence[str | None], colours: Sequence[str], dtypes: Sequence[str]) -> BandChoice | None:
    """The RGB bands by description, then by colour interpretation, or None where neither tells.

    Args:
        descriptions: What the file calls each band, or None.
        colours: GDAL's colour interpretation of each band, as a lower-case name.
        dtypes: NumPy name of each band's type.
    """
    found = next(filter(None, (_by_role([_role(text, names) for text in descriptions]) for names in _NAMES)), None)
    if found:
        names = ", ".join(
            f"{role} = band {index} ({descriptions[index - 1]})" for role, index in zip(ROLES, found, strict=True)
        )
        return BandChoice(found, f"band descriptions: {names}")
    found = _by_role(list(colours))
    if found:
        return BandChoice(found, f"colour interpretation: red, green, blue = bands {', '.join(map(str, found))}")
    data = [index for index, colour in enumerate(colours, 1) if colour != "alpha"]
    if len(data) == 1 and colours[data[0] - 1] == "palette":
        return BandChoice((data[0],), f"band {data[0]} is a palette, expanded to its colours", palette=True)
    if len(data) == 1 and dtypes[data[0] - 1] == "uint8":
        return BandChoice((data[0],) * 3, f"band {data[0]} is the only one: grey, taken as red, green and blue")
    return None


def explicit_bands(bands: Sequence[int], count: int) -> BandChoice:
    """The bands the user named, of ``count``.

    Raises:
        OptionError: They are not three numbers of bands.
    """
    numbers = tuple(bands)
    if len(numbers) != 3 or any(not 1 <= number <= count for number in numbers):
        raise OptionError(
            f"bands {','.join(map(str, numbers))}: expected three numbers from 1 to {count} for red, green and blue, "
            "such as --bands 3,2,1"
        )
    return BandChoice(numbers, f"bands {', '.join(map(str, numbers))} as asked")


def unclear_bands(descriptions: Sequence[str | None], colours: Sequence[str]) -> str:
    """What was found where ``find_bands`` found nothing, and what to do."""
    count, shown = len(colours), 20
    found = ", ".join(
        f"{index} ({description or 'no description'}, {colour})"
        for index, (description, colour) in enumerate(islice(zip(descriptions, colours, strict=True), shown), 1)
    )
    more = f" and {count - shown} more" if count > shown else ""
    if count < 3:
        advice = "stack red, green and blue first: gdalbuildvrt -separate rgb.vrt B04.tif B03.tif B02.tif"
    else:
        advice = "name them: --bands R,G,B with their numbers, such as --bands 1,2,3"
    return f"it is unclear which bands are red, green and blue among {found}{more}; {advice}"


def unusable_type(source: str, dtypes: Iterable[str], choice: BandChoice | None) -> str:
    """Why bands of these types cannot be read, and how to convert them."""
    bands = " ".join(f"-b {index}" for index in choice.indexes) if choice else "-b R -b G -b B"
    return (
        f"its bands are {' and '.join(sorted(dtypes))}, and rsedge reads uint8 colours or uint16 and int16 reflectance "
        f"(DN = reflectance * 10000); convert it first, for reflectance from 0 to 1: "
        f"gdal_translate -ot UInt16 -scale 0 1 0 10000 {bands} {shlex.quote(source)} rgb.tif; "
        "for other values: -ot Byte -scale BLACK WHITE 1 255"
    )


def _role(description: str | None, names: Mapping[str, Collection[str]]) -> str | None:
    """The colour a band description names, or None: "B04" and "B4, central wavelength 665 nm" are red."""
    words = re.split(r"[\s,;:()/]+", (description or "").strip().lower())
    if words[1:2] == ["edge"]:  # "Red edge 1" is no red
        return None
    return next((role for role, words_for in names.items() if words[0] in words_for), None)


def _by_role(roles: Sequence[str | None]) -> tuple[int, ...] | None:
    """1-based positions of red, green and blue where each occurs exactly once."""
    if any(roles.count(role) != 1 for role in ROLES):
        return None
    return tuple(roles.index(role) + 1 for role in ROLES)
