"""The processes of a run: learner ranks, engines and reward workers, as Ray actors or all in this process."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gspo_dist.config import RunConfig
from gspo_dist.files import write_text
from gspo_dist.host import Place, thread_share
from gspo_dist.learners import determinism
from gspo_dist.learners.coordinates import coordinates
from gspo_dist.learners.group import LearnerGroup, LocalLearnerGroup
from gspo_dist.metrics.sinks import going_on_without
from gspo_dist.models.shape import read_shape
from gspo_dist.planner.host import rollout_bytes
from gspo_dist.planner.layout import read_run
from gspo_dist.rewards.pool import LocalRewardPool, RewardPool
from gspo_dist.rollout.engine import EngineInfo
from gspo_dist.rollout.pool import LocalRolloutPool, RolloutPool
from gspo_dist.trainer.setup.factories import cap_threads, engine_factory, learner_factory

if TYPE_CHECKING:  # ray is imported only by runs that use it
    from gspo_dist.actors.learner_group import RayLearnerGroup
    from gspo_dist.actors.reward_pool import RayRewardPool
    from gspo_dist.actors.rollout_pool import RayRolloutPool


PASSED_ON = ("NCCL_", "GLOO_", "NVTE_", "TORCH_", "PYTORCH_", "VLLM_")
"""Libraries whose variables a user sets for the command and means for the run, by how their names begin."""
SECRETS = ("KEY", "TOKEN", "SECRET")
"""Variables with one of these in the name stay here, because Ray writes an actor's environment into logs."""


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
    places: Sequence[str] = ()
    """A line per learner rank and engine: its name, and where it is."""


def start_parts(config: RunConfig, model: str, device: str, run_dir: Path, moe_layers: int) -> Parts:
    """Starts learner, engines and rewards. Raises RuntimeError when the cluster grants no resources."""
    start = start_here if config.cluster.in_process else start_on_ray
    return start(config, model, device, run_dir, moe_layers)


def start_here(config: RunConfig, model: str, device: str, run_dir: Path, moe_layers: int) -> Parts:
    """Everything in this process, without Ray."""
    with contextlib.ExitStack() as started:
        rewards = LocalRewardPool(config.reward, config.cluster.env)
        started.callback(rewards.close)
        rewards.start()  # a reward that cannot be imported is told before a model is read
        learner = LocalLearnerGroup(learner_factory(config, model, device)())
        started.callback(learner.close)
        pool = LocalRolloutPool(engine_factory(config, model, device, moe_layers)(name="engine-0"))
        started.callback(pool.close)
        info = pool.start()
        if config.cluster.colocated:
            pool.sleep()
        card = " gpu=0" if device == "cuda" else ""
        places = [f"{name} {socket.gethostname()}{card}" for name in ("learner-0", "engine-0")]
        return Parts(learner, pool, rewards, info, started.pop_all().close, places)


def start_on_ray(config: RunConfig, model: str, device: str, run_dir: Path, moe_layers: int) -> Parts:
    """Learner ranks, engines and reward workers as Ray actors. Engines and learner start side by side."""
    # This process only packs and counts: idle OpenMP threads would spin on the actors' cores.
    cap_threads(1, "cpu")
    with Processes(config, model, device, run_dir, moe_layers) as processes:
        pool, learner, rewards = processes.pool(), processes.learner(), processes.rewards()
        rewards.start()  # a reward that cannot be imported is told before the learner is built
        if config.cluster.colocated:
            # vLLM measures free memory while it starts, so the two start one after the other. The learner
            # has the first turn (trainer/sharing.py).
            info = pool.start()
            pool.sleep()
            learner.start()
        else:
            learner.start()
            info = pool.start()
        places = processes.found(learner, pool)
        return Parts(learner, pool, rewards, info, processes.keep(), places)


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
        self.batch_bytes = rollout_bytes(read_shape(model), read_run(config)[2])

    def __enter__(self) -> Self:
        from gspo_dist.actors.placement import Reservation, blocks, lay_out, spread
        from gspo_dist.actors.session import nodes, start_ray, stop_ray

        cluster, gpu = self.config.cluster, self.device == "cuda"
        layout = lay_out(cluster, self.config.learner, self.config.rollout, self.device)
        if not self.learners:
            layout = replace(layout, learners=(), colocated=False)
        if not self.engines:
            layout = replace(layout, engines=(), colocated=False)
        if start_ray(cluster, self.batch_bytes):
            self.stack.callback(stop_ray)
        try:
            if cluster.address is not None and not gpu:
                layout = spread(layout, nodes()[: cluster.nodes])
            self.places = Reservation(
                layout,
                cluster.placement_timeout_s,
                local=cluster.address is None,
                # CPU hosts have no faster way inside than between them.
                together=blocks(self.config.learner) if gpu else None,
            )
        except BaseException:
            self.stack.close()
            raise
        self.stack.callback(self.places.release)
        self._write_places({})  # at once: a start that hangs is looked for on its host
        return self

    def _write_places(self, places: Mapping[str, Place]) -> list[str]:
        """Notes in logs/places.txt on which host each process is, for who reads the logs.

        places: what the processes themselves said. Returns the lines, such as "learner-9 node2 10.0.0.2 gpu=1
        replica=1 expert=1".
        """
        lines = []
        for kind in ("learner", "engine"):
            for i, home in enumerate(self.places.homes(kind)):
                words, place = [f"{kind}-{i}", home], places.get(f"{kind}-{i}")
                if place is not None:
                    words += [place.address, *([f"gpu={','.join(place.gpus)}"] if place.gpus else [])]
                if kind == "learner":
                    own = coordinates(self.config.learner, i)
                    words += [f"{name}={at}" for name, at in own.items()]
                lines.append(" ".join(words))
        self.logs.mkdir(parents=True, exist_ok=True)
        write_text(self.logs / "places.txt", "\n".join([*lines, ""]))
        return lines

    def found(self, learner: RayLearnerGroup, pool: RayRolloutPool) -> list[str]:
        """A line per learner rank and engine, with what they say of themselves once they are up."""
        places: dict[str, Place] = {}
        with going_on_without("the processes' addresses and GPUs"):
            places = learner.places() | pool.places()
        return self._write_places(places)

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def keep(self) -> Callable[[], None]:
        """Leaves everything running and returns what ends it."""
        return self.stack.pop_all().close

    def pool(self) -> RayRolloutPool:
        """The engines' actors, not started yet."""
        from gspo_dist.actors.rollout_pool import RayRolloutPool

        options = self._options("engine", self.config.rollout.engines)
        shared = self.places.shared_gpus(self.config.cluster.placement_timeout_s)
        pool = RayRolloutPool(self.config.rollout, self.make_engine, options, self.logs, shared)
        self.stack.callback(pool.close)
        return pool

    def learner(self) -> RayLearnerGroup:
        """The learner ranks' actors, not started yet."""
        from gspo_dist.actors.learner_group import RayLearnerGroup

        options = self._options("learner", self.config.learner.world_size)
        group = RayLearnerGroup(
            self.config.learner, self.make_rank, options, self.logs, self.places.exporters()
        )
        self.stack.callback(group.close)
        return group

    def rewards(self) -> RayRewardPool:
        """The reward workers."""
        from gspo_dist.actors.reward_pool import RayRewardPool

        pool = RayRewardPool(self.config.reward, self.logs, process_env(self.config, self.device)["reward"])
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
    common |= passed_on(os.environ)
    own = config.cluster.env
    # From the start of the process: CUDA, cuBLAS and NCCL read them once.
    fixed = determinism.environment(common) if config.learner.deterministic else {}
    if device == "cuda":
        import torch

        # Ray would set OMP_NUM_THREADS to an actor's CPU share; offloaded optimisers want the host's cores.
        each = thread_share(max(1, torch.cuda.device_count()))
        return {
            "reward": common | own,
            "learner": common | fixed | {"OMP_NUM_THREADS": str(config.learner.threads or each)} | own,
            "engine": common | {"OMP_NUM_THREADS": str(config.rollout.threads or each)} | own,
        }
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # cluster.device=cpu on a host with GPUs: Ray leaves them visible
    learner = config.learner.threads or thread_share(config.learner.world_size)
    engine = config.rollout.threads or thread_share(config.rollout.engines)
    return {
        "reward": common | own,
        "learner": common | fixed | hidden | {"OMP_NUM_THREADS": str(learner), "DS_ACCELERATOR": "cpu"} | own,
        "engine": common | hidden | {"OMP_NUM_THREADS": str(engine)} | own,
    }


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the command's environment every actor gets, wherever Ray was started.

    Actors inherit from the `ray start` of their host, not from the command that a user configures. Folders of
    PYTHONPATH become absolute, because actors work in another folder.
    """
    found = {name: value for name, value in environment.items() if name.startswith(PASSED_ON)}
    found = {name: value for name, value in found.items() if not any(word in name for word in SECRETS)}
    folders = environment.get("PYTHONPATH", "")
    if folders:
        found["PYTHONPATH"] = os.pathsep.join(os.path.abspath(f) for f in folders.split(os.pathsep))
    return found
