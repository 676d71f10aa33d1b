"""A calculator: the policy writes a sum and an equals sign, and goes on after the result.

It is for policies that write plain text: with `environment.stop: ["="]` the equals sign ends a turn. A chat
model takes the function `calculate` as a tool.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from gspo_dist.environments.protocol import Observation
from gspo_dist.types import Prompt

EXPRESSION = re.compile(r"([\d+\-*/(). ]+)=\s*$")
LONGEST = 200
"""Characters of an expression. Longer ones are no sums, and cost time."""
OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression of numbers, + - * / and brackets.

    expression: such as 3*(4+5)
    """
    if len(expression) > LONGEST:
        raise ValueError(f"an expression has at most {LONGEST} characters: got {len(expression)}")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"no expression: {expression!r}") from error
    return str(value) if value.denominator == 1 else f"{float(value):g}"


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        inner = _value(node.operand)
        return -inner if isinstance(node.op, ast.USub) else inner
    raise ValueError("only numbers, + - * / and brackets")


class Calculator:
    """One episode: a turn that ends with a sum and "=" is answered, and the first other one is the last."""

    def reset(self, prompt: Prompt, seed: int) -> None:
        """Nothing is said."""

    def step(self, turn: str) -> Observation:
        """The result, or ? for what cannot be computed. Parts: tool_calls and tool_errors."""
        if not turn.endswith("="):
            return Observation(done=True)
        found = EXPRESSION.search(turn)
        try:
            text = calculate(found.group(1)) if found else "?"
        except (ValueError, ArithmeticError, RecursionError):
            text = "?"
        return Observation(text, parts={"tool_calls": 1.0, "tool_errors": float(text == "?")})

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """It keeps nothing between turns."""
