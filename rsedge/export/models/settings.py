"""Read the settings of ``config.json``: values over the defaults of transformers, checked for what the graphs hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rsedge.export.graphs.encoder import Tower
from rsedge.export.graphs.precision import ACTIVATIONS

if TYPE_CHECKING:
    from rsedge.export.weights import Report

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


class Section:
    """One object of ``config.json``.

    A value that cannot be used is reported and replaced by its default, so that one reading finds every problem.

    Args:
        given: The object; anything else counts as empty.
        defaults: An instance of its configuration class.
        name: For messages.
        report: Called once per problem.
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
