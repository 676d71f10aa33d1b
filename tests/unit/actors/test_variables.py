"""cluster.env and the variables of libraries in every process that a run starts: real Ray, one for all."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from gspo_dist.actors.learner_group import RayLearnerGroup
from gspo_dist.cli.compose import run_config
from gspo_dist.config import RunConfig
from gspo_dist.environments.pool import describe
from gspo_dist.environments.worker import Call
from gspo_dist.learners import determinism
from gspo_dist.trainer.setup.environment import CheckedEnvironment, start_episodes
from gspo_dist.trainer.setup.processes import Processes
from gspo_dist.types import Completion, Prompt
from tests.unit.learners.megatron.qwen3 import QWEN3_30B

NAMES = ("GSPO_MARK", "NCCL_NET", "NVTE_DEBUG")
WANTED = {"GSPO_MARK": "of cluster.env", "NCCL_NET": "of the command", "NVTE_DEBUG": "of cluster.env"}
FILE = """
import os
AT_IMPORT = os.environ["GSPO_MARK"]

def reward(prompt, completion):
    return 1.0, {name: float(os.environ[name] == wanted) for name, wanted in prompt.answer.items()}

class Environment:
    def reset(self, prompt, seed):
        return AT_IMPORT

    def step(self, said):
        return ""
"""
PROMPT = Prompt("p", (1, 2), "q", WANTED)


def seen() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in NAMES}


class Mirror:
    """A learner and an engine that say what they find in their environment."""

    def __init__(self, **_: object) -> None:
        self.data_parallel_rank = seen()

    def info(self) -> dict[str, str | None]:
        return seen()

    def close(self) -> None:
        pass


def make_config(folder: Path) -> RunConfig:
    (folder / "config.json").write_text(json.dumps(QWEN3_30B))
    (folder / "mine.py").write_text(FILE)
    return run_config(
        [
            *("learner=deepspeed", "learner.world_size=2", "rollout=reference", "rollout.engines=2"),
            *("model=local", f"model.path={folder}", "logger=quiet", "cluster.device=cpu"),
            *("reward=function", f"reward.function='{folder}/mine.py:reward'"),
            f"environment.factory='{folder}/mine.py:Environment'",
            *("environment.workers=1", "reward.workers=2"),
            *("+cluster.env.GSPO_MARK='of cluster.env'", "+cluster.env.NVTE_DEBUG='of cluster.env'"),
        ]
    )


@pytest.mark.slow
def test_variables_reach_learners_engines_and_rewards(ray_here, tmp_path, monkeypatch):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setenv("NCCL_NET", "of the command")
    monkeypatch.setenv("NVTE_DEBUG", "of the command")
    with Processes(make_config(tmp_path), str(tmp_path), "cpu", tmp_path, 48) as processes:
        processes.make_rank = processes.make_engine = Mirror
        pool, learner, rewards = processes.pool(), processes.learner(), processes.rewards()
        rewards.start()
        completion = Completion(
            *(np.ones(1, np.int64), np.ones(1, np.bool_), np.zeros(1, np.float32), np.zeros(1, np.int32)),
            *("stop", "c"),
        )
        verdicts = rewards.judge([(i, PROMPT, completion) for i in range(4)])
        assert [v.parts for v in verdicts] == [dict.fromkeys(NAMES, 1.0)] * 4
        assert pool.start() == WANTED
        assert isinstance(learner, RayLearnerGroup)
        learner.start()
        assert learner.replica_of == dict.fromkeys(("learner-0", "learner-1"), WANTED)
        # A successor is made with the same options.
        pool.bury("engine-1", RuntimeError("for the test"))
        assert pool.starting.keys() == {"engine-1"}
        assert pool.actors.gather(pool.starting, 120.0) == {"engine-1": WANTED}


class Flags:
    """A learner's place taken: what a rank's process finds when its learner is made, and after it turned the
    deterministic mode on."""

    def __init__(self, **_: object) -> None:
        import torch

        found = [os.environ.get(name) for name in determinism.VARIABLES]
        before = torch.are_deterministic_algorithms_enabled()
        determinism.turn_on()
        after = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
        self.data_parallel_rank = found, before, after


@pytest.mark.slow
def test_a_deterministic_rank_is_so_from_its_start_and_says_where_it_is(ray_here, tmp_path, monkeypatch):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    for name in determinism.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    config = make_config(tmp_path)
    config = replace(config, learner=replace(config.learner, world_size=1, deterministic=True))
    with Processes(config, str(tmp_path), "cpu", tmp_path, 48) as processes:
        processes.make_rank, processes.make_engine = Flags, Mirror
        pool, learner = processes.pool(), processes.learner()
        learner.start(), pool.start()
        assert learner.replica_of == {"learner-0": ([":4096:8", "0", "Ring"], False, (True, True))}
        lines = processes.found(learner, pool)
    address = ray.util.get_node_ip_address()
    assert [line.split()[0] for line in lines] == ["learner-0", "engine-0", "engine-1"]
    assert all(line.split()[2] == address for line in lines)
    assert lines[0].split()[3:] == ["replica=0"]  # no GPU on a CPU


@pytest.mark.slow
def test_variables_reach_environments_when_they_are_imported(tmp_path, monkeypatch):
    monkeypatch.delenv("GSPO_MARK", raising=False)
    config = make_config(tmp_path)
    describe(config.environment, env=config.cluster.env)  # raises where the import finds none
    checked = CheckedEnvironment(SimpleNamespace(), "hermes", {})  # nothing here is bridged
    episodes = start_episodes(config, checked)
    assert episodes is not None
    try:
        episodes.pool.submit([Call((0, 0), PROMPT, 0, None)])
        (reply,) = episodes.pool.poll(60.0)
    finally:
        episodes.pool.close()
    assert reply.observation.text == "of cluster.env"
