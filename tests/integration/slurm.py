"""A real Slurm on test hosts: its controller on the first, a node on each."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Self

from tests.integration.hosts import Host, Hosts, end, wait_until

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo")
CORES = 2

# Tasks are bound to cores, as on a cluster, here of two sockets. Without cgroups: a container may have none.
# On a host with other work a launch takes longer than the 10 s that Slurm (22.05) allows by default. Then the
# job would be queued again, held, and waited for. So a launch may take longer, and a failed one ends the job.
CONFIG = """\
ClusterName=test
SlurmctldHost=host1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MessageTimeout=60
BatchStartTimeout=60
JobRequeue=0
MpiDefault=none
SchedulerParameters=sched_interval=1
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """The daemons on `hosts`, as a context manager. Commands find it by `env`."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.env = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        (self.folder / "state").mkdir(parents=True)
        sizes = f"Sockets={CORES} CoresPerSocket=1 ThreadsPerCore=1 RealMemory=1000 State=UNKNOWN"
        nodes = [f"NodeName={host.name} NodeAddr={host.address} {sizes}" for host in self.hosts]
        text = CONFIG.format(folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(bytes(range(128)))
        key.chmod(0o400)
        files = [
            f"--{what}={self.folder}/munge.{what.split('-')[0]}"
            for what in ("socket", "pid-file", "log-file")
        ]
        # Its socket lies on the disk of all hosts, so one serves them all. --force: in a folder below /tmp.
        self._daemon(
            self.hosts[0],
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--seed-file={self.folder}/munge.seed",
            *files,
        )
        wait_until((self.folder / "munge.socket").exists, 10, "munged", self.daemons)
        self._daemon(self.hosts[0], "slurmctld", "-D")
        for host in self.hosts:
            self._daemon(host, "slurmd", "-D", "-N", host.name)
        wait_until(self._idle, 60, "Slurm's nodes", self.daemons)
        return self

    def __exit__(self, *error: object) -> None:
        for daemon in reversed(self.daemons):
            end(daemon)

    def _daemon(self, host: Host, *command: str) -> None:
        log = (self.folder / f"{command[0]}-{host.name}.log").open("w")
        with log:
            self.daemons.append(host.start(*command, env=self.env, stdout=log, stderr=subprocess.STDOUT))

    def _idle(self) -> bool:
        states = (
            self.hosts[0].run("sinfo", "--noheader", "--Node", "--format=%T", env=self.env).stdout.split()
        )
        return states == ["idle"] * self.hosts.count
