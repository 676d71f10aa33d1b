"""A run's configuration as the planner reads it: its model, its hardware, and what the run itself would refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gspo_dist.config import RunConfig
from gspo_dist.config.mapping import to_mapping
from gspo_dist.learners.megatron.architecture import from_hf
from gspo_dist.learners.megatron.layout import check_knobs, check_layout
from gspo_dist.models.config_file import find_config, read_config
from gspo_dist.models.shape import countable, shape_from_config
from gspo_dist.planner import find_gpu, format_plan, plan, read_run
from gspo_dist.planner.layout import LearnerLayout
from gspo_dist.planner.placement import where


def plan_text(
    config: RunConfig,
    gpu: str | None = None,
    nodes: str | None = None,
    gpus_per_node: str | None = None,
    model: str | None = None,
) -> str:
    """What a run needs and whether it fits, from its configuration alone; values from conf/'s cluster.plan_* fill gaps."""
    cluster = config.cluster
    hf, name = _planned_model(config, model)
    kind = gpu or cluster.plan_gpu
    hardware = find_gpu(kind) if kind else None
    count = _whole("plan.nodes", nodes) or cluster.plan_nodes
    size = _whole("plan.gpus_per_node", gpus_per_node) or cluster.plan_gpus_per_node
    learner, engine, work = read_run(to_mapping(config))
    result = plan(
        learner,
        engine,
        work,
        countable(shape_from_config(hf, name)),
        hardware,
        count,
        size,
        refusals=_refusals(config, hf, gpu=hardware is not None),
    )
    text = format_plan(result)
    return "\n".join([*where(learner, engine, count, result.gpus_per_node), text]) if hardware else text


def _planned_model(config: RunConfig, model: str | None) -> tuple[Mapping[str, Any], str]:
    """The HF config of the model to plan and its name: plan.model, else the run's own, else cluster.plan_model."""
    described = model or config.cluster.plan_model
    folder = Path(config.model.path).expanduser() if config.model.path else None
    if folder is not None and (folder / "config.json").is_file() and model is None:
        return read_config(folder / "config.json"), folder.name
    if described:
        return find_config(described)
    if folder is not None:
        raise ValueError(
            f"gspo plan needs the model's shape: {folder} has no config.json; give plan.model=Qwen3-30B-A3B"
        )
    from gspo_dist.coldstart.model import model_config
    from gspo_dist.coldstart.recipes import recipe_named

    shape = recipe_named(config.model.recipe).shape
    return {**model_config(shape).to_dict(), "architectures": ["Qwen3MoeForCausalLM"]}, config.model.recipe


def _refusals(
    config: RunConfig, hf: Mapping[str, Any], *, gpu: bool
) -> Callable[[LearnerLayout], list[str]] | None:
    """What a Megatron run would refuse of a planned layout: the checks that the run itself makes, in their words."""
    if config.learner.backend != "megatron":
        return None

    def refusals(layout: LearnerLayout) -> list[str]:
        try:
            knobs = dataclasses.replace(
                config.learner.megatron,
                tensor_parallel=layout.tensor,
                pipeline_parallel=layout.pipeline,
                virtual_stages=layout.virtual_stages,
                expert_parallel=layout.expert,
                expert_tensor_parallel=layout.expert_tensor,
                context_parallel=layout.context,
            )
            check_knobs(dataclasses.replace(config.learner, megatron=knobs), gpu=gpu)
            check_layout(knobs, from_hf(hf), layout.world_size)
        except ValueError as error:
            return [str(error)]
        return []

    return refusals


def _whole(key: str, text: str | None) -> int | None:
    """A number given on the command line; None where none was."""
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{key} must be a whole number, at least 1: got {text!r}")
    return int(text)
