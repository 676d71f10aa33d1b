"""Runs on the head of a Ray cluster of two hosts, for test_sync_hosts.py: publications to engines, and
what becomes of them when an engine dies in the middle of one, and when a link is cut in the middle.

    python sync_cluster.py FOLDER      writes what it saw to FOLDER/seen.json

The learner and the engines are small; what is between them (actors, link, transport, Ray) is the package's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gspo_dist.actors.learner_group import RayLearnerGroup
from gspo_dist.actors.rollout_pool import EngineProcess
from gspo_dist.config import LearnerConfig, WeightSyncConfig
from gspo_dist.rollout.engine import EngineInfo, SyncReceipt
from gspo_dist.weights.shm import ShmSource
from gspo_dist.weights.source import make_source
from gspo_dist.weights.stream import buckets
from gspo_dist.weights.verify import verify_receipt

TIMEOUT_S = 20.0
ELEMENTS, TENSORS = 1 << 18, 12  # 1 MiB each, so that a bucket of 4 MiB holds four


class Learner:
    """Twelve tensors that grow by one with every step."""

    is_exporter, data_parallel_rank, policy_version = True, 0, 0

    def __init__(self) -> None:
        self.tensors = {f"w{i}": torch.full((ELEMENTS,), float(i)) for i in range(TENSORS)}

    def weights(self, bucket_bytes: int, *, stacked: bool) -> Iterator[list[tuple[str, torch.Tensor]]]:
        yield from buckets(iter(self.tensors.items()), bucket_bytes)


class Engine:
    """Keeps what arrives. `fate` befalls it at the second bucket of an update."""

    def __init__(self, name: str, folder: Path, fate: str) -> None:
        self.name, self.folder, self.fate = name, folder, fate
        self.source: Any = ShmSource()
        self.got: dict[str, torch.Tensor] = {}
        self.buckets = 0

    def info(self) -> EngineInfo:
        return EngineInfo(self.name, "cpu", 1, 1, 0, 0, 0, False, 1)

    def init_weight_sync(self, info: Mapping[str, Any]) -> None:
        self.source.close()
        self.source = make_source(info)

    def start_weight_update(self) -> None:
        self.got, self.buckets = {}, 0

    def update_weights(self, info: Mapping[str, Any]) -> None:
        self.buckets += 1
        if self.buckets == 2 and self.fate == "die":
            print("the last words of an engine", flush=True)
            os._exit(9)
        if self.buckets == 2 and self.fate == "cut":
            (self.folder / "cut me").touch()
            while not (self.folder / "is cut").exists():
                time.sleep(0.01)
        self.got.update({name: tensor.clone() for name, tensor in self.source.begin(info)()})

    def finish_weight_update(self, policy_version: int) -> SyncReceipt:
        sums = {name: self.source.checksum(tensor) for name, tensor in self.got.items()}
        assert all(bool((self.got[f"w{i}"] == i).all()) for i in range(TENSORS))
        return SyncReceipt(policy_version, sums, len(sums), 0, 0.0)


class Cluster:
    """One learner rank on this host, engines on the hosts that are named."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.logs = folder, folder / "logs"
        nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self.nodes = [nodes[f"10.77.0.{i}"] for i in (1, 2)]
        self.group = RayLearnerGroup(
            LearnerConfig(timeout_s=60.0), lambda **place: Learner(), [self._on(0)], self.logs
        )
        self.group.start()
        self.version = 0

    def _on(self, host: int) -> dict[str, Any]:
        place = NodeAffinitySchedulingStrategy(self.nodes[host], soft=False)
        return {"num_cpus": 0, "scheduling_strategy": place}

    def engine(self, host: int, fate: str = "") -> Any:
        name = f"engine-{host}"
        handle = ray.remote(EngineProcess).options(**self._on(host)).remote(name, str(self.logs))
        folder = self.folder
        ray.get(handle.start.remote(lambda name: Engine(name, folder, fate)))
        return handle

    def publish(self, engines: Mapping[str, Any], transport: str = "auto") -> dict[str, Any]:
        """What a publication ends in: the first word of its failure, or the sum of its checksums."""
        start = time.monotonic()
        try:
            ray.get([handle.start_weight_update.remote() for handle in engines.values()])
            sync = WeightSyncConfig(transport=transport, bucket_mib=4, timeout_s=TIMEOUT_S)
            sent = self.group.send_weights(sync, engines)
            self.version += 1
            for name, handle in engines.items():
                receipt = ray.get(handle.finish_weight_update.remote(self.version))
                verify_receipt(sent.checksums, receipt, self.version, engine=name)
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", []))
            failure = {"kind": type(error).__name__, "says": str(error), "notes": notes}
            return failure | {"seconds": time.monotonic() - start}
        return {"sum": sum(sent.checksums.values()) % (1 << 53), "tensors": sent.tensors}


def main(folder: Path) -> None:
    ray.init(address="auto", log_to_driver=False)
    cluster = Cluster(folder)
    seen: dict[str, Any] = {}
    near, far = cluster.engine(0), cluster.engine(1)
    both = {"engine-0": near, "engine-1": far}
    seen["shm"] = cluster.publish(both, "shm")
    seen["first"], seen["second"] = cluster.publish(both), cluster.publish(both)
    ray.kill(far)
    seen["died"] = cluster.publish({"engine-0": near, "engine-1": cluster.engine(1, "die")})
    seen["alone"] = cluster.publish({"engine-0": near})
    seen["reborn"] = cluster.publish({"engine-0": near, "engine-1": cluster.engine(1)})
    seen["cut"] = cluster.publish({"engine-0": near, "engine-1": cluster.engine(1, "cut")})
    seen["after"] = cluster.publish({"engine-0": near})
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
