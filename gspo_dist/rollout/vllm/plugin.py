"""The vLLM plug-in (entry point `vllm.general_plugins`): tells vLLM of the receiver of a weight sync, and
mends its rotary embedding and its router on CPUs.
"""

from __future__ import annotations

import functools
from typing import Any

BACKEND = "gspo"
"""vLLM's name of the receiver. It serves every transport, because which one is known only later, when the
actors are placed."""


def register() -> None:
    """Adds the receiver to vLLM's factory by name, so that nothing is imported until an engine asks for it.
    On a CPU, mends the rotary embedding and the router.

    vLLM calls it in each of its processes, possibly more than once; a second call does nothing.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory

    if BACKEND not in Factory._registry:
        Factory.register_engine(BACKEND, "gspo_dist.rollout.vllm.receivers", "Receiver")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        mend_cpu_rotary()
        mend_cpu_router()


def mend_cpu_rotary() -> None:
    """Lets torch rotate heads that are given as [T, heads, d], as DeepSeek's attention gives slices of them.

    The CPU kernel of vllm 0.30.0 takes [T, heads x d] only. It reads any other shape as one head and rotates
    the wrong rows, in silence: log-probs of a DeepSeek-V3 without YaRN are off by tenths of a nat. With YaRN
    vLLM has another class, which has no CPU kernel and is right.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    kernel = RotaryEmbedding.forward_cpu
    if hasattr(kernel, "__wrapped__"):
        return

    @functools.wraps(kernel)
    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        if query.dim() > 2:
            return self.forward_native(positions, query, key)
        return kernel(self, positions, query, key)

    RotaryEmbedding.forward_cpu = forward_cpu


def mend_cpu_router() -> None:
    """Lets routers without groups choose by the bias that the model gives them, as Ernie 4.5's do.

    The CPU router of vllm 0.30.0 reads `e_score_correction_bias` where experts come in groups. Without groups
    it takes the largest logits, in silence: log-probs of an ernie4_5_moe are off by 1.2 nats. All experts in
    one group are the same rule with the bias. vLLM's other routers, those of GPUs, have it.
    """
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    make = CPURouter.__init__
    if hasattr(make, "__wrapped__"):
        return

    @functools.wraps(make)
    def init(self: Any, *args: Any, **settings: Any) -> None:
        make(self, *args, **settings)
        plain = not self.use_grouped_topk and self.custom_routing_function is None
        if plain and self.e_score_correction_bias is not None and self.scoring_func == "softmax":
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1

    CPURouter.__init__ = init
