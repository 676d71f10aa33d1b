"""Score centering: the mean score under the engine's distribution, from its likeliest tokens."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_dist.config import GuardConfig, ObjectiveConfig
from gspo_dist.objectives import Denominators, get_objective
from gspo_dist.objectives.centering import expected_score
from tests.unit.objectives.cases import of_lengths

F64 = torch.float64


def pair(seed=0, vocabulary=7):
    """Log-probs of an engine and logits of a learner that differ."""
    rng = torch.Generator().manual_seed(seed)
    q, logits = torch.randn(2, vocabulary, generator=rng, dtype=F64) * 1.5
    return q.log_softmax(0), logits.requires_grad_()


def gradient(y, q, logits, k, advantage=1.0, cap=None):
    """Of the loss of one token y in the learner's logits, with the engine's k likeliest tokens."""
    ids = q.topk(k).indices
    learner = logits.log_softmax(0)
    mean, _ = expected_score(q[ids][None], learner[ids][None], cap)
    loss = get_objective("score_centering", weight_cap=cap).loss(
        learner[y][None],
        q[y][None],
        torch.tensor([advantage], dtype=F64),
        of_lengths(1),
        Denominators(1, 1, 8),
        extra={"expected_score": mean},
    )
    (found,) = torch.autograd.grad(loss.loss, logits)
    return found


def as_known(q, logits, ids):
    """The engine's probabilities on `ids`, with its rest spread as the learner spreads it."""
    pi = logits.detach().softmax(0)
    others = torch.ones(7, dtype=torch.bool)
    others[ids] = False
    spread = q.exp()
    spread[others] = (1 - q[ids].exp().sum()) * pi[others] / pi[others].sum()
    return spread


def test_the_value_by_hand():
    q = torch.tensor([[0.6, 0.3], [0.5, 0.0]], dtype=F64).log()
    pi = torch.tensor([[0.5, 0.3], [0.2, 0.7]], dtype=F64).log()
    mean, rest = expected_score(q, pi)
    assert mean.tolist() == pytest.approx(
        [
            0.6 * math.log(0.5) + 0.3 * math.log(0.3) + 0.1 * math.log(0.2),
            0.5 * math.log(0.2) + 0.5 * math.log(0.8),  # the second candidate is none: no mass of it is known
        ]
    )
    assert rest.tolist() == pytest.approx([0.1, 0.5])


def test_with_the_whole_vocabulary_the_gradient_is_the_token_minus_the_engines_distribution():
    """A (1[y] - q) in the logits, whatever the learner is: closed form. Plain REINFORCE has A (1[y] - pi)."""
    q, logits = pair()
    for y in range(7):
        wanted = -1.5 * (torch.nn.functional.one_hot(torch.tensor(y), 7).to(F64) - q.exp())
        assert (gradient(y, q, logits, 7, 1.5) - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_mean_over_the_engine_is_zero_where_the_rest_is_spread_as_the_learner_spreads_it(k):
    """q' has the engine's k likeliest tokens and the learner's proportions among the others."""
    q, logits = pair(1)
    ids = q.topk(k).indices
    spread = as_known(q, logits, ids)
    mean = sum(spread[y] * gradient(y, q, logits, k) for y in range(7))
    assert mean.abs().max() < 1e-12
    plain = sum(spread[y] * torch.autograd.grad(logits.log_softmax(0)[y], logits)[0] for y in range(7))
    assert plain.abs().max() > 0.05  # the drift that is taken out


# --- beside an importance weight: arXiv 2609.20807, appendix A.2 ---


def test_the_weighted_value_by_hand():
    """Weights: 0.2 / 0.6 and 1 (0.7 / 0.3, cut), 1 for the rest. A weight times q is min(pi, q)."""
    q = torch.tensor([[0.6, 0.3]], dtype=F64).log()
    pi = torch.tensor([[0.2, 0.7]], dtype=F64).log()
    mean, rest = expected_score(q, pi, 1.0)
    assert mean.item() == pytest.approx(0.2 * math.log(0.2) + 0.3 * math.log(0.7) + 0.1 * math.log(0.1))
    assert rest.item() == pytest.approx(0.1)
    wider, _ = expected_score(q, pi, 2.0)
    assert wider.item() == pytest.approx(0.2 * math.log(0.2) + 0.6 * math.log(0.7) + 0.1 * math.log(0.1))


@pytest.mark.parametrize("cap", [1.0, 1.3, 4.0])
def test_with_the_whole_vocabulary_the_weighted_gradient_is_that_of_the_closed_form(cap):
    """A (w_y (1[y] - pi) - m + sum(m) pi) in the logits, with m = min(pi, c q)."""
    q, logits = pair()
    pi = logits.detach().softmax(0)
    m = torch.minimum(pi, cap * q.exp())
    for y in range(7):
        one = torch.nn.functional.one_hot(torch.tensor(y), 7).to(F64)
        wanted = -1.5 * (min(float(pi[y] / q[y].exp()), cap) * (one - pi) - m + m.sum() * pi)
        assert (gradient(y, q, logits, 7, 1.5, cap) - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("cap", [1.0, 1.3, 4.0])
def test_the_mean_of_the_weighted_score_over_the_engine_is_zero(k, cap):
    """q' spreads the rest as the learner does, so that a token of the rest has the rest's weight."""
    q, logits = pair(1)
    ids = q.topk(k).indices
    pi, spread = logits.detach().softmax(0), as_known(q, logits, ids)
    engine = spread.log()
    mean, plain = torch.zeros(7, dtype=F64), torch.zeros(7, dtype=F64)
    for y in range(7):
        learner = logits.log_softmax(0)
        centre, _ = expected_score(engine[ids][None], learner[ids][None], cap)
        weight = min(float(pi[y] / spread[y]), cap)
        plain += spread[y] * torch.autograd.grad(weight * learner[y], logits, retain_graph=True)[0]
        mean += spread[y] * torch.autograd.grad(weight * learner[y] - centre[0], logits)[0]
    assert mean.abs().max() < 1e-12
    assert cap == 4.0 or plain.abs().max() > 1e-3  # the drift that is taken out


def test_a_weight_without_a_bound_leaves_nothing_to_take_out():
    """min(pi, c q) is then pi, whose mean score is 0: REINFORCE with its importance weight."""
    q, logits = pair(2)
    pi = logits.detach().softmax(0)
    found = gradient(3, q, logits, 4, cap=1e9)
    plain = torch.autograd.grad(-(pi[3] / q[3].exp()) * logits.log_softmax(0)[3], logits)[0]
    assert (found - plain).abs().max() < 1e-12


def test_where_engine_and_learner_agree_a_weight_changes_nothing():
    _, logits = pair(2)
    q = logits.detach().log_softmax(0)
    assert (gradient(3, q, logits, 4, cap=1.0) - gradient(3, q, logits, 4)).abs().max() < 1e-12


@pytest.mark.parametrize("cap", [0.5, 0, "2", float("inf")])
def test_a_cap_below_one_is_refused(cap):
    with pytest.raises(ValueError, match=r"score_centering\.weight_cap must be"):
        get_objective("score_centering", weight_cap=cap)


def test_a_weight_needs_the_engines_log_probs():
    quiet = {"name": "score_centering", "guard": GuardConfig(action="off"), "params": {"weight_cap": 2.0}}
    ObjectiveConfig(old_logprobs="rollout", **quiet)
    with pytest.raises(
        ValueError, match=r"got weight_cap=2, old_logprobs=recompute; set old_logprobs=rollout"
    ):
        ObjectiveConfig(old_logprobs="recompute", **quiet)


@pytest.mark.parametrize("clip", ["clip_low", "clip_high", "dual_clip"])
def test_a_clip_beside_the_centring_is_refused(clip):
    """A clip takes tokens out that the mean over the engine still has in it."""
    with pytest.raises(
        ValueError, match=f"score_centering has no parameter '{clip}', because it clips nothing"
    ):
        ObjectiveConfig(
            name="score_centering",
            old_logprobs="rollout",
            guard=GuardConfig(action="off"),
            params={clip: 0.2},
        )
    with pytest.raises(ValueError, match=f"has no parameter '{clip}'"):
        get_objective("score_centering", **{clip: 0.2})


def test_where_engine_and_learner_agree_its_mean_is_that_of_reinforce():
    _, logits = pair(2)
    q = logits.detach().log_softmax(0)
    found = gradient(3, q, logits, 4)
    plain = torch.autograd.grad(-logits.log_softmax(0)[3], logits)[0]
    assert (found - plain).abs().max() < 1e-12  # grad of C is 0 there


def test_a_learner_that_is_sure_has_a_finite_score_and_gradient():
    logits = torch.tensor([50.0, 0.0, 0.0], dtype=torch.float32).requires_grad_()
    q = torch.tensor([[0.9, 0.05]]).log()
    mean, _ = expected_score(q, logits.log_softmax(0)[None, :2])
    (found,) = torch.autograd.grad(mean.sum(), logits)
    assert torch.isfinite(mean).all()
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("candidates", [0, 129, 2.5, "8"])
def test_a_number_of_candidates_that_no_engine_gives_is_refused(candidates):
    with pytest.raises(ValueError, match=r"candidates must be"):
        get_objective("score_centering", candidates=candidates)


def test_the_engine_is_asked_for_as_many_as_the_objective_reads():
    quiet = {"old_logprobs": "rollout", "guard": GuardConfig(action="off")}
    assert ObjectiveConfig(name="score_centering", **quiet).candidates == 32
    assert ObjectiveConfig(name="score_centering", params={"candidates": 5}, **quiet).candidates == 5
    assert ObjectiveConfig(name="reinforce", **quiet).candidates == 0
