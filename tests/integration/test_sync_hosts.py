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
TIMEOUT_S = 20.0
"""Of a publication, as sync_cluster.py has it: the exporter gives up on the engines after 18 s."""


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
        worker = hosts[1].start(
            *start, "--address=10.77.0.1:6379", "--node-ip-address=10.77.0.2", stdout=logs[1], stderr=logs[1]
        )
        wait_until(lambda: "Ray runtime started" in (folder / "ray2.log").read_text(), 60, "host2", [worker])
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
    """Also after a death and after a cut: the learner's weights are as they were, and it can be used."""
    publications = [seen[name] for name in ("first", "second", "alone", "reborn", "after")]
    assert publications == [{"sum": publications[0].get("sum"), "tensors": 12}] * 5, seen


@pytest.mark.slow
def test_auto_is_gloo_across_hosts_and_shared_memory_on_one(seen: dict[str, Any]) -> None:
    lines = [line for line in seen["learner's log"].splitlines() if line.startswith("weight sync: ")]
    assert lines == [
        "weight sync: gloo to engine-0, engine-1",  # the first two
        "weight sync: gloo to engine-0, engine-1",  # that died in the middle
        "weight sync: shm to engine-0",
        "weight sync: gloo to engine-0, engine-1",
        "weight sync: gloo to engine-0, engine-1",  # that was cut in the middle
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
    assert cut["seconds"] < TIMEOUT_S
