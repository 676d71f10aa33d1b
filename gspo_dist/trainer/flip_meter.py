"""Live routing flips of a step, on a small sample of its rollouts, whether or not replay is on.

engine: the engine's experts while sampling against the learner's before the update (train-inference flips).
update: the learner's experts before the step against those after each mini-batch (the paper's "about 10%" of section
5.3 is that after one update).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gspo_dist.config import FlipsConfig
from gspo_dist.learners.group import LearnerGroup
from gspo_dist.metrics.heatmap import draw_heatmap
from gspo_dist.metrics.stat import results
from gspo_dist.packing import MiniBatch, take_sequences
from gspo_dist.routing.flips import FlipHistory, FlipStats, flip_stats, sample_sequences
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import LogprobOutput, PackedBatch, Rollout

Outputs = list[list[LogprobOutput]]


class FlipMeter:
    """Records the sample's routes before the update and after each mini-batch. Off for dense models."""

    def __init__(
        self, config: FlipsConfig, learner: LearnerGroup, seed: int, moe_layers: int, ranks: int
    ) -> None:
        self.config = config
        self.learner = learner
        self.seed = seed
        self.ranks = ranks
        self.enabled = config.every > 0 and moe_layers > 0
        self.history = (
            {kind: FlipHistory(moe_layers) for kind in ("engine", "update")} if self.enabled else {}
        )
        self.metrics: dict[str, float] = {}
        self.sample: MiniBatch | None = None

    def due(self, step: int) -> bool:
        """Whether `step` is measured."""
        return self.enabled and step % self.config.every == 0

    def begin(self, step: int, mini_batches: Sequence[MiniBatch], rollouts: Sequence[Rollout]) -> None:
        """Chooses the sample and records its routes under the old policy."""
        self.metrics, self.sample, self.step = {}, None, step
        if not self.due(step):
            return
        wanted = set(sample_sequences(range(len(rollouts)), self.config.sequences, seed=self.seed, step=step))
        picks = [
            (batch.with_(routing=None), s)
            for mini in mini_batches
            for rank in mini.micro_batches
            for batch in rank
            for s, index in enumerate(batch.rollout_index.tolist())
            if index in wanted
            and batch.loss_mask[int(batch.cu_seqlens[s]) : int(batch.cu_seqlens[s + 1])].any()
        ]
        self.sample = take_sequences(picks, ranks=self.ranks)
        self.before = self.learner.logprobs(self.sample, record_routing=True)
        engine = self._against_engine(rollouts)
        if engine is not None and engine.rows:
            self.metrics |= results(engine.stats("routing/engine"))
            self.history["engine"].append(step + 1, engine.by_layer)

    def after_mini_batch(self, index: int) -> None:
        """Compares the sample's routes under the updated policy with those before the step."""
        if self.sample is None:
            return
        after = self.learner.logprobs(self.sample, record_routing=True)
        flips = _total(
            flip_stats(b.routing, a.routing)
            for batch, b, a in zip(self._batches(), _flat(self.before), _flat(after), strict=True)
            if batch.loss_mask.any()  # not the masked copies that fill idle ranks
        )
        self.metrics[f"routing/update/flip_fraction/mini_batch_{index}"] = flips.fraction
        self.metrics |= results(flips.stats("routing/update") | flips.layer_stats("routing/update"))
        self.last = flips

    def end(self) -> None:
        """Keeps the step's last comparison for the heat map."""
        if self.sample is not None:
            self.history["update"].append(self.step + 1, self.last.by_layer)

    def _against_engine(self, rollouts: Sequence[Rollout]) -> FlipStats | None:
        parts = []
        for batch, output in zip(self._batches(), _flat(self.before), strict=True):
            traces = [rollouts[i].completion.routing for i in batch.rollout_index.tolist()]
            if any(t is None for t in traces):
                return None
            if batch.loss_mask.any():
                parts.append(flip_stats(RoutingTrace.concat(traces), output.routing))
        return _total(parts)

    def _batches(self) -> list[PackedBatch]:
        return [b for rank in self.sample.micro_batches for b in rank]

    def restore(self, folder: Path, step: int) -> None:
        """Takes up the history that an interrupted run left in `folder`, up to the step it resumes from."""
        for kind, history in self.history.items():
            path = folder / f"flips_{kind}.npz"
            if path.is_file():
                saved = FlipHistory.load(path)
                for at, rates in zip(saved.steps.tolist(), saved.rates, strict=True):
                    if at <= step:
                        history.append(at, rates)

    def save(self, folder: Path) -> None:
        """Writes what was measured so far."""
        for kind, history in self.history.items():
            if len(history):
                history.save(folder / f"flips_{kind}.npz")

    def draw(self, folder: Path) -> list[Path]:
        """Heat maps (layer by step) of what was measured, as PNG and NPZ."""
        paths = []
        self.save(folder)
        for kind, history in self.history.items():
            if len(history):
                draw_heatmap(folder / f"flips_{kind}.png", history.steps, history.rates, title=TITLES[kind])
                paths.append(folder / f"flips_{kind}.png")
        return paths


TITLES = {
    "engine": "share of activated experts that differ: engine against learner",
    "update": "share of activated experts that differ: before against after a step's updates",
}


def _flat(outputs: Outputs) -> list[LogprobOutput]:
    return [o for rank in outputs for o in rank]


def _total(parts) -> FlipStats:
    parts = list(parts)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
