"""What an environment is: two verbs, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from gspo_dist.types import Prompt


@dataclass(frozen=True)
class Observation:
    """What an environment answers to a turn."""

    text: str = ""
    """What the policy reads next. It is left out where nothing follows."""
    reward: float = 0.0
    """What the turn is paid."""
    done: bool = False
    """Whether the episode is over."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named numbers, for example of a game; each is logged as reward/NAME, summed over the turns."""


class Environment(Protocol):
    """One episode. A factory makes one for every completion: `factory(**options)`.

    It depends on the prompt, the seed and the turns alone, so that an episode can be played again.
    Three more verbs are used where an environment has them. `state_dict()` gives what it is as JSON values
    and `load_state_dict(state)` takes it up, in place of `reset`. `close()` is called when the episode ends.
    """

    def reset(self, prompt: Prompt, seed: int) -> str | None:
        """Begins the episode. Returns what the policy shall read after the prompt, or None. Called once.

        seed: another one for every episode of a run, the same one when an episode is begun again.
        """
        ...

    def step(self, turn: str) -> Observation:
        """Takes what the policy said, without special tokens. May raise anything: that costs the episode."""
        ...


class EnvironmentFailure(RuntimeError):
    """Environments fail and the configuration states no reward for it, or too many do in a row."""


class ToolFailure(RuntimeError):
    """What a tool raises where it cannot answer at all, as when its service is gone.

    It costs the episode. Whatever else a tool raises is the policy's to read.
    """


def facts(kind: str, tools: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """What a worker says of its environments: their kind in words, and the schemas of their tools."""
    return {"kind": kind, "tools": tools or []}
