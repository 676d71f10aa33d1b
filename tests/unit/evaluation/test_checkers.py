"""What each standard checker takes for the same."""

from __future__ import annotations

import pytest

from gspo_dist.evaluation.checkers import CHECKERS, close

CASES = [
    # checker, output, expected, same
    ("wcmp", "1  2\n3", "1 2 3", True),
    ("wcmp", "1 2", "1 2 3", False),
    ("lcmp", "1  2\n3\n", "1 2\n3", True),
    ("lcmp", "1 2 3", "1 2\n3", False),
    ("fcmp", "a b\n", "a b", True),
    ("fcmp", "a  b", "a b", False),
    ("ncmp", "+7 8", "7 8", True),
    ("ncmp", "7.0", "7", False),
    ("rcmp4", "1.00009", "1", True),
    ("rcmp4", "1.0002", "1", False),
    ("rcmp6", "1000000.9", "1000000", True),
    ("rcmp6", "1000002", "1000000", False),
    ("rcmp6", "0.0000009", "0", True),
    ("rcmp9", "0.000000002", "0", False),
    ("rcmp9", "nan", "1", False),
    ("rcmp6", "x", "1", False),
    ("rcmp6", "1 2", "1", False),
    ("yesno", "Yes", "YES", True),
    ("yesno", "yes no", "yes no", False),
    ("nyesno", "yes NO", "YES no", True),
    ("nyesno", "1", "1", False),
    ("words", "Yes 1.0000001 a", "YES 1.0 a", True),
    ("words", "yes", "Yes", True),
    ("words", "A", "a", False),
    ("words", "1.00001", "1.0", False),
    ("words", "1000000.5", "1000000", False),  # a whole number is no decimal
    ("words", "1000000.5", "1000000.0", True),
    ("words", "7 8", "7", False),
    ("words", "x", "1.5", False),
]


@pytest.mark.parametrize(("name", "output", "expected", "same"), CASES)
def test_what_is_the_same(name, output, expected, same):
    assert CHECKERS[name](output, expected) is same


def test_closeness_at_the_edges():
    inf, nan = float("inf"), float("nan")
    assert close(nan, nan, 1e-6)
    assert not close(nan, 1.0, 1e-6)
    assert close(inf, inf, 1e-6)
    assert not close(inf, -inf, 1e-6)
    assert not close(1.0, inf, 1e-6)
    assert close(-200.0, -200.00019, 1e-6)
    assert not close(-200.0, -200.0003, 1e-6)
