"""The learner's operators for GPUs, as far as a CPU can tell: vLLM's kernels in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gspo_dist.learners.exact.gpu import _Joined, join
from gspo_dist.learners.exact.operators import Pages


@pytest.mark.slow
def test_kernels_give_the_plain_models_log_probs_and_gradient(tmp_path):
    """The interpreter's switch is read when Triton is first imported, so it is a process of its own."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("gpu_case.py")), str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.rsplit("RESULT ", 1)[1])
    assert not told["same"]  # other kernels
    assert told["quiet"]
    assert told["alone"]
    assert told["logprobs"] < 2e-5
    assert told["gradient"] < 1e-5
    assert "on a GPU knows LlamaForCausalLM" in told["refused"]
    assert "got GlmForCausalLM; set learner.consistency=off" in told["refused"]


def test_pages_hold_every_token_in_its_sequences_blocks():
    pages = Pages.of(torch.tensor([5, 3, 4], dtype=torch.int32), 4)
    assert pages.count == 4
    assert pages.table.tolist() == [[0, 1], [2, 0], [3, 0]]
    assert pages.borders.tolist() == [0, 5, 8, 12]
    assert pages.slots.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 12, 13, 14, 15]


def test_joined_layers_are_one_product_with_a_gradient_each(monkeypatch):
    asked = []

    def product(x, weight, bias):
        asked.append(tuple(weight.shape))
        return torch.nn.functional.linear(x, weight, bias) + 1  # told apart from torch's by one

    monkeypatch.setattr("gspo_dist.learners.exact.gpu.product", product)
    torch.manual_seed(0)
    parts = [torch.nn.Linear(3, n) for n in (4, 2, 2)]
    plain = [torch.nn.Linear(3, n) for n in (4, 2, 2)]
    for one, other in zip(parts, plain, strict=True):
        other.load_state_dict(one.state_dict())
    join(parts)
    for _ in range(2):  # a second pass computes anew
        x = torch.randn(5, 3, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        ours = torch.cat([part(x) for part in parts], dim=-1)
        theirs = torch.cat([part(y) for part in plain], dim=-1)
        torch.testing.assert_close(ours, theirs + 1, rtol=1e-6, atol=1e-6)  # a CPU's sums depend on the shape
        ours.square().sum().backward()
        (theirs + 1).square().sum().backward()
        assert torch.allclose(x.grad, y.grad)
    assert asked == [(8, 3), (8, 3)]
    for one, other in zip(parts, plain, strict=True):
        assert torch.allclose(one.weight.grad, other.weight.grad)
        assert torch.allclose(one.bias.grad, other.bias.grad)
    joined: _Joined = parts[0].exact_joined
    assert joined.x is None  # nothing of a pass is kept
