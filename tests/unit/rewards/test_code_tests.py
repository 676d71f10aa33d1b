"""The tests of a programming problem: every form of the data files gives the same few fields."""

from __future__ import annotations

import json
import re

import pytest

from gspo_dist.rewards.code_tests import ProblemTests, read_tests

SUM = {"input": "20 22\n", "output": "42\n"}
CALL = {"input": "[1]\n2", "output": "3", "testtype": "functional"}


def named(name: str) -> dict[str, object]:
    return {**CALL, "metadata": {"func_name": name}}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # a list of tests, as in LiveCodeBench and SandboxFusion
        ([SUM], ProblemTests(("20 22\n",), ("42\n",))),
        ([SUM, {"input": "1 1", "output": "2"}], ProblemTests(("20 22\n", "1 1"), ("42\n", "2"))),
        ([{**SUM, "testtype": "stdin", "metadata": {}}], ProblemTests(("20 22\n",), ("42\n",))),
        ([{"input": {"stdin": "1"}, "output": {"stdout": "2"}}], ProblemTests(("1",), ("2",))),
        ([{"input": ["1", 2], "output": ["3", "4"]}], ProblemTests(("1\n2",), ("3\n4",))),
        ([named("g")], ProblemTests(("[1]\n2",), ("3",), "g")),
        ([named("g"), CALL], ProblemTests(("[1]\n2", "[1]\n2"), ("3", "3"), "g")),
        (
            [{**named("g"), "input": [[1], "a"], "output": {"b": 2}}],
            ProblemTests(('[1]\n"a"',), ('{"b": 2}',), "g"),
        ),
        # columns, as in APPS and TACO
        ({"inputs": ["1 2"], "outputs": ["3"]}, ProblemTests(("1 2",), ("3",))),
        ({"inputs": [["1", "2"]], "outputs": [["3"]]}, ProblemTests(("1\n2",), ("3",))),
        ({"inputs": ["1"], "outputs": ["2"], "functional": None}, ProblemTests(("1",), ("2",))),
        ({"inputs": ["1"], "outputs": ["2"], "functional": " \n"}, ProblemTests(("1",), ("2",))),
        (
            {"inputs": [[[1, 2], "a"]], "outputs": [3], "fn_name": "f"},
            ProblemTests(('[1, 2]\n"a"',), ("3",), "f"),
        ),
        (
            {"inputs": ["[1]\n2"], "outputs": ['"3"'], "fn_name": "f"},
            ProblemTests(("[1]\n2",), ('"3"',), "f"),
        ),
        # source
        ({"functional": "assert f(1) == 2"}, ProblemTests(asserts="assert f(1) == 2")),
        (
            {"functional": "assert f(1)", "inputs": ["1"], "outputs": ["2"]},
            ProblemTests(asserts="assert f(1)"),
        ),
    ],
)
def test_every_form_is_read_and_so_is_its_json(answer, expected):
    assert read_tests(answer) == expected
    assert read_tests(json.dumps(answer)) == expected


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        # what the answer itself says comes first
        ([named("g")], ProblemTests(("[1]\n2",), ("3",), "g")),
        ({"inputs": [[1]], "outputs": [2], "fn_name": "g"}, ProblemTests(("1",), ("2",), "g")),
        ([{**SUM, "testtype": "stdin"}], ProblemTests(("20 22\n",), ("42\n",))),
        # else it is the function of every test
        ([CALL], ProblemTests(("[1]\n2",), ("3",), "f")),
        ([{"input": [[1], 2], "output": 3}], ProblemTests(("[1]\n2",), ("3",), "f")),
        ({"inputs": [[1]], "outputs": ["2"]}, ProblemTests(("1",), ("2",), "f")),
    ],
)
def test_a_record_may_name_the_function_beside_its_tests(answer, read):
    assert read_tests(answer, "f") == read


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (42, "got int"),
        ("42", "got int"),
        ('"42"', "got str"),
        (b"42", "got bytes"),
        (None, "got NoneType"),
        ("no json", "got a text that is no JSON: Expecting value"),
        ([], "got an empty list; remove the record"),
        ({}, "got the fields none"),
        ({"tests": [], "more": 1}, "got the fields tests, more"),
        ({"inputs": ["1"]}, "got the fields inputs"),
        ({"outputs": ["1"]}, "got the fields outputs"),
        ({"inputs": "1", "outputs": "1"}, "got the fields inputs, outputs"),
        ({"inputs": ["1"], "outputs": []}, "got 1 inputs and 0 outputs"),
        ({"inputs": ["1"], "outputs": ["1", "2"]}, "got 1 inputs and 2 outputs"),
        ({"inputs": [], "outputs": []}, "got 0 inputs and 0 outputs"),
        ({"inputs": [1], "outputs": ["1"]}, "got the input or output '1' of type int"),
        ({"inputs": ["1"], "outputs": [{"stdout": "1"}]}, "of type dict"),
        ({"inputs": [1], "outputs": [1], "fn_name": "f"}, "got the arguments '1' of type int"),
        ({"inputs": [{"a": 1}], "outputs": [1], "fn_name": "f"}, "of type dict"),
        ([SUM, {"input": "1"}], "got test 1 = \"{'input': '1'}\""),
        ([{"output": "1"}], "got test 0 = \"{'output': '1'}\""),
        (["input output"], "got test 0 = 'input output'"),
        ([{"input": 1, "output": "1"}], "got the input or output '1' of type int"),
        ([{"input": "1", "output": None}], "got the input or output 'None' of type NoneType"),
        ([{"input": {"stdout": "1"}, "output": "1"}], "of type dict"),
        ([{"input": {"stdin": 1}, "output": "1"}], "of type dict"),
        ([CALL], "got functional tests without the name of a function (metadata.func_name)"),
        ([{**CALL, "metadata": "func_name"}], "got functional tests without the name of a function"),
        ([SUM, named("f")], "got tests of several kinds: ['functional', 'stdin'], functions ['f']"),
        ([named("f"), named("g")], "got tests of several kinds: ['functional'], functions ['f', 'g']"),
    ],
)
def test_what_holds_no_tests_is_refused_with_the_forms(answer, words):
    rule = (
        "the answer of a code record must be its tests: [{input, output}, ...], {inputs, outputs, fn_name}, "
    )
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}.*{re.escape(words)}"):
        read_tests(answer)


def test_how_many_tests_there_are():
    """Asserts run together, and pass or fail as one."""
    assert len(read_tests([SUM, SUM, SUM])) == 3
    assert len(read_tests({"functional": "assert f(1)\nassert f(2)"})) == 1
