"""What `learner.deepspeed.config` may set in DeepSpeed's own configuration (0.19.8), checked by name.

DeepSpeed passes over a key that it does not know at the top, and refuses one further down only after it has
got the model. So names are checked here, before anything starts: those of the top from a list, those of the
sections from the installed source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gspo_dist.config import DeepSpeedConfig
from gspo_dist.learners.passed import Declared, check_names, fields_of, own_keys

WHERE = "learner.deepspeed.config"
PACKING = "learner.token_budget packs micro-batches, any number of them to a step"
PRECISION = "set learner.precision; master weights, gradients and their sums are fp32"
SUMS = "denominators are global, so gradients are summed and not averaged"
REPLICAS = "every rank is a replica of the whole model"
UPDATE = "it is no part of a policy's update"
CHECKPOINTS = "set checkpoint.*; how a state is written is gspo_dist's"

TOP = own_keys(
    {
        PACKING: "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps "
        "managed_gradient_accumulation",
        "set learner.optimizer": "optimizer",
        "set learner.optimizer.schedule": "scheduler",
        "set learner.optimizer.grad_clip": "gradient_clipping",
        PRECISION: "fp16 bfloat16 amp torch_autocast data_types communication_data_type "
        "seq_parallel_communication_data_type quantize_training weight_quantization compression_training",
        SUMS: "prescale_gradients gradient_predivide_factor sparse_gradients gradient_allreduce_op",
        "set learner.deepspeed.expert_parallel or grouped_mm": "expert_parallel "
        "use_data_before_expert_parallelism",
        REPLICAS: "tensor_parallel pipeline",
        "set learner.activation_checkpointing": "activation_checkpointing",
        UPDATE: "curriculum_learning data_efficiency progressive_layer_drop eigenvalue hybrid_engine "
        "elasticity autotuning sparse_attention vocabulary_size dataloader_drop_last",
        CHECKPOINTS: "checkpoint nebula datastates_ckpt",
        "set learner.deepspeed.offload_optimizer or offload_params: they are kept in host memory": "aio",
    }
)
"""At the top: key -> the way out."""
FREE = (
    *("zero_optimization", "bf16", "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "compile"),
    *("timers", "flops_profiler", "steps_per_print", "wall_clock_breakdown", "memory_breakdown"),
    *("dump_state", "log_level", "disable_allgather", "disable_python_gc", "graph_harvesting"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
)
"""At the top: what is the user's. Sections among them are checked further down."""
OWN = {
    "zero_optimization": own_keys(
        {
            "set learner.deepspeed.zero_stage": "stage",
            "set learner.deepspeed.offload_optimizer": "cpu_offload cpu_offload_use_pin_memory zenflow",
            "set learner.deepspeed.offload_params": "cpu_offload_param",
            "set learner.max_skipped_steps": "compute_grad_norm",
            CHECKPOINTS: "elastic_checkpoint load_from_fp32_weights legacy_stage1 "
            "pipeline_loading_checkpoint gather_16bit_weights_on_model_save "
            "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
            "save_muon_momentum_buffer_in_memory",
        }
    ),
    "zero_optimization.offload_optimizer": own_keys(
        {"set learner.deepspeed.offload_optimizer: in host memory": "device nvme_path"}
    ),
    "zero_optimization.offload_param": own_keys(
        {"set learner.deepspeed.offload_params: in host memory": "device nvme_path"}
    ),
    "bf16": own_keys(
        {
            PRECISION: "enabled bf16_master_weights_and_grads bf16_optimizer_states",
            "set learner.max_skipped_steps": "check_grad_overflow",
        }
    ),
}
"""Below: section -> key -> the way out."""
SECTIONS = {
    "zero_optimization": ("runtime/zero/config.py", "DeepSpeedZeroConfig"),
    "zero_optimization.offload_param": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
    "zero_optimization.offload_optimizer": (
        "runtime/zero/offload_config.py",
        "DeepSpeedZeroOffloadOptimizerConfig",
    ),
    "zero_optimization.leaf_module": ("runtime/zero/leaf_module_config.py", "DeepSpeedZeroLeafModuleConfig"),
    "bf16": ("runtime/precision_config.py", "DeepSpeedBF16Config"),
    "comms_logger": ("comm/config.py", "CommsLoggerConfig"),
    "tensorboard": ("monitor/config.py", "TensorBoardConfig"),
    "wandb": ("monitor/config.py", "WandbConfig"),
    "csv_monitor": ("monitor/config.py", "CSVConfig"),
    "comet": ("monitor/config.py", "CometConfig"),
    "compile": ("compile/config.py", "CompileConfig"),
    "timers.throughput": ("utils/config.py", "DeepSpeedThroughputTimerConfig"),
}
"""Section -> the class of DeepSpeed that takes it."""
LISTED = {
    "timers": ("throughput",),
    "flops_profiler": (
        *("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed"),
        "output_file",
    ),
}
"""Sections that DeepSpeed reads key by key, without a class."""


def check_passed(config: DeepSpeedConfig) -> None:
    """Raises ValueError for a key of `learner.deepspeed.config` that cannot be passed on."""
    check_names(WHERE, config.config, FREE, TOP, "DeepSpeed's configuration")
    for key, value in config.config.items():
        if key in SECTIONS or key in LISTED:
            _check_section(key, value)
    zero = config.config.get("zero_optimization", {})
    for key, knob in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_params")):
        if key in zero and not getattr(config, knob):
            raise ValueError(
                f"{WHERE}.zero_optimization.{key} needs learner.deepspeed.{knob}: got false; set it too"
            )


def _check_section(section: str, given: Any) -> None:
    where = f"{WHERE}.{section}"
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a section: got {given!r}; set its keys one by one")
    known = LISTED.get(section) or fields_of([Declared("deepspeed", *SECTIONS[section])])
    check_names(where, given, known, OWN.get(section, {}), "this section of DeepSpeed's configuration")
    for key, value in given.items():
        if f"{section}.{key}" in SECTIONS:
            _check_section(f"{section}.{key}", value)


def merged(own: Mapping[str, Any], passed: Mapping[str, Any]) -> dict[str, Any]:
    """`own` with the user's keys in it, section by section. Example: {"a": {"b": 1}} with {"a": {"c": 2}} is
    {"a": {"b": 1, "c": 2}}.
    """
    out = dict(own)
    for key, value in passed.items():
        both = isinstance(value, Mapping) and isinstance(own.get(key), Mapping)
        out[key] = merged(own[key], value) if both else value
    return out
