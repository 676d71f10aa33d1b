"""vLLM plug-in (entry point `vllm.general_plugins`): registers the weight-transfer engines of gspo_dist.

vLLM calls `register` in each of its processes, possibly more than once.
"""

from __future__ import annotations

BACKENDS = {"shm": ("gspo_shm", "ShmReceiver"), "nccl": ("gspo_nccl", "NcclReceiver")}
"""Transport -> name of the vLLM backend, class in `gspo_dist.rollout.vllm.receivers`."""


def register() -> None:
    """Adds the backends to vLLM's factory, by name: nothing is imported until an engine asks for one."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory

    for backend, class_name in BACKENDS.values():
        if backend not in Factory._registry:
            Factory.register_engine(backend, "gspo_dist.rollout.vllm.receivers", class_name)
