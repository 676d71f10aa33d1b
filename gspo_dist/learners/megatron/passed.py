"""What `learner.megatron.transformer`, `ddp` and `optimizer` may set in megatron-core's configurations.

Everything that decides speed, memory or the order of sums is the user's. What decides the model, the layout
or the loss is not: gspo_dist sets it, has a knob of its own for it, or could not train with it. The tables
below say which, for megatron-core 0.16.1. They hold names and no values, and nothing here imports megatron.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gspo_dist.config import MegatronConfig
from gspo_dist.learners.passed import Declared, check_names, check_values, fields_of, members_of, own_keys

MODEL = "config.json of model.path says it"
PRECISION = "set learner.precision; megatron learns in fp32, bf16 or fp16, as the engines are sent it"
FUSED = "the learner computes log-probs from hidden states, without logits"
SCHEDULE = "it needs a training script that is megatron's own"
EXACT = "the policy that learns must be the one that samples: no noise, and no token dropped"
START = "weights are read from model.path, so nothing is initialised"
LENGTHS = "micro-batches are packed and differ in length"
FSDP = "the learner knows megatron's DDP, and not its FSDP"
ADAMW = "every learner runs AdamW; its knobs are in learner.optimizer"
SUMS = "denominators are global, so gradients are summed in fp32 and not averaged"

TRANSFORMER = {
    MODEL: "num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size "
    "normalization layernorm_epsilon layernorm_zero_centered_gamma qk_layernorm qk_l2_norm add_bias_linear "
    "add_qkv_bias gated_linear_unit activation_func glu_linear_offset activation_func_clamp_value "
    "num_moe_experts moe_ffn_hidden_size moe_router_topk moe_layer_freq moe_latent_size "
    "moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_pre_softmax "
    "moe_router_score_function moe_router_num_groups moe_router_group_topk moe_router_topk_scaling_factor "
    "moe_router_topk_limited_devices moe_apply_probs_on_input multi_latent_attention softmax_scale "
    "softmax_type rotary_interleaved window_size window_attn_skip_freq attention_output_gate no_rope_freq "
    "experimental_attention_variant dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk "
    "dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss linear_attention_freq linear_conv_kernel_dim "
    "linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads mtp_num_layers "
    "mtp_loss_scaling_factor mtp_standalone apply_residual_connection_post_layernorm mrope_section "
    "is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path "
    "heterogeneous_block_specs hetereogenous_dist_checkpoint apply_query_key_layer_scaling",
    "set learner.megatron.tensor_parallel": "tensor_model_parallel_size",
    "set learner.megatron.pipeline_parallel": "pipeline_model_parallel_size",
    "set learner.megatron.virtual_stages": "virtual_pipeline_model_parallel_size",
    "set learner.megatron.expert_parallel": "expert_model_parallel_size",
    "set learner.megatron.expert_tensor_parallel": "expert_tensor_parallel_size moe_extended_tp",
    "set learner.megatron.context_parallel": "context_parallel_size hierarchical_context_parallel_sizes "
    "hybrid_context_parallel max_seqlen_per_dp_cp_rank",
    "set learner.megatron.sequence_parallel": "sequence_parallel",
    "set learner.megatron.token_dispatcher": "moe_token_dispatcher_type moe_enable_deepep",
    "set learner.megatron.grouped_gemm": "moe_grouped_gemm moe_use_legacy_grouped_gemm",
    "set learner.megatron.recompute": "recompute_granularity moe_layer_recompute",
    "set learner.megatron.recompute_num_layers": "recompute_num_layers",
    "set learner.megatron.router_dtype": "moe_router_dtype",
    "set learner.megatron.aux_loss_coef": "moe_aux_loss_coeff moe_router_load_balancing_type",
    "set learner.megatron.expert_bias": "moe_router_enable_expert_bias moe_router_bias_update_rate",
    "set objective.routing_replay": "moe_enable_routing_replay moe_router_fusion",
    "set cluster.device": "transformer_impl",
    "set learner.deterministic": "deterministic_mode",
    PRECISION: "bf16 fp16 params_dtype pipeline_dtype enable_autocast autocast_dtype fp8 fp8_recipe "
    "fp8_param fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo "
    "fp8_wgrad fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red first_last_layers_bf16 "
    "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 use_kitchen use_kitchen_attention "
    "kitchen_attention_backend fp4 fp4_recipe fp4_param fp4_quantizer_factory quant_recipe "
    "activation_func_fp8_input_store moe_router_padding_for_quantization moe_router_padding_for_fp8",
    SUMS: "calculate_per_token_loss",
    EXACT: "hidden_dropout attention_dropout moe_input_jitter_eps moe_token_dropping moe_token_drop_policy "
    "moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_router_force_load_balancing "
    "moe_z_loss_coeff qk_clip qk_clip_alpha qk_clip_threshold test_mode",
    START: "perform_initialization use_cpu_initialization init_method output_layer_init_method "
    "init_method_std embedding_init_method embedding_init_method_std init_model_with_meta_device",
    LENGTHS: "variable_seq_lengths overlap_p2p_comm batch_p2p_comm enable_cuda_graph external_cuda_graph "
    "cuda_graph_impl cuda_graph_scope cuda_graph_use_single_mempool cuda_graph_retain_backward_graph "
    "cuda_graph_warmup_steps",
    FUSED: "cross_entropy_loss_fusion cross_entropy_fusion_impl defer_embedding_wgrad_compute "
    "wgrad_deferral_limit",
    SCHEDULE: "tp_comm_overlap overlap_moe_expert_parallel_comm ep_overlap_early_attn_memory_release "
    "delay_wgrad_compute num_microbatches_with_partial_activation_checkpoints timers no_sync_func "
    "finalize_model_grads_func grad_scale_func grad_sync_func param_sync_func flash_decode "
    "pipeline_model_parallel_comm_backend use_ring_exchange_p2p",
    "set num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage": (
        "pipeline_model_parallel_layout account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split"
    ),
}
"""Of TransformerConfig: the way out -> the keys that are not the user's."""

DDP = {
    "set learner.megatron.overlap_grad_reduce": "overlap_grad_reduce",
    "set learner.megatron.overlap_param_gather": "overlap_param_gather",
    "set learner.megatron.distributed_optimizer": "use_distributed_optimizer",
    "set learner.max_skipped_steps": "check_for_nan_in_grad check_for_large_grads",
    PRECISION: "fp8_param_gather reuse_grad_buf_for_mxfp8_param_ag keep_fp8_transpose_cache",
    SUMS: "grad_reduce_in_fp32 average_in_collective gradient_reduce_div_fusion",
    FSDP: "use_megatron_fsdp use_custom_fsdp data_parallel_sharding_strategy outer_dp_sharding_strategy "
    "fsdp_double_buffer fsdp_manual_registration preserve_fp32_weights suggested_communication_unit_size",
    SCHEDULE: "num_distributed_optimizer_instances delay_wgrad_compute",
}
"""Of DistributedDataParallelConfig."""

OPTIMIZER = {
    "set learner.optimizer.lr": "lr min_lr decoupled_lr decoupled_min_lr",
    "set learner.optimizer.weight_decay": "weight_decay apply_wd_to_qk_layernorm decoupled_weight_decay",
    "set learner.optimizer.betas": "adam_beta1 adam_beta2",
    "set learner.optimizer.eps": "adam_eps",
    "set learner.optimizer.grad_clip": "clip_grad",
    "set learner.megatron.distributed_optimizer": "use_distributed_optimizer",
    "set learner.megatron.overlap_param_gather": "overlap_param_gather "
    "overlap_param_gather_with_optimizer_step",
    "set learner.megatron.optimizer_cpu_offload": "optimizer_cpu_offload",
    "set learner.megatron.precision_aware_optimizer": "use_precision_aware_optimizer",
    "master weights and gradients are fp32, whatever the weights are": "store_param_remainders "
    "main_params_dtype main_grads_dtype",
    PRECISION: "bf16 fp16 params_dtype fp8_recipe reuse_grad_buf_for_mxfp8_param_ag loss_scale "
    "initial_loss_scale min_loss_scale loss_scale_window hysteresis",
    ADAMW: "optimizer sgd_momentum muon_momentum muon_split_qkv muon_use_nesterov muon_scale_mode "
    "muon_fp32_matmul_prec muon_num_ns_steps muon_tp_mode muon_extra_scale_factor",
    SCHEDULE: "timers",
}
"""Of OptimizerConfig."""


class Section(NamedTuple):
    """A mapping of `learner.megatron`, and the class of megatron-core that takes it."""

    classes: tuple[Declared, ...]
    """With its base: fields of both."""
    own: dict[str, str]
    """Key -> the way out."""


def _declared(file: str, name: str) -> Declared:
    return Declared("megatron", f"core/{file}", name)


SECTIONS = {
    "transformer": Section(
        (
            _declared("transformer/transformer_config.py", "TransformerConfig"),
            _declared("model_parallel_config.py", "ModelParallelConfig"),
        ),
        own_keys(TRANSFORMER),
    ),
    "ddp": Section(
        (_declared("distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),),
        own_keys(DDP),
    ),
    "optimizer": Section(
        (_declared("optimizer/optimizer_config.py", "OptimizerConfig"),), own_keys(OPTIMIZER)
    ),
}
UNEVEN = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
"""Keys by which pipeline stages get different numbers of layers. megatron-core checks the sum."""
ENUMS = {"AttnBackend": _declared("transformer/enums.py", "AttnBackend")}
"""Enums of fields that are the user's."""


def check_passed(config: MegatronConfig) -> None:
    """Raises ValueError for a key or a value in the three sections that cannot be passed on."""
    for name, section in SECTIONS.items():
        given: Mapping[str, Any] = getattr(config, name)
        if not given:
            continue
        where, kinds = f"learner.megatron.{name}", fields_of(section.classes)
        check_names(where, given, kinds, section.own, f"megatron-core's {section.classes[0].name}")
        if kinds is not None:
            check_values(where, given, kinds, {name: members_of(enum) for name, enum in ENUMS.items()})
    for key, needed in (("recompute_modules", "selective"), ("recompute_method", "full")):
        if key in config.transformer and config.recompute != needed:
            raise ValueError(
                f"learner.megatron.transformer.{key} needs learner.megatron.recompute={needed}: got "
                f"{config.recompute}, under which megatron-core does not read it; set one of them"
            )
    if "optimizer_offload_fraction" in config.optimizer and not config.optimizer_cpu_offload:
        raise ValueError(
            "learner.megatron.optimizer.optimizer_offload_fraction needs "
            "learner.megatron.optimizer_cpu_offload: got false; set it too"
        )
