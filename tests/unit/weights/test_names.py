"""Laws of the names: a model streams what its folder holds, whatever transformers does to it in memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import Chunk, Transpose, WeightConverter, WeightRenaming

from gspo_dist.weights import names as module
from gspo_dist.weights.names import FileNames, hf_named_weights, stored_tensors
from tests.unit.weights.tiny_models import FAMILIES, make


def stored(folder):
    """Every tensor of the folder, by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_is_the_folder_bit_for_bit(family, tmp_path):
    hf = make(tmp_path, family)
    folder, stream = stored(tmp_path), list(hf_named_weights(hf))
    assert len(stream) == len(folder)
    got = dict(stream)
    assert set(got) == set(folder)
    for name, tensor in folder.items():
        assert torch.equal(got[name], tensor), name
        assert got[name].dtype == tensor.dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_known_without_weights(family, tmp_path):
    make(tmp_path, family)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert FileNames(hf).expected() == {n: tuple(t.shape) for n, t in stored(tmp_path).items()}


def test_mixtral_and_qwen_name_the_same_experts_in_their_own_ways(tmp_path):
    fused = torch.arange(4 * 32 * 32.0).view(4, 32, 32)
    qwen = FileNames(make(tmp_path / "qwen"))
    got = dict(qwen.split("model.layers.1.mlp.experts.gate_up_proj", fused))
    assert torch.equal(got["model.layers.1.mlp.experts.2.gate_proj.weight"], fused[2, :16])
    assert torch.equal(got["model.layers.1.mlp.experts.2.up_proj.weight"], fused[2, 16:])
    mixtral = FileNames(make(tmp_path / "mixtral", "mixtral"))
    fused = torch.arange(4 * 48 * 32.0).view(4, 48, 32)
    got = dict(mixtral.split("model.layers.1.mlp.experts.gate_up_proj", fused))
    assert torch.equal(got["model.layers.1.block_sparse_moe.experts.3.w1.weight"], fused[3, :24])
    assert torch.equal(got["model.layers.1.block_sparse_moe.experts.3.w3.weight"], fused[3, 24:])


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_part_of_the_experts_has_the_names_of_its_place(family, tmp_path):
    """Experts 1 and 2 of 4, given alone, and the whole cut into slices of one expert: the same tensors."""
    hf = make(tmp_path, family)
    names, tensors = FileNames(hf), dict(stored_tensors(hf))
    for name in (n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))):
        whole = dict(names.split(name, tensors[name]))
        part = dict(names.split(name, tensors[name][1:3], first=1))
        assert set(part) == {n for n in whole if ".experts.1." in n or ".experts.2." in n}
        assert all(torch.equal(part[n], whole[n]) for n in part)


def test_slices_do_not_change_the_stream(tmp_path, monkeypatch):
    hf = make(tmp_path)
    whole = dict(hf_named_weights(hf))
    nbytes = dict(stored_tensors(hf))["model.layers.0.mlp.experts.gate_up_proj"][0].nbytes
    for limit in (1, nbytes, 3 * nbytes):
        monkeypatch.setattr(module, "SLICE_BYTES", limit)
        sliced = list(hf_named_weights(hf))
        assert len(sliced) == len(whole)
        assert all(torch.equal(t, whole[n]) for n, t in sliced)


def test_a_part_of_what_the_folder_holds_whole_is_refused(tmp_path):
    hf = make(tmp_path, "granitemoe")
    names, tensors = FileNames(hf), dict(stored_tensors(hf))
    name = next(n for n, t in tensors.items() if t.dim() == 3)
    with pytest.raises(ValueError, match=r"whole.*got \[2, .* of \[4, "):
        list(names.split(name, tensors[name][:2]))
    with pytest.raises(KeyError):
        list(names.split("nonsense", torch.zeros(1)))


def test_a_tied_head_comes_once_and_a_head_of_its_own_comes_though_the_config_says_tied(tmp_path):
    tied = make(tmp_path / "tied", "qwen3", tie_word_embeddings=True)
    assert [
        n for n, _ in hf_named_weights(tied) if n.endswith(("embed_tokens.weight", "lm_head.weight"))
    ] == ["model.embed_tokens.weight"]
    own = make(tmp_path / "own", "qwen3")
    own.config.tie_word_embeddings = True
    assert torch.equal(dict(hf_named_weights(own))["lm_head.weight"], own.lm_head.weight)


def test_buffers_that_folders_hold_come_and_rotary_tables_do_not(tmp_path):
    hf = make(tmp_path, "glm4_moe")
    names = [n for n, _ in stored_tensors(hf)]
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in names
    assert not any("inv_freq" in n for n in names)
    assert all(not t.requires_grad for _, t in stored_tensors(hf))


def test_the_stream_is_not_a_copy_where_nothing_is_converted(tmp_path):
    hf = make(tmp_path)
    assert dict(hf_named_weights(hf))["model.norm.weight"].data_ptr() == hf.model.norm.weight.data_ptr()


class Renamed(torch.nn.Module):
    """Parameters of every rank that only change their names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Parameter(torch.ones(s)) for s in ((), (1,), (3, 2)))
        self.config = SimpleNamespace()
        self._weight_conversions = [WeightRenaming(rf"old\.{n}$", n) for n in "abc"]


def test_parameters_of_any_rank_are_renamed():
    hf = Renamed()
    stream = dict(hf_named_weights(hf))
    assert {n: tuple(t.shape) for n, t in stream.items()} == {"old.a": (), "old.b": (1,), "old.c": (3, 2)}


class TwoProjections(torch.nn.Module):
    """q [3, 2] and k [3, 2] in memory, one tensor qk [6, 2] in the folder, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(2, 3, bias=False)
        self.norm = torch.nn.Parameter(torch.ones(2))
        self.config = SimpleNamespace()
        self._weight_conversions = [WeightConverter("qk.weight", ["q.weight", "k.weight"], [Chunk(0)])]


def test_parameters_that_the_folder_joins_are_joined():
    hf = TwoProjections()
    names = FileNames(hf)
    assert sorted(map(sorted, names.groups)) == [["k.weight", "q.weight"], ["norm"]]
    assert names.expected() == {"qk.weight": (6, 2), "norm": (2,)}
    stream = dict(hf_named_weights(hf))
    assert set(stream) == {"qk.weight", "norm"}
    assert torch.equal(stream["qk.weight"], torch.cat([hf.q.weight, hf.k.weight]))


def test_a_parameter_that_keeps_its_name_and_changes_its_layout_is_converted():
    hf = torch.nn.Module()
    hf.w, hf.config = torch.nn.Parameter(torch.arange(6.0).view(2, 3)), SimpleNamespace()
    hf._weight_conversions = [WeightConverter("w", ["w"], [Transpose(0, 1)])]
    ((name, turned),) = hf_named_weights(hf)
    assert name == "w"
    assert torch.equal(turned, hf.w.detach().T)


def test_one_of_several_that_the_folder_joins_cannot_go_alone():
    hf = TwoProjections()
    with pytest.raises(ValueError, match=r"joins q\.weight with other parameters.*backend=eager"):
        list(FileNames(hf).split("q.weight", hf.q.weight))
    assert [n for n, _ in FileNames(hf).split("norm", hf.norm)] == ["norm"]


def test_no_slice_is_larger_than_its_limit_unless_one_expert_is(tmp_path, monkeypatch):
    """4 experts of 4 KiB in gate_up_proj: one, two and four in a slice."""
    hf = make(tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensor = dict(stored_tensors(hf))[name]
    assert tensor[0].nbytes == 4096
    for limit, wanted in ((1, [1] * 4), (4096, [1] * 4), (8192, [2, 2]), (3 * 4096, [3, 1]), (1 << 20, [4])):
        names, sizes = FileNames(hf), []
        revert = module.revert_weight_conversion

        def noting(model, tensors, revert=revert, sizes=sizes):
            (given,) = tensors.values()
            if given.device.type != "meta":
                sizes.append(len(given))
            return revert(model, tensors)

        with monkeypatch.context() as patch:
            patch.setattr(module, "revert_weight_conversion", noting)
            patch.setattr(module, "SLICE_BYTES", limit)
            list(names.split(name, tensor))
        assert sizes == wanted


def test_a_slice_has_64_mib_where_nobody_says_otherwise(tmp_path):
    """8 experts of 13 MiB on meta: four are 52 MiB, and five would be 65."""
    make(tmp_path)
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 832, "num_experts": 8, "num_hidden_layers": 1}
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path, dtype="float32", **sizes))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensor = dict(stored_tensors(hf))[name]
    assert tensor[0].nbytes == 13 << 20
    assert [len(part) for _, part in FileNames(hf).split(name, tensor, stacked=True)] == [4, 4]
    told = FileNames(hf).split(name, tensor, stacked=True, slice_bytes=39 << 20)
    assert [len(part) for _, part in told] == [3, 3, 2]
    assert [len(part) for _, part in FileNames(hf).split(name, tensor[:1], stacked=True)] == [1]


def test_the_stream_of_a_model_takes_the_callers_slices(tmp_path):
    """gate_up_proj has 4 experts of 4 KiB in each of 2 layers."""
    hf = make(tmp_path)
    for limit, wanted in ((4096, [1] * 8), (12288, [3, 1, 3, 1]), (None, [4, 4])):
        stream = hf_named_weights(hf, stacked=True, slice_bytes=limit)
        assert [len(part) for name, part in stream if "{gate_proj,up_proj}" in name] == wanted


def test_expected_shapes_need_no_memory():
    """4 PiB, which no host has."""
    hf = torch.nn.Module()
    hf.w, hf.config = torch.nn.Parameter(torch.empty(1 << 50, device="meta")), SimpleNamespace()
    hf._weight_conversions = [WeightRenaming(r"old\.w$", "w")]
    assert FileNames(hf).expected() == {"old.w": (1 << 50,)}


def test_what_a_folder_holds_as_it_is_in_memory_is_known_as_unchanged():
    assert FileNames(TwoProjections()).unchanged == {"norm"}
    assert FileNames(Renamed()).unchanged == frozenset()


def test_a_model_that_no_folder_was_loaded_into_gets_no_names_of_old_times(tmp_path):
    """transformers also reads LayerNorm.gamma, of the first BERT, and would write it if asked to."""
    make(tmp_path, "qwen3")
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        hf.LayerNorm = torch.nn.LayerNorm(2)
    assert {"LayerNorm.weight", "LayerNorm.bias"} < FileNames(hf).expected().keys()


def test_a_partitioned_parameter_counts_with_the_shape_that_deepspeed_notes():
    hf = TwoProjections()
    hf.norm.ds_shape, hf.norm.data = torch.Size([2]), torch.empty(0)
    assert FileNames(hf).shapes["norm"] == (2,)
