"""A Ray cluster on test hosts, started by the launchers. As a command it runs another one on several hosts:

python -m tests.integration.ray_hosts 3 gspo train experiment=quickstart cluster=ray cluster.nodes=3
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.integration.hosts import Host, Hosts, missing, wait_until

ROOT = Path(__file__).resolve().parents[2]
ENV = {
    # The environment of this process is the one that the hosts share.
    "GSPO_INSTALL": "0",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "WANDB_SILENT": "true",
}

STARTED = "Ray runtime started"
"""What `ray start` says when it has."""


def log_of(host: Host, script: str) -> Path:
    """The output of a launcher on `host`, in the home folder."""
    return Path(host.env["HOME"]) / f"{script}-{host.name}.log"


def launch(host: Host, script: str, *args: str) -> subprocess.Popen[str]:
    """A launcher on `host`, in another folder than the user's."""
    with log_of(host, script).open("w") as log:
        return host.start(ROOT / "launch" / script, *args, cwd="/var", stdout=log, stderr=subprocess.STDOUT)


def start_ray_cluster(hosts: Hosts, count: int) -> None:
    """A head on the first host and workers on the next ones, `count` in all. Workers may still be joining."""
    head = launch(hosts[0], "ray_head.sh")
    # Its log is read, because asking Ray again and again takes a core of those that it starts on.
    wait_until(lambda: STARTED in log_of(hosts[0], "ray_head.sh").read_text(), 120, "the head", [head])
    # it says so before it has written down what "auto" means on its host
    named = ("cat", "/tmp/ray/ray_current_cluster")
    wait_until(lambda: hosts[0].address in hosts[0].run(*named).stdout, 120, "the head's address", [head])
    for index in range(1, count):
        launch(hosts[index], "ray_worker.sh", "host1:6379")


def join(host: Host) -> None:
    """A worker on `host`; waits until it is one."""
    worker = launch(host, "ray_worker.sh", "host1:6379")
    wait_until(lambda: STARTED in log_of(host, "ray_worker.sh").read_text(), 120, host.name, [worker])


def joined(hosts: Hosts) -> int:
    """Hosts that are in the cluster."""
    status = ("ray", "status", "--address", "host1:6379")
    done = hosts[0].run(*status, env={"RAY_AUTH_MODE": "token"})
    return len(re.findall(r"^ 1 node_", done.stdout, re.M)) if done.returncode == 0 else 0


def main(count: int, command: list[str]) -> int:
    """Runs `command` on the first of `count` hosts with a cluster; returns its status."""
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, Hosts(count, Path(folder), ENV) as hosts:
        start_ray_cluster(hosts, count)
        wait_until(lambda: joined(hosts) == count, 120, "the workers")
        return hosts[0].start(*command).wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
