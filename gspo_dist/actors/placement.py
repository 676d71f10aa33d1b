"""Where actors run: resources asked of Ray, granted or refused with numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gspo_dist.actors.session import Node, cluster_gpus, nodes
from gspo_dist.config import ClusterConfig, LearnerConfig, RolloutConfig
from gspo_dist.planner.layout import LearnerLayout

CPU_SHARE = 0.01
"""CPUs per actor on CPU hosts. Actors take turns there, so asking for whole cores would refuse a laptop."""
NODE_SHARE = 0.001
"""Of the resource by which Ray names a host. There is one of it, and asking for some means: on this host."""


@dataclass(frozen=True)
class Bundle:
    """What one actor asks for."""

    cpus: float
    """CPUs, by which Ray counts how many actors fit a node. They bind nothing."""
    gpus: float
    """GPUs; half a one where a learner rank and an engine share it."""
    home: str | None = None
    """Address of the host where it must be. Null: where Ray finds room."""

    def resources(self) -> dict[str, float]:
        """In Ray's words; without a GPU entry for an actor that needs none."""
        resources = {"CPU": self.cpus}
        if self.gpus:
            resources["GPU"] = self.gpus
        if self.home is not None:
            resources[f"node:{self.home}"] = NODE_SHARE
        return resources


@dataclass(frozen=True)
class Layout:
    """What all actors of a run ask for."""

    learners: tuple[Bundle, ...]
    """One per learner rank."""
    engines: tuple[Bundle, ...]
    """One per engine."""
    colocated: bool
    """Engine i then shares the GPUs of the ranks from i * engine_gpus on."""
    engine_gpus: int = 1
    """GPUs of each colocated engine."""


def lay_out(cluster: ClusterConfig, learner: LearnerConfig, rollout: RolloutConfig, device: str) -> Layout:
    """Resources of a run on `device`, cuda or cpu. Raises ValueError for a colocation that cannot be."""
    gpu = device == "cuda"
    if cluster.colocated:
        if not gpu:
            raise ValueError(
                "cluster.colocated needs GPUs (engines sleep to free their memory): got cpu; unset it"
            )
        size = rollout.tensor_parallel
        if rollout.engines * size > learner.world_size:
            raise ValueError(
                "cluster.colocated places engines on the learner's GPUs: got rollout.tensor_parallel "
                f"{size}, {rollout.engines} engines and {learner.world_size} learner ranks; lower "
                f"rollout.engines to {max(1, learner.world_size // size)}, or raise learner.world_size"
            )
        share = Bundle(1, 0.5)
        return Layout((share,) * learner.world_size, (share,) * rollout.engines, True, size)
    cpus = 1 if gpu else CPU_SHARE
    sampling = gpu and rollout.engine != "reference"
    return Layout(
        (Bundle(cpus, float(gpu)),) * learner.world_size,
        (Bundle(cpus, float(sampling * rollout.tensor_parallel)),) * rollout.engines,
        False,
    )


def spread(layout: Layout, nodes: Sequence[Node]) -> Layout:
    """A CPU layout with its processes pinned to hosts: in order, the same number on each, the ranks first.

    Ray would put all of them on one host, because they ask for next to nothing. Example: 2 ranks and 2
    engines on 3 hosts are both ranks on the first host and an engine on each of the others.
    """
    total = len(layout.learners) + len(layout.engines)
    homes = [nodes[i * len(nodes) // total].address for i in range(total)]
    pinned = [replace(b, home=h) for b, h in zip((*layout.learners, *layout.engines), homes, strict=True)]
    ranks = len(layout.learners)
    return replace(layout, learners=tuple(pinned[:ranks]), engines=tuple(pinned[ranks:]))


def blocks(learner: LearnerConfig) -> dict[str, int]:
    """Consecutive ranks that exchange activations in every layer, by what they share.

    Both backends number their ranks so that these groups are consecutive. Example: 32 ranks with
    expert_parallel 8 have the expert groups 0-7, 8-15, 16-23 and 24-31.
    """
    view = LearnerLayout(learner)
    return {
        "tensor and context parallel": view.tensor * view.context,
        "expert parallel": view.expert * view.expert_tensor,
    }


class Reservation:
    """The placement groups of a layout; `options` pins an actor to its bundle."""

    def __init__(
        self, layout: Layout, timeout_s: float, *, local: bool, together: Mapping[str, int] | None = None
    ) -> None:
        """Waits until the cluster has granted the layout, at most `timeout_s` seconds per group.

        local: the cluster is this host alone, so resources that are missing now will never come.
        together: sizes of the blocks of consecutive ranks that must share a host (`blocks`).

        Raises ValueError when this host alone has too few GPUs, RuntimeError when the cluster
        grants too late, or grants so that a block is torn.
        """
        self.layout, self.local = layout, local
        self.groups: list[Any] = []
        if layout.colocated:
            bundles = [{"CPU": 2.0, "GPU": 1.0} for _ in layout.learners]
            self._refuse_what_never_comes(bundles)
            self.learners = self.engines = self._reserve(bundles, "PACK", timeout_s)
        else:
            learners = [bundle.resources() for bundle in layout.learners]
            engines = [bundle.resources() for bundle in layout.engines]
            self._refuse_what_never_comes(learners + engines)
            self.learners = self._reserve(learners, "PACK", timeout_s)
            self.engines = self._reserve(engines, "PACK", timeout_s)
        try:
            self._check_blocks(together or {})
            self._check_engines()
        except BaseException:
            self.release()
            raise

    def _refuse_what_never_comes(self, bundles: list[dict[str, float]]) -> None:
        asked = sum(bundle.get("GPU", 0) for bundle in bundles)
        if self.local and asked > cluster_gpus():
            raise ValueError(
                f"the layout asks for {asked:g} GPUs and this host has {cluster_gpus():g}: shrink "
                "learner.world_size or rollout.engines, or let them share GPUs (cluster.colocated=true)"
            )

    def _reserve(self, bundles: list[dict[str, float]], strategy: str, timeout_s: float) -> Granted | None:
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
        return granted(group, len(bundles))

    def _check_blocks(self, together: Mapping[str, int]) -> None:
        """A block that spans hosts exchanges every layer's activations over the network: slow, and silent."""
        if self.learners is None:
            return
        homes = self.learners.homes
        most = max(Counter(homes).values())
        for what, size in together.items():
            if size > most:  # no host can hold one: the plan calls that slow, and it was asked for
                continue
            for first in range(0, len(homes), size):
                spanned = dict.fromkeys(homes[first : first + size])
                if len(spanned) > 1:
                    raise RuntimeError(
                        f"ranks {first}-{first + size - 1} ({what}) must share a host: the cluster granted "
                        f"{', '.join(f'{n} ranks on {h}' for h, n in Counter(homes).items())}; free whole "
                        "hosts, or choose sizes that divide what each host has free"
                    )

    def _check_engines(self) -> None:
        """An engine's workers talk through the memory of one host."""
        size = self.layout.engine_gpus
        if self.learners is None or not self.layout.colocated or size == 1:
            return
        homes = self.learners.homes
        for i in range(len(self.layout.engines)):
            spanned = dict.fromkeys(homes[i * size : (i + 1) * size])
            if len(spanned) > 1:
                raise RuntimeError(
                    f"ranks {i * size}-{(i + 1) * size - 1} share their GPUs with engine {i} and must be on "
                    f"one host: the cluster granted {', '.join(spanned)}; free whole hosts, or choose a "
                    "rollout.tensor_parallel that divides what each host has free"
                )

    def homes(self, kind: str) -> tuple[str, ...]:
        """The host of every actor of kind learner or engine, in order."""
        place = self.learners if kind == "learner" else self.engines
        count = len(self.layout.learners if kind == "learner" else self.layout.engines)
        return () if place is None else tuple(place.homes[self._place(kind, i)] for i in range(count))

    def _place(self, kind: str, index: int) -> int:
        """Which of the granted places an actor has: a colocated engine that of its first rank."""
        return index * self.layout.engine_gpus if kind == "engine" and self.layout.colocated else index

    def exporters(self) -> dict[str, int] | None:
        """Engine -> the rank that sends it weights: the first of its host. None where one sends to all.

        Example: ranks 0-7 on one host and 8-15 on another, engines of 4 GPUs: engines 0 and 1 have rank 0,
        engines 2 and 3 have rank 8.
        """
        if not self.layout.colocated:
            return None
        first: dict[str, int] = {}
        for rank, home in enumerate(self.homes("learner")):
            first.setdefault(home, rank)
        return {f"engine-{i}": first[home] for i, home in enumerate(self.homes("engine"))}

    def shared_gpus(self, timeout_s: float) -> list[tuple[str, ...]]:
        """The ids of each colocated engine's GPUs on its host. Empty where Ray's own choice will do.

        A bundle keeps its GPU, so whoever looks from inside sees what the rank will have.
        """
        size = self.layout.engine_gpus
        if not self.layout.colocated or size == 1:
            return []

        @ray.remote(num_cpus=0)
        def here() -> tuple[str, ...]:
            return tuple(str(gpu) for gpu in ray.get_gpu_ids())

        ranks = range(len(self.layout.engines) * size)
        refs = [here.options(**self.options("learner", rank, {})).remote() for rank in ranks]
        seen = ray.get(refs, timeout=timeout_s)
        return [
            tuple(gpu for found in seen[i : i + size] for gpu in found) for i in range(0, len(ranks), size)
        ]

    def options(self, kind: str, index: int, env: Mapping[str, str]) -> dict[str, Any]:
        """Ray options of the actor `index` of kind learner or engine."""
        bundle = (self.layout.learners if kind == "learner" else self.layout.engines)[index]
        place = self.learners if kind == "learner" else self.engines
        assert place is not None
        return {
            "num_cpus": bundle.cpus,
            "num_gpus": bundle.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=place.group,
                placement_group_bundle_index=place.bundles[self._place(kind, index)],
            ),
            "runtime_env": {"env_vars": dict(env)},
        }

    def release(self) -> None:
        """Gives everything back, and with it ends the actors placed there. A second call does nothing."""
        for group in self.groups:
            remove_placement_group(group)
        self.groups = []


@dataclass(frozen=True)
class Granted:
    """A placement group in the order of the hosts."""

    group: Any
    """Ray's handle."""
    bundles: tuple[int, ...]
    """The bundle of each actor."""
    homes: tuple[str, ...]
    """The host of each actor, by name."""


def granted(group: Any, count: int) -> Granted:
    """Orders the bundles of a granted group by host, those hosts first that hold the most of them.

    Ray 2.60 sorts equal bundles with an unstable sort, so that from 17 on bundle i is not on host i / 8.
    Example: bundles 0 to 3 on the hosts b, a, b, a become the actors 0 and 1 on a (bundles 1 and 3), and 2
    and 3 on b (bundles 0 and 2).
    """
    home = placement_group_table(group)["bundles_to_node_id"]
    present = nodes()
    position = {node.node_id: i for i, node in enumerate(present)}
    alike = Counter(node.name for node in present)  # several Rays on one machine share its name
    names = {n.node_id: n.name if alike[n.name] == 1 else f"{n.name}/{n.node_id[:8]}" for n in present}
    sizes = Counter(home[i] for i in range(count))
    order = sorted(range(count), key=lambda i: (-sizes[home[i]], position.get(home[i], len(position)), i))
    return Granted(group, tuple(order), tuple(names.get(home[i], home[i]) for i in order))
