"""Published defaults, and the ranges of parameters and corrections."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gspo_dist.cli.compose import run_config
from gspo_dist.config import ObjectiveConfig
from gspo_dist.objectives.specs import (
    CORRECTIONS,
    OBJECTIVE_SPECS,
    ObjectiveSpec,
    check_clip,
    check_correction,
    check_params,
    resolve_params,
)


def test_published_defaults():
    got = {name: (o.aggregation, o.advantage, o.defaults) for name, o in OBJECTIVE_SPECS.items()}
    assert got["gspo"] == ("sequence_mean", "group_std", {"clip_low": 3e-4, "clip_high": 4e-4})
    assert got["grpo"] == (
        "sequence_mean",
        "group_std",
        {"clip_low": 0.2, "clip_high": 0.27, "dual_clip": None},
    )
    assert got["dapo"] == ("token_mean", "group_std", {"clip_low": 0.2, "clip_high": 0.28})
    assert got["dr_grpo"][:2] == ("constant_length", "group_mean")
    assert got["minirl"] == ("sequence_sum", "group_mean", {"clip_low": 0.2, "clip_high": 0.27})
    assert got["sapo"][2] == {"tau_positive": 1.0, "tau_negative": 1.05}


def test_default_advantages():
    assert [ObjectiveConfig(name=n).advantage_name for n in ("gspo", "dr_grpo", "reinforce", "a.b:c")] == [
        "group_std",
        "group_mean",
        "leave_one_out",
        None,  # a user's own brings its own
    ]
    assert ObjectiveConfig(name="a.b:c", advantage="none").advantage_name == "none"


def test_every_published_default_passes_its_own_checks_and_names_its_source():
    for name, spec in OBJECTIVE_SPECS.items():
        check_params(name, spec.defaults, clip=spec.clip)
        assert spec.source.startswith("arXiv ")
        assert spec.aggregation in spec.aggregations
    for name in CORRECTIONS:
        assert check_correction(name) == CORRECTIONS[name]


@pytest.mark.parametrize(
    ("low", "high", "log_space", "message"),
    [
        (0.0, 0.1, False, r"mine\.clip_low must be > 0, a distance from ratio 1: got 0$"),
        (0.1, -0.1, True, r"mine\.clip_high must be > 0"),
        (1.5, 2.0, False, r"mine\.clip_low must be <= 1, the ratio is never negative: got 1\.5"),
        (0.5, 1.9, False, r"distances, not bounds: got 0\.5 and 1\.9.*give clip_low=0\.5, clip_high=0\.9"),
        (0.3, 0.2, False, "they look swapped"),
        (True, 0.2, False, r"mine\.clip_low must be a finite number: got True"),
        (None, 0.2, False, r"mine\.clip_low must be a finite number: got None"),
        (0.2, math.inf, False, r"mine\.clip_high must be a finite number: got inf"),
    ],
)
def test_bad_clips_name_owner_and_field(low, high, log_space, message):
    with pytest.raises(ValueError, match=message):
        check_clip("mine", low, high, log_space=log_space)


@pytest.mark.parametrize(
    ("low", "high", "log_space"),
    [
        (0.2, 0.2, False),
        (1.0, 0.2, False),
        (0.49, 1.5, False),
        (0.6, 2.0, False),
        (1.0, 1.5, False),
        (2.0, 0.5, True),
    ],
)
def test_clips_on_the_edge_pass(low, high, log_space):
    check_clip("mine", low, high, log_space=log_space)


def test_a_clip_is_checked_only_where_the_spec_has_one():
    params = {"clip_low": -1.0, "clip_high": 2.0}
    check_params("mine", params, clip=None)
    for clip in ("ratio", "log"):
        with pytest.raises(ValueError, match="clip_low must be > 0"):
            check_params("mine", params, clip=clip)


def test_dual_clip_lies_above_the_upper_bound():
    check_params("grpo", {"clip_low": 0.2, "clip_high": 0.5, "dual_clip": 1.51}, clip="ratio")
    with pytest.raises(ValueError, match=r"dual_clip must be > 1 \+ clip_high = 1\.5: got 1\.5; usual is 3"):
        check_params("grpo", {"clip_low": 0.2, "clip_high": 0.5, "dual_clip": 1.5}, clip="ratio")
    with pytest.raises(ValueError, match=r"dual_clip must be > 1 \+ clip_high = 1: got 0\.9"):
        check_params("mine", {"dual_clip": 0.9}, clip="ratio")  # a user's objective without clip_high


def test_taus_are_positive():
    for field in ("tau_positive", "tau_negative"):
        with pytest.raises(ValueError, match=f"sapo.{field} must be > 0: got 0"):
            check_params("sapo", {"tau_positive": 1.0, "tau_negative": 1.0, field: 0}, clip=None)


def test_params_overlay_the_defaults():
    assert resolve_params("mine", {"a": 1, "b": 2}, {"b": 3}) == {"a": 1, "b": 3}
    with pytest.raises(ValueError, match="mine has no parameter 'bb'; did you mean 'b'"):
        resolve_params("mine", {"a": 1, "b": 2}, {"bb": 3})


def test_bounds_of_a_correction_overlay_its_defaults():
    assert check_correction("token_mask", high=3.0) == {"low": 0.5, "high": 3.0}
    assert check_correction("token_mask", low=1.0, high=1.0) == {"low": 1.0, "high": 1.0}
    assert check_correction("opsm", high=0.5) == {"high": 0.5}  # a drift in nats: need not accept the ratio 1
    assert check_correction("veto", low=0.0) == {"low": 0.0}
    with pytest.raises(ValueError, match="token_truncate: low must be >= 0 and high > 0"):
        check_correction("token_truncate", high=0.0)
    with pytest.raises(ValueError, match="opsm: low must be >= 0 and high > 0"):
        check_correction("opsm", high=-1e-3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"aggregation": "seq_mean"}, "objective mine: aggregation.*did you mean 'sequence_mean'"),
        ({"aggregation": "token_mean", "advantage": "gae"}, "objective mine: advantage"),
        ({"aggregation": "token_mean", "clip": "none"}, "objective mine: clip.*known: ratio, log"),
    ],
)
def test_a_spec_checks_its_names(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveSpec("mine", **kwargs)


@pytest.mark.parametrize("name", OBJECTIVE_SPECS)
def test_a_configuration_file_holds_the_published_values(name):
    config = run_config([f"objective={name}", "learner=eager"]).objective  # which serves them all
    assert config.name == name
    assert {**OBJECTIVE_SPECS[name].defaults, **config.params} == OBJECTIVE_SPECS[name].defaults


def test_the_readme_lists_every_objective_with_what_is_fixed_about_it():
    readme = (Path(__file__).parents[3] / "gspo_dist" / "objectives" / "README.md").read_text()
    table = readme.split("## The objectives")[1].split("\n\n")[2]
    rows = {row.split(" | ")[0].strip("| "): row for row in table.splitlines()[2:]}
    assert list(rows) == list(OBJECTIVE_SPECS)
    for name, spec in OBJECTIVE_SPECS.items():
        parameters = ", ".join(f"{k} off" if v is None else f"{k} {v:g}" for k, v in spec.defaults.items())
        told = f" | {spec.aggregation} | {spec.advantage} | {parameters or '-'} | {spec.source} |"
        assert rows[name].endswith(told)
