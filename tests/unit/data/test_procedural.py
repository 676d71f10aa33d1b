"""Laws of procedural sources: the sizes asked for, no question on both sides, clear refusals."""

from __future__ import annotations

import re

import pytest

from gspo_dist.data.procedural import make


@pytest.mark.slow
def test_gym_questions_come_with_the_answers_of_their_own_verifier():
    import reasoning_gym

    options = {"size": 40, "heldout_size": 10, "min_digits": 2, "max_digits": 3}
    dataset = reasoning_gym.create_dataset("chain_sum", size=1, seed=0)
    records = make("reasoning_gym:chain_sum", "train", options, 0)
    assert len(records) == 40
    for record in records:
        entry = {"answer": record.answer, "metadata": record.metadata["reasoning_gym"]}
        assert dataset.score_answer(record.answer, entry) == 1.0


def test_gym_splits_share_no_question_even_where_a_task_repeats_itself():
    options = {
        "size": 60,
        "heldout_size": 10,
        "min_digits": 1,
        "max_digits": 1,
        "min_terms": 2,
        "max_terms": 2,
    }
    train, heldout = (make("reasoning_gym:chain_sum", split, options, 0) for split in ("train", "heldout"))
    assert len(heldout) == 10
    assert not {r.question for r in train} & {r.question for r in heldout}
    assert len({r.question for r in train}) == len(train)


def test_a_task_too_small_for_both_splits_is_refused():
    options = {
        "size": 5000,
        "heldout_size": 50,
        "min_digits": 1,
        "max_digits": 1,
        "min_terms": 2,
        "max_terms": 2,
    }
    with pytest.raises(ValueError, match=r"reasoning_gym:chain_sum: only \d+ questions differ"):
        make("reasoning_gym:chain_sum", "heldout", options, 0)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("reasoning_gym:chain_sun", {}, "no task 'chain_sun'; nearest: chain_sum"),
        ("reasoning_gym:chain_sum", {"digits": 3}, "data.options {'digits': 3} are refused"),
        ("reasoning_gym:chain_sum", {"min_digits": 5, "max_digits": 2}, "are refused"),
        (
            "arithmetic",
            {"width": 3},
            "arithmetic has no option 'width'; data.options may hold: size, heldout_size, digits",
        ),
        ("arithmetic", {"size": 0}, "data.options.size must be a whole number of at least 1: got 0"),
        (
            "arithmetic",
            {"heldout_size": 1.5},
            "data.options.heldout_size must be a whole number of at least 1: got 1.5",
        ),
    ],
)
def test_bad_options_are_refused_by_name(source, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(source, "train", options, 0)


@pytest.mark.parametrize("source", ["arithmetic", "reasoning_gym:chain_sum"])
def test_a_split_that_is_none_is_refused(source):
    with pytest.raises(ValueError, match=f"{source} is made in the splits train and heldout: got 'test'"):
        make(source, "test", {}, 0)
