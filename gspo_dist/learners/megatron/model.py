"""Builds a megatron-core GPTModel for an HF architecture, and its process groups.

A rank has one chunk of the model per virtual stage. On a GPU the layers are Transformer Engine's: fused
norms, flash attention over packed sequences, grouped GEMM, fused permutation and rotary code. On a CPU they
are megatron-core's local ones, with `modules` in the gaps. The model returns hidden states. `taken_logprobs`
does the vocabulary projection, so that logits are never held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gspo_dist.config import MegatronConfig
from gspo_dist.learners.megatron import cpu_shim
from gspo_dist.learners.megatron.layout import Layout, transformer_engine_version
from gspo_dist.learners.megatron.modules import CountingRouter, PackedAttention, RMSNorm
from gspo_dist.models.shape import ModelShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def start_groups(layout: Layout, timeout_s: float, seed: int = 0) -> None:
    """Makes megatron's process groups inside the initialised default group. Call it once per default group.

    seed: of megatron's random states, which nothing draws from without dropout.
    """
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_stages if layout.virtual_stages > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        # megatron-core takes whole minutes, and 0 would mean no time at all.
        distributed_timeout_minutes=max(1, int(timedelta(seconds=timeout_s).total_seconds() // 60)),
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def transformer_config(
    model: ModelShape,
    layout: Layout,
    config: MegatronConfig,
    precision: str,
    *,
    gpu: bool,
    deterministic: bool = False,
) -> TransformerConfig:
    """megatron-core's config.

    gpu: picks kernels only, so that the settings of a GPU run are validated on any machine.
    deterministic: takes kernels that give the same bits again (learners/determinism.py).
    """
    dtype = DTYPES[precision]
    # Named for dense models too: 0.16.1's default dispatcher refuses variable lengths where
    # nothing is dispatched.
    moe = {"moe_token_dispatcher_type": "alltoall"}
    if model.moe_layers:
        moe = _moe_settings(model, config, gpu, deterministic)
    settings: dict[str, Any] = dict(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm == "head",
        add_qkv_bias=model.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,
        use_cpu_initialization=not gpu,
        # The loss's denominators are global: gradients of ranks and micro-batches are summed, not averaged.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        deterministic_mode=deterministic,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=gpu,
        bias_dropout_fusion=gpu,
        apply_rope_fusion=gpu and transformer_engine_version() is not None,
        **_parallel_settings(layout),
        **_recompute_settings(model, config, gpu),
        **moe,
    )
    with naming("learner.megatron.transformer", config.transformer):
        built = TransformerConfig(**(settings | _as_values(config.transformer)))
    # 0.16.1 refuses the bias with softmax scores when the config is made; CountingRouter implements it.
    built.moe_router_enable_expert_bias = bool(model.moe_layers and config.expert_bias)
    return built


def _parallel_settings(layout: Layout) -> dict[str, Any]:
    """The layout's part of the config."""
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_stages if layout.virtual_stages > 1 else None,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "context_parallel_size": layout.context,
        "sequence_parallel": layout.sequence_parallel,
        # Micro-batches are packed, so no two have one length: stages tell each other the shape.
        "variable_seq_lengths": layout.pipeline > 1,
        # Virtual stages exchange both ways at once. With two pipeline ranks both neighbours are the same
        # rank, and the batched exchange of 0.16.1 would pair one direction's message with the other's.
        "overlap_p2p_comm": layout.virtual_stages > 1,
        "batch_p2p_comm": layout.virtual_stages == 1,
    }


@contextlib.contextmanager
def naming(section: str, passed: Mapping[str, Any]) -> Iterator[None]:
    """Around megatron-core's own checks: what they refuse of the keys that were passed on names the knob."""
    try:
        yield
    except (AssertionError, ValueError, TypeError) as error:
        if not passed:
            raise
        raise ValueError(f"megatron-core refuses {section}={dict(passed)}: {error}; unset it") from error


def _as_values(passed: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that were passed on, with the Enum of a name."""
    return {key: AttnBackend[v] if key == "attention_backend" else v for key, v in passed.items()}


def _moe_settings(
    model: ModelShape, config: MegatronConfig, gpu: bool, deterministic: bool
) -> dict[str, Any]:
    """The experts' part of the config."""
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.expert_ffn,
        "moe_router_topk": model.top_k,
        "moe_layer_freq": [int(has) for has in model.expert_layers],
        "moe_shared_expert_intermediate_size": model.shared_ffn or None,
        "moe_shared_expert_gate": bool(model.shared_ffn),
        # The softmax over the chosen k logits is the renormalised softmax over all. Without renormalisation
        # the softmax comes first.
        "moe_router_pre_softmax": not model.renormalises_top_k,
        "moe_router_score_function": "softmax",
        "moe_router_dtype": None if config.router_dtype == "model" else config.router_dtype,
        "moe_router_load_balancing_type": "aux_loss" if config.aux_loss_coef else "none",
        "moe_aux_loss_coeff": config.aux_loss_coef,
        "moe_token_dispatcher_type": config.token_dispatcher,
        "moe_flex_dispatcher_backend": "deepep",
        "moe_grouped_gemm": config.grouped_gemm and gpu,
        # 0.16.1 has a way to add up the experts' outputs that repeats itself, and takes it where it permutes
        # in torch.
        "moe_permute_fusion": gpu and transformer_engine_version() is not None and not deterministic,
        # A fused router returns before it looks at replayed ids (routing.megatron hands the
        # routers their handles).
        "moe_router_fusion": False,
    }


def _recompute_settings(model: ModelShape, config: MegatronConfig, gpu: bool) -> dict[str, Any]:
    """Which activations the backward pass computes again."""
    if config.recompute == "none":
        return {}
    if config.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": config.recompute_num_layers,
        }
    # Flash attention keeps no scores, so on a GPU the large activations are the experts' or the MLP's.
    modules = ["core_attn"] if not gpu else ["moe_act", "layernorm"] if model.moe_layers else ["mlp"]
    # 0.16.1 recomputes the activation alone in grouped experts only.
    if "moe_act" in modules and not config.grouped_gemm:
        modules = ["moe"]
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def layer_spec(config: TransformerConfig, *, gpu: bool, vp_stage: int | None = None) -> Any:
    """The spec of this rank's layers: Transformer Engine's on a GPU, plain torch's on a CPU."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=gpu, normalization="RMSNorm", vp_stage=vp_stage
    )
    for layer in block.layer_specs:
        parts = layer.submodules
        if parts.mlp.module is MoELayer:
            parts.mlp.submodules.router = CountingRouter
        if gpu:
            continue
        attention = parts.self_attention.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if not gpu:
        block.layer_norm = RMSNorm
    return block


def build_chunks(
    model: ModelShape, layout: Layout, config: TransformerConfig, *, gpu: bool
) -> list[GPTModel]:
    """This rank's part of the model, one GPTModel per virtual stage, on the learner's device.

    Weights are not loaded. ValueError for CPU layers where CUDA is present.
    """
    if not cpu_shim.on_cpu() and not gpu:
        raise ValueError("the CPU layers were asked for where CUDA is present: build with gpu=True")
    chunks = []
    for stage in range(layout.virtual_stages):
        vp_stage = stage if layout.virtual_stages > 1 else None
        first = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        last = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        chunk = GPTModel(
            config,
            layer_spec(config, gpu=gpu, vp_stage=vp_stage),
            vocab_size=model.vocab,
            max_sequence_length=model.context or 32768,  # unused by rotary positions
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=model.tied,
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
            vp_stage=vp_stage,
        )
        # Read by the schedules to match chunk and stage.
        chunk.vp_stage = vp_stage
        if last:
            # The instance's forward is replaced and the module stays, because its hooks gather parameters.
            chunk.output_layer.forward = lambda hidden, **unused: (gather_rows(hidden, config), None)
        _mark(chunk)
        chunks.append(chunk.cuda() if gpu else chunk)
    return chunks


def _mark(chunk: GPTModel) -> None:
    """Completes the marks by which gradients are reduced and their norm is counted.

    They fill two gaps of 0.16.1.

    - Weights get `tensor_model_parallel` while they are initialised, and these are loaded instead. Without
      the mark the norm leaves out all shards but the first.
    - Experts get allreduce=False under expert_parallel > 1 only. With tensor_parallel 2 and one expert rank,
      their gradients would leave out the other tensor rank's tokens.
    """
    cuts = (
        (tensor_parallel.ColumnParallelLinear, 0),
        (tensor_parallel.VocabParallelEmbedding, 0),
        (tensor_parallel.RowParallelLinear, 1),
    )
    for module in chunk.modules():
        for kind, dim in cuts:
            weight = getattr(module, "weight", None)
            if (
                isinstance(module, kind)
                and weight is not None
                and not hasattr(weight, "tensor_model_parallel")
            ):
                tensor_parallel.set_tensor_model_parallel_attributes(weight, True, dim, 1)
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def gather_rows(hidden: Tensor, config: TransformerConfig) -> Tensor:
    """[1, t / tensor, H] -> [1, t, H] on every tensor rank. The backward pass adds up the ranks' parts.

    Without sequence parallelism every rank has all rows already, and
    `taken_logprobs` all-reduces the gradient.
    """
    if not config.sequence_parallel:
        return hidden
    return tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)


def head_weight(chunk: GPTModel) -> Tensor:
    """This tensor rank's rows of the LM head."""
    if chunk.share_embeddings_and_output_weights:
        return chunk.shared_embedding_or_output_weight()
    return chunk.output_layer.weight


def routers(chunks: list[GPTModel]) -> list[CountingRouter]:
    """This rank's routers in layer order."""
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, CountingRouter)]


def recomputes_routers(config: TransformerConfig) -> bool:
    """Whether the backward pass runs the routers' forward again."""
    modules = config.recompute_modules or ()
    return config.recompute_granularity == "full" or (
        config.recompute_granularity == "selective" and "moe" in modules
    )
