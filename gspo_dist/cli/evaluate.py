"""`gspo evaluate`: held-out accuracy of a model, benchmark suites, and two results compared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gspo_dist.cli.compose import run_as_application
from gspo_dist.cli.exits import guarded
from gspo_dist.config import RunConfig

SUITES = "suite="


def main(args: Sequence[str]) -> None:
    """Prints one line per metric, a table of suites, or a comparison. Nothing is trained."""
    if "--compare" in args:
        parser = argparse.ArgumentParser(
            "gspo evaluate --compare", description="Compares two results, paired problem by problem."
        )
        parser.add_argument("--compare", nargs=2, type=Path, metavar=("FIRST", "SECOND"), required=True)
        first, second = parser.parse_args(args).compare
        guarded(lambda: _compare(first, second))
        return
    overrides = [_suites(word) for word in args]
    run_as_application("gspo evaluate", overrides, lambda config: guarded(lambda: _evaluate(config)))


def _suites(word: str) -> str:
    """suite=a,b as the override that it stands for. To hydra a,b would be a sweep over two runs."""
    if not word.startswith(SUITES):
        return word
    return f"evaluation.suites=[{word.removeprefix(SUITES).strip('[]')}]"


def _evaluate(config: RunConfig) -> None:
    if config.evaluation.suites:
        _evaluate_suites(config)
        return
    from gspo_dist.trainer.evaluate import evaluate_model

    for name, value in sorted(evaluate_model(config).items()):
        print(f"{name:40s} {value:.4f}")


def _evaluate_suites(config: RunConfig) -> None:
    from gspo_dist.evaluation.table import results_table
    from gspo_dist.trainer.evaluate import FOLDER, evaluate_suites

    results = evaluate_suites(config, lambda line: print(line, flush=True))
    print(results_table(results))
    for result in results:
        for note in result.notes:
            print(f"{result.suite}: {note}")
    print(f"results      {Path(config.run_dir) / FOLDER}/SUITE/  (result.json, failures.html, samples.jsonl)")


def _compare(first: Path, second: Path) -> None:
    from gspo_dist.evaluation.paired import compare, read_results, table

    ours, theirs = read_results(first), read_results(second)
    common = [suite for suite in ours if suite in theirs]
    if not common:
        raise ValueError(f"{first} and {second} share no suite: {', '.join(ours)} and {', '.join(theirs)}")
    for folder, own in ((first, ours), (second, theirs)):
        if alone := [suite for suite in own if suite not in common]:
            print(f"only in {folder}: {', '.join(alone)}")
    print(table([compare(ours[suite], theirs[suite]) for suite in common]))
