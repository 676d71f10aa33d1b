"""What a model folder must hold: whole files and every tensor. Which head is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from gspo_dist.learners.hf_folder import check_loaded, check_model_folder
from gspo_dist.learners.hf_model import load_policy

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, tie_word_embeddings=False)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def rewrite(folder: Path, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The folder's file with tensors replaced, added, or (None) taken out."""
    weights = load_file(folder / FILE) | {name: t for name, t in changes.items() if t is not None}
    weights = {name: t for name, t in weights.items() if name not in changes or changes[name] is not None}
    save_file(weights, folder / FILE, metadata={"format": "pt"})
    return weights


def set_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_what_a_folder_lacks_is_named_in_turn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        check_model_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold config\.json"):
        check_model_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no \*\.safetensors"):
        check_model_folder(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="must hold a tokenizer"):
        check_model_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert check_model_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("kept", [0, 5, 600, -1])
def test_a_torn_file_is_named_before_anything_is_loaded(folder: Path, kept: int) -> None:
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:kept])
    with pytest.raises(ValueError, match=rf"model\.safetensors is torn.* {len(data[:kept])}\b"):
        check_model_folder(folder)


def test_a_weight_that_no_file_holds_is_refused_by_name(folder: Path) -> None:
    rewrite(folder, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(ValueError, match=r"lacks the weights \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        load_policy(folder, "fp32")


def test_a_weight_without_a_place_is_refused_by_name(folder: Path) -> None:
    rewrite(folder, **{"model.layers.2.mlp.up_proj.weight": torch.zeros(24, 16)})
    with pytest.raises(ValueError, match=r"holds the weights \['model\.layers\.2\.mlp\.up_proj\.weight'\]"):
        load_policy(folder, "fp32")


def test_tables_that_every_model_computes_are_no_weights(folder: Path) -> None:
    rewrite(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    load_policy(folder, "fp32")


def test_names_beyond_three_are_counted() -> None:
    with pytest.raises(ValueError, match=r"\['a', 'b', 'c'\] and 2 more: here does not hold"):
        check_loaded(Path("here"), ["e", "d", "c", "b", "a"], [])


def test_a_head_of_its_own_is_trained_even_if_the_config_says_tied(folder: Path) -> None:
    set_config(folder, tie_word_embeddings=True)
    weights = load_file(folder / FILE)
    hf = load_policy(folder, "fp32").hf
    assert torch.equal(hf.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(hf.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    rewrite(folder, **{"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    hf = load_policy(folder, "fp32").hf
    assert hf.lm_head.weight is hf.model.embed_tokens.weight
