"""Balance metrics by hand, on routers of one rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from gspo_dist.config import MegatronConfig
from gspo_dist.learners.megatron import balance
from gspo_dist.learners.megatron.architecture import from_hf
from gspo_dist.learners.megatron.layout import check_layout
from gspo_dist.learners.megatron.model import transformer_config
from gspo_dist.learners.megatron.modules import CountingRouter
from gspo_dist.metrics.stat import results
from tests.unit.learners.megatron.qwen3 import QWEN3_30B

SMALL = {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0, 2]}
MODEL = from_hf(QWEN3_30B | SMALL | {"hidden_size": 16, "num_attention_heads": 4})


def make_chunk(**knobs: object) -> nn.Module:
    """Routers of the layers 1 and 3 of a model of four layers."""
    megatron = MegatronConfig(**knobs)
    config = transformer_config(MODEL, check_layout(megatron, MODEL, 1), megatron, "fp32", gpu=False)
    chunk = nn.Module()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunk.routers = nn.ModuleList([CountingRouter(config, pg_collection=groups) for _ in range(2)])
    for router, number in zip(chunk.routers, (2, 4), strict=True):
        router.set_layer_number(number)
    return chunk


def test_loads_become_violations_dead_experts_and_shares(one_rank: None) -> None:
    """Loads 6 2 0 0 have mean 2, so violation 2 and two dead experts; loads 4 4 4 4 are balanced."""
    chunk = make_chunk()
    balance.start([chunk], [], MegatronConfig())
    for router, load in zip(chunk.routers, ([6.0, 2.0, 0.0, 0.0], [4.0] * 4), strict=True):
        router.load += torch.tensor(load)
    assert results(balance.stats([chunk], MODEL)) == {
        "routing/max_violation": 2.0,
        "routing/mean_violation": 1.0,
        "routing/dead_experts": 2.0,
        "routing/layer_1/max_violation": 2.0,
        "routing/layer_1/dead_experts": 2.0,
        "routing/layer_1/max_load_fraction": 0.75,
        "routing/layer_1/min_load_fraction": 0.0,
        "routing/layer_3/max_violation": 0.0,
        "routing/layer_3/dead_experts": 0.0,
        "routing/layer_3/max_load_fraction": 0.25,
        "routing/layer_3/min_load_fraction": 0.25,
    }


def test_every_mini_batch_is_counted_anew(one_rank: None) -> None:
    chunk = make_chunk(aux_loss_coef=0.5)
    for router in chunk.routers:
        router.load += 7.0
        router.aux_loss += 3.0
    batches = [SimpleNamespace(num_tokens=30), SimpleNamespace(num_tokens=10)]
    balance.start([chunk], batches, MegatronConfig(aux_loss_coef=0.5))
    for router in chunk.routers:
        assert router.load.tolist() == [0.0] * 4
        assert float(router.aux_loss) == 0.0
        assert router.aux_share == pytest.approx(1 / 40)


def test_the_auxiliary_loss_is_the_mean_of_the_layers(one_rank: None) -> None:
    chunk = make_chunk(aux_loss_coef=0.5)
    balance.start([chunk], [SimpleNamespace(num_tokens=8)], MegatronConfig(aux_loss_coef=0.5))
    for router, loss in zip(chunk.routers, (1.5, 2.5), strict=True):
        router.aux_loss += loss
    assert results(balance.stats([chunk], MODEL))["routing/aux_loss"] == 2.0


def test_a_mini_batch_without_tokens_divides_by_nothing(one_rank: None) -> None:
    chunk = make_chunk()
    numbers = results(balance.stats([chunk], MODEL))
    assert numbers["routing/max_violation"] == -1.0
    assert numbers["routing/dead_experts"] == 8.0
    assert numbers["routing/layer_1/max_load_fraction"] == 0.0


def test_a_stage_without_experts_has_no_metrics(one_rank: None) -> None:
    assert balance.stats([nn.Linear(2, 2)], MODEL) == {}
