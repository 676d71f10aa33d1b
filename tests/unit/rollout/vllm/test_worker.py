"""The verbs that vLLM's workers get, without a worker."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from gspo_dist.rollout.vllm.worker import WorkerExtension


def test_one_worker_of_a_tensor_parallel_engine_sends_what_was_sampled() -> None:
    """All of them sample the same tokens, and each answer travels to the engine's process."""
    asked = []

    def read(slots, columns):
        asked.append((slots.tolist(), columns.tolist()))
        return "ids", "logprobs", "versions"

    answers = []
    for rank in range(4):
        worker = WorkerExtension()
        worker.rank = rank
        worker.model_runner = SimpleNamespace(sampler=SimpleNamespace(read=read))
        answers.append(worker.gspo_read(np.array([1, 2]), np.array([0, 5])))
    assert answers == [("ids", "logprobs", "versions"), None, None, None]
    assert asked == [([1, 2], [0, 5])]
