"""What the benchmark scripts say of themselves, and how they judge. Their runs are integration tests."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.relative_to(BENCHMARKS) for path in BENCHMARKS.rglob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_tells_what_is_measured_and_how_to_run_it(script):
    """The script's first sentence, whether or not what it measures (TRL, a GPU) is there."""
    first = ast.get_docstring(ast.parse((BENCHMARKS / script).read_text())).split("\n\n")[0]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--help"],
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert " ".join(first.split()) in " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def bench_exact():
    spec = importlib.util.spec_from_file_location("bench_exact", BENCHMARKS / "bench_exact.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def case(**exact):
    """Ten tokens, of which a plain learner has two; two seconds against one."""
    off = {"packed": 2, "alone": 3, "mean": 1e-2, "max": 0.5, "forward": 1.0, "update": 4.0}
    exact = {"packed": 10, "alone": 10, "mean": 0.0, "max": 0.0, "forward": 2.0, "update": 3.0} | exact
    return {"tokens": 10, "prefill": 10, "gradient": 2e-6, "learners": {"off": off, "exact": exact}}


def test_one_token_that_differs_is_wrong_and_so_is_another_gradient(bench_exact):
    assert bench_exact.wrong("fp32", case()) == []
    assert bench_exact.wrong("bf16", case(packed=9)) == ["9 of 10 tokens equal, packed"]
    assert bench_exact.wrong("bf16", case(alone=8)) == ["8 of 10 tokens equal, alone"]
    apart = case() | {"gradient": 2e-5}
    assert bench_exact.wrong("fp32", apart) == ["the gradient is 2.0e-05 away"]
    assert bench_exact.wrong("bf16", apart) == []  # other routes


def test_the_report_has_the_counts_and_the_ratios(bench_exact):
    told = bench_exact.report([("quickstart", "bf16", 2, case())], "python benchmarks/bench_exact.py")
    assert "| quickstart | bf16 | 2 | 10 | 10 | 2 | 1.0e-02 | 5.0e-01 | 10 | 10 |" in told
    assert "| quickstart | bf16 | 2 | 2.00 | 0.75 | 2.0e-06 |" in told
