"""What each process of a run finds in its environment."""

from __future__ import annotations

import os
import socket
from dataclasses import replace

import pytest

from gspo_dist.actors.session import Node
from gspo_dist.host import Place
from gspo_dist.learners import determinism
from gspo_dist.trainer.setup import processes as module
from gspo_dist.trainer.setup.processes import process_env, start_parts
from tests.unit.trainer.small import config


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr("gspo_dist.host.usable_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_a_cpu_run_hides_gpus_and_shares_the_cores(model, reward_file, tmp_path, four_cores):
    """Ray leaves a host's GPUs visible to actors that ask for none."""
    c = config(model, reward_file, tmp_path)
    object.__setattr__(c, "learner", replace(c.learner, backend="deepspeed", world_size=2))
    object.__setattr__(c, "rollout", replace(c.rollout, engines=4))
    env = process_env(c, "cpu")
    assert env["learner"]["OMP_NUM_THREADS"] == "2"
    assert env["engine"]["OMP_NUM_THREADS"] == "1"
    assert {env[kind]["CUDA_VISIBLE_DEVICES"] for kind in ("learner", "engine")} == {""}
    assert env["learner"]["DS_ACCELERATOR"] == "cpu"


def test_threads_that_are_asked_for_are_given(model, reward_file, tmp_path, four_cores):
    c = config(model, reward_file, tmp_path, "learner.threads=3", "rollout.threads=7")
    env = process_env(c, "cpu")
    assert (env["learner"]["OMP_NUM_THREADS"], env["engine"]["OMP_NUM_THREADS"]) == ("3", "7")


def test_a_gpu_run_hides_nothing(model, reward_file, tmp_path):
    env = process_env(config(model, reward_file, tmp_path), "cuda")
    assert all("CUDA_VISIBLE_DEVICES" not in e for e in env.values())


def test_models_are_not_looked_up_in_a_hub_unless_the_user_says_so(model, reward_file, tmp_path, monkeypatch):
    c = config(model, reward_file, tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert process_env(c, "cpu")["engine"]["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert process_env(c, "cpu")["engine"]["HF_HUB_OFFLINE"] == "0"


def test_in_process_parts_end_together(model, reward_file, tmp_path, monkeypatch):
    ended = []
    for name in ("LocalLearnerGroup", "LocalRolloutPool", "LocalRewardPool"):
        monkeypatch.setattr(
            getattr(module, name), "close", lambda self, _name=name: ended.append(_name), raising=True
        )
    parts = start_parts(config(model, reward_file, tmp_path), str(model), "cpu", tmp_path, 2)
    assert parts.info.moe_layers == 2
    assert parts.places == [f"{name} {socket.gethostname()}" for name in ("learner-0", "engine-0")]
    parts.release()
    assert sorted(ended) == ["LocalLearnerGroup", "LocalRewardPool", "LocalRolloutPool"]


def test_rewards_of_a_run_in_one_process_find_its_variables(model, reward_file, tmp_path, monkeypatch):
    made = []

    class Told(Exception):
        pass

    def pool(config, env):
        made.append((config, env))
        raise Told

    monkeypatch.setattr(module, "LocalRewardPool", pool)
    c = config(model, reward_file, tmp_path, "+cluster.env.GSPO_MARK=mine")
    with pytest.raises(Told):
        start_parts(c, str(model), "cpu", tmp_path, 2)
    assert made == [(c.reward, {"GSPO_MARK": "mine"})]


@pytest.mark.parametrize(("device", "colocated", "card"), [("cpu", False, ""), ("cuda", True, " gpu=0")])
def test_in_one_process_rewards_come_first_and_a_shared_engine_sleeps(
    model, reward_file, tmp_path, monkeypatch, device, colocated, card
):
    """A reward that cannot be imported is told before a model is read; the learner has the first turn."""
    said = []

    class Part:
        def __init__(self, name, *made_of) -> None:
            self.name, self.made_of = name, made_of
            said.append(f"{name} made")

        def start(self):
            said.append(f"{self.name} started")
            return "info"

        def sleep(self) -> None:
            said.append(f"{self.name} sleeps")

        def close(self) -> None:
            said.append(f"{self.name} closed")

    for kind, name in (("Reward", "rewards"), ("Rollout", "pool")):
        monkeypatch.setattr(module, f"Local{kind}Pool", lambda *made_of, _name=name: Part(_name, *made_of))
    monkeypatch.setattr(module, "LocalLearnerGroup", lambda *made_of: Part("learner", *made_of))
    monkeypatch.setattr(module, "learner_factory", lambda *told: lambda: ("a learner", *told))
    monkeypatch.setattr(module, "engine_factory", lambda *told: lambda name: (name, *told))
    c = config(model, reward_file, tmp_path)
    object.__setattr__(c, "cluster", replace(c.cluster, colocated=colocated))
    parts = start_parts(c, "folder", device, tmp_path, 2)
    sleeps = ["pool sleeps"] * colocated
    assert said == ["rewards made", "rewards started", "learner made", "pool made", "pool started", *sleeps]
    assert parts.learner.made_of == (("a learner", c, "folder", device),)
    assert parts.pool.made_of == (("engine-0", c, "folder", device, 2),)
    assert (parts.rewards.name, parts.info) == ("rewards", "info")
    host = socket.gethostname()
    assert parts.places == [f"learner-0 {host}{card}", f"engine-0 {host}{card}"]
    del said[:]
    parts.release()
    assert said == ["pool closed", "learner closed", "rewards closed"]


HOSTS = [Node(f"n{i}", f"host{i}", f"10.0.0.{i}", 2, 0, 1 << 30) for i in (1, 2, 3)]
ROLLOUTS = 4 * 4 * (16 + 8) * (2 * 2 + 1 + 54)


class Places:
    """Stands for the cluster's grant: every actor's options name its kind, its index and its threads."""

    def __init__(self, layout, timeout, *, local, together) -> None:
        self.layout, self.timeout, self.local, self.released = layout, timeout, local, 0
        self.together = together

    def homes(self, kind):
        return tuple(f"{kind}s-host" for _ in getattr(self.layout, f"{kind}s"))

    def options(self, kind, index, env):
        return (kind, index, env["OMP_NUM_THREADS"])

    def shared_gpus(self, timeout):
        return [("engine's gpus", timeout)]

    def exporters(self):
        return "exporters"

    def release(self) -> None:
        self.released += 1


class Made:
    """Stands for a group of actors: keeps what it was made of."""

    def __init__(self, *args) -> None:
        self.args, self.closed = args, 0

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def cluster(monkeypatch):
    """Ray's side of `Processes`, as books: what was started, reserved and stopped."""
    books = {"started": [], "stopped": 0, "places": []}
    session = "gspo_dist.actors.session"

    def reserve(layout, timeout, **how):
        books["places"].append(Places(layout, timeout, **how))
        return books["places"][-1]

    def stop() -> None:
        books["stopped"] += 1

    monkeypatch.setattr(f"{session}.start_ray", lambda *told: books["started"].append(told) or True)
    monkeypatch.setattr(f"{session}.stop_ray", stop)
    monkeypatch.setattr(f"{session}.nodes", lambda: HOSTS)
    monkeypatch.setattr("gspo_dist.actors.placement.Reservation", reserve)
    for module_name, name in (
        ("rollout_pool", "RayRolloutPool"),
        ("learner_group", "RayLearnerGroup"),
        ("reward_pool", "RayRewardPool"),
    ):
        monkeypatch.setattr(f"gspo_dist.actors.{module_name}.{name}", Made)
    return books


def distributed(model, reward_file, folder, **cluster):
    c = config(model, reward_file, folder)
    object.__setattr__(c, "learner", replace(c.learner, backend="deepspeed", world_size=2, threads=3))
    object.__setattr__(c, "rollout", replace(c.rollout, engines=3, threads=5))
    object.__setattr__(c, "cluster", replace(c.cluster, in_process=False, **cluster))
    return c


def test_every_kind_of_actor_is_made_with_its_own_settings_and_ended_with_the_block(
    model, reward_file, tmp_path, cluster
):
    c = distributed(model, reward_file, tmp_path, placement_timeout_s=7.0)
    with module.Processes(c, str(model), "cpu", tmp_path, 2) as processes:
        pool, learner, rewards = processes.pool(), processes.learner(), processes.rewards()
        (places,) = cluster["places"]
        assert (places.timeout, places.local) == (7.0, True)
        assert (len(places.layout.learners), len(places.layout.engines)) == (2, 3)
        logs = tmp_path / "logs"
        engines, ranks = (
            [(kind, i, n) for i in range(many)] for kind, n, many in (("engine", "5", 3), ("learner", "3", 2))
        )
        granted = [("engine's gpus", c.cluster.placement_timeout_s)]
        assert pool.args == (c.rollout, processes.make_engine, engines, logs, granted)
        assert learner.args == (c.learner, processes.make_rank, ranks, logs, "exporters")
        assert rewards.args == (c.reward, logs, process_env(c, "cpu")["reward"])
        lines = (logs / "places.txt").read_text().splitlines()
        assert lines == [
            *(f"learner-{i} learners-host replica={i}" for i in range(2)),
            *(f"engine-{i} engines-host" for i in range(3)),
        ]
        ranks, engines = (
            {f"{kind}-{i}": Place(f"10.0.0.{i + first}", gpus[i]) for i in range(len(gpus))}
            for kind, first, gpus in (("learner", 1, [("2",), ()]), ("engine", 7, [("0", "1"), ("2",), ()]))
        )
        pool.places, learner.places = lambda: engines, lambda: ranks
        lines = processes.found(learner, pool)
        assert lines == [
            "learner-0 learners-host 10.0.0.1 gpu=2 replica=0",
            "learner-1 learners-host 10.0.0.2 replica=1",
            "engine-0 engines-host 10.0.0.7 gpu=0,1",
            "engine-1 engines-host 10.0.0.8 gpu=2",
            "engine-2 engines-host 10.0.0.9",
        ]
        assert (logs / "places.txt").read_text().splitlines() == lines
        pool.places = lambda: 1 / 0  # it only records: the run goes on with what it knew before
        assert processes.found(learner, pool)[2:] == [f"engine-{i} engines-host" for i in range(3)]
        # 4 x 4 rollouts of at most 16 + 8 tokens: 2 layers x 2 experts and a mark, and 54 for the rest
        assert cluster["started"] == [(c.cluster, ROLLOUTS)]
        assert cluster["stopped"] == places.released == pool.closed == 0
    assert (pool.closed, learner.closed, rewards.closed) == (1, 1, 1)
    assert (places.released, cluster["stopped"]) == (1, 1)


def test_an_evaluation_reserves_no_learner_and_an_export_no_engine(model, reward_file, tmp_path, cluster):
    c, folder = distributed(model, reward_file, tmp_path), tmp_path / "not" / "there"
    with module.Processes(c, str(model), "cpu", folder, 2, learners=False):
        pass
    with module.Processes(c, str(model), "cpu", folder, 2, engines=False):
        pass
    evaluation, export = (places.layout for places in cluster["places"])
    assert (len(evaluation.learners), len(evaluation.engines)) == (0, 3)
    assert (len(export.learners), len(export.engines)) == (2, 0)


def test_whoever_has_the_gpus_alone_shares_none_with_an_absent_part(model, reward_file, tmp_path, cluster):
    c = distributed(model, reward_file, tmp_path, colocated=True)
    object.__setattr__(c, "rollout", replace(c.rollout, engines=2))
    for whole, absent in ((True, {}), (False, {"learners": False}), (False, {"engines": False})):
        with module.Processes(c, str(model), "cuda", tmp_path, 2, **absent):
            assert cluster["places"][-1].layout.colocated is whole


def test_what_is_kept_is_ended_by_whoever_it_was_handed_to(model, reward_file, tmp_path, cluster):
    with module.Processes(distributed(model, reward_file, tmp_path), str(model), "cpu", tmp_path, 2) as p:
        learner, end = p.learner(), p.keep()
    assert learner.closed == 0
    end()
    assert (learner.closed, cluster["stopped"]) == (1, 1)


def test_a_cluster_without_room_leaves_no_ray_behind(model, reward_file, tmp_path, cluster, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("no room")

    monkeypatch.setattr("gspo_dist.actors.placement.Reservation", full)
    processes = module.Processes(distributed(model, reward_file, tmp_path), str(model), "cpu", tmp_path, 2)
    with pytest.raises(RuntimeError, match="no room"):
        processes.__enter__()
    assert cluster["stopped"] == 1


def test_a_cluster_that_was_joined_is_told_apart_from_one_of_the_runs_own(
    model, reward_file, tmp_path, cluster
):
    c = distributed(model, reward_file, tmp_path, address="auto")
    with module.Processes(c, str(model), "cpu", tmp_path, 2):
        assert cluster["places"][0].local is False
    # five processes on three hosts, in order
    made = cluster["places"][0].layout
    homes = [b.home for b in (*made.learners, *made.engines)]
    assert homes == ["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.3"]
    some = distributed(model, reward_file, tmp_path, address="auto", nodes=2)
    with module.Processes(some, str(model), "cpu", tmp_path, 2):
        homes = [b.home for b in cluster["places"][1].layout.engines]
        assert homes == ["10.0.0.1", "10.0.0.2", "10.0.0.2"]


def test_blocks_of_ranks_share_a_host_of_gpus(model, reward_file, tmp_path, cluster):
    c = distributed(model, reward_file, tmp_path, address="auto")
    object.__setattr__(c.learner, "deepspeed", replace(c.learner.deepspeed, expert_parallel=2))
    for device, together in (
        ("cpu", None),
        ("cuda", {"tensor and context parallel": 1, "expert parallel": 2}),
    ):
        with module.Processes(c, str(model), device, tmp_path, 2):
            assert cluster["places"][-1].together == together
    assert {b.home for b in cluster["places"][-1].layout.learners} == {None}


def test_variables_of_libraries_travel_to_every_actor_and_secrets_do_not(
    model, reward_file, tmp_path, monkeypatch
):
    """Actors inherit from the `ray start` of their host, where nobody has set what the command was given."""
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("UNRELATED", "1")
    monkeypatch.setenv("PYTHONPATH", f"mine{os.pathsep}/other")
    monkeypatch.chdir(tmp_path)
    c = config(model, reward_file, tmp_path, "+cluster.env.NVTE_DEBUG='1'")
    for device in ("cpu", "cuda"):
        for kind, env in process_env(c, device).items():
            assert kind in ("learner", "engine", "reward")
            assert (env["NCCL_IB_HCA"], env["NVTE_DEBUG"]) == ("mlx5", "1")
            assert env["PYTHONPATH"] == f"{tmp_path}/mine{os.pathsep}/other"
            assert not {"VLLM_API_KEY", "UNRELATED"} & set(env)
    c = config(
        model, reward_file, tmp_path, "+cluster.env.NCCL_IB_HCA=mine", "+cluster.env.OMP_NUM_THREADS='9'"
    )
    assert {env["NCCL_IB_HCA"] for env in process_env(c, "cpu").values()} == {"mine"}
    assert {env["OMP_NUM_THREADS"] for env in process_env(c, "cpu").values()} == {"9"}


def test_on_a_gpu_threads_are_shared_by_gpu_unless_asked_for(
    model, reward_file, tmp_path, monkeypatch, four_cores
):
    # A head without GPUs has its cores for one.
    for gpus, threads in ((2, "2"), (1, "4"), (0, "4")):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        env = process_env(config(model, reward_file, tmp_path), "cuda")
        assert (env["learner"]["OMP_NUM_THREADS"], env["engine"]["OMP_NUM_THREADS"]) == (threads, threads)
    env = process_env(config(model, reward_file, tmp_path, "learner.threads=1", "rollout.threads=3"), "cuda")
    assert (env["learner"]["OMP_NUM_THREADS"], env["engine"]["OMP_NUM_THREADS"]) == ("1", "3")


@pytest.mark.parametrize("colocated", [False, True])
def test_colocated_parts_start_one_after_the_other_and_others_side_by_side(
    model, reward_file, tmp_path, monkeypatch, colocated
):
    """vLLM measures free GPU memory while it starts, so a colocated learner waits until the engine sleeps."""
    said: list[str] = []

    class Part:
        def __init__(self, name: str, *verbs: str) -> None:
            self.name = name
            for verb in verbs:
                setattr(self, verb, lambda _said=f"{name}.{verb}": said.append(_said) or "info")

    class Actors:
        def __init__(self, *told) -> None:
            said.append("made" if told == (c, "folder", "cpu", tmp_path, 2) else "made wrongly")

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None: ...
        def pool(self):
            return Part("engine", "start", "sleep")

        def learner(self):
            return Part("learner", "start")

        def rewards(self):
            return Part("rewards", "start")

        def found(self, learner, pool):
            said.append(f"places of {learner.name} and {pool.name}")
            return ["learner-0 here"]

        def keep(self):
            return "end"

    threads = []
    monkeypatch.setattr(module, "Processes", Actors)
    monkeypatch.setattr(module, "cap_threads", lambda *asked: threads.append(asked))
    c = distributed(model, reward_file, tmp_path, colocated=colocated)
    parts = module.start_on_ray(c, "folder", "cpu", tmp_path, 2)
    assert threads == [(1, "cpu")]
    assert (parts.info, parts.release, parts.places) == ("info", "end", ["learner-0 here"])
    assert [part.name for part in (parts.learner, parts.pool, parts.rewards)] == [
        "learner",
        "engine",
        "rewards",
    ]
    together = ["learner.start", "engine.start"]
    one_by_one = ["engine.start", "engine.sleep", "learner.start"]
    assert said == [
        "made",
        "rewards.start",
        *(one_by_one if colocated else together),
        "places of learner and engine",
    ]


def test_a_deterministic_learner_has_its_variables_from_the_start_of_its_process(
    model, reward_file, tmp_path, monkeypatch
):
    """The ranks alone: an engine has kernels of its own. A value that repeats itself too is the user's."""
    for name in determinism.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    plain = config(model, reward_file, tmp_path)
    c = config(model, reward_file, tmp_path, "learner.deterministic=true")
    wanted = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "NCCL_ALGO": "Ring",
    }
    for device in ("cpu", "cuda"):
        env = process_env(c, device)
        assert wanted.items() <= env["learner"].items()
        assert not wanted.keys() & (env["engine"].keys() | env["reward"].keys())
        assert not wanted.keys() & process_env(plain, device)["learner"].keys()
    monkeypatch.setenv("NCCL_ALGO", "^NVLS")
    assert process_env(c, "cpu")["learner"]["NCCL_ALGO"] == "^NVLS"
    c = config(
        *(model, reward_file, tmp_path, "learner.deterministic=true"),
        "+cluster.env.CUBLAS_WORKSPACE_CONFIG=':16:8'",
    )
    assert process_env(c, "cpu")["learner"]["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
