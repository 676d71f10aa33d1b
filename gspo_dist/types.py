"""The records that travel through a step: prompt -> completion -> rollout -> packed batch.

Everything that a later step needs is recorded when it is made: token ids, loss mask, engine log-probs, policy
version of every token, expert choices. Nothing is inferred later from padding ids or from global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from gspo_dist.candidates import Candidates
from gspo_dist.routing.trace import RouterScores, RoutingTrace


@dataclass(frozen=True)
class Prompt:
    """One question: its tokens as the engine receives them, and what a reward needs to judge an answer."""

    prompt_id: str
    """Its name in messages: where its record stands."""
    token_ids: tuple[int, ...]
    """All that the engine reads before it samples."""
    text: str
    """The same as text."""
    answer: Any = None
    """The reference answer, as the reward takes it."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the record says besides."""


@dataclass(frozen=True)
class Turn:
    """One exchange of an episode: what the policy said, and what its environment answered.

    The first turn of an episode is the reset, in which the policy says nothing. Example: a reset that adds 3
    tokens, then 4 sampled tokens, whose answer takes 2: the turns are (0, 0, 3) and (3, 7, 9), and the policy
    goes on with token 9.
    """

    start: int
    """The first token of what the policy said, counted from the completion's first."""
    end: int
    """One past its last token."""
    stop: int
    """One past the last token of the answer: where the next turn begins."""
    said: str = ""
    """What the policy said, as the environment read it."""
    observation: str = ""
    """The answer as it stands in the completion: cut to its limit."""
    reward: float = 0.0
    """What the environment pays for the turn."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named numbers of the turn; they are logged."""
    failed: str = ""
    """Why there is no answer: timeout, crash or error. "" where there is one, or none was asked for."""


@dataclass(frozen=True)
class Completion:
    """What follows one prompt, with all that is known about it (N tokens): what an engine sampled, and what
    an environment said in between.
    """

    token_ids: np.ndarray
    """[N] int64."""
    loss_mask: np.ndarray
    """[N] bool, True = trained on. An environment's tokens are False."""
    logprobs: np.ndarray
    """[N] float32, in nats, of the sampling distribution (after the temperature). 0 for an environment's."""
    policy_versions: np.ndarray
    """[N] int32, completed optimiser steps of the weights that sampled the token. NO_VERSION for an
    environment's."""
    finish_reason: str
    """How it ended, above all stop (a stop token) and length (cut off). "" while it is in the making."""
    text: str
    """The tokens as text, without special ones. "" while it is in the making."""
    routing: RoutingTrace | None = None
    """Rows of prompt and completion, P + N. None unless the engine was asked to record."""
    turns: tuple[Turn, ...] = ()
    """The turns of an episode, the reset first. Empty without an environment."""
    candidates: Candidates | None = None
    """The likeliest tokens at every place. None unless the engine was asked for them."""

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        for name in ("loss_mask", "logprobs", "policy_versions"):
            got = len(getattr(self, name))
            if got != n:
                raise ValueError(f"completion.{name} must have one entry per token: got {got} for {n} tokens")
        if self.candidates is not None and len(self.candidates) != n:
            raise ValueError(
                f"completion.candidates must have one row per token: got {len(self.candidates)} for "
                f"{n} tokens"
            )
        if not np.isfinite(self.logprobs).all():
            at = int(np.flatnonzero(~np.isfinite(self.logprobs))[0])
            raise ValueError(
                f"completion.logprobs must be finite: got {self.logprobs[at]} at token {at} "
                f"(id {int(self.token_ids[at])}); the engine's weights or its sampling parameters are broken"
            )

    def __len__(self) -> int:
        return len(self.token_ids)

    def extend(self, more: Completion) -> Completion:
        """This completion with the tokens of `more` after its own, and the ending and text of `more`.

        What was recorded of the first tokens stays as it is. The routes are those of `more` where it has any
        (they are of the whole sequence), else those known so far. Example: tokens [5, 6] of version 3 and
        tokens [7] of version 4 that ended with "stop" give [5, 6, 7], versions [3, 3, 4], "stop".
        """
        joined = {
            name: np.concatenate([getattr(self, name), getattr(more, name)]).astype(dtype, copy=False)
            for name, dtype in COLUMNS.items()
        }
        routing = more.routing
        if routing is None and self.routing is not None:
            routing = self.routing.continued(self.routing.expert_ids[:0], len(self.routing) + len(more))
        turns = (*self.turns, *more.turns)
        candidates = Candidates.join([(len(self), self.candidates), (len(more), more.candidates)])
        return Completion(
            **joined,
            finish_reason=more.finish_reason,
            text=more.text,
            routing=routing,
            turns=turns,
            candidates=candidates,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as bytes: Ray (2.60) ships every small array as a buffer of its own, ten times slower."""
        arrays = tuple(np.asarray(getattr(self, name), dtype).tobytes() for name, dtype in COLUMNS.items())
        return _completion, (
            *(arrays, self.finish_reason, self.text, self.routing, self.turns, self.candidates),
        )


COLUMNS: dict[str, type[np.generic]] = {
    "token_ids": np.int64,
    "loss_mask": np.bool_,
    "logprobs": np.float32,
    "policy_versions": np.int32,
}
"""The arrays of a completion, one entry per token, and their types."""


def _completion(
    columns: tuple[bytes, ...],
    finish_reason: str,
    text: str,
    routing: RoutingTrace | None,
    turns: tuple[Turn, ...],
    candidates: Candidates | None,
) -> Completion:
    """What `Completion.__reduce__` wrote; its arrays are read-only, like all that Ray delivers."""
    arrays: dict[str, np.ndarray] = {
        name: np.frombuffer(data, dtype) for (name, dtype), data in zip(COLUMNS.items(), columns, strict=True)
    }
    return Completion(
        **arrays,
        finish_reason=finish_reason,
        text=text,
        routing=routing,
        turns=turns,
        candidates=candidates,
    )


NO_VERSION = -1
"""The policy version of a token that no engine sampled: a prompt's, or an environment's."""


def environment_tokens(token_ids: Sequence[int]) -> Completion:
    """Tokens that an environment says, as the part of a completion that they become: nothing is trained on
    them, and no policy sampled them.
    """
    n = len(token_ids)
    return Completion(
        np.asarray(token_ids, np.int64),
        np.zeros(n, np.bool_),
        np.zeros(n, np.float32),
        np.full(n, NO_VERSION, np.int32),
        "",
        "",
    )


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
class PackedBatch:
    """One micro-batch of one data-parallel rank: S whole sequences laid end to end in T tokens, no padding.

    Entry t of every [T] field speaks of token t itself: `old_logprobs[t]` is log p(token t | the tokens
    before it in its sequence), which a model computes from the hidden state at t - 1. With prompt (5, 6) and
    completion (7, 8): token_ids = [5 6 7 8], position_ids = [0 1 2 3], loss_mask = [F F T T],
    rollout_logprobs = [0 0 lp(7) lp(8)].
    """

    token_ids: torch.Tensor
    """[T] int64."""
    position_ids: torch.Tensor
    """[T] int64, the place of the token in its sequence."""
    cu_seqlens: torch.Tensor
    """[S + 1] int32: sequence s is tokens cu_seqlens[s]:cu_seqlens[s + 1]."""
    loss_mask: torch.Tensor
    """[T] bool, True = trained on."""
    advantages: torch.Tensor
    """[T] float32."""
    rollout_logprobs: torch.Tensor
    """[T] float32, the engine's."""
    rollout_index: torch.Tensor
    """[S] the place of each sequence in the rollout batch."""
    old_logprobs: torch.Tensor | None = None
    """[T] float32."""
    ref_logprobs: torch.Tensor | None = None
    """[T] float32, of the reference policy."""
    policy_versions: torch.Tensor | None = None
    """[T] int32, completed optimiser steps of the weights that sampled the token. -1 where no engine sampled
    it (a prompt's tokens, a tool's). None where nobody recorded them."""
    routing: RoutingTrace | None = None
    """Expert ids by input token. Where they are present, the learner replays them."""
    old_router: RouterScores | None = None
    """What the old policy's routers thought of its experts, by input token (objective rspo)."""
    candidate_ids: torch.Tensor | None = None
    """[T, K] int32: the likeliest tokens where token t was sampled (objective score_centering)."""
    candidate_logprobs: torch.Tensor | None = None
    """[T, K] float32: the engine's log-probs of them. -inf where there is none."""

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.numel())

    @property
    def num_sequences(self) -> int:
        return int(self.rollout_index.numel())

    def rows(self, sequence: int) -> slice:
        """The tokens of one sequence (0..S-1): `token_ids[batch.rows(1)]`."""
        return slice(int(self.cu_seqlens[sequence]), int(self.cu_seqlens[sequence + 1]))

    def has_trained_tokens(self, sequence: int) -> bool:
        """Whether the sequence teaches anything: not the masked copies that fill idle replicas (`pack`)."""
        return bool(self.loss_mask[self.rows(sequence)].any())

    def sequence_ids(self) -> torch.Tensor:
        """[T] int64: the sequence (0..S-1) of every token."""
        return torch.repeat_interleave(torch.arange(self.num_sequences), self.cu_seqlens.diff().long())

    def with_(self, **changes: Any) -> PackedBatch:
        """A copy with some fields replaced."""
        return replace(self, **changes)


@dataclass(frozen=True)
class LogprobOutput:
    """What one forward pass says of a packed batch."""

    logprobs: torch.Tensor
    """[T] float32, 0 where loss_mask is False."""
    entropy: torch.Tensor
    """[T] float32, of the same next-token distributions."""
    routing: RoutingTrace | None = None
    """The expert ids that this pass used, where it was asked to record them."""
    router: RouterScores | None = None
    """What its routers thought of them, where it was asked to record that."""


@dataclass(frozen=True)
class SamplingSpec:
    """How to sample."""

    n: int
    """Completions of each prompt."""
    max_tokens: int
    """Longest completion."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Probability mass of the tokens that may be sampled."""
    seed: int | None = None
    """Makes every completion repeatable. None: nobody can repeat them."""
    stop_token_ids: tuple[int, ...] = ()
    """A completion ends with the first of them, besides the model's own."""
    record_routing: bool = False
    """Whether the completions come with the experts that the engine chose."""
    candidates: int = 0
    """How many of the likeliest tokens come with every token that is sampled."""


UNBEGUN = Completion(
    np.zeros(0, np.int64), np.zeros(0, np.bool_), np.zeros(0, np.float32), np.zeros(0, np.int32), "", ""
)
"""A completion of which no token is sampled yet."""

WorkKey = tuple[int, int]
"""(group id, sample): names a completion in the making; siblings count from 0."""


@dataclass(frozen=True)
class Work:
    """One completion in the making, as plain data: all that an engine needs to begin it, or to go on with it.

    The random number of a token depends on the seed, the group, the sample and the token's place alone. So
    any engine goes on with the very tokens that the one before would have sampled.
    """

    group_id: int
    sample: int
    prompt: Prompt
    spec: SamplingSpec
    so_far: Completion = UNBEGUN
    """What is sampled already. Its finish_reason is "" and its text empty until it is whole."""
    until: int | None = None
    """Tokens of the completion at which its turn is cut off. None: spec.max_tokens."""

    @property
    def key(self) -> WorkKey:
        return self.group_id, self.sample

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return (self.spec.max_tokens if self.until is None else self.until) - len(self.so_far)

    def tokens(self) -> list[int]:
        """Prompt and completion so far: what an engine has to read before it samples on."""
        return [*self.prompt.token_ids, *self.so_far.token_ids.tolist()]

    def known_routes(self) -> int:
        """Rows of `tokens` whose routes are recorded already."""
        return self.so_far.routing.known_prefix if self.so_far.routing is not None else 0

    def extended(self, more: Completion) -> Work:
        """The work with more of its completion done."""
        return replace(self, so_far=self.so_far.extend(more))
