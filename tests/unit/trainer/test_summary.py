"""The end of a run: the summary's numbers, and pictures for every sink."""

from __future__ import annotations

import json
from types import SimpleNamespace

from gspo_dist.metrics.jsonl import MetricsFile
from gspo_dist.metrics.sinks import Sinks
from gspo_dist.trainer.summary import finish


class Pictures:
    def __init__(self) -> None:
        self.names: list[str] = []

    def log(self, step, row) -> None: ...
    def samples(self, step, rows) -> None: ...
    def close(self, summary) -> None: ...

    def image(self, name, path) -> None:
        assert path.is_file()
        self.names.append(name)


def run_of(folder, *, evaluations: bool = True):
    jsonl = MetricsFile(folder)
    for step, speed in ((1, 10.0), (2, 30.0), (3, 20.0)):
        jsonl.log(step, {"perf/tokens_per_s": speed, "rollout/reward_mean": 0.5})
    heat = folder / "flips_update.png"
    heat.write_bytes(b"png")
    pictures = Pictures()
    sinks = Sinks(jsonl, [pictures])
    return pictures, SimpleNamespace(
        run_dir=folder,
        config=SimpleNamespace(steps=3),
        learner=SimpleNamespace(policy_version=12, peak_memory=lambda: {"learner-0": {"host": 2}}),
        pool=SimpleNamespace(peak_memory=lambda: {"engine-0": {"host": 3}}),
        flips=SimpleNamespace(draw=lambda f: [heat]),
        sinks=sinks,
        tokens_seen=456,
        seconds=7.5,
        last_checkpoint=folder / "checkpoints" / "step-000003",
        first_evaluation={"eval/heldout/accuracy": 0.25} if evaluations else {},
        last_evaluation={"eval/heldout/accuracy": 0.75} if evaluations else {},
    )


def test_the_summary_is_written_and_returned(tmp_path):
    pictures, run = run_of(tmp_path)
    summary = finish(run)
    assert summary == {
        "steps": 3,
        "policy_version": 12,
        "completion_tokens": 456,
        "seconds": 7.5,
        "tokens_per_s_median": 20.0,
        "peak_memory_bytes": {"engine-0": {"host": 3}, "learner-0": {"host": 2}},
        "checkpoint": str(tmp_path / "checkpoints" / "step-000003"),
        "heldout_before": 0.25,
        "heldout_after": 0.75,
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert pictures.names == ["curves", "flips_update"]


def test_the_curves_are_of_all_rows_and_name_their_run(tmp_path, monkeypatch):
    drawn = []

    def draw_curves(rows, path, title):
        drawn.append(([row["step"] for row in rows], path, title))
        path.write_bytes(b"png")

    monkeypatch.setattr("gspo_dist.trainer.summary.draw_curves", draw_curves)
    _, run = run_of(tmp_path)
    finish(run)
    assert drawn == [([1, 2, 3], tmp_path / "curves.png", tmp_path.name)]


def test_a_run_without_heldout_prompts_claims_no_accuracy(tmp_path):
    _, run = run_of(tmp_path, evaluations=False)
    run.last_checkpoint = None
    summary = finish(run)
    assert "heldout_after" not in summary
    assert summary["checkpoint"] is None
