r"""Whether a final answer equals the right one, kind by kind, in both directions."""

from __future__ import annotations

import pytest

from gspo_dist.rewards import equal as rules
from gspo_dist.rewards.equal import equal, readable

BOTH, NEITHER, ONE_WAY = (True, True), (False, False), (True, False)
"""(right answer, found), and the other way round."""


def verdicts(gold: str, found: str) -> tuple[bool, bool]:
    return equal(gold, found), equal(found, gold)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("7", True), (r"\pi", True), (r"\{1\}", True), (r"\frac{1}{2}", True), ("$x$", True), ("(", True),
        ("", False), ("$", False), ("{}", False), ("{ }", False), ("}", False), ("x}", False), ("{x", False),
        (r"\{x", True), (r"x\}", True), ("\\", False),
    ],
)  # fmt: skip
def test_what_a_right_answer_must_say(text, says):
    assert readable(text) is says


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("", "", NEITHER),
        ("7", "", NEITHER),
        # as text
        ("x y", "xy", BOTH),
        (r"\spadesuit", r"\spadesuit", BOTH),
        (r"\spadesuit", r"\heartsuit", NEITHER),
        # units
        ("5 cm", "5 cm", BOTH),
        ("5 cm", "5 kg", NEITHER),
        ("5 cm", "5", BOTH),
        ("x cm", "x kg", NEITHER),
        # percent: where 50% is right, so are 50 and 0.5; where 0.5 is right, so is 50%
        (r"50\%", "50", BOTH),
        (r"50\%", "0.5", BOTH),
        (r"50\%", "50 %", BOTH),
        (r"50\%", r"51\%", NEITHER),
        (r"50\%", "5", NEITHER),
        (r"0.5\%", "0.5", ONE_WAY),  # 0.5 is 50%
        (r"1\%", "1", ONE_WAY),
        (r"2\%", "2", BOTH),
        (r"1.5\%", "1.5", BOTH),
        (r"x\%", "x", BOTH),
        (r"33.3333\%", "1/3", BOTH),
        (r"33.333333\%", "0.33333333", BOTH),
        (r"33.33\%", "1/3", NEITHER),
        (r"33.3334\%", "1/3", NEITHER),
        # degrees
        (r"90^\circ", "90", BOTH),
        (r"90^\circ", r"\frac{\pi}{2}", BOTH),
        (r"90^\circ", r"\frac{\pi}{3}", NEITHER),
        (r"90^\circ", r"\sqrt{8100}", BOTH),
        (r"45^\circ", r"\frac{1}{4}\pi", BOTH),
        (r"x^\circ", r"\pi x", NEITHER),
        (r"2\pi^\circ", r"2\pi", BOTH),
        # numbers that differ are not asked again as expressions
        ("0.67", "2/3", NEITHER),
        ("1000001", "1000000", NEITHER),
        ("7", "x", NEITHER),
        ("x+1", "1+x", BOTH),
        ("1,000+x", "x+1000", BOTH),
        # bases
        ("4210_5", "4210_{5}", BOTH),
        ("4210_5", "4210_6", NEITHER),
        ("4210_5", "4211_5", NEITHER),
        ("4210_5", "4210", ONE_WAY),  # never left out of what is right
        ("4210_5", "555", NEITHER),
        ("1A_16", "1A_{16}", BOTH),
        ("x_1", "y = x_1", BOTH),  # a name
        ("10_2", "x_2", NEITHER),
    ],
)  # fmt: skip
def test_numbers_and_what_stands_around_them(a, b, same):
    assert verdicts(a, b) == same


def matrix(kind: str, *rows: str) -> str:
    return rf"\begin{{{kind}}}" + r"\\".join(rows) + rf"\end{{{kind}}}"


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (matrix("pmatrix", "1&2", "3&4"), matrix("bmatrix", "1&2", r"3&\frac{8}{2}", ""), BOTH),
        (
            matrix("pmatrix", "1&2", "3&4"),
            matrix("array", "1 & 2", "3 & 4").replace("y}", "y}{c|c}", 1),
            BOTH,
        ),
        (matrix("pmatrix", "1&2", "3&4"), matrix("pmatrix", "1&2", "4&3"), NEITHER),
        (matrix("pmatrix", "1&2", "3&4"), matrix("pmatrix", "1&2&3&4"), NEITHER),
        (matrix("pmatrix", "1&2"), matrix("pmatrix", "1", "2"), NEITHER),
        (matrix("pmatrix", "1&2"), matrix("pmatrix", "1\n&\n2.0"), BOTH),
        (matrix("pmatrix", "1", "2"), "(1,2)", NEITHER),
        # gcd and the like, in any order of their arguments
        ("gcd(n, p-1)", r"\gcd(p-1, n)", BOTH),
        ("gcd(n, p-1)", "gcd(n, p-6)", NEITHER),
        ("gcd(n, p)", "lcm(n, p)", NEITHER),
        ("max(a,b)", "max(a,c)", NEITHER),
        (r"\max\{a,b\}", "max(b, a)", BOTH),
        ("max(a,b)", "b", NEITHER),
    ],
)
def test_matrices_and_functions(a, b, same):
    assert verdicts(a, b) == same


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (r"x \ge 5", r"[5,\infty)", BOTH),
        ("x > 5", r"(5,+\infty)", BOTH),
        (r"5 \le x", "x>=5", BOTH),
        ("5 < x", "x > 5", BOTH),
        (r"x \le 5", r"(-\infty,5]", BOTH),
        ("x < 5", r"(-\infty,5)", BOTH),
        ("5 > x", "x < 5", BOTH),
        ("x < 5", r"x \le 5", NEITHER),
        ("x > 5", r"x \ge 5", NEITHER),
        ("x < 5", "x > 5", NEITHER),
        ("x < 5", "x < 6", NEITHER),
        ("1 < x < 2", "(1,2)", BOTH),
        (r"1 \le x < 2", "[1,2)", BOTH),
        (r"1 < x \le 2", "(1,2]", BOTH),
        (r"2 \ge x > 1", "(1,2]", BOTH),
        (r"2 > x \ge 1", "[1,2)", BOTH),
        ("1 < x < 2", "1 < x < 3", NEITHER),
        ("0 < x < 2", "1 < x < 2", NEITHER),
        ("[1,2)", "[1,2]", NEITHER),
        ("(1,2]", "[1,2]", NEITHER),
        (r"x \in [1,2)", "[1,2.0)", BOTH),
        ("x = [1,2)", "[1,2.0)", BOTH),
        ("[1,2]", "[0.5+0.5,2]", BOTH),
        (r"(-\infty,1)\cup(2,3]", r"(2,3]\cup(-\infty,1)", BOTH),
        (r"(-\infty,1)\cup(2,3]", "x<1 or 2<x<=3", BOTH),
        (r"(0,1)\cup(2,3]", r"(0,1)\cup(2,3)", NEITHER),
        (r"(0,1)\cup(2,3]", "(0,1)", NEITHER),
        (r"(0,1)\cup(2,3]", r"(0,1)\cup(2,3]\cup(4,5)", NEITHER),
        # no ranges
        ("1 < x > 2", "2 < x > 1", NEITHER),
        ("1 < 2 < 3", "1 < 2 < 4", NEITHER),
        ("x+1 < 5", "x+1 < 6", NEITHER),
        (r"\{1\}\cup(2,3)", r"(2,3)\cup\{1\}", BOTH),
        (r"\{1\}\cup(2,3)", r"(2,3)\cup\{2\}", NEITHER),
        (r"A\cup B", r"B\cup A", BOTH),
        (r"A\cup B", "A", NEITHER),
    ],
)
def test_ranges_and_unions(a, b, same):
    assert verdicts(a, b) == same


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        # a name and its value
        ("x=3", "3", BOTH),
        ("x=3", "x=3.0", BOTH),
        ("x=3", "x=4", NEITHER),
        ("x=3", "4", NEITHER),
        ("3", "x = 1 + 2 = 3", BOTH),
        ("3", "1 + 2 = 3", ONE_WAY),
        ("5", "5_7 = 5", ONE_WAY),  # the step may say more than the value
        ("3", "1 + 3 = 3", NEITHER),  # a step that is wrong
        ("3", "x = 3 = 4", NEITHER),
        ("x = 1 + 2 = 3", "3", (True, True)),
        ("x = 1 + 2 = 3", "x = 3", BOTH),
        ("f(x)=x+1", "x+1", BOTH),
        ("f(x)=x+1", "f(x)=1+x", BOTH),
        ("y'=3", "3", BOTH),
        ("x_1=3", "3", BOTH),
        (r"\theta=3", "3", BOTH),
        # an equation is no value
        ("x+y=3", "3", (False, True)),
        # one equation times a constant
        ("y=2x+1", "2x-y+1=0", BOTH),
        ("x+y=3", "2x+2y=6", BOTH),
        ("x+y=3", "x+y=4", NEITHER),
        ("x+y=3", "1=1", NEITHER),
        ("x=3", "y=3", NEITHER),
        ("x+y=3", "x+y=z=3", NEITHER),
        (r"x \equiv 3", "3", BOTH),
        (r"x \ne 3", "3", NEITHER),
        # lists of them
        ("x=1, y=2", "y=2, x=1", BOTH),
        ("x=1, y=2", "1, 2", BOTH),
        ("x=1, y=2", "x=2, y=1", NEITHER),
        ("x=1, y=2", "2", NEITHER),
    ],
)
def test_equations(a, b, same):
    assert verdicts(a, b) == same


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        # no brackets or braces: in any order
        ("1, 2", "2, 1", BOTH),
        ("1, 2", "2; 1", BOTH),
        ("1, 2", r"2\text{ and }1", BOTH),
        ("1, 2", "2 or 1", BOTH),
        ("1, 2", r"\{2, 1\}", BOTH),
        ("1, 2, 2", "1, 1, 2", NEITHER),
        ("1, 2", "1, 2, 3", NEITHER),
        ("1, 2", "1", NEITHER),
        (r"\{1\}", "1", BOTH),
        (r"\{1\}", "2", NEITHER),
        (r"\{\}", r"\emptyset", BOTH),
        # brackets: in order
        ("(1,2,3)", "(1,2,3.0)", BOTH),
        ("(1,2,3)", "(1,3,2)", NEITHER),
        ("(1,2,3)", "[1,2,3]", NEITHER),
        ("(1,2,3)", r"\{1,2,3\}", NEITHER),
        ("(1,2,3)", "1,2,3.0", BOTH),
        ("(1,2,3)", "1,3,2", NEITHER),
        ("(1,2)", "1,2.0", BOTH),
        ("(1,2)", "2,1", NEITHER),
        (r"\langle 1,2,3\rangle", r"\langle 1,2,3.0\rangle", BOTH),
        (r"\langle 1,2,3\rangle", r"\langle 1,3,2\rangle", NEITHER),
        (r"\langle1,2,3\rangle", r"\langle 1,2,3.0\rangle", BOTH),
        (r"\langle 1,2,3\rangle", "(1,2,3)", NEITHER),
        ("(1,2),(3,4)", "(3,4),(1,2.0)", BOTH),
        ("(1,2),(3,4)", "(2,1),(3,4)", NEITHER),
        ("(1,2,3)", "7", NEITHER),
        # dots: in order
        (r"1,2,\ldots,9", r"1,2.0,\ldots,9", BOTH),
        (r"1,2,\ldots,9", r"2,1,\ldots,9", NEITHER),
        # two signs
        (r"\pm 2", "2, -2", BOTH),
        (r"1 \pm \sqrt{2}", r"1-\sqrt{2}, 1+\sqrt{2}", BOTH),
        (r"\pm 2", "2", NEITHER),
        (r"a \pm b \mp c", "a+b-c, a-b+c", BOTH),
        (r"a \pm b \mp c", "a+b+c, a-b-c", NEITHER),
        # thousands
        ("1,234", "1234", BOTH),
        ("1,234", "1235", NEITHER),
        ("1,234", "1, 234", BOTH),
        ("1,234", "234, 1", BOTH),
        ("1,234", "1, 235", NEITHER),
        ("1,234+x", "x+1234", BOTH),
        ("123,456", "456,123", BOTH),
        ("1,000; 5_7", "1000; 5", ONE_WAY),
    ],
)
def test_lists_sets_and_tuples(a, b, same):
    assert verdicts(a, b) == same


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Evelyn", "evelyn", BOTH),
        ("Evelyn", "Evelyn Smith", NEITHER),
        ("Lisa", "Linda", NEITHER),
        (r"New\ York", "new york", BOTH),
        ("no", "No.", BOTH),
        ("no", "on", NEITHER),
        ("the first answer", "The first answer!", ONE_WAY),
        ("the first answer", "the second answer", NEITHER),
        ("3", "there are more than 3", NEITHER),
        ("3", "the sum = 3", NEITHER),  # words carry it, and they are not read
        # choices
        ("B", "b", BOTH),
        ("(B)", "B", BOTH),
        ("(B)", "(b)", BOTH),
        ("(B)", "(C)", NEITHER),
        ("B", "(B) 42", ONE_WAY),
        ("B", "C) 42", NEITHER),
        ("B", "B 42", NEITHER),
        ("B", "A+1", NEITHER),
        ("(b)", "B) 42", ONE_WAY),
        ("b", "b) 42", NEITHER),
        ("x", "x!", NEITHER),
        ("3", "area = 3", ONE_WAY),  # one word is a name
    ],
)
def test_words_and_choices(a, b, same):
    assert verdicts(a, b) == same


def test_longer_answers_are_compared_as_text_only():
    assert rules.MOST_CHARACTERS == 1000
    digits = "1" * 998
    assert equal(digits, digits + ".0") is True
    assert equal(digits + "1", digits + "1.0") is False
    assert equal(digits + "1.0", digits + "1") is False
    assert equal("x" * 2000, "x " * 2000) is True


def test_lists_have_200_elements_at_most():
    ones = ["1"] * 200
    assert equal(",".join(ones), ",".join([*ones[1:], "01"])) is True
    assert equal(",".join([*ones, "1"]), ",".join([*ones, "01"])) is False


def nested(depth: int, inner: str) -> str:
    return r"\{1," * depth + inner + r"\}" * depth


def test_lists_nest_eight_deep_at_most():
    assert equal(nested(8, "1"), nested(8, "1.0")) is True
    assert equal(nested(9, "1"), nested(9, "1.0")) is False


def test_the_right_answer_comes_first_everywhere():
    """Half of the rules hold one way only. 5_7 may be written as 5, never the other way round."""
    for make in (
        "({},0,1)", "0,{},1", r"\{{{}\}}", "[{},9)", "[0,{})", "x=[{},9)", "gcd({},0)", "x={}", "1<x<{}",
        r"\begin{{pmatrix}}{}&1\end{{pmatrix}}", r"[{},9)\cup[20,30)", r"\{{{}\}}\cup\{{1\}}",
    ):  # fmt: skip
        assert verdicts(make.format("5_7"), make.format("5")) == ONE_WAY, make
    assert verdicts("x=5_7", "5") == ONE_WAY


def test_what_is_left_is_asked_as_one_expression(monkeypatch):
    """The right one first, thousands joined. What is of another kind is not asked."""
    asked = []
    monkeypatch.setattr(
        rules, "same_expression", lambda gold, found: bool(asked.append((gold, found))) or True
    )
    assert equal("1,000+x", "y") is True
    assert asked == [("1000+x", "y")]
    for a, b in (
        (matrix("pmatrix", "7"), "y"),
        (matrix("pmatrix", "1&2"), matrix("pmatrix", "1", "2")),
        (r"A\cup B", "A"),
        ("a, b", "a"),
    ):
        assert verdicts(a, b) == NEITHER
    assert len(asked) == 1
    assert equal("(1,2)+(3,4)", "(2,2)+(3,4)") is True  # no interval, whatever its ends are
    assert equal("(1,2,3)", "y") is True  # y may be the name of a vector
    assert equal("y", "(1,2,3)") is True
    assert len(asked) == 4
