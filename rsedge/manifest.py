"""What a bundle says of itself: the manifest as value classes, and as JSON.

Import these names from :mod:`rsedge.bundle`. Every class refuses impossible values when built, and
:meth:`Manifest.from_json` lists everything wrong with a file at once. A field added, removed or changed in meaning
raises ``FORMAT_VERSION``: readers refuse fields they do not know rather than ignore them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from rsedge import jsonvalues
from rsedge.errors import BundleError

FORMAT_VERSION = 1

Family = Literal["blip", "clip", "clipcap"]
Precision = Literal["fp32", "fp16", "int8"]
DType = Literal["float32", "float16", "uint8", "int8", "int32", "int64", "bool"]
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_CAPTIONERS = ("blip", "clipcap")
# A bundle may come from a stranger: far above what any model has, and low enough that no number here can take the
# memory or the time of a machine by itself.
MOST_BYTES = 4 << 20
"""Largest ``manifest.json`` that is read."""
_MOST_VALUES = 200_000
_LONGEST_NAME = 200
_LONGEST_TEXT = 4096
_MOST_GRAPHS = 32
_MOST_TENSORS = 4096
_LARGEST_FILE = 1 << 40
_LARGEST_DIMENSION = 1 << 24
_LARGEST_TENSOR = 1 << 32  # elements
_LARGEST_CACHE = 1 << 30  # numbers per image and row; BLIP large has 50 million at 384 px
_LARGEST_IMAGE = 4096
_MOST_TOKENS = 1 << 22
_LARGEST_NUMBER = 1e6
MAX_BEAMS = 64
_MOST_NEW_TOKENS = 1 << 17  # no decoder has as many positions
_DEFAULT_NEW_TOKENS = 20  # what transformers generates where nothing else is said

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Letters that mean themselves on every system, and to every loader: ONNX Runtime takes external data in a file called
# "*/_ORT_MEM_ADDR_/*" from an address of memory.
_CONFINED = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


def _require(*checks: tuple[object, str]) -> None:
    """Raise one BundleError that holds the message of every check that is false."""
    if problems := [message for holds, message in checks if not holds]:
        raise BundleError("; ".join(problems))


def _version(value: object) -> tuple[bool, str]:
    """A check that this rsedge reads the format, for :func:`_require`."""
    return type(value) is int and value == FORMAT_VERSION, (
        f"format_version is {json.dumps(value)[:80]}, this rsedge reads {FORMAT_VERSION}: "
        "export the checkpoint again with this rsedge, or install the rsedge that wrote the bundle"
    )


def _count(name: str, value: int, most: int) -> tuple[bool, str]:
    """A check that a whole number is in 1 to ``most``, for :func:`_require`."""
    problem = "must be positive" if value <= 0 else f"must be at most {most}"
    return 0 < value <= most, f"{name} {problem}, got {value}"


def _within(name: str, value: float, low: float, high: float) -> tuple[bool, str]:
    """A check that a number is in a range, for :func:`_require`."""
    return low <= value <= high, f"{name} must be in {low} to {high}, got {value}"


def _short(name: str, *texts: str, most: int = _LONGEST_NAME) -> tuple[bool, str]:
    """A check that texts are no longer than ``most``, for :func:`_require`."""
    return all(len(text) <= most for text in texts), f"{name} must have at most {most} characters"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRef:
    """A file of the bundle: a path relative to the bundle directory, with ``/`` and without ``..``, the SHA-256 as 64
    lower-case hexadecimal digits, the size in bytes.
    """

    file: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        _require(
            (
                len(self.file) <= _LONGEST_NAME and _CONFINED.fullmatch(self.file),
                f"file {self.file[:_LONGEST_NAME]!r} must be a plain relative path inside the bundle: up to "
                f"{_LONGEST_NAME} letters, digits, '.', '_', '-' and '/'",
            ),
            (
                _SHA256.fullmatch(self.sha256),
                f"sha256 of {self.file!r} must be 64 lower-case hex digits, got {self.sha256!r}",
            ),
            _count(f"size of {self.file!r}", self.size, _LARGEST_FILE),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph; a string in ``shape`` names a dimension that varies."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        _require(
            (self.name, "a tensor needs a name"),
            _short("a tensor's name", self.name),
            (len(self.shape) <= 8, f"shape of {self.name!r} must have at most 8 axes, got {len(self.shape)}"),
            _short(f"dimensions of {self.name!r}", *(size for size in self.shape if isinstance(size, str))),
            (
                all(size <= _LARGEST_DIMENSION for size in self.shape if isinstance(size, int))
                and math.prod(size for size in self.shape[:8] if isinstance(size, int)) <= _LARGEST_TENSOR,
                f"shape of {self.name!r} must hold sizes up to {_LARGEST_DIMENSION}, together {_LARGEST_TENSOR}, got "
                f"{list(self.shape[:8])}",
            ),
            (
                all(size > 0 if isinstance(size, int) else size.isidentifier() for size in self.shape),
                f"shape of {self.name!r} must hold positive sizes or names like 'batch', got {list(self.shape)}",
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One ONNX file of the bundle, named as in :class:`FileRef`, and every file its tensors may come from.

    Attributes:
        opset: Version of the default ONNX operator set.
        inputs, outputs: In graph order.
        external_data: Files with tensors of this graph; the graph may name no other.
    """

    file: str
    sha256: str
    size: int
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    external_data: tuple[FileRef, ...] = ()

    def __post_init__(self) -> None:
        FileRef(file=self.file, sha256=self.sha256, size=self.size)
        names = [tensor.name for tensor in (*self.inputs, *self.outputs)]
        _require(
            (self.file.endswith(".onnx"), f"graph file {self.file!r} must end in .onnx"),
            _count(f"opset of {self.file!r}", self.opset, 100),
            (
                max(len(names), len(self.external_data)) <= _MOST_TENSORS,
                f"{self.file!r} must have at most {_MOST_TENSORS} inputs, outputs and files",
            ),
            (self.inputs and self.outputs, f"{self.file!r} needs at least one input and one output"),
            (len(set(names)) == len(names), f"{self.file!r} names a tensor twice: {names}"),
        )

    @property
    def files(self) -> tuple[FileRef, ...]:
        """The graph's own file and its external data."""
        return (FileRef(file=self.file, sha256=self.sha256, size=self.size), *self.external_data)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """How pixels become the vision graph's input.

    Attributes:
        size: Height and width of the graph's input, pixels.
        mean, std: Per band, in units of 8-bit value / 255; the graph applies them itself.
        resample: Filter that brings a tile to ``size``.
        bands: What the channels are, in order.
        reflectance: The reflectance → 8-bit rule: ``full_scale`` (DN at 255), ``boa_offset`` (DN), ``formula`` (text).
        crop: Whether of an image that is not square the middle is taken, see :class:`rsedge.pixels.ImageSize`.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Resample = "bicubic"
    bands: tuple[str, ...] = ("red", "green", "blue")
    reflectance: dict[str, Any] = field(default_factory=dict)
    crop: bool = False

    def __post_init__(self) -> None:
        count = len(self.bands)
        _require(
            _count("image size", self.size, _LARGEST_IMAGE),
            (0 < count <= 100, "bands must name at least one channel, and at most 100"),
            _short("a band's name", *self.bands),
            (
                all(abs(value) <= _LARGEST_NUMBER for value in (*self.mean, *self.std)),
                f"mean and std must be numbers up to {_LARGEST_NUMBER:g}",
            ),
            (len(self.mean) == count, f"mean must have one value per band ({count}), got {list(self.mean)}"),
            (
                len(self.std) == count and all(value > 0 for value in self.std),
                f"std must have one positive value per band ({count}), got {list(self.std)}",
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """Imagery that a model was trained on. Runs warn about scenes outside it."""

    resolution: tuple[float, float]
    """Least and greatest size of a pixel on the ground, metres."""
    surface_reflectance: bool = False
    """Whether it is rendered from reflectance at the surface (Sentinel-2 level 2A)."""

    def __post_init__(self) -> None:
        sizes = self.resolution
        fit = len(sizes) == 2 and 0 < sizes[0] <= sizes[1] <= 1e5
        _require((fit, f"resolution of the domain must be two numbers of metres above 0, got {list(sizes)[:4]}"))

    def describe(self) -> str:
        """Return the domain as a clause."""
        low, high = self.resolution
        metres = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        return f"{metres} m per pixel" + (", reflectance at the surface" if self.surface_reflectance else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSpec:
    """Token ids of the decoder; ``bos`` is what decoding starts from, ``eos`` what ends a caption."""

    bos: int
    eos: int
    pad: int
    vocab_size: int

    def __post_init__(self) -> None:
        _require(
            _within("vocab_size", self.vocab_size, 1, _MOST_TOKENS),
            *(
                (0 <= value < self.vocab_size, f"{name} must be in 0 to {self.vocab_size - 1}, got {value}")
                for name, value in (("bos", self.bos), ("eos", self.eos), ("pad", self.pad))
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Decoding settings used where the caller gives none; each means what it means to ``transformers.generate``.

    Attributes:
        max_new_tokens, min_new_tokens: Counted without the start token, the end token included.
        num_beams: Hypotheses kept per image; 1 is greedy search, or sampling with ``do_sample``.
        length_penalty: Exponent of the length a beam's score is divided by.
        early_stopping: ``True`` ends when ``num_beams`` captions are complete, ``False`` when a better one is
            unlikely, ``"never"`` when none can come.
        repetition_penalty: Above 1 makes tokens already present less likely; 1 does nothing.
        no_repeat_ngram_size: No n-gram of this size occurs twice; 0 does nothing.
        do_sample: Draw each token from the filtered distribution instead of searching.
        temperature, top_k, top_p: The filter, applied in this order; ``top_k`` 0 and ``top_p`` 1 keep every token.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise BundleError("; ".join(problems))

    @staticmethod
    def from_transformers(config: Mapping[str, Any], *, positions: int) -> GenerationDefaults:
        """The settings in the object of ``generation_config.json``, empty where there is none.

        There lengths count the start token, and sampling without a ``top_k`` keeps 50 tokens. No caption is longer than
        the decoder's ``positions``.

        Raises:
            BundleError: Values that no caption can have.
            TypeError: Values of the wrong kind.
        """
        names = ("num_beams", "length_penalty", "early_stopping", "repetition_penalty", "no_repeat_ngram_size")
        given = {name: config[name] for name in names if config.get(name) is not None}
        if config.get("do_sample"):
            sampling = ("do_sample", "temperature", "top_k", "top_p")
            given = {name: value for name, value in given.items() if name != "num_beams"}
            given |= {"top_k": 50} | {name: config[name] for name in sampling if config.get(name) is not None}
        longest = config.get("max_new_tokens") or (config.get("max_length") or _DEFAULT_NEW_TOKENS + 1) - 1
        shortest = config.get("min_new_tokens") or max((config.get("min_length") or 1) - 1, 0)
        return GenerationDefaults(max_new_tokens=min(longest, positions), min_new_tokens=shortest, **given)

    def problems(self) -> list[str]:
        """Every value that is not accepted, as a sentence."""
        longest = self.max_new_tokens
        checks = (
            ("num_beams", 1 <= self.num_beams <= MAX_BEAMS, f"1 (greedy) to {MAX_BEAMS}"),
            ("max_new_tokens", 1 <= longest <= _MOST_NEW_TOKENS, f"1 to {_MOST_NEW_TOKENS}"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= longest, f"0 to max_new_tokens ({longest})"),
            ("early_stopping", self.early_stopping in (True, False, "never"), "True, False or 'never'"),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a finite number above 0"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (off) or more"),
            ("temperature", 1e-3 <= self.temperature < math.inf, "a finite number, 0.001 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "a share above 0 and at most 1"),
        )
        return [
            f"{name} is {getattr(self, name)!r}, expected {accepted}" for name, holds, accepted in checks if not holds
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """Sizes of the decoder's caches.

    Attributes:
        layers, heads, head_dim: Of the decoder's attention, self and cross alike.
        max_positions: Longest sequence the position embeddings allow, start token included.
        image_tokens: Length of the cross cache.
    """

    layers: int
    heads: int
    head_dim: int
    max_positions: int
    image_tokens: int

    def __post_init__(self) -> None:
        cached = self.layers * self.heads * self.head_dim * (self.image_tokens + self.max_positions)
        _require(
            _count("decoder layers", self.layers, 1000),
            _count("decoder heads", self.heads, 1000),
            _count("decoder head_dim", self.head_dim, 1 << 14),
            _count("decoder max_positions", self.max_positions, 1 << 17),
            _count("decoder image_tokens", self.image_tokens, 1 << 20),
            (
                cached <= _LARGEST_CACHE,
                f"the decoder's caches must have at most {_LARGEST_CACHE} numbers, got {cached}",
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingSpec:
    """What an embedding model gives.

    Attributes:
        dim: Length of an embedding.
        normalized: Whether the graphs give unit-length vectors.
        logit_scale, logit_bias: Similarity × scale + bias is the model's own logit, where it has one.
        context_length: Tokens a text is cut to, its end token kept, for models with a text tower.
        pad_to_context: Whether every text is filled to ``context_length``; else to the longest it is computed with.
        pad_id: Token that fills a text, behind its end, for models with a text tower.
    """

    dim: int
    normalized: bool = True
    logit_scale: float | None = None
    logit_bias: float | None = None
    context_length: int | None = None
    pad_to_context: bool = False
    pad_id: int | None = None

    def __post_init__(self) -> None:
        text = self.context_length is not None
        _require(
            _count("embedding dim", self.dim, 1 << 16),
            _within("pad_id", self.pad_id or 0, 0, _MOST_TOKENS),
            _within("logit_scale", self.logit_scale or 0, -_LARGEST_NUMBER, _LARGEST_NUMBER),
            _within("logit_bias", self.logit_bias or 0, -_LARGEST_NUMBER, _LARGEST_NUMBER),
            _count("context_length", 1 if self.context_length is None else self.context_length, 1 << 17),
            (text == (self.pad_id is not None), "context_length and pad_id belong together: give both or neither"),
            (self.pad_id is None or self.pad_id >= 0, f"pad_id must be 0 or more, got {self.pad_id}"),
            (text or not self.pad_to_context, "pad_to_context needs a context_length"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where the weights come from.

    Attributes:
        source: Checkpoint folder or Hugging Face id, as given.
        source_sha256: Hash over the checkpoint's weight files.
        exported_at: RFC 3339 date and time.
        versions: Library → version, of the exporting environment.
        source_revision: Commit on the hub, or None for a local folder.
        recipe: The training recipe, where the checkpoint carries one.
    """

    source: str
    source_sha256: str
    exported_at: str
    versions: dict[str, str]
    source_revision: str | None = None
    recipe: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _require(
            (self.source, "provenance needs a source"),
            _short("provenance.source", self.source, most=_LONGEST_TEXT),
            _short("provenance.source_revision", self.source_revision or ""),
            _short("provenance.versions", *self.versions, *self.versions.values()),
            (len(self.versions) <= 100, f"provenance must name at most 100 versions, got {len(self.versions)}"),
            (len(self.exported_at) <= 100, "exported_at must be RFC 3339, at most 100 characters"),
            (_SHA256.fullmatch(self.source_sha256), f"source_sha256 must be 64 hex digits, got {self.source_sha256!r}"),
            (_is_rfc3339(self.exported_at), f"exported_at must be RFC 3339 with an offset, got {self.exported_at!r}"),
        )


def _is_rfc3339(text: str) -> bool:
    if not _RFC3339.fullmatch(text):
        return False
    try:  # Python 3.10 reads neither Z nor every fraction, so only the calendar and clock go through it
        datetime.fromisoformat(text[:19].upper())
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything the runtime knows about a model; nothing is guessed from names.

    Attributes:
        name: Short name: letters, digits, ``.``, ``_``, ``-``.
        graphs: Role (``vision``, ``step``, …) → graph.
        tokens, generation, decoder: Present for captioners.
        embedding: Present for embedding models.
        tokenizer: Present for captioners, and for embedding models with a text graph.
        parity: The report of the comparison with torch, JSON values.
        domain: What it was trained on, where that is known.
    """

    name: str
    family: Family
    precision: Precision
    graphs: dict[str, Graph]
    image: ImageSpec
    provenance: Provenance
    tokens: TokenSpec | None = None
    generation: GenerationDefaults | None = None
    decoder: DecoderSpec | None = None
    embedding: EmbeddingSpec | None = None
    tokenizer: FileRef | None = None
    parity: dict[str, Any] = field(default_factory=dict)
    domain: Domain | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        needed = ("tokens", "generation", "decoder", "tokenizer") if self.family in _CAPTIONERS else ("embedding",)
        seen: dict[str, FileRef] = {}
        _require(
            _version(self.format_version),
            (
                re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name),
                f"name must be 1 to 100 letters, digits, '.', '_' or '-', got {self.name!r}",
            ),
            (self.graphs, "graphs must not be empty"),
            (len(self.graphs) <= _MOST_GRAPHS, f"graphs must be at most {_MOST_GRAPHS}, got {len(self.graphs)}"),
            (
                all(re.fullmatch(r"[a-z][a-z0-9_]{0,49}", role) for role in self.graphs),
                "graphs must have names of 1 to 50 small letters, digits and '_'",
            ),
            *((getattr(self, part) is not None, f"a {self.family} bundle needs {part!r}") for part in needed),
            (
                self.embedding is None
                or "text" not in self.graphs
                or (self.tokenizer is not None and self.embedding.context_length is not None),
                "a text graph needs a tokenizer and an embedding.context_length",
            ),
            *(
                (seen.setdefault(ref.file, ref) == ref, f"{ref.file!r} is listed with two different hashes or sizes")
                for ref in self.files
            ),
        )

    @property
    def files(self) -> tuple[FileRef, ...]:
        """Every file the manifest vouches for."""
        graphs = (ref for graph in self.graphs.values() for ref in graph.files)
        return (*graphs, *([self.tokenizer] if self.tokenizer else ()))

    def to_json(self) -> bytes:
        """The bytes of ``manifest.json``: UTF-8, indented, fields in declaration order, a newline at the end."""
        values = dataclasses.asdict(self)
        ordered = {"format_version": values.pop("format_version"), **values}
        return (json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """The manifest in ``data``; BundleError has a line per problem: not JSON, an unknown ``format_version``,
        unknown or missing fields, wrong types, impossible values.
        """
        try:
            values = jsonvalues.parse(data, most_values=_MOST_VALUES)
        except ValueError as error:  # covers bytes that are not UTF-8
            raise BundleError(f"manifest.json is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise BundleError("manifest.json must hold a JSON object")
        # Another version may differ in anything: its fields are not worth a complaint each.
        _require(_version(values.get("format_version")))
        problems: list[str] = []
        manifest = jsonvalues.build(cls, values, "", problems.append)
        if manifest is None or problems:
            raise BundleError("\n".join(problems))
        return manifest
