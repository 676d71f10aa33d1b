"""Begins the rollouts of the next steps, feeds the engines, and hands every step its own.

    cursor ──► begin(step ... step + K) ──► waiting ──► engines: submit, advance ..., withdraw
                                              ▲                      │ finished
                                              └── unfinished ◄───────┤
                                                                     ▼
                                              judge ──► steps that are begun ──► collect(step)

With an environment, what an engine finishes is a turn, and the episode goes to its environment and back among
the waiting ones until it is over (episodes.py). An environment holds no engine, and no publication.

Groups belong to steps. `rollout.steps_ahead` = K says how many steps before its turn a step may be begun, and
nothing else: none is chosen for being quick, and every prompt is trained once and in order. Only dynamic
sampling leaves groups out, by their rewards (refill.py).
So no token is older than K publications. K = 0 is the synchronous loop.

Completions are judged as they finish, while the engines go on with the others (judging.py).

At a publication everything unfinished is withdrawn as plain data (`pause`). It goes on with the next
`sample`, dealt anew over the engines that live. Between the two, evaluations, probes and checkpoints find the
engines empty, and change no rollout.

What the engines do between two publications is a number of ticks (decode steps) each, so a run by a fixed
number of ticks repeats itself, and one by the clock is repeated by the numbers that it wrote (clockwork.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from gspo_dist.config import RolloutConfig, SelectionConfig
from gspo_dist.data.cursor import Cursor
from gspo_dist.data.renewal import RenewedCursor
from gspo_dist.failures import Event
from gspo_dist.rewards.pool import RewardPool
from gspo_dist.rewards.reward import Item, Judged
from gspo_dist.rollout.engine import Progress
from gspo_dist.rollout.pool import NoEngineLeft, RolloutPool
from gspo_dist.trainer.alongside import IsOver, alongside
from gspo_dist.trainer.buffer import BegunStep, Buffer
from gspo_dist.trainer.clockwork import Clockwork, Slice
from gspo_dist.trainer.episode_page import episode_rows
from gspo_dist.trainer.episodes import WAIT_S, Episodes, Moved
from gspo_dist.trainer.judging import Judging
from gspo_dist.trainer.refill import Refill
from gspo_dist.types import Prompt, Rollout, SamplingSpec, Work

TELL_EVERY_S = 30.0
"""A collect that takes longer says so often how far it is."""

TURN_SLICE_S = 0.05
"""Seconds of a slice with an environment: a turn that ends in a slice waits for its end."""

Tell = Callable[[int, Mapping[str, Mapping[str, int]]], None]
"""tell(step, engine -> {"completions": ..., "tokens": ...} of this collect)."""


def progress_metrics(done: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """progress/* of a collect under way, as a whole and by engine."""
    out = {
        f"progress/{what}": float(sum(own[what] for own in done.values()))
        for what in ("completions", "tokens")
    }
    return out | {
        f"progress/{engine}/{what}": float(count)
        for engine, own in done.items()
        for what, count in own.items()
    }


class Collector:
    """The rollouts of a run: begun, in the making, finished, and handed out step by step."""

    def __init__(
        self,
        config: RolloutConfig,
        steps: int,
        pool: RolloutPool,
        rewards: RewardPool,
        cursor: Cursor,
        spec_of: Callable[[int], SamplingSpec],
        clockwork: Clockwork,
        tell: Tell = lambda step, row: None,
        selection: SelectionConfig | None = None,
        episodes: Episodes | None = None,
    ) -> None:
        """steps: of the whole run; nothing is begun beyond. spec_of: how a step is sampled.

        selection: which groups of a step train; None trains all. episodes: None without an environment.
        """
        self.config, self.steps, self.pool, self.rewards, self.cursor = config, steps, pool, rewards, cursor
        self.spec_of, self.clockwork, self.tell, self.episodes = spec_of, clockwork, tell, episodes
        self.refill = Refill(selection or SelectionConfig(), config.prompts_per_step)
        self.buffer = Buffer()
        self.judging = Judging(self.judge)
        self.trained_cursor: Mapping[str, Any] = cursor.state_dict()
        """The cursor's place after the prompts of the last step that was handed out."""
        self.sampled_tokens, self.sampling_s = 0, 0.0
        """Since `take_speed` was called last."""
        self.was_fed = False
        """Whether the last slice ended with turns for the engines."""

    def sample(self, step: int) -> None:
        """Begins what may be begun, and samples until the groups of `step` are whole.

        Raises what engines raise. TimeoutError: no engine got a token within rollout.timeout_s. NoEngineLeft:
        all died; what was in the making is in the buffer then.
        """
        self.resume(step)
        self._sample_on(step)

    def _sample_on(self, step: int) -> None:
        done: dict[str, dict[str, int]] = {}
        last_token = last_told = time.monotonic()
        while not self.buffer.steps[step].is_sampled():
            told = self._advance(self.clockwork.slice())
            if self._judges_beside:
                self.judging.go_on(self.buffer.steps.values())
            for name, progress in told.items():
                count = done.setdefault(name, {"completions": 0, "tokens": 0})
                count["completions"] += len(progress.finished)
                count["tokens"] += progress.tokens
            now = time.monotonic()
            if any(progress.tokens for progress in told.values()) or self._acting():
                last_token = now
            elif self.clockwork.record is not None:
                raise self.clockwork.off_the_record()
            elif now - last_token > self.config.timeout_s:
                raise TimeoutError(
                    f"step {step} got no token within rollout.timeout_s = {self.config.timeout_s:.0f} s "
                    f"from {', '.join(told) or 'any engine'}"
                )
            if now - last_told > TELL_EVERY_S:
                last_told = now
                self.tell(step, done)

    def resume(self, step: int) -> None:
        """Begins the steps up to `step` + K, and gives the engines everything that waits."""
        self.clockwork.begin(step)
        while self.buffer.begun < min(step + self.config.steps_ahead, self.steps):
            self.begin()
        self._submit()

    def _submit(self) -> None:
        """Gives the engines everything that waits."""
        waiting, self.buffer.waiting = self.buffer.waiting, []
        if self.episodes is not None:
            waiting = self.episodes.take(waiting)
        self._give(waiting)
        if self.episodes is not None and not self.clockwork.is_by_the_clock:
            self._hear(self.episodes.settle())  # a slice without work would still count its ticks

    def _give(self, work: Sequence[Work]) -> None:
        try:
            self.pool.submit(work)
        except NoEngineLeft:
            self.pause()
            raise

    def begin(self) -> BegunStep:
        """Takes the next step's prompts from the cursor.

        Group ids count over the whole run and seed the sampling, so a step's rollouts do not depend on how
        the run got there.
        """
        prompts, drawn = self._draw()
        return self.begin_with(prompts, drawn)

    def begin_with(self, prompts: Sequence[Prompt], drawn: Sequence[int]) -> BegunStep:
        """Begins the next step with these prompts: drawn now, or restored from a checkpoint."""
        step = self.buffer.begun + 1
        first = (step - 1) * self.refill.ids_per_step
        begun = BegunStep(prompts, first, self.spec_of(step), self.cursor.state_dict(), list(drawn))
        self.buffer.begin(begun)
        return begun

    @property
    def keeps_draws(self) -> bool:
        """Whether a checkpoint must name the prompts of steps that are begun.

        Otherwise the cursor's place after the last trained step hands them out again. It cannot where a step
        may draw more, or where rewards decide what is drawn.
        """
        return self.refill.config.refills or isinstance(self.cursor, RenewedCursor)

    def _draw(self) -> tuple[list[Prompt], list[int]]:
        """The prompts of one try, and their places in the source where they must be kept."""
        if not self.keeps_draws:
            return self.cursor.next(self.refill.asked), []
        drawn = self.cursor.draw(self.refill.asked)
        return self.cursor.prompts(drawn), drawn

    def continue_from(self, step: int, cursor: Mapping[str, Any], *, accept_other_prompts: bool) -> None:
        """Goes on after `step`, at the cursor's place of then. Raises what the cursor raises."""
        self.cursor.load_state_dict(cursor, accept_other_prompts=accept_other_prompts)
        self.trained_cursor = self.cursor.state_dict()
        self.buffer.begun = step

    def saved_cursor(self) -> Mapping[str, Any]:
        """What a checkpoint keeps of the cursor: its place of now where begun steps keep their prompts."""
        return self.cursor.state_dict() if self.keeps_draws else self.trained_cursor

    def try_again(self, step: int) -> None:
        """Asks for more groups of a step that has too few, and samples them. Raises as `sample` does."""
        prompts, drawn = self._draw()
        self.buffer.waiting += self.buffer.steps[step].add(prompts, drawn)
        self._submit()
        self._sample_on(step)

    def judged(self, step: int) -> list[Rollout] | None:
        """The rollouts of a sampled step that train, group after group, with their rewards.

        The step leaves the buffer then. None: too few of its groups teach, and it must `try_again`. Raises
        what rewards raise, and NothingToLearn after the last try.
        """
        self._judge([step])
        whole = self.buffer.steps[step]
        rollouts = whole.rollouts()
        chosen = self.refill.choose(rollouts, whole.tries, step)
        if chosen is None:
            return None
        del self.buffer.steps[step]
        if isinstance(self.cursor, RenewedCursor):
            self.cursor.note(rollouts)
        # With nothing begun beyond this step the cursor stands where the step left it.
        self.trained_cursor = whole.cursor if self.buffer.steps else self.cursor.state_dict()
        return chosen

    @property
    def _judges_beside(self) -> bool:
        """Whether completions are judged while engines sample. Those of this process leave no time for it,
        and an environment's process is heard between two slices.
        """
        return self.pool.runs_beside and self.episodes is None

    def _judge(self, steps: Sequence[int]) -> None:
        self.judging.finish()
        for own in (self.buffer.steps[step] for step in steps):
            items = own.unjudged()
            if items:
                own.take(items, self.judge(items))

    def judge(self, items: Sequence[Item]) -> list[Judged]:
        """The verdicts on finished completions, in order. Raises what rewards raise."""
        if self.episodes is None:
            return self.rewards.judge(items)
        return self.episodes.judge(items, self.rewards)

    def _acting(self) -> int:
        """Episodes that wait for their environment."""
        return len(self.episodes.acting) if self.episodes is not None else 0

    def pause(self) -> None:
        """Takes everything unfinished out of the engines: for a publication, or before they sleep."""
        self.buffer.waiting += self.pool.withdraw()
        self.buffer.waiting.sort(key=lambda item: item.key)
        self.clockwork.close([event.who for event in self.pool.events if event.kind == "engine_death"])

    @contextmanager
    def beside_learner(self) -> Iterator[None]:
        """While the learner works inside the block, the engines sample on for later steps.

        Where engines are processes, a thread keeps a slice at each of them, and finished completions are
        judged beside that. It alone uses pool and buffer then. In one process nothing runs beside the
        learner, so a fixed number of ticks is done before it begins.
        """
        if not self.config.steps_ahead:
            yield
            return
        if not self.pool.runs_beside:
            self._sample_beside(lambda: self.clockwork.is_by_the_clock)
            yield
            return
        with alongside("sampling-beside-the-learner", self._sample_beside):
            yield

    def _sample_beside(self, is_over: IsOver) -> None:
        """Slices until the learner is done, or until the ticks of this publication are."""
        while (part := self.clockwork.slice_beside(is_over())) is not None:
            try:
                told = self._advance(part)
            except NoEngineLeft:  # a new engine comes with the next publication, and the learner goes on
                break
            is_idle = not any(progress.ticks for progress in told.values())
            is_over_early = is_idle and not self._acting() and not self.was_fed
            if self._judges_beside and not is_over_early:
                self.judging.go_on(self.buffer.steps.values())
            else:
                self._judge(list(self.buffer.steps))
            if is_over_early:  # everything that may be begun is finished
                break
        self.judging.finish()  # an evaluation or a save may ask the rewards next

    def _advance(self, part: Slice) -> dict[str, Progress]:
        """One slice of every engine that has work."""
        begun = time.perf_counter()
        seconds = part.seconds
        if self.episodes is not None and seconds is not None:
            seconds = min(seconds, TURN_SLICE_S)
        try:
            told = self.pool.advance(part.ticks, seconds)
        except NoEngineLeft:
            self.pause()
            raise
        self.sampling_s += time.perf_counter() - begun
        for name, progress in told.items():
            over = self.episodes.turned(progress.finished) if self.episodes else progress.finished
            self.buffer.finish(over)
            self.sampled_tokens += progress.tokens
            self.clockwork.note(name, progress.ticks)
        if self.episodes is not None:
            # By the clock it waits only where no engine has work. By ticks it waits for every answer, so that
            # a turn that ended in one slice goes on in the next one however long its environment took.
            if self.clockwork.is_by_the_clock:
                is_idle = not any(progress.ticks for progress in told.values())
                self._hear(self.episodes.poll(WAIT_S if is_idle else 0.0))
            else:
                self._hear(self.episodes.settle())
        return told

    def _hear(self, moved: Moved) -> None:
        """Takes what environments have answered; the next turns go to the engines."""
        self.buffer.finish(moved.finished)
        self.was_fed = bool(moved.ready)
        self._give(moved.ready)

    def metrics(self) -> dict[str, float]:
        """After a publication: pipeline/* (what is begun of later steps), selection/*, data/* and, since the
        run began, environment/*.
        """
        out = dict(self.refill.told)
        if isinstance(self.cursor, RenewedCursor):
            out |= self.cursor.metrics()
        return out | self._environment_metrics() | self._ahead()

    def _ahead(self) -> dict[str, float]:
        if not self.config.steps_ahead:
            return {}
        steps, waiting = self.buffer.steps.values(), self.buffer.waiting
        return {
            "pipeline/finished_ahead": float(sum(len(step.finished) for step in steps)),
            "pipeline/unfinished": float(len(waiting)),
            "pipeline/carried_tokens": float(sum(len(item.so_far) for item in waiting)),
            "pipeline/ticks": float(max(self.clockwork.done.values(), default=0)),
        }

    def _environment_metrics(self) -> dict[str, float]:
        if self.episodes is None:
            return {}
        return {
            "environment/begun_again": float(self.episodes.counts["begun_again"]),
            "environment/played_again": float(self.episodes.counts["played_again"]),
        }

    def episode_rows(
        self, rollouts: Sequence[Rollout], given: Sequence[float | np.ndarray], count: int
    ) -> list[dict[str, Any]]:
        """`episode_page.episode_rows`; empty without an environment."""
        if self.episodes is None:
            return []
        return episode_rows(rollouts, given, self.episodes.bridge.pieces, count)

    def take_events(self) -> list[Event]:
        """Deaths of environment processes since the last call."""
        return self.episodes.pool.take_events() if self.episodes is not None else []

    def take_speed(self) -> tuple[int, float]:
        """Tokens sampled since the last call, and the seconds in which engines sampled."""
        told = self.sampled_tokens, self.sampling_s
        self.sampled_tokens, self.sampling_s = 0, 0.0
        return told
