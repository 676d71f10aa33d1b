"""Held-out evaluation inside a run, with the run's own engines and rewards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from gspo_dist.evaluation.runner import evaluate_heldout
from gspo_dist.trainer.episodes import play
from gspo_dist.trainer.run import Run
from gspo_dist.types import Completion, Prompt, SamplingSpec

EVALUATION_IDS = 1 << 40
"""Request ids of an evaluation start here: they seed the sampling, and a training run never counts this far,
so that an evaluation neither repeats nor shifts the draws of training."""


def evaluation_due(run: Run, step: int) -> bool:
    """Whether held-out prompts are sampled after `step`: on the schedule, and at the end."""
    every = run.config.evaluation.every
    return bool(run.heldout) and (step == run.config.steps or bool(every and step % every == 0))


def evaluate(run: Run) -> dict[str, float]:
    """Held-out metrics (eval/heldout/*) of the policy that the engines hold; the run remembers them."""
    config = run.config.evaluation
    spec = replace(
        run.sampling,
        n=config.samples,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=run.config.seed + 1,
        record_routing=False,
        candidates=0,
    )
    start = time.perf_counter()
    ids = range(EVALUATION_IDS, EVALUATION_IDS + len(run.heldout))
    collector = run.collector

    def generate(prompts: Sequence[Prompt], asked: SamplingSpec) -> list[list[Completion]]:
        if collector.episodes is None:
            return run.pool.generate(prompts, asked, ids)
        return play(run.pool, collector.episodes.beside(), prompts, asked, ids)

    row = evaluate_heldout(generate, collector, run.heldout, spec)
    row["time/evaluation_s"] = time.perf_counter() - start
    run.last_evaluation = row
    run.first_evaluation = run.first_evaluation or row
    return row
