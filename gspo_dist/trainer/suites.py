"""Benchmark suites inside a run, sampled by the run's own engines.

Where the engines have nothing to do while the learner works, that is when they answer: the policy of step s
is evaluated while step s + 1 is learned. What is left is finished before the publication, so that every
answer is of one policy. The figures stand in the row of step s + 1, whose eval/at_step says s. Elsewhere
(engines that sleep, that sample ahead, or that live in this process) the run waits, and the figures stand in
the step's own row.

    begin(s)  ──►  collect(s + 1)  ──►  beside_learner: slices ...  ──►  finish  ──►  publish(s + 1)
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gspo_dist.evaluation.bench import run_suites
from gspo_dist.evaluation.problem import Suite, SuiteResult
from gspo_dist.evaluation.samplers import Sampler
from gspo_dist.trainer.alongside import IsOver, alongside

log = logging.getLogger(__name__)

Steps = Iterator[tuple[Suite, int, SuiteResult | None]]


class RunSuites:
    """The suites of a run: which step is being evaluated, and how far that is."""

    def __init__(
        self,
        suites: Sequence[Suite],
        sampler: Sampler,
        folder: Path,
        setting: Mapping[str, Any],
        *,
        every: int,
        steps: int,
        beside: bool,
    ) -> None:
        """folder: where results lie, one folder for each step. every: `evaluation.every`. steps: of the run.

        beside: whether the engines are free while the learner works.
        """
        self.suites, self.sampler, self.folder, self.setting = suites, sampler, folder, setting
        self.every, self.steps, self.beside = every, steps, beside
        self.step: int | None = None
        """The step whose policy is being evaluated."""
        self.under_way: Steps | None = None
        self.results: list[SuiteResult] = []
        self.seconds = 0.0
        """That the run waited for this evaluation."""

    def due(self, step: int) -> bool:
        """Whether the policy of `step` is evaluated: at the start, on the schedule, and at the end."""
        if not self.suites:
            return False
        return step in (0, self.steps) or bool(self.every and step % self.every == 0)

    def begin(self, step: int) -> None:
        """Makes the evaluation of `step` the one under way. Nothing is sampled yet."""
        self.step, self.results, self.seconds = step, [], 0.0
        setting = {**self.setting, "step": step}
        self.under_way = run_suites(self.suites, self.sampler, self._folder_of(step), setting)

    def after_step(self, step: int) -> dict[str, float]:
        """Begins what is due after `step`. Where the run has to wait, it is done here and gives figures."""
        if not self.due(step):
            return {}
        self.begin(step)
        return {} if self.beside and step < self.steps else self.finish()

    def start(self, completed_steps: int) -> dict[str, float]:
        """`after_step` for a run that begins or goes on after so many steps.

        A run that begins forgets the results of an earlier one in its folder. One that goes on forgets those
        of later steps, and takes up what a kill has interrupted. Figures whose row is the next step's are
        given again, since that step is done again.
        """
        for folder in self.folder.glob("step_*"):
            if completed_steps == 0 or int(folder.name.removeprefix("step_")) > completed_steps:
                shutil.rmtree(folder, ignore_errors=True)
        own = self._folder_of(completed_steps)
        whole = all((own / suite.name / "result.json").is_file() for suite in self.suites)
        told = whole and not (self.beside and completed_steps < self.steps)
        return {} if told else self.after_step(completed_steps)

    @contextmanager
    def beside_learner(self) -> Iterator[None]:
        """While the learner works inside the block, the engines answer. They are empty afterwards."""
        if self.under_way is None or not self.beside:
            yield
            return
        with alongside("suites-beside-the-learner", self._drive):
            yield

    def finish(self) -> dict[str, float]:
        """Samples what is left of the evaluation under way; its figures, or none without one."""
        if self.step is None:
            return {}
        begun = time.perf_counter()
        self._drive(lambda: False)
        self.seconds += time.perf_counter() - begun
        step, self.step, self.under_way = self.step, None, None
        if not self.results:
            return {}
        figures = {key: value for result in self.results for key, value in result.logged().items()}
        return figures | {"eval/at_step": float(step), "time/suites_s": self.seconds}

    def _drive(self, is_over: IsOver) -> None:
        """Slices until everything is there or `is_over`. What fails ends this evaluation, never the run."""
        if self.under_way is None:
            return
        try:
            while not is_over():
                _, _, result = next(self.under_way)
                if result is not None:
                    self.results.append(result)
        except StopIteration:
            self.under_way = None
        except Exception as error:
            self.under_way = None
            log.warning(
                "the run goes on without the suites of step %s: %s: %s",
                self.step,
                type(error).__name__,
                error,
            )

    def _folder_of(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def close(self) -> None:
        """Ends what the graders started. A second call does nothing."""
        for suite in self.suites:
            suite.grader.close()
