"""Laws of judging in processes: the parent holds the clock, and no reward can take the run with it."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gspo_dist.candidates import Candidates
from gspo_dist.config import RewardConfig
from gspo_dist.rewards.pool import CHUNK, DEATHS_IN_A_ROW, LocalRewardPool, Worker
from gspo_dist.rewards.reward import Judged, RewardError
from gspo_dist.routing.trace import RoutingTrace

# Each text says what the reward does with it.
BEHAVIOUR = """
import os, signal, subprocess, sys, time

def judge(prompt, completion, *, folder=None):
    text = completion.text
    if text.startswith("hang"):
        signal.signal(signal.SIGALRM, signal.SIG_IGN)   # an alarm of the pool's own would be lost
        signal.alarm(0)
        if folder:
            child = subprocess.Popen(["sleep", "60"])
            open(folder + "/child", "w").write(str(child.pid))
        while True:
            time.sleep(1)
    if text == "alarm":
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("mine")))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(5)
        except TimeoutError:
            return 0.75
    if text.startswith("die"):
        os._exit(int(text[3:] or 3))
    if text == "signal":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "exit":
        exit("enough")
    if text == "raise":
        raise KeyError("gold")
    if text == "print":
        print("some words", flush=True)
    return float(text) if text.replace(".", "").isdigit() else 1.0, {"pid": os.getpid()}
"""


@pytest.fixture
def pool_of(reward_file):
    made = []

    def make(**knobs):
        options = {"function": f"{reward_file(BEHAVIOUR)}:judge", "timeout_s": 30.0} | knobs
        made.append(LocalRewardPool(RewardConfig(**options)))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def rewards(verdicts) -> list[float]:
    return [verdict.reward for verdict in verdicts]


def parts(verdicts) -> list[dict[str, float]]:
    return [{k: v for k, v in verdict.parts.items() if k != "pid"} for verdict in verdicts]


def test_verdicts_come_in_order_whoever_judged(pool_of, items_of):
    """Three workers, and more items than one message to each holds."""
    texts = [str(i) for i in range(3 * CHUNK * 2 + 5)]
    pool = pool_of(workers=3)
    pool.start()
    for _ in range(2):
        verdicts = pool.judge(items_of(*texts))
        assert rewards(verdicts) == [float(text) for text in texts]
    processes = {verdict.parts["pid"] for verdict in verdicts}
    assert len(processes) == 3
    assert os.getpid() not in processes


def test_few_slow_rewards_are_spread_over_the_workers(pool_of, items_of):
    pool = pool_of(workers=2)
    pool.start()
    assert len({verdict.parts["pid"] for verdict in pool.judge(items_of("1", "2", "3", "4"))}) == 2


def test_no_items_are_no_verdicts(pool_of):
    assert pool_of().judge([]) == []


@pytest.mark.slow
def test_a_reward_that_hangs_and_takes_alarms_away_is_cut_at_the_deadline(pool_of, items_of, caplog):
    pool = pool_of(timeout_s=0.5, timeout_reward=-1.0)
    pool.start()
    began = time.monotonic()
    verdicts = pool.judge(items_of("1", "hang", "2", "3"))
    assert 0.5 <= time.monotonic() - began < 10
    assert rewards(verdicts) == [1.0, -1.0, 2.0, 3.0]
    assert parts(verdicts) == [{}, {"timeout": 1.0}, {}, {}]
    said = "reward of rollout 11 (prompt p1) took more than reward.timeout_s = 0.5 s: it counts as -1"
    assert [record.getMessage() for record in caplog.records] == [said]


@pytest.mark.slow
def test_the_deadline_is_for_each_rollout_and_not_for_a_message(pool_of, items_of, reward_file):
    slow = reward_file("import time\ndef f(p, c):\n    time.sleep(0.3)\n    return 1.0\n", "slow.py")
    pool = pool_of(function=f"{slow}:f", timeout_s=1.0)
    assert rewards(pool.judge(items_of(*"abcdefgh"))) == [1.0] * 8  # 2.4 s in all


@pytest.mark.slow
def test_what_a_late_reward_has_started_ends_with_it(pool_of, items_of, tmp_path):
    pool = pool_of(timeout_s=0.5, options={"folder": str(tmp_path)})
    pool.judge(items_of("hang"))
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not is_running(child):
            return
        time.sleep(0.05)
    pytest.fail("a process of the reward outlived it")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_reward_may_use_alarms_of_its_own(pool_of, items_of):
    assert pool_of().judge(items_of("alarm"))[0] == Judged(0.75, {})


@pytest.mark.slow
def test_math_verify_with_its_own_alarms_neither_fails_nor_takes_the_deadline_away(
    pool_of, items_of, reward_file
):
    """Its `parse` sets SIGALRM and cancels whatever alarm there was: the deadline must not be one."""
    body = """
from math_verify import parse, verify

def f(prompt, completion):
    right = float(verify(parse(prompt.answer), parse(completion.text)))
    while completion.text == "hang":
        pass
    return right
"""
    pool = pool_of(function=f"{reward_file(body, 'verify.py')}:f", timeout_s=5.0)
    assert rewards(pool.judge(items_of("3", "4", "hang", "3.0"))) == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "how"), [("die", "exit status 3"), ("die0", "exit status 0"), ("signal", "signal SIGSEGV")]
)
def test_a_process_that_ends_costs_its_rollout_only(pool_of, items_of, caplog, text, how):
    verdicts = pool_of(timeout_reward=-0.5).judge(items_of("1", text, "2"))
    assert rewards(verdicts) == [1.0, -0.5, 2.0]
    assert parts(verdicts) == [{}, {"crash": 1.0}, {}]
    said = f"reward of rollout 11 (prompt p1) ended its process ({how}): "
    told = [record.getMessage() for record in caplog.records]
    assert told == [said + "it is judged again", said + "it counts as -0.5"]


def test_a_rollout_whose_process_was_killed_is_judged_again(pool_of, items_of, tmp_path):
    """Killed from outside in the middle of it, once: the rollout keeps its own reward."""
    mark = tmp_path / "killed"
    body = f"""
import os, pathlib, signal

def judge(prompt, completion):
    mark = pathlib.Path({str(mark)!r})
    if completion.text == "2" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return float(completion.text)
"""
    pool = pool_of(function=f"{reward_file_of(tmp_path, body)}:judge")
    verdicts = pool.judge(items_of("1", "2", "3"))
    assert mark.exists()
    assert rewards(verdicts) == [1.0, 2.0, 3.0]
    assert parts(verdicts) == [{}, {}, {}]
    [event] = pool.take_events()
    assert (event.kind, event.what) == ("reward_death", "signal SIGKILL")
    assert pool.take_events() == []


def reward_file_of(folder, body):
    path = folder / "killed_once.py"
    path.write_text(body)
    return path


def test_a_process_that_is_killed_while_it_starts_is_replaced(pool_of, items_of):
    """Only the first import of all may say that the reward cannot be imported."""
    pool = pool_of()
    pool.start()
    pool.workers[0].end()
    pool.workers[0] = Worker(pool.config)
    pool.workers[0].process.kill()
    assert rewards(pool.judge(items_of("4"))) == [4.0]


def test_what_a_dead_worker_had_not_begun_is_judged_all_the_same(pool_of, items_of):
    """Eight items for one worker are messages of four, two, one and one."""
    verdicts = pool_of().judge(items_of("1", "die", "3", "4", "5", "6", "7", "8"))
    assert rewards(verdicts) == [1.0, 0.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


@pytest.mark.slow
def test_without_a_stated_reward_the_run_stops(pool_of, items_of):
    pool = pool_of(timeout_s=0.5, timeout_reward=None)
    with pytest.raises(
        RewardError, match=r"rollout 10 \(prompt p0\) took more than reward.timeout_s = 0.5 s;"
    ):
        pool.judge(items_of("hang"))
    with pytest.raises(RewardError, match=r"rollout 11 \(prompt p1\) ended its process \(exit status 3\);"):
        pool.judge(items_of("1", "die"))


@pytest.mark.slow
def test_deaths_in_a_row_stop_the_run(pool_of, items_of):
    pool = pool_of()
    some = ["die"] * (DEATHS_IN_A_ROW - 1)
    assert rewards(pool.judge(items_of(*some, "1", *some))) == [0.0] * 4 + [1.0] + [0.0] * 4
    # The reward for such rollouts is stated already, so that is not the way out.
    with pytest.raises(RewardError, match=r"the 5th in a row; bound its work, raise an exception.* process$"):
        pool.judge(items_of("die"))


def test_exit_and_exceptions_stop_the_run_and_name_the_rollout(pool_of, items_of):
    pool = pool_of()
    with pytest.raises(RewardError, match=r"reward of rollout 10 \(prompt p0\) called exit\('enough'\)"):
        pool.judge(items_of("exit", "1", "2"))
    with pytest.raises(RewardError, match=r"rollout 11 \(prompt p1\) raised KeyError: 'gold'") as caught:
        pool.judge(items_of("1", "raise"))
    assert 'raise KeyError("gold")' in caught.value.__notes__[0]


def test_an_answer_to_a_call_that_failed_is_no_answer_to_the_next(pool_of, items_of):
    pool = pool_of(workers=2)
    with pytest.raises(RewardError):
        pool.judge(items_of("raise", *map(str, range(20))))
    assert rewards(pool.judge(items_of("7", "8", "9"))) == [7.0, 8.0, 9.0]


def test_a_worker_that_dies_while_it_waits_is_replaced_and_told(pool_of, items_of, caplog):
    pool = pool_of()
    (verdict,) = pool.judge(items_of("1"))
    os.kill(int(verdict.parts["pid"]), 9)
    assert pool.workers[0].connection.poll(10)  # its end of the connection is closed
    assert pool.judge(items_of("2"))[0].reward == 2.0
    assert "ended (signal SIGKILL) while it had nothing to judge: another one starts" in caplog.text


def test_a_worker_that_dies_right_after_its_last_verdict_costs_no_rollout(
    pool_of, items_of, monkeypatch, caplog
):
    """Its end is heard together with the verdict, when it owes no answer."""
    heard = Worker.answers

    def answers(worker):
        for answer in heard(worker):
            yield answer
            if answer is not None and answer.kind == "judged" and not worker.places:
                worker.process.kill()
                os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(Worker, "answers", answers)
    pool = pool_of()
    verdicts = pool.judge(items_of("1", "2")) + pool.judge(items_of("3"))
    assert rewards(verdicts) == [1.0, 2.0, 3.0]
    assert parts(verdicts) == [{}, {}, {}]
    assert "while it had nothing to judge" in caplog.text


def test_what_a_reward_prints_is_a_log_line_and_no_output(pool_of, items_of, capfd):
    assert rewards(pool_of().judge(items_of("print", "2"))) == [1.0, 2.0]
    output, errors = capfd.readouterr()
    assert (output, errors) == ("", "some words\n")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import no_such_package\ndef judge(p, c): return 1", "raised ModuleNotFoundError"),
        ("import os\nos._exit(9)", r"ended \(exit status 9\) while it imported it"),
        ("exit(1)", "raised SystemExit: 1"),
        ("LIMIT = 1\ndef other(p, c): return 1", r"has no 'judge'; known: other$"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_told_at_the_start(pool_of, reward_file, body, message):
    pool = pool_of(function=f"{reward_file(body, 'bad.py')}:judge")
    with pytest.raises(ValueError, match=message):
        pool.start()


@pytest.mark.slow
def test_an_import_that_hangs_is_told_at_the_start(pool_of, reward_file, monkeypatch):
    monkeypatch.setattr("gspo_dist.rewards.pool.START_TIMEOUT_S", 1.0)
    pool = pool_of(function=f"{reward_file('import time; time.sleep(60)', 'bad.py')}:judge")
    with pytest.raises(ValueError, match="must import it within 1 s"):
        pool.start()


def test_a_relative_path_is_found_from_where_the_pool_was_made(reward_file, items_of, monkeypatch, tmp_path):
    reward_file(BEHAVIOUR)
    monkeypatch.chdir(tmp_path)
    pool = LocalRewardPool(RewardConfig(function="reward.py:judge"))
    monkeypatch.chdir("/")
    try:
        assert rewards(pool.judge(items_of("5", "die", "6"))) == [5.0, 0.0, 6.0]
    finally:
        pool.close()


def test_a_reward_has_no_keyboard(pool_of, items_of, reward_file):
    """What the trainer's own input holds is not for it."""
    reader = reward_file("import sys\ndef f(p, c):\n    return len(sys.stdin.read(1))\n", "reader.py")
    ours, (theirs, end) = os.dup(0), os.pipe()
    try:
        os.write(end, b"yes")
        os.dup2(theirs, 0)
        assert [v.reward for v in pool_of(function=f"{reader}:f").judge(items_of("a"))] == [0.0]
    finally:
        os.dup2(ours, 0)
        for descriptor in (ours, theirs, end):
            os.close(descriptor)


def test_no_reward_sees_expert_choices_or_candidates(pool_of, items_of, reward_file):
    ask = reward_file(
        "def f(p, c):\n    return float(c.routing is None and c.candidates is None)\n", "ask.py"
    )
    ((rollout_id, prompt, answer),) = items_of("abc")
    traced = replace(answer, routing=RoutingTrace(np.zeros((5, 1, 2), np.uint8), np.ones(5, bool), 8))
    weighed = replace(answer, candidates=Candidates.none(len(answer), 3))
    pool = pool_of(function=f"{ask}:f")
    for full in (traced, weighed):
        assert rewards(pool.judge([(rollout_id, prompt, full)])) == [1.0]
    assert traced.routing is not None


def test_closing_ends_the_processes(pool_of, items_of):
    pool = pool_of(workers=2)
    pids = {int(verdict.parts["pid"]) for verdict in pool.judge(items_of(*map(str, range(10))))}
    pool.close()
    pool.close()
    assert not any(is_running(pid) for pid in pids)
