"""What is said of a tensor-parallel worker that is gone. test_tensor_parallel.py kills a real one."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_dist.rollout.vllm import workers
from gspo_dist.rollout.vllm.workers import names_lost_workers


class Engine:
    """Fails as vLLM does where a worker is gone."""

    name = "engine-3"

    def __init__(self, count: int, executor: Any) -> None:
        self.config = SimpleNamespace(tensor_parallel=count)
        self.llm = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor))

    @names_lost_workers
    def advance(self, ticks: int, *, fail: bool = True) -> int:
        if fail:
            raise RuntimeError("cancelled")
        return ticks


def test_a_lost_worker_is_named_also_where_its_news_come_late() -> None:
    executor = SimpleNamespace(is_failed=False)
    news = threading.Timer(0.1, lambda: setattr(executor, "is_failed", True))
    news.start()
    with pytest.raises(
        RuntimeError, match=r"engine-3 lost one of its 2 .* workers in advance: .* -9"
    ) as seen:
        Engine(2, executor).advance(5)
    news.join()
    assert str(seen.value.__cause__) == "cancelled"


def test_other_failures_and_engines_of_one_worker_are_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(workers, "NEWS_S", 0.05)
    lost = SimpleNamespace(is_failed=True)
    for engine in (Engine(2, SimpleNamespace(is_failed=False)), Engine(1, lost)):
        with pytest.raises(RuntimeError, match=r"^cancelled$"):
            engine.advance(5)
    assert Engine(2, lost).advance(5, fail=False) == 5
