"""The head's precision and the number of sequences at once, as vLLM is told them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gspo_dist.config import RolloutConfig
from gspo_dist.models.shape import find_model
from gspo_dist.planner.hardware import GIB
from gspo_dist.planner.memory import engine_memory
from gspo_dist.rollout.vllm.arguments import attention_backend, head_override, max_num_seqs
from tests.unit.planner.views import engine_of, work_of

QWEN = find_model("Qwen3-30B-A3B")


@pytest.mark.parametrize(
    ("precision", "fp32_head", "told"),
    [
        ("bf16", True, {"head_dtype": "float32"}),
        ("bf16", False, {"head_dtype": "model"}),
        ("fp32", True, {}),
        ("fp32", False, {}),
    ],
)
def test_the_engines_head_has_the_learners_precision(precision, fp32_head, told) -> None:
    assert head_override(precision, fp32_head=fp32_head) == told


def test_a_number_of_sequences_that_is_given_is_taken() -> None:
    for memory in (None, 80 * GIB):
        assert max_num_seqs(RolloutConfig(max_num_seqs=7), QWEN, memory) == 7


def test_a_cpu_host_and_a_model_that_cannot_be_counted_take_256() -> None:
    assert max_num_seqs(RolloutConfig(), QWEN, None) == 256
    assert max_num_seqs(RolloutConfig(), replace(QWEN, family="deepseek_v3"), 80 * GIB) == 256


def test_a_gpu_decodes_what_its_cache_holds_at_half_of_the_mean_length() -> None:
    """4 GPUs of 80 GiB, sequences to 1,024 + 9,216 tokens: 2,560 tokens each while they are in flight."""
    config = RolloutConfig(
        engines=4, tensor_parallel=4, prompts_per_step=256, group_size=16, max_completion_tokens=9216
    )
    n = max_num_seqs(config, QWEN, 80 * GIB)
    memory = engine_memory(QWEN, engine_of(**vars(config)), work_of(prompt=1024, completion=9216), 80 * GIB)
    assert n == memory.kv_tokens // 2560
    assert 800 < n < 900
    assert max_num_seqs(replace(config, group_size=8), QWEN, 80 * GIB) == 512  # its share of a step
    assert max_num_seqs(replace(config, group_size=2), QWEN, 80 * GIB) == 256
    assert max_num_seqs(replace(config, tensor_parallel=1), QWEN, 60 * GIB) == 256  # no room at all


def test_only_batch_invariant_engines_on_gpus_attend_with_tritons_kernel() -> None:
    assert attention_backend("cuda", batch_invariant=True) == {"attention_backend": "TRITON_ATTN"}
    assert attention_backend("cuda", batch_invariant=False) == {}
    assert attention_backend("cpu", batch_invariant=True) == {}
