"""The stand-ins for CUDA."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gspo_dist.learners.megatron import cpu_shim


def test_stand_ins_stay_away_from_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.cuda.Stream, torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cpu_shim.install()
    assert (torch.cuda.Stream, torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device) == before


def test_factories_read_cuda_as_the_cpu_and_all_else_is_torchs_own() -> None:
    torch_on_cpu = cpu_shim._TorchOnCpu("torch")
    assert torch_on_cpu.zeros(2, device="cuda").tolist() == [0.0, 0.0]
    assert torch_on_cpu.tensor([3], device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch_on_cpu.full((1,), 2.0, device="meta").device.type == "meta"
    assert torch_on_cpu.distributed is torch.distributed


@pytest.mark.slow
def test_stand_ins_hold_for_the_whole_process_and_may_be_installed_again() -> None:
    """In a process of its own, because nothing takes them back."""
    code = (
        "import torch\n"
        "from gspo_dist.learners.megatron import cpu_shim\n"
        "cpu_shim.install()\n"
        "kept = torch.Tensor.type\n"
        "cpu_shim.install()\n"
        "x = torch.zeros(2)\n"
        "assert torch.Tensor.type is kept\n"
        "assert torch.cuda.current_device() == torch.device('cpu')\n"
        "assert x.cuda() is x and torch.nn.Linear(1, 1).cuda().weight.device.type == 'cpu'\n"
        "assert x.type() == 'torch.cuda.FloatTensor' and x.type(torch.int64).dtype == torch.int64\n"
        "assert torch.cuda.Stream().query() and torch.cuda.Event().record() is None\n"
        "from megatron.core.optimizer.clip_grads import get_grad_norm_fp32\n"
        "gloo = {'store': torch.distributed.HashStore(), 'rank': 0, 'world_size': 1}\n"
        "torch.distributed.init_process_group('gloo', **gloo)\n"
        "large = torch.randn(2_560_000)\n"
        "error = get_grad_norm_fp32([large, large]) / float((2 * large.double()**2).sum() ** 0.5) - 1\n"
        "assert abs(error) < 1e-6, error\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
