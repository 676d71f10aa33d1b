"""Memory against sums worked by hand, on tiny shapes and on Qwen3-30B-A3B."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gspo_dist.models.shape import ModelShape, find_model
from gspo_dist.planner import host as host_tables
from gspo_dist.planner import memory
from gspo_dist.planner.hardware import GIB
from gspo_dist.planner.host import host_memory, parked_learner, rollout_bytes, step_copies
from gspo_dist.planner.layout import LearnerLayout
from gspo_dist.planner.memory import (
    activations,
    engine_memory,
    engine_weights,
    layer_activations,
    learner_memory,
    learner_states,
    rank_parameters,
    router_scores,
)
from tests.unit.planner.views import change, engine_of, learner_of, work_of

QWEN = find_model("Qwen3-30B-A3B")
DENSE = ModelShape("dense", vocab=100, hidden=8, layers=4, heads=2, kv_heads=2, head_dim=4, ffn=16)
MOE = replace(DENSE, name="moe", num_experts=4, top_k=2, expert_ffn=16, expert_layers=(True,) * 4)


def device(model: ModelShape, layout: LearnerLayout) -> dict[str, int]:
    return {item.name: item.bytes for item in learner_states(model, layout)[0]}


def host(model: ModelShape, layout: LearnerLayout) -> dict[str, int]:
    return {item.name: item.bytes for item in learner_states(model, layout)[1]}


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_expert_parallel_ranks_hold_the_whole_model_together(ep: int) -> None:
    for backend in ("megatron", "deepspeed"):
        params = rank_parameters(MOE, learner_of(backend, world_size=4, expert_parallel=ep))
        assert params.dense + ep * params.experts == MOE.total


def test_tensor_and_pipeline_ranks_hold_every_matrix_once() -> None:
    replicated = 48 * (2 * 2048 + 2 * 128) + 48 * 2048 * 128 + 2048  # norms, routers, last norm
    params = rank_parameters(QWEN, learner_of(world_size=8, tensor_parallel=4, expert_parallel=8))
    assert 4 * (params.dense - replicated) + replicated + 8 * params.experts == QWEN.total
    staged = rank_parameters(QWEN, learner_of(world_size=8, pipeline_parallel=2, expert_parallel=4))
    # two stages of 24 layers, one with the embedding and one with the head; the last norm is counted on both
    assert 2 * (staged.dense + 4 * staged.experts) == QWEN.total + 2048


def test_megatron_with_the_distributed_optimizer_takes_6_plus_12_over_d_bytes_a_parameter() -> None:
    states = device(DENSE, learner_of(world_size=4))
    assert states == {"weights": 2 * DENSE.total, "gradients": 4 * DENSE.total, "optimizer": 3 * DENSE.total}
    alone = device(DENSE, learner_of(world_size=4, distributed_optimizer=False))
    assert sum(alone.values()) == 18 * DENSE.total


def test_expert_states_are_shared_by_the_ranks_that_hold_the_same_experts() -> None:
    # 8 ranks, experts over 4: an expert lives on 2 ranks, other weights on 8
    states = device(MOE, learner_of(world_size=8, expert_parallel=4))
    dense, experts = MOE.total - MOE.experts_total, MOE.experts_total // 4
    assert states["weights"] == 2 * (dense + experts)
    assert states["optimizer"] == 12 * dense // 8 + 12 * experts // 2


def test_the_worked_example_of_16_gpus_and_8_way_experts() -> None:
    layout = learner_of(world_size=16, expert_parallel=8)
    states = device(QWEN, layout)
    experts = 28_991_029_248 // 8
    dense = 30_532_122_624 - 28_991_029_248
    assert states["weights"] == 2 * (dense + experts)
    assert states["optimizer"] == pytest.approx(12 * (dense / 16 + experts / 2), abs=1)


def test_low_precision_moments_leave_float32_master_weights_and_two_bytes_a_moment() -> None:
    low = learner_of(world_size=4, precision_aware_optimizer=True)
    assert device(DENSE, low)["optimizer"] == (4 + 2 + 2) * DENSE.total // 4
    # offloaded moments are float32 whatever is asked
    assert host(DENSE, change(low, optimizer_cpu_offload=True))["optimizer"] == (4 + 4 + 4) * DENSE.total // 4


def test_offloading_moves_optimizer_states_and_a_gradient_copy_to_the_host() -> None:
    layout = learner_of(world_size=2, optimizer_cpu_offload=True)
    assert "optimizer" not in device(DENSE, layout)
    assert host(DENSE, layout) == {"optimizer": 6 * DENSE.total, "gradients": 2 * DENSE.total}


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 2, 2, 12), (1, 2, 4, 3), (2, 2, 1, 3), (3, 0.5, 1, 3)],
)
def test_zero_stages_divide_one_more_part_each(
    stage: int, weights: float, gradients: float, optimizer: float
) -> None:
    """Four ranks. Gradients accumulate in float32 from stage 1 on."""
    states = device(DENSE, learner_of("deepspeed", world_size=4, zero_stage=stage))
    assert states["weights"] == weights * DENSE.total
    assert states["gradients"] == gradients * DENSE.total
    assert states["optimizer"] == optimizer * DENSE.total
    assert ("gathered" in states) == (stage == 3)


def test_zero_3_gathers_two_layers_of_this_ranks_experts() -> None:
    states = device(MOE, learner_of("deepspeed", world_size=4, zero_stage=3, expert_parallel=2))
    layer = (8 * 8 * 4) + (2 * 8) + 8 * 4 + 2 * (3 * 8 * 16)  # attention, norms, router, 2 of 4 experts
    assert states["gathered"] == 2 * 2 * layer


def test_eager_takes_18_bytes_a_parameter_and_a_reference_two_more() -> None:
    assert sum(device(DENSE, learner_of("eager")).values()) == 18 * DENSE.total
    assert sum(device(DENSE, learner_of("eager", keep_reference=True)).values()) == 20 * DENSE.total


def test_stage_0_counts_the_float32_gradients_of_its_step() -> None:
    table, _ = learner_memory(
        QWEN, learner_of("deepspeed", zero_stage=0, token_budget=1024, activation_checkpointing=True), GIB
    )
    assert table.bytes_of("step") == 4 * QWEN.total
    assert table.bytes_of("activations") == 0


def test_activations_of_one_dense_layer_by_hand() -> None:
    # h 8, q = kv 8, 2 heads, I 16, bf16: (2h + 2q + 2kv) + (2h + 3I) values and 2 float32 log-sum-exps
    assert layer_activations(DENSE, learner_of(), False, "none") == 2 * (16 + 32 + 16 + 48) + 8
    # recomputed: two norm outputs and one product
    assert layer_activations(DENSE, learner_of(), False, "selective") == 2 * (8 + 32 + 8 + 48) + 8


def test_activations_of_one_expert_layer_by_hand() -> None:
    # attention and norms as above; router 8 x 4; for each of 2 experts input and output (2h) and 3I
    expected = 2 * (16 + 32 + 16) + 8 + 32 + 2 * 2 * (16 + 48)
    assert layer_activations(MOE, learner_of(), True, "none") == expected


@pytest.mark.parametrize(
    ("modules", "moe", "dropped"),
    [
        (["layernorm"], True, 2 * (8 + 8)),  # both norm outputs
        (["moe_act"], True, 2 * 2 * 16),  # a product for each of 2 experts
        (["core_attn"], True, 2 * 8 + 8),  # its output, and 2 float32 log-sum-exps
        (["moe"], True, 32 + 2 * 2 * (16 + 48) + 2 * 3 * 24),  # router, experts and the shared one
        (["shared_experts"], True, 2 * 3 * 24),
        (["layernorm", "moe"], True, 2 * (8 + 8) + 32 + 2 * 2 * (16 + 48) + 2 * 3 * 24),
        (["mlp"], False, 2 * 3 * 16),
        (["moe"], False, 0),
    ],
)
def test_named_modules_are_what_selective_recomputation_drops(
    modules: list[str], moe: bool, dropped: int
) -> None:
    model = replace(MOE, shared_ffn=24)
    layout = learner_of(recompute="selective", transformer={"recompute_modules": modules})
    kept = layer_activations(model, layout, moe, "selective")
    assert layer_activations(model, layout, moe, "none") - kept == dropped


def test_uneven_stages_are_counted_by_the_fullest() -> None:
    """48 layers in 4 stages: 11 with the table, 13, 13, and 11 with the head."""
    ends = {f"num_layers_in_{end}_pipeline_stage": 11 for end in ("first", "last")}
    layout = learner_of(world_size=4, pipeline_parallel=4, transformer=ends, token_budget=64)
    assert layout.stages(48) == (11, 13, 11)
    layer = 18_874_368 + 2 * 2048 + 2 * 128 + 2048 * 128 + 128 * 4_718_592
    assert rank_parameters(QWEN, layout).all == 13 * layer + 2048
    even = learner_of(world_size=4, pipeline_parallel=4, token_budget=64)
    assert activations(QWEN, layout).bytes == pytest.approx(activations(QWEN, even).bytes * 13 / 12)
    few = learner_of(
        world_size=2, pipeline_parallel=2, transformer={"num_layers_in_first_pipeline_stage": 47}
    )
    assert few.stages(48) == (47, 0, 1)
    assert rank_parameters(QWEN, few).all == 47 * layer + 151_936 * 2048 + 2048


def test_full_recomputation_keeps_layer_inputs_and_one_layer() -> None:
    layout = learner_of(token_budget=10, recompute="full")
    one = layer_activations(DENSE, layout, False, "none")
    assert activations(DENSE, layout).bytes == 10 * (4 * 2 * 8 + one)
    two = activations(DENSE, change(layout, recompute_num_layers=2)).bytes
    assert two == 10 * (2 * 2 * 8 + 2 * one)


def test_tensor_context_and_pipeline_parallelism_divide_activations() -> None:
    whole = activations(DENSE, learner_of(token_budget=64)).bytes
    assert (
        activations(DENSE, learner_of(token_budget=64, world_size=2, tensor_parallel=2)).bytes == whole // 2
    )
    assert (
        activations(DENSE, learner_of(token_budget=64, world_size=2, context_parallel=2)).bytes == whole // 2
    )
    # half the layers, two micro-batches in flight; interleaved in 2 chunks: 1 + 1/4 of that
    assert activations(DENSE, learner_of(token_budget=64, world_size=2, pipeline_parallel=2)).bytes == whole
    interleaved = learner_of(token_budget=64, world_size=2, pipeline_parallel=2, virtual_stages=2)
    assert activations(DENSE, interleaved).bytes == whole * 5 // 4


def test_a_forward_pass_of_more_tokens_is_the_worst_moment_once_it_holds_more() -> None:
    """One MoE layer without recomputation, the hidden states that the head reads, and a block of logits."""
    layout = learner_of(world_size=4, tensor_parallel=2, recompute="full", token_budget=8192)
    plain, _ = learner_memory(QWEN, layout, 10**13)
    same, _ = learner_memory(QWEN, change(layout, forward_token_budget=16384), 10**13)
    assert same == plain  # an update of 8,192 tokens still holds more
    wide, _ = learner_memory(QWEN, change(layout, forward_token_budget=262144), 10**13)
    # 2h; q, k, v before and after their norm, and the output: h 2048, q 4096, kv 512, 32 heads
    attention = 2 * (2 * 2048 + 2 * 4096 + 2 * 512 + 4096 + 512) + 4 * 32
    experts = 2 * 2 * 2048 + 8 * 128 + 8 * 2 * (2 * 2048 + 3 * 768)
    assert wide.bytes_of("activations") == 262144 * (attention + experts) // 2
    assert wide.bytes_of("hidden states") == 262144 * 2 * 2048
    assert wide.bytes_of("head") == 512 << 20
    for name in ("weights", "gradients", "optimizer", "runtime"):
        assert wide.bytes_of(name) == plain.bytes_of(name)
    ring = change(layout, context_parallel=2, forward_token_budget=262144)
    halved, _ = learner_memory(QWEN, ring, 10**13)
    assert 2 * halved.bytes_of("hidden states") == wide.bytes_of("hidden states")


@pytest.mark.parametrize(("replay", "extra"), [("none", 0), ("r2", 1), ("r3", 1)])
def test_m2pos_pass_in_packs_of_its_own_copies_the_routes_once_more(replay: str, extra: int) -> None:
    recompute = {"old_logprobs": "recompute", "routing_replay": replay}
    layout = learner_of(world_size=8, forward_token_budget=65536)
    tokens = 1024 * 9216
    for name, copies in (("m2po", extra), ("grpo", 0)):
        work = work_of(name=name, **recompute)
        wide, plain = (
            {i.name: i.bytes for i in step_copies(QWEN, work, one, 8)}["object store"]
            for one in (layout, change(layout, forward_token_budget=None))
        )
        assert wide - plain == copies * tokens * 385  # a byte marks whether the row is known


def test_scores_are_recorded_in_packs_of_the_forward_budget() -> None:
    layout = learner_of("deepspeed", world_size=16, token_budget=9216, forward_token_budget=99 * 9216)
    scored, bare = (learner_memory(QWEN, layout, 10**13, work=w)[0] for w in (work_of(**RSPO), work_of()))
    assert scored.bytes_of("router scores") == 8 * 48 * 8 * 99 * 9216
    assert scored.total - bare.total == scored.bytes_of("router scores")
    assert scored.bytes_of("hidden states") == 99 * 9216 * 2 * 2048


def test_engine_weights_are_split_and_its_cache_takes_the_rest() -> None:
    assert engine_weights(QWEN, engine_of()) == 2 * QWEN.total
    whole = 48 * (2 * 2048 + 2 * 128) + 48 * 2048 * 128 + 2048
    assert engine_weights(QWEN, engine_of(tensor_parallel=4)) == 2 * ((QWEN.total - whole) // 4 + whole)
    # 8 GPUs for 4 heads: each head's key and value matrices are on two GPUs, 4 x 48 x 2 x 2048 x 128 more
    # to split
    copies = 4 * 48 * 2 * 2048 * 128
    assert engine_weights(QWEN, engine_of(tensor_parallel=8)) == 2 * (
        (QWEN.total - whole + copies) // 8 + whole
    )


def test_kv_tokens_fill_what_the_engine_may_take() -> None:
    work = work_of(prompt=1024, completion=7168)
    memory = engine_memory(QWEN, engine_of(tensor_parallel=2, max_num_seqs=1000), work, 80 * GIB)
    # two of the four heads on each GPU: half of 98,304 bytes
    left = memory.table.capacity - (memory.table.total - memory.table.bytes_of("kv_cache"))
    assert memory.table.capacity == int(0.85 * 80 * GIB)
    assert memory.kv_tokens == left // 49_152
    assert memory.concurrency == memory.kv_tokens // 8192
    assert memory.concurrency_mean == memory.kv_tokens // 4096
    capped = engine_memory(QWEN, engine_of(tensor_parallel=2, max_num_seqs=10), work, 80 * GIB)
    assert capped.concurrency == 10


def test_twenty_gigabytes_hold_200_thousand_tokens() -> None:
    memory = engine_memory(QWEN, engine_of(kv_cache_gib=20e9 / GIB), work_of(), 0, gpu=False)
    assert memory.kv_tokens == 20_000_000_000 // 98_304  # 203,450


def test_host_holds_two_buckets_the_traces_and_what_is_offloaded() -> None:
    work = work_of(
        prompts=2,
        group=3,
        prompt=10,
        completion=30,
        routing_replay="r3",
        bucket_mib=1024,
    )
    offloaded = learner_states(QWEN, learner_of(world_size=8, optimizer_cpu_offload=True))[1]
    table = host_memory(QWEN, work, 2, offloaded, 8, 10**13)
    assert table.bytes_of("weight_sync") == 2 * (1 << 30)
    assert table.bytes_of("routing") == 6 * 40 * (48 * 8 + 1)
    assert table.bytes_of("offloaded optimizer") == pytest.approx(12 * QWEN.total, abs=8)
    # a bucket smaller than the largest tensor grows to it
    small = host_memory(QWEN, work_of(2, 3, prompt=10, completion=30, bucket_mib=1), 2, [], 8, 10**13)
    assert small.bytes_of("weight_sync") == 2 * 2 * 151_936 * 2048


@pytest.mark.parametrize(
    ("replay", "flips", "sets"),
    [
        ("none", False, 0),
        ("r2", False, 1),
        ("r3", False, 1),
        ("none", True, 1),
        ("r3", True, 1),
        ("r2", True, 2),
    ],
)
def test_host_holds_the_routes_that_engines_return_and_those_that_r2_records(
    replay: str, flips: bool, sets: int
) -> None:
    """A step that measures flips has the engines' routes of every rollout; R2's own come on top of them."""
    work = work_of(
        prompts=2,
        group=3,
        prompt=10,
        completion=30,
        routing_replay=replay,
        old_logprobs="recompute" if replay == "r2" else "rollout",
        flips=int(flips),
    )
    assert host_memory(QWEN, work, 2, [], 8, 10**13).bytes_of("routing") == sets * 6 * 40 * 385
    assert host_memory(DENSE, work, 2, [], 8, 10**13).bytes_of("routing") == 0


def test_colocated_engines_asleep_keep_their_weights_in_host_memory() -> None:
    """Three engines of 30,532,122,624 parameters of two bytes each; engines with GPUs of their
    own never sleep."""
    engine = engine_of(engines=3, colocated=True)
    held = host_tables.sleeping_engines(QWEN, engine, 8)
    assert [item.bytes for item in held] == [3 * 61_064_245_248]
    assert host_tables.sleeping_engines(QWEN, change(engine, colocated=False), 8) == ()
    awake, asleep = (host_memory(QWEN, work_of(), 2, [], 8, 10**13, asleep=a).total for a in ((), held))
    # and a third more, which torch's rounding of pinned blocks adds
    assert asleep - awake == 183_192_735_744 * 4 // 3


def test_a_rank_that_saves_or_loads_takes_host_memory_for_a_time() -> None:
    """8 bytes per held parameter of a Megatron rank, 4 of a DeepSpeed rank below ZeRO 3."""
    layout = learner_of(world_size=16, expert_parallel=8)
    saving = host_tables.passing_host_bytes(QWEN, layout)
    held = (30_532_122_624 - 28_991_029_248) + 28_991_029_248 // 8
    assert (saving.name, saving.bytes) == ("saving", 8 * held)
    loading = host_tables.passing_host_bytes(QWEN, learner_of("deepspeed", world_size=16, zero_stage=2))
    assert (loading.name, loading.bytes) == ("loading", 4 * 30_532_122_624)
    spread = learner_of("deepspeed", world_size=16, zero_stage=2, expert_parallel=8)
    assert host_tables.passing_host_bytes(QWEN, spread).bytes == 4 * held
    assert host_tables.passing_host_bytes(QWEN, learner_of("deepspeed", world_size=16, zero_stage=3)) is None
    with_it, without = (
        host_memory(QWEN, work_of(), 2, [], 8, 10**13, passing=item).total for item in (saving, None)
    )
    assert with_it - without == 8 * 8 * held


def test_a_gpu_host_counts_the_rollouts_and_what_pinning_adds() -> None:
    work = work_of(prompts=2, group=3, prompt=10, completion=30)
    offloaded = learner_states(QWEN, learner_of(world_size=8, optimizer_cpu_offload=True))[1]
    table = host_memory(QWEN, work, 2, offloaded, 8, 10**13)
    assert table.bytes_of("rollouts") == 54 * 6 * 40
    assert table.bytes_of("pinned rounding") == pytest.approx(16 * QWEN.total / 3, abs=64)  # 12 + 4 bytes
    assert host_memory(QWEN, work, 2, [], 8, 10**13).bytes_of("pinned rounding") == 0


def test_a_plan_counts_what_a_rank_takes_for_a_time() -> None:
    from tests.unit.planner.views import ENGINE, H100, LEARNER, WORK, plan_of

    result = plan_of(LEARNER, ENGINE, WORK, QWEN, H100, nodes=4)
    assert result.host.bytes_of("saving") == 8 * 8 * rank_parameters(QWEN, LEARNER).all


def test_the_head_is_planned_with_the_budgets_that_it_works_with():
    from gspo_dist.learners.head import logprobs

    assert memory.HEAD_LOGITS == logprobs.GPU_BUDGET_BYTES
    assert memory.HEAD_KEPT == logprobs.GPU_KEPT_BYTES
    assert memory.HEAD_KEPT_CPU == logprobs.CPU_KEPT_BYTES
    model = replace(DENSE, vocab=1000)
    table, _ = learner_memory(model, learner_of("eager", token_budget=64, precision="fp32"), GIB)
    head = next(item for item in table.items if item.name == "head")
    assert head.bytes == memory.HEAD_LOGITS + 4 * 64 * 1000 + 4 * 64 * 8  # all logits fit what may be kept


def test_an_offload_fraction_leaves_the_rest_on_the_gpu() -> None:
    quarter = {"optimizer_offload_fraction": 0.25}
    layout = learner_of(world_size=2).changed("megatron", optimizer_cpu_offload=True, optimizer=quarter)
    whole = 12 * DENSE.total // 2
    assert device(DENSE, layout)["optimizer"] == 3 * whole // 4
    assert host(DENSE, layout) == {"optimizer": whole // 4, "gradients": 4 * DENSE.total // 2 // 4}
    zero3 = {"zero_optimization": {"offload_optimizer": {"ratio": 0.25}}}
    half = learner_of("deepspeed", world_size=2, zero_stage=3, offload_optimizer=True, config=zero3)
    assert device(DENSE, half)["optimizer"] == 3 * whole // 4
    assert device(DENSE, half)["gradients"] == 3 * (4 * DENSE.total // 2) // 4
    zero2 = learner_of("deepspeed", world_size=2, zero_stage=2, offload_optimizer=True, config=zero3)
    assert "optimizer" not in device(DENSE, zero2)  # DeepSpeed reads it at stage 3 alone


def test_types_of_moments_and_deepspeeds_bucket_are_counted() -> None:
    types = {"exp_avg_dtype": "uint8", "exp_avg_sq_dtype": "float32"}
    low = learner_of(world_size=4).changed("megatron", precision_aware_optimizer=True, optimizer=types)
    assert device(DENSE, low)["optimizer"] == (4 + 1 + 4) * DENSE.total // 4
    buckets = learner_of("deepspeed", zero_stage=2, config={"zero_optimization": {"reduce_bucket_size": 100}})
    assert device(DENSE, buckets)["buckets"] == 2 * 2 * 100


@pytest.mark.parametrize(("replay", "rows", "recorded"), [("none", 0, 0), ("r3", 2, 0), ("r2", 2, 1)])
def test_a_mini_batch_is_copied_on_its_way_and_r2s_routes_in_every_twin(
    replay: str, rows: int, recorded: int
) -> None:
    """12 sequences of 40 tokens in 2 mini-batches; 8 ranks of 4 replicas on the host, two twins of each."""
    work = work_of(
        prompts=4,
        group=3,
        prompt=10,
        completion=30,
        mini_batches=2,
        routing_replay=replay,
        old_logprobs="recompute" if replay == "r2" else "rollout",
    )
    layout = learner_of(world_size=8, tensor_parallel=2)
    found = {item.name: item.bytes for item in step_copies(QWEN, work, layout, 8)}
    tokens, row = 6 * 40, 385
    assert found["object store"] == tokens * (37 + rows * row)
    assert found["ranks' batches"] == 2 * tokens * 37  # two twins hold what one replica computes
    assert found.get("recorded routes", 0) == 2 * tokens * row * recorded
    table = host_memory(QWEN, work, 2, [], 8, 10**13, copies=step_copies(QWEN, work, layout, 8))
    bare = host_memory(QWEN, work, 2, [], 8, 10**13)
    assert table.total - bare.total == sum(found.values())


RSPO = {"name": "rspo", "old_logprobs": "recompute"}


def test_router_scores_are_on_the_host_once_a_step_and_travel_with_each_mini_batch() -> None:
    """12 sequences of 40 tokens in 2 mini-batches, 48 layers of 8 experts; 2 ranks of each of 4 replicas."""
    work, plain = (
        work_of(4, 3, prompt=10, completion=30, mini_batches=2, **o)
        for o in (RSPO, {"old_logprobs": "recompute"})
    )
    row = 8 * 48 * 8
    layout = learner_of(world_size=8, tensor_parallel=2)
    found, bare = ({i.name: i.bytes for i in step_copies(QWEN, w, layout, 8)} for w in (work, plain))
    assert found["object store"] - bare["object store"] == 6 * 40 * row
    assert found["ranks' batches"] - bare["ranks' batches"] == 2 * 6 * 40 * row
    assert host_memory(QWEN, work, 2, [], 8, 10**13).bytes_of("router scores") == 12 * 40 * row
    assert host_memory(QWEN, plain, 2, [], 8, 10**13).bytes_of("router scores") == 0
    assert rollout_bytes(QWEN, work) - rollout_bytes(QWEN, plain) == 12 * 40 * row


def test_megatrons_ranks_keep_the_scores_of_a_mini_batch_and_others_of_a_micro_batch() -> None:
    """1,024 sequences of 9,216 tokens in 2 mini-batches, and 2 replicas of 8 ranks."""
    work = work_of(mini_batches=2, **RSPO)
    layout = learner_of(world_size=16, tensor_parallel=2, pipeline_parallel=2, context_parallel=2)
    own = 8 * 48 * 8 * (1024 * 9216 // 2 // 2) // 8
    assert router_scores(QWEN, layout, work) == own
    with_it, bare = (learner_memory(QWEN, layout, 10**13, work=w)[0] for w in (work, work_of(mini_batches=2)))
    assert with_it.bytes_of("router scores") in (own, 2 * own)
    assert bare.bytes_of("router scores") == 0
    moment = max(bare.bytes_of("activations") + bare.bytes_of("head") + own, 2 * own)
    assert with_it.total - bare.total == moment - bare.bytes_of("activations") - bare.bytes_of("head")
    one = learner_of("deepspeed", world_size=16, token_budget=9216)
    assert router_scores(QWEN, one, work) == 8 * 48 * 8 * 9216


@pytest.mark.parametrize(("prompts", "copies"), [(64, 1), (8192, 2)])
def test_where_scores_are_most_of_it_the_worst_moment_is_when_they_are_put_together(
    prompts: int, copies: int
) -> None:
    work, layout = work_of(prompts, **RSPO), learner_of(world_size=16, pipeline_parallel=2)
    table, _ = learner_memory(QWEN, layout, 10**13, work=work)
    assert table.bytes_of("router scores") == copies * router_scores(QWEN, layout, work)
    assert (table.bytes_of("activations") > 0) == (copies == 1)


def test_what_a_colocated_learner_parks_is_pinned_as_sleeping_engines_are() -> None:
    parked = parked_learner(DENSE, learner_of(world_size=4, keep_reference=True))
    assert {item.name: item.bytes for item in parked} == {
        "parked weights": 2 * DENSE.total,
        "parked optimizer": 3 * DENSE.total,
        "parked reference": 2 * DENSE.total,
    }
    with_it, bare = (host_memory(DENSE, work_of(), 2, [], 8, 10**13, parked=p).total for p in (parked, ()))
    assert with_it - bare == pytest.approx(8 * 7 * DENSE.total * 4 / 3, abs=8)
