"""Laws of the cursor: epochs are permutations, and a resumed cursor gives the very same prompts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo_dist.data.cursor import PromptCursor
from gspo_dist.data.prompts import PromptSource
from gspo_dist.types import Prompt


def source(n: int, answer: str = "x") -> PromptSource:
    return PromptSource("test", [Prompt(str(i), (i,), str(i), answer) for i in range(n)])


def ids(prompts: list[Prompt]) -> list[int]:
    return [int(p.prompt_id) for p in prompts]


@given(st.integers(1, 17), st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(0, 5))
def test_every_epoch_holds_every_prompt_once_whatever_the_batches(n, batches, seed):
    cursor = PromptCursor(source(n), seed=seed)
    drawn = [i for b in batches for i in ids(cursor.next(b))]
    assert len(drawn) == sum(batches)
    for start in range(0, len(drawn) - n + 1, n):
        assert sorted(drawn[start : start + n]) == list(range(n))
    tail = drawn[len(drawn) // n * n :]
    assert len(set(tail)) == len(tail)


@given(st.integers(2, 17), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 8))
def test_a_resumed_cursor_goes_on_with_the_very_next_prompt(n, batches, cut):
    whole = PromptCursor(source(n), seed=7)
    for b in batches[:cut]:
        whole.next(b)
    saved = json.loads(json.dumps(whole.state_dict()))
    resumed = PromptCursor(source(n), seed=7)
    resumed.load_state_dict(saved)
    for b in [*batches[cut:], 2 * n + 1]:
        assert ids(resumed.next(b)) == ids(whole.next(b))


def test_the_rest_of_an_epoch_opens_the_next_batch():
    cursor = PromptCursor(source(5), seed=0, shuffle=False)
    assert [ids(cursor.next(3)) for _ in range(4)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    assert (cursor.epoch, cursor.position) == (2, 2)


def test_epochs_and_seeds_have_orders_of_their_own():
    cursor = PromptCursor(source(50), seed=0)
    first, second = ids(cursor.next(50)), ids(cursor.next(50))
    assert (
        len(
            {
                tuple(first),
                tuple(second),
                tuple(range(50)),
                tuple(ids(PromptCursor(source(50), seed=1).next(50))),
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            PromptCursor(source(6), seed=1),
            "data cursor: seed must be what the checkpoint was made with: got 1",
        ),
        (PromptCursor(source(6), seed=0, shuffle=False), "data cursor: shuffle must be what"),
        (PromptCursor(source(7), seed=0), "data.train must have the prompts .* got 7, it has 6; .*accept="),
    ],
)
def test_a_place_in_other_data_is_refused(other, message):
    cursor = PromptCursor(source(6), seed=0)
    cursor.next(4)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(cursor.state_dict())
    assert (other.epoch, other.position) == (0, 0)


def test_a_repaired_record_keeps_the_order_and_is_said(caplog):
    cursor, repaired = PromptCursor(source(6), seed=0), PromptCursor(source(6, answer="y"), seed=0)
    cursor.next(4)
    repaired.load_state_dict(cursor.state_dict())
    assert "edited since the checkpoint" in caplog.text
    assert ids(repaired.next(8)) == ids(cursor.next(8))


def test_other_prompts_begin_a_new_epoch_where_that_is_accepted(caplog):
    cursor, other = PromptCursor(source(6), seed=0), PromptCursor(source(7), seed=0)
    cursor.next(8)
    other.load_state_dict(cursor.state_dict(), accept_other_prompts=True)
    assert (other.epoch, other.position) == (2, 0)
    assert "7 prompts instead of 6" in caplog.text


def test_a_place_outside_the_data_is_refused():
    cursor = PromptCursor(source(6), seed=0)
    with pytest.raises(ValueError, match="no such place: epoch 0, position 7 of 6"):
        cursor.load_state_dict(cursor.state_dict() | {"position": 7})


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one prompt: got 0"):
        PromptCursor(source(6), seed=0).next(0)
