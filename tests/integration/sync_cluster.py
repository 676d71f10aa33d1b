"""Runs on the head of a Ray cluster of two hosts, for test_sync_hosts.py: publications to engines, and
what becomes of them when an engine computes with the wrong weights, when it dies in the middle of one, and
when a link is cut in the middle.

    python sync_cluster.py FOLDER      writes what it saw to FOLDER/seen.json

The learner and the engines are small; what is between them (actors, link, transport, probe, Ray) is the
package's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gspo_dist.actors.learner_group import RayLearnerGroup
from gspo_dist.actors.rollout_pool import EngineProcess
from gspo_dist.config import LearnerConfig, WeightSyncConfig
from gspo_dist.learners.learner import OptimStep
from gspo_dist.learners.parking import Held
from gspo_dist.rollout.engine import EngineInfo, SyncReceipt
from gspo_dist.trainer.publisher import learner_logprobs
from gspo_dist.types import LogprobOutput, PackedBatch
from gspo_dist.weights.shm import ShmSource
from gspo_dist.weights.source import make_source
from gspo_dist.weights.stream import buckets
from gspo_dist.weights.tolerance import ProbeTolerance
from gspo_dist.weights.verify import probe_difference, verify_receipt

TIMEOUT_S = 20.0
CUT_TIMEOUT_S = 12.0
"""Of the publication whose link is cut, which waits for all of it."""
ELEMENTS, TENSORS = 1 << 18, 12  # 1 MiB each, so that a bucket of 4 MiB holds four
VOCABULARY = 16
PROBE = [(np.arange(20) * 7 % VOCABULARY, 5), (np.arange(13) * 3 % VOCABULARY, 4)]
"""Token ids of two sequences, and where their completions start."""


def logprobs_of(tensors: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The toy's policy: every tensor is the distribution of every twelfth token."""
    rows = [tensors[f"w{i % TENSORS}"][:VOCABULARY].log_softmax(0) for i in range(len(tokens))]
    return torch.stack(rows)[torch.arange(len(tokens)), tokens]


class Learner:
    """Twelve tensors that a step doubles."""

    is_exporter, data_parallel_rank, policy_version = True, 0, 0

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.tensors = {f"w{i}": torch.randn(ELEMENTS, generator=draw) for i in range(TENSORS)}

    def optim_step(self) -> OptimStep:
        for tensor in self.tensors.values():
            tensor.mul_(2.0)
        self.policy_version += 1
        return OptimStep(0.0, 0.0, self.policy_version)

    def logprobs(self, batches: Sequence[PackedBatch], **options: bool) -> list[LogprobOutput]:
        found = []
        for batch in batches:
            ends = batch.cu_seqlens.tolist()
            parts = [logprobs_of(self.tensors, batch.token_ids[first:last]) for first, last in pairwise(ends)]
            found.append(LogprobOutput(torch.cat(parts) * batch.loss_mask, torch.zeros(ends[-1])))
        return found

    def weights(self, bucket_bytes: int, *, stacked: bool) -> Iterator[list[tuple[str, torch.Tensor]]]:
        yield from buckets(iter(self.tensors.items()), bucket_bytes)


class Shard(Learner):
    """A rank of two on two hosts. It holds one half of every tensor, and any rank may export the whole."""

    def __init__(self, rank: int, world_size: int, master_addr: str, master_port: int) -> None:
        super().__init__()
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"  # the host's own name leads nowhere here
        dist.init_process_group(
            "gloo", init_method=f"tcp://{master_addr}:{master_port}", rank=rank, world_size=world_size
        )
        self.rank = self.data_parallel_rank = rank
        self.tensors = {name: tensor.chunk(2)[rank].clone() for name, tensor in self.tensors.items()}

    def held(self) -> Held:
        return Held(torch.device("cpu"), list(self.tensors.values()), [])

    def weights(
        self, bucket_bytes: int, *, stacked: bool, exporters: Sequence[int]
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        for name, tensor in self.tensors.items():
            halves = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(halves, tensor)
            if self.rank in exporters:
                yield [(name, torch.cat(halves))]


class Engine:
    """Keeps what arrives. What FOLDER/NAME.fate says befalls it at the second bucket of an update."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.source: Any = ShmSource()
        self.got: dict[str, torch.Tensor] = {}
        self.buckets = 0

    @property
    def fate(self) -> str:
        file = self.folder / f"{self.name}.fate"
        return file.read_text() if file.exists() else ""

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
        if self.fate == "swap":  # every byte arrived, and two layers are in each other's place
            self.got |= {"w1": self.got["w2"], "w2": self.got["w1"]}
        return SyncReceipt(policy_version, sums, len(sums), 0, 0.0)

    def logprobs_of(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [logprobs_of(self.got, torch.as_tensor(tokens))[1:].numpy() for tokens in sequences]


class Cluster:
    """One learner rank on this host, engines on the hosts that are named."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.logs = folder, folder / "logs"
        self.nodes: list[str] = []
        self.tolerance = ProbeTolerance("fp32", None)
        self.version = 0

    def start(self) -> None:
        """Waits for the second host; then all processes start side by side."""
        nodes: dict[str, str] = {}
        while len(nodes) < 2:
            nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
            time.sleep(0.1)
        self.nodes = [nodes[f"10.77.0.{i}"] for i in (1, 2)]
        self.near, self.far = self.engine(0), self.engine(1)
        self.group = RayLearnerGroup(
            LearnerConfig(timeout_s=60.0), lambda **place: Learner(), [self._on(0)], self.logs
        )
        self.group.start()

    def _on(self, host: int) -> dict[str, Any]:
        place = NodeAffinitySchedulingStrategy(self.nodes[host], soft=False)
        return {"num_cpus": 0, "scheduling_strategy": place}

    def engine(self, host: int) -> Any:
        """A new engine process. It is not waited for: the first call to it does that."""
        name = f"engine-{host}"
        handle = ray.remote(EngineProcess).options(**self._on(host)).remote(name, str(self.logs))
        folder = self.folder
        handle.start.remote(lambda name: Engine(name, folder))
        return handle

    def fate(self, text: str) -> None:
        """What befalls the engine of the second host in the next publication."""
        (self.folder / "engine-1.fate").write_text(text)

    def colocated(self) -> dict[str, Any]:
        """A publication from two ranks to the engine on the host of each, the ranks asleep before it."""
        logs, sync = self.folder / "colocated", WeightSyncConfig(bucket_mib=4, timeout_s=TIMEOUT_S)
        group = RayLearnerGroup(
            LearnerConfig(world_size=2, timeout_s=60.0),
            Shard,
            [self._on(0), self._on(1)],
            logs,
            {"engine-0": 0, "engine-1": 1},
        )
        group.start()
        engines = {"engine-0": self.near, "engine-1": self.far}
        group.sleep()
        try:
            group.send_weights(sync, engines)
            refused = ""
        except RuntimeError as error:
            refused = str(error)
        group.wake_up(weights_only=True)
        ray.get([handle.start_weight_update.remote() for handle in engines.values()])
        sent = group.send_weights(sync, engines)
        receipts = ray.get([handle.finish_weight_update.remote(0) for handle in engines.values()])
        for name, receipt in zip(engines, receipts, strict=True):
            verify_receipt(sent.checksums, receipt, 0, engine=name)
        group.close()
        said = [(logs / f"learner-{rank}.log").read_text().splitlines() for rank in range(2)]
        return {
            "refused": refused,
            "sum": sum(sent.checksums.values()) % (1 << 53),
            "links": [[line for line in lines if line.startswith("weight sync: ")] for lines in said],
        }

    def publish(self, *engines: Any, transport: str = "auto", timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """What a publication ends in: the first word of its failure, or the sum of its checksums.

        Checked and probed as trainer/publisher.py does it.
        """
        named = {f"engine-{i}": handle for i, handle in enumerate(engines)}
        ray.get([handle.start_weight_update.remote() for handle in engines])  # they live, whatever it took
        start = time.monotonic()
        try:
            sync = WeightSyncConfig(transport=transport, bucket_mib=4, timeout_s=timeout_s)
            sent = self.group.send_weights(sync, named)
            self.version += 1
            for name, handle in named.items():
                receipt = ray.get(handle.finish_weight_update.remote(self.version))
                verify_receipt(sent.checksums, receipt, self.version, engine=name)
            gap = max(self._probe(name, handle) for name, handle in named.items())
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", []))
            failure = {"kind": type(error).__name__, "says": str(error), "notes": notes}
            return failure | {"seconds": time.monotonic() - start}
        return {"sum": sum(sent.checksums.values()) % (1 << 53), "tensors": sent.tensors, "gap": gap}

    def _probe(self, name: str, handle: Any) -> float:
        """Largest difference to the learner's log-probs, in nats. WeightSyncError: it is another policy's."""
        ours = learner_logprobs(self.group, PROBE, replicas=1, token_budget=64)
        answer = ray.get(handle.logprobs_of.remote([tokens for tokens, _ in PROBE]))
        theirs = [row[start - 1 :] for row, (_, start) in zip(answer, PROBE, strict=True)]
        mean, largest = probe_difference(theirs, ours)
        self.tolerance.check(mean, largest, engine=name, policy_version=self.group.policy_version)
        return largest


def main(folder: Path) -> None:
    ray.init(address="auto", log_to_driver=False)
    cluster = Cluster(folder)
    cluster.start()
    near, far = cluster.near, cluster.far
    seen: dict[str, Any] = {}
    seen["shm"] = cluster.publish(near, far, transport="shm")
    seen["colocated"] = cluster.colocated()
    seen["first"] = cluster.publish(near, far)
    cluster.group.optim_step()
    seen["second"] = cluster.publish(near, far)
    cluster.fate("swap")
    seen["swapped"] = cluster.publish(near, far)
    reborn = cluster.engine(1)  # comes up while the other one dies
    cluster.fate("die")
    seen["died"] = cluster.publish(near, far)
    cluster.fate("")
    seen["alone"] = cluster.publish(near)
    seen["reborn"] = cluster.publish(near, reborn)
    cluster.fate("cut")
    seen["cut"] = cluster.publish(near, reborn, timeout_s=CUT_TIMEOUT_S)
    seen["after"] = cluster.publish(near)
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
