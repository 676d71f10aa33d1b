"""Whole runs whose rollouts are begun ahead: a real policy, the eager learner and the reference engine."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from gspo_dist.metrics.jsonl import append, read_jsonl
from gspo_dist.rollout.pool import NoEngineLeft
from gspo_dist.trainer.buffer import BegunStep
from gspo_dist.trainer.clockwork import open_record, read_record
from gspo_dist.trainer.loop import run_step, start
from gspo_dist.trainer.setup.build import build
from gspo_dist.weights.verify import WeightSyncError
from tests.unit.trainer.small import config, go, values

BY_THE_CLOCK = ("rollout.steps_ahead=2", "objective=gspo_recompute")
AHEAD = ("rollout.steps_ahead=2", "rollout.ticks_per_step=3", "objective.old_logprobs=recompute")


class Synchronous:
    """The loop's collector as it was before there was a pipeline: one blocking call of the engine."""

    def __init__(self, run) -> None:
        self.run, self.plain = run, run.collector
        run.collector = self

    def sample(self, step):
        count = self.run.config.rollout.prompts_per_step
        first, spec = (step - 1) * count, self.plain.spec_of(step)
        prompts = self.plain.cursor.next(count)
        groups = self.run.pool.engine.generate(prompts, spec, range(first, first + count))
        finished = {(first + g, i): c for g, group in enumerate(groups) for i, c in enumerate(group)}
        self.begun = BegunStep(prompts, first, spec, self.plain.cursor.state_dict(), finished=finished)

    def judged(self, step):
        items = self.begun.unjudged()
        self.begun.take(items, self.run.rewards.judge(items))
        return self.begun.rollouts()

    def pause(self):
        assert self.run.pool.engine.rows == []

    def __getattr__(self, name):
        return getattr(self.plain, name)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["gspo", "grpo_r2", "grpo_r3", "gspo_r3"])
def test_without_steps_ahead_it_is_the_synchronous_loop_digit_for_digit(
    model, reward_file, tmp_path, objective
):
    """Law 8."""
    knobs = [f"objective={objective}", "steps=2", "rollout.max_completion_tokens=20", "flips.every=1"]
    _, rows = go(config(model, reward_file, tmp_path / "a", *knobs))
    _, plain = go(config(model, reward_file, tmp_path / "b", *knobs), Synchronous)
    assert values(rows) == values(plain)
    assert (tmp_path / "a/samples.jsonl").read_text() == (tmp_path / "b/samples.jsonl").read_text()
    assert not (tmp_path / "a" / "ticks.jsonl").exists()
    manifest = json.loads((tmp_path / "a/checkpoints/step-000002/manifest.json").read_text())
    assert manifest["rollouts"] == {}


class Books:
    """The rollouts of every step, and all tokens that were sampled for training."""

    def __init__(self, run) -> None:
        self.rollouts, self.tokens, plain = [], 0, run.collector.judged
        advance = run.collector.pool.advance

        def judged(step):
            self.rollouts += (told := plain(step))
            return told

        def counted(ticks, seconds):
            told = advance(ticks, seconds)
            self.tokens += sum(progress.tokens for progress in told.values())
            return told

        run.collector.judged, run.pool.advance = judged, counted

    def trained(self):
        return [
            (
                r.rollout_id,
                r.prompt.prompt_id,
                r.completion.token_ids.tolist(),
                r.completion.logprobs.tolist(),
            )
            for r in self.rollouts
        ]

    def versions(self):
        return [r.completion.policy_versions.tolist() for r in self.rollouts]


def stopped_and_resumed(c, after, books):
    """Runs some steps beyond a checkpoint, is killed, and goes on to the end."""
    run = build(c)
    books.append(Books(run))
    try:
        start(run)
        for step in range(1, after + 1):
            run_step(run, step)
    finally:
        run.release()
    return go(c, lambda run: books.append(Books(run)))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["gspo", "gspo_r3"])
def test_a_run_with_steps_ahead_that_is_stopped_anywhere_equals_one_that_was_not(
    model, reward_file, tmp_path, objective
):
    """Laws 9, 10, 11, 13, 14 and 18 on two runs: one whole, one stopped after step 3 of a checkpoint of 2.

    The second also evaluates and probes in between, which changes no rollout.
    """
    knobs = [
        *AHEAD, f"objective={objective}", "steps=5", "checkpoint.every=2", "rollout.max_completion_tokens=24",
        "rollout.weight_sync.probe_every=0",
    ]  # fmt: skip
    more = ["evaluation.every=1", "rollout.weight_sync.probe_every=1"]
    whole, books = [], []
    _, rows = go(config(model, reward_file, tmp_path / "whole", *knobs), lambda run: whole.append(Books(run)))
    c = config(model, reward_file, tmp_path / "parts", *knobs, *more)
    _, parts = stopped_and_resumed(c, 3, books)
    one, two = whole[0], books[1]
    kept = [row for row in values(parts) if row["step"]]
    for row, other in zip(values(rows)[1:], kept, strict=True):
        left_out = (
            "eval/",
            "sync/probe",
            "guard/from_probe",
            "guard/offset",
            "guard/active",
            "guard/applied",
        )
        mine, theirs = ({k: v for k, v in r.items() if not k.startswith(left_out)} for r in (row, other))
        assert mine == theirs
    assert two.trained() == one.trained()[2 * 16 :]
    assert two.versions() == one.versions()[2 * 16 :]
    assert books[0].trained() == one.trained()[: 3 * 16]
    # Every group once, in the cursor's order, and no token older than two publications.
    assert [r.rollout_id for r in one.rollouts] == list(range(5 * 16))
    assert len({r.prompt.prompt_id for r in one.rollouts}) == 5 * 4
    ages = [
        (r.rollout_id // 16) - v // 2 for r in one.rollouts for v in r.completion.policy_versions.tolist()
    ]
    assert (min(ages), max(ages)) == (0, 2)
    assert max(len(set(v)) for v in one.versions()) > 1
    # What was sampled is what was trained: of the stopped run, with what its checkpoint kept.
    assert one.tokens == sum(len(v) for v in one.versions())
    manifest = json.loads((tmp_path / "parts/checkpoints/step-000004/manifest.json").read_text())
    assert manifest["rollouts"]["begun"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_where_no_engine_is_left_the_run_stops_with_everything_saved(model, reward_file, tmp_path, ahead):
    """Also what was finished and sampled since the last step, and the run goes on as if nothing had been."""
    knobs = ["steps=4", "checkpoint.every=0", "flips.every=0", "rollout.max_completion_tokens=24"]
    if ahead:
        knobs += ["rollout.steps_ahead=1", "rollout.ticks_per_step=3", "objective=gspo_recompute"]
    done = 1 + ahead  # the first steps are sampled side by side, so that nothing of the second is left to do
    whole, books = [], []
    go(config(model, reward_file, tmp_path / "whole", *knobs), lambda run: whole.append(Books(run)))
    c = config(model, reward_file, tmp_path / "parts", *knobs)
    run = build(c)
    try:
        start(run)
        for step in range(1, done + 1):
            run_step(run, step)
        advance, slices = run.pool.advance, []

        def dies(ticks, seconds):
            slices.append(ticks)
            if len(slices) > 1:
                raise NoEngineLeft("no engine is left (engine-0: killed)")
            return advance(12, None)  # not by the clock, whatever K says

        run.pool.advance = dies
        with pytest.raises(NoEngineLeft) as error:
            run_step(run, done + 1)
    finally:
        run.release()
    saved = tmp_path / "parts" / "checkpoints" / f"step-{done:06d}"
    assert error.value.__notes__ == [f"at step {done + 1}, policy version {2 * done}; saved: {saved}"]
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["rollouts"]["begun"] == done + 1 + ahead
    before = run.collector.buffer.tokens()
    assert before > 32
    assert run.collector.buffer.waiting
    go(c, lambda run: books.append(Books(run)))
    # To rounding: the rest of a completion has other company than it had in one piece.
    for mine, theirs in zip(
        books[0].trained()[:16], whole[0].trained()[16 * done : 16 * (done + 1)], strict=True
    ):
        assert mine[:3] == theirs[:3]
        assert mine[3] == pytest.approx(theirs[3], abs=1e-5)
    assert [r.rollout_id for r in books[0].rollouts] == list(range(16 * done, 64))
    assert books[0].tokens + before == sum(len(r.completion) for r in books[0].rollouts)


@pytest.mark.slow
def test_a_run_by_the_clock_repeats_itself_by_its_record(model, reward_file, tmp_path):
    """Law 14. Slices by the clock differ from run to run; here they are cut at random."""
    knobs = [*BY_THE_CLOCK, "steps=3", "rollout.max_completion_tokens=24"]
    rng = np.random.default_rng(0)

    def by_chance(run):
        advance, pool = run.pool.engine.advance, run.pool
        run.pool.engine.advance = lambda ticks=None, seconds=None: advance(
            ticks if seconds is None else int(rng.integers(1, 9)), None
        )
        pool.runs_beside = True  # a thread samples while the learner works
        first.append(Books(run))

    first, again = [], []
    go(config(model, reward_file, tmp_path / "a", *knobs), by_chance)
    record = tmp_path / "a" / "ticks.jsonl"
    assert [row["step"] for row in read_jsonl(record)] == [0, 1, 2, 3]
    replay = f"rollout.replay_ticks={record}"
    repeated = config(model, reward_file, tmp_path / "b", *knobs, replay)
    go(repeated, lambda run: again.append(Books(run)))
    assert first[0].trained() == again[0].trained()
    assert first[0].versions() == again[0].versions()
    assert read_jsonl(tmp_path / "b" / "ticks.jsonl") == read_jsonl(record)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["seed=5"], r"is of another run: seed \(was 0, now 5\)"),
        (["steps=4"], r"has ticks of 3 steps: got steps = 4; set steps"),
        (["rollout.replay_ticks={}/none.jsonl"], "which is not there"),
        (["rollout.replay_ticks={}/metrics.jsonl"], "which has no such record"),
    ],
)
def test_a_record_of_another_run_is_refused_before_anything_starts(
    model, reward_file, tmp_path, bad, message
):
    knobs = [*BY_THE_CLOCK, "steps=3", f"rollout.replay_ticks={tmp_path}/ticks.jsonl"]
    given = config(model, reward_file, tmp_path / "run", *knobs)
    open_record(tmp_path, given, 0)
    append(tmp_path / "ticks.jsonl", [{"step": step, "ticks": {"engine-0": 9}} for step in (1, 2, 3)])
    append(tmp_path / "metrics.jsonl", [{"step": 1, "objective/loss": 0.0}])
    assert set(read_record(tmp_path / "ticks.jsonl", given)) == {1, 2, 3}
    other = [knob.format(tmp_path) for knob in bad]
    with pytest.raises(ValueError, match=message):
        build(config(model, reward_file, tmp_path / "run", *knobs, *other))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_publication_that_fails_leaves_all_work_withdrawn(model, reward_file, tmp_path):
    """Law 17."""
    run = build(config(model, reward_file, tmp_path / "run", *AHEAD, "rollout.max_completion_tokens=24"))
    start(run)
    finish = run.pool.engine.finish_weight_update
    run.pool.engine.finish_weight_update = lambda version: replace(finish(version), checksums={})
    with pytest.raises(WeightSyncError, match="engine-0 did not receive"):
        run_step(run, 1)
    assert run.pool.engine.rows == []
    buffer = run.collector.buffer
    assert len(buffer.waiting) + sum(len(s.finished) for s in buffer.steps.values()) == 2 * 16
    assert buffer.tokens() > 2 * 16
    run.release()


@pytest.mark.slow
def test_another_number_of_steps_ahead_is_another_run(model, reward_file, tmp_path):
    go(config(model, reward_file, tmp_path / "run", *AHEAD, "steps=1", "flips.every=0"))
    with pytest.raises(ValueError, match=r"rollout\.steps_ahead \(was 2, now 0\).*rollout\.ticks_per_step"):
        build(config(model, reward_file, tmp_path / "run", "objective=gspo_recompute", "steps=2"))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (["rollout.steps_ahead=-1"], r"rollout\.steps_ahead must be at least 0: got -1"),
        (
            ["rollout.steps_ahead=1", "rollout.ticks_per_step=-1"],
            r"ticks_per_step must be at least 0: got -1",
        ),
        (
            ["rollout.ticks_per_step=5"],
            r"ticks_per_step needs rollout\.steps_ahead of at least 1: got 5 and 0",
        ),
        (["rollout.replay_ticks=x.jsonl"], r"replay_ticks needs rollout\.steps_ahead of at least 1"),
        ([*AHEAD, "rollout.replay_ticks=x.jsonl"], r"two ways to fix .*: got 3 and 'x\.jsonl'"),
    ],
)
def test_ticks_that_mean_nothing_are_refused(model, reward_file, tmp_path, knobs, message):
    with pytest.raises(ValueError, match=message):
        config(model, reward_file, tmp_path / "run", *knobs)


def test_colocated_engines_do_no_ticks_beside_the_learner(tmp_path):
    from gspo_dist.cli.compose import run_config

    knobs = ["experiment=qwen3_30b_a3b/gspo", "cluster.colocated=true", "rollout.steps_ahead=1"]
    with pytest.raises(ValueError, match=r"ticks_per_step must be 0 or null with cluster\.colocated: got 4"):
        run_config([*knobs, "rollout.ticks_per_step=4"])
