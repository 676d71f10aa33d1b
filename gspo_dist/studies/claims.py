"""The paper's four claims, each with a verdict by a rule on the study's numbers.

A verdict is: reproduced, not reproduced, contradicted, or not testable. The rules stand beside the verdicts
in the report. Arms are found by name: gspo, gspo_recompute, gspo_r3, grpo, grpo_r2, grpo_r3. A missing arm
makes a claim not testable. So do fewer than two seeds where the rule is a paired test: one seed has no spread
to hold a difference against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gspo_dist.studies.analysis import (
    Paired,
    RunData,
    collapse_step,
    estimate,
    final_accuracy,
    mean_reward,
    paired,
)

CLIP = "objective/clip_fraction"
EQUAL_POINTS = 0.05
"""Two arms count as equal in accuracy when the whole 95% interval of their difference lies within this."""


@dataclass(frozen=True)
class Verdict:
    """What a study says about one claim."""

    claim: str
    """The paper's words, in short."""
    rule: str
    """What was asked of the numbers."""
    verdict: str
    """The answer, with its reason where it is no plain yes or no."""
    figures: str
    """The numbers."""


def verdicts_on(runs: Sequence[RunData]) -> list[Verdict]:
    """All four verdicts; runs that died (out of memory, a lost process) are no evidence and left out."""
    runs = [r for r in runs if r.status != "died"]
    return [_stabler(runs), _clips_more(runs), _needs_no_replay(runs), _tolerates_engine(runs)]


def _missing(runs: Sequence[RunData], *arms: str) -> list[str]:
    return [a for a in arms if not any(r.arm == a for r in runs)]


def _no_arms(claim: str, rule: str, missing: Sequence[str]) -> Verdict:
    return Verdict(claim, rule, "not testable", f"no runs of {', '.join(missing)}")


def _too_few_seeds(*tests: Paired) -> str:
    """Why the paired tests decide nothing: the one with the fewest seeds."""
    count = min(test.difference.n for test in tests)
    return f"{'one seed' if count else 'no seed'} that both arms have; at least two are needed"


def _collapsed(runs: Sequence[RunData], arm: str) -> int:
    return sum(collapse_step(r) is not None for r in runs if r.arm == arm)


def _collapses(runs: Sequence[RunData], arm: str) -> str:
    return f"{_collapsed(runs, arm)} of {sum(r.arm == arm for r in runs)}"


def _stabler(runs: Sequence[RunData]) -> Verdict:
    claim = "1. GSPO is stabler and learns more than GRPO at equal cost"
    rule = (
        "final held-out accuracy of gspo above grpo, paired over seeds, p < 0.05; "
        "collapses counted by the stated rule"
    )
    if missing := _missing(runs, "gspo", "grpo"):
        return _no_arms(claim, rule, missing)
    test = paired(runs, "gspo", "grpo", final_accuracy)
    if not test.testable:
        verdict = f"not testable: {_too_few_seeds(test)}"
    elif test.significant:
        verdict = "reproduced" if test.difference.mean > 0 else "contradicted"
    else:
        verdict = "not reproduced"
    reward = paired(runs, "gspo", "grpo", mean_reward)
    figures = (
        f"gspo - grpo: {test.text(100, ' points')}; collapsed: gspo {_collapses(runs, 'gspo')}, "
        f"grpo {_collapses(runs, 'grpo')}; training reward of all steps: {reward.text(100, ' points')}"
    )
    return Verdict(claim, rule, verdict, figures)


def _clip_fraction(runs: Sequence[RunData], arm: str) -> float:
    """Mean over the arm's runs that logged one; nan where none did."""
    return estimate([run.mean(CLIP) for run in runs if run.arm == arm]).mean


def _clips_more(runs: Sequence[RunData]) -> Verdict:
    claim = "2. GSPO clips about two orders of magnitude more tokens, and learns better all the same"
    rule = "mean clip fraction of gspo_recompute over that of grpo at least 30 (one and a half orders)"
    if missing := _missing(runs, "gspo_recompute", "grpo"):
        return _no_arms(claim, rule, missing)
    # The recomputed arm, because what the engine's log-probs clip before any learning is not the
    # paper's subject.
    gspo, grpo, engine = (_clip_fraction(runs, arm) for arm in ("gspo_recompute", "grpo", "gspo"))
    for arm, fraction in (("gspo_recompute", gspo), ("grpo", grpo)):
        if math.isnan(fraction):
            return Verdict(claim, rule, f"not testable: {arm} logged no clip fraction", "")
    without = math.inf if gspo > 0 else 1.0  # where neither clips, they are equal
    ratio = gspo / grpo if grpo > 0 else without
    test = paired(runs, "gspo_recompute", "grpo", final_accuracy)
    if not test.testable:
        better = f"whether it learns better is not testable: {_too_few_seeds(test)}"
    elif test.significant and test.difference.mean > 0:
        better = "and learns better"
    else:
        better = "without learning measurably better"
    verdict = f"reproduced ({better})" if ratio >= 30 else "not reproduced"
    figures = (
        f"gspo_recompute {gspo:.3g}, grpo {grpo:.3g}: ratio {ratio:.3g}"
        + ("" if math.isnan(engine) else f"; gspo on engine log-probs {engine:.3g}")
        + f"; accuracy {test.text(100, ' points')}"
    )
    return Verdict(claim, rule, verdict, figures)


def _needs_replay(collapsed: bool, *replayed: Paired) -> bool | None:
    """Whether an arm needs replay: it collapsed, or ends below one of its replayed siblings.

    None where no collapse decides and a test has too few seeds.
    """
    if collapsed or any(test.significant and test.difference.mean > 0 for test in replayed):
        return True
    return False if all(test.testable for test in replayed) else None


def _needs_no_replay(runs: Sequence[RunData]) -> Verdict:
    claim = "3. On MoE models GRPO needs Routing Replay to converge, GSPO needs none"
    rule = (
        "grpo without replay collapses or ends below grpo_r2 or grpo_r3 (paired, p < 0.05), "
        "while gspo neither collapses nor ends below gspo_r3"
    )
    if missing := _missing(runs, "grpo", "grpo_r2", "grpo_r3", "gspo", "gspo_r3"):
        return _no_arms(claim, rule, missing)
    r2, r3 = (paired(runs, arm, "grpo", final_accuracy) for arm in ("grpo_r2", "grpo_r3"))
    own = paired(runs, "gspo_r3", "gspo", final_accuracy)
    grpo = _needs_replay(_collapsed(runs, "grpo") > 0, r2, r3)
    gspo = _needs_replay(_collapsed(runs, "gspo") > 0, own)
    if gspo:
        verdict = "not reproduced"
    elif grpo is None or (gspo is None and not grpo):
        verdict = f"not testable: {_too_few_seeds(r2, r3, own)}"
    elif gspo is None:
        why = _too_few_seeds(own)
        verdict = f"half: GRPO needs replay; whether GSPO ends below gspo_r3 is not testable: {why}"
    elif grpo:
        verdict = "reproduced"
    else:
        verdict = "half: GSPO needs no replay; GRPO did not need it here either"
    figures = (
        f"over grpo: r2 {r2.text(100, ' points')}, r3 {r3.text(100, ' points')}; gspo_r3 over gspo "
        f"{own.text(100, ' points')}; collapsed: grpo {_collapses(runs, 'grpo')}, "
        f"gspo {_collapses(runs, 'gspo')}"
    )
    return Verdict(claim, rule, verdict, figures)


def _tolerates_engine(runs: Sequence[RunData]) -> Verdict:
    claim = "4. GSPO can train on the inference engine's own likelihoods, without recomputing them"
    margin = f"±{100 * EQUAL_POINTS:.0f} points"
    rule = f"95% interval of gspo - gspo_recompute in final held-out accuracy within {margin}"
    if missing := _missing(runs, "gspo", "gspo_recompute"):
        return _no_arms(claim, rule, missing)
    test = paired(runs, "gspo", "gspo_recompute", final_accuracy)
    d = test.difference
    low, high = d.mean - d.half_width, d.mean + d.half_width
    if not test.testable:
        verdict = f"not testable: {_too_few_seeds(test)}"
    elif low >= -EQUAL_POINTS and high <= EQUAL_POINTS:
        verdict = "reproduced"
    elif high < 0:
        verdict = "contradicted"
    else:
        verdict = "not shown: the interval is wider than the margin"
    saved = estimate(
        [r.mean("time/old_logprobs_s") / r.mean("time/step_s") for r in runs if r.arm == "gspo_recompute"]
    )
    offset = estimate([r.mean("guard/offset_clip_widths") for r in runs if r.arm == "gspo"])
    figures = (
        f"gspo - gspo_recompute: {test.text(100, ' points')}; recomputation's share of a recomputing step: "
        f"{saved.text('{:.1%}')}; offset of engine log-probs in clip widths: {offset.text('{:+.2f}')}"
    )
    return Verdict(claim, rule, verdict, figures)
