"""A publication is only trusted when it is checked: what arrived (version, checksums) and what is
computed (a probe).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gspo_dist.config import WeightSyncConfig
from gspo_dist.rollout.engine import SyncReceipt
from gspo_dist.trainer import publisher as module
from gspo_dist.trainer.publisher import PROBE_SEQUENCES, PROBE_TOKENS, WeightPublisher, probe_sequences
from gspo_dist.trainer.sharing import SharedGpus
from gspo_dist.types import Completion, Prompt
from gspo_dist.weights.send import SentReport
from gspo_dist.weights.tolerance import ProbeTolerance
from gspo_dist.weights.verify import WeightSyncError
from tests.unit.trainer.small import BookLearner, rollout

SENT = {"a.weight": 11, "b.weight": 22}


class Engines:
    """A rollout pool of two engines that answers as told and writes down who is asked what."""

    def __init__(self) -> None:
        self.engines = {"engine-0": object(), "engine-1": object()}
        self.receipts = {
            name: SyncReceipt(3, dict(SENT), tensors=2, bytes=8, seconds_checking=0.0)
            for name in self.engines
        }
        self.logprob = {"engine-0": -1.0, "engine-1": -1.0}
        self.asked: list[list[np.ndarray]] = []
        self.verbs: list[str] = []
        self.limits: list[tuple[float, ...]] = []

    def start_weight_update(self, timeout: float) -> None:
        self.limits.append((timeout,))
        self.verbs.append("start")

    def finish_weight_update(self, policy_version: int, timeout: float) -> dict[str, SyncReceipt]:
        self.limits.append((policy_version, timeout))
        self.verbs.append("finish")
        return self.receipts

    def logprobs_of(self, sequences, timeout: float) -> dict[str, list[np.ndarray]]:
        self.limits.append((timeout,))
        self.verbs.append("logprobs_of")
        self.asked.append(list(sequences))
        return {
            name: [np.full(len(s) - 1, value, np.float32) for s in sequences]
            for name, value in self.logprob.items()
        }

    def wake_up(self, weights_only: bool = False) -> None:
        self.verbs.append("wake_up weights" if weights_only else "wake_up")


class Sender(BookLearner):
    """A learner that sends two tensors of 2 GiB together."""

    def __init__(self, pool: Engines, logprob=-1.0) -> None:
        super().__init__(logprob)
        self.pool = pool
        self.seconds_checking = 0.0

    def send_weights(self, sync: WeightSyncConfig, engines) -> SentReport:
        assert engines is self.pool.engines
        self.pool.verbs.append("send")
        return SentReport(dict(SENT), tensors=2, bytes=2 << 30, seconds_checking=self.seconds_checking)

    def sleep(self, *, keep_weights: bool = False) -> None:
        self.pool.verbs.append("learner keeps weights" if keep_weights else "learner sleeps")


def make(
    pool: Engines,
    *,
    colocated: bool = False,
    max_model_len: int = 4096,
    logprob=-1.0,
    tolerance: ProbeTolerance | None = None,
    begins_equal: bool = False,
    **knobs,
):
    fixed = knobs.pop("probe_tolerance", 0.01)
    sync = WeightSyncConfig(**({"transport": "shm"} | knobs))
    sender = Sender(pool, logprob)
    return WeightPublisher(
        sync,
        sender,
        pool,
        replicas=1,
        token_budget=4096,
        max_model_len=max_model_len,
        tolerance=tolerance or ProbeTolerance("fp32", fixed),
        begins_equal=begins_equal,
        shared=SharedGpus(sender, pool, colocated=True) if colocated else None,
    )


def probe(count: int = 4, tokens: int = 3):
    return probe_sequences(
        [(r.prompt, r.completion) for r in (rollout(i, tokens=[5] * tokens) for i in range(count))]
    )


def test_a_good_publication_in_order():
    pool = Engines()
    publisher = make(pool, timeout_s=77.0)
    out = publisher.publish(probe())
    assert pool.verbs == ["start", "send", "finish", "logprobs_of"]
    assert pool.limits == [(77.0,), (3, 77.0), (77.0,)]  # each of them, and the version that was sent
    assert out["sync/bytes"] == 2.0 * 2**30
    assert out["sync/probe_mean_abs"] == out["sync/probe_max_abs"] == 0.0
    parts = out["time/sync/start_s"] + out["time/sync/send_s"] + out["time/sync/finish_s"]
    assert out["sync/gib_per_s"] == pytest.approx(2.0 / parts, rel=1e-9)
    assert publisher.published == 1


def test_a_publication_begins_again_where_an_engine_died_in_it_and_nowhere_else(caplog):
    """Twice; a third death, or a failure without a death, is the run's end."""
    pool = Engines()
    publisher = make(pool)
    deaths, send = [True, True], publisher.learner.send_weights

    def dies(sync, engines):
        report = send(sync, engines)
        if deaths:
            raise RuntimeError("engine-1 died: in a bucket")
        return report

    def abandon_update():
        pool.verbs.append("abandon")
        return deaths.pop() if deaths else False

    publisher.learner.send_weights, pool.abandon_update = dies, abandon_update
    publisher.publish(probe())
    again = ["start", "send", "abandon"]
    assert pool.verbs == [*again, *again, "start", "send", "finish", "logprobs_of"]
    said = "publication of version 3 begins again, an engine died: engine-1 died: in a bucket"
    assert [r.getMessage() for r in caplog.records] == [said] * 2
    for left, verbs in ([True] * 3, [*again, *again, "start", "send"]), ([False], again):
        deaths[:] = left
        pool.verbs.clear()
        with pytest.raises(RuntimeError, match="engine-1 died"):
            publisher.publish(probe())
        assert pool.verbs == verbs


def test_where_rollouts_are_begun_ahead_every_publication_is_probed():
    pool = Engines()
    publisher = make(pool, probe_every=10)
    publisher.probe_always = True
    for _ in range(3):
        publisher.publish(probe())
        assert publisher.probed_offset is not None
    only_once = make(Engines(), probe_every=0)  # who asked for no probes gets none
    only_once.probe_always = True
    only_once.publish(probe())
    only_once.publish(probe())
    assert only_once.probed_offset is None


def test_the_probe_measures_the_offset_of_learner_and_engines_at_the_same_weights():
    """Learner -1.002; engine 0 says -1, engine 1 says -1.004: +-.002 on four sequences of each, mean 0."""
    pool = Engines()
    pool.logprob |= {"engine-1": -1.004}
    publisher = make(pool, logprob=-1.002, probe_every=2)
    publisher.publish(probe())
    assert publisher.probed_offset.offset == pytest.approx(0.0, abs=1e-6)
    assert publisher.probed_offset.spread == pytest.approx(0.002 * (8 / 7) ** 0.5, rel=1e-3)
    assert publisher.probed_offset.sequences == 8
    pool.logprob = dict.fromkeys(pool.logprob, -1.0)
    publisher.publish(probe())  # not due: the old probe says nothing of these weights
    assert publisher.probed_offset is None
    publisher.publish(probe())
    assert publisher.probed_offset.offset == pytest.approx(-0.002, rel=1e-3)


@pytest.mark.parametrize(
    ("receipt", "message"),
    [
        ({"checksums": {"a.weight": 11, "b.weight": 23}}, "engine-1 received other bytes for b.weight"),
        ({"checksums": {"a.weight": 11}}, "engine-1 did not receive b.weight"),
        ({"checksums": {**SENT, "c.weight": 1}}, "engine-1 received c.weight, which was not sent"),
        ({"policy_version": 2}, "engine-1 reports policy version 2 after a sync of version 3"),
    ],
)
def test_what_arrived_wrong_at_one_engine_stops_the_run_by_name(receipt, message):
    pool = Engines()
    pool.receipts["engine-1"] = replace(pool.receipts["engine-1"], **receipt)
    publisher = make(pool)
    with pytest.raises(WeightSyncError, match=message):
        publisher.publish(probe())
    assert publisher.published == 0


def test_unchecked_receipts_are_the_users_choice():
    pool = Engines()
    pool.receipts["engine-1"] = replace(pool.receipts["engine-1"], policy_version=2)
    assert make(pool, check=False).publish(probe())["sync/bytes"] > 0


def test_the_probe_catches_an_engine_that_computes_another_policy_than_it_received():
    pool = Engines()
    pool.logprob["engine-1"] = -1.5
    with pytest.raises(WeightSyncError, match=r"engine-1 and learner disagree .* 0\.5 nats"):
        make(pool).publish(probe())


def test_a_disagreement_is_told_by_its_mean_and_its_largest():
    """Engine and learner differ by 0, 0.5 and 1 nats on the three tokens of each completion."""
    pool = Engines()

    def learner(batch):
        return -1.0 - batch.position_ids.double().sub(2).clamp(min=0) / 2

    with pytest.raises(WeightSyncError, match=r"log-probs 0\.5 nats \(max 1\), and at most 0\.01"):
        make(pool, logprob=learner).publish(probe(tokens=3))


def test_the_worst_engine_is_reported():
    pool = Engines()
    pool.logprob = {"engine-0": -1.25, "engine-1": -1.125}
    out = make(pool, probe_tolerance=0.3).publish(probe())
    assert out["sync/probe_mean_abs"] == out["sync/probe_max_abs"] == 0.25


def test_only_completions_are_compared_and_each_token_with_itself():
    """The learner's log-prob of token t is -t / 16; an engine's entry i speaks of token i + 1."""

    def learner(batch):
        return -batch.token_ids.double() / 16

    class Same(Engines):
        def logprobs_of(self, sequences, timeout):
            # prompt tokens are given a wild value: they must not count
            return {
                name: [np.where(np.arange(1, len(s)) < 2, 99.0, -s[1:] / 16) for s in sequences]
                for name in self.engines
            }

    out = make(Same(), logprob=learner).publish(
        probe_sequences(
            [(r.prompt, r.completion) for r in (rollout(i, tokens=[7, 8, 9 + i]) for i in range(3))]
        )
    )
    assert out["sync/probe_max_abs"] == 0.0


@pytest.mark.parametrize(("every", "due"), [(0, [0]), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_the_first_publication_is_probed_and_then_every_nth(every, due):
    pool = Engines()
    publisher = make(pool, probe_every=every)
    probed = [i for i in range(5) if "sync/probe_mean_abs" in publisher.publish(probe())]
    assert probed == due


def test_a_resumed_process_probes_its_first_publication_whatever_the_schedule():
    pool = Engines()
    publisher = make(pool, probe_every=4)
    publisher.published = 6
    assert "sync/probe_mean_abs" in publisher.publish(probe())
    assert "sync/probe_mean_abs" not in publisher.publish(probe())  # publication 7
    assert "sync/probe_mean_abs" in publisher.publish(probe())  # publication 8


def test_a_probe_is_cut_to_what_an_engine_can_answer():
    """Two prompt tokens; an engine samples one token more, so a sequence may fill the context but one."""
    pool = Engines()
    make(pool, max_model_len=6).publish(probe(count=9, tokens=9))
    assert [len(s) for s in pool.asked[0]] == [5] * PROBE_SEQUENCES
    pool = Engines()
    make(pool, max_model_len=4096).publish(probe(count=1, tokens=PROBE_TOKENS + 7))
    assert [len(s) for s in pool.asked[0]] == [2 + PROBE_TOKENS]


def test_completions_without_a_token_are_left_out_of_a_probe():
    pool = Engines()
    empty = (np.array([1, 2]), 2)
    out = make(pool).publish([empty, *probe(count=1)])
    assert [len(s) for s in pool.asked[0]] == [5]
    assert out["sync/probe_max_abs"] == 0.0
    pool = Engines()
    assert "sync/probe_mean_abs" not in make(pool).publish([empty])
    assert pool.asked == []


def test_colocated_engines_wake_after_the_learners_probe_and_before_their_own():
    pool = Engines()

    def learner(batch):
        pool.verbs.append("learner")
        return torch.full((batch.num_tokens,), -1.0)

    make(pool, colocated=True, logprob=learner).publish(probe())
    taken = ["learner keeps weights", "wake_up weights", "start", "send", "finish"]
    assert pool.verbs == [*taken, "learner", "learner sleeps", "wake_up", "logprobs_of"]
    pool.verbs.clear()
    make(pool, colocated=True, probe_every=0).publish([])
    assert pool.verbs == [*taken, "learner sleeps", "wake_up"]


def test_the_cost_of_checking_is_the_senders_and_the_slowest_engines(monkeypatch):
    """A clock that moves a second per look: 3 s for the publication, of which 0.5 + 0.25 s were checking."""
    ticks = iter(range(100, 200))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    pool = Engines()
    for name, seconds in (("engine-0", 0.125), ("engine-1", 0.25)):
        pool.receipts[name] = replace(pool.receipts[name], seconds_checking=seconds)
    publisher = make(pool)
    publisher.learner.seconds_checking = 0.5
    out = publisher.publish([])
    assert out["sync/check_fraction"] == 0.75 / 3
    assert out["sync/gib_per_s"] == 2.0 / 3
    assert [out[f"time/sync/{part}_s"] for part in ("start", "send", "finish")] == [1.0, 1.0, 1.0]


def test_a_completion_without_a_prompt_is_compared_from_its_second_token():
    pool = Engines()
    bare = (np.array([5, 6]), 0)
    assert make(pool).publish([bare])["sync/probe_max_abs"] == 0.0
    assert [len(s) for s in pool.asked[0]] == [2]


def test_engines_with_gpus_of_their_own_are_not_woken():
    """As they are, unless a run says that they are colocated. Nor is version 0 taken for what they loaded."""
    pool = Engines()
    sync = WeightSyncConfig(transport="shm", probe_tolerance=0.01)
    publisher = WeightPublisher(
        sync,
        Sender(pool),
        pool,
        replicas=1,
        token_budget=4096,
        max_model_len=4096,
        tolerance=ProbeTolerance("fp32", 0.01),
    )
    publisher.learner.policy_version = 0
    pool.receipts = {n: replace(r, policy_version=0) for n, r in pool.receipts.items()}
    publisher.publish(probe())
    assert pool.verbs == ["start", "send", "finish", "logprobs_of"]


class Moving(Engines):
    """Engine 1 says something else from its `at`-th answer on."""

    def __init__(self, at: int, logprob: float) -> None:
        super().__init__()
        self.at, self.later = at, logprob

    def logprobs_of(self, sequences, timeout):
        if len(self.asked) == self.at:
            self.logprob["engine-1"] = self.later
        return super().logprobs_of(sequences, timeout)


def first(pool: Engines, *, version: int = 0, **knobs):
    publisher = make(pool, tolerance=ProbeTolerance("bf16", None), begins_equal=True, **knobs)
    publisher.learner.policy_version = version
    pool.receipts = {n: replace(r, policy_version=version) for n, r in pool.receipts.items()}
    return publisher


def test_the_first_publication_of_a_new_run_must_change_nothing():
    """0.001 nats are a twentieth of a healthy mismatch in bf16, and no sync may make them."""
    pool = Moving(at=2, logprob=-1.001)
    with pytest.raises(
        WeightSyncError, match=r"engine-1 computes another policy after a sync of the very wei"
    ):
        first(pool).publish(probe())
    assert pool.verbs == ["logprobs_of", "logprobs_of", "start", "send", "finish", "logprobs_of"]


def test_what_the_engines_said_before_any_sync_is_the_runs_own_mismatch():
    pool = Engines()
    pool.logprob = {"engine-0": -1.01, "engine-1": -1.125}
    publisher = first(pool)
    out = publisher.publish(probe())
    assert publisher.tolerance.means == [0.125, 0.125]
    assert (out["sync/probe_mean_abs"], out["sync/probe_stops_above"]) == (0.125, 1.0)
    pool.logprob["engine-0"] = -2.25  # ten times
    publisher.probed = False
    with pytest.raises(
        WeightSyncError, match=r"engine-0 .* 1\.25 nats .* at most 1 can be mismatch, which was 0\.1"
    ):
        publisher.publish(probe())


@pytest.mark.parametrize(("after", "changes"), [(-1.004, False), (-0.9872, True)])
def test_an_engine_that_does_not_repeat_itself_is_measured_from_its_first_answer(after, changes):
    """It says -1 and then -1.004. So the identity may be off by 1e-4 + 3 * 0.004 from -1, not from -1.004."""
    pool = Engines()
    said = iter([-1.0, -1.004, after])
    ask = pool.logprobs_of

    def logprobs_of(sequences, timeout):
        pool.logprob = dict.fromkeys(pool.logprob, next(said))
        return ask(sequences, timeout)

    pool.logprobs_of = logprobs_of
    publisher = first(pool, logprob=-1.01)
    if changes:
        with pytest.raises(WeightSyncError, match=r"0\.0128 nats .* repeats itself to 0\.004"):
            publisher.publish(probe())
    else:
        publisher.publish(probe())
        assert publisher.tolerance.means == pytest.approx([0.01, 0.006], rel=1e-4)


@pytest.mark.parametrize(("begins_equal", "version"), [(False, 0), (True, 4)])
def test_a_publication_of_other_weights_may_change_what_they_say(begins_equal, version):
    pool = Moving(at=0, logprob=-1.25)
    publisher = first(pool, version=version)
    publisher.begins_equal = begins_equal
    assert publisher.publish(probe())["sync/probe_mean_abs"] == 0.25
    assert pool.verbs[0] == "start"


def test_only_the_first_publication_is_asked_to_change_nothing():
    pool = Engines()
    publisher = first(pool, probe_every=1)
    publisher.publish(probe())
    pool.verbs.clear()
    publisher.publish(probe())
    assert pool.verbs == ["start", "send", "finish", "logprobs_of"]


def test_a_probe_of_an_episode_is_of_what_the_policy_said_first():
    """What an environment said has log-probs as low as a prompt's."""

    def probe(*mask):
        mask = np.array(mask, bool)
        n = len(mask)
        c = Completion(np.arange(10, 10 + n), mask, np.zeros(n), np.zeros(n), "stop", "")
        [(tokens, start)] = probe_sequences([(Prompt("p", (1, 2), ""), c)])
        return tokens.tolist(), start

    assert probe(0, 0, 1, 1, 0, 1) == ([1, 2, 10, 11, 12, 13], 4)
    assert probe(1, 1, 0) == ([1, 2, 10, 11], 2)
    assert probe(1, 1, 1) == ([1, 2, 10, 11, 12], 2)
    assert probe(0, 0) == ([1, 2], 2)  # of one that never spoke nothing is compared
