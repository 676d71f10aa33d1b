"""A policy without a model: what the reference engine's laws can be counted on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from gspo_dist.rollout.seeds import mix
from gspo_dist.weights.bucket import BucketLayout
from gspo_dist.weights.stream import NamedTensor


class TablePolicy:
    """One softmax over the vocabulary, the same at every position; the highest id ends a completion."""

    def __init__(
        self, seed: int, vocab_size: int = 32, num_experts: int = 8, moe_layers: int = 2, top_k: int = 2
    ) -> None:
        self.vocab_size, self.num_experts, self.moe_layers, self.top_k = (
            vocab_size,
            num_experts,
            moe_layers,
            top_k,
        )
        self.eos_ids = frozenset({vocab_size - 1})
        self.table = np.random.default_rng(seed).normal(size=vocab_size).astype(np.float32)

    def logits(self, rows: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.table, (len(rows), self.vocab_size))

    def all_logits(self, row: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.table, (len(row), self.vocab_size))

    def routes(self, row: np.ndarray) -> np.ndarray:
        """K neighbouring experts, the first drawn from the token and the layer."""
        layers = np.arange(self.moe_layers, dtype=np.uint64)
        first = mix(row.astype(np.uint64)[:, None] * np.uint64(1000003) + layers) % np.uint64(
            self.num_experts
        )
        return (first[:, :, None].astype(np.int64) + np.arange(self.top_k)) % self.num_experts

    def check_bucket(self, layout: BucketLayout, engine: str) -> None:
        """Every tensor is welcome: the table is not made of them."""

    def check_whole(self, arrived: Iterable[str], engine: str) -> None:
        """Nothing is needed."""

    def load(self, weights: Sequence[NamedTensor]) -> None:
        """Weights arrive and change nothing: the table is not made of them."""

    def text(self, token_ids: np.ndarray) -> str:
        return " ".join(str(t) for t in token_ids)
