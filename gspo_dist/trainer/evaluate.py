"""Evaluating a model folder: engines and rewards of a configuration, and no learner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gspo_dist.coldstart.make import ensure_model
from gspo_dist.config import RunConfig
from gspo_dist.data.prompts import load_prompts
from gspo_dist.evaluation.runner import evaluate_heldout
from gspo_dist.rewards.reward import check_answers
from gspo_dist.trainer.setup.checks import check_model, load_tokenizer, resolve_device
from gspo_dist.trainer.setup.factories import sampling_spec
from gspo_dist.trainer.setup.processes import Processes


def evaluate_model(config: RunConfig) -> dict[str, float]:
    """Held-out metrics of `model.path` with the configured engines, rewards and evaluation;
    nothing is trained.

    Raises ValueError without held-out prompts.
    """

    if config.data.heldout is None:
        raise ValueError("evaluate needs held-out prompts: set data.heldout to a file or a task")
    config = replace(
        config,
        flips=replace(config.flips, every=0),
        objective=replace(config.objective, routing_replay="none"),
        cluster=replace(config.cluster, colocated=False),
    )
    model = str(ensure_model(config.model))
    moe_layers = check_model(config, model)
    tokenizer = load_tokenizer(model)
    prompts = load_prompts(
        config.data,
        "heldout",
        tokenizer,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        seed=config.seed,
    )[: config.evaluation.prompts]
    check_answers(config.reward, prompts)
    device = resolve_device(config.cluster)
    run_dir = Path(config.run_dir).expanduser().resolve()
    with Processes(config, model, device, run_dir, moe_layers, learners=False) as processes:
        pool, rewards = processes.pool(), processes.rewards()
        rewards.start()
        spec = replace(
            sampling_spec(config, tokenizer, pool.start()),
            n=config.evaluation.samples,
            temperature=config.evaluation.temperature,
            top_p=config.evaluation.top_p,
        )
        return evaluate_heldout(
            lambda chosen, asked: pool.generate(chosen, asked, range(len(chosen))), rewards, prompts, spec
        )
