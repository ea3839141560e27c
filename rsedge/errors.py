"""Every error rsedge raises on purpose, as one tree; knows nothing of click.

Messages name the value, what is accepted, and the next step.
"""

from __future__ import annotations

from collections.abc import Sequence


class RsedgeError(Exception):
    """Root of the tree. ``str(error)`` is the whole message for the user."""

    exit_code = 1
    """What the command line ends with."""


class OptionError(RsedgeError):
    """A value chosen by the caller (an option, an argument) is not accepted."""

    exit_code = 2


class SceneError(RsedgeError):
    """A raster cannot be opened or read, or its RGB bands cannot be told."""


class BundleError(RsedgeError):
    """A bundle is missing, damaged, unsafe, or written for another format version."""


class CheckpointError(RsedgeError):
    """The checkpoint ``source``, as the user named it, cannot be exported; each of ``problems`` is a full sentence with
    its remedy.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"cannot export {source}: {count}", *(f"  - {text}" for text in self.problems)]))


class ParityError(RsedgeError):
    """An exported graph disagrees with torch by more than the tolerance of its precision."""


class OutputError(RsedgeError):
    """An output exists already, belongs to another run, or cannot be written."""


class InUseError(OutputError):
    """Another process writes the output."""


class BatchError(RsedgeError):
    """More scenes of a batch failed than were accepted."""


class BackendError(RsedgeError):
    """A device or backend was asked for by name and cannot be used here."""


class SandboxError(RsedgeError):
    """Confinement was asked for and cannot be had, or a confined run was ended from outside."""
