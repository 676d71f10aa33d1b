"""Laws of stacks: their names say, without more, which of the folder's tensors they stand for."""

from __future__ import annotations

import pytest
import torch

from gspo_dist.weights import names as module
from gspo_dist.weights.bucket import BucketLayout
from gspo_dist.weights.names import FileNames, hf_named_weights
from gspo_dist.weights.stacks import Stack, member_shapes, stack_of, unstack
from tests.unit.routing.families import make

MLP = "model.layers.3.mlp.experts"
GATED = Stack(MLP, 4, 2, ("gate_proj", "up_proj"), ".weight")


def test_a_name_says_what_a_stack_stands_for_and_is_read_back() -> None:
    assert GATED.name == MLP + ".{4..5}.{gate_proj,up_proj}.weight"
    assert list(GATED.members()) == [
        f"{MLP}.{expert}.{projection}.weight" for expert in (4, 5) for projection in ("gate_proj", "up_proj")
    ]
    for stack in (
        GATED,
        Stack("a.experts", 0, 1, ("w2",), ""),
        Stack("b.experts", 9, 120, ("x", "y", "z"), ".q"),
    ):
        assert Stack.parse(stack.name) == stack
    for name in (f"{MLP}.4.gate_proj.weight", "lm_head.weight", f"{MLP}.gate_up_proj"):
        assert Stack.parse(name) is None


def test_a_stack_is_named_by_its_first_experts_tensors() -> None:
    first = list(GATED.members())[:2]
    assert stack_of(first, 2) == GATED
    assert stack_of(first[:1], 2) == Stack(MLP, 4, 2, ("gate_proj",), ".weight")
    for odd in (
        [first[0], first[1].replace(".4.", ".5.")],  # of two experts
        [first[0], first[1].replace("layers.3", "layers.2")],  # of two layers
        [first[0], first[1].replace(".weight", ".bias")],
        ["model.layers.3.mlp.gate.weight"],
    ):
        assert stack_of(odd, 2) is None


def test_every_row_goes_to_its_expert_and_projection() -> None:
    """Two experts of two projections of two rows of three: the numbers 0 to 23 in order."""
    numbers = torch.arange(24.0).view(2, 4, 3)
    plain = ("norm", torch.ones(2))
    taken = list(unstack([plain, (GATED.name, numbers)]))
    assert (taken[0][0], taken[0][1] is plain[1]) == ("norm", True)
    got = {name: tensor.flatten().tolist() for name, tensor in taken[1:]}
    assert got == {
        f"{MLP}.4.gate_proj.weight": [0, 1, 2, 3, 4, 5],
        f"{MLP}.4.up_proj.weight": [6, 7, 8, 9, 10, 11],
        f"{MLP}.5.gate_proj.weight": [12, 13, 14, 15, 16, 17],
        f"{MLP}.5.up_proj.weight": [18, 19, 20, 21, 22, 23],
    }
    assert taken[1][1].data_ptr() == numbers.data_ptr()  # no copy
    assert dict(member_shapes(GATED.name, (2, 4, 3))) == dict.fromkeys(got, (2, 3))
    layout = BucketLayout.of([plain, (GATED.name, numbers)])
    assert layout.members() == {"norm": (2,), **dict.fromkeys(got, (2, 3))}


@pytest.mark.parametrize("shape", [(3, 4, 3), (2, 3, 3), (2,)])
def test_a_stack_of_another_shape_than_its_name_is_refused(shape) -> None:
    with pytest.raises(ValueError, match=r"a stack .* has another shape: .*gate_proj,up_proj"):
        list(member_shapes(GATED.name, shape))


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "deepseek_v3", "granitemoe", "nemotron_h", "gpt_oss"]
)
@pytest.mark.parametrize("slice_bytes", [1, 1 << 30])
def test_a_stacked_stream_is_the_plain_one_in_fewer_tensors(family, slice_bytes) -> None:
    hf = make(family)
    plain = dict(hf_named_weights(hf))
    stacked = list(hf_named_weights(hf, slice_bytes=slice_bytes, stacked=True))
    again = dict(unstack(stacked))
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    per_expert = [
        name for name in plain if ".experts." in name and any(p.isdigit() for p in name.split(".")[4:])
    ]
    if per_expert and slice_bytes > 1:
        layers = {name.split(".experts.")[0] for name in per_expert}
        assert len(stacked) == len(plain) - len(per_expert) + 2 * len(layers)


def test_experts_that_the_folder_holds_otherwise_are_not_stacked(monkeypatch) -> None:
    """A folder that held the rows of every expert in another order would get other numbers."""
    real = module.revert_weight_conversion
    hf = make("qwen3_moe")
    names, name = FileNames(hf), "model.layers.0.mlp.experts.gate_up_proj"
    tensor = dict(hf.named_parameters())[name].detach()
    assert all("{" in stored for stored, _ in names.split(name, tensor, stacked=True))
    names = FileNames(hf)
    monkeypatch.setattr(
        module,
        "revert_weight_conversion",
        lambda rules, given: {n: t.flip(0) for n, t in real(rules, given).items()},
    )
    assert not any("{" in stored for stored, _ in names.split(name, tensor, stacked=True))
