"""From `LearnerConfig` to DeepSpeed's own configuration. What cannot run is refused before any start."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from gspo_dist.config import LearnerConfig
from gspo_dist.learners.deepspeed.passed import WHERE, check_passed, merged
from gspo_dist.models.shape import ModelShape

AUTOEP_MODEL_TYPES = ("qwen3_moe", "qwen2_moe")
"""HF model types whose MoE blocks AutoEP replaces and whose experts the export names one by one."""


def import_deepspeed(device: str) -> ModuleType:
    """Imports deepspeed for `device`, quietly.

    DeepSpeed 0.19.8 picks its accelerator once, on import, by what is installed. The environment variable is
    the only way to say CPU.
    """
    os.environ["DS_ACCELERATOR"] = "cpu" if device == "cpu" else "cuda"
    deepspeed = importlib.import_module("deepspeed")
    if device == "cpu":
        # 0.19.8 asks oneDNN, which has fp16 kernels on the newest processors alone. torch computes it on all.
        importlib.import_module("deepspeed.accelerator").get_accelerator().is_fp16_supported = lambda: True
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On a CPU, 0.19.8 compiles a shared-memory all-reduce at the first init_distributed. It needs a
    # compiler and minutes, and two runs that build it together leave a library that does not load. gloo
    # needs none of it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ZeRO 3 calls collectives under names that torch 2.13 renamed, and says so at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def check(config: LearnerConfig, model: ModelShape, device: str) -> None:
    """Raises ValueError for settings that DeepSpeed cannot run for `model` on `device` ("cpu" or "cuda")."""
    ds = config.deepspeed
    on_gpu = device != "cpu"
    if ds.offload_optimizer and ds.zero_stage == 0:
        raise ValueError(
            "learner.deepspeed.offload_optimizer needs zero_stage 1 to 3: got 0; raise zero_stage"
        )
    if config.precision == "fp16" and ds.zero_stage == 0:
        raise ValueError(
            "learner.precision=fp16 needs learner.deepspeed.zero_stage 1 to 3: got 0, whose gradients would "
            "accumulate in fp16; raise zero_stage, or use bf16"
        )
    for name in ("offload_optimizer", "offload_params", "grouped_mm"):
        if getattr(ds, name) and not on_gpu:
            raise ValueError(
                f"learner.deepspeed.{name} needs a GPU host: got device {device!r}; set it to false"
            )
    if ds.grouped_mm and config.precision != "bf16":
        raise ValueError(
            f"learner.deepspeed.grouped_mm needs learner.precision=bf16: got {config.precision}; leave it "
            "null"
        )
    check_passed(ds)
    if ds.expert_parallel == 1:
        return
    if ds.zero_stage == 0:
        # Its clipping averages the ranks' norms, where the squares of the experts' shards
        # should sum (0.19.8).
        raise ValueError(
            "learner.deepspeed.expert_parallel needs zero_stage 1 to 3: got zero_stage 0 and expert_parallel "
            f"{ds.expert_parallel}; raise zero_stage or set expert_parallel=1"
        )
    if model.family not in AUTOEP_MODEL_TYPES:
        raise ValueError(
            f"learner.deepspeed.expert_parallel must be 1 for a {model.family} model: got "
            f"{ds.expert_parallel}; AutoEP serves {', '.join(AUTOEP_MODEL_TYPES)} here"
        )
    if model.num_experts % ds.expert_parallel:
        fits = [
            n
            for n in range(1, model.num_experts + 1)
            if model.num_experts % n == 0 and config.world_size % n == 0
        ]
        raise ValueError(
            f"learner.deepspeed.expert_parallel must divide num_experts: got {ds.expert_parallel} and "
            f"{model.num_experts}; try {', '.join(map(str, fits))}"
        )


def engine_config(
    config: LearnerConfig, model: ModelShape, *, trains: bool = True, device: str = "cpu"
) -> dict[str, Any]:
    """DeepSpeed's configuration for the policy's engine, or (`trains` False) for the frozen reference's.

    Accumulation is unmanaged: every `backward` adds and `step` is the boundary, so that mini-batches may hold
    any number of micro-batches. Gradients accumulate and travel in fp32 whatever the weights' precision.
    """
    ds, opt = config.deepspeed, config.optimizer
    # Stages 1 and 2 shard what a reference does not have (optimiser states, gradients).
    stage = ds.zero_stage if trains or ds.zero_stage == 3 else 0
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": config.world_size > 1 and stage >= 2}
    if ds.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if ds.offload_optimizer and trains:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    out: dict[str, Any] = {
        # DeepSpeed demands the two numbers; unmanaged accumulation uses neither.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
    # Below ZeRO 3 a reference has its precision from its weights alone. Told of it, 0.19.8 makes an optimiser
    # around it, with fp32 copies of all parameters, which cannot serve AutoEP's experts either.
    precision = config.precision if trains or stage == 3 else "fp32"
    if precision == "bf16":
        out["bf16"] = {"enabled": True}
        if stage > 0:  # stage 0 has no fp32 accumulation (0.19.8): its gradients accumulate in bf16
            out["data_types"] = {"grad_accum_dtype": "fp32"}
    if precision == "fp16":
        # A scale that DeepSpeed takes for constant: the learner sets it before every backward pass.
        out["fp16"] = {"enabled": True, "loss_scale": 1.0}
        out["data_types"] = {"grad_accum_dtype": "fp32"}
    if trains:
        # torch's AdamW, as in the eager learner. DeepSpeed's CPUAdam (compiled on first use) only where
        # states live in host memory, which is what it is for.
        kernel = {} if ds.offload_optimizer else {"torch_adam": True}
        out["optimizer"] = {
            "type": "AdamW",
            "params": {
                "lr": opt.lr,
                "betas": list(opt.betas),
                "eps": opt.eps,
                "weight_decay": opt.weight_decay,
                **kernel,
            },
        }
        # ZeRO 0 in fp32 has a bare torch optimiser, which the learner clips itself.
        out["gradient_clipping"] = opt.grad_clip if stage or config.precision != "fp32" else 0.0
    if ds.expert_parallel > 1:
        grouped = ds.grouped_mm
        if grouped is None:
            grouped = device != "cpu" and config.precision == "bf16"
        out["expert_parallel"] = autoep_section(ds.expert_parallel, grouped, model)
    passed = ds.config
    if not trains:  # a reference has no optimiser whose states could be anywhere
        passed = {
            key: {k: v for k, v in value.items() if k != "offload_optimizer"}
            if key == "zero_optimization"
            else value
            for key, value in passed.items()
        }
    return merged(out, passed)


def check_values(deepspeed: ModuleType, settings: dict[str, Any], passed: Mapping[str, Any]) -> None:
    """Has DeepSpeed read its configuration before it gets a model, for what is of a wrong type.

    Raises ValueError with the keys that were passed on and what DeepSpeed says of them.
    """
    try:
        deepspeed.DeepSpeedConfig(copy.deepcopy(settings))
    except (ValueError, TypeError, AssertionError) as error:
        if not passed:
            raise
        raise ValueError(f"DeepSpeed refuses {WHERE}={dict(passed)}: {error}") from error


def autoep_section(size: int, grouped_mm: bool, model: ModelShape) -> dict[str, Any]:
    """AutoEP for an HF model that sits in `PolicyModel` as `hf`, its experts over `size` ranks."""
    return {
        "enabled": True,
        "autoep_size": size,
        "preset_model": "qwen3_moe",  # names of Qwen3-MoE's modules, which Qwen2-MoE shares
        "moe_layer_pattern": r"hf\.model\.layers\.\d+\.mlp",
        "use_grouped_mm": grouped_mm,
        # The preset renormalises whatever the model says (0.19.8); Qwen2-MoE does not.
        "route_norm": model.renormalises_top_k,
    }
