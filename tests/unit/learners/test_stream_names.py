"""What a learner will stream is known from the heads of the files, and is what it streams then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gspo_dist.learners.hf_model import load_policy
from gspo_dist.learners.properties import save_miniature, small_config
from gspo_dist.learners.self_check import inspect
from gspo_dist.learners.stream_names import check_names, of_family, of_loaded_model
from gspo_dist.weights.folder import ModelFolder
from gspo_dist.weights.names import hf_named_weights

FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "granitemoe", "glm4_moe", "qwen3"]


def made(family: str, folder: Path) -> PreTrainedModel:
    """A miniature of the family, written to `folder` as transformers writes it."""
    torch.manual_seed(0)
    config = json.loads(AutoConfig.for_model(family, sliding_window=None).to_json_string())
    model = AutoModelForCausalLM.from_config(small_config(config))
    save_miniature(model, folder)
    return model


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})


def streamed(folder: Path) -> dict[str, tuple[int, ...]]:
    """What the eager learner does stream."""
    return {name: tuple(t.shape) for name, t in hf_named_weights(load_policy(folder, "fp32").hf)}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_foretold_is_what_the_learner_streams_and_what_the_folder_holds(family, tmp_path) -> None:
    made(family, tmp_path)
    source = ModelFolder(tmp_path)
    want = streamed(tmp_path)
    assert of_loaded_model(source) == want == of_family(source)
    assert check_names(source, want) == (True, f"{len(source.streamed)} tensors")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_folder_with_fused_experts_is_streamed_as_it_is_or_refused(family, tmp_path) -> None:
    """transformers loads both forms, and the eager learner answers in the folder's. A learner that builds its
    model from the config knows one form, and says so before the first publication would."""
    fused = dict(made(family, tmp_path).named_parameters())
    rewrite(tmp_path, fused)
    source = ModelFolder(tmp_path)
    assert of_loaded_model(source) == streamed(tmp_path) == {n: tuple(t.shape) for n, t in fused.items()}
    assert inspect(tmp_path).failed("names") == ()
    [found] = inspect(tmp_path, kind="autoep").failed("names")
    assert "would stream other tensors" in found.measured
    assert "zero_stage up to 2 and expert_parallel=1" in str(_refusal(source))


def _refusal(source: ModelFolder) -> ValueError:
    with pytest.raises(ValueError, match="would stream other tensors") as refused:
        check_names(source, of_family(source))
    return refused.value


def test_a_head_of_its_own_beside_a_config_that_says_tied_is_streamed(tmp_path) -> None:
    made("qwen3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    source = ModelFolder(tmp_path)
    assert source.has_untold_head
    assert "lm_head.weight" in source.tensors
    assert of_loaded_model(source) == of_family(source) == streamed(tmp_path)
    assert inspect(tmp_path).failed("alone", "packed", "names") == ()


@pytest.mark.parametrize("of", [of_loaded_model, of_family])
def test_a_tensor_that_is_missing_more_or_of_another_shape_is_named(of, tmp_path) -> None:
    made("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    router, head = "model.layers.1.mlp.gate.weight", "lm_head.weight"
    for changed, message in (
        ({n: t for n, t in tensors.items() if n != router}, rf"lacks the weights \['{router}'\]"),
        (tensors | {"model.layers.1.extra": torch.ones(2)}, r"holds the weights \['model.layers.1.extra'\]"),
        (tensors | {head: torch.cat([tensors[head], tensors[head][:8]])}, f"cannot place {head}"),
    ):
        rewrite(tmp_path, changed)
        source = ModelFolder(tmp_path)
        with pytest.raises((ValueError, RuntimeError), match=message):
            check_names(source, of(source))
