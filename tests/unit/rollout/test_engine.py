"""Laws of what every engine checks before it works."""

import numpy as np
import pytest

from gspo_dist.rollout.engine import EngineInfo, check_request, check_sequences
from gspo_dist.types import Prompt, SamplingSpec

INFO = EngineInfo("engine-1", "cpu", 10, 32, 0, 0, 0, can_record_routing=False, workers=1)


def prompt(tokens):
    return Prompt("p0", tuple(range(tokens)), "")


def test_a_prompt_may_fill_the_context_with_its_completion():
    check_request(INFO, [prompt(1), prompt(6)], SamplingSpec(2, 4), [0, 1])
    check_request(INFO, [], SamplingSpec(2, 4), [])


@pytest.mark.parametrize(
    ("prompts", "spec", "ids", "message"),
    [
        ([prompt(7)], SamplingSpec(1, 4), [0], r"'p0'.*got 7 \+ 4 tokens for a context of 10; raise rollout"),
        ([prompt(0)], SamplingSpec(1, 4), [0], r"'p0' must have at least one token"),
        ([prompt(1)] * 4, SamplingSpec(1, 4), [0], "one request id per prompt: got 1 for 4"),
        ([prompt(1)], SamplingSpec(1, 4, record_routing=True), [0], r"engine-1 was not started.*replay=r3"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(prompts, spec, ids, message):
    with pytest.raises(ValueError, match=message):
        check_request(INFO, prompts, spec, ids)


@pytest.mark.parametrize("length", [0, 1, 10])
def test_sequences_without_log_probs_or_room_are_refused(length):
    check_sequences(INFO, [np.arange(2), np.arange(9)])
    with pytest.raises(ValueError, match=f"sequence 1 must have 2 to 9 tokens for log-probs: got {length}"):
        check_sequences(INFO, [np.arange(2), np.arange(length)])
