"""A text game of a few turns: the policy guesses a hidden number, and is told which way it lies."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from gspo_dist.checks import at_least
from gspo_dist.environments.protocol import Observation
from gspo_dist.types import Prompt


class Guess:
    """One game. The number depends on the prompt, so that siblings look for the same one.

    The right guess pays 1 and ends the game. Every other guess is answered with < (the number is smaller)
    or > (it is greater), and a turn without a number with ?. Example: the number is 3, and the guesses 5 and
    3 are answered with < and paid 0 and 1.
    """

    def __init__(self, highest: int = 9) -> None:
        """The numbers are 1 to `highest`."""
        at_least("environment.options.highest", highest, 2)
        self.highest, self.number, self.guesses = highest, 0, 0

    def reset(self, prompt: Prompt, seed: int) -> None:
        digest = hashlib.blake2b(prompt.text.encode(), digest_size=8).digest()
        self.number = 1 + int.from_bytes(digest, "big") % self.highest

    def step(self, turn: str) -> Observation:
        self.guesses += 1
        found = re.findall(r"\d+", turn)
        if not found:
            return Observation("?", parts={"guesses": 1.0})
        guess = int(found[-1][:6])
        if guess == self.number:
            return Observation("", 1.0, done=True, parts={"guesses": 1.0})
        return Observation("<" if self.number < guess else ">", parts={"guesses": 1.0})

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "guesses": self.guesses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number, self.guesses = state["number"], state["guesses"]
