"""ZeRO 3's masters put together again: fragments of all ranks, and experts cut over their replicas only."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from gspo_dist.learners.deepspeed.stored import stored_weights
from gspo_dist.weights.folder import ModelFolder
from tests.unit.weights.tiny_models import make

PREFIX = "hf.model.layers.0.mlp.experts"


def cut(tensor: torch.Tensor, parts: int, part: int) -> torch.Tensor:
    """The part of a flattened tensor that one of `parts` ranks holds, filled up with 77."""
    size = math.ceil(tensor.numel() / parts)
    flat = torch.full((size * parts,), 77.0)
    flat[: tensor.numel()] = tensor.flatten()
    return flat[part * size : (part + 1) * size]


def save(folder: Path, dense: dict[str, torch.Tensor], experts: dict[str, torch.Tensor]) -> None:
    """Four ranks: two expert ranks with two replicas each. Ranks 0 and 2 hold experts 0 and 1."""
    folder.mkdir(parents=True)
    for rank in range(4):
        owner, replica = rank % 2, rank // 2
        mine = {name: t[2 * owner : 2 * owner + 2] for name, t in experts.items()}
        torch.save(
            {
                "module": {name: torch.empty(0, dtype=torch.bfloat16) for name in dense},
                "param_shapes": [
                    {name: t.shape for name, t in dense.items()},
                    {name: t.shape for name, t in mine.items()},
                ],
                "dp_world_size": 4,
                "ds_autoep_layers": [
                    {
                        "moe_layer_id": 0,
                        "num_experts": 4,
                        "num_local_experts": 2,
                        "expert_key_prefix": PREFIX,
                        "ep_rank": owner,
                        "expert_data_parallel_rank": replica,
                        "expert_data_parallel_world_size": 2,
                    }
                ],
            },
            folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
        )
        groups = [
            torch.cat([cut(t, 4, rank) for t in dense.values()]),
            torch.cat([cut(t, 2, replica) for t in mine.values()]),
        ]
        torch.save(
            {"optimizer_state_dict": {"fp32_flat_groups": groups}},
            folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict, dict]:
    """Sizes that no number of ranks divides."""
    generator = torch.Generator().manual_seed(0)
    dense = {
        "hf.model.norm.weight": torch.randn(7, generator=generator),
        "hf.model.layers.0.mlp.router.gate.weight": torch.randn(4, 3, generator=generator),
        "hf.model.embed_tokens.weight": torch.randn(5, 3, generator=generator),
    }
    experts = {f"{PREFIX}.{w}": torch.randn(4, 5, 3, generator=generator) for w in ("w1", "w2", "w3")}
    save(tmp_path / "deepspeed", dense, experts)
    return tmp_path, dense, experts


def test_fragments_of_four_ranks_make_the_rounded_masters(saved, tmp_path: Path) -> None:
    folder, dense, experts = saved
    make(tmp_path / "source", "qwen3_moe")
    got = dict(stored_weights(folder, ModelFolder(tmp_path / "source")))
    want = {
        "model.norm.weight": dense["hf.model.norm.weight"],
        "model.layers.0.mlp.gate.weight": dense["hf.model.layers.0.mlp.router.gate.weight"],
        "model.embed_tokens.weight": dense["hf.model.embed_tokens.weight"],
    }
    for w, projection in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        for e in range(4):
            want[f"model.layers.0.mlp.experts.{e}.{projection}.weight"] = experts[f"{PREFIX}.{w}"][e]
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor.bfloat16()), name


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt", "optimiser states of 3; copy it again"),
        ("zero_pp_rank_1_mp_rank_00_model_states.pt", r"lacks the model_states of some ranks: .*\[0, 2, 3\]"),
    ],
)
def test_a_missing_rank_is_said(saved, tmp_path: Path, gone: str, message: str) -> None:
    make(tmp_path / "source", "qwen3_moe")
    (saved[0] / "deepspeed" / gone).unlink()
    with pytest.raises(ValueError, match=message):
        list(stored_weights(saved[0], ModelFolder(tmp_path / "source")))


class Named:
    """Pickled as Python before 3.11.4 pickles a member of an enumeration."""

    def __init__(self, kind: object, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self):
        return getattr, (self.kind, self.name)


def with_more(folder: Path, value: object) -> None:
    """The file of rank 1, with what DeepSpeed writes beside the masters."""
    path = folder / "deepspeed/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=False)
    torch.save({"optimizer_state_dict": state["optimizer_state_dict"] | {"zero_stage": value}}, path)


def test_a_checkpoint_of_any_python_is_read(saved, tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    make(tmp_path / "source", "qwen3_moe")
    source = ModelFolder(tmp_path / "source")
    want = dict(stored_weights(saved[0], source))
    for value in (ZeroStageEnum.weights, Named(ZeroStageEnum, "weights")):
        with_more(saved[0], value)
        got = dict(stored_weights(saved[0], source))
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_a_file_may_name_attributes_of_nothing_else(saved, tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    make(tmp_path / "source", "qwen3_moe")
    with_more(saved[0], Named(LossScaler, "__init__"))
    with pytest.raises(ValueError, match=r"rank_1.*is whole, but holds getattr\(.*__init__"):
        list(stored_weights(saved[0], ModelFolder(tmp_path / "source")))


def test_a_folder_of_another_backend_is_said(tmp_path: Path) -> None:
    make(tmp_path / "source", "qwen3_moe")
    with pytest.raises(ValueError, match="no DeepSpeed checkpoint in"):
        list(stored_weights(tmp_path, ModelFolder(tmp_path / "source")))
