"""The records that travel through a step: prompt -> completion -> rollout (-> `batch.PackedBatch`).

Everything a later step needs is recorded here when it is made (token ids, loss mask, engine log-probs, policy
version of every token, expert choices); nothing is inferred later from padding ids or from global state.

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
    token_ids: tuple[int, ...]
    text: str
    answer: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """The tokens an engine sampled for one prompt, with all that the engine knows about them (N tokens).

    token_ids [N] int64; loss_mask [N] bool, True = trained on (a tool's tokens would be False);
    logprobs [N] float32, natural logarithm, of the sampling distribution (after the temperature);
    policy_versions [N] int32, completed optimiser steps of the weights that sampled the token;
    routing: rows of prompt + completion (P + N), None unless the engine was asked to record.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    logprobs: np.ndarray
    policy_versions: np.ndarray
    finish_reason: str
    text: str
    routing: RoutingTrace | None = None

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        for name in ("loss_mask", "logprobs", "policy_versions"):
            got = len(getattr(self, name))
            if got != n:
                raise ValueError(f"completion.{name} must have one entry a token: got {got} for {n} tokens")
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
    """A judged completion. `rollout_id` counts the run's rollouts; siblings share `group_id`."""

    rollout_id: int
    group_id: int
    prompt: Prompt
    completion: Completion
    reward: float
    reward_parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens together."""
        return len(self.prompt.token_ids) + len(self.completion)


@dataclass(frozen=True)
class SamplingSpec:
    """How to sample: `n` completions a prompt, at most `max_tokens` each; `seed` makes
    every completion repeatable.
    """

    n: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    record_routing: bool = False
