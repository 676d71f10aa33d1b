"""Studies: what runs, what an ended run is called, and what the numbers are judged to show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gspo_dist.cli.main import conf_dir
from gspo_dist.studies.analysis import RunData, collapse_step, estimate, paired
from gspo_dist.studies.claims import judge
from gspo_dist.studies.report import write_report
from gspo_dist.studies.study import Study, load_study


def read_yaml(path: Path):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path))


def run(
    arm: str,
    seed: int,
    heldout: list[float],
    reward: list[float] | None = None,
    status: str = "done",
    **extra,
) -> RunData:
    reward = reward if reward is not None else [0.5] * len(heldout)
    rows = [
        {"step": i, "eval/heldout/accuracy": h, "rollout/reward_mean": r, **dict(extra.items())}
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
    runs = [run("a", s, [v]) for s, v in enumerate((0.3, 0.6, 0.93))] + [
        run("b", s, [v]) for s, v in enumerate((0.2, 0.5, 0.8))
    ]
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
        return [
            run(name, s, [0.3, level + noise[s] * (1 + level)], **{"objective/clip_fraction": clip})
            for s in range(3)
        ]

    runs = [
        *arm("gspo", 0.80, 0.2),
        *arm("gspo_recompute", 0.80, 0.15),
        *arm("gspo_r3", 0.80, 0.15),
        *arm("grpo", 0.60, 0.0013),
        *arm("grpo_r2", 0.70, 0.0013),
        *arm("grpo_r3", 0.72, 0.0013),
    ]
    verdicts = [v.verdict for v in judge(runs)]
    assert verdicts[0] == "reproduced"
    assert verdicts[1] == "reproduced (and learns better)"
    assert verdicts[2] == "reproduced"
    assert verdicts[3] == "reproduced"
    worse = [*arm("gspo", 0.50, 0.2), *arm("gspo_recompute", 0.80, 0.0014), *arm("grpo", 0.60, 0.0013)]
    verdicts = [v.verdict for v in judge(worse)]
    assert verdicts == ["contradicted", "not reproduced", "not testable", "contradicted"]


SIX = {"gspo": 0.8, "gspo_recompute": 0.8, "gspo_r3": 0.8, "grpo": 0.6, "grpo_r2": 0.7, "grpo_r3": 0.72}


def verdicts_of(
    seeds: int = 1, collapsed: tuple[str, ...] = (), absent: tuple[tuple[str, int], ...] = ()
) -> list[str]:
    """Of six arms whose seeds 0, 1, ... end within 0.2 points of SIX; an arm of `collapsed` diverged."""
    noise = (0.0, 0.002, -0.002)
    runs = [
        run(
            arm,
            s,
            [0.3, level + noise[s] * (1 + level)],
            status="diverged" if arm in collapsed else "done",
            **{"objective/clip_fraction": 0.0015 if arm.startswith("grpo") else 0.15},
        )
        for arm, level in SIX.items()
        for s in range(seeds)
        if (arm, s) not in absent
    ]
    return [v.verdict for v in judge(runs)]


def test_one_seed_decides_no_paired_test():
    one = verdicts_of(seeds=1)
    for index in (0, 2, 3):
        assert one[index] == "not testable: one seed that both arms have; at least two are needed"
    assert one[1].startswith("reproduced (whether it learns better is not testable: one seed")
    assert verdicts_of(seeds=2) == [
        "reproduced",
        "reproduced (and learns better)",
        "reproduced",
        "reproduced",
    ]


def test_seeds_count_where_both_arms_have_them():
    """Two seeds of gspo, of grpo only the second: one pair. No arm of grpo's seeds left: none."""
    assert verdicts_of(seeds=2, absent=(("grpo", 0),))[0].startswith("not testable: one seed")
    assert verdicts_of(seeds=2, absent=(("grpo", 0), ("gspo", 1)))[0].startswith("not testable: no seed")


def test_a_collapse_decides_with_one_seed_what_it_can():
    """gspo's own collapse refutes claim 3. grpo's shows its half; that gspo does not end below gspo_r3 stays open."""
    assert verdicts_of(collapsed=("gspo",))[2] == "not reproduced"
    verdicts = verdicts_of(collapsed=("grpo",))
    assert verdicts[2].startswith(
        "half: GRPO needs replay; whether GSPO ends below gspo_r3 is not testable: one seed"
    )
    assert verdicts[0].startswith("not testable")  # claim 1 is a test of accuracies
    assert verdicts_of(seeds=2, collapsed=("grpo",))[2] == "reproduced"


@pytest.mark.parametrize("path", sorted((conf_dir() / "study").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_arm_of_every_study_composes(path):
    from gspo_dist.cli.main import run_config

    study = load_study([f"study={path.stem}"], conf_dir(), read_yaml)
    configs = {arm: run_config(study.run_overrides(arm, study.seeds[0])) for arm in study.arms}
    assert {
        (c.steps, c.mini_batches, c.rollout.rollouts_per_step, c.seed) for c in configs.values()
    }.__len__() == 1
    assert len({json.dumps(study.run_overrides(a, 0)) for a in study.arms}) == len(study.arms)


def test_report_is_written_from_whatever_exists(tmp_path):
    study = Study(
        "s", (), {"gspo": (), "grpo": ()}, (0, 1), "grpo", str(tmp_path / "runs"), title="A <study>"
    )
    rng = np.random.default_rng(0)
    for arm, seed in study.runs[:3]:
        folder = study.run_dir(arm, seed)
        folder.mkdir(parents=True)
        rows = [
            {
                "step": i,
                "eval/heldout/accuracy": 0.3 + 0.02 * i,
                "rollout/reward_mean": 0.3 + 0.02 * i,
                "objective/clip_fraction": float(rng.uniform(0.1, 0.2)),
                "time/step_s": 1.0,
                "time/update_s": 0.4,
                "rollout/completion_tokens_total": 100.0 * i,
            }
            for i in range(12)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / "status.json").write_text(json.dumps({"status": "done", "reason": ""}))
    path = write_report(study, tmp_path / "report", "gspo compare study=s")
    text = path.read_text()
    assert "0.520" in text
    assert "not testable" in text
    assert "![" in text
    page = (tmp_path / "report" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "A &lt;study&gt;" in page
    with pytest.raises(ValueError, match="has no runs"):
        write_report(Study("s", (), {"a": ()}, (0,), "a", str(tmp_path / "none")), tmp_path / "r2", "x")


def test_a_report_of_one_seed_says_why_nothing_is_decided(tmp_path):
    study = Study("s", (), {"gspo": (), "grpo": ()}, (0,), "grpo", str(tmp_path / "runs"))
    for arm, seed in study.runs:
        study.run_dir(arm, seed).mkdir(parents=True)
        rows = [{"step": i, "eval/heldout/accuracy": 0.5, "rollout/reward_mean": 0.5} for i in range(3)]
        (study.run_dir(arm, seed) / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = write_report(study, tmp_path / "report", "x").read_text()
    assert "| not testable: one seed that both arms have; at least two are needed |" in text
