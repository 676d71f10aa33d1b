"""How evenly the routers load the experts, as metrics, and the scale of the optional auxiliary loss.

c_e is the load of expert e in one layer: tokens of the mini-batch over all ranks. m = sum c / E
is the mean load.

- max violation = max_e c_e / m - 1, which is 0 for perfect balance.
- dead experts = number of e with c_e = 0.

Example: loads 6, 2, 0, 0 have mean 2, so the max violation is 2 and two experts are dead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from gspo_dist.config import MegatronConfig
from gspo_dist.learners.megatron.model import routers
from gspo_dist.metrics.stat import Stat
from gspo_dist.models.shape import ModelShape
from gspo_dist.types import PackedBatch


def start(chunks: list[Any], batches: Sequence[PackedBatch], config: MegatronConfig) -> None:
    """Clears the counts before a mini-batch. Collective over the data-parallel ranks with an auxiliary loss.

    The auxiliary loss gets the mini-batch's tokens over all those ranks.
    """
    found = routers(chunks)
    total = None
    if config.aux_loss_coef and found:
        total = torch.tensor(float(sum(b.num_tokens for b in batches)), device=found[0].load.device)
        dist.all_reduce(total, group=mpu.get_data_parallel_group())
    for router in found:
        router.load.zero_()
        router.aux_loss.zero_()
        if total is not None:
            router.aux_share = 1.0 / float(total)


@torch.no_grad()
def stats(chunks: list[Any], model: ModelShape) -> dict[str, Stat]:
    """Balance metrics of this stage's layers, on one rank of each stage.

    Elsewhere the dict is empty. Collective.
    """
    found = routers(chunks)
    if not found:
        return {}
    load = torch.stack([router.load for router in found])  # [layers, E]
    aux = torch.stack([router.aux_loss for router in found])  # [layers]
    group = mpu.get_tensor_and_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(load, group=group)
    dist.all_reduce(aux, group=group)
    if dist.get_rank(group):
        return {}
    mean = load.sum(1, keepdim=True) / model.num_experts
    # A mini-batch of fillers alone loads no expert: its violation is -1, not nan.
    violation = (load / mean.clamp(min=1e-9)).amax(1) - 1
    out = {
        "routing/max_violation": Stat.max(violation),
        "routing/mean_violation": Stat.mean(violation),
        "routing/dead_experts": Stat.sum((load == 0).sum(1).double()),
    }
    for router, counts, worst in zip(found, load, violation, strict=True):
        layer = router.layer_number - 1
        out[f"routing/layer_{layer}/max_violation"] = Stat.max(worst[None])
        out[f"routing/layer_{layer}/dead_experts"] = Stat.sum((counts == 0).sum().double())
        share = counts / counts.sum().clamp(min=1)
        out[f"routing/layer_{layer}/max_load_fraction"] = Stat.max(share)
        out[f"routing/layer_{layer}/min_load_fraction"] = Stat.min(share)
    if found[0].get_aux_loss_coeff("aux_loss"):
        out["routing/aux_loss"] = Stat.mean(aux)
    return out
