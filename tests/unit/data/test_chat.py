"""What a record holds reaches the template, and a template that refuses says where."""

from __future__ import annotations

import json
import logging
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gspo_dist.config import DataConfig
from gspo_dist.data import chat
from gspo_dist.data.chat import render
from gspo_dist.data.prompts import load_prompts
from gspo_dist.data.records import Record

DUMP = (
    "{{ messages | tojson }}|{{ tools | tojson }}|{{ enable_thinking | default('unset') }}"
    "{% if add_generation_prompt %}|cue{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str | None, **special) -> PreTrainedTokenizerFast:
    """Byte-level: it knows every character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "<|endoftext|>", **special})
    fast.chat_template = template
    return fast


def rendered(question, template, metadata=None, special=None, **options) -> str:
    record = Record("f.jsonl:7", question, "1", metadata or {})
    options = {"chat_template": True, "system_prompt": None, **options}
    return render(record, tokenizer(template, **(special or {})), **options)[0]


CONVERSATION = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "ask",
        "tool_calls": [{"type": "function", "function": {"name": "get", "arguments": '{"c":1}'}}],
    },
    {"role": "tool", "content": "sunny", "name": "get", "tool_call_id": "1"},
    {"role": "user", "content": [{"type": "text", "text": "so?"}]},
]


def test_messages_reach_the_template_as_they_are() -> None:
    messages, tools, thinking, cue = rendered(CONVERSATION, DUMP).split("|")
    assert json.loads(messages) == CONVERSATION
    assert (tools, thinking, cue) == ("null", "unset", "cue")


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_of_a_record_and_arguments_reach_the_template(as_text) -> None:
    tools = [{"type": "function", "function": {"name": "get", "parameters": {}}}]
    given = json.dumps(tools) if as_text else tools
    parts = rendered("hi", DUMP, {"tools": given}, template_args={"enable_thinking": False}).split("|")
    assert json.loads(parts[1]) == tools
    assert parts[2] == "False"


def test_tools_that_are_no_list_are_refused() -> None:
    with pytest.raises(ValueError, match=r"f.jsonl:7: 'tools' must be a list of tools: got dict"):
        rendered("hi", DUMP, {"tools": {"name": "get"}})
    with pytest.raises(ValueError, match=r"f.jsonl:7: 'tools' must be a list of tools or its JSON text"):
        rendered("hi", DUMP, {"tools": "get"})


def test_a_last_message_of_the_assistant_is_continued_and_not_closed() -> None:
    question = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "The answer is"}]
    assert rendered(question, PLAIN) == "<user>1+1?<end><assistant>The answer is"


def test_a_template_that_refuses_says_where_and_why() -> None:
    refuses = "{{ raise_exception('Only user and assistant roles are supported!') }}"
    message = (
        "f.jsonl:7: the tokenizer's chat template refuses the messages: Only user and assistant roles are "
        "supported!; change the messages to what the template allows, or data.template_args"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        rendered("hi", refuses)
    with pytest.raises(ValueError, match=r"f.jsonl:7: the tokenizer's chat template refuses the messages: "):
        rendered("hi", "{% for m in messages %}{{ m.content }")


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "pad_token"])
def test_a_tokenizer_with_one_token_for_several_purposes_is_not_refused(role) -> None:
    special = {"unk_token": "<|endoftext|>", role: "<|endoftext|>"}
    template = "{{ '<|endoftext|>' }}" + PLAIN
    assert rendered("hi", template, special=special).startswith("<|endoftext|><user>hi")


def load(tmp_path, rows, **config):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(
        DataConfig(train=str(path), chat_template=False, **config),
        "train",
        tokenizer(None),
        max_prompt_tokens=4,
        seed=0,
    )


ROWS = [{"prompt": p, "answer": "1"} for p in ("abc", "abcdef", "abc", "xyz", "uvwxyz")]


def test_prompts_that_are_too_long_stop_the_run_or_are_counted_and_named(tmp_path, caplog) -> None:
    with pytest.raises(
        ValueError, match=r"train.jsonl:2: .*max_prompt_tokens = 4 tokens: got 6; .*data.too_long=skip"
    ):
        load(tmp_path, ROWS)
    with caplog.at_level(logging.WARNING):
        source = load(tmp_path, ROWS, too_long="skip")
    assert [p.text for p in source] == ["abc", "xyz"]
    path = tmp_path / "train.jsonl"
    assert source.too_long == (f"{path}:2", f"{path}:5")
    assert (
        f"2 of 5 records are left out, over rollout.max_prompt_tokens = 4: {path}:2, {path}:5" in caplog.text
    )
    assert "1 of 5 records are left out, each an earlier prompt again" in caplog.text


def test_a_file_of_prompts_that_are_all_too_long_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"all 1 are over rollout\.max_prompt_tokens = \d+; raise"):
        load(tmp_path, [ROWS[1]], too_long="skip")


def appending(*tokens: str, **special) -> PreTrainedTokenizerFast:
    """A tokenizer without a template that puts <bos> before a text and `tokens` behind it."""
    fast = tokenizer(None, bos_token="<bos>", **special)
    fast.add_special_tokens({"bos_token": "<bos>"})
    names = ["<bos>", *tokens]
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(["<bos>", "$A", *tokens]),
        special_tokens=[(name, fast.convert_tokens_to_ids(name)) for name in dict.fromkeys(names)],
    )
    return fast


def ids_of(text: str, fast: PreTrainedTokenizerFast) -> list[str]:
    record = Record("f.jsonl:7", text, "1", {})
    ids = render(record, fast, chat_template=True, system_prompt=None)[1]
    return fast.convert_ids_to_tokens(list(ids))


def test_an_end_of_sequence_that_the_tokenizer_appends_does_not_end_the_prompt(caplog) -> None:
    """It is said once. An end that the text spells stays, and so does what stands before the text."""
    chat._tell_appended_eos.cache_clear()
    fast, eos = appending("<|endoftext|>"), "<|endoftext|>"
    assert fast("1+1=")["input_ids"][-1] == fast.eos_token_id
    with caplog.at_level(logging.WARNING):
        assert ids_of("1+1=", fast) == ["<bos>", *"1+1="]
        assert ids_of("2+2=", fast) == ["<bos>", *"2+2="]
        assert ids_of(f"ab{eos}", fast) == ["<bos>", *"ab", eos]
    assert caplog.text.count("appends <|endoftext|> to a text: prompts go without it") == 1


def test_a_tokenizer_that_appends_nothing_loses_nothing(caplog) -> None:
    chat._tell_appended_eos.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert ids_of("ab<|endoftext|>", appending()) == ["<bos>", *"ab", "<|endoftext|>"]
        assert ids_of("ab", appending("<bos>")) == ["<bos>", *"ab", "<bos>"], "no end of a sequence"
    assert caplog.text == ""


def test_a_template_argument_that_the_template_does_not_have_is_said_once(caplog) -> None:
    chat._tell_unused.cache_clear()
    with caplog.at_level(logging.WARNING):
        rendered("hi", DUMP, template_args={"enable_thinking": False})
        assert caplog.text == ""
        for _ in range(2):
            rendered("hi", DUMP, template_args={"enable_thinkng": False})
    assert caplog.text.count("has no enable_thinkng, so it changes nothing") == 1


def test_a_template_argument_is_not_looked_for_in_a_template_that_is_replaced(caplog) -> None:
    chat._tell_unused.cache_clear()
    with caplog.at_level(logging.WARNING):
        args = {"chat_template": "{{ greeting }}{{ messages[0].content }}", "greeting": "hello "}
        assert rendered("hi", DUMP, template_args=args) == "hello hi"
    assert caplog.text == ""
