"""Laws of the ranks as one: every rank gets its replica's data, and the answers become one."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch

from gspo_dist.actors import learner_group
from gspo_dist.actors.learner_group import LearnerRank, RayLearnerGroup, one_report
from gspo_dist.actors.process import ActorProcess, Actors, ProcessDied
from gspo_dist.config import DeepSpeedConfig, LearnerConfig, WeightSyncConfig
from gspo_dist.learners.collectives import Watch
from gspo_dist.learners.learner import OptimStep
from gspo_dist.learners.parking import Held
from gspo_dist.metrics.stat import Stat
from gspo_dist.objectives.aggregate import Denominators
from gspo_dist.packing import MiniBatch
from gspo_dist.types import LogprobOutput, PackedBatch
from gspo_dist.weights.send import SentReport
from gspo_dist.weights.verify import WeightSyncError

pytestmark = pytest.mark.slow
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

RANKS, WEIGHTS = 4, {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.tensor([7.0])}


class CountingLearner:
    """Two ranks per replica; every answer is made of the rank and of the tokens that came in."""

    def __init__(self, rank, world_size, master_addr, master_port):
        self.rank, self.world_size, self.address = rank, world_size, (master_addr, master_port)
        self.data_parallel_rank, self.is_exporter = rank // 2, rank == 2
        self.policy_version, self.saved = 0, []

    def logprobs(self, batches, *, record_routing=False, record_scores=False, reference=False):
        if self.world_size != RANKS or (reference and self.rank == 3):
            print("the last words of a rank", flush=True)
            os._exit(1)
        mark = torch.tensor([record_routing + 2.0 * record_scores, float(self.address[1])])
        return [LogprobOutput(batch.token_ids.float(), mark) for batch in batches]

    def forward_backward(self, batches, spec):
        if self.rank % 2:  # the other rank of a replica has reported the same tokens
            return {}
        return {f"tokens/{spec}": Stat.sum(torch.cat([batch.token_ids for batch in batches]))}

    def optim_step(self):
        self.policy_version += 1
        return OptimStep(float(self.rank), 0.5, self.policy_version)

    def weights(self, bucket_bytes, *, stacked=False):
        if self.is_exporter:
            yield from ([item] for item in WEIGHTS.items())

    def save(self, folder):
        (folder / f"rank-{self.rank}").write_text(str(self.policy_version))
        self.saved.append(folder)

    def load(self, folder):
        self.policy_version = int((folder / f"rank-{self.rank}").read_text())

    def wait_saved(self):
        if not self.saved:
            raise ValueError("nothing was saved")


class Engine(ActorProcess):
    """Counts the calls of a publication."""

    def __init__(self, name, log_dir):
        super().__init__(name, log_dir)
        self.met, self.buckets = 0, 0

    def sees(self, path, content):
        return True

    def init_weight_sync(self, info):
        self.met += 1

    def update_weights(self, info):
        self.buckets += 1

    def said(self):
        return self.met, self.buckets


def batch(*tokens: int) -> PackedBatch:
    n = len(tokens)
    return PackedBatch(
        token_ids=torch.tensor(tokens), position_ids=torch.arange(n), cu_seqlens=torch.tensor([0, n]),
        loss_mask=torch.ones(n, dtype=torch.bool), advantages=torch.zeros(n), rollout_logprobs=torch.zeros(n),
        rollout_index=torch.tensor([0]),
    )  # fmt: skip


MINI = MiniBatch(((batch(1, 2), batch(3)), (batch(40), batch(50, 60))), Denominators(4, 6, 8))


def make_group(folder, make=CountingLearner) -> RayLearnerGroup:
    config = LearnerConfig(
        backend="deepspeed", world_size=RANKS, timeout_s=120.0, deepspeed=DeepSpeedConfig(expert_parallel=1)
    )
    return RayLearnerGroup(config, make, [{"num_cpus": 0}] * RANKS, folder / "logs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("group")


@pytest.fixture(scope="module")
def group(ray_here, folder):
    group = make_group(folder)
    assert (group.replica_of, group.policy_version) == ({}, 0)
    group.start()
    yield group
    group.close()


def test_every_rank_says_which_replica_it_is_of(group):
    assert group.replica_of == {"learner-0": 0, "learner-1": 0, "learner-2": 1, "learner-3": 1}


def test_every_replica_computes_its_own_micro_batches_in_order(group):
    outputs = group.logprobs(MINI.micro_batches, record_routing=True)
    scores = group.logprobs(MINI.micro_batches, record_scores=True)
    assert {float(output.entropy[0]) for replica in scores for output in replica} == {2.0}
    assert [[o.logprobs.tolist() for o in replica] for replica in outputs] == [
        [[1.0, 2.0], [3.0]],
        [[40.0], [50.0, 60.0]],
    ]
    marks = {tuple(o.entropy.tolist()) for replica in outputs for o in replica}
    assert len(marks) == 1  # one rendezvous for all
    ((recorded, port),) = marks
    assert recorded == 1.0
    assert 0 < port < 65536
    assert group.logprobs(MINI.micro_batches)[0][0].entropy[0] == 0.0


def test_one_rank_of_each_replica_sends_its_answer(group, monkeypatch):
    """All four compute. Outputs and routes of the twins (ranks 1 and 3) stay where they are."""
    sizes = {}
    gather = group.actors.gather

    def counted(refs, timeout):
        answers = gather(refs, timeout)
        sizes.update({name: len(answer) for name, answer in answers.items()})
        return answers

    monkeypatch.setattr(group.actors, "gather", counted)
    group.logprobs(MINI.micro_batches, record_routing=True)
    assert sizes == {"learner-0": 2, "learner-1": 0, "learner-2": 2, "learner-3": 0}


def test_stats_of_all_replicas_merge_to_one(group):
    stats = group.forward_backward(MINI, "spec")
    assert {name: stat.result() for name, stat in stats.items()} == {"tokens/spec": 156.0}


def test_a_step_is_the_first_ranks_and_sets_the_version(group):
    before = group.policy_version
    step = group.optim_step()
    assert step == OptimStep(0.0, 0.5, before + 1)
    assert group.policy_version == before + 1


def test_every_rank_saves_and_loads_its_part(group, tmp_path):
    group.save(tmp_path)
    group.wait_saved()
    version = str(group.policy_version)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {f"rank-{r}": version for r in range(RANKS)}
    for path in tmp_path.iterdir():
        path.write_text("40")
    group.load(tmp_path, 40)
    assert group.policy_version == 40
    assert group.optim_step().policy_version == 41


def test_a_folder_that_a_node_does_not_see_is_refused(group, tmp_path):
    with pytest.raises(
        ValueError, match=f"checkpoint folder .*/gone is not visible on {socket.gethostname()}"
    ):
        group.save(tmp_path / "gone")


def test_the_exporter_alone_writes_the_folder_and_the_others_help(monkeypatch, tmp_path):
    written = []

    def write(items, source, target):
        written.append((dict(items), source, target))
        return len(written[0][0])

    monkeypatch.setattr(learner_group, "write_hf_folder", write)
    for number in (2, 3):
        rank = object.__new__(LearnerRank)
        rank._learner = CountingLearner(number, RANKS, "host", 1)
        rank._watch = Watch("learner", tmp_path, 60.0, 60.0)
        drawn = []
        real = rank._learner.weights

        def weights(bucket_bytes, real=real, drawn=drawn):
            yield from real(bucket_bytes)
            drawn.append("to the end")

        rank._learner.weights = weights
        assert rank.export("source", str(tmp_path)) == (2 if number == 2 else None)
        assert drawn == ["to the end"]
    assert written == [(WEIGHTS, Path("source"), tmp_path)]


def test_the_groups_answer_to_an_export_is_the_exporters():
    group = object.__new__(RayLearnerGroup)
    group.config = LearnerConfig()
    handle = SimpleNamespace(export=SimpleNamespace(remote=lambda *arguments: arguments))
    asked = []

    def gather(refs, timeout):
        asked.append((refs, timeout))
        return {"learner-0": None, "learner-1": 5, "learner-2": None}

    group.actors = SimpleNamespace(gather=gather, handles={"learner-0": handle, "learner-1": handle})
    assert group.export(Path("source"), Path("target")) == 5
    assert asked == [(dict.fromkeys(group.actors.handles, ("source", "target")), group.config.timeout_s)]


def test_the_exporter_meets_the_engines_once_and_delivers_every_bucket_to_each(group, folder):
    remote = ray.remote(Engine).options(num_cpus=0)
    handles = {f"engine-{i}": remote.remote(f"engine-{i}", str(folder / "logs")) for i in range(2)}
    sync = WeightSyncConfig(transport="shm", timeout_s=120.0)
    for _ in range(2):
        report = group.send_weights(sync, handles)
        assert (report.tensors, report.bytes, set(report.checksums)) == (2, 7 * 4, set(WEIGHTS))
    engines = Actors(handles, folder)
    assert engines.call_all("said", timeout=60) == {"engine-0": (1, 4), "engine-1": (1, 4)}
    engines.kill()


def test_the_ranks_that_are_asked_record_what_they_compute(group, tmp_path):
    group.start_profile([3, 1])
    group.logprobs(MINI.micro_batches)
    files = group.stop_profile([3, 1], tmp_path / "profile")
    assert sorted(path.name for path in files) == ["rank-1.trace.json.gz", "rank-3.trace.json.gz"]
    for path in files:
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        made = [event for event in events if event["name"] == "aten::to" and event.get("ph") == "X"]
        assert len(made) >= 2  # two micro-batches, whose tokens become floats
    assert group.stop_profile([0, 1, 2, 3], tmp_path / "profile") == []
    assert len(list((tmp_path / "profile").iterdir())) == 2


def test_memory_is_counted_per_rank(group):
    assert [set(peak) for peak in group.peak_memory().values()] == [{"host"}] * RANKS


def test_a_rank_that_dies_is_named_with_its_last_words(ray_here, tmp_path):
    group = make_group(tmp_path)
    group.start()
    with pytest.raises(ProcessDied, match=r"(?s)^learner-3 died: .*the last words of a rank"):
        group.logprobs(MINI.micro_batches, reference=True)
    group.close()


class BrokenLearner(CountingLearner):
    """Rank 0 loses its connection at once. Rank 1 ends a second later, or only answers."""

    def optim_step(self):
        if self.rank == 0:
            raise RuntimeError("Connection reset by peer")
        time.sleep(1.0)
        if self.policy_version:
            os._exit(1)
        return super().optim_step()

    def load(self, folder):
        self.policy_version = 1


def test_a_broken_connection_is_the_death_of_the_rank_that_ended(ray_here, tmp_path, monkeypatch):
    """A run begins again from its checkpoint after a death, and ends at any other error of a rank."""
    monkeypatch.setattr(learner_group, "DEATH_S", 30.0)
    group = make_group(tmp_path, BrokenLearner)
    group.start()
    with pytest.raises(RuntimeError, match="Connection reset by peer") as alive:
        group.optim_step()
    assert not isinstance(alive.value, ProcessDied)
    group.load(tmp_path, 1)
    with pytest.raises(ProcessDied, match=r"^learner-[123] died: ") as died:
        group.optim_step()
    assert died.value.__notes__ == ["another rank's error came first: Connection reset by peer"]
    group.close()


def test_no_verb_comes_before_start():
    rank = object.__new__(LearnerRank)
    rank.name, rank._learner, rank._watch = "learner-2", None, None
    with pytest.raises(RuntimeError, match="learner-2 has no learner yet: call start first"):
        rank.optim_step()


def test_several_exporters_must_have_sent_the_same():
    sent = SentReport({"a": 1, "b": 2}, 2, 8, 0.25)
    assert one_report({"learner-0": sent}) is sent
    slower = replace(sent, seconds_checking=0.5)
    assert one_report({"learner-0": sent, "learner-8": slower}) == slower
    other = replace(sent, checksums={"a": 1, "b": 3})
    with pytest.raises(WeightSyncError, match="learner-8 and learner-0 sent other weights, first b"):
        one_report({"learner-0": sent, "learner-8": other})


def test_a_rank_that_sleeps_computes_nothing_and_may_send_with_its_weights_alone():
    weights, masters = torch.ones(4), torch.full((4,), 2.0)
    learner = SimpleNamespace(held=lambda: Held(torch.device("cpu"), [weights], [masters]))
    rank = object.__new__(LearnerRank)
    rank.name, rank._learner, rank._watch = (
        "learner-1",
        learner,
        SimpleNamespace(waiting=contextlib.nullcontext),
    )
    assert rank.wake_up() == 0  # it never slept
    assert rank.sleep(keep_weights=True) == 16
    assert rank._awake(states=False) is learner
    with pytest.raises(RuntimeError, match="the learner's states are in host memory"):
        rank._awake()
    assert rank.sleep() == 16
    with pytest.raises(RuntimeError, match="the learner's weights are in host memory"):
        rank._awake(states=False)
    assert rank.wake_up() == 32
    assert rank._awake() is learner
    assert (weights.tolist(), masters.tolist()) == ([1.0] * 4, [2.0] * 4)
