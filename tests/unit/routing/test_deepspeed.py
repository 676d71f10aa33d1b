"""Record and replay on AutoEP routers, on a stand-in with AutoEP's interface."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from gspo_dist.routing import deepspeed as routers
from gspo_dist.routing.trace import RoutingTrace


class Router(nn.Module):
    """AutoEP's router in small: linear gate, score function, top-k, gate weights, tokens per expert."""

    def __init__(self, score_func="softmax", route_norm=True, route_scale=1.0):
        super().__init__()
        self.gate = nn.Linear(16, 8, bias=False)
        self.top_k, self.num_experts = 2, 8
        self.score_func, self.route_norm, self.route_scale = score_func, route_norm, route_scale

    def forward(self, x):
        logits = self.gate(x).float()
        scores = logits.softmax(-1) if self.score_func == "softmax" else logits.sigmoid()
        weights, ids = scores.topk(2, dim=-1)
        if self.route_norm:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.route_scale, ids, torch.bincount(ids.flatten(), minlength=8).int()


class Layer(nn.Module):
    """What AutoEP puts in place of an MoE block."""

    _is_autoep_layer = True

    def __init__(self, **kwargs):
        super().__init__()
        self.router = Router(**kwargs)

    def forward(self, x):
        return self.router(x)


def make_model(**kwargs):
    torch.manual_seed(0)
    return nn.ModuleDict({"first": Layer(**kwargs), "dense": nn.Linear(16, 16), "second": Layer(**kwargs)})


def run(model, x):
    return [model[name](x) for name in ("first", "second")]


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("route_norm", [True, False])
def test_replaying_the_own_routes_changes_no_bit(score_func, route_norm):
    model = make_model(score_func=score_func, route_norm=route_norm, route_scale=2.5)
    x = torch.randn(40, 16)
    with routers.record(model) as recorder:
        native = run(model, x)
    trace = recorder.trace()
    np.testing.assert_array_equal(trace.expert_ids, np.stack([ids.numpy() for _, ids, _ in native], 1))
    with routers.replay(model, trace):
        again = run(model, x)
    for want, got in zip(native, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_other_routes_give_their_weights_counts_and_gradient(random_trace):
    """Layer by layer: the renormalised softmax at the given ids, as many tokens per expert as the ids say."""
    model = make_model()
    trace = random_trace(5, tokens=40, layers=2)
    x = torch.randn(40, 16)
    with routers.replay(model, trace):
        outputs = run(model, x)
    for layer, (name, (weights, ids, counts)) in enumerate(zip(("first", "second"), outputs, strict=True)):
        want = torch.from_numpy(trace.expert_ids[:, layer].astype(np.int64))
        assert torch.equal(ids, want)
        assert counts.dtype == torch.int32
        assert counts.tolist() == np.bincount(trace.expert_ids[:, layer].flatten(), minlength=8).tolist()
        chosen = (x.double() @ model[name].router.gate.weight.double().T).gather(1, want)
        torch.testing.assert_close(weights.double(), chosen.softmax(-1), rtol=1e-5, atol=1e-6)
    (outputs[0][0][:, 0]).sum().backward()
    assert model["first"].router.gate.weight.grad.abs().max() > 1e-3
    for name in ("first", "second"):
        assert not model[name].router._forward_hooks
        assert not model[name].router.gate._forward_hooks


def test_unknown_rows_keep_the_routers_own_choice(random_trace):
    model = make_model()
    trace = random_trace(5, tokens=40, layers=2)
    known = np.arange(40) % 3 > 0
    x = torch.randn(40, 16)
    native = run(model, x)
    with routers.replay(model, RoutingTrace(trace.expert_ids, known, 8)):
        replayed = run(model, x)
    for layer in range(2):
        ids = replayed[layer][1].numpy()
        np.testing.assert_array_equal(ids[known], trace.expert_ids[known, layer])
        np.testing.assert_array_equal(ids[~known], native[layer][1].numpy()[~known])


def test_gate_weights_by_hand() -> None:
    """Scores ln(1..4) softmaxed are 0.1 to 0.4: ids 3 and 0 have 0.4 and 0.1, renormalised 0.8 and 0.2."""
    logits, ids = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log(), torch.tensor([[3, 0]])
    router = SimpleNamespace(score_func="softmax", route_norm=False, route_scale=1.0)
    torch.testing.assert_close(routers.gate_weights(router, logits, ids), torch.tensor([[0.4, 0.1]]))
    router.route_norm = True
    torch.testing.assert_close(routers.gate_weights(router, logits, ids), torch.tensor([[0.8, 0.2]]))
    router.route_scale = 2.5
    torch.testing.assert_close(routers.gate_weights(router, logits, ids), torch.tensor([[2.0, 0.5]]))


def test_a_router_that_skips_its_gate_is_refused(random_trace):
    model = make_model()
    model["first"].router.forward = lambda x: (None, torch.zeros(40, 2, dtype=torch.int64), None)
    with (
        pytest.raises(RuntimeError, match="without calling its gate"),
        routers.replay(model, random_trace(5, tokens=40, layers=2)),
    ):
        run(model, torch.randn(40, 16))


class Seen(list):
    """A watcher that keeps what it was shown."""

    def see(self, layer, logits, ids):
        self.append((layer, logits.detach(), ids))


def test_a_watcher_sees_the_gates_logits_and_the_experts_that_are_used(random_trace):
    model, seen, x = make_model(route_scale=2.5), Seen(), torch.randn(40, 16)
    with routers.watch(model, seen):
        outputs = run(model, x)
    assert [layer for layer, _, _ in seen] == [0, 1]
    for (_, logits, ids), (_, native, _), name in zip(seen, outputs, ("first", "second"), strict=True):
        assert torch.equal(logits, model[name].router.gate(x))
        assert torch.equal(ids, native)
    trace = random_trace(5, tokens=40, layers=2)
    with routers.replay(model, trace), routers.watch(model, seen):
        run(model, x)
    assert torch.equal(seen[-1][2], torch.from_numpy(trace.expert_ids[:, 1].astype(np.int64)))
    assert not model["first"].router._forward_hooks


def test_a_model_without_autoep_layers_is_refused():
    with pytest.raises(ValueError, match=r"set learner\.deepspeed\.expert_parallel above 1"):
        routers.find_routers(nn.Linear(2, 2))
