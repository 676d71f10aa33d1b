"""Layers of our own: chunks of context ranks, norm, attention, the counting router."""

from __future__ import annotations

import torch

from gspo_dist.learners.megatron.modules import RMSNorm, chunk_positions, local_rows, natural_order


def test_chunks_share_the_causal_work() -> None:
    assert chunk_positions(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert chunk_positions(8, 2, 1).tolist() == [2, 3, 4, 5]
    bounds = (0, 8, 12)
    gathered = torch.cat([local_rows(bounds, 2, r) for r in range(2)])
    assert torch.equal(gathered[natural_order(bounds, 2)], torch.arange(12))


def test_norm_is_the_formula() -> None:
    config = type("Config", (), {"params_dtype": torch.float32, "sequence_parallel": True})
    norm = RMSNorm(config, 4, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0]])
    scale = (25.0 / 4 + 1e-5) ** -0.5
    torch.testing.assert_close(norm(x), torch.tensor([[3.0, -8.0, 0.0, 0.0]]) * scale)
    assert norm.weight.sequence_parallel is True
