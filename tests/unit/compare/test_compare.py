"""Studies: what runs, what an ended run is called, and what the numbers are judged to show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gspo_dist.cli import conf_dir
from gspo_dist.compare.analysis import RunData, collapse_step, estimate, paired
from gspo_dist.compare.claims import judge
from gspo_dist.compare.report import write_report
from gspo_dist.compare.runner import run_study
from gspo_dist.compare.study import Study, load_study


def read_yaml(path: Path):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path))


def run(arm: str, seed: int, heldout: list[float], reward: list[float] | None = None, status: str = "done", **extra) -> RunData:
    reward = reward if reward is not None else [0.5] * len(heldout)
    rows = [
        {"step": i, "eval/heldout/accuracy": h, "rollout/reward_mean": r, **{k: v for k, v in extra.items()}}
        for i, (h, r) in enumerate(zip(heldout, reward, strict=True))
    ]
    return RunData(arm, seed, status, "", rows, None)


def test_estimate_is_students_interval():
    """1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138."""
    e = estimate([1.0, 2.0, 3.0])
    assert (e.mean, e.n) == (2.0, 3)
    assert e.half_width == pytest.approx(2.484138, abs=1e-6)


def test_paired_differences_cancel_what_seeds_share():
    """Differences .1, .1, .13: t = .11 / (.0173205 / sqrt 3) = 11, two-sided p = 0.008163 with 2 degrees of freedom."""
    runs = [run("a", s, [v]) for s, v in enumerate((0.3, 0.6, 0.93))] + [run("b", s, [v]) for s, v in enumerate((0.2, 0.5, 0.8))]
    test = paired(runs, "a", "b", lambda r: r.final("eval/heldout/accuracy"))
    assert test.difference.mean == pytest.approx(0.11)
    assert test.p == pytest.approx(0.00816327, abs=1e-6)


@pytest.mark.parametrize(
    ("reward", "status", "step"),
    [
        ([0.5] * 20, "done", None),
        ([0.5] * 10 + [0.1] * 10, "done", 13),
        ([0.5] * 10 + [0.1] * 6 + [0.5] * 8, "done", None),
        ([0.5] * 4, "diverged", 3),
    ],
)
def test_collapse_by_the_stated_rule(reward, status, step):
    assert collapse_step(run("a", 0, [0.5] * len(reward), reward, status)) == step


def test_claims_follow_the_numbers():
    def arm(name: str, level: float, clip: float) -> list[RunData]:
        noise = (0.0, 0.003, -0.003)
        return [run(name, s, [0.3, level + noise[s] * (1 + level)], **{"objective/clip_fraction": clip}) for s in range(3)]

    runs = [
        *arm("gspo", 0.80, 0.2), *arm("gspo_recompute", 0.80, 0.15), *arm("gspo_r3", 0.80, 0.15),
        *arm("grpo", 0.60, 0.0013), *arm("grpo_r2", 0.70, 0.0013), *arm("grpo_r3", 0.72, 0.0013),
    ]
    verdicts = [v.verdict for v in judge(runs)]
    assert verdicts[0] == "reproduced"
    assert verdicts[1] == "reproduced (and learns better)"
    assert verdicts[2] == "reproduced"
    assert verdicts[3] == "reproduced"
    worse = [*arm("gspo", 0.50, 0.2), *arm("gspo_recompute", 0.80, 0.0014), *arm("grpo", 0.60, 0.0013)]
    verdicts = [v.verdict for v in judge(worse)]
    assert verdicts == ["contradicted", "not reproduced", "not testable", "contradicted"]


@pytest.mark.parametrize("path", sorted((conf_dir() / "study").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_arm_of_every_study_composes(path):
    from gspo_dist.cli import run_config

    study = load_study([f"study={path.stem}"], conf_dir(), read_yaml)
    configs = {arm: run_config(study.run_overrides(arm, study.seeds[0])) for arm in study.arms}
    assert {(c.steps, c.mini_batches, c.rollout.rollouts_per_step, c.seed) for c in configs.values()}.__len__() == 1
    assert len({json.dumps(study.run_overrides(a, 0)) for a in study.arms}) == len(study.arms)


def test_study_options_and_refusals():
    study = load_study(["study=gspo_vs_grpo", "study.seeds=[4,5]", "study.arms=[gspo,grpo_r2]", "steps=3"], conf_dir(), read_yaml)
    assert study.runs == [("gspo", 4), ("grpo_r2", 4), ("gspo", 5), ("grpo_r2", 5)]
    assert "steps=3" in study.run_overrides("gspo", 4)
    for args, message in (
        (["study=gspo_v_grpo"], "did you mean 'gspo_vs_grpo'"),
        (["study=gspo_vs_grpo", "study.arms=[gsp]"], "no arm 'gsp'; did you mean 'gspo'"),
        (["study=gspo_vs_grpo", "study.sedes=[1]"], "did you mean 'seeds'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_study(args, conf_dir(), read_yaml)


def test_a_dying_arm_is_a_result_and_does_not_stop_the_others(tmp_path):
    """Real processes, whose model folder does not exist."""
    study = Study(
        "tiny", ("model=local", f"model.path={tmp_path / 'absent'}", "logger=quiet"), {"bad": (), "worse": ("steps=2",)},
        (0,), "bad", str(tmp_path / "runs"),
    )
    lines: list[str] = []
    statuses = run_study(study, lines.append)
    assert [s["status"] for s in statuses] == ["died", "died"]
    assert all("does not exist" in s["reason"] for s in statuses)
    again = run_study(study, lines.append)
    assert again == statuses  # a recorded end is not run again
    assert any("died already" in line for line in lines)


def test_report_is_written_from_whatever_exists(tmp_path):
    study = Study("s", (), {"gspo": (), "grpo": ()}, (0, 1), "grpo", str(tmp_path / "runs"), title="A <study>")
    rng = np.random.default_rng(0)
    for arm, seed in study.runs[:3]:
        folder = study.run_dir(arm, seed)
        folder.mkdir(parents=True)
        rows = [{
            "step": i, "eval/heldout/accuracy": 0.3 + 0.02 * i, "rollout/reward_mean": 0.3 + 0.02 * i,
            "objective/clip_fraction": float(rng.uniform(0.1, 0.2)), "time/step_s": 1.0, "time/update_s": 0.4,
            "rollout/completion_tokens_total": 100.0 * i,
        } for i in range(12)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / "status.json").write_text(json.dumps({"status": "done", "reason": ""}))
    path = write_report(study, tmp_path / "report", "gspo compare study=s")
    text = path.read_text()
    assert "0.520" in text and "not testable" in text and "![" in text
    page = (tmp_path / "report" / "report.html").read_text()
    assert "data:image/png;base64," in page and "A &lt;study&gt;" in page
    with pytest.raises(ValueError, match="has no runs"):
        write_report(Study("s", (), {"a": ()}, (0,), "a", str(tmp_path / "none")), tmp_path / "r2", "x")
