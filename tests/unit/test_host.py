"""Cores and memory are what this process is granted: its affinity, and the smallest quota of its groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gspo_dist.host import thread_share, usable_cores, usable_memory

GIB = 1 << 30


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def host(root: Path, own: str, **files: str) -> Path:
    """A fake host: the text of /proc/self/cgroup, and files below /sys/fs/cgroup by their path."""
    for path, text in {
        "proc/self/cgroup": own,
        **{f"sys/fs/cgroup/{k}": v for k, v in files.items()},
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000", 16),
        ("200000 100000", 2),
        ("250000 100000", 2),  # the third thread would run half of the time
        ("50000 100000", 1),
        ("3200000 100000", 16),  # more than the affinity
        ("100000 50000", 2),  # another period
        ("1 100000", 1),
        ("0 100000", 16),  # none
    ],
)
def test_a_quota_of_version_2_limits_the_cores(tmp_path, text, cores):
    assert usable_cores(host(tmp_path, "0::/", **{"cpu.max": text})) == cores


def test_the_smallest_quota_between_a_group_and_the_root_holds(tmp_path):
    own, parent, top = "a.slice/b.scope/cpu.max", "a.slice/cpu.max", "cpu.max"
    quotas = {own: "800000 100000", parent: "300000 100000", top: "max 100000"}
    assert usable_cores(host(tmp_path, "0::/a.slice/b.scope", **quotas)) == 3
    assert usable_cores(host(tmp_path, "0::/a.slice/b.scope", **{own: "200000 100000"})) == 2
    assert usable_cores(host(tmp_path, "0::/elsewhere")) == 16


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
def test_a_quota_of_version_1_limits_the_cores(tmp_path, folder):
    files = {f"{folder}/job/cpu.cfs_quota_us": "400000", f"{folder}/job/cpu.cfs_period_us": "100000"}
    files |= {f"{folder}/cpu.cfs_quota_us": "-1", f"{folder}/cpu.cfs_period_us": "100000"}
    own = "11:memory:/job\n4:cpu,cpuacct:/job\n1:name=systemd:/job"
    assert usable_cores(host(tmp_path, own, **files)) == 4


def test_a_container_that_sees_the_hosts_path_is_limited_by_its_mount(tmp_path):
    files = {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}
    assert usable_cores(host(tmp_path, "4:cpu,cpuacct:/docker/0123456789", **files)) == 2


def test_the_affinity_holds_without_quotas(tmp_path, monkeypatch):
    assert usable_cores(tmp_path) == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7})
    assert usable_cores(host(tmp_path, "0::/", **{"cpu.max": "800000 100000"})) == 3


def test_without_an_affinity_the_hosts_cores_are_counted(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path) == 1


def test_a_groups_name_may_hold_a_colon(tmp_path):
    assert usable_cores(host(tmp_path, "0::/a:b", **{"a:b/cpu.max": "200000 100000"})) == 2


@pytest.mark.parametrize(
    ("processes", "asked", "threads"),
    [(1, "", 16), (3, "", 5), (40, "", 1), (2, "3", 3), (2, "30", 8), (2, "0", 1), (2, "many", 8)],
)
def test_processes_share_the_cores_and_omp_num_threads_caps_the_share(processes, asked, threads, monkeypatch):
    monkeypatch.setattr("gspo_dist.host.usable_cores", lambda: 16)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert thread_share(processes) == threads


def test_the_smallest_memory_limit_holds(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemAvailable:   {48 << 20} kB\n")
    assert usable_memory(tmp_path) == (64 * GIB, 48 * GIB)
    files = {
        "a/memory.max": str(32 * GIB),
        "a/memory.current": str(30 * GIB),
        "a/b/memory.max": str(8 * GIB),
        "a/b/memory.current": str(GIB),
    }
    assert usable_memory(host(tmp_path, "0::/a/b", **files)) == (8 * GIB, 2 * GIB)
    files["a/memory.current"] = str(33 * GIB)
    assert usable_memory(host(tmp_path, "0::/a/b", **files)) == (8 * GIB, 0)
    assert usable_memory(tmp_path / "nowhere") == (0, 0)


def test_version_1_says_no_limit_with_a_number(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4096 kB\nMemAvailable: 2048 kB\n")
    files = {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "1"}
    assert usable_memory(host(tmp_path, "9:memory:/", **files)) == (4096 << 10, 2048 << 10)
    files["memory/memory.limit_in_bytes"] = str(1 << 20)
    assert usable_memory(host(tmp_path, "9:memory:/", **files)) == (1 << 20, (1 << 20) - 1)
