"""What of the sampler needs no engine: its buffers and its arithmetic."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gspo_dist.rollout.vllm import sampler
from gspo_dist.rollout.vllm.sampler import KeyedSampler


def test_the_sampler_can_sample_for_a_score_before_any_generation() -> None:
    """Its buffers are on the runner's device from the start: an engine's first work may be a probe."""
    keyed = KeyedSampler(SimpleNamespace(device=torch.device("meta")))
    assert keyed.tokens.device.type == keyed.logprobs.device.type == "meta"


@pytest.mark.parametrize("rows", [1, 5, 9, 10, 23])
def test_prompt_logprobs_in_blocks_are_the_tempered_log_softmax(rows, monkeypatch) -> None:
    monkeypatch.setattr(sampler, "PROMPT_ROWS", 5)
    keyed = KeyedSampler(SimpleNamespace(device=torch.device("cpu")))
    keyed.prompt_temperature = 0.7
    logits = torch.randn(rows, 17, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
    wanted = (logits.double() / 0.7).log_softmax(-1)
    got = keyed.compute_logprobs(logits)
    assert got.dtype == torch.float32
    assert got.shape == logits.shape
    assert (got.double() - wanted).abs().max() < 1e-5
