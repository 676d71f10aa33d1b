"""Where the ranks and engines of a layout land in a cluster whose GPUs are only counted; prints JSON.

python -m tests.integration.placement_case NODES GPUS OVERRIDES...
"""

from __future__ import annotations

import json
import sys

import ray
from ray.cluster_utils import Cluster

from gspo_dist.actors.placement import Reservation, blocks, lay_out
from gspo_dist.cli.compose import run_config


def main(count: int, gpus: int, overrides: list[str]) -> None:
    """Starts `count` Rays on this host, reserves the layout, and asks a few actors where they are."""
    cluster = Cluster()
    try:
        for _ in range(count):
            cluster.add_node(
                wait=False,
                num_cpus=2 * gpus,
                num_gpus=gpus,
                object_store_memory=80 << 20,
                include_dashboard=False,
            )
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        print(json.dumps(reserve(overrides) | {"colocated": colocated(overrides)}))
    finally:
        ray.shutdown()
        cluster.shutdown()


def reserve(overrides: list[str]) -> dict[str, object]:
    """The hosts of all ranks and engines, and what some actors say of theirs."""
    config = run_config(overrides)
    layout = lay_out(config.cluster, config.learner, config.rollout, "cuda")
    together = blocks(config.learner)
    places = Reservation(layout, 60.0, local=False, together=together)

    @ray.remote
    def where() -> tuple[str, int]:
        context = ray.get_runtime_context()
        return context.get_node_id(), len(context.get_accelerator_ids()["GPU"])

    last = len(layout.learners) - 1
    asked = [("learner", 7), ("learner", 8), ("learner", last), ("engine", len(layout.engines) - 1)]
    said = ray.get([where.options(**places.options(kind, i, {})).remote() for kind, i in asked], timeout=120)
    places.release()
    return {
        "blocks": together,
        "learner": places.homes("learner"),
        "engine": places.homes("engine"),
        "asked": [
            (places.homes(kind)[i], kind, node, gpus)
            for (kind, i), (node, gpus) in zip(asked, said, strict=True)
        ],
    }


def colocated(overrides: list[str]) -> dict[str, object]:
    """Ranks and engines on all the same GPUs: who is where, who sends to whom, and whose GPUs they are."""

    def places(ranks: int, engines: int) -> Reservation:
        sizes = [f"learner.world_size={ranks}", f"rollout.engines={engines}"]
        sizes += [f"rollout.tensor_parallel={ranks // engines}", "learner.megatron.expert_parallel=4"]
        config = run_config([*overrides, "cluster.colocated=true", *sizes])
        layout = lay_out(config.cluster, config.learner, config.rollout, "cuda")
        return Reservation(layout, 60.0, local=False, together=blocks(config.learner))

    whole = places(64, 16)
    found = {kind: whole.homes(kind) for kind in ("learner", "engine")}
    exporters = whole.exporters()
    whole.release()
    few = places(4, 2)  # each look at a GPU is a process

    @ray.remote
    def here() -> list[str]:
        return [str(gpu) for gpu in ray.get_gpu_ids()]

    seen = few.shared_gpus(120.0)
    asked = [("engine", 1), ("learner", 2)]
    again = ray.get([here.options(**few.options(kind, i, {})).remote() for kind, i in asked], timeout=120)
    return {**found, "exporters": exporters, "gpus": seen, "again": again}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
