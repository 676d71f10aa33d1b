"""The hosts that the other tests run on: apart, with plugs that can be pulled, and gone without a trace."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.integration import hosts as maker
from tests.integration.hosts import Hosts, need_hosts, wait_until

ROOT = Path(__file__).resolve().parents[2]
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 80), timeout=0.5)"


@pytest.mark.slow
def test_hosts_share_the_disk_and_nothing_else(tmp_path: Path) -> None:
    need_hosts()
    with Hosts(2, tmp_path) as hosts:
        one, two = hosts
        assert [host.run("hostname").stdout for host in hosts] == ["host1\n", "host2\n"]
        one.run("touch", "/dev/shm/gspo-mine", "/tmp/ray/mine", tmp_path / "shared")
        there = two.run("ls", "/dev/shm", "/tmp/ray", tmp_path / "shared").stdout.split()
        assert there == [str(tmp_path / "shared"), "/dev/shm:", "/tmp/ray:"]
        assert not Path("/dev/shm/gspo-mine").exists()
        two.start("sleep", "4711.5")
        assert "4711.5" in two.run("ps", "-ef").stdout
        assert "4711.5" not in one.run("ps", "-ef").stdout
        # nobody listens at host2, so its own kernel refuses: the way there is open
        assert "ConnectionRefusedError" in one.run(sys.executable, "-c", CONNECT, "host2").stdout
        hosts.cut(1)
        assert "TimeoutError" in one.run(sys.executable, "-c", CONNECT, "host2").stdout
        hosts.heal(1)
        assert "ConnectionRefusedError" in one.run(sys.executable, "-c", CONNECT, "host2").stdout


@pytest.mark.slow
def test_hosts_end_with_whoever_made_them(tmp_path: Path) -> None:
    """Killed, it cleans nothing up; the kernel does. 4711.25 marks the processes."""
    need_hosts()
    script = (
        "import time; from pathlib import Path; from tests.integration.hosts import Hosts\n"
        f"hosts = Hosts(2, Path({str(tmp_path)!r})).__enter__()\n"
        "hosts[1].start('sleep', '4711.25'); print('up', flush=True); time.sleep(60)"
    )

    def left() -> list[int]:
        return [p.pid for p in psutil.process_iter(["cmdline"]) if "4711.25" in (p.info["cmdline"] or [])]

    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"up\n"
        wait_until(left, 10, "the process on host2")
        maker.send_signal(signal.SIGKILL)
    wait_until(lambda: not left(), 10, "the end of the hosts")


def test_a_missing_tool_is_a_skip_and_where_they_were_installed_a_failure(monkeypatch) -> None:
    monkeypatch.setattr(maker, "missing", lambda *tools: f"no {tools[0]} here")
    monkeypatch.delenv("GSPO_TEST_HOSTS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no slurmd here"):
        need_hosts("slurmd")
    monkeypatch.setenv("GSPO_TEST_HOSTS", "required")
    with pytest.raises(pytest.fail.Exception, match="no slurmd here"):
        need_hosts("slurmd")
