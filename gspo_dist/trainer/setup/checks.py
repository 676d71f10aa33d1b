"""Checks of a run that are cheap, made before any process starts."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Iterable
from typing import Any

from gspo_dist.config import ClusterConfig, LearnerConfig, RunConfig
from gspo_dist.config.consistency import check_device
from gspo_dist.models.shape import read_shape
from gspo_dist.objectives import age_rules, legality
from gspo_dist.types import Prompt

log = logging.getLogger(__name__)


def load_tokenizer(model: str) -> Any:
    """The HF tokenizer of a model folder. Raises ValueError, naming the folder, where it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # whatever a torn or a foreign file makes transformers raise
        cause = (str(error).splitlines() or [""])[0][:300]
        raise ValueError(
            f"model.path {model} must hold a tokenizer that transformers reads: {type(error).__name__}: "
            f"{cause}; copy tokenizer.json and tokenizer_config.json again"
        ) from error


def check_vocabulary(prompts: Iterable[Prompt], vocabulary: int, model: str) -> None:
    """Raises ValueError, naming the record, for a prompt with a token that the model has no embedding for."""
    for prompt in prompts:
        largest = max(prompt.token_ids)
        if largest >= vocabulary:
            raise ValueError(
                f"{prompt.prompt_id}: the prompt has token {largest}, and the model knows tokens 0 to "
                f"{vocabulary - 1}: the tokenizer in {model} is of another model than its weights; copy both "
                "from one place, or resize the embedding"
            )


def resolve_device(cluster: ClusterConfig) -> str:
    """`auto` is cuda where there is a GPU: in the cluster that is joined (its head may have none), else
    on this host. In a cluster it waits for hosts that are still joining.

    Raises ValueError when cuda is asked for and absent, RuntimeError when hosts do not join in time.
    """
    device = cluster.device
    if cluster.address is not None and not cluster.in_process:
        import torch

        from gspo_dist.actors.session import await_nodes, cluster_gpus, start_ray

        start_ray(cluster)
        # All hosts share one environment. One that was made for GPUs says that GPU hosts are to come.
        built_for_gpus = torch.version.cuda is not None and installed("vllm")
        await_nodes(cluster, gpus=device == "cuda" or (device == "auto" and built_for_gpus))
        present, where = cluster_gpus() > 0, "Ray reports none in the cluster"
    else:
        import torch

        present, where = torch.cuda.is_available(), "torch sees none on this host"
    if device == "cuda" and not present:
        raise ValueError(f"cluster.device=cuda needs a GPU: {where}; use cpu or auto")
    return ("cuda" if present else "cpu") if device == "auto" else device


def installed(package: str) -> bool:
    """Whether a distribution is installed, without importing it."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def resolve_transport(config: RunConfig, device: str) -> str:
    """How weights travel: nccl between GPUs, shared memory in one process, and otherwise still auto.

    auto then means shared memory where every engine shares the exporter's host, else gloo, which is known
    once the processes are placed. NCCL takes no two ranks of one communicator on one GPU, so colocated
    engines do without it, and the reference engine holds its weights in host memory. Raises ValueError for a
    transport that cannot work here.
    """
    asked, cluster = config.rollout.weight_sync.transport, config.cluster
    on_host = cluster.colocated or cluster.in_process or config.rollout.engine == "reference"
    if asked == "nccl" and (on_host or device != "cuda"):
        raise ValueError(
            "rollout.weight_sync.transport=nccl needs learner and engines on different GPUs: got device "
            f"{device}, engine {config.rollout.engine}, colocated {cluster.colocated}, in_process "
            f"{cluster.in_process}; use auto, gloo or shm"
        )
    if asked == "gloo" and cluster.in_process:
        raise ValueError(
            "rollout.weight_sync.transport=gloo needs learner and engines in processes of their own: got "
            "cluster.in_process=true; use auto or shm"
        )
    if asked != "auto":
        return asked
    if cluster.in_process:
        return "shm"
    return "auto" if on_host or device != "cuda" else "nccl"


def check_passed_on(learner: LearnerConfig) -> None:
    """Names and types of what is passed on to DeepSpeed or megatron-core. Raises ValueError."""
    if learner.backend == "deepspeed":
        from gspo_dist.learners.deepspeed.passed import check_passed

        check_passed(learner.deepspeed)
    if learner.backend == "megatron":
        from gspo_dist.learners.megatron.passed import check_passed as check_megatron

        check_megatron(learner.megatron)


def check_backend(config: RunConfig, device: str, model: str) -> None:
    """The learner's own rules about its knobs on this device and for this model folder. Raises ValueError."""
    check_device(config.learner, device)
    if config.learner.deterministic:
        from gspo_dist.learners import determinism

        determinism.check_environment({**os.environ, **config.cluster.env})
        determinism.check(read_shape(model), device)
    if config.learner.backend in ("eager", "deepspeed"):
        from gspo_dist.learners.mixers import check_layers

        check_layers(read_shape(model))
    if config.learner.backend == "deepspeed":
        from gspo_dist.learners.deepspeed.config import check

        check(config.learner, read_shape(model), device)
    if config.learner.backend == "megatron":
        from gspo_dist.learners.megatron.layout import check_knobs, check_transformer_engine

        check_knobs(config.learner, gpu=device == "cuda")
        if device == "cuda":
            check_transformer_engine()


def check_model(config: RunConfig, model: str) -> int:
    """Cross-checks of config and model folder. Returns the number of MoE layers (0 for a dense model).

    Raises ValueError for what cannot work: a context that is too short, replay without experts, a layout that
    does not divide the model.
    """
    from gspo_dist.learners.hf_folder import check_model_folder

    check_model_folder(model)
    shape = read_shape(model)
    if shape.context and config.rollout.max_model_len > shape.context:
        raise ValueError(
            "rollout.max_prompt_tokens + max_completion_tokens must fit the model's context: got "
            f"{config.rollout.max_model_len} for {shape.context}; shorten them"
        )
    if not shape.moe_layers and config.objective.routing_replay != "none":
        raise ValueError(
            f"objective.routing_replay={config.objective.routing_replay} needs a mixture-of-experts model: "
            f"{shape.architecture} has no experts; set it to none"
        )
    name = config.objective.name
    if not shape.moe_layers and "router_shift" in legality.spec_of(name).reads:
        raise ValueError(
            f"objective {name} needs a mixture-of-experts model, whose routers move: {shape.architecture} "
            "has no experts; use objective=gmpo, the same without the shift"
        )
    if config.learner.backend == "megatron":
        from gspo_dist.learners.megatron.architecture import read_architecture
        from gspo_dist.learners.megatron.layout import check_layout

        check_layout(config.learner.megatron, read_architecture(model), config.learner.world_size)
    if config.model.self_check:
        from gspo_dist.learners.self_check import check_model_numerically

        check_model_numerically(model, config)
    return shape.moe_layers


def name_age(config: RunConfig) -> None:
    """Says in the log what the objective's settings mean on tokens of older policies."""
    ahead, objective = config.rollout.steps_ahead, config.objective
    if not ahead:
        return
    for note in age_rules.notes(
        objective.name,
        old_logprobs=objective.old_logprobs,
        routing_replay=objective.routing_replay,
        correction=objective.correction.name,
        guard_action=objective.guard.action,
    ):
        log.warning("rollout.steps_ahead=%d: %s: %s", ahead, note.name, note.meaning)


def name_selection(config: RunConfig) -> None:
    """Says in the log which rollouts of a batch train, where that is not all of them."""
    for words in config.objective.selection.words(config.rollout.prompts_per_step):
        log.warning("objective.selection (%s): %s", config.objective.name, words)
