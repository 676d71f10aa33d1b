"""How much two routings of the same tokens differ.

The two are the engine's and the learner's, or the learner's before and after an update. Only rows that both
traces know are compared. A and B are the K experts of one token in one MoE layer. A "router" below is one
token in one layer.

- flip: 1 - |A n B| / K, averaged over routers: the share of activated experts that differ. The GSPO paper's
  "about 10% of the activated experts" after an update (arXiv 2507.18071, section 5.3).
- router flip: the share of routers with A != B as sets. The R3 paper's "about 10% of routers"
  (arXiv 2510.11370).
- token flip: the share of tokens with A != B in at least one layer (94% in the R3 paper). Flips per token is
  the number of such layers (6 there).

Example: K = 8 and one expert of eight exchanged everywhere give flip 1/8, router flip 1 and token flip 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gspo_dist.metrics.stat import Stat
from gspo_dist.routing.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class FlipStats:
    """Sums of one comparison over L MoE layers."""

    rows: int
    """Tokens compared."""
    experts: np.ndarray
    """[L] float64: sum over rows of 1 - |A n B| / K."""
    routers: np.ndarray
    """[L] int64: rows with A != B."""
    tokens: int
    """Rows with A != B in some layer."""

    def __add__(self, other: FlipStats) -> FlipStats:
        """The comparison of both sets of tokens, which must be disjoint."""
        return FlipStats(
            self.rows + other.rows,
            self.experts + other.experts,
            self.routers + other.routers,
            self.tokens + other.tokens,
        )

    @property
    def by_layer(self) -> np.ndarray:
        """[L] float64: the flip fraction of every layer, nan when no row was compared."""
        return self.experts / self.rows if self.rows else np.full(len(self.experts), np.nan)

    @property
    def fraction(self) -> float:
        """The flip fraction over all layers."""
        return float(self.by_layer.mean())

    def stats(self, prefix: str = "routing") -> dict[str, Stat]:
        """Mergeable metrics under `prefix`.

        They are flip_fraction, router_flip_fraction, token_flip_fraction and flips_per_token.
        """
        layers = len(self.experts)
        flipped = int(self.routers.sum())
        return {
            f"{prefix}/flip_fraction": _mean(float(self.experts.sum()), self.rows * layers),
            f"{prefix}/router_flip_fraction": _mean(flipped, self.rows * layers),
            f"{prefix}/token_flip_fraction": _mean(self.tokens, self.rows),
            f"{prefix}/flips_per_token": _mean(flipped, self.rows),
        }

    def layer_stats(self, prefix: str = "routing") -> dict[str, Stat]:
        """Mergeable metrics: the flip fraction of every layer, such as `prefix`/flip_fraction/layer_07."""
        return {
            f"{prefix}/flip_fraction/layer_{layer:02d}": _mean(float(value), self.rows)
            for layer, value in enumerate(self.experts)
        }


def _mean(total: float, weight: float) -> Stat:
    return Stat(torch.tensor(total, dtype=torch.float64), torch.tensor(weight, dtype=torch.float64), "mean")


def flip_stats(a: RoutingTrace, b: RoutingTrace, rows: np.ndarray | None = None) -> FlipStats:
    """Compares two routings of the same tokens, on the rows that both know.

    rows: [T] bool, if given: only marked rows are compared.

    Raises ValueError when the traces are not of the same tokens and model.
    """
    if a.expert_ids.shape != b.expert_ids.shape or a.num_experts != b.num_experts:
        raise ValueError(
            "flips compare two routings of the same tokens by the same architecture: got "
            f"{list(a.expert_ids.shape)} of {a.num_experts} experts and {list(b.expert_ids.shape)} of "
            f"{b.num_experts}"
        )
    both = a.known & b.known
    if rows is not None:
        both = both & np.asarray(rows, dtype=np.bool_)
    left, right = a.expert_ids[both], b.expert_ids[both]
    common = np.zeros(left.shape[:2], np.int64)
    # Ids of a row are distinct, so every common expert matches at exactly one rotation. K passes over small
    # ids take less time and memory than a [rows, L, K, K] comparison.
    for shift in range(a.top_k):
        common += (left == np.roll(right, shift, axis=-1)).sum(-1)
    differs = common < a.top_k
    return FlipStats(
        int(both.sum()),
        (1.0 - common / a.top_k).sum(0),
        differs.sum(0, dtype=np.int64),
        int(differs.any(1).sum()),
    )


def sample_sequences(ids: Sequence[int], count: int, *, seed: int, step: int) -> list[int]:
    """`count` of `ids` at random, sorted; all of them where there are fewer.

    The choice depends on the set of ids, the seed and the step only, not on how the batch was packed or
    ordered. So it is the same on every rank and after a resume. ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count of sampled sequences must be at least 1: got {count}")
    population = np.unique(np.asarray(ids, dtype=np.int64))
    # The constant keeps this stream apart from others that are seeded by (seed, step).
    chosen = np.random.default_rng([seed, step, 0xF11B]).permutation(population)[:count]
    return sorted(int(i) for i in chosen)


class FlipHistory:
    """The flip fractions of one comparison over the run, layer by step: what the heat map draws."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._steps: list[int] = []
        self._rates: list[np.ndarray] = []

    def append(self, step: int, by_layer: np.ndarray) -> None:
        """Adds one row [L]. Several rows per step are several mini-batches.

        ValueError for another length, and for a step below the last one.
        """
        row = np.asarray(by_layer, dtype=np.float64)
        if row.shape != (self.num_layers,):
            raise ValueError(f"flips by layer must be [{self.num_layers}]: got {list(row.shape)}")
        if self._steps and step < self._steps[-1]:
            raise ValueError(
                f"flip history must be appended in order: got step {step} after {self._steps[-1]}"
            )
        self._steps.append(step)
        self._rates.append(row)

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> np.ndarray:
        """[N] int64."""
        return np.array(self._steps, dtype=np.int64)

    @property
    def rates(self) -> np.ndarray:
        """[N, L] float64."""
        return np.stack(self._rates) if self._rates else np.zeros((0, self.num_layers))

    def save(self, path: Path) -> None:
        """Writes steps and rates as .npz."""
        np.savez_compressed(path, steps=self.steps, rates=self.rates)

    @staticmethod
    def load(path: Path) -> FlipHistory:
        """Reads what `save` wrote."""
        with np.load(path) as data:
            steps, rates = data["steps"], data["rates"]
        history = FlipHistory(rates.shape[1])
        for step, row in zip(steps, rates, strict=True):
            history.append(int(step), row)
        return history
