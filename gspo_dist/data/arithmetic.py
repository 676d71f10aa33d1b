"""The quickstart's own task: column addition with a worked solution, and the split no one may cross.

A question is "347+285="; a solution works column by column from the right and ends with the answer:
  long style:  7+5=12,4+8+1=13,3+2+1=06#632      short style: 12,13,06#632
Each column's sum has two digits, its carry first. The long style writes the carry only where there is one,
so that a solution that forgets a carry is shorter than the right one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

ANSWER_MARK = "#"
"""What stands before the answer in a solution."""
ANSWER_PATTERN = r"#(\d+)$"
"""`reward.options.pattern` of exact_match for this task: the number after the mark that ends a completion."""

SPLITS = ("train", "heldout")
"""The two sides of the split."""


@dataclass(frozen=True)
class Addition:
    """One question: the sum of two whole numbers of equal width."""

    left: int
    """First operand."""
    right: int
    """Second operand."""

    @property
    def text(self) -> str:
        return f"{self.left}+{self.right}="

    @property
    def answer(self) -> str:
        return str(self.left + self.right)

    @property
    def carries(self) -> int:
        """Columns that hand a carry to a further column. The last carry is written out and does not count."""
        a, b, carry, count = self.left, self.right, 0, 0
        while a >= 10 or b >= 10:
            carry = (a % 10 + b % 10 + carry) // 10
            count += carry
            a, b = a // 10, b // 10
        return count


@dataclass(frozen=True)
class Habits:
    """How a pupil errs: the noise of the cold-start corpus. All three are probabilities."""

    forget_carry: float = 0.0
    """That a carry into a column is left out."""
    slip: float = 0.0
    """That a column's sum is off by one."""
    long_style: float = 0.5
    """That a solution copies the operands' digits."""


def is_heldout(question: Addition, share: float) -> bool:
    """Whether a question belongs to the held-out split, which holds `share` of all pairs.

    A hash of the unordered pair decides: no seed matters, and "3+5" and "5+3" fall on the same side.
    """
    low, high = sorted((question.left, question.right))
    digest = hashlib.blake2b(f"{low}+{high}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


def stream(rng: np.random.Generator, split: str, *, digits: int, heldout_share: float) -> Iterator[Addition]:
    """Endless questions of one split. Operands are uniform over the numbers of exactly `digits` digits."""
    _check(split, digits, heldout_share)
    low, high = 10 ** (digits - 1), 10**digits
    while True:
        for left, right in rng.integers(low, high, size=(256, 2)):
            question = Addition(int(left), int(right))
            if is_heldout(question, heldout_share) == (split == "heldout"):
                yield question


def _check(split: str, digits: int, heldout_share: float) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}: got {split!r}")
    if not 1 <= digits <= 9:
        raise ValueError(f"data.options.digits must be between 1 and 9: got {digits}")
    if not 0 < heldout_share < 1:
        raise ValueError(f"data.options.heldout_share must be between 0 and 1: got {heldout_share}")


def problems(
    split: str, *, size: int, seed: int, digits: int = 3, heldout_share: float = 0.1
) -> list[Addition]:
    """`size` distinct questions of `split`, the same for the same arguments.

    Raises ValueError when the split is too small to hold them.
    """
    _check(split, digits, heldout_share)
    if size < 1:
        raise ValueError(f"data.options.size must be at least 1: got {size}")
    pairs = (9 * 10 ** (digits - 1)) ** 2
    room = pairs * (heldout_share if split == "heldout" else 1 - heldout_share)
    if size > room / 2:
        raise ValueError(
            f"arithmetic: {size} {split} questions asked for, but {digits}-digit operands give about "
            f"{room:.0f} and at most half of them are drawn; lower data.options.size (heldout_size) or raise "
            "data.options.digits"
        )
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    found: dict[Addition, None] = {}
    for question in stream(rng, split, digits=digits, heldout_share=heldout_share):
        found.setdefault(question)
        if len(found) == size:
            return list(found)
    raise AssertionError("stream() is endless")


def worked_solution(question: Addition, rng: np.random.Generator, habits: Habits = Habits()) -> str:
    """A solution as a pupil with these habits writes it: right where forget_carry and slip are 0.

    Errors are carried through, so that the answer always follows from the columns as written.
    """
    long_style = rng.random() < habits.long_style
    steps, digits, carry = [], [], 0
    a, b = question.left, question.right
    while a or b:
        x, y = a % 10, b % 10
        if carry and rng.random() < habits.forget_carry:
            carry = 0
        total = x + y + carry
        if rng.random() < habits.slip:
            total = max(0, total + (1 if rng.random() < 0.5 else -1))
        terms = f"{x}+{y}+1=" if carry else f"{x}+{y}="
        steps.append((terms if long_style else "") + f"{total:02d}")
        digits.append(str(total % 10))
        carry = total // 10
        a, b = a // 10, b // 10
    answer = int((str(carry) if carry else "") + "".join(reversed(digits)))
    return ",".join(steps) + ANSWER_MARK + str(answer)
