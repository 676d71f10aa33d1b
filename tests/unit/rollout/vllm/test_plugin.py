"""Laws of the plug-in: vLLM knows our receivers by name, however often it asks."""

import importlib

from gspo_dist.rollout.vllm.plugin import BACKEND, register


def test_vllm_finds_the_receiver() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory

    register()
    register()
    receivers = importlib.import_module("gspo_dist.rollout.vllm.receivers")
    assert Factory._registry[BACKEND]() is receivers.Receiver
    assert [n for n in Factory._registry if n.startswith("gspo")] == [BACKEND]
