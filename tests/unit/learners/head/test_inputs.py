"""What the head refuses, by the name of the argument, before any arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_dist.learners.head.inputs import check_all_taken
from gspo_dist.learners.head.logprobs import taken_logprobs

N, H, V = 7, 5, 23


def arguments() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"hidden": (N, H), "weight": (V, H), "bias": (V,)}
    tensors = {k: torch.randn(*shape, generator=g, dtype=torch.float64) for k, shape in shapes.items()}
    return tensors | {"token_ids": torch.randint(V, (N,), generator=g)}


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("token_ids", {"token_ids": torch.tensor([0, 1, 2, 3, 4, 5, V])}),
        ("token_ids", {"token_ids": torch.tensor([0, 1, 2, 3, 4, 5, -100])}),
        ("token_ids", {"token_ids": torch.zeros(N - 1, dtype=torch.int64)}),
        ("token_ids", {"token_ids": torch.zeros(N)}),
        ("hidden", {"hidden": torch.zeros(N, H + 1, dtype=torch.float64)}),
        ("hidden", {"hidden": torch.zeros(1, N, H, dtype=torch.float64)}),
        ("weight", {"weight": torch.zeros(H, V, dtype=torch.float64)}),
        ("weight", {"weight": torch.zeros(V, H)}),
        ("weight", {"weight": torch.zeros(V, H, dtype=torch.float64, device="meta")}),
        ("bias", {"bias": torch.zeros(V + 1, dtype=torch.float64)}),
        ("bias", {"bias": torch.zeros(V)}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": -1.0}),
        ("temperature", {"temperature": math.nan}),
        ("temperature", {"temperature": math.inf}),
        ("logit_scale", {"logit_scale": 0.0}),
        ("logit_softcap", {"logit_softcap": -30.0}),
        ("chunk_tokens", {"chunk_tokens": 0}),
        ("kept_bytes", {"kept_bytes": -1}),
        ("implementation", {"implementation": "liger"}),
        ("triton", {"implementation": "triton"}),
    ],
)
def test_a_bad_argument_is_named(field, change):
    with pytest.raises(ValueError, match=field):
        taken_logprobs(**arguments() | change)


def test_ids_that_no_shard_took_are_listed():
    taken = torch.tensor([-1.5, -torch.inf, 0.0, -torch.inf])
    with pytest.raises(ValueError, match=r"some rank's weight shard: got \[31, 8\]"):
        check_all_taken(taken, torch.tensor([4, 31, 5, 8]))
    check_all_taken(taken[[0, 2]], torch.tensor([4, 5]))
