"""The first operator whose outputs are not the same bits, by name, token and size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gspo_dist.learners.exact.audit import Difference, catching_learner, first_difference


def test_the_first_of_several_differences_is_named_in_the_order_of_the_forward():
    engine = {"a": torch.zeros(3, 2), "b": torch.zeros(3, 2), "c": torch.zeros(3, 2)}
    learner = {name: t.clone() for name, t in engine.items()}
    learner["c"][0, 0] = 9.0
    learner["b"][1, 1], learner["b"][2, 0] = 0.25, -0.5
    assert first_difference(engine, learner) == Difference("b", token=1, values=2, largest=0.5)
    assert str(first_difference(engine, learner)) == "b: 2 outputs differ, first of token 1, by up to 0.5"


def test_equal_bits_are_no_difference_and_what_one_side_lacks_is_left_out():
    engine = {"a": torch.ones(2, 2, dtype=torch.bfloat16)}
    assert first_difference(engine, {"a": torch.ones(2, 2, dtype=torch.bfloat16), "b": torch.ones(1)}) is None


def test_a_nan_on_one_side_is_a_difference():
    found = first_difference({"a": torch.zeros(2, 1)}, {"a": torch.tensor([[0.0], [float("nan")]])})
    assert found is not None
    assert (found.operator, found.token) == ("a", 1)


def test_nothing_in_common_and_other_shapes_are_said():
    with pytest.raises(ValueError, match=r"no operator was caught on both sides: got \['a'\] and \['b'\]"):
        first_difference({"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"a has shapes of its own: engine \(2, 1\), learner \(3, 1\)"):
        first_difference({"a": torch.zeros(2, 1)}, {"a": torch.zeros(3, 1)})


class Block(nn.Module):
    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def test_parts_of_a_product_are_joined_and_hooks_end_with_the_block():
    linear = {name: nn.Linear(2, 2, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    attention, mlp = Block(linear), nn.Linear(2, 2)
    layer = Block(
        {
            "self_attn": attention,
            "mlp": mlp,
            "input_layernorm": nn.Identity(),
            "post_attention_layernorm": nn.Identity(),
        }
    )
    base = Block(
        {"embed_tokens": nn.Embedding(3, 2), "layers": nn.ModuleList([layer]), "norm": nn.Identity()}
    )
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # one batch of two tokens
    with catching_learner(SimpleNamespace(base_model=base)) as caught:
        parts = [linear[name](x) for name in ("q_proj", "k_proj", "v_proj")]
        attention.o_proj(parts[2])
    attention.o_proj(x)
    assert list(caught) == ["layer 0 queries, keys, values", "layer 0 attention", "layer 0 attention output"]
    assert torch.equal(caught["layer 0 queries, keys, values"], torch.cat(parts, dim=-1)[0])
    assert torch.equal(caught["layer 0 attention"], parts[2][0])
    assert torch.equal(caught["layer 0 attention output"], attention.o_proj(parts[2])[0])
