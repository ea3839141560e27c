"""Every hostile input ends in an error that names it or in its own pixels, and touches nothing else.

What the watchers see is proved in ``test_watch.py``. ``python -m tests.security.report`` prints what each kind does.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.security.catalog import CASES
from tests.security.runner import Outcome, run_all


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, list[Outcome]]]:
    """What all chosen inputs did: they share two processes, so that start-up is paid twice and not a thousand times."""
    chosen = {item.callspec.params["name"] for item in request.session.items if item.module is request.module}
    return run_all([CASES[name] for name in CASES if name in chosen], tmp_path_factory.mktemp("ground"))


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_touched(name, outcomes):
    faults = {outcome.use: outcome.faults for outcome in outcomes[name] if outcome.faults}
    assert faults == {}
