"""What the cluster grants of a layout: who is on which host, which grant is of no use, what is given back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gspo_dist.actors import placement
from gspo_dist.actors.placement import Bundle, Layout, Reservation, granted
from gspo_dist.actors.session import Node


def host(number: int, name: str | None = None) -> Node:
    return Node(f"n{number}", name or f"host{number}", f"10.0.0.{number}", 16, 8, 1 << 30)


@pytest.fixture(autouse=True)
def removed(monkeypatch) -> list:
    """The placement groups that were given back."""
    groups: list = []
    monkeypatch.setattr(placement, "remove_placement_group", groups.append)
    return groups


def on_hosts(
    monkeypatch,
    homes: str,
    together: dict[str, int] | None = None,
    made: Layout | None = None,
    present="1234",
) -> Reservation:
    """A grant that puts bundle i on host homes[i]. The driver is on the first host that is present."""
    group = SimpleNamespace(wait=lambda seconds: True)
    monkeypatch.setattr(placement, "placement_group", lambda bundles, strategy: group)
    table = {"bundles_to_node_id": {i: f"n{home}" for i, home in enumerate(homes)}}
    monkeypatch.setattr(placement, "placement_group_table", lambda group: table)
    monkeypatch.setattr(placement, "nodes", lambda: [host(int(number)) for number in present])
    made = made or Layout((Bundle(1, 1),) * len(homes), (), colocated=False)
    return Reservation(made, 1.0, local=False, together=together)


def test_ranks_are_numbered_host_by_host_whatever_the_order_of_the_grant(monkeypatch) -> None:
    places = on_hosts(monkeypatch, "21212121", {"expert parallel": 4})
    assert places.homes("learner") == ("host1",) * 4 + ("host2",) * 4
    assert places.learners.bundles == (1, 3, 5, 7, 0, 2, 4, 6)
    # the fullest host first, so that whole blocks begin where ranks are counted in blocks
    assert on_hosts(monkeypatch, "122223").homes("learner") == ("host2",) * 4 + ("host1", "host3")


def test_of_hosts_that_hold_as_many_the_drivers_is_first_and_one_that_has_left_is_last(monkeypatch) -> None:
    """Host 0 ended between the grant and the look at it. It has no name any more, only Ray's."""
    places = on_hosts(monkeypatch, "013", present="312")
    assert places.homes("learner") == ("host3", "host1", "n0")
    assert places.learners.bundles == (2, 1, 0)


def test_a_block_that_the_grant_tears_is_refused_and_all_is_given_back(monkeypatch, removed) -> None:
    with pytest.raises(
        RuntimeError, match=r"ranks 4-7 \(expert parallel\) must share a host: .* 6 ranks on host1"
    ):
        on_hosts(monkeypatch, "11111122", {"expert parallel": 4})
    with pytest.raises(RuntimeError, match=r"ranks 4-5 \(tensor and context parallel\)"):
        on_hosts(monkeypatch, "11111222", {"tensor and context parallel": 2})
    with pytest.raises(RuntimeError, match=r"ranks 4-7 .* granted 4 ranks on host1, 3 ranks on host2, 1 "):
        on_hosts(monkeypatch, "11112223", {"expert parallel": 4})  # one host has just room for one
    assert len(removed) == 3
    # no host has eight: it was asked for, and the plan has called it slow
    assert on_hosts(monkeypatch, "11112222", {"expert parallel": 8}).homes("engine") == ()
    assert len(removed) == 3


def test_nodes_that_share_a_name_are_told_apart(monkeypatch) -> None:
    group = SimpleNamespace()
    monkeypatch.setattr(
        placement, "placement_group_table", lambda g: {"bundles_to_node_id": {0: "n1", 1: "n2"}}
    )
    monkeypatch.setattr(placement, "nodes", lambda: [host(1, "laptop"), host(2, "laptop")])
    assert granted(group, 2).homes == ("laptop/n1", "laptop/n2")


def colocated_on(monkeypatch, homes: str, engines: int, size: int) -> Reservation:
    """A grant that puts bundle i of a colocated layout on host homes[i]."""
    share = Bundle(1, 0.5)
    made = Layout((share,) * len(homes), (share,) * engines, colocated=True, engine_gpus=size)
    return on_hosts(monkeypatch, homes, made=made)


def test_a_colocated_engine_is_where_its_first_rank_is_and_hears_from_the_first_rank_of_its_host(
    monkeypatch,
) -> None:
    places = colocated_on(monkeypatch, "21212121", 4, 2)
    assert places.homes("engine") == ("host1", "host1", "host2", "host2")
    assert places.learners.bundles == (1, 3, 5, 7, 0, 2, 4, 6)
    bundles = [
        places.options("engine", i, {})["scheduling_strategy"].placement_group_bundle_index for i in range(4)
    ]
    assert bundles == [1, 5, 0, 4]
    assert places.exporters() == {"engine-0": 0, "engine-1": 0, "engine-2": 4, "engine-3": 4}


def test_a_colocated_engine_has_one_gpu_unless_it_is_said_to_have_more(monkeypatch) -> None:
    share = Bundle(1, 0.5)
    made = Layout((share,) * 3, (share,) * 3, colocated=True)
    assert on_hosts(monkeypatch, "112", made=made).homes("engine") == ("host1", "host1", "host2")


def test_one_rank_sends_to_engines_with_gpus_of_their_own(monkeypatch) -> None:
    places = on_hosts(monkeypatch, "1122")
    assert (places.exporters(), places.shared_gpus(1.0)) == (None, [])
    assert colocated_on(monkeypatch, "1122", 4, 1).shared_gpus(1.0) == []  # Ray gives half of one GPU


class Tasks:
    """Stands for ray. A task runs at once, and sees the GPU of the bundle that it was sent to."""

    def __init__(self, gpus: dict[int, int]) -> None:
        self.gpus, self.sent, self.waits = gpus, [], []

    def remote(self, **kind):
        return lambda task: SimpleNamespace(options=lambda **options: self.send(task, **options))

    def send(self, task, scheduling_strategy, **options):
        self.sent.append((scheduling_strategy.placement_group_bundle_index, options))
        return SimpleNamespace(remote=task)

    def get_gpu_ids(self) -> list[int]:
        return [self.gpus[self.sent[-1][0]]]

    def get(self, answers, timeout):
        self.waits.append(timeout)
        return answers


def test_the_gpus_of_an_engine_are_those_of_its_ranks_as_seen_from_their_bundles(monkeypatch) -> None:
    """Two engines of three GPUs, and a rank beside them that shares its GPU with none.

    Bundles 1, 3, 5 are on host 1 and 0, 2, 4 on host 2. Each host counts its GPUs from 0.
    """
    made = Layout((Bundle(1, 0.5),) * 7, (Bundle(1, 0.5),) * 2, colocated=True, engine_gpus=3)
    places = on_hosts(monkeypatch, "2121213", made=made)
    tasks = Tasks({1: 0, 3: 2, 5: 1, 0: 5, 2: 4, 4: 7, 6: 0})
    monkeypatch.setattr(placement, "ray", tasks)
    assert places.shared_gpus(7.0) == [("0", "2", "1"), ("5", "4", "7")]
    as_a_rank = {"num_cpus": 1, "num_gpus": 0.5, "runtime_env": {"env_vars": {}}}
    assert tasks.sent == [(bundle, as_a_rank) for bundle in (1, 3, 5, 0, 2, 4)]
    assert tasks.waits == [7.0]


def test_a_colocated_engine_that_the_grant_tears_is_refused(monkeypatch) -> None:
    with pytest.raises(
        RuntimeError, match=r"ranks 2-3 share their GPUs with engine 1 .* granted host1, host2"
    ):
        colocated_on(monkeypatch, "1112", 2, 2)
    assert colocated_on(monkeypatch, "1112", 1, 2).homes("engine") == ("host1",)


def test_what_was_granted_is_given_back_when_the_rest_is_not(monkeypatch, removed) -> None:
    """Else a retry in the same cluster would find the learners' GPUs taken by nobody."""
    granted = iter((True, False))
    waits = []
    groups = [
        SimpleNamespace(size=2, wait=lambda seconds: waits.append(seconds) or next(granted)) for _ in range(2)
    ]
    made = iter(groups)
    on_hosts(monkeypatch, "11")
    monkeypatch.setattr(placement, "placement_group", lambda bundles, strategy: next(made))
    monkeypatch.setattr(placement.ray, "available_resources", lambda: {"CPU": 3.0})
    layout = Layout((Bundle(1, 1),) * 2, (Bundle(2, 0),) * 2, colocated=False)
    with pytest.raises(
        RuntimeError, match=r"not grant \{'CPU': 4, 'GPU': 0\} within 6 s: free are CPU 3, GPU 0"
    ):
        Reservation(layout, 6.0, local=False)
    assert (removed, waits) == (groups, [6.0, 6.0])


def test_what_was_given_back_is_not_given_back_again(monkeypatch, removed) -> None:
    places = on_hosts(monkeypatch, "11")
    groups = list(places.groups)
    places.release()
    places.release()
    assert (len(groups), removed) == (1, groups)
