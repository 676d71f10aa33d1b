"""Runs and studies made of numbers: what the tests of this folder share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gspo_dist.studies.analysis import RunData
from gspo_dist.studies.study import Study


def _run(
    arm: str,
    seed: int,
    heldout: Sequence[float],
    reward: Sequence[float] | None = None,
    status: str = "done",
    **metrics: float,
) -> RunData:
    """A run with a held-out accuracy and a reward per step; `metrics` are in every row."""
    reward = reward if reward is not None else [0.5] * len(heldout)
    rows = [
        {"step": step, "eval/heldout/accuracy": h, "rollout/reward_mean": r, **metrics}
        for step, (h, r) in enumerate(zip(heldout, reward, strict=True))
    ]
    return RunData(arm, seed, status, "", rows, None)


@pytest.fixture(scope="session")
def make_run() -> Callable[..., RunData]:
    return _run


@pytest.fixture
def written_study(tmp_path: Path) -> Study:
    """Two arms with two seeds in a folder; the last run has not begun."""
    study = Study(
        "s", (), {"gspo": (), "grpo": ()}, (0, 1), "grpo", str(tmp_path / "runs"), title="A <study>"
    )
    for number, (arm, seed) in enumerate(study.runs[:3]):
        folder = study.run_dir(arm, seed)
        folder.mkdir(parents=True)
        rows = [
            {
                "step": step,
                "eval/heldout/accuracy": 0.3 + 0.02 * step,
                "rollout/reward_mean": 0.3 + 0.01 * step,
                "objective/clip_fraction": 0.1 + 0.1 * number,
                "guard/offset_clip_widths": (-1.0) ** step,
                "time/step_s": 2.0,
                "time/update_s": 0.5,
                "rollout/completion_tokens_total": 100.0 * step,
            }
            for step in range(12)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "summary.json").write_text(
            json.dumps({"peak_memory_bytes": {"learner-0": {"host": 2**30}}})
        )
        end = {"arm": arm, "seed": seed, "status": "done", "reason": "", "seconds": 60.0, "steps_logged": 11}
        (folder / "status.json").write_text(json.dumps(end | {"command": []}))
    return study
