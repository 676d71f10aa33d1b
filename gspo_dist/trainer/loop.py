"""READ FIRST: one run of reinforcement learning, from a cold-start policy to a better one.

    collect   prompts -> completions (engines) -> rewards
    learn     advantages -> pack -> old log-probs -> per mini-batch: forward_backward, optim_step
    publish   the new weights to the engines, checked
    then      log, evaluate, save

`step` counts from 1. What is logged, evaluated and saved under a step is the state after it. Random draws of
a step take its index, step - 1.

The verbs stand here and in collect.py. Their parts have modules of their own: pipeline.py (rollouts that are
begun before their step), old_logprobs.py and guard.py (where old log-probs come from), publisher.py (the
weight sync), step_metrics.py (what is reported), checkpointing.py, heldout.py, suites.py. Everything is put
together in setup/build.py.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from gspo_dist.metrics.jsonl import append
from gspo_dist.metrics.sinks import going_on_without
from gspo_dist.packing import MiniBatch, pack
from gspo_dist.trainer import step_metrics
from gspo_dist.trainer.checkpointing import checkpoint_due, commit, count_skips, save, save_hf, what_is_saved
from gspo_dist.trainer.collect import collect
from gspo_dist.trainer.episode_page import EPISODES
from gspo_dist.trainer.heldout import evaluate, evaluation_due
from gspo_dist.trainer.publisher import PROBE_SEQUENCES, probe_sequences
from gspo_dist.trainer.run import Run
from gspo_dist.trainer.selection import Selected, select
from gspo_dist.trainer.step_metrics import Metrics, StepMetrics
from gspo_dist.trainer.summary import finish
from gspo_dist.trainer.whole_batch import with_second_moment_cut
from gspo_dist.types import Completion, Prompt, Rollout


def train(run: Run) -> dict[str, object]:
    """Trains from the run's first step to its last. Returns what is also written to summary.json."""
    start(run)
    for step in range(run.completed_steps + 1, run.config.steps + 1):
        run_step(run, step)
    return finish(run)


def run_step(run: Run, step: int) -> None:
    """Collects, learns and publishes. Then logs, evaluates and saves what is due."""
    with failures_say_what_is_saved(run, step):
        run.clock.restart()
        run.shared.to_engines()
        rollouts = collect(run, step)
        with run.profile(step):
            metrics = learn(run, rollouts, step)
            metrics.evaluation = run.suites.finish()
            metrics.sync = publish(run, [(r.prompt, r.completion) for r in rollouts[:PROBE_SEQUENCES]])
        run.tokens_seen += sum(len(r.completion) for r in rollouts)
        metrics.speed = step_metrics.speed_metrics(
            run.clock.metrics(), rollouts, run.tokens_seen, run.collector.take_speed()
        )
        metrics.speed |= run.shared.take_metrics()
        metrics.pipeline = run.collector.metrics()
        if evaluation_due(run, step):
            metrics.evaluation |= evaluate(run)
        metrics.evaluation |= run.suites.after_step(step)
        log(run, metrics, step)
        commit(run)
        if checkpoint_due(run, step):
            save(run, step)
        save_hf(run, step)


def start(run: Run) -> None:
    """Gives the engines the learner's weights, and evaluates a run that begins.

    A resumed learner is ahead of the model folder that the engines loaded. Its run was evaluated already.
    """
    run.shared.to_engines()
    spec = replace(run.sampling, n=1, record_routing=False, candidates=0)
    groups = run.pool.generate(run.probe_prompts, spec, range(len(run.probe_prompts)))
    publish(run, [(prompt, group[0]) for prompt, group in zip(run.probe_prompts, groups, strict=True)])
    run.shared.take_metrics()  # the start's, which are no step's
    row = run.suites.start(run.completed_steps)
    if run.completed_steps == 0:
        row |= evaluate(run) if run.heldout else {}
        if row:
            run.sinks.log(0, row)


def learn(run: Run, rollouts: Sequence[Rollout], step: int) -> StepMetrics:
    """One batch of learning: its mini-batches, one optimiser step each. Returns what the step reports so far.

    Raises FloatingPointError that names the rollout when a log-prob or a loss is not finite.
    """
    policy_version = run.learner.policy_version
    with run.clock("pack"):
        selected, mini_batches = prepare(run, rollouts, step)
        trained, advantages = selected.trained, selected.advantages
    with learning(run):
        with run.clock("old_logprobs"):
            mini_batches = run.old_logprobs.prepare(mini_batches, trained, step)
        with run.clock("flips"):
            run.flips.begin(step, mini_batches, trained)
        stats, optim = [], []
        for index, mini in enumerate(mini_batches):
            spec = run.guard.loss_spec(mini, index, recomputed=run.old_logprobs.recomputed)
            with run.clock("attach_routes"):
                routed = run.old_logprobs.with_routes(mini, trained)
            with run.clock("old_logprobs"):
                unmoved = run.old_logprobs.recomputed and index == 0
                budget = run.config.learner.forward_token_budget
                spec = with_second_moment_cut(spec, routed, run.learner, budget, unmoved=unmoved)
            with run.clock("update"):
                stats.append(run.learner.forward_backward(routed, spec))
                optim.append(run.learner.optim_step())
            count_skips(run, optim[-1])
            del routed  # its copy of the traces; the rollouts hold the batch's
            run.guard.observe(stats[-1], index, run.publisher.probed_offset)
            with run.clock("flips"):
                run.flips.after_mini_batch(index)
        run.flips.finish_step()

    mode = run.config.objective.routing_replay
    replay = step_metrics.replay_metrics(mode, mini_batches, trained, recomputed=run.old_logprobs.recomputed)
    return StepMetrics(
        rollouts=step_metrics.rollout_metrics(rollouts, advantages, policy_version, run.config.mini_batches)
        | selected.metrics
        | step_metrics.length_metrics(run.config.rollout, step),
        packing=step_metrics.packing_metrics(mini_batches, run.config.learner.token_budget),
        update=step_metrics.update_metrics(stats, optim),
        old_logprobs=run.old_logprobs.metrics() | run.guard.metrics(),
        routing=run.flips.metrics() | replay,
        samples=step_metrics.sample_rows(rollouts, advantages, run.config.logger.samples_per_step),
        episodes=run.collector.episode_rows(trained, selected.given, run.config.logger.samples_per_step),
    )


def prepare(run: Run, rollouts: Sequence[Rollout], step: int) -> tuple[Selected, list[MiniBatch]]:
    """(which rollouts train and with what advantages, mini-batches packed with them)."""
    config = run.config
    selected = select(
        rollouts,
        config.objective,
        run.objective.spec.advantage,
        max_tokens=config.rollout.completion_tokens(step),
        mini_batches=config.mini_batches,
        replicas=config.learner.data_parallel,
    )
    mini_batches = pack(
        selected.trained,
        selected.given,
        replicas=config.learner.data_parallel,
        token_budget=config.learner.token_budget,
        mini_batches=config.mini_batches,
        max_completion_length=config.rollout.max_completion_tokens,
        seed=(config.seed, step - 1),
    )
    return selected, mini_batches


def publish(run: Run, sampled: Sequence[tuple[Prompt, Completion]]) -> Metrics:
    """The learner's weights to every engine, checked. Log-probs of `sampled` are compared when a
    probe is due. What the engines have in the making goes on under the new weights with the next `collect`.
    """
    with run.clock("sync"):
        run.collector.pause()
        return run.publisher.publish(probe_sequences(sampled))


def log(run: Run, metrics: StepMetrics, step: int) -> None:
    """The step's numbers and samples to the sinks, with the time that is left at the pace so far."""
    pace = (time.perf_counter() - run.started) / (step - run.completed_steps)
    run.health.note(step, [*run.pool.take_events(), *run.rewards.take_events(), *run.collector.take_events()])
    row = metrics.row() | run.health.metrics() | {"time/left_s": pace * (run.config.steps - step)}
    run.sinks.samples(step, metrics.samples)
    if metrics.episodes:
        with going_on_without(EPISODES):
            append(run.run_dir / EPISODES, [{"step": step, **row} for row in metrics.episodes])
    run.sinks.log(step, row)


@contextlib.contextmanager
def learning(run: Run) -> Iterator[None]:
    """While the learner works: engines on other GPUs sample on for later steps or answer suites, colocated
    ones sleep.

    A sleeping engine's memory is the learner's. It comes out of the block with its weights awake, which the
    publication overwrites.
    """
    if not run.config.cluster.colocated:
        with run.collector.beside_learner(), run.suites.beside_learner():
            yield
        return
    run.collector.pause()
    run.shared.to_learner()
    yield
    run.shared.to_publication()


@contextlib.contextmanager
def failures_say_what_is_saved(run: Run, step: int) -> Iterator[None]:
    """Whatever ends a step, its error says where the run was and what of it is safe on disk."""
    try:
        yield
    except Exception as error:
        error.add_note(f"at step {step}, policy version {run.learner.policy_version}; {what_is_saved(run)}")
        raise
