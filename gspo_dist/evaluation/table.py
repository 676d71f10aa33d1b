"""Results of suites as a table of text."""

from __future__ import annotations

from collections.abc import Sequence

from gspo_dist.evaluation.problem import SuiteResult


def results_table(results: Sequence[SuiteResult]) -> str:
    """One line for each suite: problems, avg@n with its standard error, pass@n, Elo where there is one."""
    head = f"{'suite':22s} {'problems':>8s} {'avg@n':>8s} {'± s.e.':>8s} {'pass@n':>8s} {'cut off':>8s}  Elo"
    return "\n".join([head, *(_line(result) for result in results)])


def _line(result: SuiteResult) -> str:
    numbers, n = result.metrics, int(result.setting["samples"])
    average, error = numbers[f"avg@{n}"], numbers.get(f"avg@{n}_standard_error")
    return (
        f"{result.suite:22s} {numbers['problems']:8.0f} {f'@{n} {average:.3f}':>8s} "
        f"{'-' if error is None else f'{error:.3f}':>8s} {numbers[f'pass@{n}']:8.3f} "
        f"{numbers['truncated_fraction']:8.1%}  {_elo(result)}"
    ).rstrip()


def _elo(result: SuiteResult) -> str:
    if "elo" not in result.metrics:
        return ""
    numbers = result.metrics
    text = f"{numbers['elo']:.0f} over {numbers['elo_contests']:.0f} contests"
    if "elo_percentile" in numbers:
        text += f", above {numbers['elo_percentile']:.1f}% of {result.details['ratings_table']}"
    return text
