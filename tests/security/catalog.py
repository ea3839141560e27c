"""All hostile inputs by name, and those that a user allowed a VRT for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tests.security import containers, formats, names, products, sidecars, vrts

if TYPE_CHECKING:
    from tests.security.places import Case

_FOUND = [case for module in (vrts, formats, containers, sidecars, names, products) for case in module.cases()]
# A VRT that is allowed may name what lies below its folder, and nothing else.
_FOUND += [
    replace(
        case, name=f"allowed-{case.name}", kind="VRT, allowed", own="any", uses=("caption",), options=("--allow-vrt",)
    )
    for case in vrts.cases()
    if case.kind != "VRT by another name"
]
CASES: dict[str, Case] = {case.name: case for case in _FOUND}
assert len(CASES) == len(_FOUND), "two inputs share a name"
