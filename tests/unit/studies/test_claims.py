"""The four verdicts follow their rules."""

from __future__ import annotations

import pytest

from gspo_dist.studies.claims import verdicts_on

SIX = {"gspo": 0.8, "gspo_recompute": 0.8, "gspo_r3": 0.8, "grpo": 0.6, "grpo_r2": 0.7, "grpo_r3": 0.72}


@pytest.fixture
def arm(make_run):
    """Runs of an arm whose seeds end near `level`."""

    def make(name, level, clip, seeds=3, status="done"):
        noise = (0.0, 0.003, -0.003)
        metrics = {"objective/clip_fraction": clip}
        return [
            make_run(name, s, [0.3, level + noise[s] * (1 + level)], status=status, **metrics)
            for s in range(seeds)
        ]

    return make


@pytest.fixture
def verdicts_of(arm):
    """Verdicts on arms that end near SIX; arms of `collapsed` diverged, runs of `absent` are missing."""

    def make(seeds=1, collapsed=(), absent=(), status="done"):
        runs = [
            run
            for name, level in SIX.items()
            for run in arm(
                name,
                level,
                0.0015 if name.startswith("grpo") else 0.15,
                seeds,
                "diverged" if name in collapsed else status,
            )
            if (name, run.seed) not in absent
        ]
        return [verdict.verdict for verdict in verdicts_on(runs)]

    return make


def test_claims_follow_the_numbers(arm, verdicts_of):
    assert verdicts_of(seeds=3) == [
        "reproduced",
        "reproduced (and learns better)",
        "reproduced",
        "reproduced",
    ]
    worse = [*arm("gspo", 0.50, 0.2), *arm("gspo_recompute", 0.80, 0.0014), *arm("grpo", 0.60, 0.0013)]
    verdicts = [verdict.verdict for verdict in verdicts_on(worse)]
    assert verdicts == ["contradicted", "not reproduced", "not testable", "contradicted"]


def test_the_ratio_of_clipping_is_held_to_thirty(arm):
    for clip, verdict in (
        (0.0299, "not reproduced"),
        (0.0301, "reproduced (without learning measurably better)"),
    ):
        runs = [*arm("gspo_recompute", 0.6, clip), *arm("grpo", 0.6, 0.001)]
        assert verdicts_on(runs)[1].verdict == verdict


def test_no_clip_fraction_proves_no_ratio(make_run, arm):
    """A run that diverged in its first step logged none: it says nothing, and alone it decides nothing."""
    gspo = arm("gspo_recompute", 0.6, 0.3)
    silent = [make_run("grpo", seed, [0.6], status="diverged") for seed in range(3)]
    assert verdicts_on([*gspo, *silent])[1].verdict == "not testable: grpo logged no clip fraction"
    others = arm("grpo", 0.6, 0.001)[1:]
    assert verdicts_on([*gspo, silent[0], *others])[1].figures.startswith(
        "gspo_recompute 0.3, grpo 0.001: ratio 300;"
    )


def test_where_nothing_is_clipped_nothing_is_reproduced(arm):
    runs = [*arm("gspo_recompute", 0.6, 0.0), *arm("grpo", 0.6, 0.0)]
    assert verdicts_on(runs)[1].verdict == "not reproduced"
    runs = [*arm("gspo_recompute", 0.6, 0.1), *arm("grpo", 0.6, 0.0)]
    assert verdicts_on(runs)[1].verdict.startswith("reproduced")


def test_equality_is_held_to_five_points_for_the_whole_interval(make_run):
    """Differences of -1 and +1 points: s = 1.414, half width 12.706 * 1.414 / sqrt(2) = 12.7 points."""

    def runs(*differences):
        pairs = enumerate(differences)
        return [
            r
            for s, d in pairs
            for r in (make_run("gspo", s, [0.5 + d]), make_run("gspo_recompute", s, [0.5]))
        ]

    assert verdicts_on(runs(0.0, 0.0, 0.0))[3].verdict == "reproduced"
    assert verdicts_on(runs(-0.01, 0.01))[3].verdict == "not shown: the interval is wider than the margin"
    assert verdicts_on(runs(-0.1, -0.1, -0.1))[3].verdict == "contradicted"


def test_one_seed_decides_no_paired_test(verdicts_of):
    one = verdicts_of(seeds=1)
    for index in (0, 2, 3):
        assert one[index] == "not testable: one seed that both arms have; at least two are needed"
    assert one[1].startswith("reproduced (whether it learns better is not testable: one seed")
    assert verdicts_of(seeds=2)[0] == "reproduced"


def test_seeds_count_where_both_arms_have_them(verdicts_of):
    """Two seeds of gspo, of grpo only the second: one pair. No seed left that both have: none."""
    assert verdicts_of(seeds=2, absent=(("grpo", 0),))[0].startswith("not testable: one seed")
    assert verdicts_of(seeds=2, absent=(("grpo", 0), ("gspo", 1)))[0].startswith("not testable: no seed")


def test_a_collapse_decides_with_one_seed_what_it_can(verdicts_of):
    """gspo's own collapse refutes claim 3. grpo's shows half of it; gspo against gspo_r3 stays open."""
    assert verdicts_of(collapsed=("gspo",))[2] == "not reproduced"
    verdicts = verdicts_of(collapsed=("grpo",))
    assert verdicts[2].startswith(
        "half: GRPO needs replay; whether GSPO ends below gspo_r3 is not testable: one seed"
    )
    assert verdicts[0].startswith("not testable")  # claim 1 is a test of accuracies
    assert verdicts_of(seeds=2, collapsed=("grpo",))[2] == "reproduced"


def test_every_verdict_stands_beside_its_claim_and_its_rule(arm):
    """With all arms, and with none: the claims are numbered, and a rule says what is asked."""
    runs = [run for name, level in SIX.items() for run in arm(name, level, 0.1)]
    for verdicts in (verdicts_on(runs), verdicts_on([])):
        assert [verdict.claim[:2] for verdict in verdicts] == ["1.", "2.", "3.", "4."]
        for verdict, word in zip(
            verdicts, ("p < 0.05", "at least 30", "collapses", "±5 points"), strict=True
        ):
            assert word in verdict.rule
    assert verdicts_on([])[0].figures == "no runs of gspo, grpo"


def test_equal_arms_reproduce_nothing_and_contradict_nothing(arm):
    """No difference in any seed: p = 1 for accuracy, and the interval is within the margin."""
    runs = [run for name in SIX for run in arm(name, 0.7, 0.1)]
    assert [verdict.verdict for verdict in verdicts_on(runs)] == [
        "not reproduced",
        "not reproduced",
        "half: GSPO needs no replay; GRPO did not need it here either",
        "reproduced",
    ]


def test_one_test_without_seeds_leaves_claim_3_open(arm):
    """GSPO needs no replay, and neither does GRPO by r3; r2 has one seed, so it might."""
    runs = [r for name in SIX for r in arm(name, 0.7, 0.1) if not (name == "grpo_r2" and r.seed)]
    assert verdicts_on(runs)[2].verdict.startswith("not testable: one seed")


def test_learning_better_takes_more_than_a_higher_mean(make_run):
    """Differences of -10 and +20 points: a mean of +5 and p = 0.8."""
    clip = "objective/clip_fraction"
    runs = []
    for seed, accuracy in enumerate((0.4, 0.7)):
        runs += [
            make_run("gspo_recompute", seed, [accuracy], **{clip: 0.3}),
            make_run("grpo", seed, [0.5], **{clip: 0.001}),
        ]
    assert verdicts_on(runs)[1].verdict == "reproduced (without learning measurably better)"


def test_the_clip_fraction_of_engine_log_probs_is_quoted_where_there_is_one(arm):
    runs = [*arm("gspo_recompute", 0.6, 0.3), *arm("grpo", 0.6, 0.002)]
    assert "engine log-probs" not in verdicts_on(runs)[1].figures
    figures = verdicts_on([*runs, *arm("gspo", 0.6, 0.4)])[1].figures
    assert figures.startswith(
        "gspo_recompute 0.3, grpo 0.002: ratio 150; gspo on engine log-probs 0.4; accuracy"
    )


def test_runs_that_died_are_no_evidence(verdicts_of):
    assert verdicts_of(seeds=3, status="died") == ["not testable"] * 4


def test_the_offset_that_is_quoted_is_the_guards(make_run):
    runs = [make_run("gspo", s, [0.5], **{"guard/offset_clip_widths": 1.5}) for s in range(2)]
    runs += [make_run("gspo_recompute", s, [0.5]) for s in range(2)]
    assert "offset of engine log-probs in clip widths: +1.50 ± 0.00" in verdicts_on(runs)[3].figures
