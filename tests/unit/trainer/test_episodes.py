"""Episodes in whole runs: a real policy, the eager learner, the reference engine, real environments."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from gspo_dist.coldstart.tokenizer import EOS_ID, build_tokenizer
from gspo_dist.config import EnvironmentConfig, ObjectiveConfig, RolloutConfig
from gspo_dist.environments.pool import Reply
from gspo_dist.environments.protocol import Observation
from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.rewards.reward import Judged
from gspo_dist.rollout.engine import Growth, Progress
from gspo_dist.rollout.pool import LocalRolloutPool
from gspo_dist.rollout.reference import ReferenceEngine
from gspo_dist.rollout.turns import Bridge
from gspo_dist.trainer import clockwork
from gspo_dist.trainer.credit import turn_rewards
from gspo_dist.trainer.episode_page import EPISODES
from gspo_dist.trainer.episodes import WAIT_S, EpisodeJudge, Episodes, play
from gspo_dist.trainer.evaluate import evaluate_model
from gspo_dist.trainer.loop import run_step, start, train
from gspo_dist.trainer.selection import select
from gspo_dist.trainer.setup.build import build
from gspo_dist.trainer.step_metrics import turn_metrics, turn_rows
from gspo_dist.types import NO_VERSION, Completion, Prompt, Rollout, SamplingSpec, Turn, Work
from tests.unit.rollout.table_policy import TablePolicy
from tests.unit.trainer.small import config, go, values

SOURCE = '''
import os, time
from gspo_dist.environments.protocol import Observation

class Echo:
    """Says back the first two characters; pays for sevens; its answer depends on what it has seen."""

    def __init__(self, wait_s=0.0, fails=""):
        self.seen, self.wait_s, self.fails = 0, wait_s, fails

    def reset(self, prompt, seed):
        self.seed = seed
        return str(seed % 10)

    def step(self, turn):
        self.seen += 1
        time.sleep(self.wait_s)
        if self.fails and self.seed % 3 == 0:
            {"hang": lambda: time.sleep(60), "die": lambda: os._exit(1), "raise": lambda: 1 / 0}[self.fails]()
        return Observation(f"{self.seen}{turn[:2]}", reward=turn.count("7") / 4, parts={"seen": 1.0})

class Saved(Echo):
    def state_dict(self):
        return {"seen": self.seen, "seed": self.seed}

    def load_state_dict(self, state):
        self.seen, self.seed = state["seen"], state["seed"]

class Fickle(Echo):
    """Answers otherwise in every process."""

    def reset(self, prompt, seed):
        self.seed = seed
        return str(os.getpid())[-2:]
'''
TURNS = (
    "environment.max_turns=3",
    "environment.tokens_per_turn=6",
    "environment.stop=[a,b,c,d,e,f,g,h,i,j,k,l,m]",
    "rollout.max_completion_tokens=28",
    "rollout.prompts_per_step=2",
    "mini_batches=1",
    "evaluation.prompts=2",
    "objective.old_logprobs=recompute",
)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("environment") / "mine.py"
    path.write_text(SOURCE)
    return path


def episodes_of(model, reward_file, source, run_dir, *extra, name="Echo"):
    return config(model, reward_file, run_dir, f"environment.factory='{source}:{name}'", *TURNS, *extra)


class Watched:
    """Every rollout of a run."""

    def __init__(self) -> None:
        self.rollouts = []

    def __call__(self, run) -> None:
        plain = run.collector.judged

        def judged(step):
            told = plain(step)
            self.rollouts += told
            return told

        run.collector.judged = judged


def as_rows(rollouts):
    return [
        (
            r.rollout_id,
            r.reward,
            dict(r.reward_parts),
            r.completion.token_ids.tolist(),
            r.completion.logprobs.tolist(),
            r.completion.policy_versions.tolist(),
            r.completion.finish_reason,
            r.completion.turns,
        )
        for r in rollouts
    ]


def is_whole(rollout) -> None:
    """Law 22: the turns say of every token whose it is, and what the environment said is what it was told."""
    c, fast = rollout.completion, build_tokenizer()
    assert c.turns[0].start == c.turns[0].end == 0
    for before, turn in zip(c.turns, c.turns[1:], strict=False):
        assert turn.start == before.stop
    assert c.turns[-1].stop == len(c)
    mask = np.zeros(len(c), bool)
    for turn in c.turns:
        mask[turn.start : turn.end] = True
        assert fast.decode(c.token_ids[turn.start : turn.end], skip_special_tokens=True) == turn.said
        answer = turn.observation if turn.stop > turn.end else ""
        assert (
            c.token_ids[turn.end : turn.stop].tolist() == fast(answer, add_special_tokens=False)["input_ids"]
        )
    assert c.loss_mask.tolist() == mask.tolist()
    assert (c.policy_versions[~mask] == NO_VERSION).all()
    assert (c.policy_versions[mask] >= 0).all()
    assert not c.logprobs[~mask].any()
    assert c.text == fast.decode(c.token_ids, skip_special_tokens=True)
    assert rollout.reward == pytest.approx(
        sum(turn.said.count("7") / 4 for turn in c.turns if turn.observation)
    )
    for number, turn in enumerate(c.turns[1:], start=1):
        assert turn.observation in (
            f"{number}{turn.said[:2]}",
            "",
        )  # "": it was cut, or the last was not told


@pytest.fixture(scope="module")
def plain_run(model, reward_file, source, tmp_path_factory):
    folder, watch = tmp_path_factory.mktemp("episodes"), Watched()
    c = episodes_of(model, reward_file, source, folder / "run", "steps=2", "evaluation.every=1")
    _, rows = go(c, watch)
    return folder / "run", rows, watch.rollouts


@pytest.mark.slow
def test_a_run_of_episodes_is_trained_on_what_was_sampled(plain_run) -> None:
    """Law 22 on every rollout; old log-probs that the learner recomputes are the engine's."""
    folder, rows, rollouts = plain_run
    assert len(rollouts) == 16
    for rollout in rollouts:
        is_whole(rollout)
    reasons = {r.completion.finish_reason for r in rollouts}
    assert reasons >= {"length", "turns"}
    assert max(len(r.completion.turns) for r in rollouts) == 4
    last = rows[-1]
    assert last["mismatch/abs_log_ratio_max"] < 1e-4
    tokens = [int(r.completion.loss_mask.sum()) for r in rollouts[8:]]
    assert last["objective/tokens"] == sum(tokens)
    total = sum(len(r.completion) for r in rollouts[8:])
    assert last["environment/token_fraction"] == pytest.approx(1 - sum(tokens) / total)
    assert last["environment/failed_fraction"] == 0
    assert last["reward/seen"] == pytest.approx(
        np.mean([sum(bool(t.observation) for t in r.completion.turns[1:]) for r in rollouts[8:]])
    )
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])
    assert sample["turns"][0]["answer"] == rollouts[-1].completion.turns[0].observation
    assert [t["said"] for t in sample["turns"]] == [t.said for t in rollouts[-1].completion.turns]
    pages = read_jsonl(folder / EPISODES)
    assert [row["step"] for row in pages] == [1] * (len(pages) // 2) + [2] * (len(pages) // 2)
    assert len(pages[-1]["tokens"]) == len(rollouts[-1].completion)
    assert rows[0]["eval/heldout/reward_mean"] >= 0
    assert rows[0]["eval/heldout/completion_length_mean_tokens"] > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Echo", "Saved"])
def test_a_run_that_is_stopped_in_the_middle_of_its_episodes_goes_on_as_if_it_had_not(
    model, reward_file, source, tmp_path, monkeypatch, name
) -> None:
    """By the environment's state, else by its turns; episodes and metrics are those of the unstopped run."""
    monkeypatch.setattr(clockwork, "SLICE_TICKS", 2)  # the third step is young when the second is saved
    ahead = ("rollout.steps_ahead=1", "rollout.ticks_per_step=5", "checkpoint.every=2", "steps=3")
    knobs = (*ahead, "learner.optimizer.lr=1e-5")  # one that learns to say sevens ends no turn
    whole, stopped, resumed = Watched(), Watched(), Watched()
    _, rows = go(episodes_of(model, reward_file, source, tmp_path / "a", *knobs, name=name), whole)
    run = build(episodes_of(model, reward_file, source, tmp_path / "b", *knobs, name=name))
    stopped(run)
    start(run)
    run_step(run, 1)
    run_step(run, 2)
    held = json.loads((tmp_path / "b/checkpoints/step-000002/rollouts/rollouts.json").read_text())
    run.release()
    under_way = [row for row in held if row.get("unfinished") and len(row["turns"]) > 1]
    assert under_way
    assert all((row["state"] is not None) == (name == "Saved") for row in under_way)
    run = build(episodes_of(model, reward_file, source, tmp_path / "b", *knobs, name=name))
    resumed(run)
    try:
        train(run)
        played, again = (run.collector.episodes.counts[k] for k in ("played_again", "begun_again"))
    finally:
        run.release()
    assert again == 0
    assert (played > 0) == (name == "Echo")
    assert as_rows(stopped.rollouts + resumed.rollouts) == as_rows(whole.rollouts)
    for rollout in whole.rollouts:
        is_whole(rollout)
    differs = ("environment/", "time/", "perf/")
    theirs = [{k: v for k, v in row.items() if not k.startswith(differs)} for row in rows]
    ours = [
        {k: v for k, v in row.items() if not k.startswith(differs)}
        for row in read_jsonl(tmp_path / "b/metrics.jsonl")
    ]
    assert values(ours) == values(theirs)
    spans = [set(r.completion.policy_versions[r.completion.loss_mask].tolist()) for r in whole.rollouts]
    assert max(len(span) for span in spans) > 1  # an episode that went on over a publication


@pytest.mark.slow
def test_what_fails_costs_its_own_episode_and_what_diverges_begins_again(
    model, reward_file, source, tmp_path
) -> None:
    """Law 24: every third episode raises; the step goes on, and they have the stated reward."""
    watch = Watched()
    knobs = ("steps=1", "+environment.options.fails=raise", "environment.failure_reward=-2")
    _, rows = go(episodes_of(model, reward_file, source, tmp_path / "a", *knobs), watch)
    failed = [r for r in watch.rollouts if r.completion.finish_reason == "failed"]
    assert 0 < len(failed) < 8
    for rollout in failed:
        assert rollout.reward == -2.0
        assert rollout.completion.turns[-1].failed == "error"
        assert rollout.completion.loss_mask.any()
    for rollout in (r for r in watch.rollouts if r not in failed):
        is_whole(rollout)
    assert rows[-1]["environment/failed_fraction"] == len(failed) / 8
    assert rows[-1]["environment/error_fraction"] == len(failed) / 8


@pytest.mark.slow
def test_gspo_evaluate_plays_the_episodes_that_a_run_would_train_on(
    model, reward_file, source, tmp_path
) -> None:
    """Judged by the function on the whole episode, and by what the environment paid."""
    seen = []
    plain = Episodes.judge

    def judged(self, items, rewards):
        seen.extend((item, verdict) for item, verdict in zip(items, plain(self, items, rewards), strict=True))
        return [verdict for _, verdict in seen[-len(items) :]]

    knobs = ("evaluation.samples=3", "environment.reward=sum", "evaluation.temperature=1.0")
    with mock.patch.object(Episodes, "judge", judged):
        told = evaluate_model(episodes_of(model, reward_file, source, tmp_path, *knobs))
    assert len(seen) == 6
    for (_, _, completion), verdict in seen:
        paid = sum(turn.said.count("7") / 4 for turn in completion.turns if turn.observation)
        own = completion.text.count("7") / len(completion)
        assert verdict.reward == pytest.approx(paid + own)
    assert any(len(completion.turns) > 2 for (_, _, completion), _ in seen)
    assert told["eval/heldout/reward_mean"] == pytest.approx(np.mean([v.reward for _, v in seen]))
    assert not (tmp_path / "logs").exists()  # in_process: no actor was started


@pytest.mark.slow
def test_a_slow_tool_holds_no_engine_and_changes_no_episode(model, reward_file, source, tmp_path) -> None:
    """By ticks every answer is waited for. By the clock engines sample on for others meanwhile.

    The run repeats itself by ticks. By the clock the tokens are the same: a draw depends on its place alone.
    """
    ticks = ("rollout.steps_ahead=1", "rollout.ticks_per_step=5", "learner.optimizer.lr=1e-5", "steps=2")
    fast, slow = Watched(), Watched()
    go(episodes_of(model, reward_file, source, tmp_path / "fast", *ticks), fast)
    late = ("+environment.options.wait_s=0.1", "environment.workers=2")
    go(episodes_of(model, reward_file, source, tmp_path / "slow", *ticks, *late), slow)
    assert as_rows(slow.rollouts) == as_rows(fast.rollouts)
    assert max(len(r.completion.turns) for r in slow.rollouts) == 4

    one, other = Watched(), Watched()
    clock = ("steps=1",)
    go(episodes_of(model, reward_file, source, tmp_path / "a", *clock), one)
    while_acting = []

    def watched(run) -> None:
        other(run)
        advance = run.pool.advance

        def counted(ticks=None, seconds=None):
            acting, told = len(run.collector.episodes.acting), advance(ticks, seconds)
            while_acting.append((acting, sum(progress.tokens for progress in told.values())))
            return told

        run.pool.advance = counted

    go(episodes_of(model, reward_file, source, tmp_path / "b", *clock, *late), watched)
    # Other company in a batch may change the last digit of a log-prob, and nothing else.
    for here, there in zip(other.rollouts, one.rollouts, strict=True):
        assert here.completion.token_ids.tolist() == there.completion.token_ids.tolist()
        assert (here.completion.turns, here.reward) == (there.completion.turns, there.reward)
        np.testing.assert_allclose(here.completion.logprobs, there.completion.logprobs, atol=1e-5)
    assert any(acting and tokens for acting, tokens in while_acting)  # the engine did not wait for it


# --- the driver alone, over a policy that is a table ---


class Scripted:
    """An environment pool without processes: answers from a function, in the order asked or the reverse."""

    def __init__(self, answer, *, reverse=False) -> None:
        self.answer, self.reverse, self.calls, self.ended = answer, reverse, [], []
        self.waiting = []

    def submit(self, calls) -> None:
        self.calls += calls
        self.waiting += calls

    def poll(self, seconds, mine=lambda key: True):
        assert seconds >= 0
        told, self.waiting = self.waiting, []
        replies = [self.answer(call) for call in told]
        return replies[::-1] if self.reverse else replies

    def end(self, keys) -> None:
        self.ended += keys


class Characters(TablePolicy):
    """Over the quickstart's tokens."""

    def __init__(self, seed=3) -> None:
        super().__init__(seed, vocab_size=64)
        self.eos_ids = frozenset({EOS_ID})
        self.fast = build_tokenizer()

    def text(self, token_ids):
        return self.fast.decode(token_ids, skip_special_tokens=True)


SPEC = SamplingSpec(n=3, max_tokens=40, seed=5, stop_token_ids=tuple(range(20, 40)))
PROMPTS = [Prompt("a", (5, 6), "23"), Prompt("b", (7,), "4")]


def answers(text="12", **told):
    def answer(call):
        if call.turn is None:
            return Reply(call.key, Observation(""))
        return Reply(call.key, Observation(text, **told))

    return answer


def played(answer, *, reverse=False, limit=100, spec=SPEC, **knobs):
    pool = Scripted(answer, reverse=reverse)
    engine = ReferenceEngine(
        RolloutConfig(max_prompt_tokens=8, max_completion_tokens=64), Characters(), record_routing=False
    )
    settings = EnvironmentConfig(factory="guess", **knobs)
    episodes = Episodes(settings, pool, Bridge(build_tokenizer(), limit=limit))
    pool.episodes = episodes
    groups = play(LocalRolloutPool(engine), episodes, PROMPTS, spec, [10, 11], slice_s=0.001)
    assert episodes.live == {}
    assert episodes.states == {}
    assert sorted(set(pool.ended)) == [(g, i) for g in (10, 11) for i in range(3)]
    return pool, [c for group in groups for c in group]


def test_an_episode_ends_after_its_turns_and_its_last_answer_is_not_appended() -> None:
    _, found = played(answers(reward=0.5), max_turns=2)
    for c in found:
        if c.finish_reason == "turns":
            assert len(c.turns) == 3
            assert c.turns[-1].stop == c.turns[-1].end == len(c)
            assert (c.turns[-1].observation, c.turns[-1].reward) == ("12", 0.5)
    assert "turns" in {c.finish_reason for c in found}


def test_the_environment_ends_an_episode() -> None:
    _, found = played(answers("bye", done=True, reward=1.0))
    assert {c.finish_reason for c in found} <= {"stop", "length"}
    stopped = [c for c in found if c.finish_reason == "stop"]
    assert stopped
    for c in stopped:
        assert len(c.turns) == 2
        assert c.loss_mask.all()
        assert "bye" not in c.text


def test_the_limit_of_tokens_ends_an_episode_and_a_cut_turn_is_not_told() -> None:
    pool, found = played(answers(reward=0.25), spec=replace(SPEC, max_tokens=12))
    cut = [c for c in found if c.finish_reason == "length"]
    told = [call for call in pool.calls if call.turn is not None]
    ends = {EOS_ID, *SPEC.stop_token_ids}
    assert any(int(c.token_ids[-1]) not in ends for c in cut)
    for c in cut:
        assert len(c) <= 12
        if int(c.token_ids[-1]) not in ends:  # the turn itself was cut
            assert len(c) == 12
            assert c.turns[-1].reward == 0.0
            assert not any(
                call.turn == c.turns[-1].said and len(call.history) == len(c.turns) - 1 for call in told
            )


def test_an_answer_that_leaves_no_room_ends_the_episode_with_its_reward() -> None:
    _, found = played(answers("1234567890", reward=0.25), spec=replace(SPEC, max_tokens=12))
    full = [c for c in found if c.finish_reason == "length" and c.turns[-1].reward == 0.25]
    assert full
    for c in full:
        assert c.turns[-1].stop == len(c)
        assert c.loss_mask[-1]


def test_a_turn_has_a_limit_of_its_own() -> None:
    _, found = played(answers(), tokens_per_turn=2, max_turns=3)
    for c in found:
        assert all(turn.end - turn.start <= 2 for turn in c.turns)
        if c.finish_reason == "length":
            assert c.turns[-1].end - c.turns[-1].start == 2
    assert "length" in {c.finish_reason for c in found}


def test_a_long_answer_is_cut_and_recorded_as_it_stands() -> None:
    _, found = played(answers("123456"), limit=4, max_turns=2)
    said = [turn for c in found for turn in c.turns if turn.stop > turn.end]
    assert said
    assert {(turn.observation, turn.stop - turn.end) for turn in said} == {("1234", 4)}


def test_an_empty_answer_is_no_token_and_the_policy_goes_on() -> None:
    _, found = played(answers(""), max_turns=3)
    assert max(len(c.turns) for c in found) == 4
    for c in found:
        assert c.loss_mask.all()
        assert all(turn.stop == turn.end and turn.end > turn.start for turn in c.turns[1:])
        assert sum(turn.end - turn.start for turn in c.turns) == len(c)


def test_the_order_of_answers_changes_nothing() -> None:
    _, one = played(answers())
    _, two = played(answers(), reverse=True)
    assert [c.token_ids.tolist() for c in one] == [c.token_ids.tolist() for c in two]


def test_under_a_fixed_clock_turns_go_on_in_one_order_however_late_each_answer_comes() -> None:
    work = [Work(10, sample, PROMPTS[0], SPEC) for sample in range(3)]

    def settled(delays):
        """delays: at which poll each episode is answered."""
        pool, polls = Scripted(answers()), []

        def poll(seconds, mine):
            polls.append(seconds)
            late, pool.waiting = pool.waiting, []
            now = [call for call in late if delays[call.key[1]] <= len(polls)]
            pool.waiting = [call for call in late if call not in now]
            return [pool.answer(call) for call in now]

        pool.poll = poll
        episodes = Episodes(EnvironmentConfig(factory="guess"), pool, Bridge(build_tokenizer(), limit=9))
        assert episodes.take(work) == []
        moved = episodes.settle()
        assert episodes.acting == set()
        return [item.key for item in moved.ready]

    assert settled([1, 1, 1]) == settled([3, 2, 1]) == settled([1, 3, 2]) == [(10, 0), (10, 1), (10, 2)]


def test_siblings_have_seeds_of_their_own_and_the_history_is_passed_on() -> None:
    pool, _ = played(answers(), max_turns=2)
    seeds = {call.key: call.seed for call in pool.calls}
    assert len(set(seeds.values())) == 6
    for call in pool.calls:
        assert call.seed == seeds[call.key]
        if call.turn is not None:
            assert call.history[0] == ("", "")
            assert all(answer == "12" for _, answer in call.history[1:])


@pytest.mark.parametrize("when", ["reset", "step"])
def test_a_failure_ends_its_episode_with_the_stated_reward(when) -> None:
    def answer(call):
        if call.key == (10, 1) and (call.turn is None) == (when == "reset"):
            return Reply(call.key, failed="timeout", why="late")
        return answers(reward=1.0, done=True)(call)

    pool, found = played(answer, failure_reward=-1.0)
    bad = found[1]
    assert bad.finish_reason == "failed"
    assert bad.loss_mask.any()  # without a token of its policy it could not be trained on
    assert [turn.failed for turn in bad.turns] == (["timeout", ""] if when == "reset" else ["", "timeout"])
    episodes = Episodes(
        EnvironmentConfig(factory="guess", failure_reward=-1.0), pool, Bridge(build_tokenizer(), limit=9)
    )
    verdicts = episodes.judge([(i, PROMPTS[0], c) for i, c in enumerate(found)], None)
    assert verdicts[1] == Judged(-1.0, {})
    assert sum(v.reward for v in verdicts) == -1.0 + sum(t.reward for c in found for t in c.turns)


def test_what_diverges_begins_again_with_the_same_tokens() -> None:
    begun = []

    def answer(call):
        if call.key == (11, 0) and call.turn is not None and not begun:
            begun.append(call)
            return Reply(call.key, is_diverged=True, why="otherwise")
        return answers()(call)

    pool, found = played(answer, max_turns=2)
    _, plain = played(answers(), max_turns=2)
    assert [c.token_ids.tolist() for c in found] == [c.token_ids.tolist() for c in plain]
    resets = [call for call in pool.calls if call.key == (11, 0) and call.turn is None]
    assert len(resets) == 2
    assert pool.episodes.counts["begun_again"] == 1


def test_a_state_is_passed_on_to_the_turn_after_it_and_to_no_other() -> None:
    """What is begun again has the states of its new life alone, and here those have none."""
    begun = []

    def answer(call):
        if call.key == (11, 0) and len(call.history) == 2 and not begun:
            begun.append(call)
            return Reply(call.key, is_diverged=True)
        state = None if call.key == (11, 0) and begun else f"after {len(call.history)}"
        return replace(answers()(call), state=state)

    pool, _ = played(answer, max_turns=3)
    assert begun
    states = [(call.key, len(call.history), call.state) for call in pool.calls if call.turn is not None]
    assert {(n, state) for key, n, state in states if key != (11, 0)} >= {(1, "after 0"), (2, "after 1")}
    assert all(state == f"after {n - 1}" for key, n, state in states if key != (11, 0))
    diverged = [(n, state) for key, n, state in states if key == (11, 0)]
    assert diverged[:2] == [(1, "after 0"), (2, "after 1")]
    assert len(diverged) > 3
    assert {state for _, state in diverged[2:]} == {None}


def test_episodes_that_were_made_again_by_their_turns_are_counted() -> None:
    def answer(call):
        replayed = call.key in ((10, 0), (11, 2)) and len(call.history) == 1
        return replace(answers()(call), is_replayed=replayed)

    pool, _ = played(answer, max_turns=2)
    assert pool.episodes.counts["played_again"] == 2


def episodes_alone(answer, **knobs):
    pool = Scripted(answer)
    settings = EnvironmentConfig(factory="guess", **knobs)
    return Episodes(settings, pool, Bridge(build_tokenizer(), limit=9)), pool


def one_turn(item, ids=(5, 6)):
    """The completion after an engine's turn of these tokens."""
    n = len(ids)
    more = Completion(np.array(ids), np.ones(n, bool), np.full(n, -1.0), np.full(n, 3), "stop", "ab")
    return item.so_far.extend(more)


def test_an_engine_goes_on_with_what_the_environment_said_after_its_own_tokens() -> None:
    """It gets that without an end and a text, and with a limit for its turn, from a resumed run too."""
    episodes, _ = episodes_alone(answers(parts={"n": 1.5}), tokens_per_turn=4)
    assert episodes.take([Work(10, 0, PROMPTS[0], SPEC)]) == []
    (opened,) = episodes.settle().ready
    assert episodes.turned({opened.key: one_turn(opened)}) == {}
    (item,) = episodes.settle().ready
    assert (item.so_far.finish_reason, item.so_far.text) == ("", "")
    assert episodes.live == {item.key: item}
    assert item.so_far.turns[1].parts == {"n": 1.5}
    assert item.until == item.so_far.turns[-1].stop + 4
    later, _ = episodes_alone(answers(), tokens_per_turn=4)
    assert later.take([replace(item, until=None)]) == [item]


def test_episodes_that_end_while_all_are_waited_for_are_told() -> None:
    episodes, _ = episodes_alone(answers(done=True, reward=1.0))
    episodes.take([Work(10, sample, PROMPTS[0], SPEC) for sample in range(2)])
    episodes.turned({item.key: one_turn(item) for item in episodes.settle().ready})
    over = episodes.settle()
    assert (over.ready, sorted(over.finished)) == ([], [(10, 0), (10, 1)])


def test_episodes_alone_wait_for_their_environments_where_no_engine_has_work() -> None:
    """The environment ends each after its first turn. Slices last as long as the caller says."""
    waited, asked, given = [], [], []
    episodes, pool = episodes_alone(answers(done=True))
    poll = pool.poll
    pool.poll = lambda seconds, mine: waited.append(seconds) or poll(seconds, mine)

    def advance(ticks=None, seconds=None):
        asked.append((ticks, seconds))
        turns = {item.key: one_turn(item) for item in given}
        given.clear()
        return {"engine-0": Progress(3 * len(turns), 2, turns, Growth.of({}))}

    engines = SimpleNamespace(submit=given.extend, advance=advance)
    ((one, two),) = play(engines, episodes, PROMPTS[:1], replace(SPEC, n=2), [10], slice_s=0.5)
    assert (one.text, two.finish_reason) == ("ab", "stop")
    assert waited == [WAIT_S, 0.0]  # for resets, and once engines have ended the turns
    assert asked == [(None, 0.5)] * 2


def test_what_is_under_way_is_forgotten_and_an_evaluation_has_episodes_of_its_own() -> None:
    episodes, pool = episodes_alone(answers())
    episodes.take([Work(10, sample, PROMPTS[0], SPEC) for sample in range(2)])
    beside = episodes.beside()
    assert (beside.config, beside.pool, beside.bridge) == (episodes.config, pool, episodes.bridge)
    assert beside.live == {}
    episodes.forget()
    assert (episodes.live, episodes.acting, episodes.states) == ({}, set(), {})
    assert pool.ended == [(10, 0), (10, 1)]


def test_as_many_resets_in_a_row_without_room_are_the_environments_fault(monkeypatch, caplog) -> None:
    """Three are here, of six episodes; two and two with one between them are not."""
    monkeypatch.setattr("gspo_dist.trainer.episodes.FAILURES_IN_A_ROW", 3)

    def long_at(*places):
        keys = [(g, i) for g in (10, 11) for i in range(3)]
        too_long = [keys[place] for place in places]

        def answer(call):
            is_long = call.turn is None and call.key in too_long
            return Reply(call.key, Observation("1" * 60)) if is_long else answers(done=True)(call)

        return answer

    _, found = played(long_at(0, 1, 3, 4), limit=40, failure_reward=-0.5)
    assert [c.finish_reason == "failed" for c in found] == [True, True, False, True, True, False]
    assert sum("the episode counts as -0.5" in r.getMessage() for r in caplog.records) == 4
    with pytest.raises(ValueError, match="what the environment's reset says takes 40 tokens"):
        played(long_at(1, 2, 3), limit=40, failure_reward=-0.5)


def test_an_opening_that_fills_the_limit_without_a_word_is_everybodys() -> None:
    """A chat template's own tokens, say. No reset could leave room then."""
    episodes, _ = episodes_alone(answers(), failure_reward=0.0)
    episodes.bridge = SimpleNamespace(cut=lambda text: text, opening=lambda text: [1] * 4)
    for limit, is_refused in ((5, False), (4, True)):
        episodes.take([Work(limit, 0, PROMPTS[0], replace(SPEC, max_tokens=limit))])
        if is_refused:
            with pytest.raises(ValueError, match="takes 4 tokens"):
                episodes.settle()
        else:
            assert len(episodes.settle().ready) == 1


def test_what_a_reset_says_must_leave_room(monkeypatch) -> None:
    """One that does not costs its own episode, as a reset that raises does; where all are so, it is told."""

    def answer(call):
        is_long = call.turn is None and call.key == (10, 1)
        return Reply(call.key, Observation("1" * 60)) if is_long else answers(done=True, reward=1.0)(call)

    words = r"prompt 'a': what the environment's reset says takes 40 tokens.*max_completion_tokens = 40"
    _, found = played(answer, limit=40)
    _, plain = played(answers(done=True, reward=1.0), limit=40)
    assert found[1].finish_reason == "failed"
    assert found[1].turns[0] == Turn(0, 0, 0, failed="error")
    assert found[1].loss_mask.all()
    others = [i for i in range(6) if i != 1]
    assert [found[i].turns for i in others] == [plain[i].turns for i in others]
    with pytest.raises(ValueError, match=words):
        played(answer, limit=40, failure_reward=None)
    monkeypatch.setattr("gspo_dist.trainer.episodes.FAILURES_IN_A_ROW", 3)
    with pytest.raises(ValueError, match=r"prompt '[ab]': what the environment's reset says takes 40"):
        played(lambda call: Reply(call.key, Observation("1" * 60)), limit=40)


class Rewards:
    def __init__(self) -> None:
        self.asked = []

    def judge(self, items):
        self.asked += [item[0] for item in items]
        return [Judged(10.0 + item[0], {"right": 1.0}) for item in items]


def completion(turns, tokens=6, mask=(1, 1, 0, 1, 1, 1)):
    mask = np.array(mask, bool)
    versions = np.where(mask, 3, NO_VERSION)
    return Completion(
        np.arange(tokens), mask, np.where(mask, -1.0, 0.0), versions, "stop", "t", turns=tuple(turns)
    )


TWO = (Turn(0, 0, 0), Turn(0, 2, 3, "ab", "c", 0.5, {"n": 1.0}), Turn(3, 6, 6, "def", "", 0.25, {"n": 2.0}))


@pytest.mark.parametrize(
    ("pays", "reward", "parts"),
    [
        ("environment", 0.75, {"n": 3.0}),
        ("function", 17.0, {"right": 1.0, "n": 3.0}),
        ("sum", 17.75, {"right": 1.0, "n": 3.0, "environment": 0.75, "function": 17.0}),
    ],
)
def test_the_reward_is_by_one_rule(pays, reward, parts) -> None:
    rewards = Rewards()
    episodes = Episodes(EnvironmentConfig(factory="guess", reward=pays), None, None)
    failed = completion([TWO[0], Turn(0, 6, 6, failed="crash")])
    verdicts = episodes.judge([(7, PROMPTS[0], completion(TWO)), (8, PROMPTS[0], failed)], rewards)
    assert verdicts == [Judged(reward, parts), Judged(0.0, {})]
    assert rewards.asked == ([] if pays == "environment" else [7])
    items = [(7, PROMPTS[0], completion(TWO))]
    assert EpisodeJudge(episodes, rewards).judge(items) == [
        Judged(reward, parts)
    ]  # as a pool of rewards does


def test_without_a_rule_a_factory_pays_and_tools_do_not() -> None:
    assert EnvironmentConfig(factory="guess").pays == "environment"
    assert EnvironmentConfig(tools=("calculate",)).pays == "function"
    assert EnvironmentConfig(factory="guess", reward="sum").pays == "sum"
    assert (
        EnvironmentConfig(factory="guess").answer_role,
        EnvironmentConfig(tools=("x:y",)).answer_role,
    ) == (
        "user",
        "tool",
    )


def rollout(index, group, reward, turns):
    return Rollout(index, group, PROMPTS[0], completion(turns), reward)


def test_every_turn_has_the_advantage_of_what_is_paid_from_it_on() -> None:
    better = rollout(0, 0, 1.75, TWO)  # the reward function pays 1 more, for the last turn
    worse = rollout(1, 0, 0.0, [replace(turn, reward=0.0) for turn in TWO])
    assert turn_rewards(better).tolist() == [0.5, 1.25]
    chosen = ObjectiveConfig(name="grpo", advantage="group_mean", credit="turn")
    found = select([better, worse], chosen, "group_mean", max_tokens=9, mini_batches=1, replicas=1)
    given = found.given
    assert given[0].tolist() == [0.875, 0.875, 0.0, 0.625, 0.625, 0.625]
    assert given[1].tolist() == [-0.875, -0.875, 0.0, -0.625, -0.625, -0.625]
    assert found.advantages.tolist() == pytest.approx([0.725, -0.725])
    assert turn_rewards(better, 0.25).tolist() == [0.5, 1.0]
    plain = select(
        [better, worse],
        replace(chosen, credit="episode"),
        "group_mean",
        max_tokens=9,
        mini_batches=1,
        replicas=1,
    )
    assert plain.given == [0.875, -0.875]


def test_the_numbers_of_turns() -> None:
    failed = rollout(1, 0, 0.0, [TWO[0], Turn(0, 6, 6, failed="crash")])
    out = turn_metrics([rollout(0, 0, 1.0, TWO), failed])
    assert out == {
        "environment/turns_mean": 1.5,
        "environment/turns_max": 2.0,
        "environment/token_fraction": pytest.approx(2 / 12),
        "environment/out_of_turns_fraction": 0.0,
        "environment/failed_fraction": 0.5,
        "environment/timeout_fraction": 0.0,
        "environment/crash_fraction": 0.5,
        "environment/error_fraction": 0.0,
    }
    assert turn_metrics([Rollout(0, 0, PROMPTS[0], completion([]), 1.0)]) == {}
    rows = turn_rows(completion(TWO))["turns"]
    assert rows[1] == {"said": "ab", "answer": "c", "reward": 0.5, "tokens": 2, "versions": [3]}
    assert turn_rows(completion([])) == {}
