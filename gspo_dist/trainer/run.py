"""A run's parts and its housekeeping: evaluation, logging, checkpoints, the closing summary."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gspo_dist.checkpoint import Checkpoint, CheckpointStore
from gspo_dist.config import RunConfig
from gspo_dist.data.cursor import PromptCursor
from gspo_dist.learners.group import LearnerGroup
from gspo_dist.metrics.curves import draw_curves
from gspo_dist.metrics.sinks import Sinks, read_jsonl
from gspo_dist.packing import MiniBatch
from gspo_dist.rewards.pool import RewardPool
from gspo_dist.rollout.pool import RolloutPool
from gspo_dist.routing.trace import replay_bytes
from gspo_dist.trainer.collect import evaluate_with, probe_sequences
from gspo_dist.trainer.flip_meter import FlipMeter
from gspo_dist.trainer.old_logprobs import LogprobContract
from gspo_dist.trainer.publisher import WeightSync
from gspo_dist.types import Prompt, Rollout, SamplingSpec

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that a run is made of (build.py makes it); the loop's only argument."""

    config: RunConfig
    run_dir: Path
    learner: LearnerGroup
    pool: RolloutPool
    rewards: RewardPool
    cursor: PromptCursor
    heldout: Sequence[Prompt]
    probe_prompts: Sequence[Prompt]
    contract: LogprobContract
    flips: FlipMeter
    sync: WeightSync
    sinks: Sinks
    sampling: SamplingSpec
    release: Callable[[], None]
    """Ends the processes that the run started."""
    first_step: int = 0
    tokens_seen: int = 0
    last_checkpoint: Path | None = None
    saving: tuple[Path, int, dict[str, Any]] | None = None
    """A checkpoint in the making: its folder, step and manifest."""
    first_eval: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    seconds_before: float = 0.0
    """What the run took up to the checkpoint that it continues from."""

    @property
    def seconds(self) -> float:
        """Of the whole run, over its interruptions; what was lost with a kill is not counted."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.run_dir, self.config.checkpoint.keep)

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """While the learner works: colocated engines sleep, and their GPUs' memory is the learner's. They come out of it
        with their weights awake, which the publication overwrites; it wakes the rest."""
        if not self.config.cluster.colocated:
            yield
            return
        self.pool.sleep()
        yield
        self.learner.empty_cache()
        self.pool.wake_up(weights_only=True)

    def sampling_of(self, step: int) -> SamplingSpec:
        """How to sample `step`: routes travel only where R3 replays them or the flip metric measures them."""
        wanted = self.config.objective.routing_replay == "r3" or self.flips.due(step)
        return replace(self.sampling, record_routing=self.sampling.record_routing and wanted)

    def probe_sequences(self) -> list[tuple[np.ndarray, int]]:
        """What the first log-prob probe compares, before any step: a few completions sampled for it."""
        spec = replace(self.sampling, n=1, record_routing=False)
        groups = self.pool.generate(self.probe_prompts, spec, range(len(self.probe_prompts)))
        return probe_sequences([(p, group[0]) for p, group in zip(self.probe_prompts, groups, strict=True)])

    # -- evaluation ---------------------------------------------------------------------------------------------

    def evaluation_due(self, step: int) -> bool:
        every = self.config.evaluation.every
        return step == self.config.steps or bool(every and step % every == 0)

    def evaluate(self, step: int, log: bool = True) -> dict[str, float]:
        """Held-out accuracy after `step` steps, under eval/heldout/*; empty without held-out prompts."""
        if not self.heldout:
            return {}
        config = self.config.evaluation
        spec = replace(
            self.sampling,
            n=config.samples,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=self.config.seed + 1,
            record_routing=False,
        )
        start = time.perf_counter()
        ids = range(1 << 40, (1 << 40) + len(self.heldout))
        row = evaluate_with(
            lambda prompts, s: self.pool.generate(prompts, s, ids), self.rewards, self.heldout, spec
        )
        row["time/evaluation_s"] = time.perf_counter() - start
        self.last_eval = row
        self.first_eval = self.first_eval or row
        if log and step == 0:
            self.sinks.log(step, row)
        return row

    # -- logging ------------------------------------------------------------------------------------------------

    def batch_metrics(
        self, rollouts: Sequence[Rollout], mini_batches: Sequence[MiniBatch]
    ) -> dict[str, float]:
        """What the packing and the traces cost."""
        launched = sum(len(rank) for m in mini_batches for rank in m.micro_batches)
        held = sum(m.num_tokens for m in mini_batches)
        self.flips.end()
        out = {
            "packing/micro_batches": float(launched),
            "packing/efficiency": held / (launched * self.config.learner.token_budget),
        }
        objective = self.config.objective
        if objective.routing_replay != "none":
            if objective.routing_replay == "r2":
                traces = [b.routing for m in mini_batches for rank in m.micro_batches for b in rank]
            else:
                traces = [r.completion.routing for r in rollouts]
            total, tokens = sum(t.nbytes for t in traces), sum(len(t) for t in traces)
            out["routing/replay_bytes"] = float(total)
            out["routing/replay_bytes_per_token"] = total / tokens
            out["routing/native_row_fraction"] = sum(t.unknown_rows for t in traces) / tokens
            cost = replay_bytes(
                objective.routing_replay, total, recompute_old_logprobs=self.contract.recomputed
            )
            out |= {f"routing/replay_{kind}_bytes": float(n) for kind, n in asdict(cost).items()}
        return out

    def speed(self, times: Mapping[str, float], rollouts: Sequence[Rollout]) -> dict[str, float]:
        """time/* and perf/* of a step."""
        completion = sum(len(r.completion) for r in rollouts)
        self.tokens_seen += completion
        seconds = times["time/step_s"]
        return dict(times) | {
            "perf/tokens_per_s": completion / seconds,
            "perf/collect_tokens_per_s": completion / times["time/collect_s"],
            "perf/update_tokens_per_s": sum(r.num_tokens for r in rollouts) / times["time/update_s"],
            "rollout/completion_tokens_total": float(self.tokens_seen),
        }

    def log(self, step: int, row: dict[str, float]) -> None:
        done = step - self.first_step
        left = (time.perf_counter() - self.started) / done * (self.config.steps - step)
        self.sinks.log(step, row | {"time/left_s": left})

    # -- checkpoints --------------------------------------------------------------------------------------------

    def checkpoint_due(self, step: int) -> bool:
        config = self.config.checkpoint
        if step == self.config.steps:
            return config.save_last
        return bool(config.every and step % config.every == 0)

    def save(self, step: int) -> None:
        """A whole checkpoint of the state after `step` steps."""
        self.commit_saved()
        self.flips.save(self.run_dir)
        partial = self.store.begin(step)
        self.learner.save(partial / "learner")
        self.saving = (
            partial,
            step,
            {
                "policy_version": self.learner.policy_version,
                "cursor": self.cursor.state_dict(),
                "contract": self.contract.state_dict(),
                "tokens_seen": self.tokens_seen,
                "seconds": self.seconds,
                "published": self.sync.published,
                "first_eval": self.first_eval,
            },
        )
        if not self.config.learner.saves_asynchronously or step == self.config.steps:
            self.commit_saved()

    def commit_saved(self) -> None:
        """Makes the checkpoint in the making real, once every rank has written its part. An asynchronous save is
        committed a step later, so that the step hides the writing."""
        if self.saving is not None:
            partial, step, state = self.saving
            self.learner.wait_saved()
            self.last_checkpoint = self.store.commit(partial, step, state)
            self.saving = None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from `checkpoint`."""
        state = checkpoint.state
        self.learner.load(checkpoint.learner, state["policy_version"])
        self.cursor.load_state_dict(state["cursor"])
        self.contract.load_state_dict(state["contract"])
        self.tokens_seen = state["tokens_seen"]
        self.seconds_before = state["seconds"]
        self.sync.published = (
            state["published"] - 1
        )  # the first publication of a resumed run repeats the last one
        self.first_eval = dict(state["first_eval"])
        self.flips.restore(self.run_dir, checkpoint.step)
        self.first_step = checkpoint.step
        self.last_checkpoint = checkpoint.folder

    def saved(self) -> str:
        """What of this run is safe on disk, for an error message."""
        if self.last_checkpoint is None:
            return f"no checkpoint was saved yet (checkpoint.every = {self.config.checkpoint.every})"
        return f"saved: {self.last_checkpoint}"

    # -- the end ------------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, object]:
        """Draws the curves and heat maps, writes the summary, closes the sinks."""
        rows = read_jsonl(self.run_dir / "metrics.jsonl")
        pictures = [self.run_dir / "curves.png", *self.flips.draw(self.run_dir)]
        draw_curves(rows, pictures[0], title=str(self.run_dir.name))
        for picture in pictures:
            self.sinks.image(picture.stem, picture)
        key = "eval/heldout/accuracy"
        memory = self.pool.peak_memory() | self.learner.peak_memory()
        summary: dict[str, object] = {
            "steps": self.config.steps,
            "policy_version": self.learner.policy_version,
            "completion_tokens": self.tokens_seen,
            "seconds": self.seconds,
            "tokens_per_s_median": float(
                np.median([r["perf/tokens_per_s"] for r in rows if "perf/tokens_per_s" in r])
            ),
            "peak_memory_bytes": memory,
            "checkpoint": str(self.last_checkpoint) if self.last_checkpoint else None,
        }
        if self.last_eval:
            summary |= {"heldout_before": self.first_eval[key], "heldout_after": self.last_eval[key]}
        self.sinks.close(summary)
        return summary
