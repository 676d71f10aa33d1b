"""The records that travel through a step: prompt -> completion -> rollout (-> `batch.PackedBatch`).

Everything that a later step needs is recorded when it is made: token ids, loss mask, engine
log-probs, the policy version of every token, expert choices. Nothing is inferred later from padding
ids or from global state.

Shapes: P tokens of a prompt, N of a completion.

Their columns are numpy arrays: a reward process reads them and must start without torch, which takes a second
or more to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gspo_dist.routing.trace import RoutingTrace


@dataclass(frozen=True)
class Prompt:
    """One question: its tokens as the engine receives them, and what a reward needs to judge an answer."""

    prompt_id: str
    """Names it in errors and samples: its file and line, or its task and index."""
    token_ids: tuple[int, ...]
    """[P], with the chat template's own tokens."""
    text: str
    """What the tokens say, for people and rewards."""
    answer: Any = None
    """What the reward compares with, in the type that the data has."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the record holds. Only rewards read it."""


@dataclass(frozen=True)
class Completion:
    """The tokens that an engine sampled for one prompt, with all that the engine knows about them.

    Raises ValueError for columns of different lengths, and for a log-prob that is not finite.
    """

    token_ids: np.ndarray
    """[N] int64."""
    loss_mask: np.ndarray
    """[N] bool: True = trained on. Tokens that a tool put in would be False."""
    logprobs: np.ndarray
    """[N] float32: natural logarithms under the sampling distribution, after the temperature."""
    policy_versions: np.ndarray
    """[N] int32: completed optimiser steps of the weights that sampled the token."""
    finish_reason: str
    """stop | length (`max_tokens` was reached)."""
    text: str
    """The tokens without special ones, for people and rewards."""
    routing: RoutingTrace | None = None
    """Expert ids of prompt and completion, P + N rows. None unless the engine was asked to record."""

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        for name in ("loss_mask", "logprobs", "policy_versions"):
            got = len(getattr(self, name))
            if got != n:
                raise ValueError(f"completion.{name} must have one entry per token: got {got} for {n} tokens")
        if not np.isfinite(self.logprobs).all():
            at = int(np.flatnonzero(~np.isfinite(self.logprobs))[0])
            raise ValueError(
                f"completion.logprobs must be finite: got {self.logprobs[at]} at token {at} "
                f"(id {int(self.token_ids[at])}); the engine's weights or its sampling parameters are broken"
            )

    def __len__(self) -> int:
        return len(self.token_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as bytes: Ray (2.60) ships every small array as a buffer of its own, ten times slower."""
        arrays = tuple(np.asarray(getattr(self, name), dtype).tobytes() for name, dtype in _COLUMNS.items())
        return _completion, (arrays, self.finish_reason, self.text, self.routing)


_COLUMNS: dict[str, type[np.generic]] = {
    "token_ids": np.int64,
    "loss_mask": np.bool_,
    "logprobs": np.float32,
    "policy_versions": np.int32,
}


def _completion(
    columns: tuple[bytes, ...], finish_reason: str, text: str, routing: RoutingTrace | None
) -> Completion:
    """What `Completion.__reduce__` wrote; its arrays are read-only, like all that Ray delivers."""
    arrays: dict[str, np.ndarray] = {
        name: np.frombuffer(data, dtype)
        for (name, dtype), data in zip(_COLUMNS.items(), columns, strict=True)
    }
    return Completion(**arrays, finish_reason=finish_reason, text=text, routing=routing)


@dataclass(frozen=True)
class Rollout:
    """A judged completion."""

    rollout_id: int
    """Counts the rollouts of the run."""
    group_id: int
    """Counts the groups of the run. Siblings, completions of one prompt in one step, share it."""
    prompt: Prompt
    completion: Completion
    reward: float
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """Named terms of the reward, logged as reward/NAME."""

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens together."""
        return len(self.prompt.token_ids) + len(self.completion)


@dataclass(frozen=True)
class SamplingSpec:
    """How to sample."""

    n: int
    """Completions per prompt."""
    max_tokens: int
    """Longest completion, in tokens."""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    """Makes every completion repeatable, together with the ids of the requests. None: it is not."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion; the token itself belongs to it."""
    record_routing: bool = False
    """Completions carry the experts that the engine used."""
