"""Laws of the plug-in: vLLM knows our receivers by name, however often it asks."""

import importlib

from gspo_dist.rollout.vllm.plugin import BACKENDS, register


def test_every_transport_has_a_receiver_that_vllm_finds() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory

    register()
    register()
    receivers = importlib.import_module("gspo_dist.rollout.vllm.receivers")
    for backend, class_name in BACKENDS.values():
        assert Factory._registry[backend]() is getattr(receivers, class_name)
    assert {n for n in Factory._registry if n.startswith("gspo_")} == {"gspo_shm", "gspo_nccl"}
