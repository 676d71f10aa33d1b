"""Small rollouts, and stand-ins that keep the books: the trainer's modules tested without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from gspo_dist.cli.compose import run_config
from gspo_dist.config import RunConfig
from gspo_dist.learners.learner import OptimStep
from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.packing import MicroBatches, MiniBatch, pack
from gspo_dist.routing.trace import RouterScores, RoutingTrace
from gspo_dist.trainer import flip_meter, summary
from gspo_dist.trainer.loop import train
from gspo_dist.trainer.run import Run
from gspo_dist.trainer.setup.build import build
from gspo_dist.types import Completion, LogprobOutput, PackedBatch, Prompt, Rollout


def rollout(
    index: int,
    *,
    group: int | None = None,
    reward: float = 0.0,
    prompt: Sequence[int] = (1, 2),
    tokens: Sequence[int] = (5, 6, 7),
    logprob: float = -1.0,
    version: int = 3,
    finish: str = "stop",
    parts: dict[str, float] | None = None,
    routing: RoutingTrace | None = None,
) -> Rollout:
    """A rollout whose engine log-probs are all `logprob`."""
    count = len(tokens)
    return Rollout(
        index,
        index if group is None else group,
        Prompt(f"p{index}", tuple(prompt), f"q{index}", "42"),
        Completion(
            np.asarray(tokens, np.int64),
            np.ones(count, np.bool_),
            np.full(count, logprob, np.float32),
            np.full(count, version, np.int32),
            finish,
            f"c{index}",
            routing,
        ),
        reward,
        parts or {},
    )


def trace(rows: int, expert: int, *, layers: int = 2, experts: int = 8) -> RoutingTrace:
    """Every token of every layer goes to experts `expert` and `expert + 1`."""
    ids = np.tile(np.array([expert, expert + 1], np.uint8), (rows, layers, 1))
    return RoutingTrace(ids, np.ones(rows, np.bool_), experts)


def packed(rollouts: Sequence[Rollout], *, mini_batches: int = 1, replicas: int = 1) -> list[MiniBatch]:
    return pack(
        rollouts,
        [1.0] * len(rollouts),
        replicas=replicas,
        token_budget=64,
        mini_batches=mini_batches,
        max_completion_length=8,
        seed=(0, 0),
    )


class BookLearner:
    """A learner group that answers from functions and remembers what it was asked."""

    def __init__(
        self,
        logprob: Callable[[PackedBatch], torch.Tensor] | float = -1.0,
        route: Callable[[PackedBatch], RoutingTrace] | None = None,
    ) -> None:
        self.logprob, self.route = logprob, route
        self.policy_version = 3
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.routed: list[list[RoutingTrace | None]] = []
        """Per call of `logprobs`: the traces that its batches carried."""
        self.tokens: list[list[int]] = []
        """Per call of `logprobs`: the tokens of each forward pass."""

    def logprobs(
        self,
        micro_batches: MicroBatches,
        *,
        record_routing: bool = False,
        record_scores: bool = False,
        reference: bool = False,
    ) -> list[list[LogprobOutput]]:
        options = {"record_routing": record_routing, "reference": reference}
        self.calls.append(("logprobs", options | ({"record_scores": True} if record_scores else {})))
        self.routed.append([b.routing for batches in micro_batches for b in batches])
        self.tokens.append([b.num_tokens for batches in micro_batches for b in batches])
        return [
            [self._output(b, record_routing, record_scores) for b in batches] for batches in micro_batches
        ]

    def _output(self, batch: PackedBatch, record: bool, scores: bool) -> LogprobOutput:
        values = (
            self.logprob(batch) if callable(self.logprob) else torch.full((batch.num_tokens,), self.logprob)
        )
        values = torch.where(batch.loss_mask, values.float(), 0.0)
        routing = self.route(batch) if record and self.route else None
        router = None
        if scores:
            ids = torch.zeros(batch.num_tokens, 2, 1, dtype=torch.int32)
            router = RouterScores(ids, torch.full(ids.shape, self.policy_version / 10))
        return LogprobOutput(values, torch.zeros_like(values), routing, router)

    def optim_step(self) -> OptimStep:
        self.policy_version += 1
        return OptimStep(1.0, 0.1, self.policy_version)

    def sleep(self, *, keep_weights: bool = False) -> None:
        self.calls.append(("sleep", {"keep_weights": keep_weights}))

    def wake_up(self, *, weights_only: bool = False) -> None:
        self.calls.append(("wake_up", {"weights_only": weights_only}))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_text(str(self.policy_version))
        self.calls.append(("save", {}))

    def load(self, folder: Path, policy_version: int) -> None:
        self.policy_version = policy_version
        self.calls.append(("load", {"folder": folder}))

    def wait_saved(self) -> None:
        self.calls.append(("wait_saved", {}))


def config(model: Path, reward: Path, run_dir: Path, *extra: str) -> RunConfig:
    """A run of three steps in this process: a real HF policy, the eager learner, the reference engine."""
    overrides = [
        "cluster=in_process",
        "learner=eager",
        "rollout=reference",
        "model=local",
        f"model.path={model}",
        f"run_dir={run_dir}",
        f"reward.function='{reward}:share_of_sevens'",
        "reward=function",
        "logger=quiet",
        "steps=3",
        "mini_batches=2",
        "rollout.prompts_per_step=4",
        "rollout.group_size=4",
        "rollout.max_prompt_tokens=16",
        "rollout.max_completion_tokens=8",
        "learner.token_budget=128",
        "learner.precision=fp32",
        "rollout.precision=fp32",
        "learner.optimizer.lr=0.01",
        "evaluation.prompts=8",
        "rollout.weight_sync.probe_tolerance=1e-4",
        "rollout.weight_sync.probe_every=1",
        *extra,
    ]
    return run_config(overrides)


def go(
    c: RunConfig, watch: Callable[[Run], None] = lambda run: None, *, pictures: bool = False
) -> tuple[dict, list[dict]]:
    """Builds and trains; `watch` may change the built run. Returns the summary and the logged rows.

    pictures: whether they are drawn at the end. That takes a third of such a run.
    """
    run = build(c)
    try:
        watch(run)
        with nullcontext() if pictures else without_pictures():
            told = train(run)
    finally:
        run.release()
    return told, read_jsonl(Path(c.run_dir) / "metrics.jsonl")


@contextmanager
def without_pictures() -> Iterator[None]:
    """Curves and heat maps are empty files inside the block."""

    def touch(*arguments: Any, **options: Any) -> None:
        next(argument for argument in arguments if isinstance(argument, Path)).touch()

    with (
        mock.patch.object(summary, "draw_curves", touch),
        mock.patch.object(flip_meter, "draw_heatmap", touch),
    ):
        yield


def values(rows: list[dict]) -> list[dict]:
    """What must repeat: everything but times and speeds."""
    timed = ("time/", "perf/", "sync/check_fraction", "sync/gib_per_s")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]
