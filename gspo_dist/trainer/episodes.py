"""Episodes between engines and environments: which turn is whose, and when an episode is over.

    begin ──► reset ──► opening ──► engine: a turn ──► step ──► reply ──► engine: a turn ──► ... ──► finished
              (environment)         (policy)           (environment)

An episode is a completion that grows by turns: `types.Completion.turns` says which tokens are whose, and from
it alone an episode goes on anywhere. It ends

* where the environment says so, or has no more to say: finish_reason as the engine gave it, stop;
* where a turn or the episode reaches its limit of tokens: length. A turn that was cut is not told to the
  environment, and what was paid before stays paid;
* after `environment.max_turns` turns: turns;
* where the environment fails, or its reset leaves no room for a turn: failed. Its reward is then
  `environment.failure_reward`.

What an environment says last is not appended, because nothing follows it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gspo_dist.config import EnvironmentConfig
from gspo_dist.environments.pool import FAILURES_IN_A_ROW, EnvironmentPool, Reply
from gspo_dist.environments.worker import Call
from gspo_dist.rewards.pool import RewardPool
from gspo_dist.rewards.reward import Item, Judged
from gspo_dist.rollout.engine import group_work
from gspo_dist.rollout.pool import RolloutPool
from gspo_dist.rollout.seeds import work_keys
from gspo_dist.rollout.turns import Bridge
from gspo_dist.types import UNBEGUN, Completion, Prompt, SamplingSpec, Turn, Work, WorkKey, environment_tokens

log = logging.getLogger(__name__)

WAIT_S = 0.25
"""Longest wait for an environment at a time, where no engine has work."""


@dataclass
class Moved:
    """What became of episodes whose environments have answered."""

    ready: list[Work] = field(default_factory=list)
    """Those whose next turn is an engine's."""
    finished: dict[WorkKey, Completion] = field(default_factory=dict)
    """Those that are over."""


class Episodes:
    """The episodes of a run, or of an evaluation beside it."""

    def __init__(self, config: EnvironmentConfig, pool: EnvironmentPool, bridge: Bridge) -> None:
        self.config, self.pool, self.bridge = config, pool, bridge
        self.live: dict[WorkKey, Work] = {}
        """Every episode that is under way, as it was when it went to an engine or to its environment."""
        self.acting: set[WorkKey] = set()
        """Those that wait for their environment."""
        self.states: dict[WorkKey, tuple[int, str]] = {}
        """Environments' states as JSON, and after how many turns they were so."""
        self.too_long_in_a_row = 0
        """Resets in a row that left no room for a turn."""
        self.counts: Counter[str] = Counter()
        """Episodes that were begun again, and those that were played again."""

    def take(self, work: Sequence[Work]) -> list[Work]:
        """Work that waits for an engine: returns what engines can go on with. The rest, which waits for an
        environment, goes there.
        """
        ready, calls = [], []
        for item in work:
            turns = item.so_far.turns
            self.live[item.key] = item
            if turns and not item.so_far.finish_reason:
                ready.append(self._until(item))
            elif item.key not in self.acting:
                calls.append(self._call(item))
        self.acting |= {call.key for call in calls}
        self.pool.submit(calls)
        return ready

    def turned(self, finished: Mapping[WorkKey, Completion]) -> dict[WorkKey, Completion]:
        """Takes turns that engines have finished. Returns those with which the episode is over."""
        over, waiting = {}, []
        for key, completion in finished.items():
            item = replace(self.live[key], so_far=completion)
            if completion.finish_reason == "length" or self._has_failed(completion):
                over[key] = self._over(item, self._turn(item), completion.finish_reason)
            else:
                waiting.append(item)
        self.take(waiting)
        return over

    def poll(self, seconds: float) -> Moved:
        """What environments have answered, after at most `seconds` of waiting for a first answer."""
        moved = Moved()
        if not self.acting:
            return moved
        for reply in self.pool.poll(seconds, self.acting.__contains__):
            self.acting.discard(reply.key)
            item = self.live[reply.key]
            self.counts["played_again"] += reply.is_replayed
            if reply.is_diverged:
                self.counts["begun_again"] += 1
                self.states.pop(reply.key, None)
                moved.ready += self.take([replace(item, so_far=UNBEGUN)])
            elif not item.so_far.turns:
                self._opened(item, reply, moved)
            else:
                self._answered(item, reply, moved)
        return moved

    def settle(self) -> Moved:
        """`poll` until no environment owes an answer: under a fixed clock a late tool holds everybody."""
        whole = Moved()
        while self.acting:
            more = self.poll(WAIT_S)
            whole.ready += more.ready
            whole.finished |= more.finished
        # Who answers first is an accident. Batches in its order would differ in the last digit of log-probs.
        whole.ready.sort(key=lambda item: item.key)
        return whole

    def beside(self) -> Episodes:
        """Episodes of their own in the same processes, as an evaluation plays them beside a run's."""
        return Episodes(self.config, self.pool, self.bridge)

    def forget(self) -> None:
        """Ends every episode that is under way; whoever holds them may take them up elsewhere."""
        self.pool.end(list(self.live))
        self.live, self.acting, self.states = {}, set(), {}

    # --- what an answer makes of an episode ---

    def _opened(self, item: Work, reply: Reply, moved: Moved) -> None:
        """The reset's answer, after which the policy speaks. A reset that failed costs the episode all the
        same after one turn: without a token of its policy a rollout cannot be trained on.
        """
        text, failed = self.bridge.cut(reply.observation.text), reply.failed
        ids = self.bridge.opening(text)
        self.too_long_in_a_row += 1
        if len(ids) < item.spec.max_tokens:
            self.too_long_in_a_row = 0
        else:
            self._too_long(item, len(ids))
            text, failed, ids = "", "error", self.bridge.opening(None)
        turn = Turn(0, 0, len(ids), "", text, failed=failed)
        moved.ready.append(self._goes_on(item, ids, turn, reply))

    def _too_long(self, item: Work, tokens: int) -> None:
        """A reset that leaves the policy no room costs its episode. ValueError: no failure may, or all do."""
        bare, limit = len(self.bridge.opening(None)), item.spec.max_tokens
        what = (
            f"prompt {item.prompt.prompt_id!r}: what the environment's reset says takes {tokens} tokens, and "
            f"an episode has rollout.max_completion_tokens = {limit}; raise it, or lower "
            "environment.tokens_per_answer"
        )
        reward = self.config.failure_reward
        if reward is None or bare >= limit or self.too_long_in_a_row >= FAILURES_IN_A_ROW:
            raise ValueError(what)
        log.warning("%s: the episode counts as %g", what, reward)

    def _answered(self, item: Work, reply: Reply, moved: Moved) -> None:
        seen = reply.observation
        turn = replace(self._turn(item), reward=seen.reward, parts=seen.parts, failed=reply.failed)
        if reply.failed:
            moved.finished[item.key] = self._over(item, turn, "failed")
            return
        turn = replace(turn, observation=self.bridge.cut(seen.text))
        if seen.done:
            moved.finished[item.key] = self._over(item, turn, item.so_far.finish_reason)
        elif len(item.so_far.turns) >= self.config.max_turns:  # the reset is one of them, this turn is not
            moved.finished[item.key] = self._over(item, turn, "turns")
        else:
            so_far = item.so_far.token_ids
            ids = self.bridge.reply(so_far, turn.observation)
            if len(so_far) + len(ids) >= item.spec.max_tokens:
                moved.finished[item.key] = self._over(item, turn, "length")
            else:
                moved.ready.append(self._goes_on(item, ids, replace(turn, stop=turn.end + len(ids)), reply))

    def _goes_on(self, item: Work, ids: Sequence[int], turn: Turn, reply: Reply) -> Work:
        """The episode with the environment's tokens after its own, for the next turn."""
        so_far = item.so_far.extend(environment_tokens(ids))
        item = self._until(replace(item, so_far=replace(so_far, turns=(*so_far.turns, turn))))
        self.live[item.key] = item
        if reply.state is not None:
            self.states[item.key] = len(item.so_far.turns), reply.state
        return item

    def _over(self, item: Work, turn: Turn, reason: str) -> Completion:
        """The whole completion of an episode that ends with `turn`."""
        del self.live[item.key]
        self.states.pop(item.key, None)
        self.pool.end([item.key])
        completion = item.so_far
        reason = "failed" if self._has_failed(completion) else reason
        return replace(completion, turns=(*completion.turns, turn), finish_reason=reason)

    def _turn(self, item: Work) -> Turn:
        """The turn that the completion ends with, without an answer."""
        start, end = item.so_far.turns[-1].stop, len(item.so_far)
        return Turn(start, end, end, self.bridge.said(item.so_far.token_ids[start:]))

    def _until(self, item: Work) -> Work:
        """With the limit of its next turn."""
        if self.config.tokens_per_turn is None:
            return item
        limit = item.so_far.turns[-1].stop + self.config.tokens_per_turn
        return replace(item, until=min(limit, item.spec.max_tokens))

    @staticmethod
    def _has_failed(completion: Completion) -> bool:
        return any(turn.failed for turn in completion.turns)

    def _call(self, item: Work) -> Call:
        """What asks the environment for its next answer."""
        turns = item.so_far.turns
        # Siblings have seeds of their own, which also a resumed run finds again.
        seed = int(work_keys([item])[0])
        if not turns:
            return Call(item.key, item.prompt, seed, None)
        history = tuple((turn.said, turn.observation) for turn in turns)
        after, state = self.states.get(item.key, (0, None))
        return Call(
            item.key,
            item.prompt,
            seed,
            self._turn(item).said,
            history,
            state if after == len(turns) else None,
        )

    # --- rewards ---

    def judge(self, items: Sequence[Item], rewards: RewardPool) -> list[Judged]:
        """The verdicts on whole episodes, by `environment.reward`."""
        asked = [item for item in items if self.config.pays != "environment" and not failure(item[2])]
        functions = iter(rewards.judge(asked) if asked else [])
        verdicts = []
        for _, _, completion in items:
            if failure(completion):
                verdicts.append(Judged(self.config.failure_reward or 0.0, {}))
                continue
            paid = sum(turn.reward for turn in completion.turns)
            parts = summed_parts(completion.turns)
            if self.config.pays == "environment":
                verdicts.append(Judged(paid, parts))
                continue
            judged = next(functions)
            if self.config.pays == "sum":
                own = {"environment": paid, "function": judged.reward}
                verdicts.append(Judged(judged.reward + paid, judged.parts | parts | own))
            else:
                verdicts.append(Judged(judged.reward, judged.parts | parts))
        return verdicts


class EpisodeJudge:
    """A reward pool's `judge` for whole episodes."""

    def __init__(self, episodes: Episodes, rewards: RewardPool) -> None:
        self.episodes, self.rewards = episodes, rewards

    def judge(self, items: Sequence[Item]) -> list[Judged]:
        return self.episodes.judge(items, self.rewards)


def failure(completion: Completion) -> str:
    """How the environment of an episode failed: timeout, crash or error. "" where it did not."""
    return next((turn.failed for turn in completion.turns if turn.failed), "")


def summed_parts(turns: Iterable[Turn]) -> dict[str, float]:
    """The environments' named numbers, summed over the turns."""
    out: dict[str, float] = {}
    for turn in turns:
        for name, value in turn.parts.items():
            out[name] = out.get(name, 0.0) + value
    return out


def play(
    pool: RolloutPool,
    episodes: Episodes,
    prompts: Sequence[Prompt],
    spec: SamplingSpec,
    group_ids: Sequence[int],
    slice_s: float = WAIT_S,
) -> list[list[Completion]]:
    """`RolloutPool.generate` with an environment: `spec.n` episodes of each prompt, in order.

    Nothing else may be in the engines. An error ends the environments of these episodes. Turns that were
    being sampled stay in the engines, as `RolloutPool.generate` leaves them.
    """
    work = group_work(prompts, spec, group_ids)
    finished: dict[WorkKey, Completion] = {}
    try:
        pool.submit(episodes.take(work))
        while len(finished) < len(work):
            told = pool.advance(seconds=slice_s)
            for progress in told.values():
                finished |= episodes.turned(progress.finished)
            moved = episodes.poll(0.0 if any(p.ticks for p in told.values()) else WAIT_S)
            finished |= moved.finished
            pool.submit(moved.ready)
    except BaseException:
        episodes.forget()
        raise
    return [[finished[group, sample] for sample in range(spec.n)] for group in group_ids]
