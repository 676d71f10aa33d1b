"""Conversion rules and slices of HF files; batches cut over context ranks; GPU settings, on any machine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gspo_dist.config import LearnerConfig, MegatronConfig
from gspo_dist.learners.megatron import checkpoint, cpu_shim
from gspo_dist.learners.megatron.architecture import from_hf
from gspo_dist.learners.megatron.convert import QKV, GateUp, SafetensorsFolder, Split, Whole, rule_for
from gspo_dist.learners.megatron.layout import Layout, check_knobs, check_layout, check_transformer_engine
from gspo_dist.learners.megatron.model import transformer_config
from gspo_dist.learners.megatron.modules import RMSNorm, chunk_positions, local_rows, natural_order
from gspo_dist.learners.megatron.optimizer import optimizer_config
from gspo_dist.learners.megatron.rows import lay_out
from gspo_dist.types import PackedBatch

HF = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "rope_theta": 1e6,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
MODEL = from_hf(HF)


class Tensors:
    """HF tensors held in memory."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        tensor = self.tensors[name]
        return tensor[rows] if tensor.dim() == 1 else tensor[rows, columns]


def round_trip(rule, source: Tensors, size: int) -> dict[str, torch.Tensor]:
    return dict(rule.export([rule.load(source, rank, size) for rank in range(size)]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rule_gives_back_what_it_read(size: int) -> None:
    torch.manual_seed(0)
    source = Tensors(
        q=torch.randn(32, 5),
        k=torch.randn(16, 5),
        v=torch.randn(16, 5),
        g=torch.randn(8, 5),
        u=torch.randn(8, 5),
        w=torch.randn(8, 12),
        n=torch.randn(6),
    )
    for rule in (
        QKV("q", "k", "v", groups=4, heads=8, head_dim=4),
        GateUp("g", "u"),
        Split("w", 0),
        Split("w", 1),
        Whole("n"),
    ):
        for name, tensor in round_trip(rule, source, size).items():
            assert torch.equal(tensor, source.tensors[name])


def test_groups_of_heads_lie_together() -> None:
    """np 4, ng 2, d 1: rows q0 q1 k0 v0 | q2 q3 k1 v1; the second tensor rank holds the second group."""
    source = Tensors(
        q=torch.tensor([[0.0], [1.0], [2.0], [3.0]]),
        k=torch.tensor([[10.0], [11.0]]),
        v=torch.tensor([[20.0], [21.0]]),
    )
    rule = QKV("q", "k", "v", groups=2, heads=4, head_dim=1)
    assert rule.load(source, 0, 1).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert rule.load(source, 1, 2).flatten().tolist() == [2, 3, 11, 21]


def test_both_layer_kinds_name_the_same_tensors() -> None:
    """Transformer Engine's fused norms and grouped experts against the local layers' separate ones."""
    pairs = {
        "decoder.layers.5.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.5.input_layernorm.weight",
        "decoder.layers.5.mlp.experts.linear_fc1.weight77": "decoder.layers.5.mlp.experts.local_experts.77.linear_fc1.weight",
        "decoder.layers.5.mlp.linear_fc1.layer_norm_weight": "decoder.layers.5.pre_mlp_layernorm.weight",
    }
    for engine, local in pairs.items():
        assert rule_for(engine, MODEL) == rule_for(local, MODEL)
    assert rule_for("decoder.layers.5.mlp.experts.linear_fc2.weight77", MODEL) == Split(
        "model.layers.5.mlp.experts.77.down_proj.weight", 1
    )
    with pytest.raises(
        ValueError, match=r"no conversion for the megatron parameter decoder.layers.0.mystery.weight"
    ):
        rule_for("decoder.layers.0.mystery.weight", MODEL)


def test_folder_reads_slices_fused_experts_and_names_what_is_missing(tmp_path: Path) -> None:
    torch.manual_seed(1)
    gate_up, down, plain = torch.randn(3, 8, 5), torch.randn(3, 5, 4), torch.randn(6, 5)
    stem = "model.layers.0.mlp.experts"
    save_file({f"{stem}.gate_up_proj": gate_up, f"{stem}.down_proj": down}, tmp_path / "a.safetensors")
    save_file({"lm_head.weight": plain}, tmp_path / "b.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert torch.equal(folder.read(f"{stem}.2.gate_proj.weight"), gate_up[2, :4])
    assert torch.equal(folder.read(f"{stem}.2.up_proj.weight", rows=slice(1, 3)), gate_up[2, 5:7])
    assert torch.equal(folder.read(f"{stem}.1.down_proj.weight", columns=slice(2, 4)), down[1, :, 2:4])
    assert folder.shape(f"{stem}.0.up_proj.weight") == (4, 5)
    assert folder.shape(f"{stem}.0.down_proj.weight") == (5, 4)
    assert torch.equal(folder.read("lm_head.weight", rows=slice(2, 4)), plain[2:4])
    with pytest.raises(ValueError, match=r"no tensor model.norm.weight"):
        folder.read("model.norm.weight")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks shards that its index names: model-00002-of-00002.safetensors \(1 of 2\)"
    ):
        SafetensorsFolder(tmp_path)


def test_chunks_share_the_causal_work() -> None:
    assert chunk_positions(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert chunk_positions(8, 2, 1).tolist() == [2, 3, 4, 5]
    bounds = (0, 8, 12)
    gathered = torch.cat([local_rows(bounds, 2, r) for r in range(2)])
    assert torch.equal(gathered[natural_order(bounds, 2)], torch.arange(12))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 17), min_size=1, max_size=6),
    context=st.sampled_from([1, 2, 3]),
    tensor=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_context_ranks_share_every_token_once(
    lengths: list[int], context: int, tensor: int, seed: int
) -> None:
    """Rows, trained tokens and their hidden rows over all ranks make up the batch, whatever the padding."""
    torch.manual_seed(seed)
    total = sum(lengths)
    position = torch.cat([torch.arange(n) for n in lengths])
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch = PackedBatch(
        token_ids=torch.randint(1, 50, (total,)),
        position_ids=position,
        cu_seqlens=cu,
        loss_mask=(torch.rand(total) < 0.6) & (position > 0),
        advantages=torch.zeros(total),
        rollout_logprobs=torch.zeros(total),
        rollout_index=torch.arange(len(lengths)),
    )
    layout = Layout(context * tensor, tensor, 1, 1, 1, 1, context, tensor > 1)
    shares = [lay_out(batch, layout, rank, "cpu") for rank in range(context)]
    held = torch.cat([rows.source for rows in shares])
    assert sorted(held[held >= 0].tolist()) == list(range(total))
    assert (
        sorted(torch.cat([rows.index for rows in shares]).tolist())
        == batch.loss_mask.nonzero().flatten().tolist()
    )
    for rows in shares:
        assert len(rows.source) % tensor == 0
        assert int(rows.packed.cu_seqlens_q[-1]) == context * len(rows.source)
        real = rows.source >= 0
        assert torch.equal(rows.token_ids[0][real], batch.token_ids[rows.source[real]])
        assert torch.equal(rows.position_ids[0][real], position[rows.source[real]])
        # the hidden state of token t - 1 predicts token t
        assert torch.equal(rows.source[rows.hidden_rows], rows.index - 1)
        assert torch.equal(rows.labels, batch.token_ids[rows.index])


def test_norm_is_the_formula() -> None:
    config = type("Config", (), {"params_dtype": torch.float32, "sequence_parallel": True})
    norm = RMSNorm(config, 4, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0]])
    scale = (25.0 / 4 + 1e-5) ** -0.5
    torch.testing.assert_close(norm(x), torch.tensor([[3.0, -8.0, 0.0, 0.0]]) * scale)
    assert norm.weight.sequence_parallel is True


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"recompute": "full", "recompute_num_layers": 4},
        {"recompute": "selective"},
        {"recompute": "selective", "grouped_gemm": False},
        {"token_dispatcher": "flex"},
        {"overlap_grad_reduce": True, "overlap_param_gather": True},
        {"optimizer_cpu_offload": True},
        {"aux_loss_coef": 1e-3},
        {"expert_bias": True},
        {"router_dtype": "fp64"},
        {"virtual_stages": 3, "pipeline_parallel": 4},
    ],
)
def test_gpu_settings_of_qwen3_30b_are_valid_without_a_gpu(knobs: dict) -> None:
    config = MegatronConfig(**{"tensor_parallel": 2, "expert_parallel": 8, "context_parallel": 2} | knobs)
    layout = check_layout(config, MODEL, 64)
    check_knobs(LearnerConfig(backend="megatron", world_size=64, megatron=config), gpu=True)
    built = transformer_config(MODEL, layout, config, "bf16", gpu=True)
    assert built.moe_router_dtype == knobs.get("router_dtype", "fp32")
    assert built.moe_grouped_gemm == knobs.get("grouped_gemm", True)
    assert built.moe_token_dispatcher_type == knobs.get("token_dispatcher", "alltoall")
    assert built.moe_router_enable_expert_bias == knobs.get("expert_bias", False)
    assert built.moe_aux_loss_coeff == knobs.get("aux_loss_coef", 0.0)
    assert built.recompute_granularity == {"none": None}.get(config.recompute, config.recompute)
    assert not built.moe_router_fusion
    assert built.calculate_per_token_loss


def test_knobs_that_contradict_are_refused() -> None:
    def learner(**knobs: object) -> LearnerConfig:
        return LearnerConfig(backend="megatron", megatron=MegatronConfig(**knobs))

    with pytest.raises(ValueError, match=r"optimizer_cpu_offload needs a GPU"):
        check_knobs(learner(optimizer_cpu_offload=True), gpu=False)
    with pytest.raises(ValueError, match=r"precision_aware_optimizer needs distributed_optimizer"):
        check_knobs(learner(precision_aware_optimizer=True, distributed_optimizer=False), gpu=True)
    with pytest.raises(ValueError, match=r"overlap_param_gather needs overlap_grad_reduce"):
        check_knobs(learner(overlap_param_gather=True), gpu=True)
    with pytest.raises(ValueError, match=r"DeepEP\) needs a GPU: use alltoall"):
        check_knobs(learner(token_dispatcher="flex", expert_parallel=2), gpu=False)


def test_the_gpu_form_asks_for_transformer_engine_and_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"needs Transformer Engine on GPUs: .*learner=deepspeed"):
        check_transformer_engine()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_transformer_engine()
    config = LearnerConfig(backend="megatron", precision="fp32")
    check_knobs(config, gpu=False)
    with pytest.raises(ValueError, match=r"needs learner\.precision=bf16 on GPUs: got fp32"):
        check_knobs(config, gpu=True)


def test_offloaded_and_precision_aware_optimisers_keep_whole_master_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """0.16.1 offloads masters, saves them and loads them on one path only, and there as fp32 only."""
    monkeypatch.setattr("megatron.core.optimizer.optimizer_config.is_te_min_version", lambda version: True)

    def built(**knobs: object) -> Any:
        return optimizer_config(
            LearnerConfig(backend="megatron", precision="bf16", megatron=MegatronConfig(**knobs))
        )

    offloaded = built(optimizer_cpu_offload=True)
    assert offloaded.use_precision_aware_optimizer
    assert offloaded.exp_avg_dtype == torch.float32
    assert not offloaded.store_param_remainders
    assert not built().use_precision_aware_optimizer


@pytest.mark.parametrize("nested", [True, False], ids=["distributed", "plain"])
def test_resuming_gives_a_fused_adam_its_steps(nested: bool) -> None:
    """It counts by group, and a fresh one has no count: bias correction would start again, and the first update with it."""
    given: list[dict] = []
    part = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[{}], state={}), load_state_dict=given.append
    )
    own = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}, {"lr": 0.2}]}
    checkpoint._load_optimizer(part, {"optimizer": own} if nested else own, 7)
    (state,) = given
    assert [g["step"] for g in (state["optimizer"] if nested else state)["param_groups"]] == [7, 7]
    assert list(own["state"][0]) == ["exp_avg"]  # FusedAdam refuses a step among a parameter's tensors


def test_every_extra_state_of_a_grouped_linear_is_left_out() -> None:
    part = {
        "a.linear_fc1._extra_state": 0,
        "a.linear_fc1._extra_state1": 1,
        "a.linear_fc1._extra_state12": 2,
        "a.linear_fc1.weight12": 3,
        "a._extra_state_of.weight": 4,
    }
    checkpoint._drop_extra_state(part)
    assert sorted(part.values()) == [3, 4]


def test_stand_ins_stay_away_from_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.cuda.Stream, torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cpu_shim.install()
    assert (torch.cuda.Stream, torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device) == before
