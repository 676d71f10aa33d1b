"""What a checkpoint leaves out, and what a resumed optimiser is given."""

from __future__ import annotations

import contextlib
import gc
import re
from pathlib import Path
from traceback import StackSummary
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from gspo_dist.learners.megatron import checkpoint
from gspo_dist.models.shape import ModelShape


@pytest.mark.parametrize("nested", [True, False], ids=["distributed", "plain"])
def test_resuming_gives_a_fused_adam_its_steps(nested: bool) -> None:
    """It counts by group, and a fresh one has no count: bias correction would start again."""
    given: list[dict] = []
    part = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[{}], state={}), load_state_dict=given.append
    )
    own = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}, {"lr": 0.2}]}
    checkpoint._load_optimizer(part, {"optimizer": own} if nested else own, 7, {})
    (state,) = given
    assert [g["step"] for g in (state["optimizer"] if nested else state)["param_groups"]] == [7, 7]
    assert list(own["state"][0]) == ["exp_avg"]  # FusedAdam refuses a step among a parameter's tensors


def test_every_extra_state_of_a_grouped_linear_is_left_out() -> None:
    part = {
        "a.linear_fc1._extra_state": 0,
        "a.linear_fc1._extra_state1": 1,
        "a.linear_fc1._extra_state12": 2,
        "a.linear_fc1.weight12": 3,
        "a._extra_state_of.weight": 4,
    }
    checkpoint._drop_extra_state(part)
    assert sorted(part.values()) == [3, 4]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "optimizer.state.param.output_layer.weight",
            r"keeps its optimiser in another way.*distributed_optimizer",
        ),
        (
            "decoder.layers.1.mlp.router.weight",
            r"is of another model.*with shape \[8, 64\]; point model\.path",
        ),
    ],
)
def test_a_missing_tensor_is_named_with_its_way_out(key: str, message: str) -> None:
    assert re.search(rf"it has no {re.escape(key)}", checkpoint._absent(Path("saved"), key, [8, 64]))
    assert re.search(message, checkpoint._absent(Path("saved"), key, [8, 64]))


def fails(*args: object, **kwargs: object) -> None:
    said = (RuntimeError("Worker failure: unexpected pos 704 vs 598"), StackSummary.from_list([]))
    raise CheckpointException("save", {0: said})


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_ends_a_save_as_an_error_of_the_disk(asynchronous: bool, tmp_path, monkeypatch) -> None:
    """In the background the writing process fails, which is known when the save is waited for."""
    monkeypatch.setattr(checkpoint.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(checkpoint.dist, "barrier", lambda: None)
    monkeypatch.setattr(checkpoint, "sharded_state", lambda *args, **kwargs: ({}, {}))
    monkeypatch.setattr(checkpoint, "save_strategy", lambda: None)
    writer = checkpoint.CheckpointWriter(asynchronous)
    saved = (lambda *args, **kwargs: object()) if asynchronous else fails
    monkeypatch.setattr(checkpoint.dist_checkpointing, "save", saved)
    if asynchronous:
        # The first call finishes the save before, which there is none of.
        finish = iter([lambda **kwargs: None, fails])
        queue = SimpleNamespace(
            maybe_finalize_async_calls=lambda **kwargs: next(finish)(),
            schedule_async_request=lambda request: None,
        )
        writer.queue = queue
    learner = SimpleNamespace(architecture=ModelShape.__new__(ModelShape), scale=None)
    monkeypatch.setattr(checkpoint, "asdict", lambda shape: {})

    def save() -> None:
        writer.save(learner, 1, tmp_path / "learner")
        writer.wait()

    with pytest.raises(OSError, match=f"no room for the learner's state .*{tmp_path}/learner"):
        save()


def test_a_state_that_cannot_be_read_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "sharded_state", lambda *args, **kwargs: ({}, {}))
    monkeypatch.setattr(checkpoint, "load_strategy", lambda folder: None)
    monkeypatch.setattr(checkpoint, "check", lambda *args: None)
    monkeypatch.setattr(checkpoint.dist_checkpointing, "load", fails)
    with pytest.raises(ValueError, match=rf"(?s){tmp_path} cannot be read"):
        checkpoint.load(SimpleNamespace(), tmp_path)


class Collecting:
    """An optimiser that collects garbage while it says what it holds, and notes how much is looked at."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.looked_at = fails, 0

    def sharded_state_dict(self, models, **options) -> dict:
        self.looked_at = len(gc.get_objects())
        if self.fails:
            raise RuntimeError("no room")
        return {}


@pytest.fixture
def thawed():
    """As a rank is: tests/conftest.py freezes what it imported."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("thawed")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("loading", [False, True])
def test_megatrons_collections_pass_over_what_was_there_before(fails: bool, loading: bool) -> None:
    assert gc.get_freeze_count() == 0
    before, optimizer = len(gc.get_objects()), Collecting(fails)
    learner = SimpleNamespace(chunks=[], optimizer=optimizer)
    with pytest.raises(RuntimeError, match="no room") if fails else contextlib.nullcontext():
        checkpoint.sharded_state(learner, loading=loading)
    assert optimizer.looked_at < before / 100
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("thawed")
def test_what_somebody_else_froze_stays_frozen() -> None:
    gc.freeze()
    with checkpoint.short_collections():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() > 1000
