"""What the benchmark scripts say of themselves, and how they judge. Their runs are integration tests."""

from __future__ import annotations

import ast
import mmap
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.unit.benchmark_script import BENCHMARKS, loaded

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
    with loaded("bench_exact") as script:
        yield script


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


@pytest.fixture(scope="module")
def bench_checkpoint():
    with loaded("bench_checkpoint") as script:
        yield script


def test_files_count_for_the_rank_whose_number_they_carry(bench_checkpoint, tmp_path):
    sizes = {"__0_0.distcp": 3, "__1_0.distcp": 5, "__11_1.distcp": 7, "metadata.json": 11, "random_1.pt": 13}
    sizes |= {"bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt": 17, "mp_rank_00_model_states.pt": 19}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert [bench_checkpoint.written_by(tmp_path, rank) for rank in (0, 1, 2, 11)] == [33, 35, 0, 7]


def test_what_is_held_for_a_moment_is_the_peak(bench_checkpoint):
    with bench_checkpoint.Peak(0.001) as peak:
        # Pages of its own: an allocator may have 64 MiB at hand that are resident already.
        block = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        deadline = time.monotonic() + 30
        while peak.extra < 60 << 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        block.close()
    assert 60 << 20 < peak.extra < 100 << 20


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_bytes_read_of_files_and_of_items_are_counted(bench_checkpoint, tmp_path):
    torch.save(torch.zeros(1000), tmp_path / "a.pt")
    with bench_checkpoint.counted_reads() as read:
        torch.load(tmp_path / "a.pt")
    assert read == [(tmp_path / "a.pt").stat().st_size]
    dcp.save({"w": torch.zeros(500)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with bench_checkpoint.counted_reads() as read:
        dcp.load({"w": torch.ones(500)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert 2000 <= sum(read) < 4000
