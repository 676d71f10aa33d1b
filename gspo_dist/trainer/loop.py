"""READ FIRST: one run of reinforcement learning, from a cold-start policy to a better one.

    prompts -> collect (engines, rewards) -> advantages -> pack -> old log-probs
            -> per mini-batch: forward_backward, optim_step -> publish to the engines -> log, save

Setup is in build.py, the old log-probs and their guard in contract.py, the weight sync in sync.py.
"""

from __future__ import annotations

import numpy as np

from gspo_dist.metrics.stat import merge_stats
from gspo_dist.objectives.advantages import group_advantages
from gspo_dist.packing import pack
from gspo_dist.trainer.clock import StepClock
from gspo_dist.trainer.collect import describe, judge, probe_sequences, sample_rows
from gspo_dist.trainer.run import Run
from gspo_dist.trainer.step_metrics import mini_batch_metrics, update_metrics


def train(run: Run) -> dict[str, object]:
    """Trains from the run's first step to its last; returns the summary that is also written to summary.json."""
    run.sync.publish(
        run.probe_sequences()
    )  # a resumed learner is ahead of the model folder that the engines loaded
    run.evaluate(run.first_step)
    for step in range(run.first_step, run.config.steps):
        try:
            row = train_step(run, step)
        except FloatingPointError as error:
            error.add_note(f"at step {step + 1}, policy version {run.learner.policy_version}; {run.saved()}")
            raise
        if run.evaluation_due(step + 1):
            row |= run.evaluate(step + 1, log=False)
        run.log(step + 1, row)
        run.commit_saved()
        if run.checkpoint_due(step + 1):
            run.save(step + 1)
    return run.finish()


def train_step(run: Run, step: int) -> dict[str, float]:
    """One rollout batch and its mini-batches of learning; returns the step's metrics."""
    config, clock = run.config, StepClock()

    with clock("collect"):
        prompts = run.cursor.next(config.rollout.prompts_per_step)
        first_group = step * config.rollout.prompts_per_step
        groups = run.pool.generate(
            prompts, run.sampling_of(step), range(first_group, first_group + len(prompts))
        )
    with clock("reward"):
        rollouts = judge(run.rewards, prompts, groups, first_group)

    with clock("pack"):
        advantages = group_advantages(
            np.array([r.reward for r in rollouts]),
            np.array([r.group_id for r in rollouts]),
            config.objective.advantage_name,
        )
        mini_batches = pack(
            rollouts,
            advantages,
            ranks=config.learner.data_parallel,
            token_budget=config.learner.token_budget,
            mini_batches=config.mini_batches,
            max_completion_length=config.rollout.max_completion_tokens,
            seed=(config.seed, step),
        )
    with run.learning():
        with clock("old_logprobs"):
            mini_batches = run.contract.prepare(mini_batches, rollouts, step)
        with clock("flips"):
            run.flips.begin(step, mini_batches, rollouts)

        parts, row = [], {}
        for index, mini in enumerate(mini_batches):
            with clock("update"):
                routed = run.contract.replayed(mini, rollouts)
                stats = run.learner.forward_backward(routed, run.contract.loss_spec(mini, index))
                optim = run.learner.optim_step()
            run.contract.observe(stats, index)
            row |= mini_batch_metrics(stats, index)
            parts.append((stats, optim))
            with clock("flips"):
                run.flips.after_mini_batch(index)

    with clock("sync"):
        row |= run.sync.publish(probe_sequences([(r.prompt, r.completion) for r in rollouts[:4]]))

    row |= describe(rollouts, advantages, run.learner.policy_version - len(mini_batches))
    row |= update_metrics(merge_stats([stats for stats, _ in parts]), [optim for _, optim in parts])
    row |= run.contract.metrics | run.flips.metrics | run.batch_metrics(rollouts, mini_batches)
    row |= run.speed(clock.metrics(), rollouts)
    run.sinks.samples(step + 1, sample_rows(rollouts, advantages, config.logger.samples_per_step))
    return row
