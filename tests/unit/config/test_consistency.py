"""What `learner.consistency=exact` is refused with, each by its own rule."""

from __future__ import annotations

import pytest

from gspo_dist.config import DeepSpeedConfig, LearnerConfig, RolloutConfig
from gspo_dist.config.consistency import (
    EXACT_RULES,
    REFUSED_FAMILIES,
    check_consistency,
    check_device,
    format_rules,
)

LEARNER = {"backend": "deepspeed", "precision": "bf16", "fp32_head": False, "consistency": "exact"}
ROLLOUT = {"precision": "bf16", "enforce_eager": True}


def check(learner=None, rollout=None):
    check_consistency(
        LearnerConfig(**{**LEARNER, **(learner or {})}), RolloutConfig(**{**ROLLOUT, **(rollout or {})})
    )


def test_what_can_be_equal_is_accepted():
    check()
    check({"backend": "eager"})
    check({"precision": "fp32", "fp32_head": True}, {"precision": "fp32"})


@pytest.mark.parametrize(
    ("learner", "rollout", "says"),
    [
        ({"backend": "megatron"}, {}, r"megatron.*got megatron; use learner=eager or"),
        (
            {"world_size": 2, "deepspeed": DeepSpeedConfig(expert_parallel=2)},
            {},
            r"got 2; set learner.deepspeed.expert_parallel=1",
        ),
        ({}, {"engine": "reference"}, r"got reference; use rollout=vllm"),
        ({}, {"precision": "fp32"}, r"got bf16 and fp32; give"),
        ({}, {"tensor_parallel": 2}, r"got 2; set rollout.tensor_parallel=1"),
        ({}, {"enforce_eager": False}, r"got False; set rollout.enforce_eager=true"),
        ({"activation_checkpointing": True}, {}, r"got True; set learner.activation_checkpointing=false"),
        ({"precision": "fp16"}, {"precision": "fp16"}, r"got fp16; use bf16 or fp32"),
        ({"fp32_head": True}, {}, r"got fp32_head True in bf16; set learner.fp32_head=false"),
    ],
)
def test_each_rule_refuses_by_name_with_the_way_out(learner, rollout, says):
    with pytest.raises(
        ValueError, match=rf"^learner.consistency=exact is refused with .*{says}.*consistency=off$"
    ):
        check(learner, rollout)
    check({**learner, "consistency": "off"}, rollout)


def test_a_gpu_is_refused_unless_it_is_insisted_on():
    exact = LearnerConfig(**LEARNER)
    check_device(exact, "cpu")
    check_device(LearnerConfig(**{**LEARNER, "consistency": "off"}), "cuda")
    with pytest.raises(
        ValueError,
        match=r"^learner.consistency=exact is refused with cluster.device=cuda: .* one card, an H100 .*; got "
        r"device cuda; .*learner.exact_on_gpu=true, .*or learner.consistency=off$",
    ):
        check_device(exact, "cuda")
    check_device(LearnerConfig(**{**LEARNER, "exact_on_gpu": True}), "cuda")
    whole = {**LEARNER, "exact_on_gpu": True, "deepspeed": DeepSpeedConfig(zero_stage=3)}
    with pytest.raises(ValueError, match=r"got learner.deepspeed.zero_stage 3; set it to 2"):
        check_device(LearnerConfig(**whole), "cuda")
    check_device(LearnerConfig(**{**whole, "backend": "eager"}), "cuda")


def test_every_rule_is_printed_once():
    text = format_rules()
    assert len(EXACT_RULES) == 9
    assert text.count("Way out:") == 10  # and what a device decides
    assert "- cluster.device=cuda: " in text
    assert all(rule.reason in text for rule in EXACT_RULES)
    assert all(f"- {name}: it has {reason}." in text for name, reason in REFUSED_FAMILIES.items())
