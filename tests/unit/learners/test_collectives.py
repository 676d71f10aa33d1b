"""Limits of collectives, call by call, and the words for one that took longer."""

from __future__ import annotations

import os
import pickle

import pytest

from gspo_dist.failures import CollectiveTimeout, ProcessTimeout
from gspo_dist.learners import collectives
from gspo_dist.learners.collectives import Watch, dumps, record_in, stuck_at, told

GLOO = "[unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete"
NCCL = "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)"


def entry(number: int, **more: object) -> dict:
    frames = [
        {"filename": "/v/torch/distributed/distributed_c10d.py", "line": 9, "name": "all_reduce"},
        {"filename": "/v/gspo_dist/learners/learner.py", "line": 205, "name": "_same_count"},
        {"filename": "/v/gspo_dist/actors/learner_group.py", "line": 60, "name": "logprobs"},
    ]
    return {
        "record_id": number,
        "profiling_name": "gloo:all_reduce",
        "input_sizes": [[2]],
        "is_p2p": False,
        "collective_seq_id": 12,
        "p2p_seq_id": 0,
        "process_group": ("0", "default_pg"),
        "frames": frames,
    } | more


@pytest.fixture
def limits(monkeypatch) -> list[float]:
    given: list[float] = []
    monkeypatch.setattr(collectives, "set_timeout", given.append)
    return given


def test_calls_that_compute_have_the_short_limit_from_their_second_time_on(limits, tmp_path):
    watch = Watch("learner-0", tmp_path, 10.0, 90.0)
    for call in ("logprobs", "logprobs", "optim_step", "optim_step"):
        with watch.computing(call):
            pass
    with watch.waiting():
        pass
    with watch.waiting(200.0):
        pass
    with watch.waiting(5.0):
        pass
    assert limits == [90.0, 10.0, 90.0, 10.0, 90.0, 200.0, 90.0]


def test_a_first_time_that_fails_was_none(limits, tmp_path):
    watch = Watch("learner-0", tmp_path, 10.0, 90.0)
    with pytest.raises(ValueError, match="torn"), watch.computing("logprobs"):
        raise ValueError("torn")
    with watch.computing("logprobs"):
        pass
    assert limits == [90.0, 90.0]


@pytest.mark.parametrize("said", [GLOO, NCCL])
def test_a_timeout_is_told_with_the_knob_and_every_other_error_stays(limits, tmp_path, said):
    watch = Watch("learner-3", tmp_path, 10.0, 90.0)
    with pytest.raises(RuntimeError, match=r"^other$") as other, watch.computing("logprobs"):
        raise RuntimeError("other")
    assert not isinstance(other.value, CollectiveTimeout)
    with watch.computing("logprobs"):
        pass
    with pytest.raises(ProcessTimeout) as caught, watch.computing("logprobs"):
        raise RuntimeError(said)
    # No process group was made here, so there is nothing to dump, which hides nothing.
    assert (
        str(caught.value) == f"learner-3 waited 10 s (learner.collective_timeout_s) in a collective: {said}"
    )
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # it travels to the driver


def test_the_last_collective_in_words():
    trace = {"entries": [entry(8), entry(7, profiling_name="gloo:barrier", frames=[])]}
    assert told(trace) == (
        "gloo:all_reduce of [[2]], number 12 of group default_pg, called at learner.py:205 (_same_count)"
    )
    lone = entry(9, is_p2p=True, p2p_seq_id=3, process_group=("5", "undefined"), profiling_name="gloo:send")
    assert told({"entries": [entry(8), lone | {"frames": []}]}) == "gloo:send of [[2]], number 3 of group 5"


def test_torch_dumps_below_the_logs_unless_the_user_says_where(monkeypatch, tmp_path):
    names = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    record_in(tmp_path / "a")
    assert [os.environ.get(name) for name in names] == [str(tmp_path / "a" / "rank_"), None, "1"]
    monkeypatch.delenv(names[0])
    monkeypatch.setenv(names[1], "/mine_")
    monkeypatch.setenv(names[2], "0")
    record_in(tmp_path / "b")
    assert [os.environ.get(name) for name in names] == [None, "/mine_", "0"]


def test_dumps_are_those_of_this_time_by_rank(tmp_path):
    folder = tmp_path / "flight_recorder"
    assert dumps(tmp_path, 0.0) == []
    folder.mkdir()
    for name, written in (("rank_10", 50), ("rank_2", 50), ("rank_0", 49), ("rank_x", 60), ("other_1", 60)):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (written, written))
    assert dumps(tmp_path, 50.0) == [folder / "rank_2", folder / "rank_10"]


def test_a_stuck_rank_is_at_the_innermost_lines_of_its_main_thread():
    log = """
    Timeout (0:10:00)!
    Thread 0x00007f01 (most recent call first):
      File "threading.py", line 9 in wait

    Thread 0x00007f02 (most recent call first):
      File "old.py", line 1 in old
    said later
    Timeout (0:10:00)!
    Thread 0x00007f01 (most recent call first):
      File "threading.py", line 9 in wait

    Current thread 0x00007f02 (most recent call first):
      File "learner.py", line 7 in innermost
      File "learner.py", line 5 in outer

    Extension modules: numpy
    """
    log = "\n".join(line.removeprefix("    ") for line in log.splitlines())
    assert stuck_at(log) == [
        'File "learner.py", line 7 in innermost',
        'File "learner.py", line 5 in outer',
    ]
    assert stuck_at("all is well\n") == []
