"""The vLLM plug-in (entry point `vllm.general_plugins`): tells vLLM of the receiver of a weight sync."""

from __future__ import annotations

BACKEND = "gspo"
"""vLLM's name of the receiver. It serves every transport, because which one is known only later, when the
actors are placed."""


def register() -> None:
    """Adds the receiver to vLLM's factory by name, so that nothing is imported until an engine asks for it.

    vLLM calls it in each of its processes, possibly more than once; a second call does nothing.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory

    if BACKEND not in Factory._registry:
        Factory.register_engine(BACKEND, "gspo_dist.rollout.vllm.receivers", "Receiver")
