"""LaTeX in one plain form: what only looks different becomes the same text."""

from __future__ import annotations

import re

import pytest

from gspo_dist.rewards.latex import Clean, clean, closing, compact, joined_thousands, split

COMMA = re.compile(",")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"\left(3,\,\dfrac{\pi}{2}\right).", r"(3, \frac{\pi}{2})"),
        ("x − 3×y÷2", r"x - 3\times y/2"),
        ("½", r"\frac{1}{2}"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac{x}2", r"\frac{x}{2}"),
        (r"\tfrac 1{2}", r"\frac{1}{2}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"x\leq 3", r"x\le 3"),
        (r"x \lt 3", "x < 3"),
        (r"\lbrace\rbrace", r"\emptyset"),
        (r"1, 2, \dots, n", r"1, 2, \ldots , n"),
        # wrappers, also in one another, four at most
        (r"\text{Evelyn}", "Evelyn"),
        (r"\mathrm{a}\mathbf{b}", "a b"),
        (r"\textbf{\text{\mathrm{\mbox{x}}}}", "x"),
        (r"\text{" * 5 + "x" + "}" * 5, r"\text{ x }"),
        # spaces of every kind
        (r"a\,b~c", "a b c"),
        (r"a\!b", "ab"),
        # digits in groups
        (r"1,\!234,\!567", "1234567"),
        (r"12{,}345", "12345"),
        (r"1\,234.5", "1234.5"),
        ("-1 234 567", "-1234567"),
        ("12 34", "12 34"),
        # money and delimiters of mathematics
        (r"\$12", "12"),
        ("€ 12", "12"),
        ("$x$", "x"),
        ("$69$,$84$", "69;84"),
        ("$69$ and $84$", "69;84"),
        (r"\(x\)", "x"),
        (r"\[x\].", "x"),
        # the end of a sentence, stars, and outer brackets that say nothing
        (r"x.", "x"),
        (r"x \\", "x"),
        ("**x**", "x"),
        (r"\{1, 2\}", r"\{1, 2\}"),
        ("{x}", "x"),
        ("{{x} }", "x"),
        ("{a}{b}", "{a}{b}"),
        ("(x)", "(x)"),
        ("((x))", "(x)"),
        ("(((x)y))", "((x)y)"),
        ("((x(y)))", "(x(y))"),
        ("((1,2),(3,4))", "((1,2),(3,4))"),
        ("((x)", "((x)"),
        ("(" * 1000 + "x" + ")" * 1000, "(x)"),
        (r"\left(\begin{matrix}1\\2\end{matrix}\right)", r"\begin{matrix}1\\2\end{matrix}"),
        ("[\\begin{array}{c}1\n2\\end{array}]", r"\begin{array}{c}1 2\end{array}"),
    ],
)
def test_what_looks_different_becomes_the_same(text, plain):
    assert clean(text) == Clean(plain) == (plain, False, False, "")


@pytest.mark.parametrize(
    ("text", "number", "percent", "degrees", "unit"),
    [
        (r"50\%", "50", True, False, ""),
        ("5%.", "5", True, False, ""),
        ("5%, 6%", "5%, 6", True, False, ""),
        ("50 percent", "50", True, False, ""),
        (r"90^\circ", "90", False, True, ""),
        (r"90^{\circ}C", "90", False, True, ""),
        ("90°", "90", False, True, ""),
        ("20 degrees", "20", False, True, ""),
        ("5 cm", "5", False, False, "cm"),
        (r"5\text{ centimeters}", "5", False, False, "cm"),
        ("5 m.", "5", False, False, "m"),
        ("5 s", "5", False, False, "s"),
        ("5 ms", "5", False, False, "ms"),  # no metres
        ("5 secs", "5", False, False, "s"),
        ("2 hrs", "2", False, False, "h"),
        ("12 inches^2", "12", False, False, "in2"),
        ("12 in^{2}", "12", False, False, "in2"),
        ("3 kg^{-1}", "3", False, False, "kg-1"),
        (r"2\pi cm", r"2\pi", False, False, "cm"),
        (r"\frac{1}{2}\pi cm", r"\frac{1}{2}\pi", False, False, "cm"),
        ("2i cm", "2i", False, False, "cm"),
        # units that are not in the table
        ("5 apples", "5", False, False, ""),
        ("5 apples^2", "5", False, False, ""),
        ("5 kg m", "5", False, False, ""),
        ("10 m/s^2", "10", False, False, "m2"),
    ],
)
def test_what_stands_around_a_number_is_taken_off_and_told(text, number, percent, degrees, unit):
    assert clean(text) == (number, percent, degrees, unit)


@pytest.mark.parametrize(
    "text",
    [
        "%", "50% of x", "7 mod", "7 mod p", "x is even", "3 apples + 2", "3 apples, 2", "xcm",
        "Lisa", "Michigan", "ice", r"\infty", r"-\infty", r"\pitchfork", r"x\in Fish",
    ],
)  # fmt: skip
def test_what_is_no_unit_stays(text):
    assert clean(text) == (text, False, False, "")


def test_a_unit_has_60_characters_at_most():
    words = [sign * 19 for sign in "abc"]
    assert clean("5 " + " ".join(words)).text == "5"
    long = "5 " + " ".join([*words[:2], "c" * 20])
    assert clean(long).text == long


def test_compact_leaves_out_what_means_nothing():
    assert compact(r"\frac{ 1 }{2}") == compact(r"\frac12") == r"\frac12"
    assert compact(r"\pi r") == r"\pi r"
    assert compact(r"\{ 1 , 2 \}") == r"\{1,2\}"
    assert compact("{1, 2}") == "1,2"


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("1,234", "1234"),
        ("1,234,567.5 + x", "1234567.5 + x"),
        ("12,34", "12,34"),
        ("1,2345", "1,2345"),
        ("(1,234)", "(1,234)"),
        ("[1,234]", "[1,234]"),
        (r"\{1,234\}", r"\{1,234\}"),
    ],
)
def test_thousands_are_joined_outside_brackets(text, joined):
    assert joined_thousands(text) == joined


@pytest.mark.parametrize(
    ("text", "at", "end"),
    [
        ("(a(b)c)d", 0, 6),
        ("(a(b)c)d", 2, 4),
        ("[a]", 0, 2),
        ("{a}", 0, 2),
        (r"\{a\}", 0, 4),
        (r"(a\(b)", 0, 5),  # \( is no bracket
        (r"(\\(a))", 0, 6),
        ("(a", 0, None),
        ("", 0, None),
    ],
)
def test_the_bracket_that_closes(text, at, end):
    assert closing(text, at) == end


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a, b", ["a", "b"]),
        (",a,,b,", ["", "a", "", "b", ""]),
        ("abc", ["abc"]),
        ("(a,b),[c,d],{e,f}", ["(a,b)", "[c,d]", "{e,f}"]),
        ("((a),b),c", ["((a),b)", "c"]),
        (r"\{a,b\},c", [r"\{a,b\}", "c"]),
        (r"\{(a),b\},c", [r"\{(a),b\}", "c"]),
        (r"\begin{x}a,b\end{x},c", [r"\begin{x}a,b\end{x}", "c"]),
        ("a),b", ["a)", "b"]),
        (r"a\,b", [r"a\,b"]),
    ],
)
def test_a_text_is_split_outside_brackets(text, parts):
    assert split(text, COMMA) == parts


def test_a_separator_may_be_long():
    assert split("a and (b and c) and d", re.compile(" and ")) == ["a", "(b and c)", "d"]
