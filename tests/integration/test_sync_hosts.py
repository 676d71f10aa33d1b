"""Weight sync between two hosts without GPUs, over gloo: what arrives, and who is named when it does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.hosts import Hosts, need_hosts, wait_until

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")
CUT_TIMEOUT_S = 12.0
"""Of the publication that is cut, as sync_cluster.py has it. The exporter gives up on the engines before."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    need_hosts()
    folder = tmp_path_factory.mktemp("sync")
    with Hosts(2, folder, {"PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}) as hosts:
        start = (RAY, "start", "--block", "--num-cpus=2", "--object-store-memory=100000000")
        logs = [(folder / f"ray{i}.log").open("w") for i in (1, 2)]
        head = hosts[0].start(
            *start, "--head", "--node-ip-address=10.77.0.1", "--port=6379", "--include-dashboard=false",
            stdout=logs[0], stderr=logs[0],
        )  # fmt: skip
        wait_until(lambda: "Ray runtime started" in (folder / "ray1.log").read_text(), 60, "the head", [head])
        hosts[1].start(
            *start, "--address=10.77.0.1:6379", "--node-ip-address=10.77.0.2", stdout=logs[1], stderr=logs[1]
        )
        # Many systems give a host's own name a loopback address, which no other host reaches.
        for host in hosts:
            host.run("hostname", "localhost")
        output = (folder / "driver.log").open("w")
        driver = hosts[0].start(
            sys.executable, ROOT / "tests/integration/sync_cluster.py", folder, stdout=output, stderr=output
        )
        wait_until((folder / "cut me").exists, 120, "the publication to be cut", [driver])
        hosts.cut(1)
        (folder / "is cut").touch()
        assert driver.wait(timeout=60) == 0, (folder / "driver.log").read_text()[-4000:]
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    found["learner's log"] = (folder / "logs" / "learner-0.log").read_text()
    return found


@pytest.mark.slow
def test_every_publication_that_can_arrives_whole(seen: dict[str, Any]) -> None:
    """Also after a death and after a cut: the learner's weights are as they were, and it can be used.

    Each has the checksums that were sent, and the engines' log-probs are the learner's.
    """
    publications = [seen[name] for name in ("first", "second", "alone", "reborn", "after")]
    assert [(found.get("tensors"), found.get("gap")) for found in publications] == [(12, 0.0)] * 5, seen
    first, *later = [found["sum"] for found in publications]
    assert later == [later[0]] * 4
    assert first != later[0]  # the learner made a step between the two


@pytest.mark.slow
def test_the_probe_names_an_engine_on_another_host_whose_bytes_arrived_in_the_wrong_place(
    seen: dict[str, Any],
) -> None:
    swapped = seen["swapped"]
    assert swapped["kind"] == "WeightSyncError"
    assert "engine-1 and learner disagree after the sync of version 1: mean |difference|" in swapped["says"]


@pytest.mark.slow
def test_colocated_engines_hear_from_a_rank_of_their_own_host(seen: dict[str, Any]) -> None:
    """Each of two ranks on two hosts gathers the halves of both, and passes the whole on in shared memory.

    What arrives is what one rank would have sent over the network. A rank that sleeps sends nothing.
    """
    colocated = seen["colocated"]
    assert colocated["links"] == [["weight sync: shm to engine-0"], ["weight sync: shm to engine-1"]]
    assert "the learner's weights are in host memory" in colocated["refused"]
    assert colocated["sum"] == seen["first"]["sum"]


@pytest.mark.slow
def test_auto_is_gloo_across_hosts_and_shared_memory_on_one(seen: dict[str, Any]) -> None:
    lines = [line for line in seen["learner's log"].splitlines() if line.startswith("weight sync: ")]
    assert lines == [
        "weight sync: gloo to engine-0, engine-1",  # until one died in the middle
        "weight sync: shm to engine-0",
        "weight sync: gloo to engine-0, engine-1",  # until one was cut in the middle
        "weight sync: shm to engine-0",
    ]


@pytest.mark.slow
def test_shared_memory_that_an_engine_does_not_see_is_refused_before_anything_is_sent(
    seen: dict[str, Any],
) -> None:
    assert seen["shm"]["kind"] == "ValueError"
    assert "engine-1 cannot see its /dev/shm; use auto or gloo" in seen["shm"]["says"]


@pytest.mark.slow
def test_an_engine_that_dies_in_the_middle_is_named_with_its_last_words(seen: dict[str, Any]) -> None:
    died = seen["died"]
    assert died["kind"] == "ProcessDied"
    assert died["says"].startswith("engine-1 died: ")
    assert "the last words of an engine" in died["says"]
    assert died["seconds"] < 15


@pytest.mark.slow
def test_an_engine_whose_link_is_cut_in_the_middle_is_named_within_the_timeout(seen: dict[str, Any]) -> None:
    cut = seen["cut"]
    assert cut["kind"] in ("ProcessTimeout", "ProcessDied")  # by the clock, or by Ray's own
    assert cut["says"].startswith("engine-1 ")
    assert "raised in learner-0" in cut["notes"]  # the exporter gave up, and not the trainer on the learner
    assert cut["seconds"] < CUT_TIMEOUT_S
