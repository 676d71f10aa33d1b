"""Live routing flips of a step, on a small sample of its rollouts, whether or not replay is on.

engine: the experts that the engine used while sampling against the learner's before the update, on
completions that the same weights sampled from their first token to their last. Older ones differ because the
policy has moved, which is no fault of the engine. update: the learner's experts before the step against those
after each mini-batch. The paper's "about 10%" (GSPO, section 5.3) is that comparison after one update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from operator import add
from pathlib import Path

from gspo_dist.config import FlipsConfig
from gspo_dist.learners.group import LearnerGroup
from gspo_dist.learners.loss import lags_of
from gspo_dist.metrics.heatmap import draw_heatmap
from gspo_dist.metrics.stat import results
from gspo_dist.packing import MicroBatches, MiniBatch
from gspo_dist.probes import take_sequences
from gspo_dist.routing.flips import FlipHistory, FlipStats, flip_stats, sample_sequences
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import LogprobOutput, PackedBatch, Rollout

Outputs = list[list[LogprobOutput]]

TITLES = {
    "engine": "share of activated experts that differ: engine against learner",
    "update": "share of activated experts that differ: before against after a step's updates",
}


class FlipMeter:
    """Records the sample's routes before the update and after each mini-batch. Off for dense models.

    The verbs of a measured step, in order: `begin`, `after_mini_batch` for each, `finish_step`. On other
    steps they do nothing, and `metrics` is empty.
    """

    def __init__(
        self,
        config: FlipsConfig,
        learner: LearnerGroup,
        seed: int,
        moe_layers: int,
        replicas: int,
        token_budget: int,
    ) -> None:
        """token_budget: most tokens of one forward pass (learner.forward_budget)."""
        self.config = config
        self.learner = learner
        self.seed = seed
        self.replicas = replicas
        self.token_budget = token_budget
        self.enabled = config.every > 0 and moe_layers > 0
        self.history = {kind: FlipHistory(moe_layers) for kind in TITLES} if self.enabled else {}
        self.step = 0
        self.sample: MicroBatches | None = None
        """The sampled sequences of the step under way, or None where it is not measured."""
        self.before: Outputs = []
        """Their routes under the policy that the step started with."""
        self.last: FlipStats | None = None
        """The comparison after the newest mini-batch."""
        self._metrics: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether `step` is measured: the first one, and every `flips.every`-th after it."""
        return self.enabled and (step - 1) % self.config.every == 0

    def begin(self, step: int, mini_batches: Sequence[MiniBatch], rollouts: Sequence[Rollout]) -> None:
        """Chooses the sample and records its routes under the old policy."""
        self.step, self.sample, self.last, self._metrics = step, None, None, {}
        if not self.due(step):
            return
        wanted = set(
            sample_sequences(range(len(rollouts)), self.config.sequences, seed=self.seed, step=step - 1)
        )
        picks = [
            (batch.with_(routing=None), sequence)
            for mini in mini_batches
            for batch, sequence in mini.sequences()
            if int(batch.rollout_index[sequence]) in wanted
        ]
        self.sample = take_sequences(picks, replicas=self.replicas, token_budget=self.token_budget)
        self.before = self.learner.logprobs(self.sample, record_routing=True)
        engine = self._against_engine(rollouts)
        if engine is not None and engine.rows:
            self._metrics |= results(engine.stats("routing/engine"))
            self.history["engine"].append(step, engine.by_layer)

    def after_mini_batch(self, index: int) -> None:
        """Compares the sample's routes under the updated policy with those before the step."""
        if self.sample is None:
            return
        after = self.learner.logprobs(self.sample, record_routing=True)
        self.last = _total(
            flip_stats(_trace(old), _trace(new))
            for (batch, old), (_, new) in zip(self._paired(self.before), self._paired(after), strict=True)
            if batch.loss_mask.any()  # not the masked copies that fill idle replicas
        )
        self._metrics[f"routing/update/flip_fraction/mini_batch_{index}"] = self.last.fraction
        self._metrics |= results(self.last.stats("routing/update") | self.last.layer_stats("routing/update"))

    def finish_step(self) -> None:
        """Keeps the step's last comparison for the heat map."""
        if self.last is not None:
            self.history["update"].append(self.step, self.last.by_layer)

    def metrics(self) -> dict[str, float]:
        """routing/engine/* and routing/update/* of the step. Empty where it was not measured."""
        return dict(self._metrics)

    def save(self, folder: Path) -> None:
        """Writes the rates measured so far as flips_engine.npz and flips_update.npz."""
        for kind, history in self.history.items():
            if len(history):
                history.save(folder / f"flips_{kind}.npz")

    def restore(self, folder: Path, step: int) -> None:
        """Takes up the history that an interrupted run left in `folder`, up to the step it resumes from."""
        for kind, history in self.history.items():
            path = folder / f"flips_{kind}.npz"
            if path.is_file():
                saved = FlipHistory.load(path)
                for at, rates in zip(saved.steps.tolist(), saved.rates, strict=True):
                    if at <= step:
                        history.append(at, rates)

    def draw(self, folder: Path) -> list[Path]:
        """Saves, and draws heat maps (layer by step) as flips_engine.png and flips_update.png;
        returns the pictures.
        """
        self.save(folder)
        paths = []
        for kind, history in self.history.items():
            if len(history):
                paths.append(folder / f"flips_{kind}.png")
                draw_heatmap(paths[-1], history.steps, history.rates, title=TITLES[kind])
        return paths

    def _against_engine(self, rollouts: Sequence[Rollout]) -> FlipStats | None:
        """The engine's routes against the learner's; None where the engine recorded none, or where no
        completion of the sample is of the learner's own version.
        """
        parts = []
        for batch, output in self._paired(self.before):
            lags = lags_of(batch, self.learner.policy_version)
            for sequence, place in enumerate(batch.rollout_index.tolist()):
                recorded = rollouts[place].completion.routing
                if recorded is None:
                    return None
                rows = batch.rows(sequence)
                fresh = lags is None or not lags[rows].any()
                if fresh and batch.has_trained_tokens(sequence):  # not the copies that fill idle replicas
                    parts.append(flip_stats(recorded, _trace(output)[rows]))
        return _total(parts) if parts else None

    def _paired(self, outputs: Outputs) -> Iterator[tuple[PackedBatch, LogprobOutput]]:
        """Each micro-batch of the sample with its output."""
        assert self.sample is not None
        for batches, outs in zip(self.sample, outputs, strict=True):
            yield from zip(batches, outs, strict=True)


def _trace(output: LogprobOutput) -> RoutingTrace:
    assert output.routing is not None  # every pass of this module records
    return output.routing


def _total(parts: Iterable[FlipStats]) -> FlipStats:
    return reduce(add, parts)
