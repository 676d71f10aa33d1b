"""The clock's parts against arithmetic by hand: decoding, passes, links, the optimiser, and the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gspo_dist.config import CheckpointConfig, EvaluationConfig, PlanConfig
from gspo_dist.planner.calibration import ASSUMPTIONS, SPEEDS, GpuSpeed
from gspo_dist.planner.decode import batch_s, collect_s, decode_step_s, experts_touched, prefill_token_s
from gspo_dist.planner.host import parked_learner
from gspo_dist.planner.links import exchange_s, gather_s
from gspo_dist.planner.memory import rank_parameters
from gspo_dist.planner.pipeline import Lengths
from gspo_dist.planner.throughput import step_time, sync_s
from gspo_dist.planner.training import forward_slot_s, layer_s, micro_batches, optimizer_s, packed, pass_s
from tests.unit.planner.views import ENGINE, H100, LEARNER, QWEN, change, engine_of, learner_of, work_of

FREE = replace(ASSUMPTIONS, layer_s=0.0, expert_s=0.0, dense_layer_s=0.0, decode_layer_s=0.0, reduce_s=0.0)
"""Nothing launched costs time."""
IDEAL = replace(FREE, speeds={"H100": GpuSpeed(1.0, 1.0)}, link_share=1.0, decode_mfu=1.0, pcie_share=1.0)
"""And every chip and link does what its data sheet says."""


def ideal(**changes):
    return replace(IDEAL, **changes)


# --- engines ---


def test_experts_touched_grows_from_top_k_to_all() -> None:
    assert experts_touched(QWEN, 1) == pytest.approx(8 / 128)
    assert experts_touched(QWEN, 2) == pytest.approx(1 - (120 / 128) ** 2)
    assert experts_touched(QWEN, 1000) == pytest.approx(1.0, abs=1e-12)


def test_one_sequence_decodes_at_the_speed_of_its_weights() -> None:
    # one token reads the active weights, less the input embedding, once: 3.04 B x 2 bytes at 3.35 TB/s
    expected = 2 * 3_041_867_776 / 3.35e12
    assert decode_step_s(QWEN, engine_of(), H100, 1, 0, IDEAL) == pytest.approx(expected, rel=1e-12)


def test_the_cache_of_a_decode_step_is_read_and_copied_heads_are_read_again() -> None:
    def of_cache(tensor: int) -> float:
        with_cache, without = (
            decode_step_s(QWEN, engine_of(1, tensor), H100, 8, context, IDEAL) for context in (1000, 0)
        )
        return with_cache - without

    # 8 sequences of 1,000 tokens of 98,304 bytes; 8 GPUs hold the 4 heads twice
    assert of_cache(1) == pytest.approx(8 * 1000 * 98_304 / 3.35e12, rel=1e-12)
    assert of_cache(4) == pytest.approx(of_cache(1) / 4, rel=1e-12)
    assert of_cache(8) == pytest.approx(of_cache(1) / 4, rel=1e-12)


def test_launches_and_all_reduces_are_paid_by_layer_and_by_host() -> None:
    def extra(tensor: int, **assumed) -> float:
        engine = engine_of(1, tensor)
        return decode_step_s(QWEN, engine, H100, 4, 0, ideal(**assumed)) - decode_step_s(
            QWEN, engine, H100, 4, 0, IDEAL
        )

    assert extra(1, decode_layer_s=1e-4) == pytest.approx(48e-4, rel=1e-9)
    slow = {"H100": GpuSpeed(1.0, 1.0, host=1.5)}
    assert extra(1, decode_layer_s=1e-4, speeds=slow) == pytest.approx(72e-4, rel=1e-9)
    assert extra(1, reduce_s=1e-5, reduce_far_s=1e-3) == 0.0
    assert extra(8, reduce_s=1e-5) == pytest.approx(96e-5, rel=1e-9)
    far = [decode_step_s(QWEN, engine_of(1, 16), H100, 4, 0, ideal(reduce_far_s=s)) for s in (1e-4, 0.0)]
    assert far[0] - far[1] == pytest.approx(96e-4, rel=1e-9)


def test_a_large_batch_is_bound_by_products_and_prefill_always_is() -> None:
    per_token = 2 * 3_041_867_776 + 4 * 48 * 4096 * 100
    step = decode_step_s(QWEN, engine_of(), H100, 100_000, 100, replace(IDEAL, decode_mfu=0.01))
    assert step == pytest.approx(1e5 * per_token / 9.89e12, rel=1e-12)
    read = 2 * 3_041_867_776 + 2 * 48 * 4096 * 512
    assert prefill_token_s(QWEN, engine_of(1, 2), H100, 512, IDEAL) == pytest.approx(
        read / (2 * 989e12), rel=1e-12
    )


def test_a_batch_empties_as_its_lengths_say() -> None:
    """Equal lengths are one wave after the other; lengths that differ leave places empty at the end."""
    equal = Lengths(1000, 0.0, 4000)
    assert batch_s(8, 8, equal, lambda n, t: 1.0) == pytest.approx(1000, rel=0.05)
    # Waves of equal lengths stay in step. The clock takes sequences to be anywhere: up to half a wave more.
    assert 3000 <= batch_s(24, 8, equal, lambda n, t: 1.0) < 3500
    spread = Lengths(1000, 1.0, 8000)
    # A cost by sequence counts every token once, however places empty.
    assert batch_s(64, 64, spread, lambda n, t: n) == pytest.approx(64_000, rel=0.03)
    assert batch_s(256, 64, spread, lambda n, t: n) == pytest.approx(256_000, rel=0.03)
    # A cost by step counts the longest of the batch: its expected maximum, drawn.
    drawn = [max(g) for g in spread.draw(400, 16, seed=1)]
    assert batch_s(16, 16, replace(spread, group_share=0.0), lambda n, t: 1.0) == pytest.approx(
        sum(max(g) for g in replace(spread, group_share=0.0).draw(400, 16, seed=1)) / 400, rel=0.05
    )
    assert sum(drawn) / 400 < 8000
    # The tokens that a step's sequences have so far.
    seen: list[float] = []
    batch_s(8, 8, equal, lambda n, t: seen.append(t) or 1.0)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1000, abs=100)


def test_quantiles_survival_and_half_way_agree_with_draws() -> None:
    lengths = Lengths(1500, 0.8, 4096)
    drawn = [n for group in lengths.draw(4000, 4, seed=3) for n in group]
    assert sum(lengths.quantiles(1000)) / 1000 == pytest.approx(1500, rel=0.01)
    for tokens in (500, 1500, 3000):
        share = sum(n > tokens for n in drawn) / len(drawn)
        assert lengths.survival(tokens) == pytest.approx(share, abs=0.02)
    assert lengths.survival(4096) == 0.0
    squares = sum(n * n for n in drawn) / sum(drawn) / 2
    assert lengths.half_way == pytest.approx(squares, rel=0.02)


def test_an_engine_of_a_measured_speed_takes_that_much_longer() -> None:
    work = work_of()
    once, half = (
        collect_s(QWEN, ENGINE, work, H100, 64, replace(ASSUMPTIONS, engine_speed=speed))
        for speed in (1.0, 0.5)
    )
    assert half == pytest.approx(2 * once, rel=1e-12)


# --- links ---


def test_an_exchange_is_as_slow_as_the_slower_of_both_kinds_of_links() -> None:
    # 7 GB to each of 8 GPUs over NVLink; over two nodes 8/15 of it leaves the node
    assert exchange_s(7e9, 8, H100, IDEAL) == pytest.approx(7 / 450, rel=1e-12)
    assert exchange_s(15e9, 16, H100, IDEAL) == pytest.approx(8 / 50, rel=1e-12)
    assert exchange_s(1e9, 1, H100, IDEAL) == 0.0
    assert gather_s(8e9, 8, H100, IDEAL) == pytest.approx(7 / 450, rel=1e-12)
    assert gather_s(16e9, 16, H100, IDEAL) == pytest.approx(15 / 50, rel=1e-12)
    assert gather_s(8e9, 8, H100, ideal(link_share=0.5)) == pytest.approx(14 / 450, rel=1e-12)


# --- the learner ---


def test_sequences_are_packed_into_as_few_micro_batches_as_fit() -> None:
    equal = Lengths(900, 0.0, 900)
    assert packed(equal, 100, 12, 2999) == 6  # two of 1,000 tokens in each
    assert packed(equal, 100, 12, 3000) == 4
    assert packed(equal, 100, 1200, 3000) == 400
    work = work_of(prompt=100, completion=900, mean_fill=1.0)
    assert micro_batches(work, 12, 3000) == 4
    assert micro_batches(replace(work, unpacked=2), 13, 3000) == 7


def test_a_slot_is_products_and_what_each_layer_costs() -> None:
    """4,096 tokens of sequences of 1,024, on two tensor-parallel ranks."""
    layout = learner_of(world_size=2, tensor_parallel=2)
    flops = 4096 * (2 * 3_041_867_776 + 2 * 48 * 4096 * 1024)
    gathers = 48 * 4 * (4096 * 2048 * 2) / 2 / 450e9
    slot = forward_slot_s(QWEN, layout, H100, 4096, 1024, IDEAL)
    assert slot == pytest.approx(flops / (2 * 989e12) + gathers, rel=1e-12)
    launched = forward_slot_s(QWEN, layout, H100, 4096, 1024, ideal(layer_s=1e-3))
    assert launched - slot == pytest.approx(48e-3, rel=1e-9)
    loop = change(layout, grouped_gemm=False)
    looped = forward_slot_s(QWEN, loop, H100, 4096, 1024, ideal(expert_s=1e-5))
    assert looped - slot == pytest.approx(48 * 128e-5, rel=1e-9)
    half = replace(IDEAL, speeds={"H100": GpuSpeed(0.5, 1.0, host=2.0)}, layer_s=1e-3)
    slow = forward_slot_s(QWEN, layout, H100, 4096, 1024, half)
    assert slow == pytest.approx(flops / 989e12 + gathers + 96e-3, rel=1e-12)
    staged = change(layout, world_size=4, pipeline_parallel=2)
    assert forward_slot_s(QWEN, staged, H100, 4096, 1024, IDEAL) == pytest.approx(slot / 2, rel=1e-12)
    measured = forward_slot_s(QWEN, layout, H100, 4096, 1024, ideal(learner_speed=0.5))
    assert measured == pytest.approx(2 * slot, rel=1e-12)


def test_experts_send_rows_and_context_ranks_send_keys() -> None:
    one = learner_of(world_size=16, expert_parallel=8)
    moe, dense = layer_s(QWEN, one, H100, 1000, IDEAL)
    # 1,000 tokens x 8 experts x 2,048 values x 2 bytes, 7/8 of it to the others, there and back
    assert moe - dense == pytest.approx(2 * 1000 * 8 * 4096 * 7 / 8 / 450e9, rel=1e-12)
    assert dense == 0.0
    ring = learner_of(world_size=16, context_parallel=2)
    _, passed = layer_s(QWEN, ring, H100, 1000, IDEAL)
    assert passed == pytest.approx(1000 * 2 * 512 * 2 / 2 / 450e9, rel=1e-12)


def test_an_update_takes_three_passes_and_a_fourth_where_all_is_recomputed() -> None:
    work = work_of(8, 8, prompt=512, completion=512, mean_fill=1.0)
    layout = learner_of(world_size=4, token_budget=4096)
    # 64 sequences of 1,024 over 4 replicas: 4 micro-batches of 4,096 tokens on each
    slot = forward_slot_s(QWEN, layout, H100, 4096, 1024, ASSUMPTIONS)
    assert pass_s(QWEN, layout, work, H100, 64, ASSUMPTIONS) == pytest.approx(4 * slot, rel=1e-12)
    update = pass_s(QWEN, layout, work, H100, 64, ASSUMPTIONS, update=True)
    assert update == pytest.approx(12 * slot, rel=1e-12)
    full = change(layout, recompute="full")
    assert pass_s(QWEN, full, work, H100, 64, ASSUMPTIONS, update=True) == pytest.approx(16 * slot, rel=1e-12)
    assert pass_s(QWEN, layout, work, H100, 2, ASSUMPTIONS) < slot  # half a sequence a replica
    wide = change(layout, forward_token_budget=8192)
    twice = forward_slot_s(QWEN, layout, H100, 8192, 1024, ASSUMPTIONS)
    assert pass_s(QWEN, wide, work, H100, 64, ASSUMPTIONS) == pytest.approx(2 * twice, rel=1e-12)
    assert pass_s(QWEN, wide, work, H100, 64, ASSUMPTIONS, update=True) == pytest.approx(update, rel=1e-12)


def test_modules_that_are_recomputed_cost_their_share_of_a_forward_pass() -> None:
    work = work_of(8, 8, prompt=512, completion=512, mean_fill=1.0)
    modules = {"recompute_modules": ["moe"]}
    layout = learner_of(world_size=4, token_budget=4096, recompute="selective", transformer=modules)
    slot = forward_slot_s(QWEN, layout, H100, 4096, 1024, ASSUMPTIONS)
    update = pass_s(QWEN, layout, work, H100, 64, ASSUMPTIONS, update=True)
    experts = 48 * 8 * 4_718_592 / (3_353_032_704 - 151_936 * 2048)
    assert update == pytest.approx(4 * (3 + experts) * slot, rel=1e-12)
    plain = learner_of(world_size=4, token_budget=4096, recompute="selective")
    assert pass_s(QWEN, plain, work, H100, 64, ASSUMPTIONS, update=True) == pytest.approx(12 * slot)


def test_a_pipeline_of_uneven_stages_waits_for_the_largest() -> None:
    even, uneven = (
        learner_of(world_size=4, pipeline_parallel=4, transformer=given)
        for given in ({}, {f"num_layers_in_{end}_pipeline_stage": 10 for end in ("first", "last")})
    )
    slots = [forward_slot_s(QWEN, layout, H100, 4096, 1024, ASSUMPTIONS) for layout in (even, uneven)]
    assert slots[1] == pytest.approx(slots[0] * 14 / 12, rel=1e-12)


def test_a_pipeline_waits_one_slot_for_each_stage_but_one() -> None:
    work = work_of(8, 8, prompt=512, completion=512, mean_fill=1.0)
    layout = learner_of(world_size=4, pipeline_parallel=4, token_budget=4096)
    slot = forward_slot_s(QWEN, layout, H100, 4096, 1024, ASSUMPTIONS)
    assert pass_s(QWEN, layout, work, H100, 64, ASSUMPTIONS) == pytest.approx((16 + 3) * slot, rel=1e-12)
    interleaved = change(layout, virtual_stages=3)
    assert pass_s(QWEN, interleaved, work, H100, 64, ASSUMPTIONS) == pytest.approx((16 + 1) * slot, rel=1e-12)


def test_a_pipeline_measures_the_routers_shift_in_a_pass_of_its_own() -> None:
    def train_s(layout, name):
        work = work_of(8, 8, mini_batches=2, name=name, old_logprobs="recompute")
        return step_time(QWEN, layout, ENGINE, work, H100, 64).train_s

    flat, staged = learner_of(world_size=4), learner_of(world_size=4, pipeline_parallel=2)
    assert train_s(flat, "rspo") == train_s(flat, "gmpo")
    work = work_of(8, 8)
    passes = 2 * pass_s(QWEN, staged, work, H100, 32, ASSUMPTIONS)
    assert train_s(staged, "rspo") - train_s(staged, "gmpo") == pytest.approx(passes, rel=1e-9)


def test_small_micro_batches_cost_latency_and_large_ones_do_not() -> None:
    work = work_of(8, 8, prompt=512, completion=512, mean_fill=1.0)
    small, large = (
        pass_s(QWEN, learner_of(world_size=4, token_budget=n), work, H100, 64, ASSUMPTIONS)
        for n in (1024, 16384)
    )
    # 16 micro-batches against one: 15 times 48 layers launched
    assert small - large == pytest.approx(15 * 48 * ASSUMPTIONS.layer_s, rel=1e-9)


def test_an_optimizer_step_sums_gradients_and_steps_on_the_gpu_or_on_the_host() -> None:
    layout = learner_of(world_size=8)
    shard = QWEN.total / 8
    summed = 6 * QWEN.total * 7 / 8 / 450e9 * 7 / 8
    on_gpu = optimizer_s(QWEN, layout, H100, 8, IDEAL)
    assert on_gpu == pytest.approx(summed + 28 * shard / (3.35e12 * 0.7), rel=1e-12)
    away = optimizer_s(QWEN, change(layout, optimizer_cpu_offload=True), H100, 8, IDEAL)
    assert away == pytest.approx(summed + 6 * shard / 64e9 + 28 * shard * 8 / 100e9, rel=1e-12)
    assert away > 10 * on_gpu


def test_zero_3_gathers_weights_in_every_pass() -> None:
    sharded, whole = (
        forward_slot_s(QWEN, learner_of("deepspeed", world_size=8, zero_stage=n), H100, 4096, 1024, IDEAL)
        for n in (3, 2)
    )
    assert sharded - whole == pytest.approx(2 * QWEN.total * 7 / 8 / 450e9, rel=1e-9)
    megatron = forward_slot_s(QWEN, learner_of(world_size=8), H100, 4096, 1024, IDEAL)
    assert whole == pytest.approx(megatron / 0.45, rel=1e-9)


# --- around them ---


def test_a_publication_is_a_latency_for_each_tensor_and_all_weights() -> None:
    # 48 layers of 8 tensors, a router and 384 of experts, and 3 more: an HF folder of Qwen3-30B-A3B
    tensors = 48 * (8 + 1 + 384) + 3
    expected = tensors * 1e-4 + 2 * 30_532_122_624 / (50e9 * 0.4)
    assert sync_s(QWEN, LEARNER, H100, ASSUMPTIONS) == pytest.approx(expected, rel=1e-12)
    over_all = sync_s(QWEN, LEARNER, H100, ASSUMPTIONS, cards=8)
    assert over_all == pytest.approx(tensors * 1e-4 + (expected - tensors * 1e-4) / 8, rel=1e-12)


def test_checkpoints_evaluation_and_the_driver_are_part_of_a_step() -> None:
    work = work_of(prompts=64, group=16)
    plain = step_time(QWEN, LEARNER, ENGINE, work, H100, 64)
    assert plain.checkpoint_s == plain.evaluation_s == plain.switch_s == 0.0
    assert plain.driver_s == pytest.approx(1.0 + 0.0005 * 1024)
    run = replace(
        work.run,
        checkpoint=CheckpointConfig(every=25),
        evaluation=EvaluationConfig(every=10, prompts=128, samples=32),
        plan=PlanConfig(storage_gb_s=4.0),
    )
    time = step_time(QWEN, LEARNER, ENGINE, replace(work, run=run), H100, 64)
    # 2 + 12 bytes a parameter, written by two hosts
    assert time.checkpoint_s == pytest.approx(14 * QWEN.total / (2 * 4e9) / 25, rel=1e-12)
    held_out = collect_s(QWEN, ENGINE, work, H100, 64, ASSUMPTIONS, prompts=128, samples=32)
    assert time.evaluation_s == pytest.approx(held_out / 10, rel=1e-12)
    assert time.total_s == pytest.approx(plain.total_s + time.checkpoint_s + time.evaluation_s, rel=1e-12)
    parts = (
        plain.collect_s,
        plain.logprobs_s,
        plain.train_s,
        plain.sync_s,
        plain.guard_s,
        plain.flips_s,
        plain.probe_s,
        plain.driver_s,
    )
    assert plain.total_s == pytest.approx(sum(parts), rel=1e-12)
    assert plain.learn_s + plain.pause_s + plain.collect_s == pytest.approx(plain.total_s, rel=1e-12)


def test_colocated_engines_move_their_weights_to_the_host_and_back() -> None:
    time = step_time(QWEN, change(LEARNER, world_size=8), engine_of(8, colocated=True), work_of(), H100, 64)
    learner = change(LEARNER, world_size=8)
    parked = sum(item.bytes for item in parked_learner(QWEN, learner))
    held = rank_parameters(QWEN, learner)
    states = held.dense / learner.shards + held.experts / learner.expert_shards
    assert parked == pytest.approx(2 * held.all + 12 * states, abs=8)
    assert time.switch_s == pytest.approx(2 * (61_064_245_248 + parked) / 32e9, rel=1e-12)
    assert time.gpus == 8
    apart = step_time(QWEN, change(LEARNER, world_size=8), engine_of(8), work_of(), H100, 64)
    assert apart.gpus == 16
    assert time.sync_s < apart.sync_s  # over all cards of the node


def test_every_known_gpu_has_a_speed() -> None:
    from gspo_dist.planner import GPUS

    assert {name.split("-")[0] for name in GPUS} == set(SPEEDS)
