"""`gspo plan`: a run's configuration as the planner reads it, and what the run itself would refuse of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gspo_dist.cli.compose import run_as_application, split_arguments
from gspo_dist.cli.exits import guarded
from gspo_dist.config import LearnerConfig, RunConfig
from gspo_dist.config.mapping import from_mapping
from gspo_dist.learners.deepspeed.config import check as check_deepspeed
from gspo_dist.learners.determinism import check as check_deterministic
from gspo_dist.learners.megatron.architecture import from_hf
from gspo_dist.learners.megatron.layout import check_knobs, check_layout
from gspo_dist.metrics.jsonl import METRICS, SAMPLES, read_jsonl
from gspo_dist.models.config_file import find_config, read_config
from gspo_dist.models.shape import countable, shape_from_config
from gspo_dist.planner import find_gpu, format_plan, plan, read_run
from gspo_dist.planner.hardware import GIB
from gspo_dist.planner.kuberay import ray_job
from gspo_dist.planner.layout import LearnerLayout
from gspo_dist.planner.measured import speeds
from gspo_dist.planner.pipeline import Lengths
from gspo_dist.planner.placement import where
from gspo_dist.planner.plan import Plan
from gspo_dist.planner.search import search
from gspo_dist.planner.text import format_found

IMAGE = "gspo:gpu"
"""The image of a manifest where none is named: what docker/Dockerfile.gpu is built as."""
OPTIONS = ("--kuberay", "--search", "--calibrate")
"""Words of this command that are no overrides."""
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
    --search[=AHEAD] prints the fastest layouts of its GPUs that fit, at most AHEAD (2) steps ahead.
    --calibrate=RUN measures the speeds of a run folder first, and plans with them.
    """
    ours = {name: value for name, _, value in (word.partition("=") for word in args) if name in OPTIONS}
    rest = [word for word in args if word.partition("=")[0] not in OPTIONS]

    def show(config: RunConfig) -> str:
        lines = []
        if "--calibrate" in ours:
            config, said = calibrated(config, ours["--calibrate"])
            lines.append(said)
        if "--search" in ours:
            return "\n".join([*lines, search_text(config, ours["--search"])])
        if "--kuberay" in ours:
            return kuberay_text(config, split_arguments(rest)[0], ours["--kuberay"] or IMAGE)
        return "\n".join([*lines, plan_text(config)])

    run_as_application("gspo plan", rest, lambda config: print(guarded(lambda: show(config))), light=True)


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


def search_text(config: RunConfig, ahead: str) -> str:
    """The fastest layouts of the planned GPUs. Raises ValueError without a GPU to plan for."""
    if ahead and not ahead.isdigit():
        raise ValueError(f"--search takes a number of steps ahead: got {ahead!r}; write --search=2")
    hf, name = planned_model(config)
    if not config.plan.gpu:
        raise ValueError("--search needs the kind of GPU: give plan.gpu=H100")
    gpu = find_gpu(config.plan.gpu)
    found = search(
        config,
        countable(shape_from_config(hf, name)),
        gpu,
        config.plan.nodes,
        config.plan.gpus_per_node or gpu.gpus_per_node,
        refusals=_refusals(config, hf, gpu=True),
        lengths=_measured_lengths(config),
        most_ahead=int(ahead or 2),
    )
    return format_found(found)


def calibrated(config: RunConfig, folder: str) -> tuple[RunConfig, str]:
    """The configuration with the speeds of the run in `folder`, and a line that tells them.

    The run is planned as its own config.json says, on the GPU that it or else `config` names. Raises
    ValueError for a folder without a run, and where no GPU is named.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(
            f"--calibrate needs a run folder: {path} has no config.json; give --calibrate=RUN_DIR"
        )
    own = from_mapping(RunConfig, json.loads((path / "config.json").read_text()))
    samples = path / SAMPLES
    measured = replace(
        own.plan if own.plan.gpu else config.plan,
        learner_speed=1.0,
        engine_speed=1.0,
        length_mean=None,
        lengths_from=str(samples) if samples.is_file() else None,
    )
    time = planned(replace(own, plan=measured)).step
    if time is None:
        raise ValueError(
            f"--calibrate compares a run on GPUs with its plan: {path} names none (plan.gpu), or has no "
            "engine; give plan.gpu=H100"
        )
    found = speeds(read_jsonl(path / METRICS), time, own.rollout.steps_ahead)
    engine = config.plan.engine_speed if found.engine is None else found.engine
    plan = replace(config.plan, learner_speed=found.learner, engine_speed=engine)
    kept = " (not measured: it overlaps with the learner)" if found.engine is None else ""
    return (
        replace(config, plan=plan),
        f"measured on {found.steps} steps of {path}: plan.learner_speed={found.learner:.3g} "
        f"plan.engine_speed={engine:.3g}{kept}",
    )


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
    from gspo_dist.coldstart.pretrained import PRETRAINED, planned_config
    from gspo_dist.coldstart.recipes import recipe_named

    if name in PRETRAINED:
        return planned_config(PRETRAINED[name]), name
    # The saved model names its class; a config that was never saved does not.
    hf = {**model_config(recipe_named(name).shape).to_dict(), "architectures": ["Qwen3MoeForCausalLM"]}
    return hf, name


def _measured_lengths(config: RunConfig) -> Lengths | None:
    """Those of the completions in samples.jsonl of plan.lengths_from. Raises ValueError without any."""
    if config.plan.lengths_from is None:
        return None
    path = Path(config.plan.lengths_from).expanduser()
    path = path if path.name.endswith(".jsonl") else path / "samples.jsonl"
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
        if learner.deterministic:
            check_deterministic(shape_from_config(hf), "cuda" if gpu else "cpu")
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
