"""Suites inside a run: when, of whose policy, beside what, and what a failure costs."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager

import pytest

from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.metrics.names import metric_of
from gspo_dist.trainer.sharing import SharedGpus
from gspo_dist.trainer.suites import RunSuites
from tests.unit.evaluation.small import Table, suite, write_jsonl
from tests.unit.trainer.small import config, go

RIGHT = {(f"p{i}", j): "1" for i in range(3) for j in range(2)}


def of(folder, sampler=None, *, beside=False, every=2, steps=5, suites=None):
    chosen = [suite()] if suites is None else suites
    sampler = sampler or Table(RIGHT)
    return RunSuites(chosen, sampler, folder, {"model": "m"}, every=every, steps=steps, beside=beside)


@pytest.mark.parametrize(("every", "due"), [(2, [0, 2, 4, 5]), (0, [0, 5]), (5, [0, 5])])
def test_suites_are_due_at_the_start_on_the_schedule_and_at_the_end(tmp_path, every, due):
    assert [step for step in range(6) if of(tmp_path, every=every).due(step)] == due
    without = of(tmp_path, suites=[])
    assert without.due(0) is False
    assert (without.after_step(0), without.finish(), without.seconds) == ({}, {}, 0.0)


def test_where_engines_are_not_free_the_run_waits_and_the_row_is_the_steps_own(tmp_path):
    run = of(tmp_path)
    assert run.after_step(1) == {}
    row = run.after_step(2)
    assert (row["eval/own/avg@2"], row["eval/at_step"]) == (1.0, 2.0)
    assert 0.0 < row["time/suites_s"] < 60.0
    assert json.loads((tmp_path / "step_000002/own/setting.json").read_text())["step"] == 2
    assert run.finish() == {}  # given once
    threads = threading.active_count()
    with run.beside_learner():
        assert threading.active_count() == threads
    assert all(metric_of(key) for key in row)


class Gated(Table):
    """Answers as often as it may, and yields nothing meanwhile, as engines do between two slices."""

    def __init__(self, texts, may):
        super().__init__(texts)
        self.may = may

    def answers(self, suite, asks):
        for answers in super().answers(suite, asks):
            while self.may <= 0:
                time.sleep(0.001)
                yield []
            self.may -= 1
            yield answers


def wait_until(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_free_engines_answer_beside_the_learner_and_the_rest_before_the_publication(tmp_path):
    sampler = Gated(RIGHT, may=2)
    run = of(tmp_path, sampler, beside=True)
    assert run.after_step(2) == {}
    assert sampler.asked == []  # the collect of step 3 has the engines for itself
    with run.beside_learner():
        wait_until(lambda: len(sampler.asked) == 3)
    assert len(sampler.asked) == 3  # the third waits
    sampler.may = 10
    row = run.finish()
    assert len(sampler.asked) == 6
    assert (row["eval/own/avg@2"], row["eval/at_step"]) == (1.0, 2.0)


def test_a_learner_that_takes_longer_waits_for_nothing(tmp_path):
    sampler = Gated(RIGHT, may=6)
    run = of(tmp_path, sampler, beside=True)
    run.after_step(4)
    with run.beside_learner():
        wait_until(lambda: run.under_way is None)
    assert len(sampler.asked) == 6
    row = run.finish()
    assert row["eval/own/avg@2"] == 1.0
    assert row["time/suites_s"] < 1.0


def test_the_last_step_is_waited_for(tmp_path):
    assert of(tmp_path, beside=True).after_step(5)["eval/at_step"] == 5.0


def test_what_fails_ends_the_evaluation_and_not_the_run(tmp_path, caplog):
    run = of(tmp_path, Table(RIGHT, breaks_after=2))
    assert run.after_step(2) == {}
    assert "goes on without the suites of step 2: RuntimeError: the power is gone" in caplog.text
    run.sampler = Table(RIGHT)
    assert run.after_step(4)["eval/own/avg@2"] == 1.0


def test_a_run_that_goes_on_takes_up_what_was_interrupted_and_forgets_later_steps(tmp_path):
    first = of(tmp_path, Table(RIGHT, breaks_after=4), beside=True)
    first.after_step(2)
    with first.beside_learner():
        wait_until(lambda: first.under_way is None)
    of(tmp_path).after_step(4)
    graded = len((tmp_path / "step_000002/own/samples.jsonl").read_text().splitlines())
    again = of(tmp_path, beside=True)
    assert again.start(2) == {}
    assert not (tmp_path / "step_000004").exists()
    row = again.finish()
    assert row["eval/at_step"] == 2.0
    assert len(again.sampler.asked) == 6 - graded
    third = of(tmp_path, beside=True)
    third.start(2)
    assert third.finish() == {**row, "time/suites_s": third.seconds}  # its row was cut off with step 3's
    assert third.sampler.asked == []
    waiting = of(tmp_path)
    assert waiting.start(2) == {}  # whole, and in the row of step 2, which stays


def test_a_run_that_begins_forgets_an_earlier_one(tmp_path):
    of(tmp_path).start(0)
    fresh = of(tmp_path)
    assert fresh.start(0)["eval/at_step"] == 0.0
    assert len(fresh.sampler.asked) == 6


def test_a_run_that_is_done_has_told_the_figures_of_its_last_step(tmp_path):
    """The last step is waited for, so its figures stand in its own row also where engines are free."""
    of(tmp_path, beside=True).after_step(5)
    again = of(tmp_path, beside=True)
    assert again.start(5) == {}
    assert (again.step, again.sampler.asked) == (None, [])


def test_what_cannot_be_forgotten_stops_nothing(tmp_path):
    """A later step's name that is a file: no folder, so nothing to take away."""
    (tmp_path / "step_000004").write_text("")
    assert of(tmp_path).start(2)["eval/at_step"] == 2.0
    assert (tmp_path / "step_000004").is_file()


@pytest.mark.parametrize(
    ("beside", "begun", "threads"), [(True, True, 1), (True, False, 0), (False, True, 0)]
)
def test_engines_answer_beside_the_learner_where_they_are_free_and_something_is_asked(
    tmp_path, monkeypatch, beside, begun, threads
):
    names = []

    @contextmanager
    def alongside(name, work):
        names.append(name)
        work(lambda: False)
        yield

    monkeypatch.setattr("gspo_dist.trainer.suites.alongside", alongside)
    run = of(tmp_path, beside=beside)
    if begun:
        run.begin(2)
    with run.beside_learner():
        assert names == ["suites-beside-the-learner"] * threads
        assert len(run.sampler.asked) == 6 * threads


def test_graders_are_closed_with_the_run(tmp_path):
    run = of(tmp_path)
    run.close()
    assert run.suites[0].grader.closed == 1


@pytest.mark.slow
def test_a_whole_run_evaluates_its_suites(model, reward_file, tmp_path):
    file = write_jsonl(
        tmp_path / "own.jsonl", [{"problem": f"{i}+1=", "answer": str(i + 1)} for i in range(3)]
    )
    chosen = [
        "evaluation.suites=[own]",
        "evaluation.every=2",
        f"+evaluation.options.own={{file: {file}, reward: exact_match, samples: 2, temperature: 1.0}}",
    ]
    go(config(model, reward_file, tmp_path / "run", *chosen))
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [row["eval/at_step"] for row in rows if "eval/at_step" in row] == [0.0, 2.0, 3.0]
    assert [row["step"] for row in rows if "eval/own/avg@2" in row] == [0, 2, 3]
    result = json.loads((tmp_path / "run/evaluation/step_000002/own/result.json").read_text())
    assert len(result["samples"]) == 6
    assert {sample["tokens"] > 0 for sample in result["samples"]} == {True}
    texts = {
        step: [s["completion"] for s in json.loads(path.read_text())["samples"]]
        for step in (0, 3)
        for path in [tmp_path / f"run/evaluation/step_{step:06d}/own/result.json"]
    }
    assert texts[0] != texts[3]  # another policy


def test_a_step_finishes_the_suites_of_the_policy_before_it_publishes(monkeypatch):
    """Every answer is of one policy: what is left is sampled after learning and before the publication."""
    from types import SimpleNamespace

    from gspo_dist.trainer import loop
    from gspo_dist.trainer.clock import StepClock
    from gspo_dist.trainer.step_metrics import StepMetrics

    told, rows = [], []

    @contextmanager
    def beside(who):
        told.append(f"{who} begins")
        yield
        told.append(f"{who} ends")

    def learn(run, rollouts, step):
        with loop.learning(run):
            told.append("learn")
        return StepMetrics(rollouts={}, packing={}, update={}, old_logprobs={}, routing={}, samples=[])

    def publish(run, sampled):
        told.append("publish")
        return {}

    def finish():
        told.append("finish")
        return {"eval/own/avg@2": 0.5, "eval/at_step": 6.0}

    def after_step(step):
        told.append(f"after {step}")
        return {}

    monkeypatch.setattr(loop, "collect", lambda run, step: [])
    monkeypatch.setattr(loop, "learn", learn)
    monkeypatch.setattr(loop, "publish", publish)
    monkeypatch.setattr(loop, "log", lambda run, metrics, step: rows.append(metrics.evaluation))
    monkeypatch.setattr(loop, "commit", lambda run: None)
    monkeypatch.setattr(loop, "save_hf", lambda run, step: told.append(f"HF folder after {step}"))
    monkeypatch.setattr(loop, "checkpoint_due", lambda run, step: False)
    monkeypatch.setattr(loop, "evaluation_due", lambda run, step: False)
    monkeypatch.setattr(loop.step_metrics, "speed_metrics", lambda *args: {})
    run = SimpleNamespace(
        clock=StepClock(),
        tokens_seen=0,
        config=SimpleNamespace(cluster=SimpleNamespace(colocated=False)),
        learner=SimpleNamespace(policy_version=7),
        shared=SharedGpus(None, None, colocated=False),
        profile=lambda step: beside(f"profile of {step}"),
        collector=SimpleNamespace(
            take_speed=lambda: (0, 0.0), metrics=lambda: {}, beside_learner=lambda: beside("collector")
        ),
        suites=SimpleNamespace(finish=finish, after_step=after_step, beside_learner=lambda: beside("suites")),
    )
    loop.run_step(run, 7)
    assert told == [
        "profile of 7 begins",
        *("collector begins", "suites begins", "learn", "suites ends", "collector ends"),
        *("finish", "publish", "profile of 7 ends", "after 7", "HF folder after 7"),
    ]
    assert rows == [{"eval/own/avg@2": 0.5, "eval/at_step": 6.0}]


@pytest.mark.parametrize(
    ("runs_beside", "colocated", "ahead", "free"),
    [(True, False, 0, True), (False, False, 0, False), (True, True, 0, False), (True, False, 1, False)],
)
def test_engines_are_free_where_they_neither_sleep_nor_sample_ahead(
    tmp_path, runs_beside, colocated, ahead, free
):
    from dataclasses import replace
    from types import SimpleNamespace

    from gspo_dist.config import ClusterConfig, RolloutConfig, RunConfig
    from gspo_dist.trainer.setup.build import make_suites
    from gspo_dist.types import SamplingSpec

    run = replace(
        RunConfig(seed=4, cluster=ClusterConfig(colocated=colocated)),
        rollout=RolloutConfig(steps_ahead=ahead),
    )
    checked = SimpleNamespace(
        config=run, tokenizer=None, suites=[suite()], model="m", run_dir=tmp_path, moe_layers=0
    )
    parts = SimpleNamespace(pool=SimpleNamespace(runs_beside=runs_beside))
    made = make_suites(checked, parts, SamplingSpec(n=8, max_tokens=5, seed=4))
    assert made.beside is free
    assert (made.steps, made.every, made.folder) == (run.steps, 0, tmp_path / "evaluation")
    assert (made.sampler.spec.seed, made.sampler.spec.max_tokens) == (5, 5)


def test_a_run_whose_suites_do_not_fit_is_refused_before_it_starts(model, reward_file, tmp_path):
    from gspo_dist.trainer.setup.build import check_run

    file = write_jsonl(tmp_path / "own.jsonl", [{"problem": "1" * 40, "answer": "1"}])
    chosen = [
        "evaluation.suites=[own]",
        f"+evaluation.options.own={{file: {file}, reward: exact_match}}",
    ]
    with pytest.raises(
        ValueError, match=r"suite own: 1 of 1 prompts are over rollout\.max_prompt_tokens = 16"
    ):
        check_run(config(model, reward_file, tmp_path / "run", *chosen))
