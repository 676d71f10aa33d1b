"""Learner and engines on one GPU: who is awake when, and that it changes no number.

No GPU is needed to see it: the engine here only keeps the books, and the learner's tensors are really moved
away and back.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.metrics.names import metric_of
from gspo_dist.rollout.reference import ReferenceEngine
from gspo_dist.trainer.loop import train
from gspo_dist.trainer.setup.build import build
from tests.unit.trainer.small import config


class Books:
    """Which of an engine's memory is awake: {"weights", "cache"}."""

    def __init__(self) -> None:
        self.awake = {"weights", "cache"}
        self.seen: dict[str, set[frozenset[str]]] = {}

    def note(self, verb: str) -> None:
        self.seen.setdefault(verb, set()).add(frozenset(self.awake))


def watched(owner: object, books: Books, *verbs: str) -> None:
    for verb in verbs:
        call = getattr(owner, verb)

        def noted(*args, _call=call, _verb=verb, **kwargs):
            books.note(_verb)
            return _call(*args, **kwargs)

        setattr(owner, verb, noted)


def masters_here(learner) -> bool:
    """Whether an eager learner's master weights are on its device, all or none. Its weights say nothing: they
    stay on a CPU, where a publication looks at them with numpy."""
    held = [master.untyped_storage().nbytes() for master in learner.masters]
    assert all(held) or not any(held)
    return all(held)


def trained(run_dir) -> list[dict[str, float]]:
    """What a run measured, without its times."""
    rows = read_jsonl(run_dir / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "perf/", "sync/gib", "sync/check"))}
        for row in rows
    ]


@pytest.mark.slow
def test_learner_and_engine_are_awake_in_turns_and_learn_as_if_they_were_not(
    model, reward_file, tmp_path
) -> None:
    """With rollouts begun ahead, which the engine must not hold while it sleeps, and checkpoints."""
    knobs = [
        *("rollout.steps_ahead=1", "rollout.ticks_per_step=0", "objective.old_logprobs=recompute"),
        *("rollout.max_completion_tokens=24", "checkpoint.every=2", "checkpoint.hf_every=2"),
    ]
    plain = build(config(model, reward_file, tmp_path / "plain", *knobs))
    try:
        train(plain)
    finally:
        plain.release()
    run = build(config(model, reward_file, tmp_path / "run", *knobs))
    books = Books()
    engine: ReferenceEngine = run.pool.engine
    here: dict[str, set[bool]] = {}

    def sleep() -> None:
        assert engine.rows == []
        books.awake.clear()

    def wake_up(weights_only: bool = False) -> None:
        books.awake.update({"weights"} if weights_only else {"weights", "cache"})

    engine.sleep, engine.wake_up = sleep, wake_up
    watched(engine, books, "submit", "advance", "logprobs_of", "update_weights")
    watched(run.learner, books, "logprobs", "forward_backward", "optim_step", "save", "export")
    for verb in ("submit", "advance", "logprobs_of", "update_weights"):
        call = getattr(engine, verb)

        def noted(*args, _call=call, _verb=verb, **kwargs):
            here.setdefault(_verb, set()).add(masters_here(run.learner.learner))
            return _call(*args, **kwargs)

        setattr(engine, verb, noted)
    run.config = replace(run.config, cluster=replace(run.config.cluster, colocated=True))
    run.shared.colocated = True
    take, taken = run.shared.take_metrics, []
    run.shared.take_metrics = lambda: taken.append(take()) or taken[-1]
    engine.sleep()  # as after the start
    try:
        train(run)
    finally:
        run.release()
    everything, weights = frozenset({"weights", "cache"}), frozenset({"weights"})
    for verb in ("submit", "advance", "logprobs_of"):
        assert books.seen[verb] == {everything}
        assert here[verb] == {False}
    assert books.seen["forward_backward"] == books.seen["optim_step"] == books.seen["save"] == {frozenset()}
    assert books.seen["update_weights"] == books.seen["export"] == {weights}
    assert here["update_weights"] == {False}
    assert weights in books.seen["logprobs"]  # the probe: before the KV cache takes its memory back
    assert trained(tmp_path / "run") == trained(tmp_path / "plain")
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")[1:]
    for row in rows:
        parts = {key: value for key, value in row.items() if key.startswith("time/switch/")}
        assert len(parts) == 4
        assert row["time/switch_s"] == pytest.approx(sum(parts.values()))
        assert 0.0 < parts["time/switch/learner_sleep_s"] < row["time/switch_s"] < row["time/step_s"]
        assert all(metric_of(key) is not None for key in ("time/switch_s", *parts))
    assert len(rows) == 3
    begun, *steps = [metrics["time/switch_s"] for metrics in taken]
    assert begun > 0.0  # the start's hand-overs are no step's
    assert [row["time/switch_s"] for row in rows] == steps
    for row in read_jsonl(tmp_path / "plain/metrics.jsonl"):
        assert not any(key.startswith("time/switch") for key in row)
