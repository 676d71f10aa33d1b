"""The policy to start from."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_dist.checks import choose

RECIPES = ("quickstart", "peer", "calculator", "python", "guess", "rethink", "smollm")
"""What coldstart/ can make."""


@dataclass(frozen=True)
class ModelConfig:
    """The policy to start from: a folder of yours, or a small model made on the spot."""

    path: str | None = None
    """Folder of an HF model (config.json, safetensors, tokenizer). Null: make `recipe` and keep it."""
    recipe: str = "quickstart"
    """quickstart | peer | calculator | python | guess | rethink: the built-in model that is made where `path`
    is null. smollm: a pretrained one, which `gspo make-model --recipe smollm` downloads once."""
    cache_dir: str = "~/.cache/gspo_dist"
    """Where made models are kept, and what self-checks found."""
    self_check: bool = True
    """Try before the run, on a small copy of the architecture, that learner and engine compute what
    transformers computes (learners/self_check.py, trainer/setup/engine_check.py). A model that fails is
    refused. False: the run starts all the same."""

    def __post_init__(self) -> None:
        if self.path is None:
            choose("model.recipe", self.recipe, RECIPES)
