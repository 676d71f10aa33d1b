"""Laws of the plug-in: vLLM knows our receivers by name, however often it asks."""

import importlib

import pytest
import torch

from gspo_dist.rollout.vllm.plugin import BACKEND, mend_cpu_rotary, register


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
