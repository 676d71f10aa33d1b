"""How far a policy's routers have moved since the old policy: what the objective rspo weighs tokens by.

The pass that recomputes old log-probs keeps, for every token and MoE layer, which experts were used and their
log-probabilities by the router. The update looks at the same experts again. Probabilities are the softmax of
the router's logits over all experts, whatever formula makes gate weights of them.

T tokens of a micro-batch, L MoE layers, K top-k.
"""

from __future__ import annotations

from typing import Protocol

import torch

from gspo_dist.routing.replay import in_backward
from gspo_dist.routing.trace import RouterScores


class Watcher(Protocol):
    """Looks on while routers choose, and changes nothing."""

    def see(self, layer: int, logits: torch.Tensor, ids: torch.Tensor) -> None:
        """Called once per router and pass: logits [T, E], and the experts that are used, [T, K]."""
        ...


def _logprobs_at(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.detach().float(), dim=-1).gather(-1, ids.long())


class ScoreRecorder:
    """Keeps the scores of passes, one after the other."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def see(self, layer: int, logits: torch.Tensor, ids: torch.Tensor) -> None:
        self.seen.setdefault(layer, []).append((ids.detach().int(), _logprobs_at(logits, ids)))

    def passes(self) -> list[RouterScores]:
        """One for each pass, in their order, on the routers' device; the layers in theirs."""
        layers = [self.seen[layer] for layer in sorted(self.seen)]
        return [
            RouterScores(*(torch.stack(field, 1) for field in zip(*one, strict=True)))
            for one in zip(*layers, strict=True)
        ]

    def scores(self) -> RouterScores:
        """Those of the one pass, on the host."""
        (one,) = self.passes()
        return RouterScores(one.expert_ids.cpu(), one.logprobs.cpu())


class ShiftMeter:
    """Measures the routers of passes against the old policy's scores."""

    def __init__(self, *old: RouterScores) -> None:
        """old: what the old policy's routers thought, for each pass in their order."""
        self.old = old
        self.totals: list[torch.Tensor | None] = [None] * len(old)
        """For each pass [T]: the sum over its layers so far of the experts' mean |log r - log r_old|."""
        self.forwards: dict[int, int] = {}
        """By layer, how many passes it has seen."""

    def see(self, layer: int, logits: torch.Tensor, ids: torch.Tensor) -> None:
        if in_backward():  # a checkpointed layer runs again, and was measured
            return
        at = self.forwards.get(layer, 0)
        self.forwards[layer] = at + 1
        scores, total = self.old[at], self.totals[at]
        old_ids, old = (x[:, layer].to(logits.device) for x in (scores.expert_ids, scores.logprobs))
        if len(old_ids) != len(logits):
            raise ValueError(
                f"router scores must have one row per token: got {len(old_ids)} for {len(logits)} tokens"
            )
        moved = (_logprobs_at(logits, old_ids) - old).abs().mean(-1)
        self.totals[at] = moved if total is None else total + moved

    def shift(self) -> torch.Tensor:
        """[T] of the one pass: exp(-mean over layers and experts of |log r - log r_old|).

        It is 1 where nothing moved.
        """
        (scores,), (total,) = self.old, self.totals
        assert total is not None, "no router was seen"
        return torch.exp(-total / scores.expert_ids.shape[1])
