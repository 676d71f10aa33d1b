"""Laws of an export: the source folder with other numbers, read back, which appears whole or not at all."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_dist.weights import export
from gspo_dist.weights.checksum import host_checksum
from gspo_dist.weights.export import probe_folder, verify_folder, write_hf_folder
from gspo_dist.weights.folder import read_folder
from gspo_dist.weights.names import hf_named_weights
from gspo_dist.weights.shards import ShardFile
from gspo_dist.weights.verify import WeightSyncError
from tests.unit.weights.tiny_models import FAMILIES, logits, make, read


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_computes_the_learners_logits(family, tmp_path):
    """Of changed weights: those of the source would show in the numbers."""
    hf = make(tmp_path / "source", family)
    with torch.no_grad():
        for tensor in (*hf.parameters(), *(b for n, b in hf.named_buffers() if "correction_bias" in n)):
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    count = write_hf_folder(hf_named_weights(hf), tmp_path / "source", tmp_path / "out")
    source, out = read_folder(tmp_path / "source"), read_folder(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in out.items()} == {
        n: (t.dtype, t.shape) for n, t in source.items()
    }
    assert count == len(source)
    assert torch.equal(logits(read(tmp_path / "out")), logits(hf))
    assert not torch.equal(logits(hf), logits(read(tmp_path / "source")))


def test_files_hold_about_a_shard_each_and_the_index_places_every_tensor(tmp_path, monkeypatch):
    hf = make(tmp_path / "source", "qwen3")
    monkeypatch.setattr(export, "SHARD_BYTES", 12_288)  # the head alone: 96 x 32 float32
    write_hf_folder(hf_named_weights(hf), tmp_path / "source", tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert [f.name for f in files] == [f"model-{i:05d}.safetensors" for i in range(1, len(files) + 1)]
    held = {name: f.name for f in files for name in load_file(f)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in hf.parameters())
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 12_288 for f in files)


def test_config_and_tokenizer_come_along_and_old_weights_do_not(tmp_path):
    hf = make(tmp_path / "source", "qwen3")
    (tmp_path / "source/chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "source/pytorch_model.bin").write_text("old")
    write_hf_folder(hf_named_weights(hf), tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out/config.json").read_text() == (tmp_path / "source/config.json").read_text()
    assert not (tmp_path / "out/pytorch_model.bin").exists()
    assert not (tmp_path / "out/model.safetensors").exists()


def test_a_head_of_its_own_is_exported_though_the_config_says_tied(tmp_path):
    make(tmp_path / "source", "qwen3")
    path = tmp_path / "source/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    hf = read(tmp_path / "source")
    with torch.no_grad():
        hf.lm_head.weight.mul_(2)
    write_hf_folder(hf_named_weights(hf), tmp_path / "source", tmp_path / "out")
    assert torch.equal(
        load_file(next((tmp_path / "out").glob("*.safetensors")))["lm_head.weight"], hf.lm_head.weight
    )
    assert torch.equal(logits(read(tmp_path / "out")), logits(hf))


def test_a_tied_head_that_the_source_holds_twice_is_written_twice(tmp_path):
    hf = make(tmp_path / "source", "qwen3", tie_word_embeddings=True)
    save_file(
        {"lm_head.weight": hf.model.embed_tokens.weight.detach().clone()},
        tmp_path / "source/head.safetensors",
    )
    with torch.no_grad():
        hf.model.embed_tokens.weight.mul_(3)
    count = write_hf_folder(hf_named_weights(hf), tmp_path / "source", tmp_path / "out")
    held = load_file(tmp_path / "out/model-00001.safetensors")
    assert torch.equal(held["lm_head.weight"], hf.model.embed_tokens.weight)
    assert count == len(held) - 1


def test_what_transformers_does_not_load_is_copied_and_said(tmp_path, caplog):
    hf = make(tmp_path / "source", "deepseek_v3")
    extra = {"model.layers.61.eh_proj.weight": torch.randn(3, 2)}
    save_file(extra, tmp_path / "source/more.safetensors")
    with caplog.at_level(logging.WARNING):
        write_hf_folder(hf_named_weights(hf), tmp_path / "source", tmp_path / "out")
    assert "1 tensors that transformers does not load" in caplog.text
    assert "model.layers.61.eh_proj.weight" in caplog.text
    out = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        out |= load_file(file)
    assert torch.equal(out["model.layers.61.eh_proj.weight"], extra["model.layers.61.eh_proj.weight"])
    assert set(out) == set(read_folder(tmp_path / "source"))


def without(stream, name):
    return [(n, t) for n, t in stream if n != name]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: without(s, "model.norm.weight"), r"the export got no model\.norm\.weight \(1 of 25"),
        (lambda s: [*s, ("model.extra", torch.zeros(2))], r"the export cannot place model\.extra \[2\]"),
        (lambda s: [(n, t[:-1]) for n, t in s], r"cannot place .* it comes as"),
    ],
)
def test_a_stream_that_is_not_the_sources_is_refused_and_leaves_nothing(spoil, message, tmp_path):
    hf = make(tmp_path / "source", "qwen3")
    with pytest.raises(WeightSyncError, match=message):
        write_hf_folder(spoil(list(hf_named_weights(hf))), tmp_path / "source", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_tensor_that_comes_twice_is_refused(tmp_path, monkeypatch):
    hf = make(tmp_path / "source", "qwen3")
    monkeypatch.setattr(export, "SHARD_BYTES", 1)
    stream = list(hf_named_weights(hf))
    with pytest.raises(WeightSyncError, match=r"exported model\.embed_tokens\.weight twice"):
        write_hf_folder([*stream, stream[0]], tmp_path / "source", tmp_path / "out")


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path):
    hf = make(tmp_path / "source", "qwen3")
    (tmp_path / "out").mkdir()
    write_hf_folder(hf_named_weights(hf), tmp_path / "source", tmp_path / "out")
    with pytest.raises(ValueError, match="must be new or empty"):
        write_hf_folder(hf_named_weights(hf), tmp_path / "source", tmp_path / "out")


def test_a_full_disk_is_said_with_both_numbers_and_leaves_nothing(tmp_path, monkeypatch):
    hf = make(tmp_path / "source", "qwen3")
    need = sum(p.nbytes for p in hf.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need - 1))
    with pytest.raises(ValueError, match=r"no room for the export: .* MiB free; make room or"):
        write_hf_folder(hf_named_weights(hf), tmp_path / "source", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need))
    assert write_hf_folder(hf_named_weights(hf), tmp_path / "source", tmp_path / "out") == 25


def test_a_disk_that_fills_under_way_is_said_alike_whoever_meets_it(tmp_path, monkeypatch):
    """A weight file meets it as it is, and copytree in a list of texts."""
    hf, copytree = make(tmp_path / "source", "qwen3"), shutil.copytree

    def onto_full(self, name, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", target)

    def copy(source, target, ignore):
        return copytree(source, target, ignore=ignore, copy_function=full)

    for owner, name, put in ((ShardFile, "add", onto_full), (shutil, "copytree", copy)):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, put)
            with pytest.raises(
                ValueError, match=rf"no room for the export: {tmp_path} has \d+ MiB free; make"
            ):
                write_hf_folder(hf_named_weights(hf), tmp_path / "source", tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_other_errors_of_an_export_pass(tmp_path, monkeypatch):
    hf = make(tmp_path / "source", "qwen3")

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(ShardFile, "add", denied)
    with pytest.raises(PermissionError):
        write_hf_folder(hf_named_weights(hf), tmp_path / "source", tmp_path / "out")


def test_a_disk_that_gives_back_other_bytes_is_seen(tmp_path, monkeypatch):
    hf = make(tmp_path / "source", "qwen3")
    add = ShardFile.add

    def flip(self, name, tensor):
        if name == "model.norm.weight":
            tensor = tensor.clone()
            tensor[3] += 1
        add(self, name, tensor)

    monkeypatch.setattr(ShardFile, "add", flip)
    with pytest.raises(WeightSyncError, match=r"model\.norm\.weight reads back from .* with other bytes"):
        write_hf_folder(hf_named_weights(hf), tmp_path / "source", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_tensor_is_on_disk_before_the_next_one_is_asked_for(tmp_path):
    """Each tensor dies before the next is made: no file is gathered in memory first."""
    hf = make(tmp_path / "source", "qwen3_moe")
    stored = dict(hf_named_weights(hf))
    last: list[weakref.ref] = []

    def stream():
        for name, tensor in stored.items():
            assert not last or last[0]() is None, "the tensor before is still held"
            own = tensor.clone()
            last[:] = [weakref.ref(own)]
            yield name, own
            del own

    write_hf_folder(stream(), tmp_path / "source", tmp_path / "out")
    assert len(last) == 1


def test_a_folder_with_other_tensors_than_were_written_is_seen(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "1.safetensors")
    sums = {n: host_checksum(torch.ones(2)) for n in "ab"}
    verify_folder(tmp_path, sums)
    for sent in ({"a": sums["a"]}, {**sums, "c": 0}):
        with pytest.raises(WeightSyncError, match=r"other tensors than were written, among them [bc]"):
            verify_folder(tmp_path, sent)


@pytest.fixture
def probed(tmp_path):
    """A folder, sequences with their starts, and the log-probs of the compared tokens at temperature 0.7."""
    hf = make(tmp_path, "qwen3")
    sequences = [(np.arange(2, 14), 5), (np.arange(20, 30), 0)]
    ours = []
    for tokens, start in sequences:
        ids = torch.from_numpy(tokens)
        with torch.no_grad():
            table = (hf(ids[None]).logits[0] / 0.7).log_softmax(-1)
        ours.append(np.array([float(table[t - 1, ids[t]]) for t in range(max(1, start), len(ids))]))
    return tmp_path, sequences, ours


def test_the_probe_compares_the_learner_with_transformers_over_the_folder(probed):
    folder, sequences, ours = probed
    mean, largest = probe_folder(folder, sequences, ours, 1e-5, temperature=0.7)
    assert mean < 1e-6
    assert largest < 1e-5
    shifted = [ours[0] + 0.1, ours[1]]
    with pytest.raises(WeightSyncError, match=r"exported folder .* disagree"):
        probe_folder(folder, sequences, shifted, 0.01, temperature=0.7)
    mean, largest = probe_folder(folder, sequences, shifted, 0.2, temperature=0.7)
    assert mean == pytest.approx(0.1 * 7 / 16, abs=1e-6)
    assert largest == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "fault"),
    [("model.norm.weight", "1 missing keys: model.norm.weight"), ("odd", "1 unexpected keys: odd")],
)
def test_the_probe_refuses_a_folder_that_transformers_reads_otherwise(probed, name, fault):
    folder, sequences, ours = probed
    held = load_file(folder / "model.safetensors")
    if name in held:
        del held[name]
    else:
        held[name] = torch.zeros(1)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightSyncError, match=fault):
        probe_folder(folder, sequences, ours, 1.0, temperature=0.7)


def test_the_probe_takes_the_models_own_temperature_and_the_learners_precision(probed):
    folder, sequences, _ = probed
    hf = read(folder, torch.bfloat16)
    ours = []
    for tokens, start in sequences:
        ids = torch.from_numpy(tokens)
        with torch.no_grad():
            table = hf(ids[None]).logits[0].float().log_softmax(-1)
        ours.append(np.array([float(table[t - 1, ids[t]]) for t in range(max(1, start), len(ids))]))
    assert probe_folder(folder, sequences, ours, 1e-6, dtype=torch.bfloat16)[1] < 1e-6
    with pytest.raises(WeightSyncError, match="disagree"):
        probe_folder(folder, sequences, ours, 1e-6)
