"""Tokens of older policies in a micro-batch: what is mismatch, what is staleness, what changes nothing.

Learner and engine agree on every fresh token of these cases, up to a mismatch that is written down.
"""

from __future__ import annotations

import threading

import pytest
import torch

from gspo_dist.learners.loss import LossSpec, fresh_part, lags_of, micro_batch_loss, trained_index
from gspo_dist.metrics.stat import merge_stats, results
from gspo_dist.objectives import OBJECTIVES, Denominators, get_objective
from gspo_dist.objectives.staleness import LagOffsets
from gspo_dist.types import PackedBatch

VERSION = 12
# Three sequences of 3, 4 and 3 tokens, whose first token is the prompt. Lags: 0 0 | 8 4 0 | 4 4.
VERSIONS = [-1, 12, 12, -1, 4, 8, 12, -1, 8, 8]
MASK = [v >= 0 for v in VERSIONS]
# Learner minus engine, token by token.
DELTA = [0.0, 0.01, -0.03, 0.0, 0.5, 0.2, 0.02, 0.0, -0.1, -0.3]
ENGINE = [0.0, -1.0, -2.0, 0.0, -0.5, -1.5, -1.0, 0.0, -0.7, -0.9]
ADVANTAGES = [1.0] * 3 + [-2.0] * 4 + [0.5] * 3
TRAINED = [i for i, trained in enumerate(MASK) if trained]
LOGPROBS = [ENGINE[i] + DELTA[i] for i in TRAINED]


def batch(versions=VERSIONS, **changes):
    fields = {
        "token_ids": torch.arange(10),
        "position_ids": torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1, 2]),
        "cu_seqlens": torch.tensor([0, 3, 7, 10], dtype=torch.int32),
        "loss_mask": torch.tensor(MASK),
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64),
        "rollout_logprobs": torch.tensor(ENGINE, dtype=torch.float64),
        "rollout_index": torch.tensor([41, 17, 3]),
        "policy_versions": None if versions is None else torch.tensor(versions, dtype=torch.int32),
    }
    return PackedBatch(**{**fields, **changes})


def spec(name="gspo", version=VERSION, **changes):
    changes = {"measure_mismatch": True, **changes}
    if name == "m2po":
        changes["second_moment_cut"] = 0.05
    return LossSpec(get_objective(name), Denominators(3, 7, 8), policy_version=version, **changes)


def run(packed, loss_spec, **kwargs):
    leaf = torch.tensor(LOGPROBS, dtype=torch.float64, requires_grad=True)
    loss, stats = micro_batch_loss(leaf, torch.full_like(leaf, 0.7), packed, loss_spec, **kwargs)
    loss.backward()
    return loss.item(), leaf.grad.tolist(), stats


def test_lags_are_optimiser_steps_and_prompts_have_none():
    assert lags_of(batch(), VERSION).tolist() == [0, 0, 0, 0, 8, 4, 0, 0, 4, 4]
    assert lags_of(batch(), None) is None
    assert lags_of(batch(None), VERSION) is None
    assert lags_of(batch([-1 if v < 0 else 12 for v in VERSIONS]), 12) is None


def test_a_tokens_version_does_not_matter_where_nothing_is_trained():
    mask = torch.tensor(
        [False] * 4 + [False, False, True] + [False] * 3
    )  # only the fresh token of sequence 1
    assert lags_of(batch(loss_mask=mask), VERSION) is None


def test_fresh_sequences_are_renumbered_without_gaps():
    mask = torch.tensor([False] * 3 + MASK[3:])
    packed = batch([-1, 12, 12, -1, 12, 12, 12, -1, 8, 12], loss_mask=mask)
    keep, ids, count = fresh_part(packed, lags_of(packed, VERSION), trained_index(packed))
    assert keep.tolist() == [True, True, True, False, True]
    assert (ids.tolist(), count) == ([0, 0, 0, 1], 2)


def test_mismatch_is_of_the_fresh_tokens_alone():
    """Fresh: .01 -.03 of sequence 0 and .02 of sequence 1. Sequence means -.01 and .02, over two."""
    stats = run(batch(), spec())[2]
    out = results(stats)
    assert out["mismatch/kl"] == pytest.approx(-(0.01 - 0.03 + 0.02) / 3, abs=1e-12)
    assert out["mismatch/abs_log_ratio_max"] == pytest.approx(0.03, rel=1e-9)
    assert out["mismatch/log_ratio_mean"] == pytest.approx((-0.01 + 0.02) / 2, rel=1e-9)
    assert float(stats["mismatch/log_ratio_mean"].weight) == pytest.approx(2.0, rel=1e-12)


def test_staleness_is_of_the_sequences_with_older_tokens():
    """Sequence means -.01, .24 and -.2; the last two are stale. GSPO's clip holds none of the three."""
    out = results(run(batch(), spec())[2])
    assert out["staleness/token_fraction"] == pytest.approx(4 / 7, rel=1e-12)
    assert out["staleness/log_ratio_mean"] == pytest.approx((0.24 - 0.2) / 2, rel=1e-9)
    assert out["staleness/log_ratio_square"] == pytest.approx((0.24**2 + 0.2**2) / 2, rel=1e-9)
    assert out["staleness/outside_clip_fraction"] == pytest.approx(1.0, rel=1e-12)


def test_the_log_ratio_of_a_lag_is_the_mean_over_sequences_of_its_tokens():
    """Lag 4: .2 in sequence 1, the mean of -.1 and -.3 in sequence 2. Lag 8: .5 alone."""
    out = results(run(batch(), spec())[2])
    assert out["staleness/log_ratio_mean/lag_4"] == pytest.approx((0.2 - 0.2) / 2, abs=1e-12)
    assert out["staleness/log_ratio_mean/lag_8"] == pytest.approx(0.5, rel=1e-12)
    assert not [name for name in out if name.endswith("lag_0")]


def test_an_objective_on_token_ratios_counts_tokens_outside_of_its_clip():
    """GRPO's bounds are log(.8) = -.223 and log(1.27) = .239: .5 and -.3 lie outside."""
    out = results(run(batch(), spec("grpo"))[2])
    assert out["staleness/outside_clip_fraction"] == pytest.approx(2 / 7, rel=1e-12)
    assert "staleness/outside_clip_fraction" not in results(run(batch(), spec("sapo"))[2])


def test_a_batch_without_a_fresh_token_measures_no_mismatch():
    stale = [v if v < 0 else 8 for v in VERSIONS]
    out = results(run(batch(stale), spec())[2])
    assert not [name for name in out if name.startswith(("mismatch/", "moment/"))]
    assert out["staleness/token_fraction"] == 1.0


def test_a_fresh_batch_measures_as_one_that_nobody_dated():
    fresh = [v if v < 0 else VERSION for v in VERSIONS]
    dated, undated = results(run(batch(fresh), spec())[2]), results(run(batch(None), spec())[2])
    assert dated == undated
    assert not [name for name in dated if name.startswith("staleness/")]


def test_recomputed_log_probs_measure_both_from_the_start_of_the_step():
    old = [
        e + d + (0.001 if i in TRAINED else 0.0) for i, (e, d) in enumerate(zip(ENGINE, DELTA, strict=True))
    ]
    out = results(run(batch(old_logprobs=torch.tensor(old, dtype=torch.float64)), spec())[2])
    assert out["staleness/log_ratio_mean/lag_8"] == pytest.approx(0.501, rel=1e-9)
    assert out["mismatch/abs_log_ratio_max"] == pytest.approx(0.029, rel=1e-9)


@pytest.mark.parametrize(
    "name",
    [n for n, o in sorted(OBJECTIVES.items()) if not {"router_shift", "expected_score"} & set(o.spec.reads)],
)
def test_value_and_gradient_depend_on_versions_not_at_all(name):
    """Law 19: the ratio is to the policy that sampled each token, whichever that was."""
    plain = run(batch(None), spec(name))
    for versions in (VERSIONS, [v if v < 0 else 0 for v in VERSIONS], [v if v < 0 else 12 for v in VERSIONS]):
        assert run(batch(versions), spec(name))[:2] == plain[:2]


def many(versions, sequences=20):
    """Sequences of one prompt token and two trained ones, log ratios spread around -.01 and .02."""
    delta = torch.linspace(-0.05, 0.06, 2 * sequences)
    mask = torch.tensor([False, True, True] * sequences)
    engine = torch.where(mask, -1.0, 0.0)
    packed = PackedBatch(
        token_ids=torch.zeros(3 * sequences, dtype=torch.int64),
        position_ids=torch.arange(3).repeat(sequences),
        cu_seqlens=torch.arange(0, 3 * sequences + 1, 3, dtype=torch.int32),
        loss_mask=mask,
        advantages=torch.linspace(-1, 1, sequences).repeat_interleave(3),
        rollout_logprobs=engine,
        rollout_index=torch.arange(sequences),
        policy_versions=torch.where(mask, torch.tensor(versions).repeat(sequences), -1).int(),
    )
    return packed, -1.0 + delta


def value(packed, logprobs, **changes):
    leaf = logprobs.clone().requires_grad_()
    loss_spec = LossSpec(get_objective("gspo"), Denominators(20, 40, 8), policy_version=12, **changes)
    loss, stats = micro_batch_loss(leaf, torch.zeros_like(leaf), packed, loss_spec)
    loss.backward()
    return loss.item(), leaf.grad.tolist(), results(stats)["objective/offset"]


@pytest.mark.parametrize("version", [12, 8])
def test_recentring_by_age_with_one_version_is_recentring(version):
    """Law 19, bit for bit: in the first mini-batch by its own mean, later by a number that was measured."""
    packed, logprobs = many([-1, version, version])
    own = value(packed, logprobs, lag_offsets=LagOffsets(own=True))
    assert own == value(packed, logprobs, own_mean=True)
    later = value(packed, logprobs, lag_offsets=LagOffsets({12 - version: 0.0125}))
    assert later == value(packed, logprobs, offset=0.0125)
    assert own != value(packed, logprobs)


def test_recentring_by_age_takes_out_of_each_lag_its_own():
    """First tokens are 8 steps old and second ones fresh, with a mean of each."""
    packed, logprobs = many([-1, 4, 12])
    delta = (logprobs + 1.0).double().reshape(20, 2)
    _, _, offset = value(packed, logprobs, lag_offsets=LagOffsets(own=True))
    assert offset == pytest.approx(float(delta.mean()), rel=1e-5)
    got = value(packed, logprobs, lag_offsets=LagOffsets(own=True))
    by_hand = (delta - delta.mean(0)).reshape(-1).float() - 1.0
    assert got[0] == pytest.approx(value(packed, by_hand)[0], rel=1e-4)
    assert got[1] == pytest.approx(value(packed, by_hand)[1], rel=1e-4)


class Ranks:
    """Two context-parallel ranks as threads: the sum of both, for every sum that both ask for."""

    def __init__(self) -> None:
        self.barrier, self.parts = threading.Barrier(2, timeout=20), {}

    def sum_for(self, rank):
        def all_reduce(x):
            self.parts[rank] = x
            self.barrier.wait()
            total = self.parts[0].detach() + self.parts[1].detach()
            self.barrier.wait()
            return total + (x - x.detach())

        return all_reduce


def test_context_parallel_ranks_measure_what_one_rank_does():
    """Rank 1 holds no fresh token and rank 0 none of lag 8, and still both take part in every sum."""
    held = ([0, 1, 4, 5], [2, 3, 6])
    ranks, out = Ranks(), {}

    def work(rank):
        at = held[rank]
        out[rank] = micro_batch_loss(
            torch.tensor([LOGPROBS[i] for i in at], dtype=torch.float64, requires_grad=True),
            torch.full((len(at),), 0.7, dtype=torch.float64),
            batch(),
            spec(),
            index=torch.tensor([TRAINED[i] for i in at]),
            all_reduce=ranks.sum_for(rank),
        )[1]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    merged, whole = results(merge_stats([out[0], out[1]])), results(run(batch(), spec())[2])
    names = [name for name in whole if name.startswith(("staleness/", "mismatch/"))]
    assert len(names) > 15
    for name in names:
        assert merged[name] == pytest.approx(whole[name], rel=1e-9, abs=1e-12), name
