"""`learner.consistency=exact` in whole runs: real engines, real learners, and not one log-prob that differs.

A run stops by itself at the first token that differs; the tests also read the largest logged difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_dist.coldstart.model import build_model, save_model
from gspo_dist.coldstart.recipes import Shape
from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.metrics.jsonl import read_jsonl
from tests.integration import forked

SMALL = [
    "experiment=quickstart",
    "model=local",
    "steps=2",
    "learner.consistency=exact",
    "learner.token_budget=256",
    "rollout.prompts_per_step=6",
    "rollout.group_size=4",
    "rollout.max_completion_tokens=24",
    "mini_batches=2",
    "evaluation.every=0",
    "evaluation.prompts=4",
    "checkpoint.every=0",
    "flips.every=0",
    "rollout.weight_sync.probe_every=1",
    "learner.threads=1",
    "rollout.threads=1",
    "rollout.kv_cache_gib=0.05",
    "logger.console=false",
]
IN_PROCESS = ["learner=eager", "learner.world_size=1", "rollout.engines=1", "cluster.in_process=true"]
BF16 = ["learner.precision=bf16", "rollout.precision=bf16", "learner.fp32_head=false"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shape = Shape(layers=2, hidden=64, heads=2, kv_heads=1, head_dim=32, experts=8, top_k=3, expert_hidden=32)
    save_model(build_model(shape, seed=0), folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def train(tmp_path, model):
    # The model is random and never right; what it is paid for here, it does now and then.
    reward = tmp_path / "mine.py"
    reward.write_text("def sevens(prompt, completion):\n    return completion.text.count('7') / 24\n")

    def run(*overrides):
        words = ["-m", "gspo_dist", "train", *SMALL, f"model.path={model}", "reward=function"]
        words += [f"reward.function='{reward}:sevens'", f"run_dir={tmp_path / 'run'}", *overrides]
        done = forked.run(words, timeout=280)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))[1:]

    return run


@pytest.mark.parametrize(
    "overrides",
    [
        # With 3 sequences at once vLLM would take a kernel for few rows, which rounds otherwise (AMX hosts).
        pytest.param([*IN_PROCESS, *BF16, "rollout.max_num_seqs=3"], id="eager, bf16, few rows"),
        pytest.param(
            [
                *BF16,
                "objective=gspo_r3",
                "learner.deepspeed.expert_parallel=1",
                "learner.deepspeed.zero_stage=3",
            ],
            id="ZeRO 3 on two ranks, two engines, bf16, R3",
        ),
    ],
)
def test_engine_and_learner_give_every_token_the_same_log_prob(train, overrides):
    rows = train(*overrides)
    assert len(rows) == 2
    for row in rows:
        assert row["mismatch/abs_log_ratio_max"] == 0.0
        assert row["guard/offset"] == 0.0
        assert row["sync/probe_max_abs"] == 0.0
    assert rows[1]["learner/grad_norm"] > 0


def test_so_does_a_run_that_goes_on_from_its_checkpoint(train):
    [before] = train(*IN_PROCESS, *BF16, "steps=1", "checkpoint.save_last=true")
    first, second = train(*IN_PROCESS, *BF16)
    assert first == before  # with its times: it was not made again
    assert second["step"] == 2
    assert (second["mismatch/abs_log_ratio_max"], second["sync/probe_max_abs"]) == (0.0, 0.0)


def test_so_does_a_run_that_samples_ahead_wherever_versions_agree(train):
    """fp32, tempered. The third step's completions are cut by a weight update in their middle.

    What they have of the newer version was sampled after a prefill of the older one's tokens.
    """
    ahead = ["rollout.steps_ahead=1", "rollout.ticks_per_step=10", "rollout.temperature=0.7", "steps=3"]
    first, second, third = train(*IN_PROCESS, *ahead)
    for row in (first, second, third):
        assert row["guard/offset"] == 0.0
        assert row["sync/probe_max_abs"] == 0.0
    assert first["mismatch/abs_log_ratio_max"] == third["mismatch/abs_log_ratio_max"] == 0.0
    assert second["staleness/token_fraction"] == 1.0
    assert 0.3 < third["staleness/token_fraction"] < 0.7
    assert third["rollout/versions_per_completion"] > 1.5
    assert third["staleness/log_ratio_std"] > 0


def told_by(case, folder, threads):
    words = [str(Path(__file__).with_name("exact_case.py")), case, str(folder)]
    if threads == 1:
        done = forked.run(words, timeout=280)
    else:
        done = subprocess.run(
            [sys.executable, *words],
            check=False,
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.rsplit("RESULT ", 1)[1])


def test_threads_change_nothing(tmp_path):
    told = told_by("threads", tmp_path, threads=2)
    assert told["tokens"] > 64
    assert told == {"tokens": told["tokens"], "equal": told["tokens"], "where": None, "prefilled": True}


def test_preempted_groups_with_a_cached_prompt_are_equal_too(tmp_path):
    """32 completions of 64 tokens over 8 prompts of 150: the cache holds half of what was sampled alone."""
    told = told_by("crowded", tmp_path, threads=1)
    assert told["caches_prompts"]
    assert told["kv_tokens"] <= 1024
    assert told["tokens"] == told["equal"] == 32 * 64
    assert told["where"] is None


def test_a_family_with_scales_of_its_own_is_equal_too(tmp_path):
    """The others: `benchmarks/exact_families.py`."""
    told = told_by("families", tmp_path, threads=1)
    assert list(told) == ["granitemoeshared"]
    for family in told.values():
        assert family["tokens"] > 64
        assert family["exact"] == family["tokens"], family["said"]
        assert family["off"] < family["tokens"] / 4


def test_an_audit_names_the_first_operator_that_parts_engine_and_learner(tmp_path):
    told = told_by("audits", tmp_path, threads=1)
    tokens = told["exact"]["tokens"]
    assert tokens > 64
    assert told["exact"] == {"tokens": tokens, "equal": tokens, "where": None, "prefilled": True}
    assert told["plain"]["equal"] < tokens
    assert told["plain"]["where"] == "layer 0 attention"  # after its rotary
    assert told["experts"]["where"] == "layer 0 experts"
    assert told["norm"]["where"] == "layer 1 post-attention norm"
