"""What answers the policy between its turns, where an episode has more than one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gspo_dist.checks import above, at_least, choose

REWARDS = ("environment", "function", "sum")


@dataclass(frozen=True)
class EnvironmentConfig:
    """What answers the policy between its turns. Without a factory and tools a completion is one turn."""

    factory: str | None = None
    """Makes the environment of one episode: calculator | guess | python, package.module:name,
    path/to/file.py:name, or openenv:URL. Environments of other libraries are known by their verbs."""
    tools: tuple[str, ...] = ()
    """Functions that the policy may call: calculate | python, package.module:name, path/to/file.py:name, or
    "mcp:COMMAND" for all tools of an MCP server. They make an environment: factory must be null."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the factory. For openenv:URL: action and observation, the names of the fields that
    hold the turn's text and the answer's."""
    max_turns: int = 8
    """Turns of the policy after which an episode ends, with finish_reason "turns"."""
    tokens_per_turn: int | None = None
    """Tokens after which a turn of the policy is cut off. That ends the episode, with finish_reason "length",
    as rollout.max_completion_tokens for the whole episode does. null: no limit but that."""
    tokens_per_answer: int = 1024
    """Tokens of an answer that are kept: the first ones. Of its text no more than 16 characters for each of
    these tokens are looked at."""
    timeout_s: float = 60.0
    """Deadline for one answer. The process of the environment is ended then, and another one started."""
    workers: int = 1
    """Environment processes. Each gives one answer at a time."""
    role: str | None = None
    """Role of an answer in the chat template. null: "tool" where there are tools, else "user"."""
    keep_history: bool = False
    """Go on where the chat template would strip something of an earlier turn, such as its thinking: the
    history stays as it was sampled. False: such a template is refused."""
    stop: tuple[str, ...] = ()
    """Texts of one token each that end a turn, beside the end of the sequence."""
    reward: str | None = None
    """environment (what it pays, summed over the turns) | function (reward.function) | sum. null:
    environment where there is a factory, function where there are tools."""
    failure_reward: float | None = 0.0
    """Reward of an episode whose environment misses its deadline, dies, raises or leaves no room for a turn
    (counted in environment/failed_fraction). null stops the run instead; so do 100 failures in a row."""

    def __post_init__(self) -> None:
        if self.factory is not None and self.tools:
            raise ValueError(
                "environment.factory and environment.tools are two ways to say what answers: got "
                f"{self.factory!r} and {list(self.tools)}; unset one of them"
            )
        at_least("environment.max_turns", self.max_turns, 1)
        at_least("environment.tokens_per_answer", self.tokens_per_answer, 1)
        at_least("environment.workers", self.workers, 1)
        above("environment.timeout_s", self.timeout_s, 0)
        if self.tokens_per_turn is not None:
            at_least("environment.tokens_per_turn", self.tokens_per_turn, 1)
        if self.reward is not None:
            choose("environment.reward", self.reward, REWARDS)

    @property
    def is_on(self) -> bool:
        """Whether episodes have turns."""
        return self.factory is not None or bool(self.tools)

    @property
    def characters_per_answer(self) -> int:
        """Characters of an answer that are looked at: a megabyte would be seconds of the tokenizer's time."""
        return 16 * self.tokens_per_answer

    @property
    def answer_role(self) -> str:
        """Role of an answer in the chat template."""
        return self.role or ("tool" if self.tools else "user")

    @property
    def pays(self) -> str:
        """Where the reward comes from: environment | function | sum."""
        return self.reward or ("function" if self.tools else "environment")
