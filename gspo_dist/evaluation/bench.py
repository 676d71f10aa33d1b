"""Runs suites: asks for the samples that are missing, grades them beside the sampling, and sums them up."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gspo_dist.evaluation.failures import failures_page
from gspo_dist.evaluation.pass_at_k import pass_at_k
from gspo_dist.evaluation.problem import Suite, SuiteResult, Tried
from gspo_dist.evaluation.samplers import Answer, Ask, Sampler
from gspo_dist.evaluation.store import SampleStore
from gspo_dist.evaluation.suite import clustered_standard_error
from gspo_dist.files import write_text


class SuiteRun:
    """One suite in the making. `slices` drives it, `result` sums it up."""

    def __init__(self, suite: Suite, sampler: Sampler, folder: Path, setting: Mapping[str, Any]) -> None:
        """folder: the suite's own. setting: model and seed, beside what the suite itself says.

        Raises ValueError where the folder holds samples of another setting.
        """
        self.suite, self.sampler = suite, sampler
        self.store = SampleStore(folder, {**suite.setting(), **setting})

    def missing(self) -> list[Ask]:
        """Completions that are not there yet, sample by sample, so that early figures span all problems."""
        return [
            Ask(place, problem, sample)
            for sample in range(self.suite.samples)
            for place, problem in enumerate(self.suite.problems)
            if (problem.problem_id, sample) not in self.store.samples
        ]

    def slices(self) -> Iterator[int]:
        """Samples and grades until nothing is missing; yields how many samples are graded, now and then.

        One thread grades while the sampler goes on. Leaving early keeps what is graded. Raises what sampler
        and grader raise.
        """
        asks = self.missing()
        if not asks:
            return
        grading = ThreadPoolExecutor(1, thread_name_prefix=f"grading-{self.suite.name}")
        pending: list[Future[None]] = []
        try:
            for answers in self.sampler.answers(self.suite, asks):
                if answers:
                    pending.append(grading.submit(self._grade, answers))
                pending = [one for one in pending if not _settled(one)]
                yield len(self.store.samples)
            for one in pending:
                one.result()
                yield len(self.store.samples)
        except Exception:
            # What is sampled is dear: it is graded, unless grading is what failed.
            if not any(one.done() and one.exception() for one in pending):
                for one in pending:
                    one.result()
            raise
        finally:
            grading.shutdown(cancel_futures=True)

    def _grade(self, answers: Sequence[Answer]) -> None:
        found = self.suite.grader.grade([(answer.ask.problem, answer.text) for answer in answers])
        self.store.add(
            {
                "problem": answer.ask.problem.problem_id,
                "sample": answer.ask.sample,
                "correct": outcome.correct,
                "why": answer.finish_reason if answer.finish_reason == "prompt too long" else outcome.why,
                "answer": outcome.answer,
                "completion": answer.text,
                "tokens": answer.tokens,
                "finish_reason": answer.finish_reason,
                "detail": dict(outcome.detail),
            }
            for answer, outcome in zip(answers, found, strict=True)
        )

    def result(self) -> SuiteResult:
        """The figures over all samples, also written as result.json and failures.html.

        Called when nothing is missing.
        """
        suite, samples = self.suite, self.store.samples
        tried = [
            Tried(p, tuple(samples[p.problem_id, i]["correct"] for i in range(suite.samples)))
            for p in suite.problems
        ]
        more = dict(suite.more(tried))
        numbers = {k: v for k, v in more.items() if isinstance(v, float)}
        rows = [samples[p.problem_id, i] for p in suite.problems for i in range(suite.samples)]
        notes = list(suite.notes)
        if unasked := sum(row["why"] == "prompt too long" for row in rows):
            notes.append(
                f"{unasked} samples were not asked, their prompts being too long; they count as wrong"
            )
        result = SuiteResult(
            suite.name,
            figures(tried, rows) | numbers,
            {k: v for k, v in more.items() if k not in numbers} | {"by_difficulty": _by(tried, "difficulty")},
            tuple(notes),
            self.store.setting,
            tuple(rows),
        )
        whole = {
            "suite": result.suite,
            "metrics": dict(result.metrics),
            "details": dict(result.details),
            "notes": list(result.notes),
            "setting": dict(result.setting),
            "samples": list(result.samples),
        }
        write_text(self.store.folder / "result.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
        write_text(self.store.folder / "failures.html", failures_page(result, suite.problems))
        return result


def figures(tried: Sequence[Tried], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """avg@n with its standard error, pass@k for the powers of two and n, lengths, and what was cut off.

    Example: two problems with 1 of 2 and 2 of 2 right: avg@2 is 0.75, its standard error 0.25, pass@2 is 1.
    """
    n, count = len(tried[0].correct), len(tried)
    right = [sum(one.correct) for one in tried]
    means = [correct / n for correct in right]
    found = {
        f"avg@{n}": math.fsum(means) / count,
        f"avg@{n}_standard_error": clustered_standard_error(means),
        **{
            f"pass@{k}": math.fsum(pass_at_k(n, correct, k) for correct in right) / count
            for k in sorted({2**i for i in range(n.bit_length())} | {n})
        },
        "problems": float(count),
        "completion_length_mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
        "truncated_fraction": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _by(tried: Sequence[Tried], field: str) -> dict[str, float]:
    """The share of right samples among problems of each kind."""
    groups: dict[str, list[float]] = {}
    for one in tried:
        if (kind := one.problem.metadata.get(field)) is not None:
            groups.setdefault(str(kind), []).append(sum(one.correct) / len(one.correct))
    return {kind: sum(shares) / len(shares) for kind, shares in sorted(groups.items())}


def _settled(one: Future[None]) -> bool:
    """Whether it is done. Raises what it raised: a grader that fails must end the sampling."""
    if not one.done():
        return False
    one.result()
    return True


def run_suites(
    suites: Sequence[Suite], sampler: Sampler, folder: Path, setting: Mapping[str, Any]
) -> Iterator[tuple[Suite, int, SuiteResult | None]]:
    """Runs suite after suite; yields (suite, graded samples, None) now and then and its result at its end."""
    for suite in suites:
        run = SuiteRun(suite, sampler, folder / suite.name, setting)
        for graded in run.slices():
            yield suite, graded, None
        yield suite, len(run.store.samples), run.result()
