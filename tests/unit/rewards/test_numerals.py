"""Numbers of final answers: read exactly, and equal exactly or by rounding to six digits or more."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction

import pytest

from gspo_dist.rewards.numerals import Numeral, equal_numerals, numeral


def read(text: str) -> Numeral:
    found = numeral(text)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "value", "decimals", "significant"),
    [
        # whole numbers are exact
        ("25", "25", None, 0),
        ("033", "33", None, 0),
        (" 12 345 ", "12345", None, 0),
        ("12345678901234567890123", "12345678901234567890123", None, 0),
        ("2e3", "2000", None, 0),
        ("2E+3", "2000", None, 0),
        ("10^5", "100000", None, 0),
        (r"3\cdot10^{2}", "300", None, 0),
        ("3 * 10^2", "300", None, 0),
        ("3x10^2", "300", None, 0),
        # decimals remember their places
        ("25.0", "25", 1, 3),
        (".5", "1/2", 1, 1),
        ("7.", "7", 0, 1),
        ("0.050", "1/20", 3, 2),
        ("1.5e3", "1500", -2, 2),
        ("2e-3", "1/500", 3, 1),
        (r"1.2 \times 10^{5}", "120000", -4, 2),
        ("10^{-5}", "1/100000", 5, 1),
        # fractions, mixed numbers and powers are exact
        (r"\frac{1}{2}", "1/2", None, 0),
        (r"\frac{-1}{2}", "-1/2", None, 0),
        (r"\frac{3}{+.5}", "6", None, 0),
        (r"2\frac{1}{2}", "5/2", None, 0),
        (r"-2\frac{1}{2}", "-5/2", None, 0),
        ("2 1/2", "5/2", None, 0),
        ("2  3 / 4", "11/4", None, 0),
        ("-2 1/2", "-5/2", None, 0),
        ("11/2", "11/2", None, 0),
        ("1.5/-3", "-1/2", None, 0),
        ("2^{10}", "1024", None, 0),
        ("2^3", "8", None, 0),
        ("4^{-2}", "1/16", None, 0),
        # signs, and one pair of brackets
        ("-5", "-5", None, 0),
        ("+5", "5", None, 0),
        ("- 5", "-5", None, 0),
        ("--5", "5", None, 0),
        ("-+5", "-5", None, 0),
        ("(5)", "5", None, 0),
        ("( -5 )", "-5", None, 0),
        ("-(-2.5)", "5/2", 1, 2),
    ],
)
def test_a_number_is_read_exactly(text, value, decimals, significant):
    assert numeral(text) == Numeral(Fraction(value), decimals, significant)


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "1,234", "1_000", "1e", r"\pi", "-", "1/2/3", "1.2.3", "\u0663", "\u0663 1/2",
        "(55", "55)", "((5))", "(1)(2)", "()",  # not one pair of brackets
        "10^23", "2^10",  # LaTeX without braces: 10^2 times 3
        "1/0", r"\frac{1}{0}", "2 1/0", "0^{-1}",
    ],
)  # fmt: skip
def test_what_is_no_number(text):
    assert numeral(text) is None


@pytest.mark.parametrize(
    ("most", "beyond"),
    [
        ("1" * 4000, "1" * 4001),
        ("0." + "1" * 3998, "0." + "1" * 3999),
        ("1e4000", "1e4001"),
        ("1e-4000", "1e-4001"),
        ("3^{4000}", "3^{4001}"),
        ("33^{-2000}", "33^{-2001}"),
        ("10^{4000}", "10^{4001}"),
    ],
)
def test_numbers_of_more_than_4000_digits_are_not_read(most, beyond):
    assert numeral(most) is not None
    assert numeral(beyond) is None


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("1/2", "0.5", True),
        ("1e5", "100000.0", True),
        ("1/3", "1/4", False),
        ("100000000000000000001", "100000000000000000000", False),
        ("2.88e-19", "3.88e-19", False),
        ("1e-9", "0", False),
        # a decimal of six significant digits stands for what rounds to it
        ("0.0833333", "1/12", True),
        ("0.083333", "1/12", False),  # five
        ("0.083", "1/12", False),
        ("0.666667", "2/3", True),
        ("0.666666", "2/3", False),  # cut off, not rounded
        ("-0.666667", "-2/3", True),
        ("-0.666667", "2/3", False),
        (r"1.23457 \times 10^{10}", "12345678901", True),
        ("123456", "123456.4", False),  # whole numbers are exact
        # two decimals: the one of fewer places may be the other one rounded
        ("0.123456", "0.1234562", True),
        ("0.123456", "0.1234565", True),  # half a place up, and half a place down
        ("0.123457", "0.1234565", True),
        ("0.123456", "0.1234567", False),
        ("0.123456", "0.123457", False),
        ("0.12345", "0.123451", False),
    ],
)
def test_equal_exactly_or_rounded_in_both_directions(a, b, equal):
    assert equal_numerals(read(a), read(b)) is equal
    assert equal_numerals(read(b), read(a)) is equal


@pytest.mark.parametrize("digits", [6, 7, 15])
def test_every_fraction_equals_its_rounding_and_not_the_decimal_beside_it(digits):
    """Rounded by the decimal module."""
    context = Context(prec=digits, rounding=ROUND_HALF_EVEN)
    for top in (1, 2, 5, 1000):
        for bottom in (3, 7, 11, 13, 999983):
            rounded = context.divide(Decimal(top), Decimal(bottom))
            beside = rounded.next_plus(context)
            fraction = read(f"{top}/{bottom}")
            assert equal_numerals(fraction, read(f"{rounded:f}")) is True
            assert equal_numerals(fraction, read(f"{beside:f}")) is False
