"""A host with GPUs has Transformer Engine, and its processes without one must not use it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gspo_dist.learners import megatron

FUSED = """class FusedAdam:
    def __init__(self, *a, **k): raise RuntimeError("No CUDA GPUs are available")
FusedSGD = multi_tensor_applier = multi_tensor_l2norm = multi_tensor_scale = FusedAdam
"""
PROGRAM = """import importlib.util
import transformer_engine.pytorch.optimizers  # as another library may
assert importlib.util.find_spec("transformer_engine") is not None
import gspo_dist.learners.megatron.optimizer
import megatron.core.optimizer as found
print(found.Adam.__module__, found.USING_PYTORCH_OPTIMIZER)
"""


@pytest.fixture
def engine(tmp_path):
    """A package of Transformer Engine's name, whose optimisers fail where there is no GPU."""
    inner = tmp_path / "transformer_engine" / "pytorch"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text('__version__ = "2.11.0"\n')
    (inner / "__init__.py").write_text("")
    (inner / "optimizers.py").write_text(FUSED)
    return tmp_path


@pytest.mark.slow
def test_without_a_gpu_megatron_has_torch_s_adam_though_transformer_engine_is_installed(engine) -> None:
    path = os.pathsep.join([str(engine), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "torch.optim.adamw True"


def test_with_a_gpu_they_stay(engine, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(engine))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    megatron.hide_gpu_packages()
    assert sys.modules.get("transformer_engine", ...) is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "transformer_engine", torch)  # undone after the test
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", torch)
    megatron.hide_gpu_packages()
    assert sys.modules["transformer_engine"] is None
    assert sys.modules["transformer_engine.pytorch"] is None
