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
"""CPUs per actor on CPU hosts. Actors take turns there, so asking for whole cores would refuse a laptop."""


@dataclass(frozen=True)
class Bundle:
    """What one actor asks for."""

    cpus: float
    """CPUs, by which Ray counts how many actors fit a node. They bind nothing."""
    gpus: float
    """GPUs; half a one where a learner rank and an engine share it."""

    def resources(self) -> dict[str, float]:
        """In Ray's words; without a GPU entry for an actor that needs none."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


@dataclass(frozen=True)
class Layout:
    """What all actors of a run ask for."""

    learners: tuple[Bundle, ...]
    """One per learner rank."""
    engines: tuple[Bundle, ...]
    """One per engine."""
    colocated: bool
    """Engine i then shares the GPU of learner rank i."""


def lay_out(cluster: ClusterConfig, learner: LearnerConfig, rollout: RolloutConfig, device: str) -> Layout:
    """Resources of a run on `device`, cuda or cpu. Raises ValueError for a colocation that cannot be."""
    gpu = device == "cuda"
    if cluster.colocated:
        if not gpu:
            raise ValueError(
                "cluster.colocated needs GPUs (engines sleep to free their memory): got cpu; unset it"
            )
        if rollout.tensor_parallel != 1 or rollout.engines > learner.world_size:
            raise ValueError(
                "cluster.colocated places one engine on a learner's GPU: got rollout.tensor_parallel "
                f"{rollout.tensor_parallel}, {rollout.engines} engines and {learner.world_size} learner "
                "ranks; use tensor_parallel=1 and at most one engine per rank"
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
    """Joins the cluster, or starts one on this host.

    True when this process must stop it. May be called again.
    """
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if cluster.address is not None:
        ray.init(address=cluster.address, **quiet)
        return False
    # Ray warns on hosts with a small /dev/shm and copies tracebacks here; both belong in its own logs.
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
    """A tenth of the host's memory, at most 2 GiB: batches are small, and weights travel elsewhere."""
    import psutil

    return int(min(2 << 30, max(80 << 20, psutil.virtual_memory().total // 10)))


class Reservation:
    """The placement groups of a layout; `options` pins an actor to its bundle."""

    def __init__(self, layout: Layout, timeout_s: float, *, local: bool) -> None:
        """Waits until the cluster has granted the layout, at most `timeout_s` seconds per group.

        local: the cluster is this host alone, so resources that are missing now will never come.

        Raises ValueError when this host alone has too few GPUs, RuntimeError when the cluster
        grants too late.
        """
        self.layout, self.local = layout, local
        self.groups: list[Any] = []
        if layout.colocated:
            bundles = [{"CPU": 2.0, "GPU": 1.0} for _ in layout.learners]
            self._refuse_what_never_comes(bundles)
            # One host: weights pass from a rank to the engines through its shared memory.
            self.learners = self.engines = self._reserve(bundles, "STRICT_PACK", timeout_s)
        else:
            learners = [bundle.resources() for bundle in layout.learners]
            engines = [bundle.resources() for bundle in layout.engines]
            self._refuse_what_never_comes(learners + engines)
            self.learners = self._reserve(learners, "PACK", timeout_s)
            self.engines = self._reserve(engines, "PACK", timeout_s)

    def _refuse_what_never_comes(self, bundles: list[dict[str, float]]) -> None:
        asked = sum(bundle.get("GPU", 0) for bundle in bundles)
        if self.local and asked > cluster_gpus():
            raise ValueError(
                f"the layout asks for {asked:g} GPUs and this host has {cluster_gpus():g}: shrink "
                "learner.world_size or rollout.engines, or let them share GPUs (cluster.colocated=true)"
            )

    def _reserve(self, bundles: list[dict[str, float]], strategy: str, timeout_s: float) -> Any:
        if not bundles:
            return None
        asked = {kind: sum(bundle.get(kind, 0) for bundle in bundles) for kind in ("CPU", "GPU")}
        group = placement_group(bundles, strategy=strategy)
        self.groups.append(group)
        if not group.wait(timeout_s):
            free = ray.available_resources()
            self.release()
            raise RuntimeError(
                f"the cluster did not grant {asked} within {timeout_s:.0f} s: free are "
                f"CPU {free.get('CPU', 0):g}, GPU {free.get('GPU', 0):g}; start more nodes or shrink "
                "the layout"
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
        """Gives everything back, and with it ends the actors placed there. A second call does nothing."""
        for group in self.groups:
            remove_placement_group(group)
        self.groups = []
