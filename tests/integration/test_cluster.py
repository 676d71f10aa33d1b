"""Runs on several hosts, started by the launchers as a user starts them: by hand, and by a real Slurm.

Each host has its own network, /dev/shm and processes (tests/integration/hosts.py). Two learner ranks and one
engine share two hosts (the ranks on the first), then three (one process on each). What they compute is
compared with one host's run.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gspo_dist.metrics.jsonl import read_jsonl
from tests.integration.hosts import Host, Hosts, end, inherited, need_hosts, wait_until
from tests.integration.ray_hosts import ENV, ROOT, join, joined, start_ray_cluster
from tests.integration.slurm import TOOLS, Slurm
from tests.integration.tiny_run import TINY, values

# The first test waits for a run on one host and for one on two, which a busy machine makes slow.
pytestmark = pytest.mark.timeout(1500)

RUN = [
    *TINY,
    "rollout.engines=1",
    "reward=function",
    "steps=4",
    "checkpoint.every=2",
    "logger.wandb.mode=off",
]
GSPO = (sys.executable, "-m", "gspo_dist")
OLD_TOKEN = "0123456789abcdef" * 4
"""What an earlier run has left in the home folder, as everybody may read it."""

# What somebody without the token tries: to join, to be a client, to submit a job to the dashboard.
INTRUDER = """
import sys, ray
from ray.job_submission import JobSubmissionClient
way, mark = sys.argv[1:]
touch = lambda: open(mark, "w").close()
if way == "join":
    ray.init("host1:6379", log_to_driver=False)
    ray.get(ray.remote(touch).remote())
elif way == "client":
    ray.init("ray://host1:10001")
    ray.get(ray.remote(touch).remote())
else:
    JobSubmissionClient("http://127.0.0.1:8265").submit_job(entrypoint="touch " + mark)
"""

# What a run with cluster.address=null does on a host where a cluster runs.
ALONE = """
import ray
from gspo_dist.actors.session import start_ray
from gspo_dist.config import ClusterConfig
print("to be stopped:", start_ray(ClusterConfig()), "hosts:", len(ray.nodes()))
"""


@pytest.fixture(scope="module")
def work(model, tmp_path_factory) -> Path:
    """The folder that a user works in: a model, and a reward that imports a module from PYTHONPATH.

    It gives what the reward of the one host's run gives.
    """
    folder = tmp_path_factory.mktemp("work")
    (folder / "model").symlink_to(model)
    (folder / "modules").mkdir()
    (folder / "modules/counting.py").write_text(
        "def share(text, sign, of): return text.count(sign) / max(1, of)\n"
    )
    (folder / "mine.py").write_text(
        "from counting import share\n"
        "def sevens(prompt, completion): return share(completion.text, '7', len(completion))\n"
    )
    return folder


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    """Three hosts; a head on the first. /tmp/ray named a dead cluster before."""
    need_hosts()
    folder = tmp_path_factory.mktemp("hosts")
    with Hosts(3, folder, ENV) as made:
        leave_token(made)
        made[0].run("bash", "-c", "echo 10.77.0.9:6379 >/tmp/ray/ray_current_cluster")
        start_ray_cluster(made, 1)
        yield made


def leave_token(hosts: Hosts) -> None:
    (hosts.home / ".ray").mkdir()
    (hosts.home / ".ray/auth_token").write_text(OLD_TOKEN)


def places(run_dir: Path) -> list[str]:
    """Name and host of every process, one after the other. The line also has addresses and coordinates."""
    lines = (run_dir / "logs/places.txt").read_text().splitlines()
    assert all(line.split()[2].count(".") == 3 for line in lines)  # an address, which only the process knows
    return [word for line in lines for word in line.split()[:2]]


@dataclass
class Begun:
    """What was seen of a run on two hosts, which was stopped after step 2."""

    run_dir: Path
    places: list[str]
    actors: list[str]
    """Niceness and command of the engine's processes on the second host."""
    intruders: dict[str, tuple[int, str]]
    """How somebody without a token tried -> exit status and output."""
    done: list[str]
    """What intruders did nevertheless."""
    alone: str
    """What `ALONE` printed beside the run."""


@pytest.fixture(scope="module")
def begun(hosts, work) -> Begun:
    env = {"PYTHONPATH": f"{ROOT}:modules"}
    # the model and the reward by relative paths: Ray was started elsewhere
    own = ["model.path=model", "reward.function='mine.py:sevens'", "run_dir=run"]
    words = [*GSPO, "train", *RUN, *own, "cluster=ray", "cluster.nodes=2"]
    run = hosts[0].start(*words, cwd=work, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    join(hosts[1])  # the run waits for it
    nobody = hosts.folder / "nobody"
    nobody.mkdir()

    def intrude(host: Host, way: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", INTRUDER, way, nobody / way]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return host.start(*command, env={"HOME": str(nobody)}, **options)

    tries = {way: intrude(hosts[1], way) for way in ("join", "client")}
    alone = hosts[0].run(sys.executable, "-c", ALONE, cwd=work, timeout=200)
    tries["job"] = intrude(hosts[0], "job")  # the dashboard listens on the head alone, and is slow to come up
    saved = (work / "run").glob
    try:
        wait_until(lambda: any(saved("checkpoints/step-*2/manifest.json")), 600, "step 2", [run])
    except AssertionError as error:
        end(run, grace_s=20)
        raise AssertionError(run.communicate()[0]) from error
    lines = hosts[1].run("ps", "-eo", "ni,args").stdout.splitlines()
    end(run, grace_s=20)
    words_of = {way: tried.communicate(timeout=60)[0] for way, tried in tries.items()}
    return Begun(
        run_dir=work / "run",
        places=places(work / "run"),
        actors=[line for line in lines if "ray::E" in line],
        intruders={way: (tried.returncode, words_of[way]) for way, tried in tries.items()},
        done=[path.name for path in nobody.iterdir() if path.name in tries],
        alone=alone.stdout,
    )


@pytest.mark.slow
def test_two_hosts_train_as_one_does(begun, whole) -> None:
    """To the last digit of the metrics. Every publication, over gloo to the second host, is probed."""
    assert begun.places == ["learner-0", "host1", "learner-1", "host1", "engine-0", "host2"]
    assert [line.split()[0] for line in begun.actors] == ["0"]  # Ray's own workers are at 15
    rows = values(begun.run_dir)
    assert [row["step"] for row in rows][:3] == [0, 1, 2]
    assert rows == values(whole)[: len(rows)]
    assert max(row["sync/probe_max_abs"] for row in rows[1:]) < 1e-5
    sent = (begun.run_dir / "logs/learner-0.log").read_text()
    assert "weight sync: gloo to engine-0" in sent


@pytest.mark.slow
def test_nobody_without_the_token_gets_in(hosts, begun) -> None:
    for way, (status, words) in begun.intruders.items():
        assert status == 1, (way, words)
        refused = r"InvalidAuthToken|[Aa]uthenticat|Ray Client connection timed out"
        assert re.search(refused, words), (way, words)
    assert sorted(begun.intruders) == ["client", "job", "join"]
    assert begun.done == []
    assert (hosts.home / ".ray/auth_token").stat().st_mode & 0o77 == 0


@pytest.mark.slow
def test_a_run_of_ones_own_does_not_join_the_cluster_that_is_there(begun) -> None:
    assert begun.alone.splitlines()[-1] == "to be stopped: True hosts: 1", begun.alone


@pytest.mark.slow
def test_the_doctor_asks_every_host(hosts, begun, tmp_path) -> None:
    """Three of them by now. /dev/shm is a folder that hosts do not share."""
    join(hosts[2])
    wait_until(lambda: joined(hosts) == 3, 120, "three hosts")
    doctor = (*GSPO, "doctor")
    output = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    apart = hosts[0].start(*doctor, "--cluster=host1:6379", "/dev/shm", **output)
    found = hosts[0].run(*doctor, "--cluster", cwd=tmp_path, timeout=400)
    assert found.returncode == 0, found.stdout
    lines = found.stdout.splitlines()
    told = [re.match(r"(?:ok|warn) +(host\d) +10\.77\.0\.\d ", line) for line in lines]
    assert [line[1] for line in told if line] == ["host1", "host2", "host3"]
    assert lines[-1] == "3 hosts: fit for one run"
    words = apart.communicate(timeout=400)[0]
    assert apart.returncode == 1
    assert "does not see /dev/shm: runs write there from every host" in words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_slurm_job_goes_on_on_three_hosts_and_ends_with_everything(begun, work, whole, tmp_path) -> None:
    """By sbatch: from the checkpoint of the two hosts to the curve of one. Its token is in no log."""
    need_hosts(*TOOLS)
    env = {"PYTHONPATH": f"{ROOT}:{work}/modules", "GSPO_ROOT": str(ROOT)}
    # a job runs in the folder of the repository, so its paths are absolute
    own = [f"model.path={work}/model", f"reward.function='{work}/mine.py:sevens'", f"run_dir={work}/run"]
    with Hosts(3, tmp_path, ENV) as hosts, Slurm(hosts, tmp_path / "slurm") as slurm:
        leave_token(hosts)
        job = hosts[0].start(
            *("sbatch", "--wait", "--nodes=3", "--gpus-per-node=0", f"--output={tmp_path}/job.log"),
            ROOT / "launch/slurm.sbatch",
            *RUN,
            *own,
            "checkpoint.accept=[model.path,reward.function]",
            env={**env, **slurm.env},
        )
        with contextlib.suppress(subprocess.TimeoutExpired):  # the job's log says more
            job.wait(900)
        log = (tmp_path / "job.log").read_text()
        assert job.poll() == 0, log
        for host in hosts:  # the job has stopped what it started
            left = host.run("ps", "-eo", "comm").stdout.split()
            assert not {"raylet", "gcs_server"} & set(left)
    assert places(work / "run") == ["learner-0", "host1", "learner-1", "host2", "engine-0", "host3"]
    assert [row["step"] for row in read_jsonl(work / "run/metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert values(work / "run") == values(whole)
    assert not re.search(r"\b[0-9a-f]{64}\b", log)


@pytest.mark.slow
def test_ranks_sit_where_the_layout_says(tmp_path) -> None:
    """Eight hosts of eight GPUs, which are only counted: 32 ranks fill four hosts, an expert group on each.

    Ray's own order of the bundles puts every block of eight ranks on two hosts.
    """
    layout = ["experiment=qwen3_30b_a3b/gspo", "layout=qwen3_30b_a3b_8x8", "model.path=/none"]
    env = {**inherited(), **ENV, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "8" * 64}
    env.pop("CUDA_VISIBLE_DEVICES", None)  # Ray offers no GPU that this hides
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.placement_case", "8", "8", *layout],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    ranks, engines = found["learner"], found["engine"]
    assert found["blocks"]["expert parallel"] == 8
    assert (len(ranks), len(engines)) == (32, 8)
    blocks = [set(ranks[first : first + 8]) for first in range(0, 32, 8)]
    assert [len(block) for block in blocks] == [1] * 4
    assert len(set(ranks)) == 4
    assert sorted(engines.count(host) for host in set(engines)) == [2] * 4  # of four GPUs each
    assert not set(ranks) & set(engines)
    for home, kind, node, gpus in found["asked"]:  # at both sides of a block's edge, and at the ends
        assert home.endswith(f"/{node[:8]}")
        assert gpus == (1 if kind == "learner" else 4)
    # Colocated: 64 ranks fill all hosts, engines of four GPUs are on those of four ranks, and hear from the
    # first rank of their host.
    shared = found["colocated"]
    assert [len(set(shared["learner"][first : first + 8])) for first in range(0, 64, 8)] == [1] * 8
    assert shared["engine"] == shared["learner"][::4]
    assert shared["exporters"] == {f"engine-{i}": i // 2 * 8 for i in range(16)}
    first, second = shared["gpus"]
    assert len(set(first)) == len(set(second)) == 2
    assert len({*first, *second}) == 4  # no GPU is two engines'
    assert shared["again"] == [[second[0]]] * 2  # engine 1 and rank 2 are in one bundle, with its GPU
