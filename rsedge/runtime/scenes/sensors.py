"""Red, green and blue among the bands of a raster or an item, by what names, wavelengths and the sensor say.

Numbers of bands mean something only for a known sensor: band 4 is red on Sentinel-2 and Landsat 8, near infrared on
Landsat 7 and PlanetScope. Band orders: Sentinel-2 and HLS user guides, USGS Landsat Collection 2, Planet's Imagery
Product Specification, USDA NAIP, Maxar (WorldView, GeoEye, QuickBird) data sheets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

ROLES = ("red", "green", "blue")
Three = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Sensor:
    """A sensor whose bands are known."""

    name: str
    pattern: re.Pattern[str]
    """Matches names of products, platforms and instruments."""
    numbers: Three | None = None
    """Numbers of red, green and blue in names such as ``B4`` and ``SR_B4``."""
    positions: Mapping[int, Three] = field(default_factory=dict)
    """Number of bands in a file → positions of red, green and blue, where bands have no names."""


def _sensor(name: str, pattern: str, numbers: Three | None = None, **positions: Three) -> Sensor:
    places = {int(count.removeprefix("of_")): place for count, place in positions.items()}
    return Sensor(name, re.compile(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", re.IGNORECASE), numbers, places)


OTHER = _sensor("another sensor", r"[^\s\S]")
"""A sensor that is known to be none of these."""
SENTINEL2 = _sensor(
    "Sentinel-2",
    r"sentinel-?_?2[a-d]?|S2[A-D]|S2[A-D]?_?MSIL(?:1C|2A)|MSIL(?:1C|2A)|\AMSI\Z",  # in prose MSI, OLI and TM are words
    (4, 3, 2),
    of_12=(4, 3, 2),
    of_13=(4, 3, 2),
)
HLS = _sensor("HLS", r"HLS(?:[SL]30)?(?:[._]v?2(?:\.0)?)?|HLSS30|HLSL30|hls2-[sl]30", (4, 3, 2))
_SENSORS = (
    HLS,
    SENTINEL2,
    _sensor("Landsat 8/9", r"landsat[-_ ]?[89]|L[CO]0[89]|\AOLI\Z|OLI[-_]?(?:2|TIRS)", (4, 3, 2)),
    _sensor("Landsat 4–7", r"landsat[-_ ]?[4-7]|LE07|L[TE]0[4-7]|ETM\+?|\ATM\Z", (3, 2, 1)),
    _sensor(
        "PlanetScope",
        r"planet(?:scope)?|PS2(?:\.SD)?|PSB\.SD|PSScene\w*|(?:3B_)?AnalyticMS\w*|Dove(?:-R)?|SuperDove",
        of_3=(1, 2, 3),
        of_4=(3, 2, 1),
        of_5=(3, 2, 1),
        of_8=(6, 4, 2),
    ),
    _sensor("NAIP", r"naip|m_\d{7}_[ns][ew]_\d{1,2}_\w+", of_3=(1, 2, 3), of_4=(1, 2, 3)),
    _sensor(
        "Maxar",
        r"maxar|digitalglobe|worldview-?_?0?[1-4]|WV0?[1-4]|geoeye-?1?|GE01|quickbird-?2?|QB02",
        of_3=(1, 2, 3),
        of_4=(3, 2, 1),
        of_8=(5, 3, 2),
    ),
)
# Metadata of GDAL and of vendors.
PLATFORM_TAGS = (
    *("platform", "spacecraft_id", "spacecraft_name", "satellite", "satelliteid", "satid", "mission", "constellation"),
    "datatake_1_spacecraft_name",
)
NAME_TAGS = ("product_id", "landsat_product_id", "product_uri", "tifftag_imagedescription", "collection")
INSTRUMENT_TAGS = ("sensor", "sensor_id", "instrument", "instruments", "imagery_type")
NUMBERS_ALONE = "band descriptions, numbers as of Sentinel-2 and Landsat 8/9"
_WORDS = {"red": {"red", "r", "band_r"}, "green": {"green", "g", "band_g"}, "blue": {"blue", "b", "band_b"}}
_TRUE_COLOUR = {"red": {"tci_r"}, "green": {"tci_g"}, "blue": {"tci_b"}}
_NOMINAL = {"red": 0.660, "green": 0.560, "blue": 0.485}
_FEWEST_OF_SENTINEL2 = 10
_RANGES = {"red": (0.615, 0.695), "green": (0.515, 0.600), "blue": (0.445, 0.515)}
"""Micrometres: coastal aerosol (0.443) and red edge (0.705) lie outside."""
_NUMBER = re.compile(r"(?:(?:sr|toa|st|qa)_)?b(?:and)?[ _-]?(?P<number>0?\d{1,2}a?)(?![a-z0-9])", re.IGNORECASE)
_LENGTH = re.compile(
    r"(?P<value>\d+(?:\.\d+)?)\s*(?P<unit>nm|nanomet\w+|µm|um|μm|micromet\w+|micron\w*)\b", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class BandText:
    """What is known of a band in words."""

    name: str = ""
    """Its name or description."""
    common: str = ""
    """Its common name (STAC), or its colour interpretation in lower case."""
    micrometres: float | None = None
    """Its central wavelength."""


def known_sensor(
    platforms: Iterable[str | None], names: Iterable[str | None], instruments: Iterable[str | None] = ()
) -> Sensor | None:
    """Return the sensor that platforms, else names of products and collections, else instruments stand for, or None.

    HLS is known by names, because its platforms are those of Sentinel-2 and Landsat. What comes from an unknown
    platform is not of Sentinel-2, whatever else is said: RapidEye's instrument is called MSI, too.
    """

    def first(texts: Iterable[str | None]) -> Sensor | None:
        found = (sensor for text in texts for sensor in _SENSORS if text and sensor.pattern.search(text[:1000].strip()))
        return next(found, None)

    given, by_name = [platform for platform in platforms if platform], first(names)
    found = by_name if by_name is HLS else first(given) or by_name or first(instruments)
    foreign = given and not any(platform.lower().startswith(("sentinel", "s2")) for platform in given)
    return OTHER if foreign and found in (None, SENTINEL2) else found


def find_colours(bands: Sequence[BandText], sensor: Sensor | None) -> tuple[Three, str] | None:
    """Return the positions of red, green and blue, from 1, and the rule that found them as a clause; None if unclear.

    The rules, in order: colours in names; wavelengths; numbers of the known sensor; colour interpretation or common
    names; bands 4, 3, 2; channels of a true-colour image; positions of the known sensor.
    """
    names = [band.name for band in bands]
    numbers = [match["number"] if (match := _NUMBER.match(name.strip())) else "" for name in names]
    lengths = [band.micrometres if band.micrometres is not None else _length(band.name) for band in bands]
    channels = _once([_colour(name, _TRUE_COLOUR) for name in names])
    # Three bands numbered 4, 3, 2, or with band 8: so Sentinel-2's and Landsat 8's are exported.
    exported = sensor is None and {"1", "01"}.isdisjoint(numbers) and (len(bands) == 3 or "8" in numbers)
    rules: tuple[tuple[Three | None, str], ...] = (
        (_once([_colour(name, _WORDS) for name in names]), "band descriptions"),
        (_by_wavelength(lengths), "central wavelengths"),
        *_by_number(numbers, sensor, len(bands)),
        (None if channels else _once([band.common for band in bands]), "colour interpretation"),
        (_of_numbers(numbers, (4, 3, 2)) if exported else None, NUMBERS_ALONE),
        (channels, "band descriptions"),
    )
    for found, rule in rules:
        if found is None:
            continue
        shown = [f"{lengths[at - 1]:g} µm" if rule == "central wavelengths" else names[at - 1] for at in found]
        named = (
            f"{role} = band {at}" + (f" ({text})" if text else "")
            for role, at, text in zip(ROLES, found, shown, strict=True)
        )
        return found, f"{rule}: {', '.join(named)}"
    count = sum(band.common != "alpha" or index < 3 for index, band in enumerate(bands))
    for many in (len(bands), count):
        if sensor and (place := sensor.positions.get(many)) and _are_in_order(numbers):
            return place, f"{sensor.name} with {many} bands: red, green, blue = bands {', '.join(map(str, place))}"
    return None


def _by_number(numbers: Sequence[str], sensor: Sensor | None, count: int) -> Iterator[tuple[Three | None, str]]:
    """Yield what the numbers of a known sensor find; Sentinel-2 is known by names that only it and HLS have, too."""
    chosen = SENTINEL2 if sensor is None and _is_sentinel2(numbers) else sensor
    if chosen is SENTINEL2 and count < _FEWEST_OF_SENTINEL2 and "1" in numbers and _are_in_order(numbers):
        return  # Band 1, Band 2 … of a stack are places, not Sentinel-2's bands
    if chosen and chosen.numbers:
        yield _of_numbers(numbers, chosen.numbers), f"band descriptions, numbers of {chosen.name}"


def _of_numbers(numbers: Sequence[str], wanted: Three) -> Three | None:
    roles = {str(number): role for number, role in zip(wanted, ROLES, strict=True)}
    return _once([roles.get(number.lstrip("0")) for number in numbers])


def colour_of(band: BandText, sensor: Sensor | None) -> tuple[str, float, str] | None:
    """Return the colour of a band of an item, the distance of its wavelength from the usual one, and the rule, or None.

    The rules, in order: common name; colour in the name; wavelength; number of the known sensor.
    """
    distance = 0.0
    if band.micrometres is not None:
        near = {role: abs(band.micrometres - nominal) for role, nominal in _NOMINAL.items()}
        inside = [role for role, (low, high) in _RANGES.items() if low <= band.micrometres <= high]
        distance = near[inside[0]] if inside else 1.0
    if band.common:
        return (band.common, distance, "common names") if band.common in ROLES else None
    if colour := _colour(band.name, _WORDS):
        return colour, distance, "names"
    if band.micrometres is not None:
        return (inside[0], distance, "wavelengths") if inside else None
    match = _NUMBER.fullmatch(band.name.strip())
    if sensor and sensor.numbers and match and match["number"].isdigit() and int(match["number"]) in sensor.numbers:
        return ROLES[sensor.numbers.index(int(match["number"]))], distance, f"numbers of {sensor.name}"
    return None


def candidates(bands: Sequence[BandText]) -> str:
    """Return what the bands could be, as a clause with the options that say so."""
    numbers = [match["number"] if (match := _NUMBER.match(band.name.strip())) else "" for band in bands]
    of_number = {number.lstrip("0"): at for at, number in enumerate(numbers, 1)}
    count = len(bands)
    choices = []
    for sensor in _SENSORS:
        place = tuple(of_number.get(str(number), 0) for number in sensor.numbers or ())
        if not place or 0 in place:
            place = sensor.positions.get(count, ()) if _are_in_order(numbers) else ()
        if place:
            choices.append((",".join(map(str, place)), sensor.name))
    grouped: dict[str, list[str]] = {}
    for flag, name in choices:
        grouped.setdefault(flag, []).append(name)
    return ", ".join(f"--bands {flag} ({', '.join(names)})" for flag, names in grouped.items())


def to_micrometres(value: float | None, unit: str = "") -> float | None:
    """Return a wavelength in micrometres; without a unit, values from 100 on are nanometres. None if it is none."""
    if value is None or not 0 < value < 1e6:
        return None
    nano = unit.lower().startswith("n") or (not unit and value >= 100)
    return value / 1000 if nano else value


def _colour(text: str, words: Mapping[str, set[str]]) -> str | None:
    """Return the colour a description names: "B04 (red)" and "Red" are red, "Red edge 1" is none."""
    parts = [part for part in re.split(r"[\s,;:()/\[\]-]+", text.strip().lower()) if part]
    if "edge" in parts or "rededge" in parts:
        return None
    first = next((role for role, known in words.items() if parts[:1] and parts[0] in known), None)
    if first or words is not _WORDS:
        return first
    named = [role for role in ROLES if role in parts]
    return named[0] if len(named) == 1 and _NUMBER.match(text.strip()) else None


def _length(text: str) -> float | None:
    match = _LENGTH.search(text)
    return to_micrometres(float(match["value"]), match["unit"]) if match else None


def _by_wavelength(lengths: Sequence[float | None]) -> Three | None:
    found = []
    for role in ROLES:
        low, high = _RANGES[role]
        inside = [(abs(length - _NOMINAL[role]), at) for at, length in enumerate(lengths, 1)
                  if length is not None and low <= length <= high]  # fmt: skip
        if not inside or sum(distance == min(inside)[0] for distance, _ in inside) > 1:
            return None
        found.append(min(inside)[1])
    return (found[0], found[1], found[2])


def named_as_sentinel2(names: Iterable[str]) -> bool:
    """Return whether bands have names that only Sentinel-2 and HLS give."""
    return _is_sentinel2([match["number"] for name in names if (match := _NUMBER.fullmatch(name.strip()))])


def _is_sentinel2(numbers: Sequence[str]) -> bool:
    """Return whether only Sentinel-2 and HLS number bands so: B04 in two digits, or B8A beside others."""
    given = {number for number in numbers if number}
    padded = {"04", "03", "02"} <= given
    return padded or (bool({"8A", "8a"} & given) and {"4", "3", "2"} <= given)


def _are_in_order(numbers: Sequence[str]) -> bool:
    """Return whether bands have no numbers, or those of their positions."""
    return all(not number or number.lstrip("0") == str(at) for at, number in enumerate(numbers, 1))


def _once(roles: Sequence[str | None]) -> Three | None:
    """Return the positions of red, green and blue, from 1, if each occurs exactly once."""
    if any(list(roles).count(role) != 1 for role in ROLES):
        return None
    red, green, blue = (list(roles).index(role) + 1 for role in ROLES)
    return red, green, blue
