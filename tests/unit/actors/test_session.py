"""The Ray of a run: its own or a joined one, with a token, room for a step, and hosts that are waited for."""

from __future__ import annotations

import logging
import os
import stat
from types import SimpleNamespace

import pytest

from gspo_dist.actors import session
from gspo_dist.actors.session import (
    Node,
    await_nodes,
    cluster_gpus,
    nodes,
    object_store_bytes,
    prepare_token,
    start_ray,
    stop_ray,
    token_source,
)
from gspo_dist.config import ClusterConfig

GIB = 1 << 30


def host(number: int, gpus: float = 0.0, store: int = GIB) -> Node:
    return Node(f"n{number}", f"host{number}", f"10.0.0.{number}", 16, gpus, store)


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home folder of one's own, and no word about tokens in the environment."""
    monkeypatch.setattr(session.os, "environ", {"HOME": str(tmp_path)})
    monkeypatch.setattr(session.Path, "home", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def inits(monkeypatch, home):
    """What ray.init is called with."""
    started = []
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", lambda **options: started.append(options))
    return started


def test_a_ray_of_ones_own_is_quiet_small_not_nice_and_never_another_that_is_there(
    inits, monkeypatch
) -> None:
    monkeypatch.setattr(session, "object_store_bytes", lambda batch: 123 + batch)
    quiet = {"RAY_DISABLE_DOCKER_CPU_WARNING": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    for found, niceness in (({}, "0"), ({"RAY_worker_niceness": "5"}, "5")):  # what is set already is kept
        monkeypatch.setattr(session.os, "environ", found)
        assert start_ray(ClusterConfig(), 7) is True
        assert found == {"RAY_worker_niceness": niceness, **quiet}
    start_ray(ClusterConfig())  # of whoever has no rollouts, as the doctor
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    own = {**options, "address": "local"}
    assert [init | own for init in inits] == inits
    assert [init["object_store_memory"] for init in inits] == [130, 130, 123]


def test_a_ray_of_ones_own_gets_a_token_that_only_its_user_can_read(home) -> None:
    prepare_token(joins=False)
    file = home / ".ray/auth_token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    first = file.read_text()
    assert len(bytes.fromhex(first)) == 32
    file.chmod(0o644)  # as Ray itself writes it
    prepare_token(joins=False)
    assert (stat.S_IMODE(file.stat().st_mode), file.read_text()) == (0o600, first)
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize("there", ["nothing", "the home", "Ray's own folder"])
def test_a_token_is_made_whatever_of_its_folders_is_there(home, monkeypatch, there) -> None:
    if there == "nothing":
        monkeypatch.setattr(session.Path, "home", lambda: home / "of" / "its user")
    elif there == "Ray's own folder":
        (home / ".ray").mkdir()
    prepare_token(joins=False)
    assert len(bytes.fromhex(session.token_file().read_text())) == 32
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_ray_of_ones_own_has_its_token_before_it_starts_and_a_joined_one_gets_none(
    inits, home, monkeypatch
) -> None:
    monkeypatch.setattr(session, "nodes", lambda: [host(1)])
    token = home / ".ray/auth_token"
    start_ray(ClusterConfig(address="auto"))
    assert not token.exists()
    monkeypatch.setattr(session.ray, "init", lambda **_: inits.append(token.read_text()))
    start_ray(ClusterConfig())
    assert len(bytes.fromhex(inits[-1])) == 32


@pytest.mark.parametrize(("address", "looks"), [("auto", []), ("10.0.0.1:6379", [False])])
def test_a_cluster_is_joined_with_the_token_that_is_there_and_without_its_logs(
    inits, monkeypatch, address, looks
) -> None:
    """Ray looks for a token by itself for "auto" only. Where there is none, the head says so if it minds."""
    from ray._private.authentication import authentication_token_setup as setup

    looked = []
    monkeypatch.setattr(
        setup,
        "maybe_enable_token_auth_if_token_available",
        lambda warn_if_disabled=True: looked.append(warn_if_disabled),
    )
    monkeypatch.setattr(session, "nodes", lambda: [host(1)])
    assert start_ray(ClusterConfig(address=address)) is False
    assert looked == looks
    assert inits == [{"address": address, "log_to_driver": False, "logging_level": "error"}]


def test_a_ray_that_runs_is_neither_started_nor_joined_again(inits, home, monkeypatch) -> None:
    monkeypatch.setattr(session.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(session, "nodes", lambda: [host(1)])
    assert start_ray(ClusterConfig()) is False
    assert start_ray(ClusterConfig(address="auto")) is False
    assert (inits, list(home.iterdir())) == ([], [])


def test_what_was_started_is_ended(monkeypatch) -> None:
    ended = []
    monkeypatch.setattr(session.ray, "shutdown", lambda: ended.append("Ray"))
    stop_ray()
    assert ended == ["Ray"]


def test_a_token_is_not_made_where_a_cluster_is_joined_or_the_user_has_said_how(home) -> None:
    prepare_token(joins=True)  # the head's is the one that counts
    os.environ["RAY_AUTH_MODE"] = "disabled"
    prepare_token(joins=False)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/elsewhere"}
    prepare_token(joins=False)
    assert not (home / ".ray").exists()


def test_without_a_home_to_write_to_the_token_lives_in_the_environment(home, monkeypatch) -> None:
    def refuse(*_, **__):
        raise OSError("read-only file system")

    monkeypatch.setattr(session.Path, "mkdir", refuse)
    prepare_token(joins=False)
    assert len(bytes.fromhex(os.environ["RAY_AUTH_TOKEN"])) == 32


def test_where_a_token_comes_from_is_said_without_the_token(home) -> None:
    assert token_source() == "no token"
    prepare_token(joins=False)
    assert token_source() == f"a token from {home}/.ray/auth_token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = "/elsewhere"
    assert token_source() == "a token from RAY_AUTH_TOKEN_PATH=/elsewhere"
    os.environ["RAY_AUTH_TOKEN"] = "secret"
    assert token_source() == "a token from RAY_AUTH_TOKEN"
    os.environ["RAY_AUTH_MODE"] = "disabled"
    assert token_source() == "RAY_AUTH_MODE=disabled, so that none is sent"


def test_a_cluster_that_cannot_be_joined_is_told_with_the_token_that_was_sent(inits, monkeypatch) -> None:
    def refuse(**_):
        raise ConnectionError("Failed to connect to Ray cluster at head:6379")

    monkeypatch.setattr(session.ray, "init", refuse)
    with pytest.raises(
        RuntimeError, match=r"address=auto cannot be joined: Failed .* this host has no token"
    ):
        start_ray(ClusterConfig(address="auto"))


def test_a_joined_cluster_is_told_when_a_step_does_not_fit_its_store(inits, monkeypatch, caplog) -> None:
    """3 GiB of rollouts lie in the driver's store twice; the other hosts hold shares only."""
    monkeypatch.setattr(session, "nodes", lambda: [host(1, store=5 * GIB), host(2, store=1)])
    with caplog.at_level(logging.WARNING):
        assert start_ray(ClusterConfig(address="auto"), 5 * GIB // 2) is False
        assert caplog.text == ""
        start_ray(ClusterConfig(address="auto"), 3 * GIB)
    assert "up to 6.0 GiB of the object store, and host1 has 5.0 GiB" in caplog.text
    assert f"--object-store-memory={6 * GIB}," in caplog.text
    assert inits[0]["address"] == "auto"


@pytest.mark.parametrize(
    ("total", "shm", "batch", "wanted"),
    [
        (1 << 28, GIB, 0, 80 << 20),
        (10 * GIB, GIB, 0, GIB),
        (1 << 40, 1 << 40, 0, 2 * GIB),
        (1 << 40, 1 << 40, 8 * GIB, 18 * GIB),
        (40 * GIB, 1 << 40, 8 * GIB, 12 * GIB),  # 30% of the memory
        (1 << 40, 16 * GIB, 8 * GIB, 8 * GIB),  # half of /dev/shm
        (1 << 40, GIB // 16, 8 * GIB, 2 * GIB),  # a container's 64 MiB: Ray goes to disk whatever we say
    ],
)
def test_the_object_store_has_room_for_a_step_within_bounds(monkeypatch, total, shm, batch, wanted) -> None:
    with_memory(monkeypatch, total, {"/dev/shm": SimpleNamespace(total=shm, used=3, free=shm - 3)})
    assert object_store_bytes(batch) == wanted


def with_memory(monkeypatch, total, disks) -> None:
    """A host whose memory is nearly full now, as while a run starts beside another one's end."""
    monkeypatch.setattr(session, "usable_memory", lambda: (total, 1))
    monkeypatch.setattr(session, "shutil", SimpleNamespace(disk_usage=disks.__getitem__))
    paths = SimpleNamespace(isdir=disks.__contains__)
    monkeypatch.setattr(session, "os", SimpleNamespace(path=paths))


def test_a_host_without_shared_memory_has_a_store_of_the_usual_size(monkeypatch) -> None:
    with_memory(monkeypatch, 10 * GIB, {})
    assert object_store_bytes(8 * GIB) == GIB


@pytest.fixture
def growing(monkeypatch):
    """A cluster that gets another host whenever somebody waits; returns the list of hosts to come."""
    coming: list[Node] = []
    present: list[Node] = []

    def sleep(_):
        clock.now += 1.0
        assert clock.now < 10_000, "this would wait for ever"
        present.extend(coming[:1])
        del coming[:1]

    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(session, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock.now))
    monkeypatch.setattr(session, "nodes", lambda: present)
    return present, coming


@pytest.mark.parametrize(
    ("hosts", "gpus", "nodes_asked", "left"),
    [
        ([0, 0, 8], False, None, 2),  # whoever is there
        ([0, 0, 8], True, None, 0),  # the first GPU
        ([0, 0, 8], False, 2, 1),
        ([8, 8, 8], True, 2, 1),  # not the first GPU alone: the ranks need all hosts
        ([0, 0, 8], True, 2, 1),  # all hosts are there, so no GPU will come
    ],
)
def test_hosts_that_are_still_joining_are_waited_for(growing, caplog, hosts, gpus, nodes_asked, left) -> None:
    present, coming = growing
    present.append(host(1, hosts[0]))
    coming.extend(host(i + 2, n) for i, n in enumerate(hosts[1:]))
    await_nodes(ClusterConfig(address="auto", nodes=nodes_asked), gpus=gpus)
    assert len(coming) == left
    assert caplog.text.count("waiting for") == (left < 2)


def test_hosts_have_their_time_to_come_counted_from_the_first_look(growing) -> None:
    """One comes per second, on a clock that has run for long. The fifth is there after four seconds."""
    present, coming = growing
    present.append(host(1))
    coming.extend(host(i) for i in range(2, 7))
    await_nodes(ClusterConfig(address="auto", nodes=5, placement_timeout_s=5), gpus=False)
    assert (len(present), len(coming)) == (5, 1)


def test_hosts_that_do_not_come_are_named_after_the_timeout(growing) -> None:
    growing[0].append(host(1))
    cluster = ClusterConfig(address="auto", nodes=3, placement_timeout_s=5)
    with pytest.raises(
        RuntimeError, match=r"not got 3 hosts .* within 5 s: there are host1 \(0 GPUs\); .*nodes"
    ):
        await_nodes(cluster, gpus=True)
    cluster = ClusterConfig(address="auto", placement_timeout_s=5)
    with pytest.raises(RuntimeError, match=r"not got a GPU within 5 s: .* set cluster.device=cpu"):
        await_nodes(cluster, gpus=True)


def test_hosts_come_in_the_order_of_their_addresses_the_drivers_first(monkeypatch) -> None:
    entries = [
        {
            "NodeID": f"n{i}",
            "NodeManagerHostname": f"host{i}",
            "NodeManagerAddress": f"10.0.0.{i}",
            "Alive": i != 4,
            "Resources": {} if i == 9 else {"CPU": 2.0, "object_store_memory": 5.0},
        }
        for i in (10, 9, 4, 11)
    ]
    here = SimpleNamespace(get_node_id=lambda: "n11")
    monkeypatch.setattr(session.ray, "get_runtime_context", lambda: here)
    monkeypatch.setattr(session.ray, "nodes", lambda: entries)
    assert [node.name for node in nodes()] == ["host11", "host9", "host10"]
    assert nodes()[:2] == [
        Node("n11", "host11", "10.0.0.11", 2.0, 0.0, 5),
        Node("n9", "host9", "10.0.0.9", 0.0, 0.0, 0),  # it offers nothing
    ]
    entries[0]["NodeManagerAddress"] = "head.cluster"  # no number: before all that are
    assert [node.name for node in nodes()] == ["host11", "host10", "host9"]


def test_the_gpus_of_a_cluster_are_all_that_its_hosts_offer(monkeypatch) -> None:
    for offered, wanted in (({"CPU": 8.0, "GPU": 3.0}, 3.0), ({"CPU": 8.0}, 0.0)):
        monkeypatch.setattr(session.ray, "cluster_resources", lambda offered=offered: offered)
        assert cluster_gpus() == wanted


@pytest.mark.slow
def test_ray_is_joined_once_and_ended_by_whoever_started_it(ray_here) -> None:
    assert ray_here is True
    assert start_ray(ClusterConfig()) is False
    assert cluster_gpus() == 0.0
    assert [node.gpus for node in nodes()] == [0.0]
