"""One rank in this process, for what needs megatron's groups but no stand-ins."""

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu


@pytest.fixture
def one_rank(monkeypatch, tmp_path):
    """The default group and megatron's groups of a single gloo rank."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    # Undefined without Transformer Engine. `cpu_shim` sets it in a learner's process.
    monkeypatch.setattr("megatron.core.transformer.moe.moe_utils.te_general_gemm", None, raising=False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    mpu.initialize_model_parallel(create_gloo_process_groups=False)
    yield
    mpu.destroy_model_parallel()
    dist.destroy_process_group()
