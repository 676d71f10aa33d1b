"""Laws of what every engine checks before it works."""

import numpy as np
import pytest

from gspo_dist.rollout.engine import EngineInfo, Growth, check_sequences, check_work, generate, group_work
from gspo_dist.types import Completion, Prompt, SamplingSpec

INFO = EngineInfo("engine-1", "cpu", 10, 32, 0, 0, 0, can_record_routing=False, workers=1)


def prompt(tokens):
    return Prompt("p0", tuple(range(tokens)), "")


def test_a_prompt_may_fill_the_context_with_its_completion():
    check_work(INFO, group_work([prompt(1), prompt(6)], SamplingSpec(2, 4), [0, 1]))
    check_work(INFO, [])


@pytest.mark.parametrize(
    ("prompts", "spec", "message"),
    [
        ([prompt(7)], SamplingSpec(1, 4), r"'p0'.*got 7 \+ 4 tokens for a context of 10; raise rollout"),
        ([prompt(0)], SamplingSpec(1, 4), r"'p0' must have at least one token"),
        ([prompt(1)], SamplingSpec(1, 4, record_routing=True), r"engine-1 was not started.*replay=r3"),
        ([prompt(1)], SamplingSpec(1, 4, candidates=5), r"engine-1 gives .* asks for the 5 likeliest: use"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(prompts, spec, message):
    with pytest.raises(ValueError, match=message):
        check_work(INFO, group_work(prompts, spec, range(len(prompts))))


def test_every_prompt_has_an_id_for_its_random_numbers():
    with pytest.raises(ValueError, match="one request id per prompt: got 1 for 4"):
        generate(None, [prompt(1)] * 4, SamplingSpec(1, 4), [0])


def test_growth_travels_flat_and_comes_back():
    def part(*tokens):
        n = len(tokens)
        return Completion(
            np.array(tokens),
            np.ones(n, bool),
            -np.arange(n, dtype=np.float32),
            np.full(n, 3, np.int32),
            "",
            "",
        )

    growth = Growth.of({(0, 1): part(7, 8), (0, 2): part(), (4, 0): part(9)})
    assert growth.keys == ((0, 1), (4, 0))
    assert growth.token_ids.tolist() == [7, 8, 9]
    parts = growth.parts()
    assert [c.token_ids.tolist() for c in parts.values()] == [[7, 8], [9]]
    assert parts[0, 1].logprobs.tolist() == [0.0, -1.0]
    assert parts[4, 0].policy_versions.tolist() == [3]
    assert Growth.of({}).parts() == {}


@pytest.mark.parametrize("length", [0, 1, 10])
def test_sequences_without_log_probs_or_room_are_refused(length):
    check_sequences(INFO, [np.arange(2), np.arange(9)])
    with pytest.raises(ValueError, match=f"sequence 1 must have 2 to 9 tokens for log-probs: got {length}"):
        check_sequences(INFO, [np.arange(2), np.arange(length)])
