"""Laws of loading stacks: vLLM's own loader puts every expert's rows where its kernel looks for them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from gspo_dist.rollout.vllm import experts
from gspo_dist.rollout.vllm.experts import StackLoader, in_place, takes_stacks
from gspo_dist.weights.stacks import Stack

EXPERTS, ROWS, HIDDEN = 4, 6, 5  # rows of one projection
PREFIX = "model.layers.0.mlp.experts"
GATE_UP = torch.arange(EXPERTS * 2 * ROWS * HIDDEN * 1.0).view(EXPERTS, 2 * ROWS, HIDDEN)
DOWN = -torch.arange(EXPERTS * HIDDEN * ROWS * 1.0).view(EXPERTS, HIDDEN, ROWS)


def layer(
    *, tensor=(0, 1), held=tuple(range(EXPERTS)), backend=UnquantizedMoeBackend.TRITON
) -> RoutedExperts:
    """vLLM's layer as its loader sees it. tensor: rank and size; held: this worker's experts, in order."""
    made = object.__new__(RoutedExperts)
    torch.nn.Module.__init__(made)
    rank, size = tensor
    made.layer_name, made.quant_config = PREFIX, None
    made.quant_method = object.__new__(UnquantizedFusedMoEMethod)
    torch.nn.Module.__init__(made.quant_method)
    made.quant_method.unquantized_backend = backend
    made.moe_config = SimpleNamespace(
        tp_rank=rank,
        is_act_and_mul=True,
        has_bias=False,
        num_experts=EXPERTS,
        num_logical_experts=EXPERTS,
        moe_parallel_config=SimpleNamespace(tp_size=size),
    )
    made.expert_map_manager = SimpleNamespace(
        num_fused_shared_experts=0, map_global_to_local=lambda e: held.index(e) if e in held else -1
    )
    for name, shape in (("w13_weight", (2 * ROWS // size, HIDDEN)), ("w2_weight", (HIDDEN, ROWS // size))):
        blank = torch.full((len(held), *shape), float("nan"))
        setattr(made, name, torch.nn.Parameter(blank, requires_grad=False))
    return made


def parts(first: int, count: int):
    """Some experts as they travel."""
    rows = slice(first, first + count)
    return [
        (Stack(PREFIX, first, count, ("gate_proj", "up_proj"), ".weight").name, GATE_UP[rows]),
        (Stack(PREFIX, first, count, ("down_proj",), ".weight").name, DOWN[rows]),
    ]


def load(made: RoutedExperts, *slices: tuple[int, int]) -> list:
    loader = StackLoader(torch.nn.ModuleList([made]))
    return [rest for one in slices for rest in loader.load(parts(*one))]


@pytest.mark.parametrize("slices", [[(0, 4)], [(0, 1), (3, 1), (1, 2)]])
@pytest.mark.parametrize("held", [(0, 1, 2, 3), (2, 3), (1, 3)])
@pytest.mark.parametrize("tensor", [(0, 1), (0, 2), (1, 2)])
def test_every_number_lies_where_the_kernel_reads_it(slices, held, tensor) -> None:
    """Whole or in parts, for workers that hold some experts or some rows; in the very tensors in use."""
    made = layer(tensor=tensor, held=held)
    places = made.w13_weight.data_ptr(), made.w2_weight.data_ptr()
    assert load(made, *slices) == []
    rank, size = tensor
    cut = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    mine = list(held)
    gate, up = GATE_UP[mine][:, :ROWS][:, cut], GATE_UP[mine][:, ROWS:][:, cut]
    assert torch.equal(made.w13_weight, torch.cat([gate, up], dim=1))
    assert torch.equal(made.w2_weight, DOWN[mine][:, :, cut])
    assert places == (made.w13_weight.data_ptr(), made.w2_weight.data_ptr())


def test_a_layer_that_must_be_packed_gets_all_its_experts_at_once() -> None:
    made, calls = layer(backend=UnquantizedMoeBackend.CPU), []
    for name in ("w13_weight", "w2_weight"):
        getattr(made, name).weight_loader = lambda **told: calls.append(told)
    loader = StackLoader(torch.nn.ModuleList([made]))
    assert [*loader.load(parts(2, 2)), *loader.load(parts(0, 1))] == []
    assert calls == []
    assert list(loader.load(parts(1, 1))) == []
    assert [(told["shard_id"], told["weight_name"]) for told in calls] == [
        ("w1", "w13_weight"),
        ("w3", "w13_weight"),
        ("w2", "w2_weight"),
    ]
    assert all(told["param"] is getattr(made, told["weight_name"]) for told in calls)
    assert torch.equal(torch.cat([calls[0]["loaded_weight"], calls[1]["loaded_weight"]], dim=1), GATE_UP)
    assert torch.equal(calls[2]["loaded_weight"], DOWN)
    assert loader.waiting == {}


def test_what_no_layer_takes_goes_to_the_models_loader_expert_by_expert(monkeypatch) -> None:
    plain = ("model.norm.weight", torch.ones(3))
    made = layer()
    made.moe_config.num_experts += 1  # a redundant copy of some expert
    rest = list(StackLoader(torch.nn.ModuleList([made])).load([plain, *parts(1, 2)]))
    assert [name for name, _ in rest] == [
        "model.norm.weight",
        *(f"{PREFIX}.{e}.{p}.weight" for e in (1, 2) for p in ("gate_proj", "up_proj")),
        *(f"{PREFIX}.{e}.down_proj.weight" for e in (1, 2)),
    ]
    assert torch.equal(dict(rest)[f"{PREFIX}.2.up_proj.weight"], GATE_UP[2, ROWS:])
    odd = Stack("another.experts", 0, 1, ("down_proj",), ".weight").name
    assert [n for n, _ in StackLoader(torch.nn.ModuleList([layer()])).load([(odd, DOWN[:1])])] == [
        "another.experts.0.down_proj.weight"
    ]
    other = Stack(PREFIX, 0, 1, ("gate_proj", "router"), ".weight").name
    assert len(list(StackLoader(torch.nn.ModuleList([layer()])).load([(other, GATE_UP[:1])]))) == 2


def test_experts_in_another_order_are_refused() -> None:
    with pytest.raises(ValueError, match="holds experts in another order than the model"):
        load(layer(held=(3, 0, 1, 2)), (0, 4))


def test_which_layers_take_stacks_and_which_are_written_in_place(monkeypatch) -> None:
    assert takes_stacks(layer())
    for change in ({"has_bias": True}, {"num_logical_experts": 3}):
        made = layer()
        vars(made.moe_config).update(change)
        assert not takes_stacks(made)
    made = layer()
    made.expert_map_manager.num_fused_shared_experts = 1
    assert not takes_stacks(made)
    made = layer()
    made.w2_weight.is_transposed = True
    assert not takes_stacks(made)
    made = layer()
    made.quant_method = torch.nn.Identity()
    assert not takes_stacks(made)
    assert in_place(layer())
    for backend in set(UnquantizedMoeBackend) - {UnquantizedMoeBackend.TRITON}:
        assert not in_place(layer(backend=backend))
    monkeypatch.setattr(experts.current_platform, "is_rocm", lambda: True)
    assert not in_place(layer())


def test_a_layer_in_place_is_taken_out_of_the_reload() -> None:
    """The reload puts the tensors in use aside, for empty ones: they come back before the first stack."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import (
        get_layerwise_info,
        record_metadata_for_reloading,
    )

    made = layer()
    model = torch.nn.ModuleList([made])
    kept = made.w13_weight
    record_metadata_for_reloading(model)
    for _ in range(2):  # the second update finds what the first one left
        initialize_layerwise_reload(model)
        assert made.w13_weight.is_meta
        loader = StackLoader(model)
        assert made.w13_weight is kept
        assert not get_layerwise_info(made).can_load()
        assert list(loader.load(parts(0, 4))) == []
        assert torch.equal(kept[:, :ROWS], GATE_UP[:, :ROWS])
