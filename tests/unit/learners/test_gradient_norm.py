"""The norm of large tensors on a CPU, where torch's own is off by more than a thousandth."""

from __future__ import annotations

import pytest
import torch

from gspo_dist.learners.gradient_norm import PIECE, WHOLE, tensor_norm, total_norm


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_a_vocabularys_norm_is_that_of_float64() -> None:
    table = normal(20_000, 576)
    wanted = float(table.double().norm())
    assert abs(float(torch.linalg.vector_norm(table)) / wanted - 1) > 1e-4  # what it is for
    assert float(tensor_norm(table)) == pytest.approx(wanted, rel=1e-6)
    assert float(tensor_norm(table.T)) == pytest.approx(wanted, rel=1e-6)  # not contiguous
    both = float(torch.tensor([wanted, 3.0 * 4096], dtype=torch.float64).norm())
    assert float(total_norm([table, torch.full((4096, 4096), 3.0)])) == pytest.approx(both, rel=1e-6)


@pytest.mark.parametrize("count", [0, 1, PIECE, WHOLE])
def test_small_tensors_have_torchs_own_to_the_bit(count) -> None:
    tensor = normal(count)
    assert float(tensor_norm(tensor)) == float(torch.linalg.vector_norm(tensor))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_seen_in_any_piece(value) -> None:
    tensor = normal(WHOLE + 3)
    tensor[-1] = value
    assert not torch.isfinite(total_norm([normal(3), tensor]))
