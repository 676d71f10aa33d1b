"""One question to all hosts: every host answers, with its time."""

from __future__ import annotations

import pytest

from gspo_dist.actors.everywhere import ask_every_host, clock_offset
from gspo_dist.actors.session import nodes


def test_a_clock_is_read_from_the_fastest_answer() -> None:
    """The second question takes 0.2 s and the others 4: 105.1 at 100.1 is 5 ahead; the rest would say 3."""
    here = iter([0.0, 4.0, 100.0, 100.2, *[t for i in range(3) for t in (200.0 + 10 * i, 204.0 + 10 * i)]])
    there = iter([5.0, 105.1, 205.0, 215.0, 225.0])
    assert clock_offset(lambda: next(there), lambda: next(here)) == pytest.approx(5.0)


@pytest.mark.slow
def test_every_host_is_asked_and_a_host_that_fails_is_its_own_answer(ray_here) -> None:
    (answer,) = ask_every_host(divmod, 7, 4)
    assert answer.value == (1, 3)
    assert abs(answer.clock_s) < 0.5
    (answer,) = ask_every_host(divmod, 7, 0)
    assert isinstance(answer.value, ZeroDivisionError)
    assert [answer.node] == nodes()
