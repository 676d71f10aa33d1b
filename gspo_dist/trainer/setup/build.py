"""From a config to a run: the one place that turns names into classes. Cheap checks come first, processes last."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gspo_dist.checkpoint import Checkpoint, CheckpointStore, hold
from gspo_dist.coldstart.make import ensure_model
from gspo_dist.config import ClusterConfig, LearnerConfig, RolloutConfig, RunConfig
from gspo_dist.config.mapping import to_mapping
from gspo_dist.data.cursor import PromptCursor
from gspo_dist.data.prompts import load_splits
from gspo_dist.host import usable_cores
from gspo_dist.learners.learner import Learner
from gspo_dist.metrics.sinks import ConsoleSink, JsonlSink, Sink, Sinks, WandbSink, write_json
from gspo_dist.objectives.objective import Objective, get_objective
from gspo_dist.rewards.reward import resolve_reward
from gspo_dist.rollout.engine import EngineInfo, RolloutEngine
from gspo_dist.trainer.flip_meter import FlipMeter
from gspo_dist.trainer.old_logprobs import LogprobContract
from gspo_dist.trainer.publisher import WeightSync
from gspo_dist.trainer.run import Run
from gspo_dist.types import SamplingSpec

if TYPE_CHECKING:  # ray is imported only by runs that use it
    from gspo_dist.actors.learner_group import RayLearnerGroup
    from gspo_dist.actors.reward_pool import RayRewardPool
    from gspo_dist.actors.rollout_pool import RayRolloutPool


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
    """One rank's learner; runs in the rank's own process, so each backend is imported only there."""
    _cap_threads(config.threads or max(1, usable_cores() // world_size), device)
    common: dict[str, Any] = {
        "total_steps": total_steps,
        "temperature": temperature,
        "keep_reference": keep_reference,
        "device": device,
    }
    if config.backend == "eager":
        from gspo_dist.learners.eager import EagerLearner

        return EagerLearner(config, model_path, **common)
    group = {"rank": rank, "world_size": world_size, "master_addr": master_addr, "master_port": master_port}
    if config.backend == "deepspeed":
        from gspo_dist.learners.deepspeed.learner import DeepSpeedLearner

        return DeepSpeedLearner(config, model_path, **common, **group)
    from gspo_dist.learners.megatron.learner import MegatronLearner

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
    }
    return MegatronLearner(config, model_path, **common)


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
    transport: str,
) -> RolloutEngine:
    """One engine; runs in the engine's own process."""
    if config.engine == "reference":
        from gspo_dist.rollout.reference import HFPolicy, ReferenceEngine

        return ReferenceEngine(
            config,
            HFPolicy(model_path),
            name=name,
            device=device,
            record_routing=record_routing,
            sleep_mode=sleep_mode,
            transport=transport,
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
        transport=transport,
    )


def make_objective(config: RunConfig) -> Objective:
    """The bound, checked objective of a run."""
    o = config.objective
    return get_objective(
        o.name,
        aggregation=o.aggregation,
        kl_coef=o.kl_coef,
        kl_estimator=o.kl_estimator,
        allow_wide_clip=o.allow_wide_clip,
        **o.params,
    )


def build(config: RunConfig) -> Run:
    """Checks everything that is cheap to check, then starts the processes and assembles the run.

    Raises ValueError (bad input) before any process starts; RuntimeError when the cluster grants no resources.
    """
    objective = make_objective(config)
    resolve_reward(config.reward)
    run_dir = Path(config.run_dir).expanduser().resolve()
    checkpoint = (
        CheckpointStore(run_dir, config.checkpoint.keep).newest() if config.checkpoint.resume else None
    )
    model = str(ensure_model(config.model))
    moe_layers = check_model(config, model)
    tokenizer = load_tokenizer(model)
    limit = config.rollout.max_prompt_tokens
    train, heldout = load_splits(config.data, tokenizer, max_prompt_tokens=limit, seed=config.seed)
    device = resolve_device(config.cluster)
    if config.learner.backend == "megatron":
        from gspo_dist.learners.megatron.layout import check_knobs, check_transformer_engine

        check_knobs(config.learner, gpu=device == "cuda")
        if device == "cuda":
            check_transformer_engine()
    run_dir.mkdir(parents=True, exist_ok=True)
    stack = contextlib.ExitStack()
    try:
        stack.enter_context(hold(run_dir))
        _prepare_folder(run_dir, config, checkpoint)
        parts = _local_parts if config.cluster.in_process else _ray_parts
        learner, pool, rewards, info, release = parts(config, model, device, run_dir, moe_layers)
        stack.callback(release)
        ranks = config.learner.data_parallel
        contract = LogprobContract(config.objective, objective, learner, config.seed)
        run = Run(
            config=config,
            run_dir=run_dir,
            learner=learner,
            pool=pool,
            rewards=rewards,
            cursor=PromptCursor(train, seed=config.seed, shuffle=config.data.shuffle),
            heldout=list(heldout or ())[: config.evaluation.prompts],
            probe_prompts=list(itertools.islice(heldout or train, 4)),
            contract=contract,
            flips=FlipMeter(config.flips, learner, config.seed, info.moe_layers or moe_layers, ranks),
            sync=WeightSync(
                dataclasses.replace(config.rollout.weight_sync, transport=_transport(config, device)),
                learner,
                pool,
                ranks,
                config.rollout.max_model_len,
                colocated=config.cluster.colocated,
            ),
            sinks=Sinks([]),
            sampling=sampling_spec(config, tokenizer, info),
            release=stack.close,
        )
        if checkpoint is not None:
            run.restore(checkpoint)
        run.sinks = _make_sinks(config, run_dir, run.first_step)
    except BaseException:
        stack.close()
        raise
    return run


def load_tokenizer(model: str) -> Any:
    """The HF tokenizer of a model folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def resolve_device(cluster: ClusterConfig) -> str:
    """`auto` is cuda where there is a GPU: in the cluster that is joined (its head may have none), else on this host.

    Raises ValueError when cuda is asked for and absent.
    """
    device = cluster.device
    if cluster.address is not None and not cluster.in_process:
        from gspo_dist.actors.placement import cluster_gpus, start_ray

        start_ray(cluster)
        present, where = cluster_gpus() > 0, "Ray reports none in the cluster"
    else:
        import torch

        present, where = torch.cuda.is_available(), "torch sees none on this host"
    if device == "cuda" and not present:
        raise ValueError(f"cluster.device=cuda needs a GPU: {where}; use cpu or auto")
    return ("cuda" if present else "cpu") if device == "auto" else device


def check_model(config: RunConfig, model: str) -> int:
    """Cross-checks of config and model; returns the number of MoE layers (0 for a dense model)."""
    from gspo_dist.learners.hf_model import check_model_folder

    hf = json.loads((check_model_folder(model) / "config.json").read_text())
    context = hf.get("max_position_embeddings")
    if context and config.rollout.max_model_len > context:
        raise ValueError(
            f"rollout.max_prompt_tokens + max_completion_tokens must fit the model's context: got "
            f"{config.rollout.max_model_len} for {context}; shorten them"
        )
    experts = hf.get("num_experts") or hf.get("num_local_experts") or hf.get("n_routed_experts") or 0
    layers = int(hf["num_hidden_layers"]) if experts else 0
    if not experts and config.objective.routing_replay != "none":
        raise ValueError(
            f"objective.routing_replay={config.objective.routing_replay} needs a mixture-of-experts model: "
            f"{hf.get('architectures')} has no experts; set it to none"
        )
    if config.learner.backend == "deepspeed" and config.learner.deepspeed.expert_parallel > 1:
        ep = config.learner.deepspeed.expert_parallel
        if not experts or experts % ep:
            raise ValueError(
                f"learner.deepspeed.expert_parallel must divide num_experts: got {ep} and {experts}; try "
                f"{[d for d in range(1, experts + 1) if experts and experts % d == 0]}"
            )
    if config.learner.backend == "megatron":
        from gspo_dist.learners.megatron.architecture import read_architecture
        from gspo_dist.learners.megatron.layout import check_layout

        check_layout(config.learner.megatron, read_architecture(model), config.learner.world_size)
    return layers


def _records_routing(config: RunConfig, moe_layers: int) -> bool:
    """Engines record where R3 needs it, and where the live flip metric can use it."""
    return config.objective.routing_replay == "r3" or (config.flips.every > 0 and moe_layers > 0)


def sampling_spec(config: RunConfig, tokenizer: Any, info: EngineInfo) -> SamplingSpec:
    wants_routing = _records_routing(config, info.moe_layers)
    if config.objective.routing_replay == "r3" and not info.can_record_routing:
        raise ValueError(
            f"routing_replay=r3 needs an engine that records expert choices: {info.name} cannot; use r2 with "
            "old_logprobs=recompute"
        )
    return SamplingSpec(
        n=config.rollout.group_size,
        max_tokens=config.rollout.max_completion_tokens,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        seed=config.seed,
        stop_token_ids=(tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else (),
        record_routing=wants_routing and info.can_record_routing,
    )


def _factories(config: RunConfig, model: str, device: str, moe_layers: int) -> tuple[Any, Any]:
    learner = functools.partial(
        make_learner,
        config.learner,
        model,
        total_steps=config.steps * config.mini_batches,
        temperature=config.rollout.temperature,
        keep_reference=config.objective.kl_coef > 0,
        device=device,
    )
    engine = functools.partial(
        make_engine,
        config.rollout,
        model,
        device="cpu" if config.rollout.engine == "reference" else device,
        seed=config.seed,
        record_routing=_records_routing(config, moe_layers),
        threads=config.rollout.threads or max(1, usable_cores() // config.rollout.engines),
        sleep_mode=config.cluster.colocated,
        transport=_transport(config, device),
    )
    return learner, engine


def _transport(config: RunConfig, device: str) -> str:
    """nccl between GPUs; shared memory on CPU hosts, for the reference engine, and where learner and engine share a GPU or a
    process (NCCL takes no two ranks of a communicator on one GPU)."""
    asked, cluster = config.rollout.weight_sync.transport, config.cluster
    shares = cluster.colocated or cluster.in_process or config.rollout.engine == "reference"
    if asked == "nccl" and (shares or device != "cuda"):
        raise ValueError(
            "rollout.weight_sync.transport=nccl needs learner and engines on different GPUs: got device "
            f"{device}, engine {config.rollout.engine}, colocated {cluster.colocated}, in_process {cluster.in_process}; "
            "use auto or shm"
        )
    return ("shm" if shares or device != "cuda" else "nccl") if asked == "auto" else asked


def _local_parts(config: RunConfig, model: str, device: str, run_dir: Path, moe_layers: int) -> Any:
    """Everything in this process, without Ray."""
    from gspo_dist.learners.group import LocalLearnerGroup
    from gspo_dist.rewards.pool import LocalRewardPool
    from gspo_dist.rollout.pool import LocalRolloutPool

    make_rank, make_one = _factories(config, model, device, moe_layers)
    learner, pool = LocalLearnerGroup(make_rank()), LocalRolloutPool(make_one(name="engine-0"))

    def release() -> None:
        learner.close()
        pool.close()

    return learner, pool, LocalRewardPool(config.reward), pool.start(), release


def _ray_parts(config: RunConfig, model: str, device: str, run_dir: Path, moe_layers: int) -> Any:
    """Learner ranks, engines and reward workers as Ray actors; engines and learner start side by side."""
    _cap_threads(
        1, "cpu"
    )  # this process only packs and counts: idle OpenMP threads would spin on the actors' cores
    with Processes(config, model, device, run_dir, moe_layers) as processes:
        pool, learner, rewards = processes.pool(), processes.learner(), processes.rewards()
        if (
            config.cluster.colocated
        ):  # vLLM measures free memory while it starts: one after the other on a GPU
            info = pool.start()
            pool.sleep()
            learner.start()
            learner.empty_cache()
            pool.wake_up()
        else:
            learner.start()
            info = pool.start()
        return learner, pool, rewards, info, processes.keep()


class Processes:
    """The Ray actors of a run. Leaving the block ends them, unless `keep` handed that over."""

    def __init__(
        self,
        config: RunConfig,
        model: str,
        device: str,
        run_dir: Path,
        moe_layers: int,
        *,
        learners: bool = True,
        engines: bool = True,
    ) -> None:
        self.config, self.device, self.logs = config, device, run_dir / "logs"
        self.stack = contextlib.ExitStack()
        self.make_rank, self.make_engine = _factories(config, model, device, moe_layers)
        self.learners, self.engines = learners, engines

    def __enter__(self) -> Self:
        from dataclasses import replace

        from gspo_dist.actors.placement import Reservation, lay_out, start_ray, stop_ray

        layout = lay_out(self.config.cluster, self.config.learner, self.config.rollout, self.device)
        if not self.learners:
            layout = replace(layout, learners=(), colocated=False)
        if not self.engines:
            layout = replace(layout, engines=(), colocated=False)
        if start_ray(self.config.cluster):
            self.stack.callback(stop_ray)
        try:
            self.places = Reservation(
                layout, self.config.cluster.placement_timeout_s, local=self.config.cluster.address is None
            )
        except BaseException:
            self.stack.close()
            raise
        self.stack.callback(self.places.release)
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def keep(self) -> Callable[[], None]:
        """Leaves everything running; returns what ends it."""
        return self.stack.pop_all().close

    def _options(self, kind: str, count: int) -> list[Any]:
        env = _process_env(self.config, self.device)[kind]
        return [self.places.options(kind, i, env) for i in range(count)]

    def pool(self) -> RayRolloutPool:
        from gspo_dist.actors.rollout_pool import RayRolloutPool

        options = self._options("engine", self.config.rollout.engines)
        pool = RayRolloutPool(self.config.rollout, self.make_engine, options, self.logs)
        self.stack.callback(pool.close)
        return pool

    def learner(self) -> RayLearnerGroup:
        from gspo_dist.actors.learner_group import RayLearnerGroup

        options = self._options("learner", self.config.learner.world_size)
        group = RayLearnerGroup(self.config.learner, self.make_rank, options, self.logs)
        self.stack.callback(group.close)
        return group

    def rewards(self) -> RayRewardPool:
        from gspo_dist.actors.reward_pool import RayRewardPool

        pool = RayRewardPool(self.config.reward, self.logs)
        self.stack.callback(pool.close)
        return pool


def _process_env(config: RunConfig, device: str) -> dict[str, dict[str, str]]:
    """Environment of the actors: thread caps before any library counts cores."""
    cores = usable_cores()
    common = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    if device == "cuda":
        import torch

        # Ray would set OMP_NUM_THREADS to an actor's CPU share; offloaded optimisers want the host's cores.
        each = max(1, cores // max(1, torch.cuda.device_count()))
        return {
            "learner": common | {"OMP_NUM_THREADS": str(config.learner.threads or each)},
            "engine": common | {"OMP_NUM_THREADS": str(config.rollout.threads or each)},
        }
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # cluster.device=cpu on a host with GPUs: Ray leaves them visible
    learner = config.learner.threads or max(1, cores // config.learner.world_size)
    engine = config.rollout.threads or max(1, cores // config.rollout.engines)
    return {
        "learner": common | hidden | {"OMP_NUM_THREADS": str(learner), "DS_ACCELERATOR": "cpu"},
        "engine": common | hidden | {"OMP_NUM_THREADS": str(engine)},
    }


def _cap_threads(threads: int, device: str) -> None:
    if device == "cpu":
        import torch

        torch.set_num_threads(threads)


def _prepare_folder(run_dir: Path, config: RunConfig, checkpoint: Checkpoint | None) -> None:
    """Readies the run folder. A folder without checkpoints starts over (its metrics are cut); one with checkpoints is
    resumed with the settings that made it. Raises ValueError otherwise: nothing that was finished is lost."""
    if checkpoint is None and any(run_dir.glob("checkpoints/step-*/manifest.json")):
        raise ValueError(
            f"run_dir {run_dir} holds checkpoints of an earlier run and checkpoint.resume is false: choose a new "
            "run_dir, or set checkpoint.resume=true"
        )
    if checkpoint is not None and (run_dir / "config.json").is_file():
        changed = _changed(json.loads((run_dir / "config.json").read_text()), to_mapping(config))
        if changed:
            raise ValueError(
                f"run_dir {run_dir} was made with other settings: {', '.join(changed)}; restore them, or choose a new "
                "run_dir"
            )
    write_json(run_dir / "config.json", to_mapping(config))
    identity = run_dir / "run_id"
    if checkpoint is None or not identity.is_file():
        identity.write_text(uuid.uuid4().hex[:12])


FIXED = {
    "": ("seed", "mini_batches", "model", "objective", "data", "reward"),
    "learner": ("backend", "precision", "optimizer"),
    "rollout": (
        "precision",
        "prompts_per_step",
        "group_size",
        "max_prompt_tokens",
        "max_completion_tokens",
        "temperature",
    ),
}
"""What a resumed run may not change; steps, layout, logging and the rest it may."""


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The fixed settings in which two resolved configurations differ."""
    out = []
    for section, names in FIXED.items():
        a, b = (old.get(section, {}), new[section]) if section else (old, new)
        out += [f"{section}.{n}".lstrip(".") for n in names if a.get(n) != b[n]]
    return out


def _make_sinks(config: RunConfig, run_dir: Path, first_step: int) -> Sinks:
    sinks: list[Sink] = [JsonlSink(run_dir, first_step)]
    if config.logger.console:
        sinks.append(ConsoleSink(config.steps, first_step))
    if config.logger.wandb.mode != "off":
        identity = (run_dir / "run_id").read_text()
        sinks.append(WandbSink(config.logger.wandb, run_dir, to_mapping(config), identity))
    return Sinks(sinks)
