"""Weights leave the engine under the file's names, gathered a bucket at a time."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gspo_dist.learners.deepspeed import export
from gspo_dist.learners.deepspeed.export import full_weights, hf_name
from gspo_dist.learners.hf_model import PolicyModel
from gspo_dist.weights.stacks import unstack
from tests.unit.weights.tiny_models import make


@pytest.mark.parametrize(
    ("engine", "file"),
    [
        ("hf.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("hf.model.layers.3.mlp.router.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("hf.model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate.weight"),
        (
            "hf.model.layers.1.mlp.shared_experts.up_proj.weight",
            "model.layers.1.mlp.shared_expert.up_proj.weight",
        ),
        ("hf.model.layers.1.mlp.shared_experts_gate.weight", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("hf.model.layers.2.self_attn.q_norm.weight", "model.layers.2.self_attn.q_norm.weight"),
    ],
)
def test_names_in_the_engine_become_names_in_the_file(engine: str, file: str) -> None:
    assert hf_name(engine) == file


def policy(tied: bool) -> PolicyModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return PolicyModel(Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=tied)))


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_leaves_once_and_a_tied_head_does_not(tied: bool) -> None:
    model = policy(tied)
    got = list(full_weights(model, rank=0, exporters=(0,), bucket_bytes=2000, zero=None))
    want = {name.removeprefix("hf."): p for name, p in model.named_parameters()}
    assert [name for name, _ in got] == list(want)
    assert ("lm_head.weight" in want) == (not tied)
    assert all(torch.equal(tensor, want[name]) for name, tensor in got)
    assert not any(tensor.requires_grad for _, tensor in got)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "glm4_moe", "deepseek_v3", "qwen2_moe"])
def test_without_expert_parallelism_the_stream_is_the_folder_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Routed and shared experts under the family's own names, and the router's buffer."""
    make(tmp_path, family)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    got = dict(full_weights(PolicyModel(hf), rank=0, exporters=(0,), bucket_bytes=2000, zero=None))
    folder = load_file(tmp_path / "model.safetensors")
    assert set(got) == set(folder)
    assert all(torch.equal(got[name], folder[name]) for name in folder)


def test_only_the_exporters_yield() -> None:
    def names(rank: int) -> list[str]:
        stream = full_weights(policy(False), rank=rank, exporters=(0, 2), bucket_bytes=2000, zero=None)
        return [name for name, _ in stream]

    assert names(1) == []
    assert names(0) == names(2) != []


def test_no_more_than_a_bucket_is_gathered_at_once() -> None:
    """Sizes as ZeRO 3 leaves them: a partitioned parameter is empty, and `ds_numel` says what it would be."""
    model = policy(False)
    sizes = {}
    for parameter in model.parameters():
        sizes[id(parameter)] = parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    gathered: list[int] = []

    @contextmanager
    def gather(parameters: list):
        gathered.append(sum(4 * sizes[id(p)] for p in parameters))
        yield

    zero = SimpleNamespace(GatheredParameters=gather)
    list(full_weights(model, rank=0, exporters=(0,), bucket_bytes=3000, zero=zero))
    assert sum(gathered) == 4 * sum(sizes.values())
    assert max(gathered) <= 3000
    assert len(gathered) < len(sizes)


def test_the_experts_of_all_ranks_are_stacks_where_they_are(monkeypatch) -> None:
    """8 experts on 2 ranks, 2 at a time, as the docstring has them; another rank's numbers are 100 higher."""
    local = torch.arange(4 * 2 * 3.0).view(4, 2, 3)
    roots = []

    def gather(chunk, shards, dst, group) -> None:
        roots.append(dst)
        if dst != 0:
            assert shards is None  # only the root of a gather receives
            return
        shards[0].copy_(chunk)
        shards[1].copy_(chunk + 100)

    monkeypatch.setattr(export.dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(export.dist, "gather", gather)
    name = "model.layers.1.mlp.experts.w1"
    stacks = list(export._expert_stacks(name, local, "group", 0, (0, 1, 4), 2 * 2 * local[0].nbytes))
    assert roots == [0, 1, 0, 1]  # rank 4 is of another group
    assert [stack for stack, _ in stacks] == [
        f"model.layers.1.mlp.experts.{experts}.{{gate_proj}}.weight"
        for experts in ("{0..1}", "{4..5}", "{2..3}", "{6..7}")
    ]
    tensors = dict(unstack(stacks))
    for expert in range(8):
        want = local[expert % 4] + 100 * (expert // 4)
        assert torch.equal(tensors[f"model.layers.1.mlp.experts.{expert}.gate_proj.weight"], want)
    assert len(tensors) == 8
    assert list(export._expert_stacks(name, local, "group", 0, (4,), 1)) == []
