"""Where a learner's rank stands in each of the ways to share the work, for who reads a log.

Megatron-core numbers ranks twice: tensor, context, data, pipeline for the dense weights, and expert tensor,
expert, expert data, pipeline for the experts, the first of them fastest. DeepSpeed's expert groups are
consecutive ranks.

Example: 16 ranks with tensor 2, pipeline 2 and expert 4. Rank 13 is 13 = 1 + 2 (2 + 4 x 1): tensor 1, replica
2, pipeline 1. Among the experts it is 13 = 1 + 4 (1 + 2 x 1): expert 1.
"""

from __future__ import annotations

from gspo_dist.config import LearnerConfig


def coordinates(config: LearnerConfig, rank: int) -> dict[str, int]:
    """The rank's replica, and its place in each parallelism that the layout has."""
    if config.backend != "megatron":
        expert = config.deepspeed.expert_parallel if config.backend == "deepspeed" else 1
        return {"replica": rank} | ({"expert": rank % expert} if expert > 1 else {})
    layout = config.megatron
    dense = {
        "tensor": layout.tensor_parallel,
        "context": layout.context_parallel,
        "replica": config.data_parallel,
        "pipeline": layout.pipeline_parallel,
    }
    experts = {"expert_tensor": layout.expert_tensor_parallel, "expert": layout.expert_parallel}
    sizes = dense | experts
    found = _digits(rank, dense) | _digits(rank, experts)
    return {name: at for name, at in found.items() if name == "replica" or sizes[name] > 1}


def _digits(number: int, sizes: dict[str, int]) -> dict[str, int]:
    """The number's digits where each place has a base of its own, the lowest place first."""
    digits = {}
    for name, size in sizes.items():
        number, digits[name] = divmod(number, size)
    return digits
