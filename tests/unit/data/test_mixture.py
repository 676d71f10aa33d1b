"""Mixtures: exact shares, own epochs, exact resuming."""

from __future__ import annotations

import json

import pytest

from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.config import DataConfig
from gspo_dist.data.cursor import MixedCursor, PromptCursor
from gspo_dist.data.prompts import PromptSource
from gspo_dist.data.training import load_training
from gspo_dist.types import Prompt


def cursor(name, n):
    return PromptCursor(PromptSource(name, [Prompt(f"{name}{i}", (i,), "") for i in range(n)]), seed=1)


def mixed(**weights):
    return MixedCursor({"a": cursor("a", 10), "b": cursor("b", 3)}, weights)


def names(prompts):
    return "".join(prompt.prompt_id[0] for prompt in prompts)


def test_the_example_of_the_docstring():
    assert names(mixed(a=2, b=1).next(9)) == "abaabaaba"


@pytest.mark.parametrize("weights", [{"a": 3, "b": 1}, {"a": 0.1, "b": 0.9}, {"a": 1, "b": 2**0.5}])
def test_no_source_is_ever_more_than_one_prompt_from_its_share(weights):
    own, share = mixed(**weights), weights["a"] / sum(weights.values())
    taken = 0
    for count in range(1, 200):
        taken += names(own.next(1)) == "a"
        assert abs(taken - share * count) <= 1


def test_each_source_has_epochs_of_its_own():
    own = mixed(a=1, b=1)
    of_b = [p.prompt_id for p in own.next(18) if p.prompt_id[0] == "b"]
    assert [sorted(of_b[i : i + 3]) for i in (0, 3, 6)] == [["b0", "b1", "b2"]] * 3
    of_b.clear()
    assert own.cursors["a"].epoch == 0
    assert own.cursors["b"].epoch == 2


@pytest.mark.parametrize("cut", [1, 4, 7, 50])
def test_a_resumed_mixture_goes_on_with_the_very_next_prompt(cut):
    whole = mixed(a=2, b=1)
    whole.next(cut)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = mixed(a=2, b=1)
    resumed.load_state_dict(state)
    assert [p.prompt_id for p in resumed.next(20)] == [p.prompt_id for p in whole.next(20)]
    drawn = mixed(a=2, b=1)
    places = drawn.draw(cut)
    assert max(places) < drawn.size == 13
    assert [p.prompt_id for p in drawn.prompts(places)] == [p.prompt_id for p in mixed(a=2, b=1).next(cut)]
    with pytest.raises(ValueError, match=r"data\.mixture must be what the checkpoint was made with"):
        mixed(a=1, b=1).load_state_dict(state)


def test_a_configuration_names_files_and_weights(tmp_path):
    for name, digit in (("a.jsonl", 1), ("b.jsonl", 2)):
        rows = [{"prompt": f"{digit}+{i}=", "answer": str(digit + i)} for i in range(4)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    config = DataConfig(mixture={a: 3.0, b: 1.0}, heldout=None, train="unused")
    train, _ = load_training(config, build_tokenizer(), max_prompt_tokens=9, seed=0)
    assert len(list(train)) == 8
    batch = train.cursor(seed=0, shuffle=True).next(8)
    assert [prompt.text[0] for prompt in batch].count("1") == 6
    streamed = DataConfig(mixture={a: 3.0, b: 1.0}, heldout=None, stream_above_mb=0)
    train, _ = load_training(streamed, build_tokenizer(), max_prompt_tokens=9, seed=0)
    assert [prompt.text[0] for prompt in train.cursor(seed=0, shuffle=True).next(8)].count("1") == 6
    with pytest.raises(ValueError, match=r"data\.mixture\.x must be above 0: got 0"):
        DataConfig(mixture={"x": 0.0})


def test_a_query_set_of_a_mixture_is_not_renewed(tmp_path):
    from gspo_dist.config import RenewalConfig, RunConfig
    from gspo_dist.trainer.setup.build import make_cursor

    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": i + 1}) + "\n" for i in range(4)))
    for changes in ({"mixture": {str(path): 1.0}}, {"stream_above_mb": 0}):
        data = DataConfig(train=str(path), heldout=None, renewal=RenewalConfig(active=2), **changes)
        train, _ = load_training(data, build_tokenizer(), max_prompt_tokens=9, seed=0)
        with pytest.raises(ValueError, match=r"data\.renewal needs one source that is held in memory"):
            make_cursor(RunConfig(data=data), train)
