"""Terms of the planner's memory against the objects that they stand for, at toy size, by measured bytes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from gspo_dist.coldstart.model import build_model, model_config
from gspo_dist.coldstart.recipes import recipe_named
from gspo_dist.models.shape import shape_from_config
from gspo_dist.packing import pack_sequences
from gspo_dist.planner.host import SENT_BYTES, TOKEN_BYTES
from gspo_dist.planner.layout import EngineLayout
from gspo_dist.planner.memory import engine_weights, learner_states
from gspo_dist.routing import huggingface as routers
from gspo_dist.routing.scores import ScoreRecorder
from gspo_dist.routing.trace import RoutingTrace, id_dtype
from gspo_dist.types import Completion, Prompt, Rollout
from tests.unit.planner.views import engine_of, learner_of

RECIPE = recipe_named("quickstart").shape


@pytest.fixture(scope="module")
def model():
    return build_model(RECIPE, 0)


@pytest.fixture(scope="module")
def shape():
    hf = {**model_config(RECIPE).to_dict(), "architectures": ["Qwen3MoeForCausalLM"]}
    return shape_from_config(hf, "toy")


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_weights_gradients_and_moments_of_an_eager_rank(model, shape):
    """In float32 the optimiser keeps no master weights of its own: they are the weights."""
    ids = torch.arange(24)[None] % shape.vocab
    model(input_ids=ids).logits.sum().backward()
    parameters = list(model.parameters())
    for p in parameters:  # an expert without a token has no gradient until the optimiser asks for one
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    items = {i.name: i.bytes for i in learner_states(shape, learner_of("eager", precision="fp32"))[0]}
    assert items["weights"] == size(parameters)
    assert items["gradients"] == size(p.grad for p in parameters)
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert items["optimizer"] >= size(moments)


def test_an_engines_weights_are_those_of_the_model(model, shape):
    assert engine_weights(shape, engine_of(precision="fp32")) == size(model.parameters())


def test_the_cache_of_a_token(model, shape):
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.arange(10)[None], past_key_values=cache)
    held = size(t for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == 10 * shape.kv_bytes_per_token(EngineLayout(engine_of(precision="fp32").config).width)


def test_a_token_of_a_trace(shape):
    trace = RoutingTrace(
        np.zeros((7, shape.moe_layers, shape.top_k), id_dtype(shape.num_experts)),
        np.ones(7, np.bool_),
        shape.num_experts,
    )
    assert trace.expert_ids.nbytes + trace.known.nbytes == 7 * shape.trace_bytes_per_token


def test_a_token_of_a_rollout_with_its_place_in_a_packed_batch():
    """Beside its route: what the completion holds, and what the micro-batch holds of the same token."""
    tokens = 1000
    completion = _completion(tokens)
    rollout = Rollout(0, 0, Prompt("p", (1,), "p"), completion, 1.0)
    own = sum(
        getattr(completion, n).nbytes for n in ("token_ids", "loss_mask", "logprobs", "policy_versions")
    )
    batch = pack_sequences([rollout], [1.0], [0])
    packed = size(t for t in vars(batch).values() if isinstance(t, torch.Tensor) and t.numel() > tokens)
    assert own == 17 * tokens
    assert packed == 29 * (tokens + 1)
    assert TOKEN_BYTES == 17 + 29 + 4 + 4  # and old_logprobs and ref_logprobs, one float32 each


def test_a_token_on_its_way_to_a_rank_is_copied_and_its_route_is_not():
    """Ray pickles by protocol 5: what it takes out of band is read where it lies, the rest is copied."""
    tokens = 5000
    rollout = Rollout(0, 0, Prompt("p", (1,), "p"), _completion(tokens), 1.0)
    trace = RoutingTrace(np.zeros((tokens + 1, 4, 2), np.uint8), np.ones(tokens + 1, np.bool_), 8)
    batch = pack_sequences([rollout], [1.0], [0])
    batch = batch.with_(
        old_logprobs=torch.zeros(tokens + 1), ref_logprobs=torch.zeros(tokens + 1), routing=trace
    )
    apart: list[pickle.PickleBuffer] = []
    inside = len(pickle.dumps(batch, protocol=5, buffer_callback=apart.append))
    assert sum(buffer.raw().nbytes for buffer in apart) == (4 * 2 + 1) * (tokens + 1)
    assert inside == pytest.approx(SENT_BYTES * tokens, rel=0.05)


def test_every_rank_of_a_replica_records_its_routes(model, shape):
    """What R2 adds to a rank, twin or not: the trace of what it computed."""
    batch = pack_sequences([Rollout(0, 0, Prompt("p", (1,), "p"), _completion(9), 1.0)], [1.0], [0])
    with routers.record(model) as recorder, torch.no_grad():
        model(input_ids=batch.token_ids[None] % shape.vocab)
    trace = recorder.trace()
    assert trace.expert_ids.nbytes + trace.known.nbytes == batch.num_tokens * shape.trace_bytes_per_token


def test_router_scores_of_passes_are_held_layer_by_layer_and_travel_as_tensors_do(shape):
    """Megatron's ranks hold those of all passes till the last one is over."""
    recorder, tokens, passes = ScoreRecorder(), 500, 3
    ids = torch.zeros((tokens, shape.top_k), dtype=torch.int64)
    for _ in range(passes):
        for layer in range(shape.moe_layers):
            recorder.see(layer, torch.zeros((tokens, shape.num_experts)), ids)
    row = shape.score_bytes_per_token
    kept = [field for layer in recorder.seen.values() for one in layer for field in one]
    assert size(kept) == passes * tokens * row
    assert sum(scores.nbytes for scores in recorder.passes()) == passes * tokens * row  # beside them
    apart: list[pickle.PickleBuffer] = []
    inside = len(pickle.dumps(recorder.passes()[0], protocol=5, buffer_callback=apart.append))
    assert apart == []
    assert inside == pytest.approx(tokens * row, rel=0.1)


def _completion(tokens: int) -> Completion:
    return Completion(
        token_ids=np.zeros(tokens, np.int64),
        loss_mask=np.ones(tokens, np.bool_),
        logprobs=np.zeros(tokens, np.float32),
        policy_versions=np.zeros(tokens, np.int32),
        finish_reason="stop",
        text="",
    )
