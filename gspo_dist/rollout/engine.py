"""The rollout engine's protocol: sample, say log-probs, take new weights. One engine is one process or one
group of GPUs.

The life of an engine:

    init_weight_sync                                       once
    start_weight_update, update_weights ..., finish_weight_update   for every publication
    submit, advance ..., withdraw                          between publications, never during one
    logprobs_of                                            while nothing is in the making
    sleep, wake_up                                         where learner and engine share GPUs

Completions are made in slices: `submit` gives an engine work, `advance` samples on for some decode steps or
seconds, `withdraw` takes out what is unfinished. So a publication, an evaluation and an engine's death find
all work as plain data, and any engine goes on with it. Nothing runs between two calls, hence weights cannot
change under a decode step. `generate` is those verbs in one call.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gspo_dist.candidates import Candidates
from gspo_dist.types import COLUMNS, Completion, Prompt, SamplingSpec, Work, WorkKey


@dataclass(frozen=True)
class Growth:
    """Tokens that unfinished completions got in a slice, end to end in flat arrays: light to send often."""

    keys: tuple[WorkKey, ...]
    """The completions that got any."""
    counts: np.ndarray
    """[keys] how many tokens each got."""
    token_ids: np.ndarray
    """[sum of counts] int64."""
    logprobs: np.ndarray
    """[sum of counts] float32."""
    policy_versions: np.ndarray
    """[sum of counts] int32."""
    candidates: Candidates | None = None
    """Of every place, where they were asked for."""

    def parts(self) -> dict[WorkKey, Completion]:
        """Completion in the making -> its new tokens, as what `Work.extended` takes."""
        ends = np.cumsum(self.counts)
        return {
            key: Completion(
                self.token_ids[end - n : end],
                np.ones(n, np.bool_),
                self.logprobs[end - n : end],
                self.policy_versions[end - n : end],
                "",
                "",
                candidates=None if self.candidates is None else self.candidates[end - n : end],
            )
            for key, n, end in zip(self.keys, self.counts.tolist(), ends.tolist(), strict=True)
        }

    @staticmethod
    def of(parts: Mapping[WorkKey, Completion]) -> Growth:
        """The inverse of `parts`; completions without a token are left out."""
        grown = {key: part for key, part in parts.items() if len(part)}
        columns = {
            name: np.concatenate([np.zeros(0, dtype), *(getattr(part, name) for part in grown.values())])
            for name, dtype in COLUMNS.items()
            if name != "loss_mask"  # all of them True: an engine made the tokens
        }
        counts = np.array([len(part) for part in grown.values()], np.int64)
        candidates = Candidates.join([(len(part), part.candidates) for part in grown.values()])
        return Growth(tuple(grown), counts, **columns, candidates=candidates)


@dataclass(frozen=True)
class Progress:
    """What an engine did in one slice."""

    ticks: int
    """Decode steps."""
    tokens: int
    """Tokens sampled."""
    finished: Mapping[WorkKey, Completion]
    """Completions that are whole now, with all their tokens, also those of earlier slices and engines."""
    growth: Growth
    """What the unfinished ones got. With it a driver can go on elsewhere if this engine dies."""


@dataclass(frozen=True)
class SyncReceipt:
    """What an engine says after a weight update."""

    policy_version: int
    """The version that it now samples under."""
    checksums: Mapping[str, int]
    """Checksum of every tensor as it arrived, by name. Empty when checks are off."""
    tensors: int
    """Number of tensors that arrived."""
    bytes: int
    """Bytes that arrived."""
    seconds_checking: float
    """Seconds that the checks took."""


@dataclass(frozen=True)
class EngineInfo:
    """Facts about an engine, for checks and reports."""

    name: str
    """Its name in messages, such as engine-0."""
    device: str
    """cpu or cuda."""
    max_model_len: int
    """Tokens of prompt and completion that fit."""
    vocab_size: int
    """Token ids are below this."""
    num_experts: int
    """Routed experts per layer; 0 for a dense model."""
    moe_layers: int
    """Layers with routed experts."""
    top_k: int
    """Experts per token."""
    can_record_routing: bool
    """Whether it was started to return routed experts."""
    workers: int
    """GPUs that it spans. Each takes part in an nccl weight sync."""
    gives_candidates: bool = False
    """Whether the likeliest tokens can come with every sampled one."""


class RolloutEngine(Protocol):
    """Samples groups of completions under one version of the weights."""

    policy_version: int
    """Completed optimiser steps of the weights that it samples under."""

    def info(self) -> EngineInfo:
        """Facts about the engine. The same at every call."""
        ...

    def submit(self, work: Sequence[Work]) -> None:
        """Takes completions to begin or to go on with. They are sampled by `advance`.

        Which engine, which company and how many slices change no token. ValueError: a prompt that is empty or
        too long, a completion that has all its tokens or is here already, or routes from an engine that was
        not started to record them. WeightSyncError: in the middle of a weight update.
        """
        ...

    def advance(self, ticks: int | None = None, seconds: float | None = None) -> Progress:
        """Samples on: at most `ticks` decode steps, none begun after `seconds`; without either, to the end.

        It returns early when everything is finished. A fixed number of ticks makes a run repeatable bit for
        bit, since it fixes the make-up of every batch. WeightSyncError: in the middle of a weight update.
        """
        ...

    def withdraw(self) -> list[Work]:
        """Takes out everything unfinished, with what it has, in the order of `submit`. Nothing is left."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]:
        """`spec.n` completions of each prompt, in order: answer[i][j] is completion j of prompt i.

        `request_ids` (one per prompt, the group ids of the work) and `spec.seed` fix the random numbers of
        every completion, whichever engine runs it and in whatever company. The same call twice gives the same
        completions, unless `spec.seed` is None. Another company gives the same ones where log-probs do not
        depend on it (rollout/seeds.py).

        ValueError: a number of request ids other than that of prompts, or what `submit` raises.
        """
        ...

    def logprobs_of(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs [len - 1] float32, in nats, of every token after the first.

        They are taken at the engine's sampling temperature. They are what the weights say now, computed
        afresh: the probe of a weight sync. It changes nothing and may be called again. ValueError: a sequence
        of fewer than 2 or more than max_model_len - 1 tokens, or completions are in the making.
        WeightSyncError: in the middle of a weight update.
        """
        ...

    def init_weight_sync(self, init_info: Mapping[str, Any]) -> None:
        """Meets the learner, with what `Transport.init_info` gave for this engine.

        Called before the first update's buckets, and again when the learner meets its engines anew, which
        ends the earlier meeting. Raises what the transport raises. The engine can then take no weights.
        """
        ...

    def start_weight_update(self) -> None:
        """Opens a publication.

        WeightSyncError: one is open already, or an earlier one broke off and was not abandoned. ValueError:
        the engine has work.
        """
        ...

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Takes one bucket and loads it. Called once for every bucket, in order.

        update_info: where the bucket lies. WeightSyncError: no publication is open, a tensor came twice, or
        the model has no place for one. ValueError: the bucket is not there or is torn. After an error the
        engine holds half an update and refuses to work; `abandon_weight_update` makes it ready for another.
        """
        ...

    def abandon_weight_update(self) -> None:
        """Gives up an open publication, or one that broke off; it does nothing where there is none.

        The engine then holds tensors of two versions. It refuses to work until a whole publication replaced
        them all. Raises what makes it unable to take one.
        """
        ...

    def finish_weight_update(self, policy_version: int) -> SyncReceipt:
        """Closes the publication: the new weights count, and caches of the old ones are dropped.

        WeightSyncError: no publication is open, it broke off, or tensors that the model needs did not arrive.
        """
        ...

    def sleep(self) -> None:
        """Frees device memory while the learner works (colocated). It does nothing to an engine that sleeps,
        or of which a part does.

        ValueError: the engine was not started for it.
        """
        ...

    def wake_up(self, weights_only: bool = False) -> None:
        """Takes back the memory that still sleeps. Waking twice is allowed.

        weights_only: takes back the memory of the weights, and leaves the cache asleep. The engine can then
        be updated, but it cannot sample. ValueError: the engine was not started for it.
        """
        ...

    def close(self) -> None:
        """Ends the engine. Nothing else may be called afterwards."""
        ...


class Samples(Protocol):
    """The two verbs that `generate` needs: an engine's, or a pool's."""

    def submit(self, work: Sequence[Work]) -> None: ...

    def finish_all(self) -> Mapping[WorkKey, Completion]:
        """Samples until everything is finished."""
        ...


def generate(
    samples: Samples, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
) -> list[list[Completion]]:
    """`RolloutEngine.generate` on top of its other verbs. Nothing else may be in the making."""
    if len(request_ids) != len(prompts):
        raise ValueError(
            f"generate needs one request id per prompt: got {len(request_ids)} for {len(prompts)}"
        )
    samples.submit(group_work(prompts, spec, request_ids))
    finished = samples.finish_all()
    return [[finished[request_id, sample] for sample in range(spec.n)] for request_id in request_ids]


def group_work(prompts: Sequence[Prompt], spec: SamplingSpec, group_ids: Sequence[int]) -> list[Work]:
    """`spec.n` completions of each prompt, not begun yet."""
    return [
        Work(group_id, sample, prompt, spec)
        for prompt, group_id in zip(prompts, group_ids, strict=True)
        for sample in range(spec.n)
    ]


def check_work(info: EngineInfo, work: Sequence[Work], here: Container[WorkKey] = ()) -> None:
    """Raises ValueError for work that the engine cannot take (see `RolloutEngine.submit`).

    here: what it has in the making.
    """
    seen: set[WorkKey] = set()
    for item in work:
        prompt, spec = item.prompt, item.spec
        if spec.record_routing and not info.can_record_routing:
            raise ValueError(
                f"{info.name} was not started to record routing, but the sampling spec asks for it: "
                "set objective.routing_replay=r3 before the engines start"
            )
        if spec.candidates and not info.gives_candidates:
            raise ValueError(
                f"{info.name} gives log-probs of sampled tokens alone, but the sampling spec asks for the "
                f"{spec.candidates} likeliest: use rollout=vllm or rollout=reference"
            )
        if not prompt.token_ids or len(prompt.token_ids) + spec.max_tokens > info.max_model_len:
            raise ValueError(
                f"prompt {prompt.prompt_id!r} must have at least one token and fit the context with its "
                f"completion: got {len(prompt.token_ids)} + {spec.max_tokens} tokens for a context of "
                f"{info.max_model_len}; raise rollout.max_prompt_tokens or leave the prompt out"
            )
        if item.left < 1:
            raise ValueError(
                f"completion {item.sample} of group {item.group_id} must have tokens left to sample: it has "
                f"{len(item.so_far)} of {spec.max_tokens}"
            )
        if item.key in here or item.key in seen:
            raise ValueError(
                f"completion {item.sample} of group {item.group_id} must be in the making once: {info.name} "
                "got it twice"
            )
        seen.add(item.key)


def check_withdrawn(name: str, count: int, verb: str) -> None:
    """Raises ValueError where completions are in the making and `verb` needs an engine without any."""
    if count:
        raise ValueError(
            f"{verb} needs an engine without work: {name} has {count} completions; withdraw them"
        )


def check_sequences(info: EngineInfo, sequences: Sequence[np.ndarray]) -> None:
    """Raises ValueError for a sequence that has no log-probs or is too long.

    The limit is one token below the context, because vLLM gives log-probs of a prompt only while it samples
    one token after it.
    """
    for i, ids in enumerate(sequences):
        if not 2 <= len(ids) < info.max_model_len:
            raise ValueError(
                f"sequence {i} must have 2 to {info.max_model_len - 1} tokens for log-probs: got {len(ids)}"
            )
