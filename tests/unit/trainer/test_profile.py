"""The steps that are recorded are those that were asked for, and a run never stops for it."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from gspo_dist.config import ProfileConfig
from gspo_dist.trainer.profile import ProfileWindow
from tests.unit.trainer.small import config, go


def test_a_trace_holds_every_forward_pass_of_its_step_and_of_no_other(model, reward_file, tmp_path):
    """An embedding is looked up once per forward pass. Engines of this process run none without probes."""
    passes = Counter[int]()

    def count(run):
        learner = run.learner.learner
        learner.policy.register_forward_hook(lambda *_: passes.update([1 + learner.policy_version // 2]))

    quiet = ("flips.every=0", "rollout.weight_sync.probe_every=0", "evaluation.every=0")
    c = config(model, reward_file, tmp_path / "run", "steps=4", "profile.steps=[2,4]", *quiet)
    told, rows = go(c, count)
    assert (told["steps"], len(rows)) == (4, 5)
    files = sorted(p.relative_to(tmp_path / "run") for p in (tmp_path / "run" / "profile").rglob("*.*"))
    assert files == [Path(f"profile/step-00000{step}/rank-0.trace.json.gz") for step in (2, 4)]
    found = {}
    for step, file in zip((2, 4), files, strict=True):
        events = json.loads(gzip.decompress((tmp_path / "run" / file).read_bytes()))["traceEvents"]
        names = Counter(event["name"] for event in events if event.get("ph") == "X")
        found[step] = names["aten::embedding"]
        assert names["Optimizer.step#AdamW.step"] == 2  # mini-batches
    assert passes[3] > 0
    assert found == {step: passes[step] for step in (2, 4)}


def test_a_recording_that_cannot_be_written_is_said_once_and_stops_nothing(
    model, reward_file, tmp_path, caplog
):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "profile").write_text("in the way")
    told, _ = go(config(model, reward_file, run_dir, "profile.steps=[1,2]", "flips.every=0"))
    assert told["steps"] == 3
    said = [r.getMessage() for r in caplog.records if "profile" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("the run goes on without profile: ")


class Group:
    """Notes what it is asked; `broken` verbs raise."""

    def __init__(self, broken=()):
        self.asked, self.broken = [], broken

    def start_profile(self, ranks):
        self._ask("start", ranks)

    def stop_profile(self, ranks, folder):
        self._ask("stop", ranks, folder.name)
        return [] if ranks == (0,) else [folder / f"rank-{rank}" for rank in ranks]

    def _ask(self, verb, *what):
        self.asked.append((verb, *what))
        if verb in self.broken:
            raise RuntimeError(f"{verb} is broken")


def test_ranks_are_asked_in_the_steps_of_the_window_alone(tmp_path, caplog):
    caplog.set_level("INFO", "gspo_dist.trainer.profile")
    group = Group()
    window = ProfileWindow(ProfileConfig(steps=[4, 2], ranks=[3, 0, 3]), group, tmp_path)
    for step in (1, 2, 3, 4):
        with window(step):
            group.asked.append(step)
    assert group.asked == [
        1,
        ("start", (0, 3)),
        2,
        ("stop", (0, 3), "step-000002"),
        3,
        ("start", (0, 3)),
        4,
        ("stop", (0, 3), "step-000004"),
    ]
    folder = tmp_path / "profile"
    assert [r.getMessage() for r in caplog.records] == [
        f"profile of step {step}: {folder}/step-00000{step}/rank-0, {folder}/step-00000{step}/rank-3"
        for step in (2, 4)
    ]
    caplog.clear()
    broken = Group(broken=("start", "stop"))
    window = ProfileWindow(ProfileConfig(steps=[1, 2]), broken, tmp_path)
    for step in (1, 2):
        with window(step):
            pass
    assert len(broken.asked) == 4
    assert [r.getMessage() for r in caplog.records] == [
        "the run goes on without profile: RuntimeError: start is broken"
    ]


def test_a_step_that_fails_asks_its_learner_for_nothing_more(tmp_path):
    group = Group()
    window = ProfileWindow(ProfileConfig(steps=[1]), group, tmp_path)
    with pytest.raises(ValueError, match="of the step"), window(1):
        raise ValueError("of the step")
    assert group.asked == [("start", (0,))]
