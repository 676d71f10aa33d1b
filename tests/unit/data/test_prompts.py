"""Laws of loading: what the file says is what the engine gets, and every refusal names its line."""

from __future__ import annotations

import json
import re

import pytest

from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.config import DataConfig
from gspo_dist.data.prompts import PromptSource, check_disjoint, load_prompts
from gspo_dist.data.training import load_training
from gspo_dist.types import Prompt

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def plain():
    return build_tokenizer()


@pytest.fixture
def chatty():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def write(tmp_path):
    def write(*rows: object, name: str = "train.jsonl") -> str:
        file = tmp_path / name
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(file)

    return write


def load(path: str, tokenizer, *, limit: int = 100, **config) -> PromptSource:
    return load_prompts(DataConfig(train=path, **config), "train", tokenizer, max_prompt_tokens=limit, seed=0)


def test_a_record_becomes_its_prompt(write, plain):
    path = write({"prompt": "1+2=", "answer": "3", "level": 4}, "", {"prompt": "2+2=", "answer": 4})
    first, second = load(path, plain)
    assert first == Prompt(f"{path}:1", (4, 13, 5, 17), "1+2=", "3", {"level": 4})
    assert (second.prompt_id, second.answer) == (f"{path}:3", 4)


def test_keys_with_dots_reach_inside(write, plain):
    path = write({"extra": {"q": "1+2="}, "reward_model": {"ground_truth": "3"}})
    (prompt,) = load(path, plain, prompt_key="extra.q", answer_key="reward_model.ground_truth")
    assert (prompt.text, prompt.answer) == ("1+2=", "3")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "answer": 1}, '{"prompt": '], "train.jsonl:2: a line must be one JSON object"),
        (
            [{"prompt": "a", "answer": 1}, "", "[1]"],
            "train.jsonl:3: a record must be a JSON object: got list",
        ),
        ([{"prompt": "a"}], "train.jsonl:1: no field 'answer': has ['prompt']; set data.answer_key"),
        ([{"answer": "a"}], "train.jsonl:1: no field 'prompt': has ['answer']; set data.prompt_key"),
        ([{"prompt": "a", "answer": None}], "train.jsonl:1: the answer ('answer') is null"),
        ([{"prompt": "  ", "answer": 1}], "train.jsonl:1: the question ('prompt') is an empty text"),
        ([{"prompt": 3, "answer": 1}], "train.jsonl:1: 'prompt' must be a text or a list of messages"),
        (
            [{"prompt": [{"role": "user"}], "answer": 1}],
            "train.jsonl:1: 'prompt' must be a text or a list of messages",
        ),
        ([{"prompt": [], "answer": 1}], "train.jsonl:1: 'prompt' must be a text or a list of messages"),
        ([], "train.jsonl is empty"),
        (["", ""], "train.jsonl is empty"),
        (
            [{"prompt": "a", "answer": 1}, {"prompt": "a" * 101, "answer": 1}],
            "train.jsonl:2: a prompt must have at most rollout.max_prompt_tokens = 100 tokens: got 101",
        ),
        (
            [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 1}, {"prompt": "a", "answer": 2}],
            "again with another answer: 2 and 1",
        ),
        (
            [{"prompt": "a", "answer": 1}, {"prompt": "Ab", "answer": 1}],
            "train.jsonl:2: the model's tokenizer does not",
        ),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_by_line(write, plain, rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(write(*rows), plain)


def test_a_prompt_of_exactly_the_limit_is_taken(write, plain):
    (prompt,) = load(write({"prompt": "a" * 100, "answer": 1}), plain)
    assert len(prompt.token_ids) == 100


def test_repeated_prompts_are_left_out_and_counted(write, plain):
    rows = [{"prompt": p, "answer": 1} for p in ("a", "b", "a", "a")]
    source = load(write(*rows), plain)
    assert [p.text for p in source] == ["a", "b"]
    assert source.duplicates == 2


@pytest.mark.parametrize("name", ["data.txt", "arithmatic", "reasoning"])
def test_unknown_sources_are_refused(plain, name):
    with pytest.raises(
        ValueError, match=r"must be a .jsonl or .parquet file, arithmetic, or reasoning_gym:TASK"
    ):
        load(name, plain)


def test_bad_rows_are_left_out_where_that_is_asked_and_said(write, plain, caplog):
    path = write({"prompt": "a", "answer": 1}, {"prompt": "b"}, {"prompt": "c", "answer": 3})
    with pytest.raises(ValueError, match=":2: no field 'answer'"):
        load(path, plain)
    assert [p.text for p in load(path, plain, bad_rows="skip")] == ["a", "c"]
    assert "1 rows are left out, as they are no records" in caplog.text
    assert ":2: no field 'answer'" in caplog.text


def test_a_missing_file_is_named(plain, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/none.jsonl does not")):
        load(f"{tmp_path}/none.jsonl", plain)


def test_parquet_gives_what_jsonl_gives(write, plain, tmp_path):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "extra": {"level": i}} for i in range(5)]
    rows[3]["prompt"] = "3+1="
    path = str(tmp_path / "train.parquet")
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(rows), path, row_group_size=2)
    got, wanted = load(path, plain), load(write(*rows), plain)
    assert [(p.token_ids, p.answer, p.metadata) for p in got] == [
        (p.token_ids, p.answer, p.metadata) for p in wanted
    ]
    assert got[3].prompt_id == f"{path}:row 3"


def test_a_broken_parquet_file_is_named(plain, tmp_path):
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=re.escape(f"{path} must be a parquet file: ")):
        load(str(path), plain)


# --- chat
# -----------------------------------------------------------------------------------------------------


def test_a_text_is_rendered_by_the_template_with_the_system_prompt(write, chatty):
    path = write({"prompt": "1+2=", "answer": "3"})
    assert load(path, chatty)[0].text == "<user>1+2=<assistant>"
    assert load(path, chatty, system_prompt="be brief")[0].text == "<system>be brief<user>1+2=<assistant>"
    assert load(path, chatty, chat_template=False)[0].text == "1+2="


def test_messages_are_rendered_whatever_chat_template_says(write, chatty):
    path = write(
        {
            "prompt": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "so?"},
            ],
            "answer": "3",
        }
    )
    for chat_template in (True, False):
        text = load(path, chatty, chat_template=chat_template)[0].text
        assert text == "<user>hi<assistant>yes<user>so?<assistant>"


def test_the_template_writes_the_special_tokens_and_the_tokenizer_adds_none(write, chatty):
    from tokenizers.processors import TemplateProcessing

    chatty.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    path = write({"prompt": "1", "answer": "3"})
    assert load(path, chatty, chat_template=False)[0].token_ids == (1, 4)
    assert 1 not in load(path, chatty)[0].token_ids


@pytest.mark.parametrize(
    ("row", "config", "message"),
    [
        ("1+2=", {"system_prompt": "x"}, "data.system_prompt needs a chat template: the tokenizer has none"),
        (
            [{"role": "user", "content": "a"}],
            {},
            "train.jsonl:1: the question is a list of messages, but the tokenizer",
        ),
    ],
)
def test_a_template_that_is_needed_and_missing_is_an_error(write, plain, row, config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(write({"prompt": row, "answer": 1}), plain, **config)


def test_two_system_prompts_are_an_error(write, chatty):
    path = write(
        {"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "answer": 1}
    )
    with pytest.raises(ValueError, match=r"has a system message of its own; unset data.system_prompt"):
        load(path, chatty, system_prompt="c")


def test_a_system_prompt_with_the_template_off_is_an_error(write, chatty):
    with pytest.raises(ValueError, match=r"data.chat_template is off"):
        load(write({"prompt": "a", "answer": 1}), chatty, chat_template=False, system_prompt="c")


# --- splits
# ---------------------------------------------------------------------------------------------------


def test_a_shared_prompt_is_refused_by_both_places(write, plain):
    train = write({"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 1})
    heldout = write({"prompt": "c", "answer": 1}, {"prompt": "b", "answer": 9}, name="heldout.jsonl")
    with pytest.raises(
        ValueError, match=r"1 of 2 held-out prompts are in train, the first .*heldout.jsonl:2 = .*:2"
    ):
        load_training(DataConfig(train=train, heldout=heldout), plain, max_prompt_tokens=9, seed=0)
    check_disjoint(load(train, plain), load(heldout, plain)[:1])


def test_arithmetic_splits(plain):
    config = DataConfig(options={"size": 300, "heldout_size": 50, "digits": 2})
    train, heldout = load_training(config, plain, max_prompt_tokens=8, seed=0)
    train = list(train)
    assert (len(train), len(heldout)) == (300, 50)
    assert all(str(eval(p.text[:-1])) == p.answer for p in [*train, *heldout])


def test_no_heldout_prompts(plain):
    config = DataConfig(heldout=None)
    assert load_training(config, plain, max_prompt_tokens=16, seed=0)[1] is None
    with pytest.raises(ValueError, match=r"data.heldout is null"):
        load_prompts(config, "heldout", plain, max_prompt_tokens=16, seed=0)


def test_the_fingerprint_tells_prompts_answers_and_order_apart():
    a, b = Prompt("1", (1,), "a", "x"), Prompt("2", (2,), "b", "y")
    other = Prompt("1", (1,), "a", "z")
    prints = {PromptSource("s", p).fingerprint for p in ([a, b], [b, a], [a], [other, b])}
    assert len(prints) == 4
    assert PromptSource("elsewhere", [a, b]).fingerprint == PromptSource("s", [a, b]).fingerprint
