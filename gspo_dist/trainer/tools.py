"""What can be done with a run besides training it: evaluate a model, export a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from gspo_dist.checkpoint import CheckpointStore
from gspo_dist.coldstart.make import ensure_model
from gspo_dist.config import RunConfig
from gspo_dist.config.mapping import from_mapping
from gspo_dist.data.prompts import load_prompts
from gspo_dist.trainer.collect import evaluate_with
from gspo_dist.trainer.setup.build import (
    Processes,
    check_model,
    load_tokenizer,
    resolve_device,
    sampling_spec,
)


def evaluate_model(config: RunConfig) -> dict[str, float]:
    """Held-out metrics of `model.path` with the run's engines, rewards and evaluation settings; nothing is trained."""
    if config.data.heldout is None:
        raise ValueError("evaluate needs held-out prompts: set data.heldout to a file or a task")
    config = replace(
        config,
        flips=replace(config.flips, every=0),
        objective=replace(config.objective, routing_replay="none"),
        cluster=replace(config.cluster, colocated=False),
    )
    run_dir = Path(config.run_dir).expanduser().resolve()
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
    device = resolve_device(config.cluster)
    with Processes(config, model, device, run_dir, moe_layers, learners=False) as processes:
        pool, rewards = processes.pool(), processes.rewards()
        spec = replace(
            sampling_spec(config, tokenizer, pool.start()),
            n=config.evaluation.samples,
            temperature=config.evaluation.temperature,
            top_p=config.evaluation.top_p,
        )
        return evaluate_with(
            lambda chosen, s: pool.generate(chosen, s, range(len(chosen))), rewards, prompts, spec
        )


def run_config_of(run_dir: Path) -> RunConfig:
    """The resolved configuration that a run folder was made with."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise ValueError(f"not a run folder: {run_dir} has no config.json")
    return from_mapping(RunConfig, json.loads(path.read_text()))


def export_run(run_dir: Path, target: Path) -> dict[str, Any]:
    """Writes the newest checkpoint of a run as an HF folder, with the learner that wrote the checkpoint."""
    config = run_config_of(run_dir)
    checkpoint = CheckpointStore(run_dir, config.checkpoint.keep).newest()
    if checkpoint is None:
        raise ValueError(f"run {run_dir} has no checkpoint: set checkpoint.every or let it finish")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"the folder to export to must be new or empty: {target} is not")
    model = str(ensure_model(config.model))
    config = replace(
        config,
        rollout=replace(config.rollout, engines=1),
        cluster=replace(config.cluster, colocated=False, in_process=False),
    )
    device = resolve_device(config.cluster)
    with Processes(config, model, device, run_dir, check_model(config, model), engines=False) as processes:
        learner = processes.learner()
        learner.start()
        learner.load(checkpoint.learner, checkpoint.state["policy_version"])
        tensors = learner.export(Path(model), target.resolve())
    return {"folder": str(target), "step": checkpoint.step, "tensors": tensors}
