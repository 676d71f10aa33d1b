"""Several "hosts" on one Linux machine, for tests of what crosses hosts. Root only.

Each host has a network, a host name, processes, /dev/shm and /tmp/ray of its own, and all share the disk, as
the hosts of a cluster share a file system. They hang on one switch, whose ports can be pulled:

    with Hosts(2, tmp_path) as hosts:
        head = hosts[0].start("launch/ray_head.sh")
        hosts[1].run("ping", "-c1", "host1")
        hosts.cut(1)

A host is a set of kernel namespaces with a first process that holds them. When this process ends, however it
ends, the kernel kills that first process and with it every process of the host. The links go with them. So
there is nothing to clean up, also not after a kill.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

NETWORK = "10.77.0"
TOOLS = ("ip", "nsenter", "unshare", "setpriv")
SHM_GIB = 4

# The first process of a host. It takes in orphans and waits for ever.
HOST = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs -o size="$3"g tmpfs /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
touch "$2/$1.up"
sleep infinity &
while :; do wait || true; done
"""
# The parent's death kills the holder, and the holder's death its child (--kill-child).
HOLD = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net")
OWN = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private")


def missing(*more: str) -> str | None:
    """Why hosts with the commands `more` cannot be made here, or None."""
    if os.geteuid() != 0:
        return "hosts are network namespaces, which only root may make"
    absent = [tool for tool in (*TOOLS, *more) if shutil.which(tool) is None]
    if absent:
        return f"no {', '.join(absent)} here: tests/integration/install_hosts.sh installs it"
    made = subprocess.run(["unshare", "--net", *OWN, "true"], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"this machine gives no namespaces: {made.stderr.strip()}"
    return None


def need_hosts(*more: str) -> None:
    """Skips a test where hosts cannot be made, with the reason.

    Fails instead under GSPO_TEST_HOSTS=required, which .ci/run sets once it has installed the tools.
    """
    reason = missing(*more)
    if reason is not None and os.environ.get("GSPO_TEST_HOSTS") == "required":
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)


def inherited() -> dict[str, str]:
    """This process's environment without what a launcher, a job or Ray has put there."""
    foreign = ("GSPO_", "SLURM_", "RAY_", "FAKE_")
    return {key: value for key, value in os.environ.items() if not key.startswith(foreign)}


class Host:
    """One of the hosts."""

    def __init__(self, name: str, address: str, pid: int, env: Mapping[str, str]) -> None:
        self.name, self.address, self.pid = name, address, pid
        self.env = dict(env)
        self.started: list[subprocess.Popen[str]] = []

    def start(
        self, *command: Any, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """A process on this host, in a session of its own. `end` ends it, and so does the end of the host."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--pid"]
        process = subprocess.Popen(
            # nsenter changes the folder to the root of the mounts it enters
            [*enter, "--wd=" + str(options.pop("cwd", os.getcwd())), "--", *map(str, command)],
            env={**self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            **options,
        )
        self.started.append(process)
        return process

    def run(
        self, *command: Any, env: Mapping[str, str] | None = None, timeout: float = 120.0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on this host; its output is in stdout, with the errors."""
        process = self.start(*command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            end(process)
        return subprocess.CompletedProcess(command, process.returncode, output)


def end(process: subprocess.Popen[Any], asked: signal.Signals = signal.SIGTERM, grace_s: float = 0.0) -> None:
    """Ends the session of a started process: asks, waits `grace_s` seconds, kills."""
    if process.poll() is None and grace_s:
        os.killpg(process.pid, asked)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Hosts:
    """host1 to hostN at 10.77.0.1 to N, with one home folder for all. A context manager."""

    def __init__(self, count: int, folder: Path, env: Mapping[str, str] | None = None) -> None:
        """folder: takes the home folder and what the hosts read. env: added to every command's."""
        self.count, self.folder = count, folder
        self.home = folder / "home"
        self.env = {
            **inherited(),
            "HOME": str(self.home),
            # gRPC asks a name server before it reads /etc/hosts, and these hosts have none.
            "GRPC_DNS_RESOLVER": "native",
            # vLLM keeps there what it knows of model classes: in a new home folder it would import itself
            # once more, in a process of its own, to find out.
            "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT", str(Path.home() / ".cache/vllm")),
            **(env or {}),
        }
        self.holders: list[subprocess.Popen[bytes]] = []
        self.hosts: list[Host] = []

    def __enter__(self) -> Self:
        self.home.mkdir(parents=True, exist_ok=True)
        names = [f"{NETWORK}.{i} host{i}" for i in range(1, self.count + 1)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        try:
            self.switch = self._hold("sleep", "infinity").pid
            self._wait(lambda: self._net(self.switch) != self._net(os.getpid()))
            self._in(self.switch, "ip", "link", "add", "br0", "type", "bridge")
            self._in(self.switch, "ip", "link", "set", "br0", "up")
            for i in range(1, self.count + 1):
                self.hosts.append(self._host(i))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def cut(self, index: int) -> None:
        """Pulls the plug of host `index`: nothing that it sends arrives, and nobody is told."""
        self._in(self.switch, "ip", "link", "set", f"p{index + 1}", "down")

    def heal(self, index: int) -> None:
        """Puts it back."""
        self._in(self.switch, "ip", "link", "set", f"p{index + 1}", "up")

    def lose(self, index: int) -> None:
        """Ends host `index` with every process on it, as a power cut does."""
        holder = self.holders[index + 1]  # the first holds the switch
        holder.kill()
        holder.wait()

    def close(self) -> None:
        """Ends the hosts with everything on them. A second call does nothing."""
        for host in self.hosts:
            for process in host.started:
                end(process)
        for holder in self.holders:
            holder.kill()
            holder.wait()
        self.hosts, self.holders = [], []

    def _host(self, i: int) -> Host:
        name, address, port = f"host{i}", f"{NETWORK}.{i}", f"p{i}"
        up = self.folder / f"{name}.up"
        up.unlink(missing_ok=True)
        holder = self._hold(*OWN, "bash", "-c", HOST, "host", name, str(self.folder), str(SHM_GIB))
        self._wait(up.exists)
        pid = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()[0])
        ends = ("type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._in(self.switch, "ip", "link", "add", port, *ends)
        self._in(self.switch, "ip", "link", "set", port, "master", "br0", "up")
        for words in (
            f"addr add {address}/24 dev eth0",
            "link set eth0 up",
            "link set lo up",
            f"route add default via {NETWORK}.254",  # Ray finds a host's address by where it would send
        ):
            self._in(pid, "ip", *words.split())
        return Host(name, address, pid, self.env)

    def _hold(self, *command: str) -> subprocess.Popen[bytes]:
        holder = subprocess.Popen([*HOLD, *command], stdin=subprocess.DEVNULL, start_new_session=True)
        self.holders.append(holder)
        return holder

    def _wait(self, ready: Any, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if any(holder.poll() is not None for holder in self.holders) or time.monotonic() > deadline:
                raise RuntimeError("a host did not come up: see the messages of unshare above")
            time.sleep(0.01)

    @staticmethod
    def _net(pid: int) -> str:
        return os.readlink(f"/proc/{pid}/ns/net")

    @staticmethod
    def _in(pid: int, *command: str) -> None:
        subprocess.run(["nsenter", "--target", str(pid), "--net", *command], check=True)


def wait_until(
    ready: Any, seconds: float, what: str, processes: Sequence[subprocess.Popen[Any]] = ()
) -> None:
    """Waits until `ready()` is true. Fails with `what` when it takes too long or a process has ended."""
    deadline = time.monotonic() + seconds
    while not ready():
        ended = [process.args for process in processes if process.poll() is not None]
        assert not ended, f"{what}: ended too early: {ended}"
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)
