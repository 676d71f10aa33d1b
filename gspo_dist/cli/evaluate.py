"""`gspo evaluate`: held-out accuracy of a model, with a run's engines, rewards and settings."""

from __future__ import annotations

from collections.abc import Sequence

from gspo_dist.cli.compose import run_as_application
from gspo_dist.cli.exits import guarded
from gspo_dist.config import RunConfig


def main(args: Sequence[str]) -> None:
    """Prints one line per metric. Nothing is trained."""
    run_as_application("gspo evaluate", args, lambda config: guarded(lambda: _evaluate(config)))


def _evaluate(config: RunConfig) -> None:
    from gspo_dist.trainer.evaluate import evaluate_model

    for name, value in sorted(evaluate_model(config).items()):
        print(f"{name:40s} {value:.4f}")
