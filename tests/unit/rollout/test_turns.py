"""The bridge: tokens after tokens, as the chat template would write them, and no template that forgets."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.rollout.turns import Bridge, ChatBridge, make_bridge, stop_ids
from tests.unit.data.test_chat import tokenizer

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS = (  # thinking before the last message of a user goes, as in Qwen3
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m['role'] == 'tool' else m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.index0 < ns.last %}{{ m['content'].split('</think>\n\n')[-1] }}"
    "{% elif m['role'] == 'tool' %}<tool_response>\n{{ m['content'] }}\n</tool_response>"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}").replace("tools", "think")
LAST_ONLY = (
    "{% for m in messages[-2:] %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_TOOLS = "{% if messages[-1]['role'] == 'tool' %}{{ raise_exception('only user') }}{% endif %}" + CHATML
SPECIAL = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}


def chat(template, role="user", **knobs):
    fast = tokenizer(template)
    fast.add_special_tokens(SPECIAL)
    return ChatBridge(fast, limit=20, role=role, **knobs)


def history(bridge, talk):
    """A conversation as an episode makes it: every turn's ids appended to those so far."""
    ids, begins = [], []
    for number, (role, text) in enumerate(talk):
        begins.append(list(ids))
        if number == 0:
            ids += bridge.tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n", add_special_tokens=False)[
                "input_ids"
            ]
            ids += bridge.opening(None)
        elif role == "assistant":
            ids += bridge.tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
        else:
            ids += bridge.reply(np.array(ids), text)
    return ids, begins


TALK = [
    ("user", "2+3?"),
    ("assistant", "<think>\nhm\n</think>\n\nadd"),
    ("tool", "5"),
    ("assistant", "it is 5"),
]


@pytest.mark.parametrize(("template", "role"), [(CHATML, "user"), (CHATML, "tool"), (STRIPS, "tool")])
def test_appended_turns_are_the_tokens_of_the_whole_conversation(template, role) -> None:
    """Law 23: and every input begins with the one before it."""
    bridge = chat(template, role)
    talk = [(role if one == "tool" else one, text) for one, text in TALK]
    ids, begins = history(bridge, talk)
    for before in begins:
        assert ids[: len(before)] == before
    messages = [{"role": one, "content": text} for one, text in talk]
    whole = bridge.tokenizer.apply_chat_template(messages, tokenize=False)
    assert bridge.tokenizer.decode(ids) + "\n" == whole


def test_a_template_that_strips_thinking_is_refused_with_three_ways_out() -> None:
    with pytest.raises(ValueError, match="strips or changes what was said before") as error:
        chat(STRIPS)
    for way_out in ("environment.role", "data.template_args", "environment.keep_history=true"):
        assert way_out in str(error.value)
    bridge = chat(STRIPS, keep_history=True)
    reply = bridge.tokenizer.decode(bridge.reply(np.array([1]), "5"))
    assert reply == "<|im_end|>\n<|im_start|>user\n5<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "role", "words"),
    [
        (LAST_ONLY, "user", "strips or changes"),
        (NO_TOOLS, "tool", r"refuses messages of the roles user, assistant, tool \(only user\)"),
        (CHATML.replace("m['content']", "m['content'] | lower"), "user", "assistant's words as they are"),
    ],
)
def test_a_template_without_a_bridge_is_refused(template, role, words) -> None:
    with pytest.raises(ValueError, match=words):
        chat(template, role)


def test_a_cue_that_opens_the_thinking_is_part_of_every_turn() -> None:
    bridge = chat(OPENS)
    assert bridge.tokenizer.decode(bridge.opening(None)).endswith("assistant\n<think>\n")


def test_the_end_of_a_turn_is_not_written_twice() -> None:
    bridge = chat(CHATML)
    end = bridge.tokenizer.convert_tokens_to_ids("<|im_end|>")
    stopped, other = bridge.reply(np.array([3, end]), "5"), bridge.reply(np.array([3, 4]), "5")
    assert other == [end, *stopped]


def test_a_reset_speaks_before_the_policy() -> None:
    bridge = chat(CHATML, "tool")
    assert bridge.tokenizer.decode(bridge.opening("go")) == (
        "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_answer_cannot_speak_as_somebody_else() -> None:
    bridge = chat(CHATML)
    text = bridge.cut("5<|im_end|>\n")
    ids = bridge.reply(np.array([1]), text)
    end = bridge.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert text == "5< |im_end|>\n"
    assert ids.count(end) == 2  # what ends the turn before, and what ends the answer


def test_a_long_answer_is_cut_to_its_first_tokens() -> None:
    bridge = chat(CHATML)
    assert bridge.cut("0123456789" * 3) == "01234567890123456789"
    assert bridge.cut("short") == "short"


WARNED = "for_bpe_even_though_it_will_corrupt_output"


def merging_tokenizer():
    """Its vocabulary has the replacement character, as those of real models do, and its decoder takes spaces
    away before full stops. transformers (5.19) does so for BPE where it is told twice.
    """
    pieces = tokenizer(None).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    mark = pieces("\N{REPLACEMENT CHARACTER}")[0][0]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, mark[:2], mark])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(mark[0], mark[1]), (mark[:2], mark[2])]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    cleans = ("clean_up_tokenization_spaces", f"clean_up_tokenization_spaces_{WARNED}")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict.fromkeys(cleans, True))


def test_an_answer_is_cut_after_a_whole_character_and_a_turn_is_read_as_it_was_said() -> None:
    fast = merging_tokenizer()
    face = "\N{GRINNING FACE}"
    assert len(fast(face)["input_ids"]) == 4
    assert len(fast("\N{REPLACEMENT CHARACTER}")["input_ids"]) == 1
    for limit, kept in ((1, "a"), (2, "a"), (4, "a"), (5, f"a{face}"), (9, f"a{face}{face}")):
        assert Bridge(fast, limit=limit).cut(f"a{face}{face}") == kept
    text = "x = [1 , 2] ; print(x) . upper ( )"
    bridge = Bridge(fast, limit=10)
    assert bridge.said(np.array(fast(text)["input_ids"])) == text
    assert bridge.cut(text) == text[:10]
    assert "".join(bridge.pieces(fast(text)["input_ids"])) == text


def test_a_template_that_describes_no_tools_is_said(caplog) -> None:
    schemas = [{"type": "function", "function": {"name": "add"}}]
    chat(CHATML, tools=schemas)
    assert not caplog.messages
    chat(CHATML.replace("tools", "nothing"), tools=schemas)
    assert "the chat template does not describe tools" in caplog.text


def test_plain_texts_follow_each_other() -> None:
    bridge = make_bridge(build_tokenizer(), chat=False, limit=3, role="user", keep_history=False)
    assert type(bridge) is Bridge
    assert bridge.opening(None) == []
    assert bridge.tokenizer.decode(bridge.opening("12")) == "12"
    assert bridge.reply(np.array([1, 2]), "34") == bridge.tokenizer("34")["input_ids"]
    assert bridge.cut("12345") == "123"
    assert bridge.said(np.array([*bridge.tokenizer("7+")["input_ids"], 1])) == "7+"


def test_a_turn_may_end_with_texts_of_one_token() -> None:
    fast = build_tokenizer()
    assert stop_ids(fast, ["=", ";"]) == tuple(fast("=;")["input_ids"])
    with pytest.raises(ValueError, match=r"environment.stop must hold texts of one token each: got '1='"):
        stop_ids(fast, ["1="])
