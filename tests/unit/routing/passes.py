"""Passes of a tiny model that the tests of this folder share."""

import torch
from torch.nn import functional as F

from gspo_dist.routing import huggingface as routers


def recorded(model, tokens):
    """The routes of one forward without gradient."""
    with torch.no_grad(), routers.record(model) as recorder:
        model(tokens, use_cache=False)
    return recorder.trace()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model, tokens):
    logits = model(tokens, use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], tokens[0, 1:])


def trained(model, tokens, trace=None):
    """Loss and gradients of one forward and backward, under `trace` if given."""
    model.zero_grad()
    if trace is None:
        loss = loss_of(model, tokens)
        loss.backward()
    else:
        with routers.replay(model, trace):
            loss = loss_of(model, tokens)
            loss.backward()
    return loss.detach(), gradients(model)


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_under(model, trace, run):
    """Calls `run` inside a replay block."""
    with routers.replay(model, trace):
        run()
