"""The stand-ins for CUDA."""

from __future__ import annotations

import pytest
import torch

from gspo_dist.learners.megatron import cpu_shim


def test_stand_ins_stay_away_from_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.cuda.Stream, torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cpu_shim.install()
    assert (torch.cuda.Stream, torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device) == before
