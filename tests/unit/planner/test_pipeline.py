"""The discrete-event model against arithmetic by hand and against a simulation token by token."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from gspo_dist.planner.pipeline import Lengths, Machine, simulate

# Times are sums of powers of two, so that both simulations add them up without rounding.
STEP_S = [0.0, *(0.25 + n / 64 for n in range(1, 40))]


def machine(**changes) -> Machine:
    return Machine(
        **{"engines": 1, "places": 64, "step_s": STEP_S, "learn_s": 4.0, "publish_s": 0.5, **changes}
    )


def test_a_synchronous_step_is_its_parts_one_after_the_other():
    """Two sequences of 4 and 10 tokens: 4 steps of two, 6 of one, then the learner, then the sync."""
    out = simulate(machine(), [[4, 10]] * 3, 1, 0)
    collect = 4 * (0.25 + 2 / 64) + 6 * (0.25 + 1 / 64)
    assert out.step_s == collect + 4.0 + 0.5
    assert out.learner_idle == pytest.approx(collect / out.step_s, rel=1e-12)
    assert out.engine_idle == pytest.approx(4.5 / out.step_s, rel=1e-12)
    assert (out.staleness_mean, out.staleness_max, out.versions) == (0.0, 0, 1.0)
    assert out.ends == tuple(out.step_s * n for n in (1, 2, 3))


def test_one_step_ahead_hides_the_shorter_half_behind_the_longer_one():
    """Equal lengths: collecting 8 tokens of 4 sequences takes 2.5 s and learning 4 s, so the learner never
    waits after the first step. The next step's rollouts are whole when it comes.
    """
    out = simulate(machine(), [[8] * 4] * 6, 1, 1, warm_up=1, cool_down=1)
    assert out.step_s == 4.5
    assert out.learner_idle == 0.0
    assert out.staleness_max == 1
    assert out.staleness_mean == 1.0


def test_far_enough_ahead_the_slower_side_never_waits():
    lengths = Lengths(24, 1.0, 200).draw(80, 4, seed=2)
    fast, slow = (
        simulate(machine(learn_s=s, publish_s=0.0), lengths, 4, 4, warm_up=5, cool_down=5)
        for s in (40.0, 0.5)
    )
    assert fast.learner_idle == 0.0
    assert fast.step_s == pytest.approx(40.0, abs=0.5)  # and a decode step that a sync waits for
    assert slow.engine_idle < 0.05
    assert slow.learner_idle == pytest.approx(1.0 - 0.5 / slow.step_s, abs=0.1)


def test_reading_again_costs_what_it_says():
    """Synchronous: each step reads its prompt once for both siblings. 7 tokens at 1/64 s."""
    plain = simulate(machine(), [[4, 10]] * 2, 1, 0)
    read = simulate(machine(prefill_s=1 / 64, prompt_tokens=7), [[4, 10]] * 2, 1, 0)
    assert read.step_s == plain.step_s + 7 / 64


def test_colocated_engines_gain_only_the_places_that_a_tail_leaves_empty():
    lengths = Lengths(24, 1.0, 200).draw(40, 4, seed=1)
    gain = {}
    for colocated in (False, True):
        seconds = [
            simulate(machine(colocated=colocated), lengths, 4, k, warm_up=2, cool_down=2).step_s
            for k in (0, 1)
        ]
        gain[colocated] = seconds[0] / seconds[1]
    assert gain[False] > gain[True] > 1.1
    sleeping = simulate(machine(colocated=True), lengths, 4, 2, warm_up=2, cool_down=2)
    assert sleeping.engine_idle >= 4.5 / sleeping.step_s - 1e-9


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_every_bound_holds(ahead):
    lengths = Lengths(24, 1.2, 300).draw(48, 4, seed=ahead)
    out = simulate(machine(engines=3, places=5), lengths, 4, ahead)
    assert out.staleness_max <= ahead
    assert 1.0 <= out.versions <= 1 + ahead
    assert len(out.ends) == 12


class TokenByToken:
    """The same run, written a second time: every engine gives one token to each of its sequences, in real
    order.

    Sequences are (step, group, length) with what they have; nothing is shared with the model but the numbers.
    """

    def __init__(self, m: Machine, lengths, count: int, ahead: int) -> None:
        self.m, self.lengths, self.count, self.ahead = m, lengths, count, ahead
        self.engines = [{"clock": 0.0, "busy": 0.0, "run": [], "wait": []} for _ in range(m.engines)]
        self.have, self.first, self.seen, self.finish = {}, {}, {}, {}
        self.now = self.waited = 0.0
        self.ends = []

    def tick(self, engine, version):
        cost = self.m.step_s[min(len(engine["run"]), len(self.m.step_s) - 1)]
        engine["clock"] += cost
        engine["busy"] += cost
        for key in list(engine["run"]):
            self.have[key] = self.have.get(key, 0) + 1
            self.first.setdefault(key, version)
            self.seen.setdefault(key, set()).add(version)
            if self.have[key] == self.lengths[key[0]][key[1]]:
                engine["run"].remove(key)
                self.finish[key] = engine["clock"]
        self.admit(engine)

    def admit(self, engine):
        while engine["wait"] and len(engine["run"]) < self.m.places:
            engine["run"].append(engine["wait"].pop(0))

    def whole(self, step):
        groups = range(step * self.count, (step + 1) * self.count)
        return all(self.have.get((g, i), 0) == n for g in groups for i, n in enumerate(self.lengths[g]))

    def run(self):
        steps, begun, kept = len(self.lengths) // self.count, 0, []
        limit = max(map(max, self.lengths))
        for step in range(steps):
            last = min(step + self.ahead, steps - 1)
            fresh = [
                (g, i)
                for g in range(begun * self.count, (last + 1) * self.count)
                for i in range(len(self.lengths[g]))
            ]
            begun = last + 1
            self.deal(sorted(kept + fresh), limit)
            while not self.whole(step):
                self.tick(min((e for e in self.engines if e["run"]), key=lambda e: e["clock"]), step)
            own = [at for (g, _), at in self.finish.items() if g // self.count == step]
            ready = max([self.now, *own])
            self.work(ready, step)
            if self.m.colocated:
                ready = self.quiet(ready)
            self.waited += ready - self.now
            learnt = ready + self.m.learn_s
            if not self.m.colocated:
                self.work(learnt, step)
                learnt = self.quiet(learnt)
            kept = [key for e in self.engines for key in e["run"] + e["wait"]]
            for engine in self.engines:
                engine["run"], engine["wait"] = [], []
            self.now = learnt + self.m.publish_s
            self.ends.append(self.now)

    def work(self, until, version):
        for engine in self.engines:
            while engine["run"] and engine["clock"] < until:
                self.tick(engine, version)

    def quiet(self, now):
        return max(now, *(e["clock"] for e in self.engines))

    def deal(self, keys, limit):
        groups = sorted({g for g, _ in keys})
        weight = {g: sum(limit - self.have.get(key, 0) for key in keys if key[0] == g) for g in groups}
        load = [0] * self.m.engines
        share = [[] for _ in self.engines]
        for g in sorted(groups, key=lambda g: (-weight[g], g)):
            to = load.index(min(load))
            load[to] += weight[g]
            share[to].append(g)
        for engine, mine in zip(self.engines, share, strict=True):
            if not engine["run"]:
                engine["clock"] = max(engine["clock"], self.now)
            engine["wait"] += [key for g in sorted(mine) for key in keys if key[0] == g]
            self.admit(engine)


@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"engines": 3, "places": 6},
        {"engines": 2, "colocated": True},
        {"learn_s": 0.0, "engines": 2, "places": 3},
    ],
    ids=["one", "three", "colocated", "no learner"],
)
def test_the_model_agrees_with_a_run_token_by_token(ahead, changes):
    m = machine(**changes)
    lengths = Lengths(12, 1.0, 80).draw(24, 3, seed=ahead)
    book = TokenByToken(m, lengths, 4, ahead)
    book.run()
    out = simulate(m, lengths, 4, ahead)
    assert out.ends == tuple(book.ends)
    assert out.learner_idle == book.waited / book.now
    assert out.engine_idle == pytest.approx(
        1 - sum(e["busy"] for e in book.engines) / book.now / m.engines, abs=1e-12
    )
    ages = [g // 4 - first for (g, _), first in book.first.items()]
    assert (out.staleness_mean, out.staleness_max) == (sum(ages) / len(ages), max(ages))
    assert out.versions == sum(map(len, book.seen.values())) / len(book.seen)


def test_lengths_have_the_mean_that_was_asked_for_cut_included():
    for mean, spread, limit in ((2000, 1.0, 16384), (6000, 0.8, 8192), (100, 0.0, 200)):
        drawn = [n for group in Lengths(mean, spread, limit).draw(3000, 4, seed=3) for n in group]
        assert statistics.fmean(drawn) == pytest.approx(mean, rel=0.04)
        assert max(drawn) <= limit


def test_siblings_share_a_part_of_their_spread():
    groups = Lengths(2000, 1.0, 10**9, group_share=0.3).draw(4000, 2, seed=5)
    logs = [[math.log(n) for n in group] for group in groups]
    between = statistics.correlation([a for a, _ in logs], [b for _, b in logs])
    assert between == pytest.approx(0.3, abs=0.05)


def test_measured_lengths_give_their_mean_and_spread_back():
    rng = random.Random(0)
    drawn = [round(math.exp(rng.gauss(6.0, 0.7))) for _ in range(4000)]
    found = Lengths.of(drawn, 4096)
    assert found.mean == pytest.approx(statistics.fmean(drawn), rel=1e-12)
    assert found.spread == pytest.approx(0.7, rel=0.05)
    assert Lengths.of([3, 9000], 4096).limit == 9000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Lengths(200, 1.0, 100), "0 < mean <= limit"),
        (lambda: Lengths(20, -1.0, 100), "spread -1"),
        (lambda: Lengths.of([], 10), "at least one completion"),
        (lambda: simulate(machine(), [[4]] * 5, 2, 0), "got 5 groups of 2 a step"),
        (lambda: simulate(machine(), [[4]] * 4, 2, 0, warm_up=1, cool_down=1), "1 \\+ 1"),
        (lambda: simulate(machine(), [[4]] * 4, 2, -1), "steps_ahead >= 0"),
    ],
)
def test_what_cannot_be_simulated_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
