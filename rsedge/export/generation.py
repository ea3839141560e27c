"""Decoding defaults of a captioner's checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rsedge.bundle import GenerationDefaults
from rsedge.errors import BundleError, CheckpointError

if TYPE_CHECKING:
    from rsedge.export.checkpoint import Checkpoint


def generation_defaults(checkpoint: Checkpoint[Any], *, positions: int) -> GenerationDefaults:
    """What its ``generation_config.json`` asks for, no caption longer than ``positions``.

    Raises:
        CheckpointError: No caption can be what it asks for.
    """
    try:
        return GenerationDefaults.from_transformers(checkpoint.generation_config, positions=positions)
    except (BundleError, TypeError) as error:
        problem = f"generation_config.json asks for what no caption can be: {error}; mend or delete it"
        raise CheckpointError(checkpoint.source, [problem]) from error
