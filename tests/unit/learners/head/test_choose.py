"""Which passes a head runs with, by the name that is asked for and by where its tensors lie."""

from __future__ import annotations

import pytest
import torch

from gspo_dist.learners.head.choose import IMPLEMENTATIONS, choose_passes
from gspo_dist.learners.head.logprobs import taken_logprobs
from gspo_dist.learners.head.passes import Chunked, Compiled

HIDDEN = torch.zeros(2, 3)


def test_auto_on_a_cpu_is_plain_torch():
    assert isinstance(choose_passes("auto", HIDDEN, torch.float32), Chunked)


def test_only_logits_narrower_than_the_sums_are_copied():
    assert choose_passes("chunked", HIDDEN, torch.float32).merge_destroys
    assert not choose_passes("chunked", HIDDEN.bfloat16(), torch.bfloat16).merge_destroys
    assert choose_passes("chunked", HIDDEN.bfloat16(), torch.float32).merge_destroys


def test_a_cap_is_not_for_triton():
    with pytest.raises(ValueError, match="no soft cap"):
        choose_passes("triton", HIDDEN, torch.float32, capped=True)


def test_the_compiled_passes_are_made_once():
    first = choose_passes("compiled", HIDDEN, torch.float32)
    assert isinstance(first, Compiled)
    assert choose_passes("compiled", HIDDEN.double(), torch.float64) is first


def test_a_name_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(ValueError, match=r"one of auto, chunked, compiled, triton: got 'liger'"):
        choose_passes("liger", HIDDEN, torch.float32)


def test_every_implementation_is_documented():
    assert all(name in taken_logprobs.__doc__ for name in IMPLEMENTATIONS)
