"""Every bound of every knob, at the bound and just beyond it, and the defaults that are promises."""

from __future__ import annotations

from typing import Any

import pytest

from gspo_dist.config import LearnerConfig, MegatronConfig, RolloutConfig, RunConfig
from gspo_dist.config.mapping import from_mapping, knobs, to_mapping

# knob: (the last value that is accepted, the first that is not, the rule in the message)
BOUNDS: dict[str, list[tuple[Any, Any, str]]] = {
    "steps": [(1, 0, "at least 1")],
    "mini_batches": [(1, 0, "at least 1")],
    "learner.world_size": [(1, 0, "at least 1")],
    "learner.threads": [(0, -1, "at least 0")],
    "learner.timeout_s": [(1e-9, 0.0, "above 0")],
    "learner.collective_timeout_s": [(1e-9, 0.0, "above 0")],
    "learner.optimizer.lr": [(1e-12, 0.0, "above 0")],
    "learner.optimizer.eps": [(1e-12, 0.0, "above 0")],
    "learner.optimizer.min_lr_ratio": [(0.0, -1e-9, "in [0, 1]"), (1.0, 1.001, "in [0, 1]")],
    "learner.optimizer.warmup_steps": [(0, -1, "at least 0")],
    "learner.optimizer.grad_clip": [(0.0, -1e-9, "at least 0")],
    "learner.optimizer.weight_decay": [(0.0, -1e-9, "at least 0")],
    "learner.optimizer.betas": [
        ([0.0, 0.0], [-0.1, 0.5], "two numbers in [0, 1)"),
        ([0.999, 0.9], [1.0, 0.5], "two numbers in [0, 1)"),
        ([0.9, 0.9], [0.9], "two numbers in [0, 1)"),
    ],
    "learner.deepspeed.zero_stage": [(0, -1, "0, 1, 2 or 3"), (3, 4, "0, 1, 2 or 3")],
    "learner.deepspeed.expert_parallel": [(1, 0, "at least 1")],
    **{
        f"learner.megatron.{name}": [(1, 0, "at least 1")]
        for name in (
            "tensor_parallel",
            "pipeline_parallel",
            "virtual_stages",
            "expert_parallel",
            "expert_tensor_parallel",
            "context_parallel",
            "recompute_num_layers",
        )
    },
    "rollout.weight_sync.bucket_mib": [(1, 0, "at least 1")],
    "rollout.weight_sync.probe_every": [(0, -1, "at least 0")],
    "rollout.weight_sync.probe_tolerance": [(1e-9, 0.0, "above 0")],
    "rollout.weight_sync.timeout_s": [(1e-9, 0.0, "above 0")],
    **{
        f"rollout.{name}": [(1, 0, "at least 1")]
        for name in (
            "engines",
            "tensor_parallel",
            "max_prompt_tokens",
            "max_completion_tokens",
            "max_num_seqs",
        )
    },
    "rollout.temperature": [(1e-9, 0.0, "above 0")],
    "rollout.top_p": [(1.0, 0.999, "1 for training")],
    "rollout.gpu_memory_utilization": [(1.0, 1.001, "in (0, 1]"), (1e-9, 0.0, "in (0, 1]")],
    "rollout.kv_cache_gib": [(1e-9, 0.0, "above 0")],
    "rollout.threads": [(0, -1, "at least 0")],
    "rollout.timeout_s": [(1e-9, 0.0, "above 0")],
    "objective.kl_coef": [(0.0, -1e-9, "at least 0")],
    "reward.workers": [(1, 0, "at least 1")],
    "reward.timeout_s": [(1e-9, 0.0, "above 0")],
    "cluster.placement_timeout_s": [(1e-9, 0.0, "above 0")],
    "cluster.nodes": [(1, 0, "at least 1")],
    "logger.samples_per_step": [(0, -1, "at least 0")],
    "checkpoint.every": [(0, -1, "at least 0")],
    "checkpoint.keep": [(1, 0, "at least 1")],
    "checkpoint.hf_every": [(0, -1, "at least 0")],
    "checkpoint.keep_hf": [(1, 0, "at least 1")],
    "evaluation.every": [(0, -1, "at least 0")],
    "evaluation.prompts": [(1, 0, "at least 1")],
    "evaluation.samples": [(1, 0, "at least 1")],
    "evaluation.temperature": [(0.0, -1e-9, "at least 0")],
    "data.stream_above_mb": [(0, -1, "at least 0")],
    "evaluation.endpoint_concurrency": [(1, 0, "at least 1")],
    "evaluation.suites": [(["aime24", "gsm8k"], ["aime24", "aime24"], "suites without repeats")],
    "evaluation.endpoint": [("http://h/v1", "h:8000", "an address that begins with http")],
    "evaluation.top_p": [(1.0, 1.001, "in (0, 1]"), (1e-9, 0.0, "in (0, 1]")],
    "flips.every": [(0, -1, "at least 0")],
    "flips.sequences": [(1, 0, "at least 1")],
    "plan.nodes": [(1, 0, "at least 1")],
    "plan.host_gib": [(1e-9, 0.0, "above 0"), (None, -1.0, "above 0")],
    "plan.network_gb_s": [(1e-9, 0.0, "above 0")],
    "plan.storage_gb_s": [(1e-9, 0.0, "above 0")],
    "plan.prompt_mean": [(1e-9, 0.0, "above 0")],
    "plan.length_mean": [(1e-9, 0.0, "above 0")],
    "plan.learner_speed": [(1e-9, 0.0, "above 0")],
    "plan.engine_speed": [(1e-9, 0.0, "above 0")],
    "plan.gpus_per_node": [(1, 0, "at least 1"), (None, -8, "at least 1")],
}
CHOICES = {
    "data.bad_rows": ["stop", "skip"],
    "model.recipe": ["quickstart", "peer", "calculator", "python", "guess", "rethink", "smollm"],
    "learner.backend": ["eager", "deepspeed", "megatron"],
    "learner.precision": ["fp32", "bf16", "fp16"],
    "learner.optimizer.schedule": ["constant", "linear", "cosine"],
    "learner.megatron.token_dispatcher": ["alltoall", "allgather", "flex"],
    "learner.megatron.recompute": ["none", "selective", "full"],
    "learner.megatron.router_dtype": ["fp32", "fp64", "model"],
    "rollout.weight_sync.transport": ["auto", "nccl", "gloo", "shm"],
    "rollout.engine": ["vllm", "reference"],
    "rollout.precision": ["fp32", "bf16", "fp16"],
    "objective.old_logprobs": ["rollout", "recompute"],
    "objective.kl_estimator": ["k1", "k2", "k3"],
    "cluster.device": ["auto", "cpu", "cuda"],
    "logger.wandb.mode": ["auto", "online", "offline", "off"],
}

PAIRS = {"learner.precision": "rollout.precision", "rollout.precision": "learner.precision"}


def run(**values: Any) -> RunConfig:
    """A run with some knobs set, by dotted name."""
    mapping: dict[str, Any] = {}
    for key, value in values.items():
        node = mapping
        *sections, name = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return from_mapping(RunConfig, mapping)


def value_of(config: RunConfig, key: str) -> Any:
    node: Any = to_mapping(config)
    for part in key.split("."):
        node = node[part]
    return node


@pytest.mark.parametrize(
    ("key", "good", "bad", "rule"), [(k, *case) for k, cases in BOUNDS.items() for case in cases]
)
def test_a_bound_is_accepted_and_what_lies_beyond_is_refused_by_name(key, good, bad, rule):
    assert value_of(run(**{key: good}), key) == good
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the message is compared below, brackets and all)
        run(**{key: bad})
    assert str(refused.value).startswith(f"{key} must be {rule}")
    assert f"got {bad}" in str(refused.value)


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_is_accepted_and_another_refused_with_all_of_them(key):
    for name in CHOICES[key]:
        pair = PAIRS.get(key)  # a section that has to say the same
        assert value_of(run(**{key: name}, **({pair: name} if pair else {})), key) == name
    with pytest.raises(
        ValueError, match=rf"{key} must be a known name: got 'other'; .*known: {', '.join(CHOICES[key])}"
    ):
        run(**{key: "other"})


def test_a_recipe_is_read_only_without_a_folder():
    assert run(**{"model.path": "/m", "model.recipe": "of another version"}).model.path == "/m"


def test_the_defaults_are_the_papers_and_safe():
    config = RunConfig()
    assert (config.objective.name, config.objective.old_logprobs, config.mini_batches) == (
        "gspo",
        "rollout",
        4,
    )
    assert (config.objective.guard.action, config.objective.correction.name) == ("warn", "none")
    assert (config.objective.kl_coef, config.objective.routing_replay) == (0.0, "none")
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.weight_sync.check) == (
        1.0,
        1.0,
        True,
    )
    assert (config.checkpoint.resume, config.checkpoint.save_last, config.checkpoint.accept) == (
        True,
        True,
        [],
    )
    assert (config.learner.precision, config.learner.fp32_head, config.learner.megatron.router_dtype) == (
        "bf16",
        True,
        "fp32",
    )
    assert config.reward.timeout_reward == 0.0
    assert config.data.shuffle
    assert (config.seed, config.plan.nodes, config.plan.gpu, config.plan.model) == (0, 1, None, None)


def test_derived_numbers():
    layout = MegatronConfig(tensor_parallel=2, context_parallel=2, pipeline_parallel=2)
    assert layout.model_parallel == 8
    assert LearnerConfig(backend="megatron", world_size=16, megatron=layout).data_parallel == 2
    assert LearnerConfig(backend="deepspeed", world_size=16).data_parallel == 16
    rollout = RolloutConfig(prompts_per_step=6, group_size=4, max_prompt_tokens=10, max_completion_tokens=5)
    assert (rollout.rollouts_per_step, rollout.max_model_len) == (24, 15)
    assert rollout.weight_sync.bucket_bytes == 256 * 1024 * 1024


@pytest.mark.parametrize(
    ("backend", "in_background", "expected"),
    [("megatron", True, True), ("megatron", False, False), ("deepspeed", True, False)],
)
def test_only_megatron_saves_in_the_background(backend, in_background, expected):
    learner = LearnerConfig(backend=backend, megatron=MegatronConfig(async_save=in_background))
    assert learner.saves_asynchronously is expected


def test_every_bound_and_choice_is_of_a_knob_that_exists():
    assert set(BOUNDS) | set(CHOICES) <= set(knobs(RunConfig))


def test_batch_invariant_kernels_are_vllms():
    assert run(**{"rollout.batch_invariant": True}).rollout.batch_invariant
    with pytest.raises(
        ValueError, match=r"rollout\.batch_invariant chooses kernels of vLLM: got engine ref.*leave"
    ):
        run(**{"rollout.batch_invariant": True, "rollout.engine": "reference"})
