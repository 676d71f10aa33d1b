"""The reference engine: plain Python over a policy (policy.py), which computes every prefix for every token.

It is for tests and small models, where it lets the whole loop run under pytest without vLLM. It is no engine
for a real run, because its time grows with the square of the length, and a dry run does not start it. Like a
real engine it takes weight syncs through shared memory, returns the log-probs of the distribution that it
samples from, and records routes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from gspo_dist.candidates import Candidates
from gspo_dist.config import RolloutConfig
from gspo_dist.rollout.engine import (
    EngineInfo,
    Growth,
    Progress,
    SyncReceipt,
    check_sequences,
    check_withdrawn,
    check_work,
    generate,
)
from gspo_dist.rollout.policy import Policy
from gspo_dist.rollout.seeds import uniforms, work_keys
from gspo_dist.routing.trace import RoutingTrace, id_dtype
from gspo_dist.types import Completion, Prompt, SamplingSpec, Work, WorkKey
from gspo_dist.weights.bucket import BucketLayout
from gspo_dist.weights.shm import ShmSource
from gspo_dist.weights.source import make_source
from gspo_dist.weights.transport import Source
from gspo_dist.weights.verify import WeightSyncError


def log_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Logits [..., V] -> log-probs [..., V] float64 after the temperature.

    A temperature of 0 (greedy) counts as 1, so that greedy log-probs are the model's own.
    """
    x = logits.astype(np.float64) / (temperature or 1.0)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def truncate(logprobs: np.ndarray, top_p: float) -> np.ndarray:
    """Nucleus: keeps the most likely tokens of each row [n, V] up to a mass of top_p, and renormalises.

    Example: probabilities 0.5, 0.3, 0.15, 0.05 with top_p = 0.7 keep the first two, as 0.625 and 0.375.
    """
    if top_p >= 1.0:
        return logprobs
    order = np.argsort(-logprobs, axis=-1, kind="stable")
    ranked = np.take_along_axis(np.exp(logprobs), order, axis=-1)
    cut = ranked.cumsum(axis=-1) - ranked >= top_p
    out = logprobs.copy()
    np.put_along_axis(
        out, order, np.where(cut, -np.inf, np.take_along_axis(logprobs, order, axis=-1)), axis=-1
    )
    return out - np.log(np.exp(out).sum(axis=-1, keepdims=True))


def likeliest(table: np.ndarray, k: int) -> Candidates:
    """The k likeliest tokens of each row of log-probs [n, V]; those beyond V are -inf."""
    order = np.argsort(-table, axis=-1, kind="stable")[:, :k]
    found = Candidates.none(len(table), k)
    found.ids[:, : order.shape[1]] = order
    found.logprobs[:, : order.shape[1]] = np.take_along_axis(table, order, axis=-1)
    return found


@dataclass
class Rows:
    """Unfinished completions of one group, side by side: all have T tokens with the prompt.

    Finished ones are sampled on with the others and cut where they ended, so that all stay of one length.
    """

    work: list[Work]
    """[n] as it was submitted."""
    keys: np.ndarray
    """[n] uint64, of their random numbers."""
    tokens: np.ndarray
    """[n, T] prompt and completion."""
    logprobs: np.ndarray
    """[n, tokens since the submit]."""
    versions: np.ndarray
    """[tokens since the submit] the policy version that sampled each column."""
    finished: np.ndarray
    """[n] which were reported as whole."""
    candidates: list[Candidates]
    """[tokens since the submit] a row of work in each; empty where they are not asked for."""
    reported: int = 0
    """Columns that a slice has told of already."""

    @staticmethod
    def of(work: list[Work]) -> Rows:
        n = len(work)
        return Rows(
            work,
            work_keys(work),
            np.array([item.tokens() for item in work], dtype=np.int64),
            np.zeros((n, 0), np.float32),
            np.zeros(0, np.int32),
            np.zeros(n, np.bool_),
            [],
        )

    @property
    def done(self) -> int:
        """Tokens that each row got since the submit."""
        return len(self.versions)

    def part(self, row: int, start: int, reason: str = "", text: str = "") -> Completion:
        """The tokens of one row from column `start` on."""
        first = self.tokens.shape[1] - self.done
        return Completion(
            token_ids=self.tokens[row, first + start :],
            loss_mask=np.ones(self.done - start, np.bool_),
            logprobs=self.logprobs[row, start:],
            policy_versions=self.versions[start:],
            finish_reason=reason,
            text=text,
            candidates=Candidates.join([(1, c[row : row + 1]) for c in self.candidates[start:]]),
        )


class ReferenceEngine:
    """Implements `RolloutEngine` in plain Python over a `Policy`, in a run an `HFPolicy`."""

    def __init__(
        self,
        config: RolloutConfig,
        policy: Policy,
        *,
        name: str = "reference",
        device: str = "cpu",
        record_routing: bool = False,
        sleep_mode: bool = False,
    ) -> None:
        if device != "cpu" or sleep_mode:
            raise ValueError(
                f"the reference engine runs on a CPU and never sleeps: got device {device}, "
                f"sleep_mode {sleep_mode}"
            )
        self.config, self.name, self.record_routing = config, name, record_routing
        self.policy = policy
        self.policy_version = 0
        self.check = True
        self.source: Source = ShmSource()
        self.arrived: dict[str, int] | None = None
        """Name -> checksum (0 when checks are off) of the publication that is open; None when none is."""
        self.mixed = False
        """Whether the last publication was given up, so that the tensors are of two versions."""
        self.members: set[str] = set()
        """The folder's tensors that arrived with it."""
        self.bytes = 0
        self.rows: list[Rows] = []
        """What is in the making, a group after the other."""

    def info(self) -> EngineInfo:
        return EngineInfo(
            name=self.name,
            device="cpu",
            max_model_len=self.config.max_model_len,
            vocab_size=self.policy.vocab_size,
            num_experts=self.policy.num_experts,
            moe_layers=self.policy.moe_layers,
            top_k=self.policy.top_k,
            can_record_routing=self.record_routing,
            workers=1,
            gives_candidates=True,
        )

    def submit(self, work: Sequence[Work]) -> None:
        self._require_usable()
        # One that is whole may come again with its next turn, while its siblings are still sampled.
        here = {rows.work[i].key for rows in self.rows for i in np.flatnonzero(~rows.finished)}
        check_work(self.info(), work, here)
        for _, items in groupby(work, key=lambda item: (item.group_id, len(item.so_far), item.spec)):
            self.rows.append(Rows.of(list(items)))

    def advance(self, ticks: int | None = None, seconds: float | None = None) -> Progress:
        """A tick gives one token to everything in the making; there are no places to wait for."""
        self._require_usable()
        until = None if seconds is None else time.monotonic() + seconds
        finished: dict[WorkKey, Completion] = {}
        done = tokens = 0
        while self.rows and (ticks is None or done < ticks) and (until is None or time.monotonic() < until):
            for rows in self.rows:
                tokens += int((~rows.finished).sum())
                self._tick(rows)
                finished |= self._finish(rows)
            self.rows = [rows for rows in self.rows if not rows.finished.all()]
            done += 1
        return Progress(done, tokens, finished, self._growth())

    def _tick(self, rows: Rows) -> None:
        """One more token for every row."""
        spec, offset = rows.work[0].spec, len(rows.work[0].so_far)
        table = truncate(log_softmax(self.policy.logits(rows.tokens), spec.temperature), spec.top_p)
        if spec.temperature == 0.0:
            token = table.argmax(axis=-1)
        else:
            # Inverse transform sampling. The target is scaled by the last sum, which is 1 only
            # up to rounding.
            cumulative = np.exp(table).cumsum(axis=-1)
            places = np.full(len(rows.keys), offset + rows.done)
            target = uniforms(rows.keys, places)[:, None] * cumulative[:, -1:]
            token = np.minimum((cumulative <= target).sum(axis=-1), self.policy.vocab_size - 1)
        logprobs = np.take_along_axis(table, token[:, None], axis=-1).astype(np.float32)
        rows.logprobs = np.concatenate([rows.logprobs, logprobs], axis=1)
        rows.tokens = np.concatenate([rows.tokens, token[:, None]], axis=1)
        rows.versions = np.append(rows.versions, np.int32(self.policy_version))
        if spec.candidates:
            rows.candidates.append(likeliest(table, spec.candidates))

    def _finish(self, rows: Rows) -> dict[WorkKey, Completion]:
        """The completions that became whole with the last tick."""
        whole = {}
        for i in np.flatnonzero(~rows.finished):
            item = rows.work[i]
            stop = self.policy.eos_ids | set(item.spec.stop_token_ids)
            stopped = int(rows.tokens[i, -1]) in stop
            if not stopped and rows.done < item.left:
                continue
            rows.finished[i] = True
            ids = rows.tokens[i, len(item.prompt.token_ids) :]
            more = rows.part(i, 0, "stop" if stopped else "length", self.policy.text(ids))
            whole[item.key] = item.so_far.extend(self._routed(item, rows.tokens[i], more))
        return whole

    def _routed(self, item: Work, row: np.ndarray, more: Completion) -> Completion:
        """`more` with the routes of the whole row [T], where the work asks for them."""
        if not item.spec.record_routing:
            return more
        # The last token is sampled and never fed back, so it has no route, as in vLLM.
        experts = self.policy.routes(row[:-1]).astype(id_dtype(self.policy.num_experts))
        before = item.so_far.routing
        if before is None:
            return replace(more, routing=RoutingTrace.from_engine(experts, len(row), self.policy.num_experts))
        return replace(more, routing=before.continued(experts[item.known_routes() :], len(row)))

    def _growth(self) -> Growth:
        parts: dict[WorkKey, Completion] = {}
        for rows in self.rows:
            parts |= {rows.work[i].key: rows.part(i, rows.reported) for i in np.flatnonzero(~rows.finished)}
            rows.reported = rows.done
        return Growth.of(parts)

    def withdraw(self) -> list[Work]:
        left = [
            rows.work[i].extended(self._routed(rows.work[i], rows.tokens[i], rows.part(i, 0)))
            if rows.done
            else rows.work[i]
            for rows in self.rows
            for i in np.flatnonzero(~rows.finished)
        ]
        self.rows = []
        return left

    def finish_all(self) -> Mapping[WorkKey, Completion]:
        return self.advance().finished

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]:
        self._require_idle("generate")
        return generate(self, prompts, spec, request_ids)

    def logprobs_of(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        self._require_idle("logprobs_of")
        check_sequences(self.info(), sequences)
        found = []
        for ids in sequences:
            ids = np.asarray(ids, dtype=np.int64)
            table = log_softmax(self.policy.all_logits(ids)[:-1], self.config.temperature)
            found.append(np.take_along_axis(table, ids[1:, None], axis=-1)[:, 0].astype(np.float32))
        return found

    def _require_usable(self) -> None:
        self._require_closed()
        if self.mixed:
            raise WeightSyncError(
                f"{self.name} holds weights of two versions since an update was given up: publish a whole one"
            )

    def _require_closed(self) -> None:
        if self.arrived is not None:
            raise WeightSyncError(
                f"{self.name} is in the middle of a weight update: call finish_weight_update first"
            )

    def _require_idle(self, verb: str) -> None:
        self._require_usable()
        self._require_withdrawn(verb)

    def _require_withdrawn(self, verb: str) -> None:
        check_withdrawn(self.name, sum(int((~rows.finished).sum()) for rows in self.rows), verb)

    def init_weight_sync(self, init_info: Mapping[str, Any]) -> None:
        self.source.close()
        self.check = bool(init_info["check"])
        self.source = make_source(init_info)

    def start_weight_update(self) -> None:
        self._require_closed()
        self._require_withdrawn("start_weight_update")
        self.arrived, self.members, self.bytes = {}, set(), 0

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        if self.arrived is None:
            raise WeightSyncError(
                f"{self.name} got a weight bucket outside an update: call start_weight_update first"
            )
        tensors = self.source.begin(update_info)()
        layout = BucketLayout.from_dict(update_info["layout"])
        self.policy.check_bucket(layout, self.name)
        for name, tensor in tensors:
            if name in self.arrived:
                raise WeightSyncError(f"{self.name} got {name} twice in one update")
            self.arrived[name] = self.source.checksum(tensor) if self.check else 0
            self.bytes += tensor.nbytes
        self.members.update(layout.members())
        self.policy.load(tensors)

    def abandon_weight_update(self) -> None:
        self.mixed = self.mixed or self.arrived is not None
        self.arrived = None

    def finish_weight_update(self, policy_version: int) -> SyncReceipt:
        if self.arrived is None:
            raise WeightSyncError(f"{self.name} has no weight update to finish")
        self.policy.check_whole(self.members, self.name)
        arrived, self.arrived, self.mixed = self.arrived, None, False
        self.policy_version = policy_version
        checksums = arrived if self.check else {}
        return SyncReceipt(policy_version, checksums, len(self.members), self.bytes, 0.0)

    def sleep(self) -> None:
        raise ValueError(f"{self.name} cannot sleep: it holds no device memory")

    def wake_up(self, weights_only: bool = False) -> None:
        raise ValueError(f"{self.name} cannot wake up: it never sleeps")

    def close(self) -> None:
        """Leaves the learner."""
        self.source.close()
