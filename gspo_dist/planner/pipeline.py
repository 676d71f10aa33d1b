"""What rollouts begun ahead buy: a discrete-event model of engines, learner and publications.

    engines    |== step 1 ==|== step 2 (begun early) ==|=publish=|== 2 goes on, 3 begins ==| ...
    learner                 |== learns step 1 =========|=publish=|  waits for the rest of 2 |== learns 2 ==

An engine gives every sequence in its places one token per decode step. A step of n sequences takes
`step_s[n]` seconds. Groups belong to steps: the learner waits until all of its step's completions are whole.
At most `steps_ahead` later steps are begun, and nothing is thrown away. A publication waits for the decode
step that every engine is in, and withdraws what is unfinished. Then all of it is dealt anew over the engines,
by the rule of the rollout pool, and an engine reads again what its sequences have so far.

Everything is a function of the lengths, which are drawn by a seed. So the model can be held to a run, decode
step by decode step.
"""

from __future__ import annotations

import functools
import heapq
import math
import operator
import random
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gspo_dist.partition import longest_first

# --- lengths ---


@dataclass(frozen=True)
class Lengths:
    """How long completions are: lognormal, cut at a limit. Raises ValueError for numbers that cannot be."""

    mean: float
    """Tokens of a completion, cut ones included."""
    spread: float
    """Standard deviation of the logarithm before the cut. At 1.0 the 99th percentile is ten medians."""
    limit: int
    """Tokens after which a completion is cut off."""
    group_share: float = 0.3
    """Share of the variance that siblings have in common: a hard prompt is long for all of them."""

    def __post_init__(self) -> None:
        if not 0 < self.mean <= self.limit or self.spread < 0 or not 0 <= self.group_share <= 1:
            raise ValueError(
                "lengths need 0 < mean <= limit, spread >= 0 and group_share in [0, 1]: got mean "
                f"{self.mean:g}, limit {self.limit}, spread {self.spread:g}, group_share {self.group_share:g}"
            )

    def draw(self, groups: int, size: int, seed: int = 0) -> list[list[int]]:
        """`size` lengths for each of so many groups, at least 1 token each."""
        rng = random.Random(seed)
        shared, own = math.sqrt(self.group_share), math.sqrt(1.0 - self.group_share)
        centre = self.centre
        out = []
        for _ in range(groups):
            group = shared * rng.gauss(0.0, 1.0)
            logs = (centre + self.spread * (group + own * rng.gauss(0.0, 1.0)) for _ in range(size))
            out.append([max(1, min(self.limit, round(math.exp(x)))) for x in logs])
        return out

    @functools.cached_property
    def centre(self) -> float:
        """The mean of the logarithm with which the cut lengths have `mean`, by bisection."""
        low, high = math.log(self.mean) - 10.0 * self.spread - 1.0, math.log(self.limit) + 10.0 * self.spread
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if self._cut_mean(middle) < self.mean else (low, middle)
        return low

    def _cut_mean(self, centre: float) -> float:
        """E[min(X, limit)] for log X ~ N(centre, spread^2)."""
        if not self.spread:
            return min(math.exp(centre), self.limit)
        z = (math.log(self.limit) - centre) / self.spread
        below = math.exp(centre + self.spread**2 / 2) * _normal_cdf(z - self.spread)
        return below + self.limit * _normal_cdf(-z)

    def survival(self, tokens: float) -> float:
        """Share of completions that are longer than `tokens`."""
        if tokens >= self.limit:
            return 0.0
        if tokens <= 0:
            return 1.0
        if not self.spread:
            return float(math.log(tokens) < self.centre)
        return _normal_cdf((self.centre - math.log(tokens)) / self.spread)

    def quantiles(self, count: int) -> list[float]:
        """`count` lengths that stand for the distribution: the middles of its equal shares, rising."""
        normal = statistics.NormalDist()
        deviations = (normal.inv_cdf((i + 0.5) / count) for i in range(count))
        return [max(1.0, min(self.limit, math.exp(self.centre + self.spread * z))) for z in deviations]

    @functools.cached_property
    def half_way(self) -> float:
        """Tokens that a running completion has on average, at a moment drawn by chance: E[X^2] / 2 E[X]."""
        drawn = self.quantiles(200)
        return sum(n * n for n in drawn) / sum(drawn) / 2

    @staticmethod
    def of(lengths: Sequence[int], limit: int) -> Lengths:
        """The distribution of measured lengths: their mean, and the spread of their logarithms."""
        if not lengths:
            raise ValueError("lengths need at least one completion: got none")
        logs = [math.log(max(1, n)) for n in lengths]
        centre = sum(logs) / len(logs)
        spread = math.sqrt(sum((x - centre) ** 2 for x in logs) / len(logs))
        return Lengths(sum(lengths) / len(lengths), spread, max(limit, *lengths))


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


# --- the machine ---


@dataclass(frozen=True)
class Machine:
    """What a step is made on. Seconds."""

    engines: int
    """Rollout engines."""
    places: int
    """Sequences that an engine decodes at once. Others wait, first come, first served."""
    step_s: Sequence[float]
    """Seconds of a decode step of 0, 1, 2, ... sequences. More take as long as the last entry."""
    learn_s: float
    """Seconds that the learner takes for one step's batch."""
    publish_s: float = 0.0
    """Seconds of a weight sync. Nobody works meanwhile."""
    prefill_s: float = 0.0
    """Seconds to read one token: of a prompt, and of what was withdrawn at a publication."""
    prompt_tokens: int = 0
    """Tokens of a prompt. An engine reads it once for all siblings that it has."""
    colocated: bool = False
    """Engines sleep while the learner works."""
    limit: int | None = None
    """Tokens that a completion may get, by which work is dealt. None: the longest of the lengths."""
    slice_s: float = 0.0
    """Engines are asked for so many seconds of decode steps at a time, and the next slice begins when all
    have answered. 0: no engine ever waits for another."""


@dataclass(eq=False)
class _Item:
    """One completion in the making."""

    step: int
    group: int
    sample: int
    length: int
    done: int = 0
    begun: int | None = None
    """Publications before its first token."""
    versions: int = 0
    """Policies that gave it tokens."""


class _Engine:
    """Decodes its running sequences in whole steps, and admits waiting ones as places become free."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        last = len(machine.step_s) - 1
        self.step_s = [machine.step_s[min(n, last)] for n in range(machine.places + 1)]
        self.clock = self.busy = 0.0
        """Now, and seconds with at least one sequence so far."""
        self.next_finish = math.inf
        """When the next completion is whole; inf without any."""
        self.ticks = self.admitted = 0
        self.running: list[tuple[int, int, int, _Item]] = []
        """Heap of (tick of the last token, order of admission, tick of the admission, item)."""
        self.waiting: deque[_Item] = deque()
        self.read: set[int] = set()
        """Groups whose prompt is in the cache."""

    def submit(self, items: Iterable[_Item], now: float, version: int) -> None:
        if not self.running:
            self.clock = max(self.clock, now)
        self.waiting.extend(items)
        self._admit(version)

    def _admit(self, version: int) -> None:
        machine, running = self.machine, self.running
        while self.waiting and len(running) < machine.places:
            item = self.waiting.popleft()
            if machine.prefill_s:
                tokens = item.done + (0 if item.group in self.read else machine.prompt_tokens)
                self.read.add(item.group)
                self.clock += tokens * machine.prefill_s
                self.busy += tokens * machine.prefill_s
            if item.begun is None:
                item.begun = version
            heapq.heappush(running, (self.ticks + item.length - item.done, self.admitted, self.ticks, item))
            self.admitted += 1
        self._look()

    def _look(self) -> None:
        if self.running:
            left = self.running[0][0] - self.ticks
            self.next_finish = self.clock + left * self.step_s[len(self.running)]
        else:
            self.next_finish = math.inf

    def run(self, until: float, version: int) -> list[_Item]:
        """Does the decode steps that begin before `until`, or fewer: those to the next completion."""
        running = self.running
        if not running or self.clock >= until:
            return []
        cost = self.step_s[len(running)]
        steps = running[0][0] - self.ticks
        if until != math.inf:
            steps = min(steps, math.ceil((until - self.clock) / cost))
        self.ticks += steps
        self.clock += steps * cost
        self.busy += steps * cost
        finished = []
        while running and running[0][0] == self.ticks:
            item = heapq.heappop(running)[3]
            item.done, item.versions = item.length, item.versions + 1
            finished.append(item)
        self._admit(version)
        return finished

    def withdraw(self) -> list[_Item]:
        """Everything unfinished, with what it has. What has no token yet is not begun."""
        out = list(self.waiting)
        for end, _, since, item in self.running:
            item.done = item.length - (end - self.ticks)
            item.versions += int(self.ticks > since)
            out.append(item)
        for item in out:
            if not item.done:
                item.begun = None
        self.running, self.waiting, self.read, self.next_finish = [], deque(), set(), math.inf
        return out


_NEXT = operator.attrgetter("next_finish")

# --- the run ---


@dataclass(frozen=True)
class Outcome:
    """What a run of the model came to, over the steps that are counted."""

    steps_ahead: int
    """Steps that were begun ahead."""
    step_s: float
    """Seconds per step."""
    engine_idle: float
    """Share of the engines' time without any sequence."""
    learner_idle: float
    """Share of the time in which the learner waits for rollouts."""
    staleness_mean: float
    """Publications between a completion's first token and its use, mean over completions."""
    staleness_max: int
    """The same, of the oldest."""
    versions: float
    """Policies that sampled a completion, mean over completions."""
    ends: tuple[float, ...] = ()
    """When each step's publication was over, counted or not."""


def simulate(
    machine: Machine,
    lengths: Sequence[Sequence[int]],
    prompts_per_step: int,
    steps_ahead: int,
    *,
    warm_up: int = 0,
    cool_down: int = 0,
) -> Outcome:
    """Runs all of `lengths` (one list per group, in the cursor's order) and counts the steps in between.

    warm_up, cool_down: steps at the beginning and at the end that are not counted. The first ones find empty
    engines, and the last `steps_ahead` ones have nothing begun behind them.
    Raises ValueError where the groups make no whole number of steps, or no step is left to count.
    """
    steps, rest = divmod(len(lengths), prompts_per_step)
    if rest or steps <= warm_up + cool_down or steps_ahead < 0:
        raise ValueError(
            f"a simulation needs whole steps, more than warm_up + cool_down, and steps_ahead >= 0: got "
            f"{len(lengths)} groups of {prompts_per_step} a step, {warm_up} + {cool_down}, {steps_ahead}"
        )
    run = _Run(machine, lengths, prompts_per_step, steps_ahead, steps)
    marks = [run.mark()]
    for step in range(steps):
        run.step(step)
        marks.append(run.mark())
    first, last = marks[warm_up], marks[steps - cool_down]
    elapsed, counted = last[0] - first[0], steps - cool_down - warm_up
    items = [i for i in run.items if warm_up <= i.step < steps - cool_down]
    ages = [i.step - (i.begun or 0) for i in items]
    return Outcome(
        steps_ahead,
        elapsed / counted,
        1.0 - (last[1] - first[1]) / (elapsed * machine.engines),
        (last[2] - first[2]) / elapsed,
        sum(ages) / len(ages),
        max(ages),
        sum(i.versions for i in items) / len(items),
        tuple(mark[0] for mark in marks[1:]),
    )


class _Run:
    """The state between two steps: engines with what they decode, and the clock."""

    def __init__(
        self,
        machine: Machine,
        lengths: Sequence[Sequence[int]],
        prompts_per_step: int,
        steps_ahead: int,
        steps: int,
    ) -> None:
        self.machine, self.lengths, self.count = machine, lengths, prompts_per_step
        self.steps_ahead, self.steps = steps_ahead, steps
        self.engines = [_Engine(machine) for _ in range(machine.engines)]
        self.now = self.waited = 0.0
        self.limit = machine.limit or max(n for group in lengths for n in group)
        self.items: list[_Item] = []
        self.left = [0] * steps
        """Completions of each step that are not whole."""
        self.kept: list[_Item] = []
        """Withdrawn at the last publication."""

    def mark(self) -> tuple[float, float, float]:
        """(now, seconds that engines were busy, seconds that the learner waited)."""
        return self.now, sum(engine.busy for engine in self.engines), self.waited

    def step(self, step: int) -> None:
        """One step of the run, from the end of a publication to the end of the next one."""
        self._begin(step)
        ready = self._collect(step)
        if self.machine.colocated:  # the learner takes the memory of engines that are quiet
            ready = self._quiet(ready)
            self.kept = self._withdraw()
        self.waited += ready - self.now
        learnt = ready + self.machine.learn_s
        if not self.machine.colocated:
            self._work(ready, learnt, step)
            learnt = self._quiet(learnt)
            self.kept = self._withdraw()
        self.now = learnt + self.machine.publish_s

    def _begin(self, step: int) -> None:
        """Deals what was withdrawn, and the groups of every step that may be begun now."""
        last = min(step + self.steps_ahead, self.steps - 1)
        begun = self.items[-1].step + 1 if self.items else 0
        fresh = [
            _Item(later, later * self.count + g, sample, length)
            for later in range(begun, last + 1)
            for g in range(self.count)
            for sample, length in enumerate(self.lengths[later * self.count + g])
        ]
        self.items += fresh
        for item in fresh:
            self.left[item.step] += 1
        for engine, share in zip(self.engines, self._dealt([*self.kept, *fresh]), strict=True):
            engine.submit(share, self.now, step)

    def _dealt(self, items: Sequence[_Item]) -> list[list[_Item]]:
        """The pool's rule: whole groups, by the tokens that they may still get, the heaviest first.

        items: in the order of their groups.
        """
        groups: dict[int, list[_Item]] = {}
        for item in items:
            groups.setdefault(item.group, []).append(item)
        members = list(groups.values())
        weights = [
            self.machine.prompt_tokens + sum(self.limit - item.done for item in group) for group in members
        ]
        rows = longest_first(weights, self.machine.engines)
        assert rows is not None  # no capacity was asked for
        return [[item for group in sorted(row) for item in members[group]] for row in rows]

    def _collect(self, step: int) -> float:
        """Engines work until the step's completions are whole; when that is."""
        ready = self.now
        if self.machine.slice_s:
            while self.left[step]:
                ready = self._slice(ready, step)
            return ready
        while self.left[step]:
            engine = min(self.engines, key=_NEXT)
            ready = engine.next_finish
            self._finish(engine.run(math.inf, step))
        self._work(ready, ready, step)
        return ready

    def _work(self, now: float, until: float, step: int) -> None:
        """From `now` on, every engine does the decode steps, or the slices, that begin before `until`."""
        while self.machine.slice_s and now < until and any(engine.running for engine in self.engines):
            now = self._slice(now, step)
        for engine in self.engines:
            while engine.running and engine.clock < until:
                self._finish(engine.run(until, step))

    def _slice(self, now: float, step: int) -> float:
        """One slice of every engine, from `now` on; when the last one has answered."""
        for engine in self.engines:
            engine.clock = max(engine.clock, now) if engine.running else engine.clock
            while engine.running and engine.clock < now + self.machine.slice_s:
                self._finish(engine.run(now + self.machine.slice_s, step))
        return max(now, *(engine.clock for engine in self.engines))

    def _quiet(self, now: float) -> float:
        """When every engine has ended the decode step that it is in."""
        return max(now, *(engine.clock for engine in self.engines))

    def _finish(self, items: Iterable[_Item]) -> None:
        for item in items:
            self.left[item.step] -= 1

    def _withdraw(self) -> list[_Item]:
        found = [item for engine in self.engines for item in engine.withdraw()]
        return sorted(found, key=lambda item: (item.group, item.sample))
