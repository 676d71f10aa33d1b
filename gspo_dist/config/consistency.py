"""What `learner.consistency=exact` cannot make equal, and why: a table of rules over the configuration.

A rule is here when something in the forward adds numbers in another order than the engine does. Nothing is
approximated in silence: a run that breaks a rule is refused before anything starts. What only the model
folder or the processor can tell is checked when the learner is built (`learners/exact/install.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gspo_dist.config.learner import LearnerConfig
from gspo_dist.config.rollout import RolloutConfig


@dataclass(frozen=True)
class ExactRule:
    """One thing that stands against equal log-probs."""

    name: str
    """The knobs concerned."""
    reason: str
    """Where the numbers part."""
    way_out: str
    """What to set instead."""
    got: Callable[[LearnerConfig, RolloutConfig], object]
    """What the message shows."""
    broken: Callable[[LearnerConfig, RolloutConfig], bool]
    """Whether a run breaks it."""


EXACT_RULES: tuple[ExactRule, ...] = (
    ExactRule(
        "learner.backend=megatron",
        "megatron-core's layers are its own, and the engine's operators do not fit into them",
        "use learner=eager or learner=deepspeed",
        lambda learner, rollout: learner.backend,
        lambda learner, rollout: learner.backend == "megatron",
    ),
    ExactRule(
        "learner.deepspeed.expert_parallel > 1",
        "ranks that share experts add their parts in another order than the engine's one kernel",
        "set learner.deepspeed.expert_parallel=1",
        lambda learner, rollout: learner.deepspeed.expert_parallel,
        lambda learner, rollout: learner.backend == "deepspeed" and learner.deepspeed.expert_parallel > 1,
    ),
    ExactRule(
        "rollout.engine=reference",
        "the reference engine recomputes every prefix with transformers, not with vLLM's kernels",
        "use rollout=vllm",
        lambda learner, rollout: rollout.engine,
        lambda learner, rollout: rollout.engine != "vllm",
    ),
    ExactRule(
        "rollout.precision",
        "two precisions are two roundings",
        "give learner.precision and rollout.precision one value",
        lambda learner, rollout: f"{learner.precision} and {rollout.precision}",
        lambda learner, rollout: learner.precision != rollout.precision,
    ),
    ExactRule(
        "learner.precision=fp16",
        "the engine's operators were compared in fp32 and bf16 alone",
        "use bf16 or fp32",
        lambda learner, rollout: learner.precision,
        lambda learner, rollout: learner.precision == "fp16",
    ),
    ExactRule(
        "rollout.tensor_parallel > 1",
        "ranks of an engine add their parts of a product in another order than one rank",
        "set rollout.tensor_parallel=1",
        lambda learner, rollout: rollout.tensor_parallel,
        lambda learner, rollout: rollout.tensor_parallel > 1,
    ),
    ExactRule(
        "rollout.enforce_eager=false",
        "a compiled engine fuses norms and activations, whose sums then have another order",
        "set rollout.enforce_eager=true",
        lambda learner, rollout: rollout.enforce_eager,
        lambda learner, rollout: not rollout.enforce_eager,
    ),
    ExactRule(
        "learner.activation_checkpointing",
        "the sum before each norm is kept while the forward runs; a layer that runs again does not find it",
        "set learner.activation_checkpointing=false",
        lambda learner, rollout: learner.activation_checkpointing,
        lambda learner, rollout: learner.activation_checkpointing,
    ),
    ExactRule(
        "learner.fp32_head in bf16",
        "the product of a bf16 model's float32 head rounds otherwise with few rows (MKL)",
        "set learner.fp32_head=false, which the engine follows",
        lambda learner, rollout: f"fp32_head {learner.fp32_head} in {learner.precision}",
        lambda learner, rollout: learner.fp32_head and learner.precision != "fp32",
    ),
)
"""Checked in this order."""

REFUSED_FAMILIES: dict[str, str] = {
    "CohereForCausalLM": "layer norms that vLLM compiles, over parallel branches",
    "DeepseekV2ForCausalLM": "latent attention, whose products vLLM cuts otherwise",
    "DeepseekV3ForCausalLM": "latent attention, whose products vLLM cuts otherwise",
    "Ernie4_5_MoeForCausalLM": "a correction bias of its router, which vLLM 0.30's CPU router leaves out",
    "GemmaForCausalLM": "norms that multiply by 1 + weight",
    "Glm4MoeForCausalLM": "sigmoid scores, which torch rounds otherwise in a batch's last rows",
    "Glm4ForCausalLM": "norms after the branches too",
    "MellumForCausalLM": "rotary embeddings by kind of layer",
    "Qwen2MoeForCausalLM": "a sigmoid per token, which torch rounds otherwise in a batch's last rows",
}
"""Architectures that vLLM's CPU build serves, and the operator that was not made equal."""

ON_GPUS = (
    "cluster.device=cuda",
    "the learner's operators for GPUs were compared on one card, an H100 (benchmarks/reports/gpu/h100.md)",
    "set cluster.device=cpu, or learner.exact_on_gpu=true, which stops at the first token that differs",
)
"""Knob, reason and way out of what only a run's device can tell."""


def check_device(learner: LearnerConfig, device: str) -> None:
    """Raises ValueError for a run with `learner.consistency=exact` that this device cannot have."""
    if learner.consistency == "off" or device == "cpu":
        return
    knob, reason, way_out = ON_GPUS
    if not learner.exact_on_gpu:
        raise ValueError(
            f"learner.consistency=exact is refused with {knob}: {reason}; got device {device}; {way_out}, or "
            "learner.consistency=off"
        )
    if learner.backend == "deepspeed" and learner.deepspeed.zero_stage == 3:
        raise ValueError(
            "learner.exact_on_gpu=true needs the weights of queries, keys and values whole at once, and ZeRO "
            "3 gathers one by one: got learner.deepspeed.zero_stage 3; set it to 2, or "
            "learner.consistency=off"
        )


def check_consistency(learner: LearnerConfig, rollout: RolloutConfig) -> None:
    """Raises ValueError for the first rule that a run with `learner.consistency=exact` breaks."""
    if learner.consistency == "off":
        return
    for rule in EXACT_RULES:
        if rule.broken(learner, rollout):
            raise ValueError(
                f"learner.consistency=exact is refused with {rule.name}: {rule.reason}; got "
                f"{rule.got(learner, rollout)}; {rule.way_out}, or learner.consistency=off"
            )


def format_rules() -> str:
    """The table as text, one line per rule."""
    lines = ["learner.consistency=exact is refused with"]
    lines += [f"- {rule.name}: {rule.reason}. Way out: {rule.way_out}." for rule in EXACT_RULES]
    lines.append(f"- {ON_GPUS[0]}: {ON_GPUS[1]}. Way out: {ON_GPUS[2]}.")
    lines += [f"- {name}: it has {reason}." for name, reason in REFUSED_FAMILIES.items()]
    return "\n".join(lines)
