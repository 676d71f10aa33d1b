"""What an environment process makes of odd environments, without the process."""

from __future__ import annotations

import pytest

from gspo_dist.environments.protocol import Observation
from gspo_dist.environments.worker import Call, Diverged, End, Episodes, answered
from gspo_dist.types import Prompt


class Says:
    """Answers with what it was made with, and keeps what is asked of it."""

    def __init__(self, *answers, reset="begin") -> None:
        self.answers, self.opening, self.asked, self.closed = list(answers), reset, [], 0

    def reset(self, prompt, seed):
        self.asked.append(None)
        if isinstance(self.opening, Exception):
            raise self.opening
        return self.opening

    def step(self, turn):
        self.asked.append(turn)
        told = self.answers.pop(0)
        if isinstance(told, Exception):
            raise told
        return told if isinstance(told, Observation) else Observation(told)

    def close(self):
        self.closed += 1


class Saved(Says):
    def state_dict(self):
        return {"asked": len(self.asked)}

    def load_state_dict(self, state):
        raise OSError("another host")


def process(*made):
    """The episodes of a process, whose environments are `made` one after the other."""
    coming = list(made)
    return Episodes(lambda: coming.pop(0), characters=40)


def call(turn=None, *history, state=None):
    return Call((3, 1), Prompt("p", (1,), "q"), 7, turn, history, state)


BEGUN = ("", "begin")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("plain", "plain"),
        ("", ""),
        (None, ""),
        ("half of a pair \ud83d!", "half of a pair ?!"),
        ("y" * 1_000_000, "y" * 40),
    ],
)
def test_an_answer_is_a_text_that_can_be_written_and_no_longer_than_is_read(said, text) -> None:
    assert process(Says(said)).take(call("a", BEGUN)).observation.text == text
    assert process(Says(reset=said)).take(call()).observation.text == text


@pytest.mark.parametrize("said", [5, ("begin", {}), b"begin", ["begin"]])
def test_what_is_no_text_fails(said) -> None:
    """And would end the trainer, which reads it."""
    for asked, env in ((call(), Says(reset=said)), (call("a", BEGUN), Says(Observation(said)))):
        answer = answered(process(env), asked)
        verb = "reset" if asked.turn is None else "step"
        assert (answer.kind, answer.value) == (
            "failed",
            f"TypeError: {verb} must answer with a text: got {type(said).__name__}",
        )


def test_a_reset_that_raises_fails_with_its_trace() -> None:
    answer = answered(process(Says(reset=OSError("no table"))), call())
    assert (answer.kind, answer.value) == ("failed", "OSError: no table")
    assert "in reset" in answer.traceback


def test_an_episode_that_begins_again_leaves_none_open() -> None:
    first, second = Says(), Says("1")
    episodes = process(first, second)
    episodes.take(call())
    episodes.take(call())
    assert (first.closed, second.closed) == (1, 0)
    assert episodes.take(call("a", BEGUN)).observation.text == "1"
    assert answered(episodes, End(((3, 1), (8, 8)))) is None
    assert second.closed == 1


def test_a_state_that_is_not_taken_up_is_made_good_by_the_turns() -> None:
    refuses, env = Saved(), Saved("1", "2")
    told = process(refuses, env).take(call("b", BEGUN, ("a", "1"), state='{"asked": 2}'))
    assert (told.observation.text, told.is_replayed, env.asked) == ("2", True, [None, "a", "b"])
    assert refuses.closed == 1
    # An environment that has forgotten the verb, as after an edit between two runs, is played again too.
    told = process(Says(), Says("1", "2")).take(call("b", BEGUN, ("a", "1"), state="{}"))
    assert (told.observation.text, told.is_replayed) == ("2", True)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (Says(ConnectionError("gone"), "2"), "ConnectionError: gone"),
        (Says("other", "2"), "turn 1 answered 'other' and not '1' as before"),
        (Says("1", "2", reset=OSError("once only")), "OSError: once only"),
        (Says("1", "2", reset="odd"), "turn 0 answered 'odd' and not 'begin' as before"),
    ],
)
def test_an_episode_whose_turns_cannot_be_played_again_has_diverged_and_not_failed(env, words) -> None:
    asked = call("b", BEGUN, ("a", "1"))
    answer = answered(process(env), asked)
    assert answer.kind == "diverged"
    assert words in answer.value
    assert "b" not in env.asked  # the turn itself was not taken
    with pytest.raises(Diverged):
        process(Says(1)).take(asked)


@pytest.mark.parametrize(
    ("told", "recorded", "is_same"),
    [
        ("a<|im_end|>b c", "a< |im_end|>b c", True),  # a special token that was broken
        ("a<|im_end|>b c", "a< |im_end|>b", True),  # and it was cut
        ("12", "12", True),
        ("12", "1", True),
        ("12", "2", False),
        ("1", "12", False),
    ],
)
def test_an_answer_as_it_stands_in_a_completion_is_the_one_that_was_given(told, recorded, is_same) -> None:
    answer = answered(process(Says(told, "2")), call("b", BEGUN, ("a", recorded)))
    assert answer.kind == ("told" if is_same else "diverged")
