"""Runs on a host of its own, for test_tensor_parallel.py: an engine of two workers on a CPU.

python tp_engine.py FOLDER      writes what it saw to FOLDER/seen.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch

sys.path.insert(0, str(Path(__file__).parent))
from vllm_case import hf_logprobs, make_model

from gspo_dist.actors.rollout_pool import RayRolloutPool
from gspo_dist.config import RolloutConfig
from gspo_dist.weights.names import hf_named_weights
from gspo_dist.weights.send import make_transport, send_weights
from gspo_dist.weights.stream import buckets
from gspo_dist.weights.verify import verify_receipt

CONFIG = RolloutConfig(
    tensor_parallel=2, precision="fp32", max_prompt_tokens=16, max_completion_tokens=16, max_num_seqs=4,
    kv_cache_gib=0.1, enforce_eager=True,
)  # fmt: skip
IDS = [np.array([5, 9, 300, 4, 17, 2, 8])]


def names() -> list[str]:
    """What of vLLM's has a name in this host's shared memory."""
    return sorted(name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "vllm_")))


def workers() -> list[psutil.Process]:
    """vLLM's worker processes on this host."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if "VLLM::Worker" in " ".join(process.info["cmdline"] or ())]


def publish(model: torch.nn.Module, handle: Any) -> None:
    """Experts as stacks that no bucket holds whole, so that both workers cut their rows out of parts."""
    transport = make_transport("shm")
    ray.get([handle.init_weight_sync.remote(transport.init_info(0)), handle.start_weight_update.remote()])
    stream = buckets(hf_named_weights(model, slice_bytes=1 << 14, stacked=True), 1 << 14)
    report = send_weights(stream, transport, lambda info: ray.get(handle.update_weights.remote(info)))
    verify_receipt(report.checksums, ray.get(handle.finish_weight_update.remote(1)), 1)


def main(folder: Path) -> None:
    # vllm 0.30.0's CPU kernel pads a worker's share of an expert to 32 rows at first load, and its reload
    # then refuses a share without the padding.
    model = make_model(folder / "model", expert_rows=64)
    ray.init(address="local", num_cpus=2, log_to_driver=False, object_store_memory=80_000_000)

    def make(name: str) -> Any:
        from gspo_dist.rollout.vllm.engine import VllmEngine

        return VllmEngine(CONFIG, folder / "model", name=name, threads=1)

    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}}
    pool = RayRolloutPool(CONFIG, make, [{"num_cpus": 0, "runtime_env": environment}], folder / "logs")
    seen: dict[str, Any] = {"workers": pool.start().workers, "names while it runs": names()}
    seen["processes"] = len(workers())

    def gap() -> float:
        (ours,) = pool.logprobs_of(IDS, timeout=60)["engine-0"]
        return float(np.abs(ours - hf_logprobs(model, IDS[0])).max())

    seen["gap"] = gap()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    seen["moved"] = gap()
    publish(model, pool.engines["engine-0"])
    seen["gap after a sync"] = gap()
    running = workers()
    running[-1].kill()
    try:
        ray.get(pool.engines["engine-0"].logprobs_of.remote(IDS))
    except ray.exceptions.RayTaskError as error:
        seen["says of a worker that was killed"] = str(error.cause)
    pool.close()
    psutil.wait_procs(running, timeout=5)
    seen["names after its end"], seen["processes after its end"] = names(), len(workers())
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
