"""One question to every host of the cluster."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gspo_dist.actors.session import Node, nodes

ANSWER_TIMEOUT_S = 180.0
"""A host imports torch and vLLM's kernels, from a network file system perhaps."""
PINGS = 5
"""Questions for a host's time. The fastest answer says most."""


class Asked:
    """A process on one host."""

    def call(self, question: Callable[..., Any], *args: Any) -> Any:
        return question(*args)

    def now(self) -> float:
        return time.time()


@dataclass(frozen=True)
class Answer:
    """What one host said."""

    node: Node
    """The host."""
    value: Any
    """What the question returned there, or the exception that came instead."""
    clock_s: float
    """Its clock less this host's, in seconds. The error is at most half of a message's way there and back."""


def ask_every_host(question: Callable[..., Any], *args: Any) -> list[Answer]:
    """`question(*args)` on every live host at the same time, the asking one first.

    The question must be importable there. A host that does not answer has its exception as the value.
    """
    hosts = nodes()
    asked = {}
    for node in hosts:
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        asked[node.node_id] = ray.remote(Asked).options(num_cpus=0, scheduling_strategy=there).remote()
    replies = {key: actor.call.remote(question, *args) for key, actor in asked.items()}
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    answers = []
    for node in hosts:
        try:
            value = ray.get(replies[node.node_id], timeout=max(0.0, deadline - time.monotonic()))
            ahead = clock_offset(partial(_time_of, asked[node.node_id]))
            answers.append(Answer(node, value, ahead))
        except Exception as error:  # whatever it is, the report goes on with the other hosts
            answers.append(Answer(node, error, 0.0))
    for actor in asked.values():
        ray.kill(actor)
    return answers


def _time_of(actor: Any) -> float:
    return float(ray.get(actor.now.remote(), timeout=10))


def clock_offset(remote_time: Callable[[], float], clock: Callable[[], float] = time.time) -> float:
    """Seconds by which another clock is ahead of `clock`, from the fastest of a few answers.

    Example: asked at 10.0, answered 15.1, heard at 10.2. The answer was given at about 10.1: 5.0 ahead.
    """
    found = []
    for _ in range(PINGS):
        begin = clock()
        there = remote_time()
        end = clock()
        found.append((end - begin, there - (begin + end) / 2))
    return min(found)[1]
