"""The eager learner computes a centred score: its gradient against logits that are held whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gspo_dist.candidates import Candidates
from gspo_dist.coldstart.model import build_model, save_model
from gspo_dist.coldstart.recipes import Shape
from gspo_dist.config import LearnerConfig
from gspo_dist.learners.eager import EagerLearner
from gspo_dist.learners.loss import LossSpec, trained_index
from gspo_dist.objectives import Denominators, get_objective
from gspo_dist.packing import pack_sequences
from tests.unit.trainer.small import rollout

SHAPE = Shape(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, expert_hidden=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(build_model(SHAPE, seed=0), folder)
    return folder


def engine_of(tokens, vocabulary, seed):
    """What an engine of another distribution gives of every token of the vocabulary."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(tokens, vocabulary))
    table -= np.log(np.exp(table).sum(1, keepdims=True))
    order = np.argsort(-table, axis=1).astype(np.int32)
    return Candidates(order, np.take_along_axis(table, order, 1).astype(np.float32))


@pytest.mark.parametrize("cap", [None, 1.5])
def test_with_the_whole_vocabulary_the_gradient_is_that_of_the_closed_form(model, cap):
    """sum_t A_t sum_v (1[v = y_t] - q_t(v)) x_t(v) has that gradient, x being the logits.

    Beside a weight w it is w (1[y] - pi) - m + sum(m) pi in place of the bracket, with m = min(pi, cap q).
    """
    learner = EagerLearner(LearnerConfig(precision="fp32"), model, total_steps=4)
    vocabulary = learner.policy.hf.config.vocab_size
    # The engine's own numbers only weigh: those of the first are below the cap, those of the second above.
    rollouts = [
        rollout(0, tokens=(5, 6, 7), logprob=-4.0),
        rollout(1, prompt=(3, 9), tokens=(8, 2), logprob=-6.0),
    ]
    rollouts = [
        replace(r, completion=replace(r.completion, candidates=engine_of(len(r.completion), vocabulary, i)))
        for i, r in enumerate(rollouts)
    ]
    batch = pack_sequences(rollouts, [1.0, -0.5], [0, 1])
    spec = LossSpec(get_objective("score_centering", candidates=128, weight_cap=cap), Denominators(2, 5, 8))
    stats = learner.forward_backward([batch], spec)
    assert stats["objective/candidates_rest"].result() == pytest.approx(0.0, abs=1e-6)
    found = [None if g is None else g.clone() for g in learner.gradients]

    index = trained_index(batch)
    kept = []
    head = learner.policy.hf.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    learner.policy(batch.token_ids, batch.position_ids, batch.cu_seqlens, index)
    hook.remove()
    x = kept[0] @ head.weight.T
    q = torch.zeros_like(x).scatter(
        1, batch.candidate_ids[index].long(), batch.candidate_logprobs[index].exp()
    )
    own = torch.nn.functional.one_hot(batch.token_ids[index], vocabulary)
    bracket = own - q
    if cap is not None:
        pi = x.detach().softmax(1)
        ratio = (pi * own).sum(1) / batch.rollout_logprobs[index].exp()
        assert ratio.min() < cap < ratio.max()
        m = torch.minimum(pi, cap * q)
        bracket = ratio.clamp(max=cap)[:, None] * (own - pi) - m + m.sum(1, keepdim=True) * pi
    loss = -(batch.advantages[index, None] * bracket * x).sum() / 2
    wanted = torch.autograd.grad(loss, learner.parameters, allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None or not a.any()) if b is None else (a - b).abs().max() < 1e-5 * b.abs().max() + 1e-9


def test_rollouts_without_candidates_are_told(model):
    learner = EagerLearner(LearnerConfig(precision="fp32"), model, total_steps=4)
    batch = pack_sequences([rollout(0, tokens=(5, 6))], [1.0], [0])
    with pytest.raises(ValueError, match=r"reads the engine's likeliest tokens, .* came without them: use"):
        learner.forward_backward([batch], LossSpec(get_objective("score_centering"), Denominators(1, 2, 8)))
