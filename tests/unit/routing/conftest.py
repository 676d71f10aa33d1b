"""Tiny random mixture-of-experts models whose routers are far from ties and whose experts differ."""

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gspo_dist.routing.huggingface import find_routers
from gspo_dist.routing.trace import RoutingTrace

VOCABULARY = 61


def tiny_model(seed, **changes):
    """4 decoder layers of which layer 1 is dense: 3 routers of top-2 out of 8 experts, unless changed."""
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 4,
        "mlp_only_layers": [1],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(defaults | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.3)
    return model.train()


@pytest.fixture
def make_model():
    return tiny_model


@pytest.fixture
def tokens():
    torch.manual_seed(3)
    return torch.randint(0, VOCABULARY, (1, 23))


@pytest.fixture
def random_trace():
    def make(seed, tokens=23, layers=3, top_k=2, experts=8):
        rng = np.random.default_rng(seed)
        dtype = np.uint8 if experts <= 256 else np.uint16
        ids = rng.random((tokens, layers, experts)).argsort(-1)[..., :top_k].astype(dtype)
        return RoutingTrace(ids, np.ones(tokens, np.bool_), experts)

    return make


@pytest.fixture
def clean():
    """Asserts that a model's routers carry no hook and no replaced forward."""

    def check(model):
        for router in find_routers(model).values():
            assert not router._forward_hooks
            assert not router._forward_pre_hooks
            assert "forward" not in vars(router)

    return check
