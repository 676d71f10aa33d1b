"""Learner and engines on one GPU: who is awake when. No GPU is needed to see it: the engine here only keeps the books."""

from __future__ import annotations

from dataclasses import replace

from gspo_dist.rollout.reference import ReferenceEngine
from gspo_dist.trainer.loop import train
from gspo_dist.trainer.setup.build import build
from gspo_dist.trainer.setup.checks import resolve_transport
from gspo_dist.trainer.setup.factories import engine_factory
from gspo_dist.trainer.setup.processes import process_env
from tests.unit.trainer.test_loop import config, model, reward_file  # noqa: F401


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


def test_learner_and_engine_are_awake_in_turns(model, reward_file, tmp_path) -> None:  # noqa: F811
    run = build(config(model, reward_file, tmp_path / "run"))
    books = Books()
    engine: ReferenceEngine = run.pool.engine
    engine.sleep = books.awake.clear
    engine.wake_up = lambda weights_only=False: books.awake.update(
        {"weights"} if weights_only else {"weights", "cache"}
    )
    watched(engine, books, "generate", "logprobs_of", "update_weights")
    watched(run.learner, books, "logprobs", "forward_backward", "optim_step", "empty_cache")
    run.config = replace(run.config, cluster=replace(run.config.cluster, colocated=True))
    run.publisher.colocated = True
    try:
        train(run)
    finally:
        run.release()
    everything, weights = frozenset({"weights", "cache"}), frozenset({"weights"})
    assert books.seen["generate"] == books.seen["logprobs_of"] == {everything}
    assert books.seen["forward_backward"] == books.seen["optim_step"] == {frozenset()}
    assert books.seen["update_weights"] == {everything, weights}  # all awake before the first step only
    assert weights in books.seen["logprobs"]  # the probe: before the KV cache takes its memory back
    assert books.seen["empty_cache"] >= {frozenset(), weights}


def test_what_a_gpu_host_gives_to_a_reference_engine_and_a_cpu_run(model, reward_file, tmp_path) -> None:  # noqa: F811
    c = config(model, reward_file, tmp_path / "run")
    c = replace(c, cluster=replace(c.cluster, in_process=False))
    assert engine_factory(c, str(model), "cuda", 2).keywords["device"] == "cpu"
    assert resolve_transport(c, "cuda") == "shm"
    vllm = replace(c, rollout=replace(c.rollout, engine="vllm"))
    assert engine_factory(vllm, str(model), "cuda", 2).keywords["device"] == "cuda"
    assert resolve_transport(vllm, "cuda") == "nccl"
    # Ray leaves a host's GPUs visible to actors that ask for none.
    assert {env["CUDA_VISIBLE_DEVICES"] for env in process_env(c, "cpu").values()} == {""}
    assert all("CUDA_VISIBLE_DEVICES" not in env for env in process_env(c, "cuda").values())
