"""From names to classes: the one place that compares a backend's, an engine's or a sink's name.

`make_learner` and `make_engine` run in the processes that they build for, so each backend is imported
only there. Their partial applications travel to those processes, which is why both are plain functions
of plain arguments.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gspo_dist.config import LearnerConfig, RolloutConfig, RunConfig, WeightSyncConfig
from gspo_dist.config.mapping import to_mapping
from gspo_dist.host import thread_share
from gspo_dist.learners.learner import Learner
from gspo_dist.metrics.console import ConsoleSink
from gspo_dist.metrics.jsonl import MetricsFile, SamplesFile
from gspo_dist.metrics.sinks import Sink, Sinks, going_on_without
from gspo_dist.metrics.wandb_sink import Mode, open_wandb
from gspo_dist.models.shape import read_shape
from gspo_dist.objectives.objective import Objective, get_objective
from gspo_dist.rollout.engine import EngineInfo, RolloutEngine
from gspo_dist.rollout.turns import stop_ids
from gspo_dist.trainer.setup.checks import resolve_transport
from gspo_dist.types import SamplingSpec
from gspo_dist.weights.folder import ModelFolder
from gspo_dist.weights.stream import NamedTensor
from gspo_dist.weights.tolerance import ProbeTolerance


def make_learner(
    config: LearnerConfig,
    model_path: str,
    *,
    total_steps: int,
    temperature: float,
    keep_reference: bool,
    device: str,
    rank: int = 0,
    world_size: int = 1,
    master_addr: str = "127.0.0.1",
    master_port: int = 0,
) -> Learner:
    """One rank's learner. total_steps: optimiser steps of the whole run, for the learning-rate schedule."""
    cap_threads(config.threads or thread_share(world_size), device)
    common: dict[str, Any] = {
        "total_steps": total_steps,
        "temperature": temperature,
        "keep_reference": keep_reference,
        "device": device,
    }
    if config.backend == "eager":
        from gspo_dist.learners.eager import EagerLearner

        return EagerLearner(config, model_path, **common)
    group: dict[str, Any] = {
        "rank": rank,
        "world_size": world_size,
        "master_addr": master_addr,
        "master_port": master_port,
    }
    if config.backend == "deepspeed":
        from gspo_dist.learners.deepspeed.learner import DeepSpeedLearner

        return DeepSpeedLearner(config, model_path, **common, **group)
    from gspo_dist.learners.megatron.learner import MegatronLearner

    # Megatron-core reads its rendezvous from the environment, and takes no arguments for it.
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
    }
    return MegatronLearner(config, model_path, **common)


def stored_weights(config: LearnerConfig, model_path: str, folder: Path) -> Iterator[NamedTensor]:
    """The weights of a learner's checkpoint under HF names, read from its files alone, one after the other.

    No process is started, and optimiser states are not read but where they are all that there is of the
    weights (ZeRO 3's masters). Raises ValueError for a checkpoint that is torn or of another model.
    """
    if config.backend == "eager":
        from gspo_dist.learners import eager

        return eager.stored_weights(folder, model_path, config.precision)
    if config.backend == "deepspeed":
        from gspo_dist.learners.deepspeed import stored as deepspeed

        return deepspeed.stored_weights(folder, ModelFolder(model_path))
    from gspo_dist.learners.megatron import stored as megatron

    return megatron.stored_weights(folder, read_shape(Path(model_path)))


def make_engine(
    config: RolloutConfig,
    model_path: str,
    *,
    name: str,
    device: str,
    seed: int,
    record_routing: bool,
    threads: int,
    sleep_mode: bool,
    fp32_head: bool,
    batch_invariant: bool,
) -> RolloutEngine:
    """One engine.

    sleep_mode: it can give its GPU memory up while the learner works.
    fp32_head: its head computes in float32, as the learner's does. The reference engine always does.
    batch_invariant: its log-probs do not depend on how many sequences run.
    """
    if config.engine == "reference":
        from gspo_dist.rollout.policy import HFPolicy
        from gspo_dist.rollout.reference import ReferenceEngine

        return ReferenceEngine(
            config,
            HFPolicy(model_path),
            name=name,
            device=device,
            record_routing=record_routing,
            sleep_mode=sleep_mode,
        )
    from gspo_dist.rollout.vllm.engine import VllmEngine

    return VllmEngine(
        config,
        model_path,
        name=name,
        device=device,
        seed=seed,
        record_routing=record_routing,
        threads=threads,
        sleep_mode=sleep_mode,
        fp32_head=fp32_head,
        batch_invariant=batch_invariant,
    )


def make_objective(config: RunConfig) -> Objective:
    """The bound, checked objective of a run. Raises ValueError for an unknown name or parameter."""
    chosen = config.objective
    objective = get_objective(
        chosen.name,
        aggregation=chosen.aggregation,
        advantage=chosen.advantage,
        kl_coef=chosen.kl_coef,
        kl_estimator=chosen.kl_estimator,
        allow_wide_clip=chosen.allow_wide_clip,
        **chosen.params,
    )
    # A config knows the built-in estimators only; a user's own objective brings its own.
    if config.rollout.group_size == 1 and objective.spec.advantage != "none":
        raise ValueError(
            f"rollout.group_size must be at least 2 for {objective.spec.advantage} advantages (a group of "
            "one has no baseline): got 1; raise it or set objective.advantage=none"
        )
    return objective


def learner_factory(config: RunConfig, model: str, device: str) -> Callable[..., Learner]:
    """What builds a rank's learner in the rank's process. It lacks the rank and the address to meet at."""
    return functools.partial(
        make_learner,
        config.learner,
        model,
        total_steps=config.steps * config.mini_batches,
        temperature=config.rollout.temperature,
        keep_reference=config.objective.kl_coef > 0,
        device=device,
    )


def engine_factory(
    config: RunConfig, model: str, device: str, moe_layers: int
) -> Callable[..., RolloutEngine]:
    """What builds an engine in its process. It lacks the engine's name."""
    return functools.partial(
        make_engine,
        config.rollout,
        model,
        device="cpu" if config.rollout.engine == "reference" else device,
        seed=config.seed,
        record_routing=records_routing(config, moe_layers),
        threads=config.rollout.threads or thread_share(config.rollout.engines),
        sleep_mode=config.cluster.colocated,
        fp32_head=config.learner.fp32_head or config.learner.precision == "fp32",
        batch_invariant=config.rollout.batch_invariant or config.learner.consistency == "exact",
    )


def records_routing(config: RunConfig, moe_layers: int) -> bool:
    """Engines record where R3 needs it, and where the live flip metric can use it."""
    return config.objective.routing_replay == "r3" or (config.flips.every > 0 and moe_layers > 0)


def sampling_spec(config: RunConfig, tokenizer: Any, info: EngineInfo) -> SamplingSpec:
    """How a run samples. Raises ValueError for an engine that does not give what the objective needs."""
    if config.objective.routing_replay == "r3" and not info.can_record_routing:
        raise ValueError(
            f"routing_replay=r3 needs an engine that records expert choices: {info.name} cannot; use r2 with "
            "old_logprobs=recompute"
        )
    if config.objective.candidates and not info.gives_candidates:
        raise ValueError(
            f"objective {config.objective.name} reads the engine's likeliest tokens, and {info.name} gives "
            "none: use rollout=vllm or rollout=reference, or objective=reinforce, the same without them"
        )
    return SamplingSpec(
        n=config.rollout.group_size,
        max_tokens=config.rollout.max_completion_tokens,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        seed=config.seed,
        stop_token_ids=(
            *((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ()),
            *stop_ids(tokenizer, config.environment.stop),
        ),
        record_routing=records_routing(config, info.moe_layers) and info.can_record_routing,
        candidates=config.objective.candidates,
    )


def resolved_weight_sync(config: RunConfig, device: str) -> WeightSyncConfig:
    """The weight sync's knobs with `transport: auto` replaced by what it means here, where that is known."""
    return replace(config.rollout.weight_sync, transport=resolve_transport(config, device))


def engine_precision(config: RunConfig) -> str:
    """fp32, bf16 or fp16: what the engines compute in. The reference engine knows fp32 alone."""
    return "fp32" if config.rollout.engine == "reference" else config.rollout.precision


def probe_tolerance(config: RunConfig) -> ProbeTolerance:
    """What the log-prob probe of a publication accepts: by the coarser precision of the two sides, and
    nothing where both compute the same number.
    """
    sides = (config.learner.precision, engine_precision(config))
    fixed = 0.0 if config.learner.consistency == "exact" else config.rollout.weight_sync.probe_tolerance
    return ProbeTolerance(next(p for p in ("bf16", "fp16", "fp32") if p in sides), fixed)


def begins_equal(config: RunConfig) -> bool:
    """Whether the starting policy as it is published equals what the engines loaded, bit by bit.

    An engine in fp32 may have read finer weights from the folder than a learner in 16 bits publishes.
    """
    return config.learner.precision in ("fp32", engine_precision(config))


def make_sinks(
    config: RunConfig,
    run_dir: Path,
    completed_steps: int,
    wandb_mode: Mode | None,
    places: Sequence[str] = (),
) -> Sinks:
    """Where a run reports: metrics.jsonl and samples.jsonl always, the console and W&B as configured.

    wandb_mode: what `choose_mode` found before anything heavy started. None is without W&B.
    places: a line per process, its name first. The console begins with them, and W&B's configuration has
    them as `places`.

    Raises OSError when metrics.jsonl cannot be written. Others that cannot be are said and left out.
    """
    record = MetricsFile(run_dir, completed_steps)
    others: list[Sink] = []
    with going_on_without("samples.jsonl"):
        others.append(SamplesFile(run_dir, completed_steps))
    if config.logger.console:
        others.append(ConsoleSink(config.steps, completed_steps, places=places))
    if wandb_mode is not None:
        identity = (run_dir / "run_id").read_text()
        named = dict(line.split(" ", 1) for line in places)
        shown = to_mapping(config) | {"places": named}
        sink = open_wandb(wandb_mode, config.logger.wandb, run_dir, shown, identity)
        others += [sink] if sink else []
    return Sinks(record, others)


def cap_threads(threads: int, device: str) -> None:
    """Limits torch's threads on a CPU, where several processes share the cores."""
    if device == "cpu":
        import torch

        torch.set_num_threads(threads)
