"""`gspo plan`: a run's configuration as the planner reads it, and what the run itself would refuse of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gspo_dist.cli.compose import run_as_application, split_arguments
from gspo_dist.cli.exits import guarded
from gspo_dist.config import LearnerConfig, RunConfig
from gspo_dist.learners.deepspeed.config import check as check_deepspeed
from gspo_dist.learners.megatron.architecture import from_hf
from gspo_dist.learners.megatron.layout import check_knobs, check_layout
from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.models.config_file import find_config, read_config
from gspo_dist.models.shape import countable, shape_from_config
from gspo_dist.planner import find_gpu, format_plan, plan, read_run
from gspo_dist.planner.hardware import GIB
from gspo_dist.planner.kuberay import ray_job
from gspo_dist.planner.layout import LearnerLayout
from gspo_dist.planner.pipeline import Lengths
from gspo_dist.planner.placement import where
from gspo_dist.planner.plan import Plan

IMAGE = "gspo:gpu"
"""The image of a manifest where none is named: what docker/Dockerfile.gpu is built as."""
SHM_GPU_GIB, SHM_CPU_GIB = 64, 2
"""Size of /dev/shm (launch/README.md, section 1)."""
KUBERAY_NOTES = """\
# Made by: {command}
# It needs KubeRay 1.5.1 or later, and a volume claim gspo-shared with many writers (ReadWriteMany), in which
# relative paths lie. On several hosts, add the resource of your RDMA device plug-in to the requests and
# limits of both pods: without it NCCL uses TCP.
"""


def main(args: Sequence[str]) -> None:
    """Prints the plan of the run that the overrides describe. Nothing is started.

    --kuberay[=IMAGE] prints it as a manifest of KubeRay instead.
    """
    ours = [word for word in args if word.partition("=")[0] == "--kuberay"]
    rest = [word for word in args if word not in ours]

    def show(config: RunConfig) -> str:
        if not ours:
            return plan_text(config)
        return kuberay_text(config, split_arguments(rest)[0], ours[-1].partition("=")[2] or IMAGE)

    run_as_application("gspo plan", rest, lambda config: print(guarded(lambda: show(config))))


def plan_text(config: RunConfig) -> str:
    """What a run needs and whether it fits, from its configuration alone.

    Raises ValueError for a GPU or a model that is not known.
    """
    learner, engine, _ = read_run(config)
    result = planned(config)
    text = format_plan(result)
    if result.gpu is None:
        return text
    return "\n".join([*where(learner, engine, config.plan.nodes, result.gpus_per_node), text])


def kuberay_text(config: RunConfig, overrides: Sequence[str], image: str) -> str:
    """The run as a RayJob of KubeRay, in YAML. Raises ValueError, with the plan, when it does not fit."""
    import yaml

    result = planned(config)
    if not result.fits:
        raise ValueError(f"the run does not fit, so it is no manifest\n{format_plan(result)}")
    own = [word for word in overrides if not word.startswith("plan.")]
    gpus = result.gpus_per_node if result.gpu else 0
    manifest = ray_job(
        Path(config.run_dir).name,
        ["gspo", "train", "cluster.address=auto", f"cluster.nodes={config.plan.nodes}", *own],
        image=image,
        ray_version=version("ray"),
        nodes=config.plan.nodes,
        gpus_per_node=gpus,
        memory_gib=-(-result.host.total // GIB),
        shm_gib=SHM_GPU_GIB if gpus else SHM_CPU_GIB,
    )
    notes = KUBERAY_NOTES.format(command=shlex.join(["gspo", "plan", *overrides, f"--kuberay={image}"]))
    return notes + yaml.safe_dump(manifest, sort_keys=False, width=1000).rstrip()


def planned(config: RunConfig) -> Plan:
    """The plan of a run. Raises ValueError for a GPU or a model that is not known."""
    hf, name = planned_model(config)
    hardware = find_gpu(config.plan.gpu) if config.plan.gpu else None
    return plan(
        config,
        countable(shape_from_config(hf, name)),
        hardware,
        config.plan.nodes,
        config.plan.gpus_per_node,
        refusals=_refusals(config, hf, gpu=hardware is not None),
        lengths=_measured_lengths(config),
        ahead=True,
    )


def planned_model(config: RunConfig) -> tuple[Mapping[str, Any], str]:
    """The HF config of the model to plan, and its name.

    plan.model comes first, then the run's own folder, then plan.fallback_model, then the recipe of a run
    without a folder. Raises ValueError when none of them is there.
    """
    if config.plan.model:
        return find_config(config.plan.model)
    folder = Path(config.model.path).expanduser() if config.model.path else None
    if folder is not None and (folder / "config.json").is_file():
        return read_config(folder / "config.json"), folder.name
    if config.plan.fallback_model:
        return find_config(config.plan.fallback_model)
    if folder is not None:
        raise ValueError(
            f"gspo plan needs the model's shape: {folder} has no config.json; give plan.model=Qwen3-30B-A3B"
        )
    return _recipe(config.model.recipe)


def _recipe(name: str) -> tuple[Mapping[str, Any], str]:
    from gspo_dist.coldstart.model import model_config
    from gspo_dist.coldstart.recipes import recipe_named

    # The saved model names its class; a config that was never saved does not.
    hf = {**model_config(recipe_named(name).shape).to_dict(), "architectures": ["Qwen3MoeForCausalLM"]}
    return hf, name


def _measured_lengths(config: RunConfig) -> Lengths | None:
    """Those of the completions in samples.jsonl of plan.lengths_from. Raises ValueError without any."""
    if config.plan.lengths_from is None:
        return None
    path = Path(config.plan.lengths_from).expanduser() / "samples.jsonl"
    tokens = [int(row["tokens"]) for row in read_jsonl(path) if "tokens" in row] if path.is_file() else []
    if not tokens:
        raise ValueError(
            f"plan.lengths_from needs a run folder with sampled completions: {path} has none; give another, "
            "or plan.length_spread"
        )
    return Lengths.of(tokens, config.rollout.max_completion_tokens)


def _refusals(config: RunConfig, hf: Mapping[str, Any], *, gpu: bool) -> Callable[[LearnerLayout], list[str]]:
    """What the run itself would refuse of a planned learner, in the words of its own checks."""

    def check(learner: LearnerConfig) -> None:
        if learner.backend == "megatron":
            check_knobs(learner, gpu=gpu)
            check_layout(learner.megatron, from_hf(hf), learner.world_size)
        elif learner.backend == "deepspeed":
            check_deepspeed(learner, shape_from_config(hf), "cuda" if gpu else "cpu")

    def refusals(layout: LearnerLayout) -> list[str]:
        try:
            check(layout.config)
        except ValueError as error:
            return [str(error)]
        return []

    return refusals
