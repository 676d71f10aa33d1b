"""The schemas that users already have: question and answer are found without a setting."""

from __future__ import annotations

import json

import pytest

from gspo_dist.data.records import to_record

USER = [{"role": "user", "content": "1+1?"}]
CASES = {
    "plain": ({"prompt": "1+1?", "answer": 2}, "1+1?", 2),
    "verl": (
        {"data_source": "x", "prompt": USER, "reward_model": {"style": "rule", "ground_truth": "2"}},
        USER,
        "2",
    ),
    "trl": ({"prompt": USER, "solution": r"So it is \boxed{2}."}, USER, "2"),
    "open reasoner": ({"prompt": [{"from": "human", "value": "1+1?"}], "final_answer": "2"}, USER, "2"),
    "openai": ({"messages": USER, "ground_truth": "2", "tools": [{"name": "t"}]}, USER, "2"),
    "openai, whole": ({"messages": [*USER, {"role": "assistant", "content": "2"}]}, USER, "2"),
    "messages as text": ({"messages": json.dumps(USER), "ground_truth": "2"}, USER, "2"),
    "nemo skills": ({"problem": "1+1?", "expected_answer": "2", "id": "a"}, "1+1?", "2"),
    "gsm8k": ({"question": "1+1?", "answer": "so\n#### 2"}, "1+1?", "so\n#### 2"),
    "a null column": ({"problem": "1+1?", "answer": None, "final_answer": "2"}, "1+1?", "2"),
    "answer before solution": ({"problem": "1+1?", "solution": "long", "answer": "2"}, "1+1?", "2"),
}


@pytest.mark.parametrize("name", CASES)
def test_question_and_answer_of_every_schema(name):
    row, question, answer = CASES[name]
    record = to_record("f:1", row, "prompt", "answer")
    assert (record.question, record.answer) == (question, answer)


def test_columns_that_are_named_are_taken_and_no_others():
    row = {"prompt": "a", "question": "b", "answer": "1", "target": "2"}
    record = to_record("f:1", row, "question", "target")
    assert (record.question, record.answer) == ("b", "2")
    assert record.metadata == {"prompt": "a", "answer": "1"}
    with pytest.raises(ValueError, match=r"f:1: no field 'q': has \['answer'.*set data.prompt_key"):
        to_record("f:1", row, "q", "target")
    with pytest.raises(ValueError, match=r"f:1: no field 'a': .*set data.answer_key"):
        to_record("f:1", row, "question", "a")


def test_tools_reach_the_template():
    record = to_record("f:1", CASES["openai"][0], "prompt", "answer")
    assert record.metadata["tools"] == [{"name": "t"}]


def test_a_text_that_only_looks_like_messages_stays_a_text():
    text = '[{"a": 1}] is a list. Sum it.'
    assert to_record("f:1", {"prompt": text, "answer": 1}, "prompt", "answer").question == text
    text = '[{"a": 1}]'
    assert to_record("f:1", {"prompt": text, "answer": 1}, "prompt", "answer").question == text
