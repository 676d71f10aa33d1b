"""An environment of one's own: the policy looks for a letter, and is told whether it is near.

    gspo train experiment=guess environment.factory=gspo_dist.examples.word_game:Letters \
      +environment.options.letters=abcdef environment.max_turns=3

A copy is named by its path: `environment.factory=my_games.py:Letters`. What a turn is paid is logged with the
rewards, and its parts as reward/asked.
"""

from __future__ import annotations

from typing import Any

from gspo_dist.environments.protocol import Observation
from gspo_dist.types import Prompt


class Letters:
    """One game. It depends on the prompt and the turns alone, so that it can be played again."""

    def __init__(self, letters: str = "abcdefgh") -> None:
        """The options of the configuration."""
        self.letters, self.wanted = letters, 0

    def reset(self, prompt: Prompt, seed: int) -> None:
        """Siblings look for the same letter: what differs between them is what they did."""
        self.wanted = sum(prompt.token_ids) % len(self.letters)

    def step(self, turn: str) -> Observation:
        """The right letter pays 1 and ends the game; a neighbour pays a little, and is told by "!"."""
        found = [self.letters.index(letter) for letter in turn if letter in self.letters]
        if not found:
            return Observation("?")
        away = abs(found[-1] - self.wanted)
        if away == 0:
            return Observation(reward=1.0, done=True, parts={"asked": 1.0})
        return Observation("!" if away == 1 else ".", 0.1 if away == 1 else 0.0, parts={"asked": 1.0})

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; without it the turns would be played again."""
        return {"wanted": self.wanted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the game up where `state_dict` left it."""
        self.wanted = state["wanted"]
