"""The layers that stand in for Transformer Engine's, by formulas written a second time, and the router."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.utils.checkpoint import checkpoint

from gspo_dist.config import MegatronConfig
from gspo_dist.learners.megatron.architecture import from_hf
from gspo_dist.learners.megatron.layout import check_layout
from gspo_dist.learners.megatron.model import transformer_config
from gspo_dist.learners.megatron.modules import (
    CountingRouter,
    PackedAttention,
    RMSNorm,
    chunk_positions,
    local_rows,
    natural_order,
)
from tests.unit.learners.megatron.qwen3 import QWEN3_30B

SMALL = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 16}


def test_chunks_share_the_causal_work() -> None:
    assert chunk_positions(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert chunk_positions(8, 2, 1).tolist() == [2, 3, 4, 5]
    assert local_rows((0, 8, 12), 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert local_rows((0, 8, 12), 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert local_rows((0, 3), 1, 0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_a_gather_is_put_back_in_order(cp: int) -> None:
    bounds = (0, 12, 24, 48)
    gathered = torch.cat([local_rows(bounds, cp, rank) for rank in range(cp)])
    assert torch.equal(gathered[natural_order(bounds, cp)], torch.arange(48))


def test_norm_is_the_formula() -> None:
    config = type("Config", (), {"params_dtype": torch.float32, "sequence_parallel": True})
    norm = RMSNorm(config, 4, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0]])
    scale = (25.0 / 4 + 1e-5) ** -0.5
    torch.testing.assert_close(norm(x), torch.tensor([[3.0, -8.0, 0.0, 0.0]]) * scale)
    assert norm.weight.sequence_parallel is True


def test_the_norms_mean_is_taken_in_fp32() -> None:
    """Squares of 256 and of 255 times 16: bf16 has 8 bits, so a sum in it would stop growing."""
    config = SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=False)
    x = torch.tensor([[256.0] + [16.0] * 255]).bfloat16()
    got = RMSNorm(config, 256, eps=0.0)(x)
    want = x.double() / x.double().pow(2).mean().sqrt()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=0)


def test_packed_attention_is_causal_within_each_sequence() -> None:
    """Four query heads in two groups, by a softmax of its own per sequence and head in float64."""
    torch.manual_seed(0)
    attention = PackedAttention(SimpleNamespace(context_parallel_size=1), SimpleNamespace(cp=None), 0.3)
    query, key, value = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    got = attention(query, key, value, None, packed_seq_params=SimpleNamespace(cu_seqlens_q_padded=bounds))
    want = torch.zeros(7, 4, 8, dtype=torch.float64)
    for start, end in ((0, 3), (3, 7)):
        for head in range(4):
            for row in range(start, end):
                seen = slice(start, row + 1)
                scores = key[seen, head // 2].double() @ query[row, head].double() * 0.3
                want[row, head] = scores.softmax(0) @ value[seen, head // 2].double()
    torch.testing.assert_close(got.double(), want.flatten(1), rtol=1e-5, atol=1e-6)


def make_router(**knobs: object) -> CountingRouter:
    model = from_hf(QWEN3_30B | SMALL | {"num_attention_heads": 4, "norm_topk_prob": knobs.pop("norm", True)})
    megatron = MegatronConfig(**knobs)
    config = transformer_config(model, check_layout(megatron, model, 1), megatron, "fp32", gpu=False)
    torch.manual_seed(0)
    router = CountingRouter(config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(1)
    with torch.no_grad():
        router.weight.normal_()
    return router


def test_a_load_counts_each_token_once_in_training_and_no_padding(one_rank: None) -> None:
    router = make_router()
    x = torch.randn(6, 1, 16, requires_grad=True)
    padding = torch.tensor([[False, False, False, False, True, True]])
    logits = x.detach().reshape(6, 16) @ router.weight.detach().T
    counts = torch.bincount(logits[:4].topk(2).indices.flatten(), minlength=4).float()
    with torch.no_grad():
        router(x, padding)
    assert router.load.tolist() == [0.0] * 4
    router(x, padding)
    assert torch.equal(router.load, counts)
    router.load.zero_()
    probs = checkpoint(lambda y: router(y, padding)[0], x, use_reentrant=True)
    assert router.load.tolist() == [0.0] * 4  # counted when the backward runs it again
    probs.sum().backward()
    assert torch.equal(router.load, counts)


@pytest.mark.parametrize("norm", [True, False])
def test_the_expert_bias_moves_the_choice_and_never_the_gate(one_rank: None, norm: bool) -> None:
    """A bias of 2 on expert 3 makes every token choose it; gates are the softmax of the logits alone."""
    router = make_router(expert_bias=True, norm=norm)
    x = torch.randn(6, 1, 16)
    logits = (x.reshape(6, 16) @ router.weight.T).detach()
    with torch.no_grad():
        plain, chosen = router(x)
        assert torch.equal(chosen, torch.zeros(6, 4).bool().scatter(1, logits.topk(2).indices, True))
        router.expert_bias[3] = 2.0
        probs, chosen = router(x)
    assert chosen[:, 3].all()
    assert chosen.sum(1).tolist() == [2] * 6
    softmax = logits.double().softmax(-1)
    want = torch.where(chosen, softmax, 0.0)
    if norm:
        want = want / want.sum(1, keepdim=True)
    torch.testing.assert_close(probs.double(), want, rtol=1e-5, atol=1e-6)
    assert not torch.equal(plain, probs)


def test_the_auxiliary_loss_is_the_switch_loss_by_its_share_of_the_tokens(one_rank: None) -> None:
    """E sum_e f_e P_e of 6 tokens, times 6 of the mini-batch's 24 tokens."""
    router = make_router(aux_loss_coef=0.5)
    router.aux_share = 1 / 24
    x = torch.randn(6, 1, 16)
    logits = x.reshape(6, 16) @ router.weight.T
    probs = logits.detach().softmax(-1)
    fraction = torch.bincount(probs.topk(2).indices.flatten(), minlength=4) / 12
    want = 4 * float((fraction * probs.mean(0)).sum()) * 6 / 24
    router(x)
    assert float(router.aux_loss) == pytest.approx(want, rel=1e-5)
