"""The environment of a run is checked, described to the policy, and absent by default."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from gspo_dist.cli.compose import run_config
from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.data.prompts import PromptSource, load_prompts
from gspo_dist.data.training import TrainingPrompts
from gspo_dist.rollout.turns import ChatBridge
from gspo_dist.trainer.setup.environment import (
    CheckedEnvironment,
    check_environment,
    judged_heldout,
    judged_train,
    start_episodes,
)
from gspo_dist.types import Prompt
from tests.unit.data.test_chat import tokenizer
from tests.unit.rollout.test_turns import CHATML, SPECIAL, STRIPS

MODULE = "gspo_dist.trainer.setup.environment"
CHAT = ("data.chat_template=true", "data.prompt_key=prompt")


def chat_tokenizer(template):
    fast = tokenizer(template)
    fast.add_special_tokens(SPECIAL)
    return fast


@pytest.mark.slow
def test_tools_are_described_in_prompts_and_the_cue_is_the_openings(tmp_path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "What is 2*3?", "answer": "6"}))
    fast = chat_tokenizer(CHATML)
    c = run_config(["environment.tools=[calculate]", f"data.train={data}", *CHAT])
    checked = check_environment(c, fast)
    assert (checked.form, checked.bridge.role) == ("hermes", "tool")
    [prompt] = load_prompts(c.data, "train", fast, max_prompt_tokens=999, seed=0, **checked.rendering)
    assert '"name": "calculate"' in prompt.text
    assert prompt.text.endswith("<|im_start|>user\nWhat is 2*3?<|im_end|>\n")
    opened = fast.decode([*prompt.token_ids, *checked.bridge.opening(None)])
    assert opened == prompt.text + "<|im_start|>assistant\n"


@pytest.mark.slow
def test_the_bridge_renders_with_the_runs_own_arguments_and_tools() -> None:
    template = CHATML.replace("assistant\n", "assistant\n{% if think %}<think>\n{% endif %}")
    knobs = ["environment.tools=[calculate]", "+data.template_args.think=true", *CHAT]
    bridge = check_environment(run_config(knobs), chat_tokenizer(template)).bridge
    assert bridge.tokenizer.decode(bridge.opening(None)).endswith("<|im_start|>assistant\n<think>\n")
    assert [tool["function"]["name"] for tool in bridge.tools] == ["calculate"]


@pytest.mark.parametrize(
    ("asked", "template", "chat"),
    [("true", CHATML, True), ("false", CHATML, False), ("true", None, False)],
    ids=["chat", "declined", "without a template"],
)
def test_a_bridge_is_made_of_what_the_environment_and_the_template_say(
    monkeypatch, asked, template, chat
) -> None:
    """No process is started: what the environment would describe is given."""
    given = {}

    def noted(name, answer):
        def call(*arguments, **options):
            given[name] = (arguments, options)
            return answer

        monkeypatch.setattr(f"{MODULE}.{name}", call)

    noted("describe", {"tools": ["calculate"]})
    noted("make_bridge", "bridge")
    noted("stop_ids", (5,))
    noted("format_of", "form")
    c = run_config(
        [
            *("environment.factory=guess", "environment.tokens_per_answer=77", "environment.stop=[x]"),
            *("environment.role=user", "environment.keep_history=true"),
            *(f"data.chat_template={asked}", "data.prompt_key=prompt", "+data.template_args.think=true"),
            "+cluster.env.OF_THE_RUN=word",
        ]
    )
    words = SimpleNamespace(chat_template=template)
    checked = check_environment(c, words)
    assert given["stop_ids"] == ((words, c.environment.stop), {})
    assert given["format_of"] == ((template,), {})
    assert given["describe"] == ((c.environment, "form", {"OF_THE_RUN": "word"}), {})
    assert given["make_bridge"] == (
        (words,),
        {
            "chat": chat,
            "limit": 77,
            "role": "user",
            "keep_history": True,
            "template_args": {"think": True},
            "tools": ["calculate"],
        },
    )
    assert (checked.bridge, checked.form) == ("bridge", "form")
    assert checked.rendering == ({"tools": ["calculate"], "cue": False} if chat else {})
    del given["describe"]
    assert check_environment(run_config([]), words) is None
    assert "describe" not in given


def test_an_environments_processes_are_started_with_the_runs_variables(monkeypatch) -> None:
    class Pool:
        def __init__(self, *made_of) -> None:
            self.made_of, self.started = made_of, 0

        def start(self) -> None:
            self.started += 1

    monkeypatch.setattr(f"{MODULE}.LocalEnvironmentPool", Pool)
    c = run_config(["experiment=guess", "+cluster.env.OF_THE_RUN=word"])
    episodes = start_episodes(c, CheckedEnvironment("bridge", "hermes", {}))
    assert episodes.pool.made_of == (c.environment, "hermes", {"OF_THE_RUN": "word"})
    assert (episodes.pool.started, episodes.config, episodes.bridge) == (1, c.environment, "bridge")
    assert start_episodes(c, None) is None


@pytest.mark.slow
def test_started_episodes_have_the_runs_environment_bridge_and_variables() -> None:
    c = run_config(["experiment=guess", "+cluster.env.SECRET_OF_THE_RUN=word"])
    checked = check_environment(c, build_tokenizer())
    episodes = start_episodes(c, checked)
    try:
        assert (episodes.config, episodes.bridge) == (c.environment, checked.bridge)
        assert episodes.pool.config.factory == c.environment.factory
        assert (episodes.pool.form, episodes.pool.env) == (checked.form, {"SECRET_OF_THE_RUN": "word"})
    finally:
        episodes.pool.close()
    assert start_episodes(c, None) is None


def test_a_prefilled_answer_is_refused_with_its_record(tmp_path) -> None:
    data = tmp_path / "train.jsonl"
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "It"}]
    data.write_text(json.dumps({"prompt": talk, "answer": "6"}))
    c = run_config([f"data.train={data}", *CHAT])
    with pytest.raises(
        ValueError, match=r"train.jsonl:1: the last message is the assistant's .* no environment"
    ):
        load_prompts(c.data, "train", chat_tokenizer(CHATML), max_prompt_tokens=99, seed=0, cue=False)


@pytest.mark.slow
def test_a_template_without_a_bridge_is_told_before_the_run() -> None:
    c = run_config(["environment.factory=guess", *CHAT])
    with pytest.raises(ValueError, match="cannot be bridged"):
        check_environment(c, chat_tokenizer(STRIPS))
    kept = check_environment(
        run_config(["environment.factory=guess", "environment.keep_history=true", *CHAT]),
        chat_tokenizer(STRIPS),
    )
    assert isinstance(kept.bridge, ChatBridge)


@pytest.mark.slow
def test_plain_text_keeps_its_prompts() -> None:
    checked = check_environment(run_config(["experiment=calculator"]), build_tokenizer())
    assert checked.rendering == {}
    assert not isinstance(checked.bridge, ChatBridge)
    with pytest.raises(ValueError, match=r"environment.stop must hold texts of one token each"):
        check_environment(run_config(["experiment=calculator", "environment.stop=[ab]"]), build_tokenizer())
    assert check_environment(run_config([]), build_tokenizer()) is None


def test_answers_are_read_where_the_reward_function_is_asked(caplog) -> None:
    mixed = PromptSource("m", [Prompt("p", (1,), "?", {"value": 2}), Prompt("q", (2,), "?", "2")])
    assert judged_heldout(run_config(["experiment=guess"]), mixed) is mixed
    for knobs in (["experiment=calculator"], [], ["experiment=guess", "environment.reward=sum"]):
        with pytest.raises(ValueError, match=r"p: .*cannot read the answer"):
            judged_heldout(run_config(knobs), mixed)
        with pytest.raises(ValueError, match=r"p: .*cannot read the answer"):
            judged_train(run_config(knobs), TrainingPrompts({"m": mixed}, {}))
    skip = run_config(["data.bad_rows=skip"])
    train = TrainingPrompts({"m": mixed}, {})
    judged_train(skip, train)
    assert [p.prompt_id for p in judged_heldout(skip, mixed)] == ["q"] == [p.prompt_id for p in train]
    assert "m: 1 rows are left out, as nobody could judge them: p: reward.function" in caplog.text
    with pytest.raises(ValueError, match="data source m must hold an answer that the reward can read: p: "):
        judged_heldout(skip, PromptSource("m", [mixed[0]]))
