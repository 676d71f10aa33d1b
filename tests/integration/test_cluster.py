"""Runs on several hosts, started by the launchers as a user starts them: by hand, and by a real Slurm.

Each host has its own network, /dev/shm and processes (tests/integration/hosts.py). Two learner ranks and one
engine share two hosts (the ranks on the first), then three (one process on each).
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gspo_dist.metrics.jsonl import read_jsonl
from tests.integration.hosts import Hosts, end, inherited, need_hosts, wait_until
from tests.integration.ray_hosts import ENV, ROOT, joined, launch, start_ray_cluster
from tests.integration.slurm import TOOLS, Slurm
from tests.integration.test_quickstart import TINY, values

RUN = [
    *(word for word in TINY if not word.startswith("flips.")),
    "flips.every=2",
    "rollout.engines=1",
    "reward=function",
    "steps=4",
    "checkpoint.every=2",
]
GSPO = (sys.executable, "-m", "gspo_dist")

# What somebody without the token tries: to join, to submit a job to the dashboard, to be a client.
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


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The folder that a user works in: a model, and a reward that imports a module from PYTHONPATH."""
    from gspo_dist.coldstart.model import build_model, save_model
    from gspo_dist.coldstart.recipes import Shape
    from gspo_dist.coldstart.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("work")
    shape = Shape(layers=2, hidden=64, heads=2, kv_heads=1, head_dim=32, expert_hidden=32)
    save_model(build_model(shape, seed=0), folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    (folder / "modules").mkdir()
    (folder / "modules/counting.py").write_text("def share(text, sign): return text.count(sign) / 8\n")
    (folder / "mine.py").write_text(
        "from counting import share\ndef sevens(prompt, completion): return share(completion.text, '7')\n"
    )
    return folder


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    """Three hosts; a head on the first and a worker on the second, started in other folders than the user's.

    An earlier run has left a token in the home folder, as everybody may read it, and the name of a dead
    cluster in /tmp/ray.
    """
    need_hosts()
    folder = tmp_path_factory.mktemp("hosts")
    with Hosts(3, folder, ENV) as made:
        (made.home / ".ray").mkdir()
        (made.home / ".ray/auth_token").write_text("0123456789abcdef" * 4)
        made[0].run("bash", "-c", "echo 10.77.0.9:6379 >/tmp/ray/ray_current_cluster")
        start_ray_cluster(made, 2)
        yield made


def train(work: Path, run_dir: str, *overrides: str) -> list[str]:
    # the reward by a relative path: workers were started elsewhere
    own = ["model.path=model", "reward.function='mine.py:sevens'", f"run_dir={run_dir}", *overrides]
    return [*GSPO, "train", *RUN, *own]


def places(run_dir: Path) -> list[str]:
    return (run_dir / "logs/places.txt").read_text().split()


@pytest.mark.slow
def test_two_and_three_hosts_train_as_one_does_and_nobody_without_the_token_gets_in(hosts, work) -> None:
    """One host: the whole run, beside a running cluster that it must not join. Two: stopped after step 2.

    Three: the same command goes on. The metrics are equal to the last digit.
    """
    env = {"PYTHONPATH": f"{ROOT}:modules"}
    nobody = hosts.folder / "nobody"
    nobody.mkdir()
    marks = {way: nobody / way for way in ("join", "client", "job")}
    stranger = {"env": {"HOME": str(nobody)}, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    tries = {
        way: hosts[1].start(sys.executable, "-c", INTRUDER, way, marks[way], **stranger)
        for way in ("join", "client")
    }
    alone = hosts[0].run(*train(work, "alone"), cwd=work, env=env, timeout=900)
    assert alone.returncode == 0, alone.stdout
    # the dashboard listens on the head alone, and is slower to come up
    tries["job"] = hosts[0].start(sys.executable, "-c", INTRUDER, "job", marks["job"], **stranger)
    for way, intruder in tries.items():
        words = intruder.communicate(timeout=60)[0]
        assert intruder.returncode == 1, words
        assert re.search(r"InvalidAuthToken|[Aa]uthenticat|Ray Client connection timed out", words), (
            way,
            words,
        )
        assert not marks[way].exists()
    assert (hosts.home / ".ray/auth_token").stat().st_mode & 0o77 == 0

    run = hosts[0].start(*train(work, "run", "cluster=ray", "cluster.nodes=2"), cwd=work, env=env)
    wait_until(lambda: any((work / "run").glob("checkpoints/step-*2/manifest.json")), 900, "step 2", [run])
    actors = [line for line in hosts[1].run("ps", "-eo", "ni,args").stdout.splitlines() if "ray::E" in line]
    assert [line.split()[0] for line in actors] == ["0"]  # Ray's own workers are at 15
    end(run, grace_s=20)
    assert places(work / "run") == ["learner-0", "host1", "learner-1", "host1", "engine-0", "host2"]

    launch(hosts[2], "ray_worker.sh", "host1:6379")  # joins while the run waits for it
    resumed = hosts[0].run(
        *train(work, "run", "cluster.address=host1:6379", "cluster.nodes=3"), cwd=work, env=env, timeout=900
    )
    assert resumed.returncode == 0, resumed.stdout
    assert places(work / "run") == ["learner-0", "host1", "learner-1", "host2", "engine-0", "host3"]
    assert [row["step"] for row in read_jsonl(work / "run/metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert values(work / "run") == values(work / "alone")


@pytest.mark.slow
def test_the_doctor_asks_every_host(hosts, tmp_path) -> None:
    """/dev/shm is a folder that hosts do not share."""
    wait_until(lambda: joined(hosts) >= 2, 120, "the worker")
    found = hosts[0].run(*GSPO, "doctor", "--cluster", cwd=tmp_path, timeout=400)
    assert found.returncode == 0, found.stdout
    lines = found.stdout.splitlines()
    count = len([line for line in lines if re.match(r"(ok|warn) +host\d +10\.77\.0\.\d ", line)])
    assert lines[-1] == f"{count} hosts: fit for one run"
    apart = hosts[0].run(*GSPO, "doctor", "--cluster=host1:6379", "/dev/shm", cwd=tmp_path, timeout=400)
    assert apart.returncode == 1
    assert "does not see /dev/shm: runs write there from every host" in apart.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_slurm_job_trains_on_its_nodes_and_ends_with_everything(work, tmp_path) -> None:
    """By sbatch, with what an earlier run has left in the home folder; its own token is in no log."""
    need_hosts(*TOOLS)
    overrides = ["model.path=model", "rollout=reference", "rollout.engines=1", "steps=1", "run_dir=by-slurm"]
    overrides = [word for word in RUN if not word.startswith("steps=")] + overrides
    reward = f"reward.function='{work}/mine.py:sevens'"
    env = {"PYTHONPATH": f"{ROOT}:{work}/modules", "GSPO_ROOT": str(ROOT)}
    with Hosts(2, tmp_path, ENV) as hosts, Slurm(hosts, tmp_path / "slurm") as slurm:
        (hosts.home / ".ray").mkdir()
        (hosts.home / ".ray/auth_token").write_text("0123456789abcdef" * 4)
        overrides = [
            f"{key}={work / value}" if key in ("model.path", "run_dir") else f"{key}={value}"
            for key, _, value in (word.partition("=") for word in overrides)
        ]
        job = hosts[0].start(
            *("sbatch", "--wait", "--nodes=2", "--gpus-per-node=0", f"--output={tmp_path}/job.log"),
            ROOT / "launch/slurm.sbatch",
            *overrides,
            reward,
            env={**env, **slurm.env},
        )
        with contextlib.suppress(subprocess.TimeoutExpired):  # the job's log says more
            job.wait(400)
        log = (tmp_path / "job.log").read_text()
        assert job.poll() == 0, log
        assert places(work / "by-slurm") == ["learner-0", "host1", "learner-1", "host1", "engine-0", "host2"]
        assert [row["step"] for row in read_jsonl(work / "by-slurm/metrics.jsonl")] == [0, 1]
        assert not re.search(r"\b[0-9a-f]{64}\b", log)
        for host in hosts:  # the job has stopped what it started
            left = host.run("ps", "-eo", "comm").stdout.split()
            assert not {"raylet", "gcs_server"} & set(left)


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
