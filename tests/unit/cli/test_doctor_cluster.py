"""What keeps a host out of a run, and what is only doubtful; the question to real hosts is in integration."""

from __future__ import annotations

import pytest

from gspo_dist.actors.everywhere import Answer
from gspo_dist.actors.session import Node
from gspo_dist.cli import doctor_cluster
from gspo_dist.cli.doctor_cluster import Facts, compare, diagnose_cluster, gather
from gspo_dist.cli.findings import Check

CHECKS = [
    Check("GPUs", "ok", "8 x H100"),
    Check("cores", "ok", "96"),
    Check("memory", "ok", "900.0 GiB free of 1000.0 GiB"),
    Check("/dev/shm", "ok", "500.00 GiB"),
    Check("RDMA", "ok", "mlx5_0, mlx5_1"),
    Check("disk", "warn", "1 GiB free here", "set run_dir"),
]
SOUND = Facts(CHECKS, {"torch": "2.13.0", "python": "3.12.3"}, ["/shared"])


def facts(*checks: Check, **changed) -> Facts:
    named = {check.name: check for check in (*CHECKS, *checks)}
    return Facts(list(named.values()), **({"versions": SOUND.versions, "seen": SOUND.seen} | changed))


@pytest.mark.parametrize(
    ("there", "clock", "broken", "doubtful"),
    [
        (SOUND, 0.9, "", ""),
        (SOUND, -1.5, "", "its clock is -1.5 s off the first host's"),
        (facts(seen=[]), 0.0, "does not see /shared", ""),
        (facts(versions={"python": "3.12.3"}), 0.0, "torch absent (the first host: 2.13.0)", ""),
        (facts(versions={"torch": "2.13.0+cpu", "python": "3.12.3"}), 0.0, "torch 2.13.0+cpu (the first", ""),
        (
            facts(Check("vLLM", "missing", "no kernels", "again", required=True)),
            0.0,
            "vLLM: no kernels; again",
            "",
        ),
        (facts(Check("DeepSpeed", "missing", "not installed")), 0.0, "", ""),
        (facts(Check("RDMA", "warn", "no device", "load it")), 0.0, "", "RDMA: no device; load it"),
        (
            facts(Check("GPUs", "ok", "7 x H100")),
            0.0,
            "",
            "other GPUs than the first host, which has 8 x H100",
        ),
    ],
)
def test_a_host_is_compared_with_the_first(there, clock, broken, doubtful) -> None:
    for found, wanted in zip(compare(there, SOUND, clock, ["/shared"]), (broken, doubtful), strict=True):
        assert len(found) == bool(wanted)
        assert not wanted or wanted in found[0]


def node(number: int) -> Node:
    return Node(f"n{number}", f"host{number}", f"10.0.0.{number}", 96, 8, 1 << 30)


@pytest.mark.parametrize("sound", [True, False])
def test_the_report_has_a_line_per_host_and_what_is_wrong_below_it(monkeypatch, tmp_path, sound) -> None:
    """Real folders get their marks, which are taken away again."""
    joined, ended = [], []
    monkeypatch.setattr("gspo_dist.actors.session.start_ray", joined.append)
    monkeypatch.setattr("gspo_dist.actors.session.stop_ray", lambda: ended.append(1))

    def ask(question, marks):
        assert question is gather
        here = gather(marks)
        assert here.seen == [str(tmp_path)]
        other = here if sound else Facts(here.checks, {**here.versions, "ray": "1.0"}, [])
        values = [here, other] if sound else [here, other, TimeoutError("late")]
        return [Answer(node(i + 1), value, i / 4) for i, value in enumerate(values)]

    monkeypatch.setattr("gspo_dist.actors.everywhere.ask_every_host", ask)
    monkeypatch.setattr(doctor_cluster.doctor, "diagnose", lambda root: CHECKS)
    text, fits = diagnose_cluster("head:1", [tmp_path])
    assert fits is sound
    assert joined[0].address == "head:1"
    assert ended == [1]
    assert list(tmp_path.iterdir()) == []
    lines = text.splitlines()
    assert lines[0] == (
        "ok      host1            10.0.0.1        8 x H100, 96 cores, 900.0 GiB free of 1000.0 GiB, "
        "/dev/shm 500.00 GiB, RDMA mlx5_0, mlx5_1, clock +0.00 s"
    )
    assert lines[-1] == ("2 hosts: fit for one run" if sound else "3 hosts: not fit for one run")
    if not sound:
        assert lines[1].startswith("missing host2 ")
        assert "does not see" in lines[2]
        assert "ray 1.0 (the first host: 2.60.0)" in lines[3]
        assert lines[4].startswith("missing host3 ")
        assert lines[4].endswith("no answer: late")
