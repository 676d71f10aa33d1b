"""Engines that are lost on three hosts without GPUs: the others do their work, and who is gone is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.hosts import Hosts, need_hosts, wait_until

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    need_hosts()
    folder = tmp_path_factory.mktemp("lost")
    with Hosts(3, folder, {"PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}) as hosts:
        start = (RAY, "start", "--block", "--num-cpus=2", "--object-store-memory=100000000")
        for i in (1, 2, 3):  # one after the other: Ray gives a node 30 s to start
            own = (
                ("--head", "--port=6379", "--include-dashboard=false")
                if i == 1
                else ("--address=10.77.0.1:6379",)
            )
            path = folder / f"ray{i}.log"
            with path.open("w") as log:
                hosts[i - 1].start(*start, *own, f"--node-ip-address=10.77.0.{i}", stdout=log, stderr=log)
            wait_until(lambda path=path: "Ray runtime started" in path.read_text(), 60, f"host{i}")
        output = (folder / "driver.log").open("w")
        driver = hosts[0].start(
            sys.executable, ROOT / "tests/integration/lost_engines.py", folder, stdout=output, stderr=output
        )
        for ask, act in (("lose host3", lambda: hosts.lose(2)), ("cut host2", lambda: hosts.cut(1))):
            wait_until((folder / ask).exists, 240, ask, [driver])
            act()
            (folder / f"{ask}, done").touch()
        assert driver.wait(timeout=120) == 0, (folder / "driver.log").read_text()[-4000:]
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return found


@pytest.mark.slow
def test_only_the_engine_that_dies_in_a_publication_is_replaced(seen: dict[str, Any]) -> None:
    """The others begin it again as they are. Its successor samples nothing before the next publication."""
    assert seen["all three"]["kept"] == ["engine-0", "engine-1", "engine-2"]
    killed = seen["killed in a publication"]
    assert killed["kept"] == killed["alive"] == ["engine-0", "engine-1"]
    [[kind, who, what]] = killed["events"]
    assert (kind, who) == ("engine_death", "engine-2")
    assert what.startswith("engine-2 died: ")
    before = seen["before its publication"]
    assert (before["equal"], before["alive"], before["events"]) == (True, ["engine-0", "engine-1"], [])
    returned = seen["returned"]
    assert returned["alive"] == ["engine-0", "engine-1", "engine-2"]
    assert returned["kept"] == ["engine-0", "engine-1"]
    assert returned["events"] == [["engine_return", "engine-2", f"after: {what}"]]


@pytest.mark.slow
def test_the_work_of_an_engine_that_hangs_goes_on_at_the_others(seen: dict[str, Any]) -> None:
    """SIGSTOP in the middle of a slice: the deadline is rollout.timeout_s. It is ended and replaced."""
    hangs = seen["hangs"]
    assert hangs["equal"]
    assert hangs["alive"] == ["engine-0", "engine-2"]
    [[kind, who, what]] = hangs["events"]
    assert (kind, who, what) == ("engine_death", "engine-1", "engine-1 gave no answer within 4 s")
    assert 4 < hangs["seconds"] < 30
    again = seen["returned from a hang"]
    assert again["alive"] == ["engine-0", "engine-1", "engine-2"]
    assert again["events"] == [["engine_return", "engine-1", f"after: {what}"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "who", "left"),
    [
        ("host lost", "engine-2", ["engine-0", "engine-1"]),
        ("cut while sampling", "engine-1", ["engine-0"]),
    ],
)
def test_the_work_of_an_engine_whose_host_is_gone_goes_on_at_the_others(
    seen: dict[str, Any], name: str, who: str, left: list[str]
) -> None:
    """Everything on the host is killed, or its link is cut: every completion is what one engine samples."""
    gone = seen[name]
    assert gone["equal"]
    assert gone["alive"] == left
    [[kind, named, what]] = gone["events"]
    assert (kind, named) == ("engine_death", who)
    assert what.startswith(f"{who} ")
    assert gone["seconds"] < 30


@pytest.mark.slow
def test_a_publication_needs_nobody_who_is_gone(seen: dict[str, Any]) -> None:
    assert seen["without the host"]["kept"] == ["engine-0", "engine-1"]
    assert seen["without the host"]["events"] == []


@pytest.mark.slow
def test_where_no_engine_is_left_all_work_comes_back(seen: dict[str, Any]) -> None:
    left = seen["none left"]
    assert left["says"].startswith("no engine is left (")
    assert "engine-0 died: " in left["says"]
    assert left["whole"]
    assert left["tokens"] >= 3 * 10
