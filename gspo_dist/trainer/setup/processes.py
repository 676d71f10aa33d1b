"""The processes of a run: learner ranks, engines and reward workers, as Ray actors or all in this process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gspo_dist.config import RunConfig
from gspo_dist.host import thread_share
from gspo_dist.learners.group import LearnerGroup, LocalLearnerGroup
from gspo_dist.rewards.pool import LocalRewardPool, RewardPool
from gspo_dist.rollout.engine import EngineInfo
from gspo_dist.rollout.pool import LocalRolloutPool, RolloutPool
from gspo_dist.trainer.setup.factories import cap_threads, engine_factory, learner_factory

if TYPE_CHECKING:  # ray is imported only by runs that use it
    from gspo_dist.actors.learner_group import RayLearnerGroup
    from gspo_dist.actors.reward_pool import RayRewardPool
    from gspo_dist.actors.rollout_pool import RayRolloutPool


@dataclass(frozen=True)
class Parts:
    """The started parts of a run."""

    learner: LearnerGroup
    pool: RolloutPool
    rewards: RewardPool
    info: EngineInfo
    """What the engines say of themselves."""
    release: Callable[[], None]
    """Ends what was started."""


def start_parts(config: RunConfig, model: str, device: str, run_dir: Path, moe_layers: int) -> Parts:
    """Starts learner, engines and rewards. Raises RuntimeError when the cluster grants no resources."""
    start = start_here if config.cluster.in_process else start_on_ray
    return start(config, model, device, run_dir, moe_layers)


def start_here(config: RunConfig, model: str, device: str, run_dir: Path, moe_layers: int) -> Parts:
    """Everything in this process, without Ray."""
    with contextlib.ExitStack() as started:
        rewards = LocalRewardPool(config.reward)
        started.callback(rewards.close)
        rewards.start()  # a reward that cannot be imported is told before a model is read
        learner = LocalLearnerGroup(learner_factory(config, model, device)())
        started.callback(learner.close)
        pool = LocalRolloutPool(engine_factory(config, model, device, moe_layers)(name="engine-0"))
        started.callback(pool.close)
        return Parts(learner, pool, rewards, pool.start(), started.pop_all().close)


def start_on_ray(config: RunConfig, model: str, device: str, run_dir: Path, moe_layers: int) -> Parts:
    """Learner ranks, engines and reward workers as Ray actors; engines and learner start side by side."""
    cap_threads(
        1, "cpu"
    )  # this process only packs and counts: idle OpenMP threads would spin on the actors' cores
    with Processes(config, model, device, run_dir, moe_layers) as processes:
        pool, learner, rewards = processes.pool(), processes.learner(), processes.rewards()
        rewards.start()  # a reward that cannot be imported is told before the learner is built
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
        return Parts(learner, pool, rewards, info, processes.keep())


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
        """learners, engines: whether room is asked for them; an evaluation has no learner, an
        export no engine.
        """
        self.config, self.device, self.logs = config, device, run_dir / "logs"
        self.stack = contextlib.ExitStack()
        self.make_rank = learner_factory(config, model, device)
        self.make_engine = engine_factory(config, model, device, moe_layers)
        self.learners, self.engines = learners, engines

    def __enter__(self) -> Self:
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

    def pool(self) -> RayRolloutPool:
        """The engines' actors, not started yet."""
        from gspo_dist.actors.rollout_pool import RayRolloutPool

        options = self._options("engine", self.config.rollout.engines)
        pool = RayRolloutPool(self.config.rollout, self.make_engine, options, self.logs)
        self.stack.callback(pool.close)
        return pool

    def learner(self) -> RayLearnerGroup:
        """The learner ranks' actors, not started yet."""
        from gspo_dist.actors.learner_group import RayLearnerGroup

        options = self._options("learner", self.config.learner.world_size)
        group = RayLearnerGroup(self.config.learner, self.make_rank, options, self.logs)
        self.stack.callback(group.close)
        return group

    def rewards(self) -> RayRewardPool:
        """The reward workers."""
        from gspo_dist.actors.reward_pool import RayRewardPool

        pool = RayRewardPool(self.config.reward, self.logs)
        self.stack.callback(pool.close)
        return pool

    def _options(self, kind: str, count: int) -> list[dict[str, Any]]:
        env = process_env(self.config, self.device)[kind]
        return [self.places.options(kind, i, env) for i in range(count)]


def process_env(config: RunConfig, device: str) -> dict[str, dict[str, str]]:
    """Environment of the actors, by kind. Threads are capped here, because libraries count cores
    when they load.
    """
    common = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    if device == "cuda":
        import torch

        # Ray would set OMP_NUM_THREADS to an actor's CPU share; offloaded optimisers want the host's cores.
        each = thread_share(max(1, torch.cuda.device_count()))
        return {
            "learner": common | {"OMP_NUM_THREADS": str(config.learner.threads or each)},
            "engine": common | {"OMP_NUM_THREADS": str(config.rollout.threads or each)},
        }
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # cluster.device=cpu on a host with GPUs: Ray leaves them visible
    learner = config.learner.threads or thread_share(config.learner.world_size)
    engine = config.rollout.threads or thread_share(config.rollout.engines)
    return {
        "learner": common | hidden | {"OMP_NUM_THREADS": str(learner), "DS_ACCELERATOR": "cpu"},
        "engine": common | hidden | {"OMP_NUM_THREADS": str(engine)},
    }
