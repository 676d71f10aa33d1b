"""Expressions and equations: math-verify's verdict, which numbers confirm, and what is refused unread."""

from __future__ import annotations

import threading

import pytest
import sympy

from gspo_dist.rewards import symbolic
from gspo_dist.rewards.symbolic import same_equation, same_expression


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("x+1", "1+x", True),
        ("x+1", "x+2", False),
        ("x", "y", False),
        ("x^2-y^2", "(x-y)(x+y)", True),
        ("0", "0", True),
        ("x", "", False),
        (r"\sqrt{2}", "1.4142136", True),
        # relative, where math-verify's tolerance is absolute
        ("2.88e-19 x", "3.88e-19 x", False),
        ("1000000x", "1000002x", False),
        # infinity is itself, and nothing else
        (r"\infty", r"\infty", True),
        (r"\infty", r"+\infty", True),
        (r"-\infty", r"-\infty", True),
        (r"-\infty", r"\infty", False),
        (r"\infty", "5", False),
        # no final answer: the unknown falls out, but it is there
        ("x+42-x+0y", "42", False),
        (r"\sin^2 x+\cos^2 x", "1", False),
        # sets and relations: numbers cannot tell, so math-verify decides
        (r"\{1,2\}", r"\{2,1\}", True),
        (r"\{1,2\}", r"\{2,3\}", False),
        ("x>3", "3<x", True),
        # values that are no numbers
        ("f(x)", "f(x)", True),
        # subscripts belong to the name
        ("E_0^2", "E_0^2", True),
        ("E_0^2", "E_1^2", False),
        ("x_{12}+1", "1+x_{12}", True),
        (r"\log_2 8", "3", True),
        (r"\log_{2} 8", "3", True),
        (r"\log_2 8", r"\log_2 4", False),
        # words are not multiplied, functions are no words
        ("abc", "cab", True),
        ("Evens", "Evens", False),
        ("x", "words", False),
        ("sinh(x)+1", "1+sinh(x)", True),
        ("sqrt(4)x", "2x", True),
        (r"\alpha+1", r"1+\alpha", True),
        # refused unread
        ("a:b", "a:b", False),
        (r"1+\ldots", r"1+\ldots", False),
        (r"\gcd(4,6)", r"\gcd(4,6)", False),
        ("1 mod 4", "1 mod 4", False),
        (r"\int x", r"\int x", False),
        ("2^{10000}", "2^{10000}", False),
        ("2^{3^4}", "2^{3^4}", False),
        ("(x+1)^{100}", "(x+1)^{100}", False),
        ("1000!", "1000!", False),
        (r"\binom{10000}{2}", r"\binom{10000}{2}", False),
    ],
)
def test_one_expression(a, b, same):
    assert same_expression(a, b) is same
    assert same_expression(b, a) is same


@pytest.mark.parametrize(("depth", "same"), [(25, True), (26, False)])
@pytest.mark.parametrize("pair", ["()", "[]", "{}"])
def test_brackets_nest_25_deep_at_most(monkeypatch, pair, depth, same):
    """Beside one another they do not nest. The parser, which is slow here, reads x for all of it."""
    monkeypatch.setattr(symbolic, "_parse", lambda text: [sympy.Symbol("x")])
    nested = pair[0] * depth + "x" + pair[1] * depth
    assert same_expression(nested, "x") is same
    assert same_expression("x", nested + pair * 30) is same


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        # one is the other times a constant
        (("y", "2x+1"), ("2y", "4x+2"), True),
        (("y", "2x+1"), ("2x-y", "-1"), True),
        (("x^2+y^2", "1"), ("3", "3x^2+3y^2"), True),
        (("x", r"\frac{z}{y}"), (r"5\frac{z}{y}", "5x"), True),
        # one is not, however alike
        (("x", "y"), ("x", "-y"), False),
        (("y", "x^2"), ("y^2", "x^4"), False),
        (("y", "x"), ("y", "z"), False),
        (("x", "2"), ("x", ""), False),
        (("x", "2"), ("", "2"), False),
        # what is always so is no equation times a constant
        (("y", "x"), ("1", "1"), False),
        (("y", "x"), ("x", "x"), False),
        # infinity is no constant
        (("2x", r"\infty"), ("2x", "10"), False),
        # other things than expressions
        (("y", "x"), ("y", r"\{1,2\}"), False),
        (("y", "f(x)"), ("y", "f(x)"), False),
        # names with subscripts, and what is refused unread
        (("a_0", "x"), ("2a_0", "2x"), True),
        (("a_0", "x"), ("a_1", "x"), False),
        (("a:b", "x"), ("a:b", "x"), False),
        (("y", r"\sum x"), ("y", r"\sum x"), False),
    ],
)
def test_one_equation(a, b, same):
    assert same_equation(a, b) is same
    assert same_equation(b, a) is same


@pytest.mark.parametrize("slope", [-2, -1, 0.5, 1, 2, 3])
@pytest.mark.parametrize("by", [-1, 1, 10])
def test_parallel_lines_are_not_the_same(slope, by):
    """They are told apart whatever their slope is: no line holds the points where they are compared."""
    assert same_equation(("y", f"{slope}x+5"), (f"{slope}x-y", "-5")) is True
    assert same_equation(("y", f"{slope}x+5"), (f"{slope}x-y", f"{-5 - by}")) is False


@pytest.mark.parametrize("same", [same_expression, same_equation])
@pytest.mark.parametrize("error", [RecursionError, ValueError, MemoryError])
def test_what_makes_the_parser_raise_is_not_the_same(monkeypatch, same, error):
    def parse(text: str) -> list[object]:
        raise error

    monkeypatch.setattr(symbolic, "_parse", parse)
    sides = ("x", "y") if same is same_expression else (("x", "y"), ("x", "y"))
    assert same(*sides) is False


@pytest.mark.parametrize(("off", "same"), [(0.9e-6, True), (1.1e-6, False), (0.5, False)])
@pytest.mark.parametrize("size", [1e-12, 3.0, -3.0, 1e12])
def test_numbers_confirm_within_a_millionth_of_their_size(monkeypatch, size, off, same):
    """Whatever math-verify says."""
    read = {"a": sympy.Float(size, 30), "b": sympy.Float(size, 30) * (1 + sympy.Float(off, 30))}
    monkeypatch.setattr(symbolic, "_parse", lambda text: [read[text]])
    monkeypatch.setattr(symbolic, "_verify", lambda gold, found: True)
    assert same_expression("a", "b") is same
    assert same_expression("b", "a") is same


def test_infinity_is_not_confirmed_by_numbers_of_another_kind(monkeypatch):
    read = {"a": sympy.oo, "b": -sympy.oo, "c": sympy.Integer(5), "d": sympy.zoo}
    monkeypatch.setattr(symbolic, "_parse", lambda text: [read[text]])
    monkeypatch.setattr(symbolic, "_verify", lambda gold, found: True)
    confirmed = {one + other for one in read for other in read if same_expression(one, other)}
    assert confirmed == {"aa", "bb", "cc"}


def test_names_with_other_subscripts_differ_whatever_is_read(monkeypatch):
    monkeypatch.setattr(symbolic, "_parse", lambda text: [sympy.Symbol("x")])
    assert same_expression("E_0", "E_{0}") is True
    assert same_expression("E_0", "E_1") is False
    assert same_expression("E_0", "F_0") is False
    assert same_expression(r"\log_2", r"\log_3") is True  # a base, which the parser reads


def test_unknowns_are_taken_to_be_positive(monkeypatch):
    names = x, y, z = sympy.symbols("x y z")
    read = {"a": x + 2 * y + 3 * z, "b": sum(n * sympy.sqrt(name**2) for n, name in enumerate(names, 1))}
    monkeypatch.setattr(symbolic, "_parse", lambda text: [read[text]])
    monkeypatch.setattr(symbolic, "_verify", lambda gold, found: True)
    assert same_expression("a", "b") is True


def test_what_is_right_comes_first_and_no_alarm_is_set(monkeypatch):
    """math-verify is asked gold first: its rules are not the same in both directions."""
    asked = []

    class Package:
        @staticmethod
        def parse(text, parsing_timeout):
            asked.append((text, parsing_timeout))
            return [sympy.Symbol("x") + len(text)]

        @staticmethod
        def verify(gold, found, timeout_seconds):
            asked.append((gold, found, timeout_seconds))
            return False

    monkeypatch.setattr(symbolic, "math_verify", lambda: Package)
    assert same_expression("a", "bb") is False
    x = sympy.Symbol("x")
    assert asked == [(r"\boxed{a}", None), (r"\boxed{bb}", None), ([x + 9], [x + 10], None)]


def test_it_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(
        target=lambda: found.extend([same_expression("x+1", "1+x"), same_equation(("y", "x"), ("2x", "2y"))])
    )
    thread.start()
    thread.join()
    assert found == [True, True]
