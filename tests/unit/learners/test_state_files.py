"""A state's files: torn ones and full disks are told with the file, another layout with both values."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from traceback import StackSummary

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from gspo_dist.config import DeepSpeedConfig, LearnerConfig
from gspo_dist.learners.state_files import (
    LAYOUT,
    check_resume,
    read_state,
    write_layout,
    write_state,
    writing,
)


def config(backend: str = "deepspeed", world_size: int = 4, **deepspeed: int) -> LearnerConfig:
    sizes = {"zero_stage": 2, "expert_parallel": 2} | deepspeed
    return LearnerConfig(backend=backend, world_size=world_size, deepspeed=DeepSpeedConfig(**sizes))


def test_a_state_comes_back(tmp_path: Path) -> None:
    write_state({"a": torch.arange(3), "n": 7}, tmp_path / "state.pt")
    state = read_state(tmp_path / "state.pt")
    assert state["n"] == 7
    assert torch.equal(state["a"], torch.arange(3))


class _OfAnotherVersion:
    """A class of our own: what libraries trust in this process (megatron-core: paths) has no say on it."""


def test_a_whole_file_with_more_in_it_is_not_called_torn(tmp_path: Path) -> None:
    """Nobody is told to remove a checkpoint that another version can read."""
    write_state({"a": torch.arange(3), "more": _OfAnotherVersion()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt is whole, but holds \S+\._OfAnotherVersion, which"):
        read_state(tmp_path / "state.pt")


@pytest.mark.parametrize("kept", [0, 1, 200, -100])
def test_a_torn_state_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "state.pt"
    write_state({"a": torch.arange(1000)}, path)
    data = path.read_bytes()[:kept]
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"state\.pt is torn \({len(data):,} bytes\): remove this checkpoint"
    ):
        read_state(path)


def test_a_missing_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no state\.pt"):
        read_state(tmp_path / "state.pt")


@pytest.mark.parametrize("numbers", [10, 10_000_000])
def test_a_full_disk_is_an_error_of_the_disk_with_the_file(tmp_path: Path, numbers: int) -> None:
    """/dev/full takes no byte; torch says so with a RuntimeError of its zip writer."""
    path = tmp_path / "state.pt"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"no room for the learner's state .* MiB free") as raised:
        write_state({"a": torch.zeros(numbers)}, path)
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(path)


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes differ"), PermissionError(errno.EACCES, "no")):
        with pytest.raises(type(error)) as raised, writing(tmp_path):
            raise error
        assert raised.value is error


def failed_ranks(said: str) -> CheckpointException:
    """What torch.distributed.checkpoint raises where rank 0 said something: no Exception (torch 2.13)."""
    return CheckpointException("save", {0: (RuntimeError(said), StackSummary.from_list([]))})


def test_what_ranks_raise_together_is_an_exception_and_a_full_disk_an_error_of_the_disk(tmp_path) -> None:
    with pytest.raises(OSError, match="no room for the learner's state") as raised, writing(tmp_path):
        raise failed_ranks("Worker failure: unexpected pos 704 vs 598")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))
    with (
        pytest.raises(RuntimeError, match=rf"(?s)not written to {tmp_path}: .*shapes differ"),
        writing(tmp_path),
    ):
        raise failed_ranks("shapes differ")


def test_the_same_layout_may_be_resumed(tmp_path: Path) -> None:
    check_resume(tmp_path, config())  # saved before layouts were
    write_layout(tmp_path, config())
    check_resume(tmp_path, config())


@pytest.mark.parametrize(
    ("now", "named", "back"),
    [
        (config(world_size=2), "learner.world_size was 4 and is 2", "learner.world_size=4"),
        (config(zero_stage=3), "zero_stage was 2 and is 3", "learner.deepspeed.zero_stage=2"),
        (config(expert_parallel=4), "expert_parallel was 2 and is 4", "learner.deepspeed.expert_parallel=2"),
        (
            config(world_size=8, zero_stage=1),
            "learner.world_size was 4 and is 8; learner.deepspeed.zero_stage was 2 and is 1",
            "learner.world_size=4 learner.deepspeed.zero_stage=2",
        ),
        (config("eager", 1), "learner.backend was deepspeed and is eager.", "learner.backend=deepspeed,"),
    ],
)
def test_another_layout_is_refused_with_both_values(
    tmp_path: Path, now: LearnerConfig, named: str, back: str
) -> None:
    write_layout(tmp_path, config())
    with pytest.raises(ValueError, match="can only be loaded with the layout that saved it") as raised:
        check_resume(tmp_path, now)
    assert named in str(raised.value)
    assert f"Resume with {back}" in str(raised.value)


def test_an_eager_state_names_no_ranks(tmp_path: Path) -> None:
    write_layout(tmp_path, config("eager", 1))
    assert json.loads((tmp_path / LAYOUT).read_text()) == {
        "learner.backend": "eager",
        "learner.precision": "bf16",
    }


def test_a_torn_layout_is_named(tmp_path: Path) -> None:
    (tmp_path / LAYOUT).write_text('{"learner.ba')
    with pytest.raises(ValueError, match=r"layout\.json is torn"):
        check_resume(tmp_path, config())
