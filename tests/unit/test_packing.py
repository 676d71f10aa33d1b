"""Packing: nothing is cut, nothing is lost, every replica runs as many micro-batches,
denominators are global.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_dist.packing import balanced_bins, pack, pack_sequences, split_mini_batches, unpack
from gspo_dist.probes import from_sequences, take_sequences
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import Completion, LogprobOutput, Prompt, Rollout


def rollout(
    i: int, prompt: int, completion: int, group: int = 0, mask: list[bool] | None = None, routing=None
) -> Rollout:
    tokens = np.arange(completion) + 100 * (i + 1)
    return Rollout(
        i,
        group,
        Prompt(f"p{group}", tuple(range(1, prompt + 1)), "?"),
        Completion(
            tokens,
            np.array(mask if mask is not None else [True] * completion),
            -np.arange(1, completion + 1) / 10,
            np.zeros(completion, np.int32),
            "stop",
            "",
            routing,
        ),
        1.0,
    )


def test_worked_example_of_the_alignment():
    (mini,) = pack(
        [rollout(0, 2, 2), rollout(1, 1, 3, mask=[True, False, True])],
        [0.5, -1.0],
        replicas=1,
        token_budget=16,
        mini_batches=1,
        max_completion_length=8,
        seed=(0,),
    )
    ((batch,),) = mini.micro_batches
    assert batch.token_ids.tolist() == [1, 2, 100, 101, 1, 200, 201, 202]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.loss_mask.tolist() == [False, False, True, True, False, True, False, True]
    assert batch.advantages.tolist() == [0.5] * 4 + [-1.0] * 4
    np.testing.assert_allclose(batch.rollout_logprobs, [0, 0, -0.1, -0.2, 0, -0.1, 0, -0.3], rtol=1e-6)
    assert batch.sequence_ids().tolist() == [0] * 4 + [1] * 4
    assert (
        mini.denominators.sequences,
        mini.denominators.tokens,
        mini.denominators.max_completion_length,
    ) == (2, 4, 8)


def test_every_trained_token_keeps_the_version_that_sampled_it():
    """A prompt's tokens have none, and a tool's have none, whatever the engine wrote there."""
    first, second = rollout(0, 2, 2), rollout(1, 1, 3, mask=[True, False, True])
    dated = [
        replace(r, completion=replace(r.completion, policy_versions=np.array(v, np.int32)))
        for r, v in ((first, [8, 12]), (second, [4, 9, 12]))
    ]
    batch = pack_sequences(dated, [1.0, 1.0], [1, 0])
    assert batch.policy_versions.tolist() == [-1, 4, -1, 12, -1, -1, 8, 12]
    assert batch.policy_versions.dtype == torch.int32
    assert dated[0].num_tokens == 4  # and the versions take part in what samples of a batch cut and join
    (joined,), *_ = take_sequences([(batch, 1), (batch, 0)], replicas=1, token_budget=64)
    assert joined.policy_versions.tolist() in ([-1, -1, 8, 12, -1, 4, -1, 12], batch.policy_versions.tolist())


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=4, max_size=40),
    replicas=st.integers(1, 4),
    extra=st.integers(0, 60),
)
def test_every_sequence_is_in_one_bin_within_the_budget_and_replicas_run_equal_counts(
    lengths, replicas, extra
):
    budget = max(lengths) + extra
    bins = balanced_bins(lengths, replicas, budget)
    assert sorted(i for replica in bins for b in replica for i in b) == list(range(len(lengths)))
    assert len({len(replica) for replica in bins}) == 1
    assert all(sum(lengths[i] for i in b) <= budget for replica in bins for b in replica)


def test_a_long_tail_packs_to_over_95_percent():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6.5, 1.0, 2048).astype(int) + 1, 16384).tolist()
    bins = balanced_bins(lengths, 8, 16384)
    assert len(bins[0]) == -(-sum(lengths) // (8 * 16384))  # no layout of whole micro-batches needs fewer
    assert sum(lengths) / (sum(len(replica) for replica in bins) * 16384) > 0.95
    loads = [sum(lengths[i] for b in replica for i in b) for replica in bins]
    assert max(loads) / min(loads) < 1.02


def test_replicas_without_a_sequence_run_a_masked_copy():
    rollouts = [rollout(i, 2, 6, group=0) for i in range(3)]
    (mini,) = pack(
        rollouts,
        [1.0, 2.0, 3.0],
        replicas=2,
        token_budget=8,
        mini_batches=1,
        max_completion_length=6,
        seed=(0,),
    )
    assert [len(replica) for replica in mini.micro_batches] == [2, 2]
    batches = [b for replica in mini.micro_batches for b in replica]
    assert sorted(int(b.loss_mask.sum()) for b in batches) == [0, 6, 6, 6]
    assert mini.denominators.tokens == 18
    values: dict[int, np.ndarray] = {}
    for b in batches:
        values |= unpack(b, b.token_ids.float())
    assert sorted(values) == [0, 1, 2]
    np.testing.assert_array_equal(values[2], rollouts[2].completion.token_ids)


def test_mini_batches_keep_groups_whole_and_depend_on_the_seed_alone():
    ids = np.repeat(np.arange(8), 4)
    parts = split_mini_batches(ids, 4, (3, 1))
    assert all(len(np.unique(ids[p])) == 2 and len(p) == 8 for p in parts)
    assert sorted(np.concatenate(parts)) == list(range(32))
    again = split_mini_batches(ids, 4, (3, 1))
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    other = split_mini_batches(ids, 4, (3, 2))
    assert any(a.tolist() != b.tolist() for a, b in zip(parts, other, strict=True))


def test_taken_sequences_keep_their_tokens_and_traces():
    traces = [
        RoutingTrace(np.full((n, 2, 2), i, np.uint8) + np.arange(2, dtype=np.uint8), np.ones(n, bool), 8)
        for i, n in ((0, 5), (1, 7), (2, 4))
    ]
    rollouts = [
        rollout(0, 2, 3, routing=traces[0]),
        rollout(1, 3, 4, routing=traces[1]),
        rollout(2, 1, 3, routing=traces[2]),
    ]
    (mini,) = pack(
        rollouts, [1, 2, 3], replicas=1, token_budget=64, mini_batches=1, max_completion_length=8, seed=(0,)
    )
    assert mini.micro_batches[0][0].routing is None  # held once, by the rollouts, until they are asked for
    ((batch,),) = mini.with_traces(rollouts).micro_batches
    taken = take_sequences([(batch, 2), (batch, 0)], replicas=1, token_budget=16)
    ((small,),) = taken
    found = unpack(small, small.token_ids.float())
    np.testing.assert_array_equal(found[2], rollouts[2].completion.token_ids)
    np.testing.assert_array_equal(found[0], rollouts[0].completion.token_ids)
    for s, index in enumerate(small.rollout_index.tolist()):
        rows = slice(int(small.cu_seqlens[s]), int(small.cu_seqlens[s + 1]))
        np.testing.assert_array_equal(small.routing[rows].expert_ids, traces[index].expert_ids)


@pytest.mark.parametrize(("replicas", "loads"), [(1, [[9, 8, 4]]), (2, [[9, 4], [8, 4]]), (7, [[9], [8]])])
def test_a_sample_of_sequences_stays_within_the_token_budget(replicas, loads):
    """9, 8 and 4 tokens, at most 9 in a pass: each is there once, and fillers train nothing."""
    sequences = [(np.arange(n) + 10 * n, 1) for n in (4, 9, 8)]
    passes = from_sequences(sequences, replicas=replicas, token_budget=9)
    assert len({len(replica) for replica in passes}) == 1  # collectives pair up
    assert [[b.num_tokens for b in replica] for replica in passes][: len(loads)] == loads
    assert all(b.num_tokens <= 9 for replica in passes for b in replica)
    found: dict[int, np.ndarray] = {}
    for replica in passes:
        for batch in replica:
            told = unpack(batch, batch.token_ids.float())
            assert not set(told) & set(found)
            found |= told
    assert {i: v.tolist() for i, v in found.items()} == {
        i: tokens[1:].tolist() for i, (tokens, _) in enumerate(sequences)
    }
    with pytest.raises(ValueError, match=r"token_budget must hold every sequence: got 8 for one of 9"):
        from_sequences(sequences, replicas=replicas, token_budget=8)


def test_bare_sequences_are_scored_from_their_start_and_never_at_their_first_token():
    mini = from_sequences([(np.array([4, 5, 6, 7]), 2), (np.array([8, 9]), 0)], replicas=2, token_budget=4)
    values: dict[int, list[float]] = {}
    for replica in mini:
        for batch in replica:
            values |= {k: v.tolist() for k, v in unpack(batch, batch.token_ids.float()).items()}
    assert values == {0: [6.0, 7.0], 1: [9.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_budget": 7}, r"token_budget must hold every sequence: got 7 for one of 8 tokens"),
        ({"replicas": 5}, r"a rollout for every replica: got 2 for 5 replicas"),
        ({"mini_batches": 3}, r"mini_batches must be at most the number of groups in the batch: got 3 and 1"),
    ],
)
def test_bad_layouts_are_refused(change, message):
    args = {"replicas": 1, "token_budget": 16, "mini_batches": 1, "max_completion_length": 8, "seed": (0,)}
    with pytest.raises(ValueError, match=message):
        pack([rollout(0, 2, 6), rollout(1, 2, 2)], [1.0, 1.0], **(args | change))


def test_a_rollout_without_a_trained_token_is_named():
    with pytest.raises(ValueError, match="rollout 1 has no trained token"):
        pack(
            [rollout(0, 2, 2), rollout(1, 2, 2, mask=[False, False])],
            [1.0, 1.0],
            replicas=1,
            token_budget=16,
            mini_batches=1,
            max_completion_length=8,
            seed=(0,),
        )


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (
            RoutingTrace(np.zeros((3, 1, 1), np.uint8), np.ones(3, bool), 4),
            "routing trace of rollout 0 is truncated: 3 rows for 4 tokens",
        ),
        (None, "rollout 0 has no routing trace"),
    ],
)
def test_a_truncated_or_missing_trace_is_named(routing, message):
    rollouts = [rollout(0, 2, 2, routing=routing)]
    (mini,) = pack(
        rollouts, [1.0], replicas=1, token_budget=16, mini_batches=1, max_completion_length=8, seed=(0,)
    )
    with pytest.raises(ValueError, match=message):
        mini.with_traces(rollouts)


def test_non_finite_engine_logprobs_name_the_token():
    with pytest.raises(ValueError, match=r"completion.logprobs must be finite: got nan at token 1 \(id 8\)"):
        Completion(
            np.array([7, 8]), np.ones(2, bool), np.array([-1.0, np.nan]), np.zeros(2, np.int32), "stop", ""
        )


def test_sequence_ids_follow_the_boundaries():
    (mini,) = pack(
        [rollout(0, 1, 1), rollout(1, 2, 3)],
        [1, 1],
        replicas=1,
        token_budget=9,
        mini_batches=1,
        max_completion_length=8,
        seed=(0,),
    )
    ((batch,),) = mini.micro_batches
    assert torch.equal(batch.sequence_ids(), torch.tensor([0, 0, 1, 1, 1, 1, 1]))


def test_sequences_are_those_that_teach():
    """Three sequences on two replicas of one micro-batch each, so the fourth place is a filler."""
    (mini,) = pack(
        [rollout(i, 2, 6) for i in range(3)],
        [1.0] * 3,
        replicas=2,
        token_budget=8,
        mini_batches=1,
        max_completion_length=6,
        seed=(0,),
    )
    found = [int(batch.rollout_index[s]) for batch, s in mini.sequences()]
    assert sorted(found) == [0, 1, 2]
    assert sum(batch.num_sequences for batch in mini.batches()) == 4
    assert mini.replicas == 2


def test_outputs_are_attached_batch_by_batch_and_none_is_lost():
    (mini,) = pack(
        [rollout(i, 2, 6) for i in range(4)],
        [1.0] * 4,
        replicas=2,
        token_budget=8,
        mini_batches=1,
        max_completion_length=6,
        seed=(0,),
    )
    outputs = [
        [LogprobOutput(torch.full((8,), float(i)), torch.zeros(8), "trace") for i in (r, r + 2)]
        for r in (0, 1)
    ]
    old = mini.with_outputs(outputs)
    assert [b.old_logprobs[0].item() for b in old.batches()] == [0.0, 2.0, 1.0, 3.0]
    assert [b.routing for b in old.batches()] == [None] * 4
    assert [b.routing for b in mini.with_outputs(outputs, keep_routing=True).batches()] == ["trace"] * 4
    assert [b.ref_logprobs[0].item() for b in mini.with_reference(outputs).batches()] == [0.0, 2.0, 1.0, 3.0]
    assert old.denominators == mini.denominators
    for short in ([outputs[0]], [outputs[0][:1], outputs[1]]):
        with pytest.raises(ValueError, match="shorter"):
            mini.with_outputs(short)
        with pytest.raises(ValueError, match="shorter"):
            mini.with_reference(short)


def test_every_rollout_has_its_advantage():
    layout = {"replicas": 1, "token_budget": 16, "mini_batches": 1, "max_completion_length": 8, "seed": (0,)}
    with pytest.raises(ValueError, match="one entry per rollout: got 1 for 2"):
        pack([rollout(0, 2, 2), rollout(1, 2, 2)], [1.0], **layout)


def test_a_filler_is_the_shortest_sequence_so_that_it_costs_least():
    sizes = [8, 8, 4]  # tokens; two replicas need four micro-batches of at most eight
    (mini,) = pack(
        [rollout(i, 2, size - 2) for i, size in enumerate(sizes)],
        [1.0] * 3,
        replicas=2,
        token_budget=8,
        mini_batches=1,
        max_completion_length=6,
        seed=(0,),
    )
    fillers = [b for b in mini.batches() if not b.loss_mask.any()]
    assert [b.num_tokens for b in fillers] == [4] * len(fillers)
    assert len(fillers) == 1


def test_advantages_per_token_stand_on_the_completions_tokens():
    first, second = rollout(0, 2, 3, mask=[True, False, True]), rollout(1, 1, 2)
    batch = pack_sequences([first, second], [np.array([0.5, 0.0, -1.0]), 2.0], [0, 1])
    assert batch.advantages.tolist() == [0.0, 0.0, 0.5, 0.0, -1.0, 2.0, 2.0, 2.0]
    assert batch.loss_mask.tolist() == [False, False, True, False, True, False, True, True]


def test_what_an_environment_said_counts_nowhere():
    """The denominators and the versions are those of the trained tokens alone."""
    (mini,) = pack(
        [rollout(0, 1, 4, mask=[False, True, False, True]), rollout(1, 1, 1)],
        [1.0, -1.0],
        replicas=1,
        token_budget=16,
        mini_batches=1,
        max_completion_length=8,
        seed=(0,),
    )
    assert (mini.denominators.sequences, mini.denominators.tokens) == (2, 3)
    ((batch,),) = mini.micro_batches
    own = batch.rows(batch.rollout_index.tolist().index(0))
    assert batch.policy_versions[own].tolist() == [-1, -1, 0, -1, 0]
    assert batch.rollout_logprobs[own].tolist() == pytest.approx([0, 0, -0.2, 0, -0.4])
