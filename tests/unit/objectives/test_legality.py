"""Which settings go together: the rules, the table, and what README shows of it."""

from __future__ import annotations

import itertools
import math
import re
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest

from gspo_dist.objectives import legality


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (
            {"objective": "grpo", "old_logprobs": "rollout", "routing_replay": "r2"},
            ["nothing is recorded", "r3"],
        ),
        (
            {"objective": "grpo", "old_logprobs": "rollout", "correction": "token_truncate"},
            ["every weight is 1"],
        ),
        (
            {"objective": "gspo", "old_logprobs": "recompute", "guard_action": "recentre"},
            ["zero by construction"],
        ),
        (
            {"objective": "gspo", "old_logprobs": "recompute", "guard_action": "recompute"},
            ["zero by construction"],
        ),
        ({"objective": "sapo", "old_logprobs": "rollout", "guard_action": "recentre"}, ["no clip"]),
        ({"objective": "gspo", "correction": "sequence_truncate"}, ["exp(sum)", "geometric_reject"]),
        ({"objective": "rspo", "correction": "sequence_mask"}, ["exp(sum)", "geometric_reject"]),
        ({"objective": "luspo", "correction": "sequence_mask"}, ["exp(sum)", "geometric_reject"]),
        (
            {"objective": "vespo", "correction": "token_truncate"},
            ["itself the weight", "old_logprobs=rollout"],
        ),
        (
            {"objective": "vespo", "correction": "geometric_truncate"},
            ["itself the weight", "geometric_reject"],
        ),
        (
            {"objective": "rspo", "old_logprobs": "rollout"},
            ["router probabilities", "old_logprobs=recompute"],
        ),
        ({"objective": "m2po", "old_logprobs": "rollout", "guard_action": "recentre"}, ["no clip"]),
        ({"objective": "dppo_tv", "old_logprobs": "rollout", "guard_action": "recompute"}, ["no clip"]),
        ({"objective": "luspo", "aggregation": "sequence_mean"}, ["weighs a sequence", "sequence_sum"]),
        (
            {"objective": "score_centering", "old_logprobs": "recompute", "correction": "token_truncate"},
            ["a weight on the sampled token alone", "geometric_reject"],
        ),
        ({"objective": "vespo", "aggregation": "sequence_mean"}, ["weighs a sequence", "constant_length"]),
        (
            {"objective": "luspo", "params": {"clip_low": 0.2, "clip_high": 0.28}},
            ["never binds", "allow_wide"],
        ),
        (
            {"objective": "gspo", "aggregation": "token_mean"},
            ["weighs a sequence by its length", "sequence_mean"],
        ),
        (
            {"objective": "gspo", "params": {"clip_low": 0.2, "clip_high": 0.28}},
            ["never binds", "allow_wide_clip"],
        ),
        ({"objective": "gspo_token", "params": {"clip_high": 0.02}}, ["never binds", "3e-4"]),
        ({"objective": "gspo", "old_logprobs": "engine"}, ["old_logprobs", "rollout, recompute"]),
        ({"objective": "gspo", "routing_replay": "r4"}, ["routing_replay", "none, r2, r3"]),
        ({"objective": "gsop"}, ["did you mean 'gspo'"]),
        ({"objective": "gspo", "params": {"clip_lo": 1e-4}}, ["clip_lo", "did you mean 'clip_low'"]),
        ({"objective": "gspo", "advantage": "gae"}, ["advantage", "group_std"]),
        (
            {"objective": "my.module:loss", "old_logprobs": "rollout", "routing_replay": "r2"},
            ["nothing is recorded"],
        ),
    ],
)
def test_illegal_combinations_are_refused_with_reason_and_way_out(kwargs, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        legality.check(**kwargs)
    assert words[-1] in str(error.value)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"objective": "gspo", "old_logprobs": "rollout", "routing_replay": "r3", "guard_action": "recentre"},
        {"objective": "gspo", "old_logprobs": "rollout", "guard_action": "recompute"},
        {"objective": "gspo", "old_logprobs": "recompute", "routing_replay": "r2", "guard_action": "warn"},
        {"objective": "gspo", "params": {"clip_low": 0.2, "clip_high": 0.28}, "allow_wide_clip": True},
        {"objective": "grpo", "routing_replay": "r2", "correction": "sequence_mask"},
        {"objective": "gmpo", "params": {"clip_low": 0.4, "clip_high": 0.4}},
        {"objective": "gspo", "old_logprobs": "rollout", "correction": "opsm"},
        {"objective": "vespo", "old_logprobs": "recompute", "correction": "geometric_reject"},
        {"objective": "vespo", "old_logprobs": "rollout", "aggregation": "sequence_sum"},
        {"objective": "dppo_kl", "old_logprobs": "recompute", "correction": "token_truncate"},
        {"objective": "grpo", "aggregation": "token_mean"},
        {"objective": "my.module:loss", "params": {"anything": 1}},
    ],
)
def test_legal_combinations_pass(kwargs):
    legality.check(**kwargs)


def test_the_printed_table_the_rows_and_check_say_the_same():
    rows = legality.table()
    assert len(rows) == math.prod(len(values) for values in legality.AXES.values())
    verdict = {row.combination: row.rule for row in rows}
    for combination, rule in verdict.items():
        refused = nullcontext() if rule is None else pytest.raises(ValueError, match=f"^{rule.name}: ")
        with refused:
            legality.check(**asdict(combination))
    covered = {}
    for box, rule in legality.collapsed():
        for values in itertools.product(*box.values()):
            combination = legality.Combination(**dict(zip(box, values, strict=True)))
            assert combination not in covered
            covered[combination] = rule
    assert covered == verdict
    assert len(legality.format_table().split("verdict |\n")[1].splitlines()) == len(legality.collapsed()) + 1


def test_two_broken_rules_are_both_reported():
    with pytest.raises(ValueError, match=r"^r2 needs recompute: ") as error:
        legality.check("gspo", old_logprobs="rollout", routing_replay="r2", correction="veto")
    first, second = str(error.value).splitlines()
    assert "got routing_replay=r2, old_logprobs=rollout; set old_logprobs=recompute" in first
    assert second.startswith("correction needs recompute: ")
    assert "got correction=veto, old_logprobs=rollout; set correction=none" in second


def test_the_readme_shows_the_legality_table_as_it_is_printed():
    readme = (Path(__file__).parents[3] / "gspo_dist" / "objectives" / "README.md").read_text()
    for paragraph in legality.format_table().split("\n\n"):
        assert paragraph.strip() in readme, "objectives/README.md is behind `gspo legality`: paste its output"
