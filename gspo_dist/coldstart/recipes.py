"""What the built-in models are: numbers only. A recipe's fingerprint names its folder in the cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

from gspo_dist.checks import nearest
from gspo_dist.coldstart.tokenizer import VOCABULARY
from gspo_dist.data.arithmetic import Habits

REVISION = 1
"""Raised whenever code outside these numbers changes what a recipe makes: corpus, training, tokenizer."""


@dataclass(frozen=True)
class Shape:
    """A small Qwen3-MoE. Every layer is sparse. Embedding and head are separate, as in Qwen3-30B-A3B."""

    layers: int = 4
    """Decoder layers, all with experts."""
    hidden: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Query heads per layer."""
    kv_heads: int = 2
    """Heads of keys and values per layer."""
    head_dim: int = 32
    """Width of one head."""
    experts: int = 8
    """Experts per layer."""
    top_k: int = 2
    """Experts per token and layer."""
    expert_hidden: int = 64
    """Inner width of an expert."""
    max_positions: int = 4096
    """Longest sequence in tokens."""
    init_std: float = 0.06
    """Spread of the initial weights. HF's 0.02 makes no progress for a hundred steps at this width."""


@dataclass(frozen=True)
class WarmStart:
    """Supervised training on worked additions by a pupil with bad habits.

    forget_carry is above one half on purpose. The most likely continuation then leaves carries out, so greedy
    decoding is wrong wherever a carry matters. Sampling still finds the right solution often enough to learn.
    """

    steps: int = 320
    """Optimiser steps."""
    batch: int = 64
    """Solutions per step."""
    lr: float = 4e-3
    """Peak learning rate."""
    warmup: int = 20
    """Steps of linear warm-up."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    digits: int = 3
    """Digits of each operand."""
    heldout_share: float = 0.1
    """Share of the questions that is never trained on."""
    habits: Habits = field(default_factory=lambda: Habits(forget_carry=0.58, slip=0.03, long_style=0.5))
    """How the pupil errs."""


@dataclass(frozen=True)
class TurnsWarmStart(WarmStart):
    """A warm start that also teaches turns, so that sampling finds them and learning makes more of them."""

    environment: str = ""
    """What the turns are for: calculator | python | guess (environments/)."""
    share: float = 0.0
    """Share of the solutions that have turns. Of a game: share of the guesses that leap."""


@dataclass(frozen=True)
class RethinkWarmStart(WarmStart):
    """A warm start of long solutions: the pupil works a sum out several times, and the last working gives
    the answer. Each working errs by itself, so completions of some hundred tokens ask for no other skill."""

    workings: tuple[int, int] = (4, 12)
    """Fewest and most workings of a solution. Their number is uniform between the two."""


@dataclass(frozen=True)
class Recipe:
    """A model to make: its shape and, unless it stays random, its warm start."""

    name: str
    """What model.recipe calls it."""
    shape: Shape
    """Its sizes."""
    warm_start: WarmStart | None
    """How it is trained before it is saved; None leaves the weights random."""

    def fingerprint(self, seed: int) -> str:
        """12 hex digits over every number that decides the weights."""
        facts = {"revision": REVISION, "seed": seed, "vocabulary": VOCABULARY, "recipe": asdict(self)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _with_turns(environment: str, share: float) -> TurnsWarmStart:
    """Pupils who solve in their heads write no "=", which a calculator would answer."""
    habits = Habits(forget_carry=0.58, slip=0.03, long_style=0.0)
    return TurnsWarmStart(habits=habits, environment=environment, share=share)


def _rethinking() -> RethinkWarmStart:
    """All workings have one shape, by one style. Slips are few, because only the last working is answered."""
    habits = Habits(forget_carry=0.4, slip=0.02, long_style=1.0)
    return RethinkWarmStart(steps=500, batch=16, habits=habits)


RECIPES = {
    "quickstart": Recipe("quickstart", Shape(), WarmStart()),
    "calculator": Recipe("calculator", Shape(), _with_turns("calculator", 0.15)),
    "python": Recipe("python", Shape(), _with_turns("python", 0.15)),
    "guess": Recipe("guess", Shape(), _with_turns("guess", 0.4)),
    "rethink": Recipe("rethink", Shape(), _rethinking()),
    "peer": Recipe("peer", Shape(layers=2, init_std=0.02), None),
}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name; ValueError with the nearest known one otherwise."""
    if name not in RECIPES:
        raise ValueError(f"model.recipe must be a known name: got {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]
