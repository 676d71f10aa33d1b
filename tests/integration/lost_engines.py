"""Runs on the head of a Ray cluster of three hosts, for test_lost_engines.py: what becomes of publications
and of what the engines sample when a process, a host or a link is gone.

    python lost_engines.py FOLDER      writes what it saw to FOLDER/seen.json

The learner is sync_cluster's twelve tensors, and the engines sample from a table. What is between them
(actors, pool, link, transport, Ray) is the package's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gspo_dist.actors.learner_group import RayLearnerGroup
from gspo_dist.actors.rollout_pool import RayRolloutPool
from gspo_dist.config import LearnerConfig, RolloutConfig, WeightSyncConfig
from gspo_dist.rollout import fleet
from gspo_dist.rollout.engine import Progress, group_work
from gspo_dist.rollout.pool import NoEngineLeft
from gspo_dist.rollout.reference import ReferenceEngine
from gspo_dist.trainer.publisher import WeightPublisher
from gspo_dist.types import Prompt, SamplingSpec, Work
from gspo_dist.weights.tolerance import ProbeTolerance
from tests.integration.sync_cluster import Engine, Learner
from tests.unit.rollout.table_policy import TablePolicy

TIMEOUT_S = 20.0
PATIENCE_S = 4.0
"""rollout.timeout_s of the pool."""
SAMPLED = RolloutConfig(
    engines=3, precision="fp32", max_prompt_tokens=16, max_completion_tokens=40, timeout_s=PATIENCE_S
)
WORK = group_work(
    [Prompt(f"p{i}", tuple(range(1, 3 + i)), "") for i in range(6)],
    SamplingSpec(n=3, max_tokens=40, seed=5),
    range(6),
)


class SamplingEngine(Engine):
    """Keeps what arrives and samples from a table. A file named after it says how and when it ends."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, folder)
        self.engine = ReferenceEngine(SAMPLED, TablePolicy(0, vocab_size=40), name=name)

    def _meets_its_fate(self, verb: str) -> None:
        """An end befalls one process only: its successor finds no file."""
        fate = self.folder / f"{self.name} {verb}"
        if fate.exists():
            how = signal.Signals[fate.read_text()]
            fate.unlink()
            os.kill(os.getpid(), how)

    def submit(self, work: list[Work]) -> None:
        self.engine.submit(work)

    def advance(self, ticks: int | None, seconds: float | None) -> Progress:
        self._meets_its_fate("advance")
        return self.engine.advance(ticks, seconds)

    def withdraw(self) -> list[Work]:
        return self.engine.withdraw()

    def update_weights(self, info: Mapping[str, Any]) -> None:
        super().update_weights(info)
        if self.buckets == 2:
            self._meets_its_fate("update_weights")

    def abandon_weight_update(self) -> None:
        self.got = {}

    def close(self) -> None:
        self.source.close()


class Cluster:
    """One learner rank on this host, and a place on each host."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.logs = folder, folder / "logs"
        nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self.nodes = [nodes[f"10.77.0.{i}"] for i in (1, 2, 3)]
        self.group = RayLearnerGroup(
            LearnerConfig(timeout_s=60.0), lambda **place: Learner(), [self.on(0)], self.logs
        )

    def on(self, host: int) -> dict[str, Any]:
        """Ray's options of an actor on a host."""
        place = NodeAffinitySchedulingStrategy(self.nodes[host], soft=False)
        return {"num_cpus": 0, "scheduling_strategy": place}


class Sampled:
    """A pool of an engine on each host, its publications, and the books of what it samples."""

    def __init__(self, cluster: Cluster) -> None:
        folder = self.folder = cluster.folder
        fleet.PING_S = PATIENCE_S
        places = [cluster.on(host) for host in range(3)]
        self.pool = RayRolloutPool(SAMPLED, lambda name: SamplingEngine(name, folder), places, cluster.logs)
        cluster.group.start()
        self.pool.start()
        sync = WeightSyncConfig(bucket_mib=4, timeout_s=TIMEOUT_S, probe_every=0)
        self.publisher = WeightPublisher(
            sync, cluster.group, self.pool, replicas=1, token_budget=64, max_model_len=64,
            tolerance=ProbeTolerance("fp32", None),
        )  # fmt: skip
        whole = ReferenceEngine(SAMPLED, TablePolicy(0, vocab_size=40))
        whole.submit(WORK)
        self.wanted = whole.advance().finished

    def end(self, name: str, verb: str, how: str) -> None:
        """Has an engine end in the middle of a verb."""
        (self.folder / f"{name} {verb}").write_text(how)

    def publish(self) -> dict[str, Any]:
        """Which engines were told of before and after, and what happened to them."""
        start = time.monotonic()
        before = dict(self.pool.engines)
        self.publisher.publish([])
        kept = [name for name, handle in self.pool.engines.items() if before.get(name) == handle]
        return {"kept": kept, "seconds": time.monotonic() - start, **self.events()}

    def events(self) -> dict[str, Any]:
        told = [(event.kind, event.who, event.what) for event in self.pool.take_events()]
        return {"alive": list(self.pool.alive), "events": told}

    def await_successors(self) -> None:
        """Until those that come up are up; they take part in nothing before a publication."""
        if self.pool.starting:
            ray.wait(list(self.pool.starting.values()), num_returns=len(self.pool.starting), timeout=60)

    def submit(self) -> None:
        self.found: dict[Any, Any] = {}
        self.pool.submit(WORK)
        self.advance(3)

    def advance(self, ticks: int | None = None) -> None:
        for told in self.pool.advance(ticks).values():
            assert not self.found.keys() & told.finished.keys()
            self.found |= told.finished

    def run_out(self) -> dict[str, Any]:
        """Samples to the end: whether all completions are those that one engine samples undisturbed."""
        start = time.monotonic()
        while self.pool.in_the_making:
            self.advance(5)
        equal = self.found.keys() == self.wanted.keys() and all(
            completion.token_ids.tolist() == self.wanted[key].token_ids.tolist()
            and float(abs(completion.logprobs - self.wanted[key].logprobs).max()) < 1e-5
            for key, completion in self.found.items()
        )
        return {"equal": equal, "seconds": time.monotonic() - start, **self.events()}


def wait_for(folder: Path, ask: str) -> None:
    """Asks the test, which stands outside of all hosts, and waits until it has done so."""
    (folder / ask).touch()
    while not (folder / f"{ask}, done").exists():
        time.sleep(0.01)


def main(folder: Path) -> None:
    ray.init(address="auto", log_to_driver=False)
    sampled = Sampled(Cluster(folder))
    seen: dict[str, Any] = {"all three": sampled.publish()}
    sampled.end("engine-2", "update_weights", "SIGKILL")
    seen["killed in a publication"] = sampled.publish()
    sampled.await_successors()
    sampled.submit()
    seen["before its publication"] = sampled.run_out()
    seen["returned"] = sampled.publish()
    sampled.submit()
    sampled.end("engine-1", "advance", "SIGSTOP")
    seen["hangs"] = sampled.run_out()
    sampled.await_successors()
    seen["returned from a hang"] = sampled.publish()
    sampled.submit()
    wait_for(folder, "lose host3")
    seen["host lost"] = sampled.run_out()
    seen["without the host"] = sampled.publish()
    sampled.submit()
    wait_for(folder, "cut host2")
    seen["cut while sampling"] = sampled.run_out()
    sampled.submit()
    sampled.end("engine-0", "advance", "SIGKILL")
    try:
        sampled.run_out()
    except NoEngineLeft as error:
        left = sampled.pool.withdraw()
        seen["none left"] = {
            "says": str(error),
            "whole": sorted([item.key for item in left] + list(sampled.found)) == [w.key for w in WORK],
            "tokens": sum(len(item.so_far) for item in left),
        }
    (folder / "seen.json").write_text(json.dumps(seen))
    os._exit(0)  # the actors that hang on lost hosts are not waited for


if __name__ == "__main__":
    main(Path(sys.argv[1]))
