"""Which images a step trains on: a pure function of seed and step, so that a run can go on at any of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from rsedge.errors import OptionError

Position = tuple[int, int]
"""Epoch and index of an example."""


def derive(*parts: int | str) -> int:
    """A 63-bit seed from ``parts``, the same on every machine and in every process."""
    digest = blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a run.

    The images of a step are cut into chunks, the portions of one forward pass; a process works on neighbouring chunks.
    What is in a step does not depend on the number of processes, and neither does what is random about a chunk.

    Raises:
        OptionError: A step cannot be filled, or not be cut evenly.
    """

    examples: int
    """Number of training images."""
    batch_size: int
    """Images per step."""
    micro_batch_size: int
    """Images per chunk."""
    seed: int = 0
    """Of the order."""
    processes: int = 1
    process: int = 0
    """How many share the steps, and which one this is."""

    def __post_init__(self) -> None:
        if self.batch_size > self.examples:
            raise OptionError(
                f"loop.batch_size is {self.batch_size}, but there are {self.examples} training images: set it to "
                f"{self.examples} or less"
            )
        if self.batch_size % (self.micro_batch_size * self.processes):
            raise OptionError(
                f"loop.batch_size {self.batch_size} cannot be shared evenly by {self.processes} processes in "
                f"portions of "
                f"loop.micro_batch_size {self.micro_batch_size}: make it a multiple of "
                f"{self.micro_batch_size * self.processes}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full steps of an epoch; the images left over differ from epoch to epoch."""
        return self.examples // self.batch_size

    @property
    def chunks(self) -> int:
        """Chunks of a step that this process works on."""
        return self.batch_size // (self.micro_batch_size * self.processes)

    def chunk_number(self, chunk: int) -> int:
        """The number, within the whole step, of this process's ``chunk``-th chunk."""
        return self.process * self.chunks + chunk

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of the examples in an epoch, int64 [examples]."""
        return np.random.Generator(np.random.Philox(derive("order", self.seed, epoch))).permutation(self.examples)

    def batches(self, start: int, stop: int) -> Iterator[list[Position]]:
        """The chunks of this process for steps ``start`` up to, not including, ``stop``: ``chunks`` lists per step."""
        known, permutation = -1, np.empty(0, np.int64)
        for step in range(start, stop):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != known:
                known, permutation = epoch, self.permutation(epoch)
            first = within * self.batch_size + self.chunk_number(0) * self.micro_batch_size
            for chunk in range(self.chunks):
                offset = first + chunk * self.micro_batch_size
                yield [(epoch, int(index)) for index in permutation[offset : offset + self.micro_batch_size]]


class BatchSampler:
    """``Order.batches`` as a batch sampler of torch's DataLoader."""

    def __init__(self, order: Order, start: int, stop: int) -> None:
        self._order, self._start, self._stop = order, start, stop

    def __iter__(self) -> Iterator[list[Position]]:
        return self._order.batches(self._start, self._stop)

    def __len__(self) -> int:
        return (self._stop - self._start) * self._order.chunks
