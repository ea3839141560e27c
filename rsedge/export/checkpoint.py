"""What a checkpoint is to the export, and what a model family tells about itself.

Loading (:mod:`rsedge.export.loading`) and the export (:mod:`rsedge.export.convert`) know no model. They ask the
:class:`ModelType` of a checkpoint for its settings, and then for the plan of its bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from rsedge.bundle import Bundle, Family, ImageSpec, TokenSpec
    from rsedge.export.graphs.builder import GraphBuilder
    from rsedge.export.graphs.precision import Precision
    from rsedge.export.weights import Report, Weights


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
    """Of the bundle."""
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
    """The checked sizes."""
    model_type: ModelType
    """Everything particular to its kind of model."""
    tensors: Weights
    """Canonical name → float32 array, read at access; complete, shapes checked, a tied tensor under all its names."""
    tokenizer_files: tuple[Path, ...]
    """The tokenizer's files."""
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
