"""What this host grants to a process, which is often less than what the host has.

os.cpu_count() and /proc/meminfo speak of the whole host. A container, a Slurm step or a systemd slice gets a
share of it: a set of cores (affinity) and quotas of control groups (cgroups, version 1 or 2). Quotas are
hierarchical, so the smallest one from a process's own group up to the root holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
# cgroup v1 says "no limit" of memory with a number near 2^63, rounded down to a page.
NO_LIMIT = 1 << 60


class Place(NamedTuple):
    """Where a process of a run is."""

    address: str
    """Its node's, by which the others reach it."""
    gpus: tuple[str, ...]
    """Those of the node that it sees, by their ids there."""


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may keep busy: its affinity, less a quota. At least 1.

    Thread pools of os.cpu_count() threads in a container of two cores fight for them. A quota of 2.5 cores
    gives 2, because a third thread would be stopped for half of the time and the others would wait for it.
    `root` is where proc and sys are mounted.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups(root, "cpu"):
        quota, period = _read(group / "cpu.max", "max 100000").split()  # v2
        if quota == "max":
            quota = _read(group / "cpu.cfs_quota_us", "-1")  # v1, in microseconds; -1 is no quota
            period = _read(group / "cpu.cfs_period_us", "100000")
        if int(quota) > 0:
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def thread_share(processes: int) -> int:
    """Threads for each of `processes` processes that share this host's cores. At least 1.

    OMP_NUM_THREADS caps it, because who sets it means it: for a job's share of a node, or for tests that run
    side by side.
    """
    share = max(1, usable_cores() // processes)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(share, int(asked))) if asked.isdecimal() else share


def usable_memory(root: Path = ROOT) -> tuple[int, int]:
    """(total, available) bytes of host memory for this process: the host's, less the limits of its groups."""
    fields = {}
    for line in _read(root / "proc/meminfo", "").splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    total, available = fields.get("MemTotal", 0), fields.get("MemAvailable", 0)
    for group in _groups(root, "memory"):
        limit = _read(group / "memory.max", "max")
        if limit == "max":
            limit = _read(group / "memory.limit_in_bytes", str(NO_LIMIT))
        if int(limit) < NO_LIMIT:
            used = int(_read(group / "memory.current", _read(group / "memory.usage_in_bytes", "0")))
            total, available = min(total, int(limit)), min(available, max(0, int(limit) - used))
    return total, available


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's groups for `controller`, from its own up to the mount point."""
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup", "0::/").splitlines():
        # "0::/a/b" (v2) or "4:cpu,cpuacct:/a/b" (v1, where each set of controllers has a mount of its own)
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        names = (controllers, controller) if controllers else ("", "unified")
        top = next((mount / name for name in names if (mount / name).is_dir()), mount)
        group = top / path.strip("/")
        # Without a cgroup namespace a container sees the host's path, which its own mount does not have.
        while group != top:
            yield group
            group = group.parent
        yield top


def _read(path: Path, otherwise: str) -> str:
    try:
        return path.read_text().strip() or otherwise
    except OSError:
        return otherwise
