"""What a recording holds, and that nothing stays behind when it cannot be written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gspo_dist.learners.profile import Profiler


def operators(trace: Path) -> list[str]:
    """The names of the operators of a trace, one per call."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "cpu_op"]


def products(n: int) -> None:
    for _ in range(n):
        torch.ones(2, 3) @ torch.ones(3, 2)


def test_a_trace_holds_what_was_computed_between_start_and_stop(tmp_path):
    profiler = Profiler()
    assert profiler.stop(tmp_path / "none", "rank-0") == []
    assert not (tmp_path / "none").exists()
    products(1)
    profiler.start()
    products(5)
    profiler.start()  # begins anew
    products(3)
    (trace,) = profiler.stop(tmp_path / "a", "rank-7")
    products(1)
    assert trace == tmp_path / "a" / "rank-7.trace.json.gz"
    assert operators(trace).count("aten::mm") == 3
    assert list(trace.parent.iterdir()) == [trace]
    assert profiler.stop(tmp_path / "a", "rank-7") == []


def test_one_that_cannot_be_written_is_over_and_the_next_is_whole(tmp_path, monkeypatch):
    profiler = Profiler()
    (tmp_path / "file").write_text("in the way")
    profiler.start()
    with pytest.raises(OSError, match="file"):
        profiler.stop(tmp_path / "file", "rank-0")

    def full(self, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", path)

    with monkeypatch.context() as patch:
        patch.setattr(torch.profiler.profile, "export_chrome_trace", full)
        profiler.start()
        with pytest.raises(OSError, match="No space left"):
            profiler.stop(tmp_path / "a", "rank-0")
    assert list((tmp_path / "a").iterdir()) == []
    profiler.start()
    products(2)
    (trace,) = profiler.stop(tmp_path / "a", "rank-0")
    assert operators(trace).count("aten::mm") == 2


def test_with_a_gpu_its_memory_is_remembered_written_and_forgotten(tmp_path, monkeypatch):
    said: list[object] = []

    class Profile:
        def __init__(self, activities, **options):
            said.append([activity.name for activity in activities])

        def start(self):
            said.append("start")

        def stop(self):
            said.append("stop")

        def export_chrome_trace(self, path):
            Path(path).write_bytes(b"trace")

    def remember(enabled="all", max_entries=0):
        said.append(("remember", enabled, max_entries > 0))

    memory = SimpleNamespace(
        _record_memory_history=remember, _dump_snapshot=lambda path: Path(path).write_bytes(b"memory")
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory", memory)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    profiler = Profiler()
    profiler.start()
    trace, snapshot = profiler.stop(tmp_path, "rank-0")
    assert (trace.read_bytes(), snapshot.read_bytes()) == (b"trace", b"memory")
    assert snapshot.name == "rank-0.memory.pickle"
    assert said == [
        ("remember", "all", True),
        ["CPU", "CUDA"],
        "start",
        "stop",
        ("remember", None, False),
    ]
