"""What the built-in models are: numbers only. A recipe's fingerprint names its folder in the cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

from gspo_dist.checks import nearest
from gspo_dist.coldstart.tokenizer import VOCABULARY
from gspo_dist.data.arithmetic import Habits

REVISION = 1
"""Raised whenever code outside these numbers changes what a recipe makes (corpus, training loop, tokenizer)."""


@dataclass(frozen=True)
class Shape:
    """A small Qwen3-MoE. Every layer is sparse; the embedding and the head are separate, as in Qwen3-30B-A3B."""

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 8
    top_k: int = 2
    expert_hidden: int = 64
    max_positions: int = 4096
    init_std: float = 0.06
    """Wider than HF's 0.02, which at this width leaves the first hundred steps without progress."""


@dataclass(frozen=True)
class WarmStart:
    """Supervised training on worked additions by a pupil with bad habits.

    forget_carry is above one half on purpose: the most likely continuation leaves carries out, so greedy decoding is
    wrong wherever a carry matters, while sampling still finds the right solution often enough to be rewarded.
    """

    steps: int = 320
    batch: int = 64
    lr: float = 4e-3
    warmup: int = 20
    grad_clip: float = 1.0
    digits: int = 3
    heldout_share: float = 0.1
    habits: Habits = field(default_factory=lambda: Habits(forget_carry=0.58, slip=0.03, long_style=0.5))


@dataclass(frozen=True)
class Recipe:
    """A model to make: its shape and, unless it stays random, its warm start."""

    name: str
    shape: Shape
    warm_start: WarmStart | None

    def fingerprint(self, seed: int) -> str:
        """12 hex digits over every number that decides the weights."""
        facts = {"revision": REVISION, "seed": seed, "vocabulary": VOCABULARY, "recipe": asdict(self)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


RECIPES = {
    "quickstart": Recipe("quickstart", Shape(), WarmStart()),
    "peer": Recipe("peer", Shape(layers=2, init_std=0.02), None),
}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name; ValueError with the nearest known one otherwise."""
    if name not in RECIPES:
        raise ValueError(f"model.recipe must be a known name: got {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]
