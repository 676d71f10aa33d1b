"""megatron-core's DistributedDataParallel and optimiser. With `cpu_shim` they run on a CPU too."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from gspo_dist.config import LearnerConfig, OptimizerConfig
from gspo_dist.learners.megatron.model import DTYPES, naming
from gspo_dist.learners.schedule import set_groups


def ddp_config(config: LearnerConfig) -> DistributedDataParallelConfig:
    """megatron-core's config of its gradient buffers. ValueError for what it refuses of the user's keys."""
    megatron = config.megatron
    settings: dict[str, Any] = {
        "grad_reduce_in_fp32": True,
        "overlap_grad_reduce": megatron.overlap_grad_reduce,
        "overlap_param_gather": megatron.overlap_param_gather,
        "use_distributed_optimizer": megatron.distributed_optimizer,
        "check_for_nan_in_grad": False,  # optim_step skips a norm that is not finite
        "average_in_collective": False,
    }
    with naming("learner.megatron.ddp", megatron.ddp):
        return DistributedDataParallelConfig(**(settings | megatron.ddp))


def wrap(chunks: list[Any], transformer: Any, config: LearnerConfig) -> list[DistributedDataParallel]:
    """One DDP per chunk, which keeps and sums gradients in fp32 buffers."""
    ddp = ddp_config(config)
    # Only the first chunk's reductions can hide behind a backward pass that still runs.
    return [
        DistributedDataParallel(transformer, ddp, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]


def optimizer_config(config: LearnerConfig) -> MegatronOptimizerConfig:
    """AdamW as the other learners run it, with one weight decay for all parameters.

    Master weights and moments are fp32. The moments are bf16 with precision_aware_optimizer,
    unless they are offloaded. ValueError for what megatron-core refuses of the user's keys.
    """
    knobs, megatron = config.optimizer, config.megatron
    lower = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
    settings: dict[str, Any] = dict(
        optimizer="adam",
        lr=knobs.lr,
        min_lr=0.0,
        weight_decay=knobs.weight_decay,
        adam_beta1=knobs.betas[0],
        adam_beta2=knobs.betas[1],
        adam_eps=knobs.eps,
        clip_grad=knobs.grad_clip,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        # Constant: the learner scales and unscales (loss_scale.py). 0.16.1 has a scale for dense and one for
        # expert parameters, which part ways when only one of them overflows.
        loss_scale=1.0,
        params_dtype=DTYPES[config.precision],
        use_distributed_optimizer=megatron.distributed_optimizer,
        overlap_param_gather=megatron.overlap_param_gather,
        # 0.16.1 offloads master weights on this path only. On the other it offloads the moments alone,
        # and resuming fails.
        use_precision_aware_optimizer=megatron.precision_aware_optimizer or megatron.optimizer_cpu_offload,
        # Master weights are whole fp32: 0.16.1 saves 16-bit remainders as if they were weights, and
        # cannot load them.
        store_param_remainders=False,
        optimizer_cpu_offload=megatron.optimizer_cpu_offload,
        optimizer_offload_fraction=1.0 if megatron.optimizer_cpu_offload else 0.0,
        overlap_cpu_optimizer_d2h_h2d=megatron.optimizer_cpu_offload,
        **(lower if megatron.precision_aware_optimizer and not megatron.optimizer_cpu_offload else {}),
    )
    passed = {
        key: getattr(torch, v) if key.endswith("_dtype") else v for key, v in megatron.optimizer.items()
    }
    with naming("learner.megatron.optimizer", megatron.optimizer):
        return MegatronOptimizerConfig(**(settings | passed))


def build_optimizer(chunks: list[DistributedDataParallel], config: LearnerConfig) -> Any:
    """Megatron's optimiser: one for dense and one for expert parameters, chained, with one gradient norm."""
    # An empty mapping, because None means no weight decay on norms, and the other learners decay them.
    optimizer = get_megatron_optimizer(
        optimizer_config(config), chunks, config_overrides={}, use_gloo_process_groups=False
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        _allocate(getattr(part, "optimizer", None))
    return optimizer


def _allocate(inner: Any) -> None:
    """Gives torch's AdamW its moments at once.

    0.16.1 cannot load a checkpoint into an empty one: its step is None.
    """
    if not isinstance(inner, torch.optim.AdamW):
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            inner.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


@torch.no_grad()
def clipped_step(optimizer: Any, knobs: OptimizerConfig, lr: float) -> float:
    """Clips by the global norm, steps at `lr` with these knobs and returns the norm. Collective.

    Where the norm is not finite, it does not step.
    """
    set_groups(optimizer.param_groups, knobs, lr)
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
    return norm
