"""Learner and engines on one GPU: who is awake when. No GPU is needed to see it: the engine here only
keeps the books.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

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


@pytest.mark.slow
def test_learner_and_engine_are_awake_in_turns(model, reward_file, tmp_path) -> None:
    """With rollouts begun ahead, which the engine must not hold while it sleeps."""
    ahead = ["rollout.steps_ahead=1", "rollout.ticks_per_step=0", "objective.old_logprobs=recompute"]
    run = build(config(model, reward_file, tmp_path / "run", *ahead, "rollout.max_completion_tokens=24"))
    books = Books()
    engine: ReferenceEngine = run.pool.engine

    def sleep() -> None:
        assert engine.rows == []
        books.awake.clear()

    engine.sleep = sleep
    engine.wake_up = lambda weights_only=False: books.awake.update(
        {"weights"} if weights_only else {"weights", "cache"}
    )
    watched(engine, books, "submit", "advance", "logprobs_of", "update_weights")
    watched(run.learner, books, "logprobs", "forward_backward", "optim_step", "empty_cache")
    run.config = replace(run.config, cluster=replace(run.config.cluster, colocated=True))
    run.publisher.colocated = True
    try:
        train(run)
    finally:
        run.release()
    everything, weights = frozenset({"weights", "cache"}), frozenset({"weights"})
    for verb in ("submit", "advance", "logprobs_of"):
        assert books.seen[verb] == {everything}
    assert books.seen["forward_backward"] == books.seen["optim_step"] == {frozenset()}
    assert books.seen["update_weights"] == {everything, weights}  # all awake before the first step only
    assert weights in books.seen["logprobs"]  # the probe: before the KV cache takes its memory back
    assert books.seen["empty_cache"] >= {frozenset(), weights}
