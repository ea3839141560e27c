"""What a step holds, whoever works on it and wherever the run began."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsedge.errors import OptionError
from rsedge.training.data.samples import Order, derive


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 7), st.integers(0, 3))
def test_processes_share_each_step_without_changing_it(processes, chunks, micro, extra, seed):
    batch = processes * chunks * micro
    examples = 2 * batch + extra
    alone = Order(examples, batch, batch, seed)
    expected = list(alone.batches(0, 5))
    shares = [list(Order(examples, batch, micro, seed, processes, rank).batches(0, 5)) for rank in range(processes)]
    for step, whole in enumerate(expected):
        together = [item for share in shares for chunk in share[step * chunks : (step + 1) * chunks] for item in chunk]
        assert together == whole
        assert len({index for _, index in whole}) == batch


def test_a_run_that_starts_later_does_the_same():
    order = Order(50, 8, 4, 3)
    assert list(order.batches(7, 20)) == list(order.batches(0, 20))[7 * order.chunks :]
    assert len(list(order.batches(7, 20))) == 26


def test_epochs_differ_and_leave_out_different_images():
    order = Order(50, 8, 8, 0)
    assert order.steps_per_epoch == 6
    left = [set(range(50)) - {i for chunk in order.batches(6 * e, 6 * e + 6) for _, i in chunk} for e in range(3)]
    assert all(len(missing) == 2 for missing in left)
    assert left[0] != left[1]
    assert {epoch for chunk in order.batches(6, 12) for epoch, _ in chunk} == {1}


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(OptionError, match="there are 7 training images"):
        Order(7, 8, 8)
    with pytest.raises(OptionError, match="make it a multiple of 6"):
        Order(100, 8, 2, processes=3)


def test_seeds_are_the_same_on_every_machine():
    assert derive("order", 0, 1) == 1218296692904441363
    assert derive("a", "bc") != derive("ab", "c")
