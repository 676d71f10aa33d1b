"""Every benchmark script runs, at tiny sizes, and prints the numbers that it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gspo_dist.coldstart.model import build_model, save_model
from gspo_dist.coldstart.recipes import Shape
from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.objectives import OBJECTIVES
from gspo_dist.rollout import reference

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


def run(script: str, *arguments: object) -> str:
    """What a script prints."""
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table(text: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of the Markdown tables in `text`."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def number(cell: str) -> float:
    return float(cell.replace(",", "").rstrip("%"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A two-layer MoE of a few thousand weights, with the arithmetic tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    shape = Shape(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, expert_hidden=16)
    save_model(build_model(shape, seed=0), folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def test_objectives_are_timed_by_name():
    rows = table(run("bench_objectives.py", "--tokens", 5000, "--rounds", 2))
    assert set(rows) == {"objective", "floor", *OBJECTIVES}
    assert number(rows["grpo"][2]) == 1.0  # the ratio to itself
    assert all(number(rows[name][0]) >= number(rows[name][1]) > 0 for name in OBJECTIVES)  # median, minimum


def test_log_probs_are_compared_with_float64(tmp_path):
    out = tmp_path / "out.json"
    sizes = ["--tokens", 16, "--hidden", 32, "--vocab", 1280, "--repeats", 1, "--threads", 1]
    text = run("bench_logprobs.py", *sizes, "--methods", "naive", "chunked", "--skip-check", "--out", out)
    results = json.loads(out.read_text())["tokens"]["16"]
    assert set(results) == {"floor", "naive", "chunked"}
    for name in ("naive", "chunked"):
        assert results[name]["logprob_max_error"] < 1e-5
        assert results[name]["grad_weight_error"] < 1e-5
        assert number(table(text)[name][0]) > 0


def test_a_card_is_calculated_without_one():
    rows = table(run("bench_logprobs.py", "--gpu", "H100", "--tokens", 8192))
    assert number(rows["8192"][0]) == pytest.approx(5.15, abs=0.01)  # 2 * 8192 * 2048 * 151936 / 990e12 s


def test_a_step_is_split_into_its_parts(model):
    overrides = [
        *("cluster=in_process", "learner=eager", "rollout=reference", "model=local", f"model.path={model}"),
        *("mini_batches=2", "reward=arithmetic", "rollout.prompts_per_step=2", "rollout.group_size=2"),
        *("rollout.max_prompt_tokens=16", "rollout.max_completion_tokens=4", "learner.token_budget=64"),
    ]
    rows = table(run("bench_step.py", "--steps", 4, "--", *overrides))
    parts = ("collect", "reward", "pack", "old_logprobs", "update", "flips", "sync", "other")
    assert set(parts) < set(rows)
    assert sum(number(rows[part][1]) for part in parts) == pytest.approx(100.0, abs=0.5)


def test_rollouts_begun_ahead_go_through_the_pipeline_that_runs_have():
    rows = table(run("bench_async.py", "--ahead", 1, "--steps", 2, "--learn", 0.2, "--tick", 0.001))
    seconds, _, engines_idle, learner_idle, oldest, versions, _, model, off = rows["1"]
    assert number(seconds) > 0.2 + 0.1  # learning and the publication, one after the other
    assert 0 <= number(engines_idle) < 100
    assert 0 <= number(learner_idle) < 100
    assert number(oldest) == 1
    assert 1 <= number(versions) <= 2
    assert number(seconds) / number(model) - 1 == pytest.approx(
        number(off) / 100, abs=0.04
    )  # two decimals each


def test_a_slow_tool_is_waited_for_where_nothing_else_is_begun(monkeypatch, capsys):
    """On a virtual clock: three turns of 0.5 s lie in a step of K = 0. One worker takes 24 x 0.5 s for it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(reference, "time", reference.time)  # the clock is the benchmark's, and is put back
    import bench_turns

    case = bench_turns.Case(prompts=2, steps=1, learn_s=1.0)
    bench_turns.print_tools(case, [0.0, 0.5], [0])
    rows = table(capsys.readouterr().out)
    alone, seconds = number(rows["0"][1]), number(rows["0.5"][1])
    assert 1.0 < seconds - alone < 2.0
    assert number(rows["0.5"][2]) == pytest.approx(8 / seconds, abs=0.06)
    assert number(rows["0.5"][3]) == pytest.approx(alone / seconds, abs=0.01)
    assert rows["0.5"][4] == "1.00x"
    bench_turns.print_tools(case, [0.0, 0.5], [0])
    assert table(capsys.readouterr().out) == rows  # the same on every host
    assert bench_turns.simulate_run(replace(case, workers=1), 0, 0.5).step_s > 24 * 0.5


def test_curves_of_runs_are_drawn_with_what_they_began_and_ended_with(tmp_path):
    row = {"step": 0, "eval/heldout/accuracy": 0.25}
    last = {"step": 4, "eval/heldout/accuracy": 0.75, "rollout/reward_mean": 0.5, "reward/tool_calls": 1.0}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(last)}\n")
    to = tmp_path / "curves.png"
    told = run("draw_environments.py", "--to", to, f"game:with the tool={tmp_path}", f"other:={tmp_path}")
    assert told.splitlines() == [
        f"{name}: 25.0% -> 75.0% held out" for name in ("game with the tool", "other")
    ]
    assert to.read_bytes().startswith(b"\x89PNG")


def test_a_learner_is_timed_as_a_run_starts_it(model):
    sizes = ["--sequences", 8, "--mean", 8, "--repeats", 1]
    rows = table(run("bench_learner.py", "--only", "eager", "--model", model, *sizes))
    update, old_logprobs, memory, unused = map(number, rows["eager"])
    assert min(update, old_logprobs, memory) > 0
    assert 0 < unused < 100


def test_replay_is_counted_in_bytes_and_timed(tmp_path):
    """48 layers x top-8 = 384 bytes per token: 3.22 GB for 1,024 rollouts of 8,192 tokens, moved twice."""
    out = tmp_path / "out.json"
    shape = ["--layers", 2, "--hidden", 64, "--experts", 4, "--top-k", 2, "--moe-intermediate", 16]
    sizes = ["--vocabulary", 64, "--sequences", 2, "--length", 32, "--rounds", 2, "--host-tokens", 64]
    run("bench_routing_replay.py", *shape, *sizes, "--threads", 1, "--out", out)
    report = json.loads(out.read_text())
    assert report["arithmetic"]["bytes_per_token"] == 384
    r2 = next(row for row in report["arithmetic"]["rows"] if row["mode"] == "r2" and row["length"] == 8192)
    assert (r2["recorded"], r2["device_copies"]) == (3221225472, 2 * 3221225472)
    assert set(report["step"]["modes"]) == {"none", "r2", "r3"}
    assert report["step"]["max_logprob_change"] <= 1e-5
    assert report["step"]["trace_bytes"] == 2 * 32 * (2 * 2 + 1)  # tokens x (layers x top-k + one mark)


@pytest.mark.alone
def test_a_soak_loses_no_rollout(model, tmp_path):
    """Three kills on a run without vLLM: two engines, a learner, a reward worker, the driver."""
    reward = tmp_path / "mine.py"
    reward.write_text("def sevens(prompt, completion):\n    return completion.text.count('7') / 10\n")
    told = run(
        "soak.py", "--minutes", 5, "--kills", 3, "--kill-every", 1, "--seed", 1, "--",
        "cluster=local", "learner=eager", "rollout=reference", "rollout.engines=2", "model=local",
        f"model.path={model}", "data=arithmetic", "reward=function", f"reward.function='{reward}:sevens'",
        "reward.workers=1", "mini_batches=2", "rollout.prompts_per_step=4", "rollout.group_size=2",
        "rollout.max_prompt_tokens=16", "rollout.max_completion_tokens=12", "learner.token_budget=64",
        "rollout.steps_ahead=1", "objective=gspo_recompute", "learner.precision=fp32",
        "rollout.precision=fp32", "flips.every=0",
    )  # fmt: skip
    assert "every prompt was trained once, in order" in told
    assert "kills: 3 {" in told
