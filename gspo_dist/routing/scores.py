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
    """Keeps the scores of one pass."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def see(self, layer: int, logits: torch.Tensor, ids: torch.Tensor) -> None:
        self.seen[layer] = (ids.detach().int(), _logprobs_at(logits, ids))

    def scores(self) -> RouterScores:
        """On the host, the layers in their order."""
        ids, logprobs = zip(*(self.seen[layer] for layer in sorted(self.seen)), strict=True)
        return RouterScores(torch.stack(ids, 1).cpu(), torch.stack(logprobs, 1).cpu())


class ShiftMeter:
    """Measures the routers of one pass against the old policy's scores."""

    def __init__(self, old: RouterScores) -> None:
        self.old = old
        self.total: torch.Tensor | None = None

    def see(self, layer: int, logits: torch.Tensor, ids: torch.Tensor) -> None:
        if in_backward():  # a checkpointed layer runs again, and was measured
            return
        old_ids, old = (x[:, layer].to(logits.device) for x in (self.old.expert_ids, self.old.logprobs))
        if len(old_ids) != len(logits):
            raise ValueError(
                f"router scores must have one row per token: got {len(old_ids)} for {len(logits)} tokens"
            )
        moved = (_logprobs_at(logits, old_ids) - old).abs().mean(-1)
        self.total = moved if self.total is None else self.total + moved

    def shift(self) -> torch.Tensor:
        """[T]: exp(-mean over layers and experts of |log r - log r_old|), 1 where nothing moved."""
        assert self.total is not None, "no router was seen"
        return torch.exp(-self.total / self.old.expert_ids.shape[1])
