"""Laws of sparse upcycling: without noise the MoE is the dense model; what cannot be mapped is refused."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from gspo_dist.cli.main import main
from gspo_dist.coldstart import upcycle as module
from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.coldstart.upcycle import Upcycling, largest_difference, upcycle
from gspo_dist.learners.hf_folder import check_model_folder
from gspo_dist.weights.folder import ModelFolder, read_folder
from gspo_dist.weights.shards import ShardWriter

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
PAIRS = [
    ("llama", "mixtral"),
    ("llama", "qwen2_moe"),
    ("mistral", "mixtral"),
    ("qwen2", "qwen2_moe"),
    ("qwen3", "qwen3_moe"),
]


def dense(folder: Path, kind: str = "llama", *, dtype: torch.dtype = torch.float32, **settings) -> Path:
    """A random dense model in which nothing is at its default: norms, biases, epsilon, rotary base."""
    settings = {
        "rms_norm_eps": 3e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    } | settings
    if kind == "mistral":
        settings = {"sliding_window": None} | settings
    config = AutoConfig.for_model(kind, **SIZES | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    model.to(dtype).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "family"), PAIRS)
def test_with_equal_experts_the_outputs_are_the_dense_models(tmp_path: Path, kind, family, tied):
    """A random router: the weights of the chosen experts sum to one, so it cannot matter."""
    source = dense(tmp_path / "dense", kind, tie_word_embeddings=tied)
    upcycle(source, tmp_path / "moe", Upcycling(experts=5, top_k=3, noise=0.0, router_std=0.5, family=family))
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    assert (config.model_type, config.tie_word_embeddings) == (family, tied)
    assert ("lm_head.weight" in read_folder(tmp_path / "moe")) is not tied
    assert largest_difference(source, tmp_path / "moe")[1] < 2e-5
    check_model_folder(tmp_path / "moe")  # what every learner asks of a folder
    _, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert [loaded[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")] == [set()] * 3


def test_the_comparison_sees_a_change_of_one_matrix(tmp_path: Path):
    """Otherwise the law above would say nothing."""
    source = dense(tmp_path / "dense")
    upcycle(source, tmp_path / "moe", Upcycling(experts=4, noise=0.0))
    shutil.copytree(source, tmp_path / "other")
    weights = tensors(source)
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert largest_difference(tmp_path / "other", tmp_path / "moe")[1] > 1e-3


def test_a_router_of_zeros_changes_nothing_either(tmp_path: Path):
    source = dense(tmp_path / "dense")
    upcycle(source, tmp_path / "moe", Upcycling(experts=4, noise=0.0, router_std=0.0))
    assert largest_difference(source, tmp_path / "moe")[1] < 2e-5
    assert not tensors(tmp_path / "moe")["model.layers.0.block_sparse_moe.gate.weight"].any()


def test_noise_is_a_share_of_each_matrix_and_differs_by_expert_layer_and_matrix(tmp_path: Path):
    source = dense(tmp_path / "dense", intermediate_size=32)
    upcycle(source, tmp_path / "moe", Upcycling(experts=3, noise=0.1))
    before, after = tensors(source), tensors(tmp_path / "moe")
    added = {}
    for i in range(2):
        for e in range(3):
            for dense_name, name in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
                matrix = before[f"model.layers.{i}.mlp.{dense_name}.weight"]
                moved = after[f"model.layers.{i}.block_sparse_moe.experts.{e}.{name}.weight"] - matrix
                assert float(moved.std() / matrix.std()) == pytest.approx(0.1, rel=0.08)
                added[i, e, name] = moved.flatten() / moved.norm()
    close = torch.stack(list(added.values()))
    apart = (close @ close.T - torch.eye(len(close))).abs()
    assert float(apart.max()) < 0.15  # independent directions in 1,024 dimensions: 0.03 each
    same = {n: t for n, t in before.items() if ".mlp." not in n}
    assert all(torch.equal(after[n], t) for n, t in same.items())
    assert len(after) == len(same) + 2 * (1 + 3 * 3)
    assert float(after["model.layers.0.block_sparse_moe.gate.weight"].std()) == pytest.approx(0.02, rel=0.25)


def test_the_same_seed_gives_the_same_bytes_in_files_of_any_size(tmp_path: Path):
    source = dense(tmp_path / "dense", dtype=torch.bfloat16)
    (source / "recipe.json").write_text("{}")
    for name, seed, size in (("a", 0, 1 << 30), ("b", 0, 10_000), ("c", 1, 1 << 30)):
        upcycle(source, tmp_path / name, Upcycling(experts=4, seed=seed), shard_bytes=size)
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    assert a.keys() == b.keys() == c.keys()
    assert all(torch.equal(a[n], b[n]) and a[n].dtype == torch.bfloat16 for n in a)
    other = {n for n in a if not torch.equal(a[n], c[n])}
    assert other == {n for n in a if "block_sparse_moe" in n}
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 1
    assert not (tmp_path / "a" / "recipe.json").exists()
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 5


def test_no_more_is_held_than_one_tensor_and_a_layers_matrices(tmp_path: Path, monkeypatch):
    """What was read of the dense model dies with its layer, what was made for the MoE before the next one."""
    source = dense(tmp_path / "dense", num_hidden_layers=6)
    read, make, add = ModelFolder.read, module._noised, ShardWriter.add
    held: dict[int, int] = {}
    at_each_write: list[int] = []

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        held[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, held.pop, id(tensor))
        return tensor

    def noted(self, name, tensor):
        at_each_write.append(sum(held.values()))
        return add(self, name, tensor)

    monkeypatch.setattr(ModelFolder, "read", lambda self, name: kept(read(self, name)))
    monkeypatch.setattr(module, "_noised", lambda *arguments: kept(make(*arguments)))
    monkeypatch.setattr(ShardWriter, "add", noted)
    upcycle(source, tmp_path / "moe", Upcycling(experts=8), shard_bytes=200_000)
    matrix = 32 * 48 * 4
    assert max(at_each_write) == 4 * matrix  # three of the layer, and the expert's that is written
    assert len(_files(tmp_path / "moe")) > 3
    assert all((tmp_path / "moe" / f).stat().st_size < 240_000 for f in _files(tmp_path / "moe"))


def _files(folder: Path) -> set[str]:
    return set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())


@pytest.mark.parametrize(
    ("kind", "settings", "family", "says"),
    [
        ("gemma", {}, None, "family: got 'gemma'; known: llama"),
        (
            "qwen2",
            {},
            "mixtral",
            "must become one of qwen2_moe: got 'mixtral', which has no place for biases",
        ),
        ("qwen3", {}, "mixtral", "no place for norms of queries and keys"),
        ("llama", {}, "qwen3_moe", "whose norm of queries and keys llama does not have"),
        ("llama", {"attention_bias": True}, None, "attention_bias must be false"),
        ("llama", {"mlp_bias": True}, None, "mlp_bias must be false"),
        ("llama", {"head_dim": 16}, "qwen2_moe", r"got 16 x 4 and 32; take family=mixtral"),
        ("mistral", {"sliding_window": 16}, "qwen2_moe", "sliding_window must be null"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, None, "must attend to all tokens"),
    ],
)
def test_what_the_moe_has_no_place_for_is_refused(tmp_path: Path, kind, settings, family, says):
    source = dense(tmp_path / "dense", kind, **settings)
    with pytest.raises(ValueError, match=says):
        upcycle(source, tmp_path / "moe", Upcycling(experts=4, family=family))
    assert not (tmp_path / "moe").exists()


def test_biases_that_the_moe_does_have_a_place_for_are_kept(tmp_path: Path):
    source = dense(tmp_path / "dense", "qwen3", attention_bias=True)
    upcycle(source, tmp_path / "moe", Upcycling(experts=4, noise=0.0))
    assert largest_difference(source, tmp_path / "moe")[1] < 2e-5


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"experts": 4, "top_k": 1}, "top_k must be at least 2: got 1"),
        ({"experts": 2, "top_k": 3}, "experts must be at least top_k: got 2 and 3"),
        ({"experts": 4, "noise": -0.1}, "noise must be a finite number"),
        ({"experts": 4, "router_std": float("nan")}, "router_std must be a finite number"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Upcycling(**settings)


def test_folders_that_are_not_the_model_of_their_config_are_refused(tmp_path: Path):
    source = dense(tmp_path / "dense")
    weights = tensors(source)

    def with_weights(changed: dict[str, torch.Tensor], says: str) -> None:
        save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=says):
            upcycle(source, tmp_path / "moe", Upcycling(experts=4))
        assert [p.name for p in tmp_path.iterdir()] == ["dense"]

    with_weights(
        {n: t for n, t in weights.items() if "layers.1.mlp.up" not in n}, "lacks model.layers.1.mlp.up"
    )
    with_weights(
        weights | {"model.layers.0.mlp.up_proj.bias": torch.ones(48)}, "mixtral has no place for model.lay"
    )
    packed = {n: t.to(torch.int8) if "q_proj" in n else t for n, t in weights.items()}
    with_weights(packed, "must be one of BF16, F16, F32: model.layers.0.self_attn.q_proj.weight")


def test_a_full_disk_and_a_folder_in_use_are_named_before_anything_is_written(tmp_path: Path, monkeypatch):
    source = dense(tmp_path / "dense")
    with pytest.raises(ValueError, match="new or empty"):
        upcycle(source, source, Upcycling(experts=4))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 50_000))
    with pytest.raises(ValueError, match="no room for the MoE: it needs 0 MiB"):
        upcycle(source, tmp_path / "moe", Upcycling(experts=4))


def test_a_tied_head_that_is_also_stored_stays_tied_and_one_of_its_own_stays_its_own(tmp_path: Path):
    source = dense(tmp_path / "dense", tie_word_embeddings=True)
    weights = tensors(source)
    twice = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(twice, source / "model.safetensors", metadata={"format": "pt"})
    upcycle(source, tmp_path / "tied", Upcycling(experts=2, noise=0.0))
    assert "lm_head.weight" not in read_folder(tmp_path / "tied")
    save_file(
        twice | {"lm_head.weight": -twice["lm_head.weight"]},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    upcycle(source, tmp_path / "own", Upcycling(experts=2, noise=0.0))
    assert AutoConfig.from_pretrained(tmp_path / "own").tie_word_embeddings is False
    own = tensors(tmp_path / "own")
    assert torch.equal(own["lm_head.weight"], -own["model.embed_tokens.weight"])


def test_the_command_writes_the_folder_and_says_how_far_it_is(tmp_path: Path, capsys):
    source = dense(tmp_path / "dense")
    command = ["upcycle", str(source), str(tmp_path / "moe"), "--experts", "4", "--seed", "3", "--check"]
    main(command)
    out = capsys.readouterr().out
    assert "2 layers of 4 experts, top-2, " in out
    assert "log-probs differ from the dense model's by " in out
    upcycle(source, tmp_path / "again", Upcycling(experts=4, seed=3))
    ours, theirs = tensors(tmp_path / "moe"), tensors(tmp_path / "again")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    with pytest.raises(SystemExit) as stop:
        main(["upcycle", str(source), str(tmp_path / "other"), "--experts", "4", "--top-k", "1"])
    assert stop.value.code == 2
    assert "top_k must be at least 2" in capsys.readouterr().err
