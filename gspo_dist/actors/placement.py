"""Where actors run: resources asked of Ray, granted or refused with numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gspo_dist.config import ClusterConfig, LearnerConfig, RolloutConfig

CPU_SHARE = 0.01
"""CPU hosts: actors take turns (collect, then update), so asking for whole cores would refuse a laptop."""


@dataclass(frozen=True)
class Bundle:
    """What one actor asks for."""

    cpus: float
    gpus: float

    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


@dataclass(frozen=True)
class Layout:
    """One bundle a learner rank and one an engine; colocated engines share the learners' bundles."""

    learners: tuple[Bundle, ...]
    engines: tuple[Bundle, ...]
    colocated: bool


def lay_out(cluster: ClusterConfig, learner: LearnerConfig, rollout: RolloutConfig, device: str) -> Layout:
    """Resources of a run. Raises ValueError for a colocation that cannot be."""
    gpu = device == "cuda"
    if cluster.colocated:
        if not gpu:
            raise ValueError(
                "cluster.colocated needs GPUs (engines sleep to free their memory): got cpu; unset it"
            )
        if rollout.tensor_parallel != 1 or rollout.engines > learner.world_size:
            raise ValueError(
                "cluster.colocated places one engine on a learner's GPU: got rollout.tensor_parallel "
                f"{rollout.tensor_parallel}, {rollout.engines} engines and {learner.world_size} learner ranks; "
                "use tensor_parallel=1 and at most one engine a rank"
            )
        share = Bundle(1, 0.5)
        return Layout((share,) * learner.world_size, (share,) * rollout.engines, True)
    cpus = 1 if gpu else CPU_SHARE
    sampling = gpu and rollout.engine != "reference"
    return Layout(
        (Bundle(cpus, float(gpu)),) * learner.world_size,
        (Bundle(cpus, float(sampling * rollout.tensor_parallel)),) * rollout.engines,
        False,
    )


def start_ray(cluster: ClusterConfig) -> bool:
    """Joins the cluster, or starts one on this host; True when this process must stop it."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if cluster.address is not None:
        ray.init(address=cluster.address, **quiet)
        return False
    # Ray warns on hosts whose /dev/shm is small and copies tracebacks to the driver; both belong in its own logs.
    os.environ.setdefault("RAY_DISABLE_DOCKER_CPU_WARNING", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray 2.60 runs workers at nice 15, behind anything else on the host; here the workers are the job.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(include_dashboard=False, object_store_memory=_object_store_bytes(), **quiet)
    return True


def cluster_gpus() -> float:
    """GPUs of the cluster that this process has joined."""
    return float(ray.cluster_resources().get("GPU", 0))


def stop_ray() -> None:
    """Ends what `start_ray` started."""
    ray.shutdown()


def _object_store_bytes() -> int:
    """A tenth of the host's memory, at most 2 GiB: batches are small, and weights do not travel through it."""
    import psutil

    return int(min(2 << 30, max(80 << 20, psutil.virtual_memory().total // 10)))


class Reservation:
    """Placement groups of a layout; `strategy(...)` pins an actor to its bundle."""

    def __init__(self, layout: Layout, timeout_s: float, *, local: bool) -> None:
        """local: the cluster is this host alone, so resources that are missing now will never come."""
        self.layout, self.local = layout, local
        self.groups: list[Any] = []
        if layout.colocated:
            bundles = [{"CPU": 2.0, "GPU": 1.0} for _ in layout.learners]
            self._refuse_what_never_comes(bundles)
            # One host: weights pass from a rank to the engines through its shared memory.
            self.learners = self.engines = self._reserve(bundles, "STRICT_PACK", timeout_s)
        else:
            learners, engines = ([b.resources() for b in part] for part in (layout.learners, layout.engines))
            self._refuse_what_never_comes(learners + engines)
            self.learners = self._reserve(learners, "PACK", timeout_s)
            self.engines = self._reserve(engines, "PACK", timeout_s)

    def _refuse_what_never_comes(self, bundles: list[dict[str, float]]) -> None:
        asked = sum(b.get("GPU", 0) for b in bundles)
        if self.local and asked > cluster_gpus():
            raise ValueError(
                f"the layout asks for {asked:g} GPUs and this host has {cluster_gpus():g}: shrink learner.world_size or "
                "rollout.engines, or let them share GPUs (cluster.colocated=true)"
            )

    def _reserve(self, bundles: list[dict[str, float]], strategy: str, timeout_s: float) -> Any:
        if not bundles:
            return None
        asked = {k: sum(b.get(k, 0) for b in bundles) for k in ("CPU", "GPU")}
        group = placement_group(bundles, strategy=strategy)
        self.groups.append(group)
        if not group.wait(timeout_s):
            free = ray.available_resources()
            self.release()
            raise RuntimeError(
                f"the cluster did not grant {asked} within {timeout_s:.0f} s: free are "
                f"CPU {free.get('CPU', 0):g}, GPU {free.get('GPU', 0):g}; start more nodes or shrink the layout"
            )
        return group

    def options(self, kind: str, index: int, env: Mapping[str, str]) -> dict[str, Any]:
        """Ray options of the actor `index` of kind learner or engine."""
        bundle = (self.layout.learners if kind == "learner" else self.layout.engines)[index]
        group = self.learners if kind == "learner" else self.engines
        return {
            "num_cpus": bundle.cpus,
            "num_gpus": bundle.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=index
            ),
            "runtime_env": {"env_vars": dict(env)},
        }

    def release(self) -> None:
        for group in self.groups:
            remove_placement_group(group)
        self.groups = []
