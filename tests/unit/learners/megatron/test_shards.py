"""Global names of a rank's parameters, steps of an export, and what a gathered stack holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state as mpu
from torch import nn

from gspo_dist.learners.megatron import shards
from gspo_dist.learners.megatron.architecture import from_hf
from gspo_dist.weights.stacks import unstack
from tests.unit.learners.megatron.qwen3 import QWEN3_30B

MODEL = from_hf(QWEN3_30B | {"num_experts": 8, "num_hidden_layers": 4, "hidden_size": 6})
EXPERT = "decoder.layers.2.mlp.experts.local_experts.{}.linear_fc2.weight"


def entry(name: str, expert: int | None = None, split: bool = False, shape: tuple[int, ...] = (2, 3)) -> Any:
    return shards.Entry(name, 2, expert, split, shape, torch.float32)


def make_chunk(layer_number: int, experts: int) -> nn.Module:
    """One layer of a stage: a router and some experts, named as megatron-core names them."""
    layer = nn.Module()
    layer.layer_number = layer_number
    layer.mlp = nn.Module()
    layer.mlp.router = nn.Linear(6, 8, bias=False)
    layer.mlp.experts = nn.Module()
    layer.mlp.experts.local_experts = nn.ModuleList()
    for _ in range(experts):
        expert = nn.Module()
        expert.linear_fc2 = nn.Linear(3, 6, bias=False)
        layer.mlp.experts.local_experts.append(expert)
    chunk = nn.Module()
    chunk.decoder = nn.Module()
    chunk.decoder.layers = nn.ModuleList([layer])
    return chunk


def on_expert_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, tensor: int = 1) -> None:
    monkeypatch.setattr(mpu, "get_expert_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(mpu, "get_expert_model_parallel_world_size", lambda: size)
    monkeypatch.setattr(mpu, "get_expert_tensor_parallel_world_size", lambda: tensor)


def test_layers_and_experts_are_numbered_over_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert rank 1 of 2 with 8 experts holds 4 to 7; megatron's layer number 3 is layer 2."""
    on_expert_rank(monkeypatch, 1, 2)
    entries = [entry for entry, _ in shards.named_parameters([make_chunk(3, 4)], MODEL)]
    assert [e.name for e in entries] == [
        "decoder.layers.2.mlp.router.weight",
        *[EXPERT.format(e) for e in (4, 5, 6, 7)],
    ]
    assert [e.expert for e in entries] == [None, 4, 5, 6, 7]
    assert {e.layer for e in entries} == {2}
    assert [e.split for e in entries] == [False, True, True, True, True]


def test_a_layer_whose_own_number_differs_from_its_place_keeps_the_other_digits(monkeypatch) -> None:
    """Layer 0 of a stage is layer 2 of the model; expert 0's digit is left alone."""
    on_expert_rank(monkeypatch, 0, 8)
    names = [entry.name for entry, _ in shards.named_parameters([make_chunk(3, 1)], MODEL)]
    assert names == ["decoder.layers.2.mlp.router.weight", EXPERT.format(0)]


def test_steps_hold_one_kind_and_what_fits_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert's part has 24 bytes and two ranks hold parts: a bucket of 100 bytes takes two experts."""
    monkeypatch.setattr(shards, "_group", lambda entry: SimpleNamespace(size=lambda: 2))
    experts = [entry(EXPERT.format(e), e, True) for e in range(5)]
    norm = entry("decoder.layers.2.input_layernorm.weight")
    steps = list(shards._steps([experts[0], norm, *experts[1:]], 100))
    assert steps == [experts[0:2], experts[2:4], experts[4:5], [norm]]
    assert [len(step) for step in shards._steps(experts, 1)] == [1] * 5


def test_a_whole_parameter_counts_once_for_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gathers it, so it is as large as one part, whatever the group."""
    monkeypatch.setattr(shards, "_group", lambda entry: SimpleNamespace(size=lambda: 100))
    one = entry("decoder.layers.2.input_layernorm.weight")
    assert list(shards._steps([one, one], 48)) == [[one, one]]


def test_gathered_experts_are_those_of_each_rank_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 experts over 2 expert ranks of 2 tensor parts: rows 0 and 1 are rank 0 and rows 2 and 3 rank 1."""
    on_expert_rank(monkeypatch, 0, 2, tensor=2)
    entries = [entry(EXPERT.format(e), e, True) for e in (1, 2)]
    gathered = torch.arange(4 * 2).reshape(4, 2, 1, 1) * torch.ones(1, 1, 6, 3)
    out = dict(shards._to_hf(entries, gathered, MODEL))
    assert list(out) == [f"model.layers.2.mlp.experts.{e}.down_proj.weight" for e in (1, 2, 5, 6)]
    for name, (left, right) in zip(out, ((0, 2), (1, 3), (4, 6), (5, 7)), strict=True):
        assert torch.equal(out[name], torch.tensor([left] * 3 + [right] * 3).float().expand(6, 6)), name


@pytest.mark.parametrize(("experts", "stacks"), [((1, 2), 2), ((0, 2), 0)])
@pytest.mark.parametrize("kind", ["linear_fc1", "linear_fc2"])
def test_gathered_experts_that_follow_each_other_are_stacks(monkeypatch, kind, experts, stacks) -> None:
    """8 experts over 2 expert ranks, each whole: a stack of every rank stands for the tensors of today."""
    on_expert_rank(monkeypatch, 0, 2)
    name = EXPERT.replace("linear_fc2", kind)
    entries = [entry(name.format(e), e, True) for e in experts]
    gathered = torch.arange(2 * 2 * 4 * 6.0).reshape(2, 2, 4, 6)
    plain = dict(shards._to_hf(entries, gathered, MODEL))
    stacked = list(shards._to_hf(entries, gathered, MODEL, stacked=True))
    again = dict(unstack(stacked))
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[key], plain[key]) for key in plain)
    assert len(stacked) == (stacks or len(plain))


def test_experts_cut_over_tensor_ranks_are_no_stacks(monkeypatch) -> None:
    on_expert_rank(monkeypatch, 0, 2, tensor=2)
    entries = [entry(EXPERT.format(e), e, True) for e in (1, 2)]
    gathered = torch.zeros(4, 2, 6, 3)
    assert not any("{" in name for name, _ in shards._to_hf(entries, gathered, MODEL, stacked=True))


def test_weights_of_another_shape_than_config_says_are_refused(one_rank: None) -> None:
    class Source:
        def shape(self, name: str) -> tuple[int, ...]:
            return (8, 5)

        def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
            return torch.zeros(8, 5)[rows, columns]

    with pytest.raises(
        ValueError,
        match=r"router\.weight should be \[8, 6\] .* weights give \[8, 5\]",
    ):
        shards.load_weights([make_chunk(3, 8)], Source(), MODEL)


def test_the_ranks_of_a_pipeline_lie_a_stage_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpu, "get_pipeline_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert [shards._pipeline_of(rank) for rank in range(4)] == [[0, 2], [1, 3], [0, 2], [1, 3]]
