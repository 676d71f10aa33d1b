"""A model filled parameter by parameter from its files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gspo_dist.learners.attention import NAME
from gspo_dist.learners.deepspeed import load
from gspo_dist.learners.deepspeed.config import import_deepspeed
from gspo_dist.learners.deepspeed.load import copy_into, load_in_place, parts
from gspo_dist.weights.folder import ModelFolder
from gspo_dist.weights.names import FileNames, hf_named_weights
from tests.unit.weights.tiny_models import FAMILIES, make


def tiny() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
        )
    )


def files(folder: Path) -> list[str]:
    return list(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())


@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
def test_parameters_filled_one_by_one_equal_the_saved_model(tmp_path: Path, shard_size: str) -> None:
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == (
        1 if shard_size == "1GB" else len(set(files(tmp_path)))
    )
    checkpoint = ModelFolder(tmp_path)
    for name, parameter in model.named_parameters():
        target = torch.full_like(parameter, float("nan"))
        copy_into(target, name, checkpoint, FileNames(model))
        assert torch.equal(target, parameter), name


def test_a_weight_that_the_folder_lacks_is_named(tmp_path: Path) -> None:
    model = tiny()
    names = FileNames(model)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for gone in ("model.norm.weight", "model.layers.1.mlp.experts.2.up_proj.weight"):
        save_file({n: t for n, t in weights.items() if n != gone}, tmp_path / "model.safetensors")
        checkpoint = ModelFolder(tmp_path)
        bad = {}
        for name, parameter in model.named_parameters():
            try:
                copy_into(torch.empty_like(parameter), name, checkpoint, names)
            except ValueError as error:
                bad[name] = str(error)
        (owner,) = bad
        assert owner == gone or gone.startswith(owner.removesuffix("gate_up_proj"))
        assert f"lacks the weights ['{gone}']" in bad[owner]


def test_the_parts_of_a_fused_expert_parameter_by_hand() -> None:
    """gate_up [4, 16, 16] of Qwen3-MoE: the gate's 8 rows of 16, then the up projection's."""
    names = FileNames(tiny())
    stem = "model.layers.0.mlp.experts"
    found = {(p.file, p.row): p.index for p in parts(f"{stem}.gate_up_proj", torch.Size([4, 16, 16]), names)}
    assert found.keys() == {
        (f"{stem}.{e}.{half}_proj.weight", e) for e in range(4) for half in ("gate", "up")
    }
    assert torch.equal(found[f"{stem}.3.gate_proj.weight", 3], torch.arange(0, 128))
    assert torch.equal(found[f"{stem}.2.up_proj.weight", 2], torch.arange(128, 256))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_filled_from_the_names_of_its_own_folder(family: str, tmp_path: Path) -> None:
    """Mixtral calls its projections w1 to w3, Granite keeps experts fused under other names."""
    model = make(tmp_path, family)
    checkpoint, names = ModelFolder(tmp_path), FileNames(model)
    read = set()
    for name, parameter in model.named_parameters():
        target = torch.full_like(parameter, float("nan"))
        read.update(copy_into(target, name, checkpoint, names))
        assert torch.equal(target, parameter), name
    buffers = {n for n in checkpoint.tensors if n.endswith("e_score_correction_bias")}
    assert read == set(checkpoint.tensors) - buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*FAMILIES, "tied", "own head"])
def test_a_model_filled_in_place_is_from_pretraineds(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Parameters, buffers, what is tied, precision, and the names under which it is streamed."""
    tied = family in ("tied", "own head")
    make(tmp_path, "qwen3" if tied else family, tie_word_embeddings=family == "tied")
    if family == "own head":
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    config = AutoConfig.from_pretrained(tmp_path)
    got = load_in_place(torch.device("cpu"), False, tmp_path, config, dtype)
    want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation=NAME)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(got, kind)()), dict(getattr(want, kind)())
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
    assert ("lm_head.weight" in dict(got.named_parameters())) == (family != "tied")
    streams = [list(hf_named_weights(hf)) for hf in (got, want)]
    assert [n for n, _ in streams[0]] == [n for n, _ in streams[1]]
    assert got.config._attn_implementation == want.config._attn_implementation


def test_the_experts_of_others_are_not_read(tmp_path: Path, monkeypatch) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    weights = ModelFolder(tmp_path)
    seen: list[str] = []
    read = weights.read
    monkeypatch.setattr(weights, "read", lambda name: seen.append(name) or read(name))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole = dict(model.named_parameters())[name]
    mine = torch.full_like(whole[2:], float("nan"))
    used = copy_into(mine, name, weights, FileNames(model), range(2, 4))
    assert torch.equal(mine, whole[2:])
    stem = "model.layers.1.mlp.experts"
    assert seen == [f"{stem}.{e}.{half}_proj.weight" for e in (2, 3) for half in ("gate", "up")]
    assert len(used) == 8, "all are accounted for"


def test_a_tensor_of_another_shape_is_refused_and_not_spread_out(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    held["model.norm.weight"] = held["model.norm.weight"][:1].clone()
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight should be \[16\] by config\.json"):
        copy_into(torch.empty(16), "model.norm.weight", ModelFolder(tmp_path), FileNames(model))


def test_every_parameter_goes_to_the_device_before_the_next_is_read(tmp_path: Path, monkeypatch) -> None:
    """A device that is not the CPU: each has left the host when the next is filled."""
    tiny().save_pretrained(tmp_path)
    seen: list[torch.Tensor] = []
    fill = load.copy_into
    to = torch.Tensor.to

    def moved(self: torch.Tensor, *where, **how) -> torch.Tensor:
        if where == (torch.device("meta"),):  # which a parameter cannot go to, as it can to a GPU
            seen.append(self)
            return self
        return to(self, *where, **how)

    filled: list[str] = []

    def noted(target: torch.Tensor, name: str, *args) -> list[str]:
        assert len(seen) == len(filled), f"{name} is read before {filled[-1]} has gone"
        filled.append(name)
        return fill(target, name, *args)

    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(load, "copy_into", noted)
    config = AutoConfig.from_pretrained(tmp_path)
    hf = load_in_place(torch.device("meta"), False, tmp_path, config, torch.float32)
    assert len(seen) == len(filled) == len(list(hf.parameters())) > 20


def test_experts_that_come_later_are_asked_for_and_not_read(tmp_path: Path, monkeypatch) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    seen: list[str] = []
    read = ModelFolder.read
    monkeypatch.setattr(ModelFolder, "read", lambda self, name: seen.append(name) or read(self, name))
    config = AutoConfig.from_pretrained(tmp_path)
    hf = load_in_place(torch.device("cpu"), True, tmp_path, config, torch.float32)
    assert not any(".experts." in name for name in seen)
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            assert torch.equal(hf.get_parameter(name), parameter), name
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    gone = "model.layers.1.mlp.experts.3.down_proj.weight"
    save_file({n: t for n, t in held.items() if n != gone}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"lacks the weights ['{gone}']")):
        load_in_place(torch.device("cpu"), True, tmp_path, config, torch.float32)


@dataclass
class Spec:
    """What AutoEP's repacking reads of a layer's specification (DeepSpeed 0.19.8)."""

    num_experts: int = 4
    expert_storage: str = "fused_3d"
    expert_w1_name: str = "gate_up_proj"
    expert_w2_name: str = "down_proj"
    expert_w3_name: str | None = None


@pytest.mark.parametrize("rank", [0, 1])
def test_autoep_takes_over_experts_from_the_files(rank: int, tmp_path: Path, monkeypatch) -> None:
    """What it would have cut out of a whole layer, out of a model whose experts have no values."""
    import_deepspeed("cpu")
    from deepspeed.module_inject import auto_ep_layer

    model = tiny()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    hf = load_in_place(torch.device("cpu"), True, tmp_path, config, torch.float32)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if ".experts." in name:
                parameter.fill_(float("nan"))
    seen: list[str] = []
    read = ModelFolder.read
    monkeypatch.setattr(ModelFolder, "read", lambda self, name: seen.append(name) or read(self, name))
    own = auto_ep_layer.repack_expert_weights
    want = own(model.model.layers[1].mlp.experts, Spec(), rank, 2)
    with load.own_experts(hf, tmp_path, torch.device("cpu")):
        got = auto_ep_layer.repack_expert_weights(
            experts_source=hf.model.layers[1].mlp.experts, spec=Spec(), ep_rank=rank, ep_size=2
        )
    assert auto_ep_layer.repack_expert_weights is own
    assert [t.shape for t in got] == [(2, 8, 16), (2, 16, 8), (2, 8, 16)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    experts = {int(name.split(".")[5]) for name in seen}
    assert experts == {2 * rank, 2 * rank + 1}
