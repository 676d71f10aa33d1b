"""Laws of every engine's verbs, as plain assertions: the tests of both engines run the same ones.

Prompts are longer than a block of vLLM's cache, so that one version could find there what another wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gspo_dist.rollout.engine import RolloutEngine, group_work
from gspo_dist.types import NO_VERSION, Completion, Prompt, SamplingSpec, Work, WorkKey, environment_tokens
from gspo_dist.weights.verify import WeightSyncError

SPEC = SamplingSpec(n=2, max_tokens=20, seed=11, record_routing=True)
EXACT = 1e-5


def prompts(vocabulary: int, lengths: Sequence[int] = (40, 35, 50, 3)) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(f"p{i}", tuple(rng.integers(2, vocabulary, n).tolist()), "") for i, n in enumerate(lengths)
    ]


class Contract:
    """engines: two alike, with routes. publish(engine, policy, version) sends policy 0 or 1 to an engine;
    version None: opens the publication and sends half of the buckets.
    logprobs(policy, ids) [len - 1] and routes(policy, ids) [len, L, K] sorted are the model's own.
    """

    def __init__(
        self,
        engines: Sequence[RolloutEngine],
        publish: Callable[[RolloutEngine, int, int | None], None],
        logprobs: Callable[[int, np.ndarray], np.ndarray],
        routes: Callable[[int, np.ndarray], np.ndarray],
        is_empty: Callable[[RolloutEngine], bool],
    ) -> None:
        self.one, self.two = engines
        self.publish, self.logprobs, self.routes, self.is_empty = publish, logprobs, routes, is_empty
        self.prompts = prompts(self.one.info().vocab_size)
        self.work = group_work(self.prompts, SPEC, range(len(self.prompts)))

    def check_all(self) -> None:
        self.publish(self.one, 0, 5)
        self.publish(self.two, 0, 5)
        whole = self.whole()
        self.adding_changes_nothing(whole)
        self.continuing_changes_nothing(whole)
        self.growth_is_what_is_lost_with_an_engine(whole)
        self.candidates_are_the_likeliest_whoever_sampled(whole)
        self.a_run_of_fixed_ticks_repeats_over_updates()
        self.turns_are_the_policys()
        self.withdrawing_leaves_a_usable_engine(whole)
        self.an_update_that_is_given_up_is_made_good_by_a_whole_one(whole)
        self.work_that_cannot_be_taken_is_refused()

    def whole(self) -> dict[WorkKey, Completion]:
        """The completions as nobody interrupted them, and that they are the model's."""
        groups = self.one.generate(self.prompts, SPEC, range(len(self.prompts)))
        found = {(g, i): c for g, group in enumerate(groups) for i, c in enumerate(group)}
        for (g, _), completion in found.items():
            self.is_the_policys(self.prompts[g], completion, {5: 0})
            assert completion.finish_reason == ("length" if len(completion) == 20 else "stop")
        assert max(len(c) for c in found.values()) == 20
        [[bare]] = self.one.generate(self.prompts[:1], replace(SPEC, n=1, record_routing=False), [0])
        assert bare.routing is None
        assert bare.token_ids.tolist() == found[0, 0].token_ids.tolist()
        assert self.is_empty(self.one)
        return found

    def is_the_policys(self, prompt: Prompt, c: Completion, policy_of: dict[int, int]) -> None:
        """Every token's log-prob and every row's route are those of its version's policy."""
        row, start = np.array([*prompt.token_ids, *c.token_ids]), len(prompt.token_ids)
        assert set(c.policy_versions.tolist()) <= set(policy_of)
        assert (np.diff(c.policy_versions) >= 0).all()
        for version, policy in policy_of.items():
            own = c.policy_versions == version
            if own.any():
                assert np.abs(self.logprobs(policy, row)[start - 1 :] - c.logprobs)[own].max() < EXACT
        if c.routing is None:
            return
        assert c.routing.known.tolist() == [True] * (len(row) - 1) + [False]
        # A row is recorded when its token is read: by the version that samples the next one.
        reader = np.concatenate([np.full(start - 1, c.policy_versions[0]), c.policy_versions])
        for version, policy in policy_of.items():
            own = np.flatnonzero(reader == version)
            wanted = self.routes(policy, row)[own]
            assert (np.sort(c.routing.expert_ids[own], axis=-1) == wanted).all()

    def adding_changes_nothing(self, whole: dict[WorkKey, Completion]) -> None:
        """Law 1: groups that join others in the middle are what they are alone, and change no bit of them."""
        self.two.submit(self.work[:4])
        first = self.two.advance(ticks=7)
        grown = int(first.growth.counts.sum())
        assert first.ticks == 7
        assert 14 < first.tokens == grown + sum(len(c) for c in first.finished.values())
        self.two.submit(self.work[4:])
        found = {**first.finished, **self.two.advance().finished}
        same(found, whole, exact=True)
        assert self.is_empty(self.two)

    def continuing_changes_nothing(self, whole: dict[WorkKey, Completion]) -> None:
        """Law 2: withdrawn after any ticks, submitted elsewhere, withdrawn again: the same completions."""
        for cuts in ((1, 9), (6, 1), (19, 3)):
            self.one.submit(self.work)
            found = dict(self.one.advance(cuts[0]).finished)
            left = self.one.withdraw()
            assert self.is_empty(self.one)
            self.two.submit(left)
            found |= self.two.advance(cuts[1]).finished
            again = self.two.withdraw()
            assert [w.key for w in again] == [w.key for w in left if w.key not in found]
            for before, after in zip([w for w in left if w.key not in found], again, strict=True):
                kept = len(before.so_far)
                assert after.so_far.finish_reason == ""
                assert after.so_far.logprobs[:kept].tobytes() == before.so_far.logprobs.tobytes()
                assert after.so_far.token_ids[:kept].tolist() == before.so_far.token_ids.tolist()
                known = before.known_routes()
                assert known == len(before.prompt.token_ids) + kept - 1
                ids = after.so_far.routing.expert_ids[:known]
                assert (ids == before.so_far.routing.expert_ids[:known]).all()
            self.one.submit(again)
            found |= self.one.advance().finished
            same(found, whole)

    def candidates_are_the_likeliest_whoever_sampled(self, whole: dict[WorkKey, Completion]) -> None:
        """They change no token, go through slices and from engine to engine, and are the policy's."""
        work = [replace(item, spec=replace(SPEC, candidates=5)) for item in self.work]
        self.one.submit(work)
        told = self.one.advance(7)
        found, known = dict(told.finished), told.growth.parts()
        left = self.one.withdraw()
        assert self.is_empty(self.one)
        for item in left:
            assert item.so_far.candidates.ids.tolist() == known[item.key].candidates.ids.tolist()
        self.two.submit(left)
        found |= self.two.advance().finished
        same(found, whole)
        for c in found.values():
            ids, logprobs = c.candidates.ids, c.candidates.logprobs
            assert ids.shape == logprobs.shape == (len(c), 5)
            assert (np.diff(logprobs, axis=1) <= 0).all()
            sampled = ids == c.token_ids[:, None]
            # The sampled token is among them with its own log-prob, or less likely than all of them.
            assert np.abs(logprobs - c.logprobs[:, None])[sampled].max(initial=0.0) < EXACT
            assert (logprobs[~sampled.any(1), -1] >= c.logprobs[~sampled.any(1)] - EXACT).all()
        (g, _), c = next((key, c) for key, c in found.items() if len(c) == 20)
        start = len(self.prompts[g].token_ids)
        row = np.array([*self.prompts[g].token_ids, *c.token_ids])
        for place in (0, 8, 19):  # of the first engine and of the second
            for k in (0, 4):
                other = np.append(row[: start + place], c.candidates.ids[place, k])
                assert abs(self.logprobs(0, other)[-1] - c.candidates.logprobs[place, k]) < EXACT
        vocabulary = self.one.info().vocab_size
        all_of_it = replace(SPEC, n=1, max_tokens=2, candidates=vocabulary + 2)
        [[c]] = self.one.generate(self.prompts[:1], all_of_it, [0])
        assert np.isneginf(c.candidates.logprobs[:, vocabulary:]).all()
        assert sorted(c.candidates.ids[0, :vocabulary].tolist()) == list(range(vocabulary))
        assert np.abs(np.exp(c.candidates.logprobs[:, :vocabulary]).sum(1) - 1).max() < EXACT
        [[bare]] = self.one.generate(self.prompts[:1], replace(SPEC, n=1), [0])
        assert bare.candidates is None

    def growth_is_what_is_lost_with_an_engine(self, whole: dict[WorkKey, Completion]) -> None:
        """What slices tell makes up for a withdrawal that cannot come any more."""
        self.one.submit(self.work)
        known, found = {w.key: w for w in self.work}, {}
        for ticks in (3, 0, 8):
            told = self.one.advance(ticks)
            assert told.ticks == ticks
            found |= told.finished
            for key, more in told.growth.parts().items():
                known[key] = known[key].extended(more)
        left = [known[key] for key in known if key not in found]
        for guess, truth in zip(left, self.one.withdraw(), strict=True):
            assert guess.so_far.logprobs.tobytes() == truth.so_far.logprobs.tobytes()
        self.two.submit(left)
        same({**found, **self.two.advance().finished}, whole)

    def a_run_of_fixed_ticks_repeats_over_updates(self) -> None:
        """Laws 3, 4 and 5: two publications in the middle, twice; every token is its version's policy's."""

        def episode() -> dict[WorkKey, Completion]:
            self.publish(self.one, 0, 5)
            work, found = list(self.work), dict[WorkKey, Completion]()
            for ticks, version in ((4, 6), (5, 7)):
                self.one.submit(work)
                found |= self.one.advance(ticks).finished
                work = self.one.withdraw()
                self.publish(self.one, version % 2, version)
            self.one.submit(work)
            return found | dict(self.one.advance().finished)

        first, second = episode(), episode()
        same(first, second, exact=True)
        assert set(first) == {w.key for w in self.work}
        for (g, _), completion in first.items():
            self.is_the_policys(self.prompts[g], completion, {5: 0, 6: 0, 7: 1})
        spans = [c.policy_versions.tolist() for c in first.values() if len(c) > 9]
        assert spans
        for versions in spans:
            assert versions[:10] == [5] * 4 + [6] * 5 + [7]
        # A prompt that the cache of version 6 knew is read anew under version 7.
        [[fresh], *_] = self.one.generate(self.prompts[:1], replace(SPEC, n=1), [0])
        self.is_the_policys(self.prompts[0], fresh, {7: 1})
        self.publish(self.one, 0, 5)

    def turns_are_the_policys(self) -> None:
        """Law 25: of an episode of three turns, cut in the middle of the second and gone on with elsewhere,
        every log-prob and every route is the model's on the whole sequence, and so are the routes of the
        environment's tokens.
        """
        said = [[7, 9, 11], [5], []]
        live = {item.key: item for item in self.work}
        for number, words in enumerate(said):
            work = [replace(item, until=len(item.so_far) + 5) for item in live.values()]
            assert [item.left for item in work] == [5] * len(work)
            until = {item.key: item.until for item in work}
            self.one.submit(work)
            found = dict(self.one.advance(2 if number == 1 else None).finished)
            if number == 1:
                left = self.one.withdraw()
                assert left
                self.two.submit(left)
                found |= self.two.advance().finished
            assert set(found) == set(live)
            for key, completion in found.items():
                assert completion.finish_reason == "stop" or len(completion) == until[key]
                so_far = replace(completion, finish_reason="", text="").extend(environment_tokens(words))
                live[key] = replace(live[key], so_far=so_far, until=None)
        for (g, _), item in live.items():
            c, prompt = item.so_far, self.prompts[g]
            row, start = np.array([*prompt.token_ids, *c.token_ids]), len(prompt.token_ids)
            assert c.token_ids[~c.loss_mask].tolist() == [7, 9, 11, 5]
            assert set(c.policy_versions[c.loss_mask].tolist()) == {5}
            assert set(c.policy_versions[~c.loss_mask].tolist()) == {NO_VERSION}
            gaps = np.abs(self.logprobs(0, row)[start - 1 :] - c.logprobs)
            assert gaps[c.loss_mask].max() < EXACT
            assert not c.logprobs[~c.loss_mask].any()
            assert c.routing.known.tolist() == [True] * (len(row) - 1) + [False]
            assert (np.sort(c.routing.expert_ids, axis=-1)[:-1] == self.routes(0, row)[:-1]).all()
        assert self.is_empty(self.one)
        assert self.is_empty(self.two)

    def withdrawing_leaves_a_usable_engine(self, whole: dict[WorkKey, Completion]) -> None:
        """Laws 6 and 7: with work nothing else is done, without it everything."""
        self.one.submit(self.work)
        self.one.advance(ticks=5)
        ids = np.array(self.prompts[0].token_ids)
        for verb, call in (
            ("logprobs_of", lambda: self.one.logprobs_of([ids])),
            ("start_weight_update", self.one.start_weight_update),
            ("generate", lambda: self.one.generate(self.prompts, SPEC, range(4))),
        ):
            with pytest.raises(ValueError, match=f"{verb} needs an engine without work: .* withdraw them"):
                call()
        left = self.one.withdraw()
        assert self.is_empty(self.one)
        assert self.one.withdraw() == []
        assert np.abs(self.one.logprobs_of([ids])[0] - self.logprobs(0, ids)).max() < EXACT
        self.publish(self.one, 1, None)
        for call in (lambda: self.one.advance(1), lambda: self.one.submit(left)):
            with pytest.raises(WeightSyncError, match="middle of a weight update"):
                call()

    def an_update_that_is_given_up_is_made_good_by_a_whole_one(
        self, whole: dict[WorkKey, Completion]
    ) -> None:
        """Where an engine dies in a publication, the others begin it again; nobody samples from a mixture."""
        ids = np.array(self.prompts[0].token_ids)
        self.one.abandon_weight_update()
        self.one.abandon_weight_update()
        for call in (
            lambda: self.one.advance(1),
            lambda: self.one.submit(self.work),
            lambda: self.one.logprobs_of([ids]),
        ):
            with pytest.raises(WeightSyncError, match="weights of two versions since an update was given up"):
                call()
        self.publish(self.one, 1, 6)
        assert np.abs(self.one.logprobs_of([ids])[0] - self.logprobs(1, ids)).max() < EXACT
        self.publish(self.one, 0, None)
        self.one.abandon_weight_update()
        self.publish(self.one, 0, 5)
        same(self.whole(), whole)
        self.two.abandon_weight_update()  # none is open
        assert np.abs(self.two.logprobs_of([ids])[0] - self.logprobs(0, ids)).max() < EXACT

    def work_that_cannot_be_taken_is_refused(self) -> None:
        item = self.work[0]
        spent = Completion(np.zeros(20, int), np.ones(20, bool), np.zeros(20), np.zeros(20, int), "", "")
        refused: list[tuple[list[Work], Any]] = [
            ([replace(item, so_far=spent)], "must have tokens left to sample: it has 20 of 20"),
            ([item, item], "completion 0 of group 0 must be in the making once: .* got it twice"),
            ([replace(item, prompt=Prompt("long", (2,) * 5000, ""))], "'long' .* got 5000"),
        ]
        for work, message in refused:
            with pytest.raises(ValueError, match=message):
                self.two.submit(work)
        self.two.submit([item])
        with pytest.raises(ValueError, match=r"completion 0 of group 0 .* got it twice"):
            self.two.submit([item])
        self.two.withdraw()


def same(found: dict[WorkKey, Completion], whole: dict[WorkKey, Completion], *, exact: bool = False) -> None:
    """The same completions; exact: to the last bit of every log-prob."""
    assert set(found) == set(whole)
    for key, completion in found.items():
        other = whole[key]
        assert completion.token_ids.tolist() == other.token_ids.tolist(), key
        assert (completion.finish_reason, completion.text) == (other.finish_reason, other.text)
        assert completion.policy_versions.tolist() == other.policy_versions.tolist()
        gap = np.abs(completion.logprobs - other.logprobs).max()
        assert gap == 0.0 if exact else gap < EXACT, (key, gap)
        assert (completion.routing.expert_ids == other.routing.expert_ids).all()
