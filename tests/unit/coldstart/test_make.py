"""Laws of made models: what is saved loads as it was, is made once, and never seen half made."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gspo_dist.coldstart import make
from gspo_dist.coldstart.model import build_model
from gspo_dist.coldstart.recipes import RECIPES, Recipe, Shape, WarmStart, recipe_named
from gspo_dist.config import ModelConfig

TINY = Recipe(
    "quickstart",
    Shape(layers=1, hidden=32, heads=2, kv_heads=1, head_dim=32, experts=4, top_k=2, expert_hidden=32),
    WarmStart(steps=3, batch=4, digits=1),
)


def quiet(_: str) -> None:
    pass


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(RECIPES, "quickstart", TINY)


def test_the_peer_is_half_a_million_random_parameters_as_qwen_configures_them(tmp_path):
    folder = make.ensure_model(ModelConfig(recipe="peer", cache_dir=str(tmp_path)), quiet)
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = build_model(RECIPES["peer"].shape, 0)
    for (name, got), (_, expected) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(got, expected), name
    assert sum(p.numel() for p in model.parameters()) == 510_720
    config = AutoConfig.from_pretrained(folder)
    assert (config.architectures, config.norm_topk_prob, config.num_experts, config.num_experts_per_tok) == (
        ["Qwen3MoeForCausalLM"],
        True,
        8,
        2,
    )
    assert (config.eos_token_id, config.pad_token_id, config.head_dim, config.tie_word_embeddings) == (
        1,
        0,
        32,
        False,
    )
    assert model.generation_config.eos_token_id == 1


def test_the_quickstart_has_four_layers_of_eight_experts():
    shape = RECIPES["quickstart"].shape
    assert (shape.layers, shape.experts, shape.top_k) == (4, 8, 2)
    assert sum(p.numel() for p in build_model(shape, 0).parameters()) == 1_004_928


def test_a_made_model_is_found_again(tiny, tmp_path):
    config = ModelConfig(cache_dir=str(tmp_path))
    said: list[str] = []
    folder = make.ensure_model(config, said.append)
    assert any("making model 'quickstart'" in line for line in said)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    said.clear()
    assert make.ensure_model(config, said.append) == folder
    assert said == []
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert json.loads((folder / make.DONE).read_text())["fingerprint"] in folder.name


def test_every_number_of_a_recipe_and_the_seed_make_another_folder():
    other_shape = replace(TINY, shape=replace(TINY.shape, expert_hidden=64))
    other_plan = replace(TINY, warm_start=replace(TINY.warm_start, steps=4))
    other_habit = replace(
        TINY, warm_start=replace(TINY.warm_start, habits=replace(TINY.warm_start.habits, slip=0.5))
    )
    prints = [r.fingerprint(0) for r in (TINY, other_shape, other_plan, other_habit)] + [TINY.fingerprint(1)]
    assert len(set(prints)) == 5
    assert TINY.fingerprint(0) == prints[0]


def test_an_interrupted_making_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    config = ModelConfig(cache_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(make, "asdict", fail)
        with pytest.raises(KeyboardInterrupt):
            make.ensure_model(config, quiet)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []
    assert (make.ensure_model(config, quiet) / make.DONE).is_file()


def _ask(cache: str, barrier, results) -> None:
    RECIPES["quickstart"] = TINY
    said: list[str] = []
    barrier.wait()
    folder = make.ensure_model(ModelConfig(cache_dir=cache), said.append)
    results.put((str(folder), any("making model" in line for line in said), (folder / make.DONE).is_file()))


@pytest.mark.slow
def test_of_processes_that_ask_together_one_makes_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_ask, args=(str(tmp_path), barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert len({folder for folder, _, _ in answers}) == 1
    assert sorted(made for _, made, _ in answers) == [False, False, True]
    assert all(whole for _, _, whole in answers)


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be new or empty"):
        make.make_model(TINY, tmp_path, seed=0, log=quiet)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_given_path_is_taken_as_it_is(tmp_path):
    assert make.ensure_model(ModelConfig(path=str(tmp_path)), quiet) == tmp_path


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'quickstart'"):
        recipe_named("quick_start")


def test_a_relative_folder_is_found_from_processes_that_work_elsewhere(tmp_path, monkeypatch):
    """The workers of a cluster that is joined are in the folder where their host's `ray start` was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert make.ensure_model(ModelConfig(path="mine"), quiet) == tmp_path / "mine"
    made = make.ensure_model(ModelConfig(recipe="peer", cache_dir="made"), quiet)
    assert made.parent == tmp_path / "made"
