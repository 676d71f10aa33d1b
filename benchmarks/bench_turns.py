"""What a turn costs beside the sampling, and how many episodes a second there are with a slow tool.

    python benchmarks/bench_turns.py             a tool that takes 0, 0.1 and 1 s, with K = 0 and 1
    python benchmarks/bench_turns.py --turn      milliseconds of a turn, beside the sampling of a real engine

The first runs the collector, the driver of episodes, the books of the pool and the reference engine on a
virtual clock, as tests/unit/trainer/test_virtual_clock.py does. A decode step, learning and the tool take the
seconds that they are given, so the table says what waits for what. It is the same on every host. Reading a
history again costs nothing in it.

The second plays episodes with one vLLM engine in this process and environments in processes of their own.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from bench_async import Prompts, judge

from gspo_dist.config import EnvironmentConfig, RolloutConfig
from gspo_dist.environments.pool import LocalEnvironmentPool, Reply
from gspo_dist.environments.protocol import Observation
from gspo_dist.environments.worker import Call
from gspo_dist.rollout import reference
from gspo_dist.rollout.fleet import Answers, Fleet
from gspo_dist.rollout.reference import ReferenceEngine
from gspo_dist.rollout.turns import Bridge
from gspo_dist.trainer.clockwork import SLICE_S, Clockwork, Slice
from gspo_dist.trainer.episodes import Episodes, play
from gspo_dist.trainer.pipeline import Collector
from gspo_dist.types import Prompt, SamplingSpec, WorkKey

PROMPT = 3
"""Tokens of a prompt."""
END, ANSWER = 2, 3
"""The token that ends a turn, and the one that an answer consists of."""


class Echo:
    """Answers every turn with the same four characters, and ends the episode after some turns."""

    def __init__(self, turns: int = 4) -> None:
        self.left = turns

    def reset(self, prompt: Prompt, seed: int) -> None:
        """Nothing is said."""

    def step(self, turn: str) -> Observation:
        self.left -= 1
        return Observation("=12,", done=self.left == 0)


@dataclass(frozen=True)
class Case:
    """What is simulated. Seconds."""

    prompts: int = 16
    """Prompts per step."""
    group: int = 4
    """Episodes per prompt."""
    turns: int = 3
    """Turns of an episode."""
    median: int = 32
    """Median length of a turn, in tokens."""
    spread: float = 0.5
    """Standard deviation of the logarithm of the length."""
    tick_s: float = 0.02
    """A decode step without its sequences."""
    per_sequence_s: float = 0.0004
    """What each sequence adds to a decode step."""
    learn_s: float = 4.0
    """The learner's time for one step."""
    publish_s: float = 0.1
    """A weight sync."""
    workers: int = 0
    """Calls that the tool answers at a time; 0: as many as it is asked."""
    steps: int = 6
    """Steps that are counted."""

    @property
    def limit(self) -> int:
        """The longest episode, in tokens."""
        return 8 * self.turns * self.median


class TurnPolicy:
    """Ends each turn at a length that its prompt, its first token and its number decide."""

    vocab_size, num_experts, moe_layers, top_k = 1000, 0, 0, 0
    eos_ids = frozenset({0})

    def __init__(self, case: Case) -> None:
        self.case = case

    def logits(self, rows: np.ndarray) -> np.ndarray:
        out = np.zeros((len(rows), self.vocab_size), np.float32)
        out[:, : ANSWER + 1] = -1e4
        for i, row in enumerate(rows):
            answers = np.flatnonzero(row == ANSWER)
            begun = answers[-1] + 1 if len(answers) else PROMPT
            if begun < len(row) and len(row) - begun + 1 >= self._length(row, begun, len(answers)):
                out[i, END] = 1e4
        return out

    def _length(self, row: np.ndarray, begun: int, number: int) -> int:
        rng = np.random.default_rng([int(row[PROMPT - 1]), int(row[begun]), number])
        return max(2, round(self.case.median * float(np.exp(self.case.spread * rng.standard_normal()))))

    def text(self, token_ids: np.ndarray) -> str:
        return ""

    def check_whole(self, arrived: Any, engine: str) -> None:
        """A publication of no tensors is whole."""


class Words:
    """A tokenizer for answers: one token per word."""

    all_special_tokens: tuple[str, ...] = ()

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ANSWER for _ in text.split()]}

    def decode(self, token_ids: Any, **_: Any) -> str:
        return ""


class VirtualFleet(Fleet):
    """One engine whose decode steps take virtual seconds. Nothing runs beside anything else in truth."""

    runs_beside = False

    def __init__(self, config: RolloutConfig, case: Case) -> None:
        super().__init__(["engine-0"], 1.0)
        self.case, self.now, self.busy = case, 0.0, 0.0
        fleet = self

        class Engine(ReferenceEngine):
            def _tick(self, rows: reference.Rows) -> None:
                if rows is self.rows[0]:
                    n = sum(int((~own.finished).sum()) for own in self.rows)
                    fleet.now += case.tick_s + case.per_sequence_s * n
                    fleet.busy += case.tick_s + case.per_sequence_s * n
                super()._tick(rows)

        policy: Any = TurnPolicy(case)
        self.engine = Engine(config, policy, name="engine-0")
        # The engine's slices end by its module's clock.
        reference.time = SimpleNamespace(monotonic=lambda: fleet.now)  # type: ignore[attr-defined]

    def each(self, method: str, arguments: Mapping[str, tuple[Any, ...]], timeout: float) -> Answers:
        return {name: getattr(self.engine, method)(*own) for name, own in arguments.items()}, {}


class VirtualClockwork(Clockwork):
    """Slices by the fleet's clock."""

    def __init__(self, config: RolloutConfig, fleet: VirtualFleet) -> None:
        super().__init__(config)
        self.fleet, self.learned = fleet, 0.0

    def slice_beside(self, is_learned: bool) -> Slice | None:
        return Slice(None, SLICE_S) if self.fleet.now < self.learned else None


class VirtualTools:
    """An `EnvironmentPool` whose every call takes `wait_s` of the fleet's time."""

    def __init__(self, wait_s: float, case: Case, fleet: VirtualFleet) -> None:
        self.wait_s, self.case, self.fleet = wait_s, case, fleet
        self.due: dict[WorkKey, tuple[float, Call]] = {}
        self.free = [0.0] * case.workers
        """When each worker has answered what it was asked, as a heap."""

    def submit(self, calls: Sequence[Call]) -> None:
        for call in calls:
            begun = max(self.fleet.now, heapq.heappop(self.free)) if self.free else self.fleet.now
            done = begun + (self.wait_s if call.turn is not None else 0.0)
            if self.case.workers:
                heapq.heappush(self.free, done)
            self.due[call.key] = done, call

    def poll(self, seconds: float, mine: Callable[[WorkKey], bool] = lambda key: True) -> list[Reply]:
        first = min((at for at, call in self.due.values() if mine(call.key)), default=self.fleet.now)
        self.fleet.now = max(self.fleet.now, min(first, self.fleet.now + seconds))
        told = [call for at, call in self.due.values() if at <= self.fleet.now and mine(call.key)]
        for call in told:
            del self.due[call.key]
        return [Reply(call.key, self._answer(call)) for call in told]

    def _answer(self, call: Call) -> Observation:
        if call.turn is None:
            return Observation()
        return Observation("answer", done=len(call.history) == self.case.turns)

    def end(self, keys: Iterable[WorkKey]) -> None:
        """Nothing is kept of an episode."""

    def take_events(self) -> list[Any]:
        return []


@dataclass
class Measured:
    """One run, in virtual seconds."""

    step_s: float
    engine_busy: float
    """Share of the time in which the engine decodes."""


def simulate_run(case: Case, ahead: int, wait_s: float) -> Measured:
    """Steps of the real pipeline on a virtual clock."""
    config = RolloutConfig(
        engine="reference",
        engines=1,
        precision="fp32",
        prompts_per_step=case.prompts,
        group_size=case.group,
        max_prompt_tokens=PROMPT,
        max_completion_tokens=case.limit,
        steps_ahead=ahead,
    )
    fleet: Any = VirtualFleet(config, case)
    clockwork = VirtualClockwork(config, fleet)
    spec = SamplingSpec(n=case.group, max_tokens=case.limit, seed=1, stop_token_ids=(END,))
    tools: Any = VirtualTools(wait_s, case, fleet)
    environment = EnvironmentConfig(factory="guess", max_turns=case.turns)
    episodes = Episodes(environment, tools, Bridge(Words(), limit=8))
    steps = case.steps + 2 * ahead + 1
    judges: Any = SimpleNamespace(judge=judge)
    cursor: Any = Prompts()
    collector = Collector(
        config, steps, fleet, judges, cursor, lambda step: spec, clockwork, episodes=episodes
    )
    rows = []
    for step in range(1, steps + 1):
        collector.sample(step)
        collector.judged(step)
        clockwork.learned = fleet.now + case.learn_s
        with collector.beside_learner():
            """The engine samples on in the learner's seconds, where steps are begun ahead."""
        collector.pause()
        fleet.now = max(fleet.now, clockwork.learned) + case.publish_s
        rows.append((fleet.now, fleet.busy))
    # The steps after the engine is full, and before nothing is begun any more.
    first, last = ahead, len(rows) - 1 - ahead
    elapsed = rows[last][0] - rows[first][0]
    return Measured(elapsed / (last - first), (rows[last][1] - rows[first][1]) / elapsed)


def print_tools(
    case: Case, waits: Sequence[float], ahead: Sequence[int]
) -> dict[tuple[float, int], Measured]:
    """The table of tools by their time."""
    count = case.prompts * case.group
    print(
        f"One engine, {case.prompts} x {case.group} episodes of {case.turns} turns per step. Tokens of a "
        f"turn are lognormal: median {case.median}, spread {case.spread:g}. A decode step of n sequences "
        f"takes {1e3 * case.tick_s:g} + {1e3 * case.per_sequence_s:g} n ms, learning {case.learn_s:g} s, a "
        f"publication {case.publish_s:g} s. Calls at a time: {case.workers or 'as many as are asked'}.\n"
    )
    print(
        "| tool, s | steps ahead | s per step | episodes per s | of a tool of 0 s | of K = 0 | engine busy |"
    )
    print("|---" * 7 + "|")
    found: dict[tuple[float, int], Measured] = {}
    for wait_s in waits:
        for k in ahead:
            m = found[wait_s, k] = simulate_run(case, k, wait_s)
            print(
                f"| {wait_s:g} | {k} | {m.step_s:.2f} | {count / m.step_s:.1f} | "
                f"{found[waits[0], k].step_s / m.step_s:.2f} | "
                f"{found[wait_s, ahead[0]].step_s / m.step_s:.2f}x | {m.engine_busy:.0%} |",
                flush=True,
            )
    return found


def print_turn(counts: Sequence[int], rounds: int, overrides: list[str]) -> dict[str, list[float]]:
    """Episodes of four turns with a real engine: what passes outside it, per turn."""
    from gspo_dist.cli.compose import run_config
    from gspo_dist.coldstart.make import ensure_model
    from gspo_dist.coldstart.tokenizer import build_tokenizer
    from gspo_dist.rollout.pool import LocalRolloutPool
    from gspo_dist.trainer.setup.factories import engine_factory

    config = run_config(["experiment=study", "model=peer", "rollout.max_completion_tokens=256", *overrides])
    environment = EnvironmentConfig(factory=f"{Path(__file__).resolve()}:Echo")
    tools = LocalEnvironmentPool(environment)
    engine = engine_factory(config, str(ensure_model(config.model)), "cpu", 0)(name="engine-0")
    tools.start()
    pool: Any = LocalRolloutPool(engine)
    advance, inside = pool.advance, [0.0]

    def timed(ticks: Any = None, seconds: Any = None) -> Any:
        begun = time.perf_counter()
        told = advance(ticks, seconds)
        inside[0] += time.perf_counter() - begun
        return told

    pool.advance = timed
    print("| what | ms per turn, median (range) |\n|---|---|")
    out = {
        f"a call to an environment's process, {n} at a time": round_trips(tools, n, rounds) for n in (1, 64)
    }
    episodes = Episodes(environment, tools, Bridge(build_tokenizer(), limit=64))
    stops = tuple(range(40, 44))  # 4 of 64 tokens that a random model samples: turns of about 13 tokens
    for count in counts:
        spec = SamplingSpec(n=1, max_tokens=256, seed=3, stop_token_ids=stops)
        prompts = [Prompt(f"p{i}", (5 + i % 9, 6, 7, 8), "") for i in range(count)]
        beside, within, tokens = [], [], []
        for number in range(rounds + 1):
            inside[0], begun = 0.0, time.perf_counter()
            played = play(pool, episodes, prompts, spec, range(1000 * number, 1000 * number + count), 0.05)
            elapsed = time.perf_counter() - begun
            turns = sum(len(c.turns) - 1 for group in played for c in group)
            if number:  # the first round warms up
                beside.append(1e3 * (elapsed - inside[0]) / turns)
                within.append(1e3 * inside[0] / turns)
                tokens.append(sum(int(c.loss_mask.sum()) for group in played for c in group) / turns)
        out[f"{count} episodes at a time: beside the engine"] = beside
        out[f"{count} episodes at a time: in the engine ({statistics.mean(tokens):.0f} tokens)"] = within
    for what, own in out.items():
        print(f"| {what} | {statistics.median(own):.2f} ({min(own):.2f}-{max(own):.2f}) |")
    tools.close()
    engine.close()
    return out


def round_trips(tools: LocalEnvironmentPool, count: int, rounds: int) -> list[float]:
    """Milliseconds of a call, of `count` that are asked at a time."""
    found = []
    for number in range(rounds + 1):
        calls = [Call((-1 - number, i), Prompt("p", (1,), ""), 0, None) for i in range(count)]
        begun, left = time.perf_counter(), count
        tools.submit(calls)
        while left:
            left -= len(tools.poll(1.0))
        if number:
            found.append(1e3 * (time.perf_counter() - begun) / count)
        tools.end([call.key for call in calls])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turn", action="store_true", help="milliseconds of a turn, with a real engine")
    parser.add_argument("--wait", type=float, nargs="+", default=[0.0, 0.1, 1.0], help="seconds of the tool")
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 1], help="values of steps_ahead")
    parser.add_argument("--steps", type=int, default=Case.steps, help="steps that are counted")
    parser.add_argument("--learn", type=float, default=Case.learn_s, help="seconds of the learner")
    parser.add_argument("--prompts", type=int, default=Case.prompts, help="per step, of 4 episodes each")
    parser.add_argument("--workers", type=int, default=0, help="calls at a time; 0: as many as are asked")
    parser.add_argument("--episodes", type=int, nargs="+", default=[1, 16, 64], help="at a time (--turn)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of --turn")
    parser.add_argument("overrides", nargs="*", help="hydra overrides (--turn)")
    options = parser.parse_args()
    if options.turn:
        print_turn(options.episodes, options.rounds, options.overrides)
    else:
        case = Case(options.prompts, learn_s=options.learn, workers=options.workers, steps=options.steps)
        print_tools(case, options.wait, options.ahead)


if __name__ == "__main__":
    main()
