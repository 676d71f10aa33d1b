"""Laws of a model folder: what it holds is read from the heads, and what is wrong with it is named."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from gspo_dist.weights import folder as folder_module
from gspo_dist.weights.folder import ModelFolder, StoredTensor, read_folder, read_head
from gspo_dist.weights.verify import WeightSyncError
from tests.unit.weights.tiny_models import make


@pytest.fixture
def two_files(tmp_path):
    """a, b in the first file, c in the second, and their index."""
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "1.safetensors")
    save_file({"c": torch.zeros((), dtype=torch.int64)}, tmp_path / "2.safetensors")
    places = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tmp_path


def test_a_folder_is_read_with_and_without_its_index(two_files):
    wanted = {
        "a": StoredTensor("F32", (2, 3), "1.safetensors"),
        "b": StoredTensor("BF16", (4,), "1.safetensors"),
        "c": StoredTensor("I64", (), "2.safetensors"),
    }
    assert read_folder(two_files) == wanted
    (two_files / "model.safetensors.index.json").unlink()
    assert read_folder(two_files) == wanted


def test_metadata_is_no_tensor_and_a_file_without_tensors_is_whole(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    save_file({}, tmp_path / "none.safetensors", metadata={"format": "pt"})
    assert list(read_head(tmp_path / "a.safetensors")) == ["a"]
    assert read_head(tmp_path / "none.safetensors") == {}


@pytest.mark.parametrize("size", [0, 5, 8, 20, -1])
def test_a_torn_file_is_named(two_files, size):
    """Cut to nothing, within the length, before and within the head, and by the last byte."""
    path = two_files / "1.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"1\.safetensors is torn: .*copy"):
        read_folder(two_files)


def test_a_torn_file_says_how_much_of_it_is_there(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"describes {len(whole)} bytes, and it has {len(whole) - 100}"):
        read_head(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="is torn"):
        read_head(path)
    path.write_bytes((2).to_bytes(8, "little") + b"{]")
    with pytest.raises(ValueError, match="no safetensors file"):
        read_head(path)


def test_a_head_over_the_limit_is_no_head(two_files, monkeypatch):
    """A text file whose first bytes read as a length, beside a folder whose heads are just small enough."""
    heads = [int.from_bytes(p.read_bytes()[:8], "little") for p in two_files.glob("*.safetensors")]
    monkeypatch.setattr(folder_module, "HEAD_LIMIT", max(heads))
    assert len(read_folder(two_files)) == 3
    monkeypatch.setattr(folder_module, "HEAD_LIMIT", max(heads) - 1)
    with pytest.raises(ValueError, match="is torn"):
        read_folder(two_files)
    (two_files / "2.safetensors").write_text("{not a safetensors file, but long enough}")
    with pytest.raises(ValueError, match=r"2\.safetensors is torn"):
        read_head(two_files / "2.safetensors")


def test_a_head_of_100_mib_is_read_and_one_byte_more_is_none(tmp_path):
    """The files are holes: they take no room on the disk, and zeros are no JSON."""
    path = tmp_path / "a.safetensors"
    for length, said in ((104_857_600, "no safetensors file"), (104_857_601, "is torn")):
        path.write_bytes(length.to_bytes(8, "little"))
        with path.open("ab") as file:
            file.truncate(8 + length)
        with pytest.raises(ValueError, match=said):
            read_head(path)


def test_head_and_embedding_are_found_at_any_depth(tmp_path):
    """The language model of a larger one, and names that only look alike."""
    names = ["x.y.lm_head.weight", "x.y.embed_tokens.weight", "lm_head.bias", "a_lm_head.weight"]
    save_file({n: torch.zeros(1) for n in names}, tmp_path / "1.safetensors")
    assert ModelFolder(tmp_path).head_and_embedding == ("x.y.lm_head.weight", "x.y.embed_tokens.weight")


def test_files_and_tensors_that_the_index_only_names_are_named(two_files):
    index = two_files / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "d": "2.safetensors"}}))
    with pytest.raises(ValueError, match=r"lacks the tensor d, which .* places in 2\.safetensors \(1 such\)"):
        read_folder(two_files)
    index.write_text(json.dumps({"weight_map": {"a": "3.safetensors"}}))
    with pytest.raises(ValueError, match=r"lacks 3\.safetensors, which its index names"):
        read_folder(two_files)
    index.write_text('{"weight_map": ')
    with pytest.raises(ValueError, match=r"index\.json cannot be read"):
        read_folder(two_files)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no \*\.safetensors files"):
        read_folder(tmp_path)


def change(folder, **changes):
    """Writes other values into the folder's config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def add(folder, name, tensor):
    """Adds a tensor to the folder."""
    save_file({name: tensor}, folder / f"{name}.safetensors")


def test_the_files_decide_whether_the_head_is_tied(tmp_path):
    tied = make(tmp_path / "tied", "qwen3", tie_word_embeddings=True)
    folder = ModelFolder(tmp_path / "tied")
    assert (folder.tied, folder.has_untold_head, folder.twin) == (True, False, None)
    assert "model.embed_tokens.weight" in folder.streamed

    add(tmp_path / "tied", "lm_head.weight", tied.model.embed_tokens.weight.detach().clone())
    folder = ModelFolder(tmp_path / "tied")
    assert (folder.tied, folder.has_untold_head) == (True, False)
    assert folder.twin == ("lm_head.weight", "model.embed_tokens.weight")
    assert folder.streamed == frozenset(folder.tensors) - {"lm_head.weight"}

    make(tmp_path / "own", "qwen3")
    folder = ModelFolder(tmp_path / "own")
    assert (folder.tied, folder.has_untold_head, folder.twin) == (False, False, None)
    change(tmp_path / "own", tie_word_embeddings=True)
    folder = ModelFolder(tmp_path / "own")
    assert (folder.tied, folder.has_untold_head, folder.twin) == (False, True, None)
    assert "lm_head.weight" in folder.streamed


def test_a_config_without_a_word_on_tying_ties_nothing(tmp_path):
    make(tmp_path, "qwen3", tie_word_embeddings=True)
    folder = ModelFolder(tmp_path)
    folder.config = SimpleNamespace(get_text_config=SimpleNamespace)
    assert (folder.tied, folder.has_untold_head) == (False, False)


def test_tensors_that_transformers_does_not_load_need_not_be_streamed(tmp_path):
    """The layers for multi-token prediction of DeepSeek-V3 follow the last one: here 61, by its class."""
    make(tmp_path, "deepseek_v3")
    before = ModelFolder(tmp_path)
    assert before.ignored == frozenset()
    add(tmp_path, "model.layers.61.eh_proj.weight", torch.zeros(2))
    folder = ModelFolder(tmp_path)
    assert folder.ignored == {"model.layers.61.eh_proj.weight"}
    assert folder.streamed == before.streamed == frozenset(before.tensors)


def test_a_tensor_without_a_place_is_named_beside_what_the_folder_has(tmp_path):
    make(tmp_path, "mixtral")
    folder = ModelFolder(tmp_path)
    good = {n: t.shape for n, t in folder.tensors.items()}
    folder.check_shapes(good, "engine-1")
    folder.check_whole(good, "engine-1")
    with pytest.raises(
        WeightSyncError,
        match=r"engine-1 cannot place .*mlp\.experts\.0\.w1\.weight \[24, 32\].*but model\.layers",
    ):
        folder.check_shapes({**good, "model.layers.0.mlp.experts.0.w1.weight": (24, 32)}, "engine-1")
    with pytest.raises(WeightSyncError, match=r"model\.norm\.weight: it comes as \[31\] and is \[32\]"):
        folder.check_shapes({"model.norm.weight": (31,)}, "engine-1")
    with pytest.raises(WeightSyncError, match=r"engine-1 got no model\.norm\.weight \(1 of \d+ tensors"):
        folder.check_whole(set(good) - {"model.norm.weight"}, "engine-1")
    with pytest.raises(WeightSyncError, match=r"no tensor of that name \(but .*\w+\.weight\)"):
        folder.check_shapes({"zzz": (1,)}, "engine-1")  # nothing looks like it, and the nearest is named
