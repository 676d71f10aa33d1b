"""How much two routings of the same tokens differ: engine against learner, or before against after an update.

Three measures of the same comparison, over the rows known in both traces (A, B: the K experts of one token in one MoE
layer; a "router" below is one token in one layer):
    flip          1 - |A n B| / K, averaged over routers: the share of activated experts that differ. The GSPO paper's
                  "about 10% of the activated experts differ" after an update (arXiv 2507.18071, section 5.3).
    router flip   share of routers with A != B as sets. The R3 paper's "about 10% of routers" (arXiv 2510.11370).
    token flip    share of tokens with A != B in at least one layer (there 94%), and such routers a token (there 6).
With K = 8, one expert of eight exchanged everywhere gives flip 1/8, router flip 1, token flip 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gspo_dist.metrics.stat import Stat
from gspo_dist.routing.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class FlipStats:
    """Sums of one comparison; sums of disjoint sets of tokens add up (`+`).

    rows: tokens compared. experts [L] float64: sum over rows of 1 - |A n B| / K. routers [L] int64: rows with
    A != B. tokens: rows with A != B in some layer.
    """

    rows: int
    experts: np.ndarray
    routers: np.ndarray
    tokens: int

    def __add__(self, other: FlipStats) -> FlipStats:
        return FlipStats(
            self.rows + other.rows,
            self.experts + other.experts,
            self.routers + other.routers,
            self.tokens + other.tokens,
        )

    @property
    def by_layer(self) -> np.ndarray:
        """[L] float64: the flip fraction of every layer; nan when no row was compared."""
        return self.experts / self.rows if self.rows else np.full(len(self.experts), np.nan)

    @property
    def fraction(self) -> float:
        """The flip fraction over all layers."""
        return float(self.by_layer.mean())

    def stats(self, prefix: str = "routing") -> dict[str, Stat]:
        """Mergeable metrics: `prefix`/flip_fraction, router_flip_fraction, token_flip_fraction, flips_per_token."""
        layers = len(self.experts)
        flipped = int(self.routers.sum())
        return {
            f"{prefix}/flip_fraction": _mean(float(self.experts.sum()), self.rows * layers),
            f"{prefix}/router_flip_fraction": _mean(flipped, self.rows * layers),
            f"{prefix}/token_flip_fraction": _mean(self.tokens, self.rows),
            f"{prefix}/flips_per_token": _mean(flipped, self.rows),
        }

    def layer_stats(self, prefix: str = "routing") -> dict[str, Stat]:
        """Mergeable metrics: the flip fraction of every layer, `prefix`/flip_fraction/layer_07."""
        return {
            f"{prefix}/flip_fraction/layer_{layer:02d}": _mean(float(value), self.rows)
            for layer, value in enumerate(self.experts)
        }


def _mean(total: float, weight: float) -> Stat:
    return Stat(torch.tensor(total, dtype=torch.float64), torch.tensor(weight, dtype=torch.float64), "mean")


def flip_stats(a: RoutingTrace, b: RoutingTrace, rows: np.ndarray | None = None) -> FlipStats:
    """Compares two routings of the same tokens, on the rows known in both (and marked in `rows` [T] bool, if given).

    Raises ValueError when the traces are not of the same tokens and model.
    """
    if a.expert_ids.shape != b.expert_ids.shape or a.num_experts != b.num_experts:
        raise ValueError(
            "flips compare two routings of the same tokens by the same architecture: got "
            f"{list(a.expert_ids.shape)} of {a.num_experts} experts and {list(b.expert_ids.shape)} of {b.num_experts}"
        )
    both = a.known & b.known
    if rows is not None:
        both = both & np.asarray(rows, dtype=np.bool_)
    left, right = a.expert_ids[both], b.expert_ids[both]
    common = np.zeros(left.shape[:2], np.int64)
    for shift in range(a.top_k):  # ids of a row are distinct: every common expert matches at one rotation
        common += (left == np.roll(right, shift, axis=-1)).sum(-1)
    differs = common < a.top_k
    return FlipStats(
        int(both.sum()),
        (1.0 - common / a.top_k).sum(0),
        differs.sum(0, dtype=np.int64),
        int(differs.any(1).sum()),
    )


def sample_sequences(ids: Sequence[int], count: int, *, seed: int, step: int) -> list[int]:
    """`count` of `ids` (all, where there are fewer) at random, sorted: the same on every rank and after a resume.

    Depends on the set of ids, the seed and the step only, not on how the batch was packed or ordered.
    """
    if count < 1:
        raise ValueError(f"count of sampled sequences must be at least 1: got {count}")
    population = np.unique(np.asarray(ids, dtype=np.int64))
    chosen = np.random.default_rng([seed, step, 0xF11B]).permutation(population)[:count]
    return sorted(int(i) for i in chosen)


class FlipHistory:
    """The flip fractions of one comparison over the run, layer by step: what the heat map draws."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._steps: list[int] = []
        self._rates: list[np.ndarray] = []

    def append(self, step: int, by_layer: np.ndarray) -> None:
        """One row; `step` must not decrease (several rows a step are several mini-batches)."""
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
        """Writes .npz (steps, rates) or .json, by the suffix."""
        if path.suffix == ".npz":
            np.savez_compressed(path, steps=self.steps, rates=self.rates)
        elif path.suffix == ".json":
            rates = [[None if np.isnan(x) else float(x) for x in row] for row in self._rates]
            path.write_text(json.dumps({"num_layers": self.num_layers, "steps": self._steps, "rates": rates}))
        else:
            raise ValueError(f"flip history is written as .npz or .json: got {path.name}")

    @staticmethod
    def load(path: Path) -> FlipHistory:
        """Reads what `save` wrote."""
        if path.suffix == ".npz":
            with np.load(path) as data:
                steps, rates = data["steps"], data["rates"]
            num_layers = rates.shape[1]
        else:
            data = json.loads(path.read_text())
            steps, num_layers = data["steps"], data["num_layers"]
            rates = [[np.nan if x is None else x for x in row] for row in data["rates"]]
        history = FlipHistory(num_layers)
        for step, row in zip(steps, rates, strict=True):
            history.append(int(step), np.asarray(row))
        return history
