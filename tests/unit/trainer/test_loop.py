"""The whole loop in one process: a real HF policy, the eager learner, the reference engine. No Ray, no vLLM."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest

from gspo_dist.cli.compose import run_config
from gspo_dist.coldstart.model import build_model, save_model
from gspo_dist.coldstart.recipes import Shape
from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.trainer.loop import run_step, start, train
from gspo_dist.trainer.setup.build import build


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(
        build_model(Shape(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, expert_hidden=16), seed=0),
        folder,
    )
    build_tokenizer().save_pretrained(folder)
    return folder


REWARD = '''
def share_of_sevens(prompt, completion):
    """Learnable at once from a random policy: the share of the digit 7."""
    return completion.text.count("7") / max(1, len(completion))

def broken(prompt, completion):
    raise KeyError("no such key")
'''


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text(REWARD)
    return path


def config(model: Path, reward: Path, run_dir: Path, *extra: str):
    return run_config(
        [
            "cluster=in_process",
            "learner=eager",
            "rollout=reference",
            "model=local",
            f"model.path={model}",
            f"run_dir={run_dir}",
            f"reward.function='{reward}:share_of_sevens'",
            "reward=function",
            "logger=quiet",
            "steps=3",
            "mini_batches=2",
            "rollout.prompts_per_step=4",
            "rollout.group_size=4",
            "rollout.max_prompt_tokens=16",
            "rollout.max_completion_tokens=8",
            "learner.token_budget=128",
            "learner.precision=fp32",
            "rollout.precision=fp32",
            "learner.optimizer.lr=0.01",
            "evaluation.prompts=8",
            "rollout.weight_sync.probe_tolerance=1e-4",
            "rollout.weight_sync.probe_every=1",
            *extra,
        ]
    )


def go(c) -> tuple[dict, list[dict]]:
    run = build(c)
    try:
        summary = train(run)
    finally:
        run.release()
    return summary, read_jsonl(Path(c.run_dir) / "metrics.jsonl")


def values(rows: list[dict]) -> list[dict]:
    """What must repeat: everything but times and speeds."""
    timed = ("time/", "perf/", "sync/check_fraction", "sync/gib_per_s")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def test_reward_rises_and_the_run_folder_is_whole(model, reward_file, tmp_path):
    summary, rows = go(config(model, reward_file, tmp_path / "run", "steps=12"))
    rewards = [r["rollout/reward_mean"] for r in rows if "rollout/reward_mean" in r]
    assert np.mean(rewards[-3:]) > 2 * np.mean(rewards[:2])
    assert summary["policy_version"] == 24
    folder = tmp_path / "run"
    for name in (
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "summary.json",
        "curves.png",
        "flips_update.png",
    ):
        assert (folder / name).stat().st_size > 0
    assert (
        json.loads((folder / "summary.json").read_text())["heldout_after"]
        == rows[-1]["eval/heldout/accuracy"]
    )
    assert (folder / "checkpoints" / "step-000012" / "manifest.json").is_file()


def test_on_policy_first_mini_batch_has_ratio_one_and_no_clipping(model, reward_file, tmp_path):
    """In fp32 the engine's log-probs are the learner's: the ratio of the first mini-batch is 1 to rounding."""
    _, rows = go(config(model, reward_file, tmp_path / "run", "steps=5"))
    for row in rows[1:]:
        assert row["objective/mini_batch_0/clip_fraction"] == 0.0
        assert row["mismatch/abs_log_ratio_max"] < 1e-5
        assert abs(row["guard/offset_clip_widths"]) < 0.05
    assert any(
        row["objective/mini_batch_1/clip_fraction"] > 0.0 for row in rows[1:]
    )  # the policy has moved by then


@pytest.mark.parametrize(
    "objective", ["grpo_r2", "grpo_r3", "gspo_r3", "gspo_recompute", "dapo", "sapo", "minirl"]
)
def test_every_path_of_old_logprobs_and_replay_runs(model, reward_file, tmp_path, objective):
    _, rows = go(config(model, reward_file, tmp_path / "run", f"objective={objective}", "steps=2"))
    last = rows[-1]
    assert last["learner/policy_version"] == 4.0
    if objective in ("grpo_r2", "grpo_r3", "gspo_recompute"):
        assert last["old_logprobs/recomputed"] == 1.0
        assert last["objective/mini_batch_0/approx_kl_k3"] == 0.0  # the same pass twice, bit for bit
    if objective.endswith(("r2", "r3")):
        assert last["routing/replay_bytes_per_token"] == pytest.approx(2 * 2 + 1)  # 2 layers, top-2, one mark
    if objective.endswith("r3"):
        assert 0.0 < last["routing/native_row_fraction"] < 0.2  # the last token of each sequence
    if objective.endswith("r2"):
        assert last["routing/native_row_fraction"] == 0.0


def test_two_runs_with_one_seed_agree(model, reward_file, tmp_path):
    _, a = go(config(model, reward_file, tmp_path / "a"))
    _, b = go(config(model, reward_file, tmp_path / "b"))
    assert values(a) == values(b)
    _, c = go(config(model, reward_file, tmp_path / "c", "seed=1"))
    assert values(a) != values(c)


def test_a_resumed_run_equals_one_that_was_not_stopped(model, reward_file, tmp_path):
    _, whole = go(config(model, reward_file, tmp_path / "whole", "steps=4"))
    stopped = config(model, reward_file, tmp_path / "parts", "steps=4", "checkpoint.every=2")
    run = build(stopped)
    try:
        start(run)
        for step in (1, 2, 3):  # one step beyond the checkpoint, then "killed"
            run_step(run, step)
    finally:
        run.release()
    _, resumed = go(stopped)
    assert values(resumed) == values(whole)


@pytest.mark.parametrize("estimator", ["batch", "ema", "subset"])
def test_the_guard_recentres_by_each_estimator(model, reward_file, tmp_path, estimator):
    """A threshold of zero makes the guard act on any measurable offset; what it takes out is what was measured."""
    _, rows = go(
        config(
            model,
            reward_file,
            tmp_path / "run",
            "objective.guard.action=recentre",
            f"objective.guard.estimator={estimator}",
            "objective.guard.threshold=0",
            "objective.guard.subset_fraction=0.5",
        )
    )
    assert all("guard/offset" in r for r in rows[1:])


def test_a_failing_reward_names_the_rollout(model, reward_file, tmp_path):
    run = build(
        config(
            model,
            reward_file,
            tmp_path / "run",
            f"reward.function='{reward_file}:broken'",
            "data.heldout=null",
        )
    )
    with pytest.raises(Exception, match=r"reward of rollout 0 .*raised KeyError"):
        train(run)
    run.release()


def test_a_diverging_run_says_what_is_saved(model, reward_file, tmp_path):
    run = build(
        config(
            model,
            reward_file,
            tmp_path / "run",
            "learner.optimizer.lr=1e30",
            "learner.optimizer.grad_clip=0",
            "rollout.weight_sync.probe_every=0",
            "flips.every=0",
        )
    )
    with pytest.raises((FloatingPointError, ValueError, RuntimeError)) as error:
        train(run)
    run.release()
    assert "finite" in str(error.value) or "nan" in str(error.value).lower()


def test_a_reference_policy_adds_its_kl(model, reward_file, tmp_path):
    _, rows = go(config(model, reward_file, tmp_path / "run", "objective.kl_coef=0.1", "steps=2"))
    first, second = rows[1]["objective/kl_reference"], rows[2]["objective/kl_reference"]
    assert 0.0 <= first < second  # the policy leaves the reference


def test_a_run_folder_is_resumed_with_its_own_settings_or_not_at_all(model, reward_file, tmp_path):
    go(config(model, reward_file, tmp_path / "run", "steps=2"))
    with pytest.raises(ValueError, match="made with other settings: seed, objective;"):
        build(config(model, reward_file, tmp_path / "run", "steps=4", "seed=5", "objective=grpo"))
    with pytest.raises(
        ValueError, match=r"holds checkpoints of an earlier run and checkpoint\.resume is false"
    ):
        build(config(model, reward_file, tmp_path / "run", "steps=4", "checkpoint.resume=false"))
    summary, rows = go(config(model, reward_file, tmp_path / "run", "steps=3"))  # more steps is no other run
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert summary["policy_version"] == 6


def test_a_run_folder_has_one_run_at_a_time(model, reward_file, tmp_path):
    mine = config(model, reward_file, tmp_path / "run", "steps=1")
    first = build(mine)
    try:
        with pytest.raises(
            ValueError, match=r"run_dir .* is in use by process \d+ on .*: wait for it, or choose another"
        ):
            build(mine)
    finally:
        first.release()
    go(mine)


@pytest.mark.parametrize("objective", ["grpo_r2", "grpo_r3", "gspo_r3"])
def test_the_host_holds_the_traces_of_one_batch_once_beside_the_mini_batch_in_use(
    model, reward_file, tmp_path, objective, monkeypatch
):
    run = build(
        config(
            model,
            reward_file,
            tmp_path / "run",
            f"objective={objective}",
            "steps=2",
            "mini_batches=4",
            "flips.every=0",
        )
    )
    seen, others = [], trace_bytes_alive()

    def watched(name):
        verb = getattr(run.learner, name)

        def call(mini, *args, **kwargs):
            batches = getattr(mini, "micro_batches", mini)
            if kwargs or args:  # not the probe of the weight sync
                seen.append(
                    (
                        trace_bytes_alive() - others,
                        sum(b.routing.nbytes for r in batches for b in r if b.routing),
                    )
                )
            return verb(mini, *args, **kwargs)

        monkeypatch.setattr(run.learner, name, call)

    watched("forward_backward")
    watched("logprobs")
    try:
        train(run)
    finally:
        run.release()
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    batch = [row["routing/replay_bytes"] for row in rows if "routing/replay_bytes" in row]
    in_use = max(used for _, used in seen)
    assert 0 < in_use < 0.5 * max(batch)
    assert max(alive for alive, _ in seen) <= max(batch) + in_use
    assert max(alive for alive, _ in seen) >= min(batch)  # the count sees them


def trace_bytes_alive() -> int:
    """Bytes of memory behind all routing traces of the process; views of one array count once."""
    gc.collect()
    arrays = {}
    for trace in gc.get_objects():
        if type(trace) is RoutingTrace:
            for array in (trace.expert_ids, trace.known):
                while isinstance(array.base, np.ndarray):
                    array = array.base
                arrays[id(array)] = array.nbytes
    return sum(arrays.values())
