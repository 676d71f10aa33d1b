"""The routers' shift: at the old policy's experts, where a token is predicted, without a gradient."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_dist.coldstart.model import build_model, save_model
from gspo_dist.coldstart.recipes import Shape
from gspo_dist.config import LearnerConfig
from gspo_dist.learners.eager import EagerLearner
from gspo_dist.learners.loss import LossSpec, trained_index
from gspo_dist.objectives import Denominators, get_objective
from gspo_dist.routing import huggingface as routers
from gspo_dist.routing.scores import ScoreRecorder, ShiftMeter
from gspo_dist.routing.trace import RouterScores
from tests.unit.objectives.cases import of_lengths
from tests.unit.trainer.small import packed, rollout


def test_a_shift_by_hand():
    """Two layers and two experts of three. |log p - log q| are .5, .1 and .3, .3: exp(-.3) is .740818."""
    logits = torch.log(torch.tensor([[0.2, 0.3, 0.5]]))
    recorder = ScoreRecorder()
    for layer in (0, 1):
        recorder.see(layer, logits, torch.tensor([[2, 0]]))
    old = recorder.scores()
    assert old.expert_ids.tolist() == [[[2, 0], [2, 0]]]
    assert old.logprobs.tolist()[0][1] == pytest.approx([math.log(0.5), math.log(0.2)])
    moved = RouterScores(old.expert_ids, old.logprobs + torch.tensor([[[0.5, -0.1], [0.3, -0.3]]]))
    meter = ShiftMeter(moved)
    for layer in (0, 1):
        meter.see(layer, logits, torch.tensor([[0, 1]]))  # whichever experts are used now
    assert meter.shift().tolist() == pytest.approx([math.exp(-0.3)])
    still = ShiftMeter(old)
    for layer in (0, 1):
        still.see(layer, logits + 7.0, torch.tensor([[0, 1]]))  # a softmax does not see a constant
    assert still.shift().tolist() == pytest.approx([1.0])
    with pytest.raises(ValueError, match="one row per token: got 1 for 2 tokens"):
        ShiftMeter(old).see(0, logits.repeat(2, 1), torch.tensor([[0, 1]] * 2))


def test_a_layer_that_runs_again_in_the_backward_is_not_measured_again(monkeypatch):
    logits, ids = torch.zeros(1, 3), torch.tensor([[0]])
    meter = ShiftMeter(RouterScores(ids[:, None], torch.full((1, 1, 1), math.log(1 / 3) - 0.5)))
    meter.see(0, logits, ids)
    monkeypatch.setattr("gspo_dist.routing.scores.in_backward", lambda: True)
    meter.see(0, logits, ids)
    assert meter.shift().tolist() == pytest.approx([math.exp(-0.5)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shape = Shape(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, expert_hidden=16)
    save_model(build_model(shape, seed=0), folder)
    return folder


def learner_of(model, **knobs):
    return EagerLearner(LearnerConfig(precision="fp32", **knobs), model, total_steps=4)


@pytest.fixture
def batch():
    mini = packed([rollout(0, tokens=(5, 6, 7)), rollout(1, prompt=(3, 9), tokens=(8, 2))])
    (batches,) = mini[0].micro_batches
    return batches[0].with_(advantages=torch.where(batches[0].loss_mask, 1.0, 0.0))


def loss_of(learner, batch):
    spec = LossSpec(get_objective("rspo"), Denominators(2, 5, 8))
    stats = learner.forward_backward([batch], spec)
    grads = [g.clone() for g in learner.gradients if g is not None]
    learner.gradients = [None] * len(learner.parameters)
    return stats["objective/loss"].result(), stats["objective/router_shift"].result(), grads


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_learner_weighs_tokens_by_their_routers_shift(model, batch, checkpointing):
    learner = learner_of(model, activation_checkpointing=checkpointing)
    (output,) = learner.logprobs([batch], record_scores=True)
    assert output.router is not None
    assert output.router.logprobs.shape == (batch.num_tokens, 2, 2)
    old = batch.with_(old_logprobs=output.logprobs)
    unmoved = loss_of(learner, old.with_(old_router=output.router))
    assert unmoved[0] == pytest.approx(-1.0, abs=1e-6)
    assert unmoved[1] == pytest.approx(1.0, abs=1e-6)
    # Only rows before a trained token count: token t is predicted at t - 1.
    before = trained_index(batch) - 1
    shifted = output.router.logprobs.clone()
    shifted[before] += 0.2
    away = loss_of(learner, old.with_(old_router=RouterScores(output.router.expert_ids, shifted)))
    assert away[1] == pytest.approx(math.exp(-0.2), rel=1e-5)
    assert away[0] == pytest.approx(-math.exp(-0.2), rel=1e-5)
    for a, b in zip(away[2], unmoved[2], strict=True):  # a weight: the gradient keeps its direction
        torch.testing.assert_close(a, math.exp(-0.2) * b, rtol=1e-4, atol=1e-7)
    elsewhere = output.router.logprobs + 5.0
    elsewhere[before] = output.router.logprobs[before]
    assert loss_of(learner, old.with_(old_router=RouterScores(output.router.expert_ids, elsewhere)))[
        0
    ] == pytest.approx(unmoved[0])
    assert not any(routers._ROUTERS._hooks.values())  # nothing stays on the routers


def test_a_floor_holds_the_shift_and_a_stopped_gradient_keeps_it_a_weight():
    lp = torch.tensor([-1.0, -1.0], requires_grad=True)
    shift = torch.tensor([0.01, 1.0], requires_grad=True)
    result = get_objective("rspo", shift_floor=0.8).loss(
        lp, lp.detach(), torch.ones(2), of_lengths(2), Denominators(1, 2, 2), extra={"router_shift": shift}
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-math.sqrt(0.8), rel=1e-6)
    assert shift.grad is None


def test_rollouts_without_router_scores_are_told(model, batch):
    with pytest.raises(
        ValueError, match=r"old policy's routers thought, .* set objective\.old_logprobs=recompute"
    ):
        loss_of(learner_of(model), batch)


def test_passes_one_after_the_other_are_measured_each_against_its_own_scores():
    """As a learner runs micro-batches through its layers: 0.5 nats off in the first, 0.2 in the second."""
    logits, ids = torch.zeros(3, 2), torch.tensor([[0], [1], [0]])
    recorder = ScoreRecorder()
    for tokens in (3, 2):
        for layer in (0, 1):
            recorder.see(layer, logits[:tokens], ids[:tokens])
    first, second = recorder.passes()
    assert (len(first.expert_ids), len(second.expert_ids)) == (3, 2)
    meter = ShiftMeter(
        RouterScores(first.expert_ids, first.logprobs + 0.5),
        RouterScores(second.expert_ids, second.logprobs - 0.2),
    )
    for tokens in (3, 2):
        for layer in (0, 1):
            meter.see(layer, logits[:tokens], ids[:tokens])
    assert [t.tolist() for t in meter.totals] == [pytest.approx([1.0] * 3), pytest.approx([0.4] * 2)]
