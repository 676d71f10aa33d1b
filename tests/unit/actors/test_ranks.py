"""The ranks of a learner: what each does with a verb, and what their answers and failures become together."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gspo_dist.actors import learner_group
from gspo_dist.actors.learner_group import DEATH_S, SILENCE_S, LearnerRank, RayLearnerGroup
from gspo_dist.actors.process import ActorProcess, ProcessDied, ProcessTimeout
from gspo_dist.config import DeepSpeedConfig, LearnerConfig, WeightSyncConfig
from gspo_dist.failures import CollectiveTimeout
from gspo_dist.learners.parking import Parking
from tests.unit.actors.virtual_ray import NEVER, died, due, raised

STUCK = """something earlier
Timeout (0:00:05)!
Thread 0x00007f (most recent call first):
  File "elsewhere.py", line 1 in other
Thread 0x00007e (most recent call first):
  File "model.py", line 7 in forward
  File "learner.py", line 9 in forward_backward
"""


@pytest.fixture
def group(world, tmp_path) -> RayLearnerGroup:
    """Three ranks. Rank 2 is replica 0; ranks 0 and 1 are replica 1."""
    config = LearnerConfig(
        backend="deepspeed", world_size=3, timeout_s=100.0, deepspeed=DeepSpeedConfig(expert_parallel=1)
    )
    group = RayLearnerGroup(config, "make", [{}] * 3, tmp_path)
    group.replica_of = {"learner-0": 1, "learner-1": 1, "learner-2": 0}
    return group


def test_every_replica_computes_its_own_and_one_rank_of_it_answers(world, group) -> None:
    world.answers = {(f"learner-{i}", "logprobs"): [(float(i), f"of {i}")] for i in range(3)}
    first, second = ["a", "b"], ["c"]
    assert group.logprobs((first, second)) == ["of 2", "of 0"]
    off = (False, False, False)
    asked = ("learner-0", "learner-2")
    assert world.calls == [
        ("learner-0", "logprobs", second, asked, *off),
        ("learner-1", "logprobs", second, asked, *off),
        ("learner-2", "logprobs", first, asked, *off),
    ]
    for i, flag in enumerate(("record_routing", "record_scores", "reference")):
        world.calls.clear()
        group.logprobs((first, second), **{flag: True})
        assert world.calls[0][4:] == tuple(j == i for j in range(3))


def test_ranks_that_are_silent_while_others_give_up_are_named_with_where_they_were(
    world, group, tmp_path
) -> None:
    """Rank 1 gives up after 5 s, rank 2 does so 10 s later, and rank 0 never comes."""
    world.answers = {
        ("learner-0", "optim_step"): [NEVER],
        ("learner-1", "optim_step"): [(5.0, raised(CollectiveTimeout("learner-1 waited 5 s")))],
        ("learner-2", "optim_step"): [(15.0, raised(CollectiveTimeout("learner-2 waited 15 s")))],
    }
    (tmp_path / "learner-0.log").write_bytes(b"\xff" + STUCK.encode())
    with pytest.raises(CollectiveTimeout, match="learner-1 waited 5 s") as error:
        group.optim_step()
    assert world.now == 5.0 + SILENCE_S
    (_, silent) = error.value.__notes__
    assert silent == (
        "learner-0 has not answered at all: the others wait for it\n  it was at\n"
        '    File "model.py", line 7 in forward\n    File "learner.py", line 9 in forward_backward'
    )


@pytest.mark.parametrize("log", ["no stack in here\n", None])
def test_of_a_silent_rank_without_a_stack_the_end_of_its_log_is_told(world, group, tmp_path, log) -> None:
    if log is not None:
        (tmp_path / "learner-0.log").write_text(log)
    world.answers = {
        ("learner-0", "optim_step"): [NEVER],
        ("learner-1", "optim_step"): [(5.0, raised(CollectiveTimeout("learner-1 waited 5 s")))],
    }
    with pytest.raises(CollectiveTimeout) as error:
        group.optim_step()
    first, _, rest = error.value.__notes__[-1].partition("\n")
    assert first == "learner-0 has not answered at all: the others wait for it"
    assert rest == group.actors.tail("learner-0")
    assert ("no stack in here" in rest) == (log is not None)


def test_dumps_of_this_call_are_shown_and_older_ones_are_not(world, group, tmp_path) -> None:
    folder = tmp_path / "flight_recorder"
    folder.mkdir()
    for rank, written in ((0, 900.0), (1, 1000.0), (2, 1001.0)):
        (folder / f"rank_{rank}").touch()
        os.utime(folder / f"rank_{rank}", (written, written))
    world.now = 1000.0
    world.answers = {"optim_step": [5.0, (7.0, died("killed")), 9.0]}
    with pytest.raises(ProcessDied, match="learner-1 died: killed") as death:
        group.optim_step()
    assert world.now == 1007.0  # nobody is waited for: the death says enough
    assert death.value.__notes__ == [
        f"dumps of the flight recorder: {folder}/rank_1, {folder}/rank_2; compare the ranks by torchfrtrace "
        f"--prefix rank_ --allow-incomplete-ranks {folder} (-j shows all of it)"
    ]
    world.now = 2000.0
    with pytest.raises(ProcessTimeout) as late:
        group._gather(due(**{"learner-0": NEVER}), 10.0)
    assert (world.now, hasattr(late.value, "__notes__")) == (2010.0, False)


def test_an_error_may_be_the_first_sign_of_another_ranks_death(world, group) -> None:
    lost = RuntimeError("Connection reset by peer")
    world.answers = {"optim_step": [(1.0, raised(lost)), 2.0, (1.0 + DEATH_S, died("killed"))]}
    with pytest.raises(ProcessDied, match="learner-2 died: killed") as death:
        group.optim_step()
    assert death.value.__notes__ == ["another rank's error came first: Connection reset by peer"]
    assert (death.value.__cause__, world.now) == (lost, 1.0 + DEATH_S)
    world.answers = {"optim_step": [(1.0, raised(lost)), 2.0, (1.5 + DEATH_S, died("killed"))]}
    world.now = 0.0
    with pytest.raises(RuntimeError, match="Connection reset by peer") as error:
        group.optim_step()
    assert (error.value, world.now) == (lost, 1.0 + DEATH_S)


def test_a_group_that_closes_ends_every_rank_and_asks_none(world, group) -> None:
    """They may wait in a collective for one that is dead."""
    group.close()
    assert world.killed == list(group.actors.handles.values())
    assert ([handle.name for handle in world.killed], world.calls) == (
        ["learner-0", "learner-1", "learner-2"],
        [],
    )


# --- one rank ---------------------------------------------------------------------------------------------


def make_rank(monkeypatch, folder: Path, learner=None) -> LearnerRank:
    """learner-3 in this process, whose output stays where it goes."""
    monkeypatch.setattr(ActorProcess, "__init__", lambda self, name, log_dir: setattr(self, "name", name))
    rank = LearnerRank("learner-3", str(folder))
    if learner is not None:
        config = LearnerConfig(timeout_s=100.0, collective_timeout_s=50.0)
        monkeypatch.setattr(learner_group, "record_in", lambda folder: None)
        rank.start(lambda **_: learner, config, 0, ("host", 1))
    return rank


@pytest.mark.parametrize(("collective_s", "short"), [(50.0, 50.0), (200.0, 100.0)])
def test_a_rank_builds_its_learner_at_the_address_that_all_meet_at(
    monkeypatch, tmp_path, collective_s, short
) -> None:
    """What torch records goes to the folder of logs from before the process group is made."""
    told = []
    monkeypatch.setattr(learner_group, "record_in", told.append)

    def make(**arguments):
        told.append(arguments)
        return SimpleNamespace(data_parallel_rank=7)

    config = LearnerConfig(
        backend="deepspeed", world_size=4, timeout_s=100.0, collective_timeout_s=collective_s,
        deepspeed=DeepSpeedConfig(expert_parallel=1),
    )  # fmt: skip
    rank = make_rank(monkeypatch, tmp_path)
    assert rank.start(make, config, 3, ("10.0.0.9", 29600)) == 7
    folder = tmp_path / "flight_recorder"
    assert told == [
        folder,
        {"rank": 3, "world_size": 4, "master_addr": "10.0.0.9", "master_port": 29600},
    ]
    watch = rank.watch
    assert (watch.name, watch.folder, watch.collective_s, watch.call_s) == ("learner-3", folder, short, 100.0)


def test_a_rank_without_a_learner_says_so(monkeypatch, tmp_path) -> None:
    rank = make_rank(monkeypatch, tmp_path)
    for verb in (lambda: rank.learner, lambda: rank.watch, lambda: rank.sleep()):
        with pytest.raises(RuntimeError, match="learner-3 has no learner yet: call start first"):
            verb()


def test_a_rank_computes_log_probs_whether_or_not_it_answers(monkeypatch, tmp_path) -> None:
    asked = []
    learner = SimpleNamespace(
        data_parallel_rank=0, logprobs=lambda *batches, **options: asked.append((batches, options)) or ["out"]
    )
    rank = make_rank(monkeypatch, tmp_path, learner)
    assert rank.logprobs(["batch"], answering=("learner-0", "learner-3"), reference=True) == ["out"]
    assert rank.logprobs(["batch"], answering=("learner-0",), record_routing=True) == []
    assert asked == [((["batch"],), {"reference": True}), ((["batch"],), {"record_routing": True})]


def test_a_rank_profiles_into_the_folder_and_under_the_name_that_it_is_told(monkeypatch, tmp_path) -> None:
    told = []
    profiler = SimpleNamespace(
        start=lambda: told.append("start"), stop=lambda *where: told.append(where) or [tmp_path / "trace"]
    )
    monkeypatch.setattr(learner_group, "Profiler", lambda: profiler)
    rank = make_rank(monkeypatch, tmp_path)
    rank.start_profile()
    assert rank.stop_profile("below", "rank-3") == [str(tmp_path / "trace")]
    assert told == ["start", (Path("below"), "rank-3")]


def test_a_rank_may_wake_with_its_weights_alone(monkeypatch, tmp_path) -> None:
    rank = make_rank(monkeypatch, tmp_path)
    rank._parking = SimpleNamespace(wake_up=lambda weights_only: 1 if weights_only else 3)
    assert (rank.wake_up(weights_only=True), rank.wake_up()) == (1, 3)


def test_a_rank_saves_and_loads_where_it_is_told_and_in_no_folder_that_it_cannot_see(
    monkeypatch, tmp_path
) -> None:
    told = []
    learner = SimpleNamespace(
        data_parallel_rank=0,
        save=lambda folder: told.append(("save", folder)),
        load=lambda folder: told.append(("load", folder)),
        wait_saved=lambda: told.append("waited"),
    )
    rank = make_rank(monkeypatch, tmp_path, learner)
    rank.save(str(tmp_path)), rank.wait_saved(), rank.load(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"checkpoint folder .*gone is not visible on .*: run_dir must lie on"
    ):
        rank.save(str(tmp_path / "gone"))
    assert told == [("save", tmp_path), "waited", ("load", tmp_path)]


def test_stats_leave_a_rank_on_the_host(monkeypatch, tmp_path) -> None:
    stat = SimpleNamespace(cpu=lambda: "on the host")
    learner = SimpleNamespace(
        data_parallel_rank=0, forward_backward=lambda batches, spec: {f"{spec}/{len(batches)}": stat}
    )
    assert make_rank(monkeypatch, tmp_path, learner).forward_backward(["batch"], "spec") == {
        "spec/1": "on the host"
    }


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda rank: rank.logprobs([], answering=["learner-0"]), "weights"),
        (lambda rank: rank.logprobs([], answering=["learner-0"], reference=True), "states"),
        (lambda rank: rank.forward_backward([], None), "states"),
        (lambda rank: rank.optim_step(), "states"),
        (lambda rank: rank.send_weights(WeightSyncConfig(), {}, "logs"), "weights"),
        (lambda rank: rank.export("from", "to"), "weights"),
        (lambda rank: rank.save("."), "states"),
        (lambda rank: rank.load("folder"), "states"),
    ],
)
def test_a_rank_that_sleeps_computes_nothing(call, what, monkeypatch, tmp_path) -> None:
    class Asleep(Exception):
        """Its memory is asked for first, whatever else would fail."""

    def require(self, *, states=True):
        raise Asleep("states" if states else "weights")

    monkeypatch.setattr(Parking, "require", require)
    rank = make_rank(monkeypatch, tmp_path, SimpleNamespace(data_parallel_rank=0))
    rank._parking = Parking(None)
    with pytest.raises(Asleep, match=what):
        call(rank)


def test_a_gpus_peak_is_counted(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 << 30)
    rank = make_rank(monkeypatch, tmp_path)
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert rank.peak_memory().get("gpu") == (5 << 30 if gpu else None)
