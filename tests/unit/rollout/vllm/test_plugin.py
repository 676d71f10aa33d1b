"""Laws of the plug-in: vLLM knows our receivers by name, however often it asks."""

import importlib

import pytest
import torch

from gspo_dist.rollout.vllm.plugin import BACKEND, mend_cpu_rotary, mend_cpu_router, register


def test_vllm_finds_the_receiver() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory

    register()
    register()
    receivers = importlib.import_module("gspo_dist.rollout.vllm.receivers")
    assert Factory._registry[BACKEND]() is receivers.Receiver
    assert [n for n in Factory._registry if n.startswith("gspo")] == [BACKEND]


@pytest.mark.parametrize("interleaved", [True, False])
def test_heads_given_one_by_one_are_rotated_by_the_angle_of_their_position(interleaved) -> None:
    """Pair i of a head at position t, as a complex number, is turned by t / 10000^(2 i / d). Unmended,
    the CPU kernel of vllm 0.30.0 turns other rows."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    mend_cpu_rotary()
    mend_cpu_rotary()  # twice is once
    with set_current_vllm_config(VllmConfig()):
        rotary = RotaryEmbedding(8, 8, 64, 10000.0, not interleaved, torch.float32)
    wide = torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 7, 3])
    angles = positions[:, None] / 10000.0 ** (torch.arange(4) * 2 / 8)
    heads = wide[..., 4:]
    pairs = (heads[..., 0::2], heads[..., 1::2]) if interleaved else heads.chunk(2, dim=-1)
    turned = torch.complex(*pairs) * torch.polar(torch.ones_like(angles), angles)[:, None]
    parts = [turned.real, turned.imag]
    want = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    flat, _ = rotary.forward_cpu(positions, heads.reshape(5, 24).clone(), torch.zeros(5, 8))
    got, key = rotary.forward_cpu(positions, wide.clone()[..., 4:], wide.clone()[:, :1, 4:])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(key, want[:, :1], rtol=0, atol=1e-6)
    torch.testing.assert_close(flat.view(5, 3, 8), want, rtol=0, atol=1e-6)


def test_a_router_without_groups_chooses_by_its_bias_and_weighs_without_it() -> None:
    """Logits 0, 1, 2, 3 and a bias of 1 for expert 0: it is chosen with expert 3, and their softmax is
    1 / (1 + e^3) and e^3 / (1 + e^3). Unmended, the CPU router of vllm 0.30.0 takes experts 2 and 3."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    mend_cpu_router()
    mend_cpu_router()  # twice is once
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])

    def chosen(**settings) -> dict[int, float]:
        weights, ids = CPURouter(2, 4, **settings)._compute_routing(logits, logits, None)
        return dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))

    share = 1 / (1 + torch.e**3)
    biased = chosen(e_score_correction_bias=torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert biased == pytest.approx({0: share, 3: 1 - share})
    plain = 1 / (1 + torch.e)
    assert chosen() == pytest.approx({2: plain, 3: 1 - plain})
