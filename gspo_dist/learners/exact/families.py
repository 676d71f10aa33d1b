"""Model families whose operators were compared with the engine's one by one, and what is particular to each.

A family is an architecture's name, as in a model's config. `benchmarks/exact_families.py` counts equal
tokens of each against a real engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gspo_dist.learners.exact import operators as engine


class Router:
    """A router by softmax: how the engine chooses and weighs experts, and how transformers weighs them."""

    renormalises: bool
    """Whether the weights of the chosen experts sum to 1."""

    def __init__(self, gate: Any) -> None:
        self.renormalises = bool(getattr(gate, "norm_topk_prob", True))
        self.top_k = int(gate.top_k)

    def logits(self, gate: Any, hidden: Tensor) -> Tensor:
        """hidden [T, H] -> [T, E], with the gradient of the product."""
        return engine.linear(hidden, gate.weight)

    def product(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """The product of `logits` alone, for a trial."""
        return engine.packed_product(weight, None)

    def choose(self, logits: Tensor) -> Tensor:
        """[T, K] int64, in the engine's order, which its sums follow."""
        return engine.choose_experts(logits, self.top_k, self.renormalises)[1]

    def engine_weights(self, logits: Tensor, ids: Tensor) -> Tensor:
        """[T, K] float32 of given experts."""
        return engine.weights_at(logits, ids, self.renormalises)

    def weights(self, logits: Tensor, ids: Tensor) -> Tensor:
        """[T, K], by transformers' formula: what is differentiated."""
        weights = torch.softmax(logits.float(), dim=-1).gather(1, ids)
        if self.renormalises:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(logits.dtype)

    def outputs(self, logits: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of the family's own router."""
        return logits, weights, ids


class MixtralRouter(Router):
    """Its weights stay in float32."""

    def weights(self, logits: Tensor, ids: Tensor) -> Tensor:
        return super().weights(logits.float(), ids)


class GraniteRouter(Router):
    """A softmax over the chosen logits alone, and another order of what it returns."""

    def weights(self, logits: Tensor, ids: Tensor) -> Tensor:
        return torch.softmax(logits.float().gather(1, ids), dim=-1).to(logits.dtype)

    def outputs(self, logits: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ids, weights, logits.float()


@dataclass(frozen=True)
class Family:
    """What is particular to one architecture."""

    router: Callable[[Any], Router] = Router
    """Made of a layer's router module. Dense families have none."""
    neighbours: bool = False
    """Whether rotary turns pairs of neighbouring channels, instead of channel i with i + D / 2."""
    sums_in_norms: bool = True
    """Whether the engine adds a branch to the residual stream inside the next norm, before it is rounded."""
    activation: str = "silu"
    """The only `hidden_act` that was compared."""


FAMILIES: dict[str, Family] = {
    "ArceeForCausalLM": Family(activation="relu2"),
    "Ernie4_5ForCausalLM": Family(neighbours=True),
    "GlmForCausalLM": Family(neighbours=True),
    "GraniteForCausalLM": Family(sums_in_norms=False),
    "GraniteMoeForCausalLM": Family(router=GraniteRouter, sums_in_norms=False),
    "GraniteMoeSharedForCausalLM": Family(router=GraniteRouter, sums_in_norms=False),
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "MixtralForCausalLM": Family(router=MixtralRouter),
    "OlmoeForCausalLM": Family(),
    "Phi3ForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(),
    "Qwen3MoeForCausalLM": Family(),
}
