"""Which staleness settings are refused, and what legal ones mean on older policies' tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_dist.config import ObjectiveConfig
from gspo_dist.config.objective import CorrectionConfig, StalenessConfig
from gspo_dist.objectives import age_rules
from gspo_dist.objectives.offset import GuardConfig


def objective(name="gspo", *, correction="none", guard="warn", replay="none", **knobs):
    own = ("old_logprobs", "params", "allow_wide_clip")
    rest = {k: knobs.pop(k) for k in list(knobs) if k in own}
    return ObjectiveConfig(
        name=name,
        correction=CorrectionConfig(correction),
        guard=GuardConfig(action=guard),
        routing_replay=replay,
        staleness=StalenessConfig(**knobs),
        **rest,
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"recentre": True, "old_logprobs": "recompute"},
            r"every ratio at 1 .* got recentre=true, clip_spreads=0",
        ),
        ({"clip_spreads": 2.0, "old_logprobs": "recompute"}, r"got recentre=false, clip_spreads=2 and old"),
        ({"recentre": True, "guard": "recentre"}, r"both would take an offset .* set that to warn"),
        ({"name": "sapo", "recentre": True, "guard": "off"}, r"needs a clip.* for sapo; set recentre=false"),
        ({"name": "grpo", "clip_spreads": 2.0}, r"clip on a sequence ratio .* for grpo; set clip_spreads=0"),
        ({"name": "my.module:loss", "clip_spreads": 2.0, "guard": "off"}, r"clip on a sequence ratio"),
        (
            {"clip_spreads": 2.0, "clip_max": 0.02},
            r"clip_max lies between .* got clip_max=0\.02 and clip_high=0\.0004",
        ),
        ({"clip_spreads": 2.0, "clip_max": 3e-4}, r"got clip_max=0\.0003 and clip_high=0\.0004; try 0\.01"),
        ({"clip_spreads": -1.0}, r"clip_spreads must be at least 0"),
        ({"clip_max": 0.0}, r"clip_max must be above 0"),
    ],
)
def test_staleness_settings_that_mean_nothing_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        objective(**kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"recentre": True, "clip_spreads": 2.0},
        {"recentre": True, "guard": "recompute"},
        {"clip_spreads": 2.0, "guard": "recentre"},
        {"clip_spreads": 2.0, "clip_max": 0.05, "allow_wide_clip": True},
        {"name": "grpo", "recentre": True},
        {"name": "my.module:loss", "recentre": True, "guard": "off"},
        {"clip_max": 0.5, "old_logprobs": "recompute"},  # it is off: nothing follows
    ],
)
def test_legal_staleness_settings_pass(kwargs):
    objective(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({}, {"the clip sees the age", "the guard rests on fresh tokens"}),
        ({"old_logprobs": "recompute"}, {"the ratio ignores the age"}),
        ({"old_logprobs": "recompute", "correction": "geometric_truncate"}, {"the decoupled objective"}),
        (
            {"old_logprobs": "recompute", "correction": "geometric_reject"},
            {"sequences are dropped for their age"},
        ),
        ({"name": "sapo", "guard": "off"}, set()),
        ({"name": "sapo", "guard": "off", "replay": "r3"}, {"routes of their own moment"}),
    ],
)
def test_what_a_legal_combination_means_on_older_tokens_is_said(kwargs, names):
    c = objective(**kwargs)
    found = age_rules.notes(
        c.name,
        old_logprobs=c.old_logprobs,
        routing_replay=c.routing_replay,
        correction=c.correction.name,
        guard_action=c.guard.action,
    )
    assert {note.name for note in found} == names


def test_the_readme_shows_the_rules_as_they_are_printed():
    readme = (Path(__file__).parents[3] / "gspo_dist" / "objectives" / "README.md").read_text()
    for paragraph in age_rules.format_rules().split("\n\n"):
        assert paragraph.strip() in readme, "objectives/README.md is behind `gspo legality`: paste its output"


def test_the_printed_notes_name_only_combinations_that_are_legal():
    text = age_rules.format_rules()
    assert (
        "the ratio ignores the age (old_logprobs recompute; correction none; guard_action off, warn)" in text
    )
    assert all(note.meaning in text for note in age_rules.NOTES)
