"""The vLLM plug-in (entry point `vllm.general_plugins`): tells vLLM of the receivers of a weight sync."""

from __future__ import annotations

BACKENDS = {"shm": ("gspo_shm", "ShmReceiver"), "nccl": ("gspo_nccl", "NcclReceiver")}
"""Transport -> vLLM's name of the backend, class in `receivers`."""


def register() -> None:
    """Adds the receivers to vLLM's factory by name, so that nothing is imported until an engine asks for one.

    vLLM calls it in each of its processes, possibly more than once; a second call does nothing.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory

    for backend, class_name in BACKENDS.values():
        if backend not in Factory._registry:
            Factory.register_engine(backend, "gspo_dist.rollout.vllm.receivers", class_name)
