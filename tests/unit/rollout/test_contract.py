"""The reference engine keeps the laws of every engine's verbs (contract.py)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from gspo_dist.config import RolloutConfig
from gspo_dist.rollout.policy import HFPolicy
from gspo_dist.rollout.reference import ReferenceEngine
from gspo_dist.weights.names import hf_named_weights
from gspo_dist.weights.send import send_weights
from gspo_dist.weights.shm import ShmTransport
from gspo_dist.weights.stream import buckets
from tests.unit.rollout.contract import Contract
from tests.unit.weights.tiny_models import make


@pytest.mark.slow
def test_the_reference_engine_keeps_the_contract(tmp_path):
    first = make(tmp_path, seed=0, vocab_size=64).eval()
    second = copy.deepcopy(first)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    policies = []
    for model in (first, second):
        policy = HFPolicy(tmp_path)
        policy.load(list(hf_named_weights(model)))
        policies.append(policy)

    def publish(engine, policy, version):
        transport = ShmTransport(folder=tmp_path)
        engine.init_weight_sync(transport.init_info(0))
        engine.start_weight_update()
        weights = list(buckets(hf_named_weights((first, second)[policy]), 1 << 12))
        assert len(weights) > 3
        half = weights[: len(weights) // 2] if version is None else weights
        send_weights(iter(half), transport, engine.update_weights)
        if version is not None:
            engine.finish_weight_update(version)

    def logprobs(policy, ids):
        table = torch.from_numpy(policies[policy].all_logits(ids)).double().log_softmax(-1)
        return table[:-1].gather(1, torch.from_numpy(ids[1:, None]))[:, 0].numpy()

    config = RolloutConfig(precision="fp32", max_prompt_tokens=64, max_completion_tokens=20)
    Contract(
        [ReferenceEngine(config, HFPolicy(tmp_path), record_routing=True) for _ in range(2)],
        publish,
        logprobs,
        lambda policy, ids: np.sort(policies[policy].routes(ids), axis=-1),
        lambda engine: engine.rows == [],
    ).check_all()
