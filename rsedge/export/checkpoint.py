"""What a checkpoint is to the export, and what a model family tells about itself.

Loading (:mod:`rsedge.export.loading`) and the export (:mod:`rsedge.export.convert`) know no model. They ask the
:class:`ModelType` of a checkpoint for its settings, and then for the plan of its bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from rsedge.export.graphs.builder import ACTIVATIONS
from rsedge.export.graphs.encoder import Tower

if TYPE_CHECKING:
    from rsedge.bundle import Bundle, Family, ImageSpec, TokenSpec
    from rsedge.export.graphs.builder import GraphBuilder, Precision, Tensors

Report = Callable[[str], None]
"""Called with each problem of a checkpoint, a sentence."""

KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
)
"""Names of a tower's settings in most configurations of transformers."""

MOST_LAYERS = 1000
"""The model is built to learn its names, so a stranger's number of layers needs a limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The checked settings of a checkpoint that loading needs, whatever the model; a family adds its own."""

    image_size: int
    """Pixels along an edge, of the checkpoint itself."""
    patch_size: int
    """Pixels along an edge of a patch."""
    vocab_size: int
    """Tokens the embeddings have room for."""
    needed_tokens: Mapping[int, str]
    """Ids the tokenizer must have, each with its purpose: "which ends a caption (…)"."""
    tokens: TokenSpec | None = None
    """Start, end and padding ids of a captioner; None where nothing is generated."""


class Section:
    """One object of ``config.json`` over the defaults of its configuration class; ``name`` is for messages.

    A value that cannot be used is reported and replaced by its default, so that one reading finds every problem.
    """

    def __init__(self, given: Any, defaults: Any, name: str, report: Report) -> None:
        self.given: dict[str, Any] = given if isinstance(given, dict) else {}
        self.name, self.report = name, report
        self._defaults: dict[str, Any] = defaults.to_dict()

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is; ``default`` where the configuration class has none either."""
        return self.given.get(key, self._defaults.get(key, default))

    def size(self, key: str) -> int:
        """A positive whole number."""
        value = self.get(key)
        if type(value) is int and value > 0:
            return value
        self.report(f"{self.name}.{key} is {value!r}; rsedge exports one positive whole number")
        return int(self._defaults.get(key) or 1)

    def layers(self, key: str) -> int:
        """A number of layers."""
        value = self.size(key)
        if value > MOST_LAYERS:
            self.report(f"{self.name}.{key} is {value}; rsedge exports at most {MOST_LAYERS}")
        return min(value, MOST_LAYERS)

    def token(self, key: str, vocab_size: int) -> int:
        """A token id."""
        value = self.get(key)
        if type(value) is int and 0 <= value < vocab_size:
            return value
        self.report(
            f"{self.name}.{key} is {value!r}; it must be one token id of the vocabulary (0 to {vocab_size - 1})"
        )
        return 0

    def tower(self, keys: tuple[str, ...] = KEYS) -> Tower:
        """The numbers of a transformer, by their names in ``keys``, whose order is that of ``KEYS``."""
        width, inner, heads = self.size(keys[0]), self.size(keys[1]), self.size(keys[3])
        act, eps = (self.get(key) for key in keys[4:])
        if act not in tuple(ACTIVATIONS):
            self.report(f"{self.name}.{keys[4]} is {act!r}; rsedge exports {', '.join(ACTIVATIONS)}")
        if type(eps) not in (int, float):
            self.report(f"{self.name}.{keys[5]} is {eps!r}, expected a number, such as 1e-5")
            eps = 1e-5
        if width % heads:
            self.report(
                f"{self.name}.{keys[0]} ({width}) is not a multiple of its {keys[3]} ({heads}): the config is damaged"
            )
        return Tower(width=width, inner=inner, layers=self.layers(keys[2]), heads=heads, act=act, eps=float(eps))


class Plan(Protocol):
    """One checkpoint at one image size, on its way to a bundle.

    The constructor raises CheckpointError for problems that only show at this point.
    """

    def graphs(self, precision: Precision) -> Mapping[str, GraphBuilder]:
        """Role → graph."""

    def manifest_fields(self) -> dict[str, Any]:
        """The fields of :class:`~rsedge.manifest.Manifest` that only this family has."""

    def parity(self, bundle: Bundle) -> dict[str, Any]:
        """The comparison with torch, JSON values, each figure beyond its tolerance a sentence in ``problems``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelType:
    """What differs between the model types."""

    family: Family
    title: str
    """For messages."""
    module: str = "transformers"
    """Where the class ``architecture`` is imported from."""
    architecture: str
    """The class that the checkpoint was saved from; its configuration class is ``config_class``."""
    otherwise: str
    """Describes a checkpoint of this type and another class, for messages."""
    tokenizer_files: tuple[str, ...]
    """Files that hold a whole vocabulary; one of them must be there."""
    read_settings: Callable[[Mapping[str, Any], Report], Settings]
    """``config.json`` → settings; they count only where nothing was reported."""
    canonical_name: Callable[[str], str]
    """The name of a stored tensor, or of one of the model → its name in the graphs."""
    unused: frozenset[str] = frozenset()
    """Canonical names of tensors that outputs do not depend on."""
    plan: Callable[[Checkpoint[Any], int], Plan]
    """Checkpoint and image size → plan."""


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint(Generic[S]):
    """A checkpoint that can be exported."""

    path: Path
    """The folder with its files."""
    source: str
    """The folder or hub id as given."""
    revision: str | None
    """The hub commit, or None for a folder."""
    config: dict[str, Any]
    """``config.json`` as it is; ``settings`` has the defaults filled in."""
    settings: S
    model_type: ModelType
    tensors: Tensors
    """Canonical name → float32 array, read at access; complete, shapes checked, a tied tensor under all its names."""
    tokenizer_files: tuple[Path, ...]
    image: ImageSpec
    """Size, filter, mean and deviation of its image processor; a checkpoint has no reflectance rule."""
    generation_config: dict[str, Any]
    """``generation_config.json``, empty where there is none."""
    sha256: str
    """Hash over the weight files: what ``sha256sum`` prints for one file, or for its own lines for several."""

    @property
    def family(self) -> Family:
        """The bundle family it becomes."""
        return self.model_type.family

    @property
    def tokens(self) -> TokenSpec | None:
        """Start, end and padding ids, and the vocabulary size, of a captioner."""
        return self.settings.tokens
