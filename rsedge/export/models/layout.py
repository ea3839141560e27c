"""What the checks of all model types share: sizes from a config, tensors against their expected names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rsedge.export.graphs.precision import ACTIVATIONS

if TYPE_CHECKING:
    from rsedge.export.weights import Report, StoredTensor

Shapes = Iterator[tuple[str, tuple[int, ...]]]

_SHOWN = 8


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object ``name`` of a config, empty where there is none."""
    values = config.get(name)
    return values if isinstance(values, dict) else {}


def sizes(values: Mapping[str, Any], defaults: Mapping[str, int], name: str, report: Report) -> dict[str, int]:
    """The positive whole numbers named in ``defaults``; one that is something else is reported and left out."""
    found = {}
    for key, default in defaults.items():
        value = values.get(key, default)
        if type(value) is int and value > 0:
            found[key] = value
        else:
            report(f"{name}.{key} is {value!r}; rsedge exports one positive whole number")
    return found


def check_tower(
    values: Mapping[str, Any], found: Mapping[str, int], name: str, activation: str, report: Report
) -> None:
    """Report an activation that no graph holds, and heads that do not divide the width.

    Args:
        values: The tower's section of the config, its sizes as far as they are sound in ``found``.
        found: See ``values``.
        name: Of the section.
        activation: What the tower has where the config names none.
        report: Called once per problem.
    """
    act = values.get("hidden_act", activation)
    if act not in ACTIVATIONS:
        report(f"{name}.hidden_act is {act!r}; rsedge exports {', '.join(ACTIVATIONS)}")
    width, heads = found.get("hidden_size", 1), found.get("num_attention_heads", 1)
    if width % heads:
        report(
            f"{name}.hidden_size ({width}) is not a multiple of its num_attention_heads ({heads}): the config is "
            "damaged"
        )


def check_unquantised(config: Mapping[str, Any], report: Report) -> None:
    """Report a checkpoint whose weights are quantised already."""
    if config.get("quantization_config"):
        report("its weights are quantised (quantization_config): export the unquantised checkpoint with --int8")


def select(named: Mapping[str, StoredTensor], shapes: Shapes, report: Report) -> dict[str, StoredTensor]:
    """The tensors of ``shapes``; those that are missing, misshapen or no floats are reported.

    Tensors the model does not use (``position_ids`` of older files, heads for other tasks) are left out.
    """
    expected = dict(shapes)
    missing = [name for name in expected if name not in named]
    if missing:
        report(f"{len(missing)} of {len(expected)} tensors are missing: {_listed(missing)}; save the checkpoint again")
    wrong = [
        f"{name} is {list(named[name].shape)}, the config says {list(shape)}"
        for name, shape in expected.items()
        if name in named and named[name].shape != shape
    ]
    if wrong:
        report(f"{len(wrong)} tensors do not fit the config: {_listed(wrong)}; config.json belongs to another model")
    odd = [f"{name} is {named[name].dtype}" for name in expected if name in named and not named[name].is_float]
    if odd:
        report(f"{len(odd)} tensors are not floating point: {_listed(odd)}; export the unquantised checkpoint")
    return {name: named[name] for name in expected if name in named}


def _listed(texts: list[str]) -> str:
    shown = "; ".join(texts[:_SHOWN])
    return shown if len(texts) <= _SHOWN else f"{shown}; and {len(texts) - _SHOWN} more"


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    """Weight and bias of a linear layer."""
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def norm(name: str, width: int) -> Shapes:
    """Weight and bias of a LayerNorm."""
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)
