"""The likeliest tokens of every place, from the engine to the packed batch."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from gspo_dist.candidates import Candidates
from gspo_dist.packing import pack_sequences
from gspo_dist.types import UNBEGUN, environment_tokens
from tests.unit.trainer.small import rollout


def of(*rows):
    """Candidates of places, each given as [(id, probability), ...]."""
    return Candidates(
        np.array([[i for i, _ in row] for row in rows], np.int32),
        np.log(np.array([[p for _, p in row] for row in rows], np.float32)),
    )


ONE, TWO = of([(7, 0.6), (4, 0.3)]), of([(9, 0.5), (7, 0.25)], [(1, 0.75), (2, 0.125)])


def test_parts_are_laid_end_to_end_and_places_without_any_have_none():
    joined = Candidates.join([(1, ONE), (2, None), (2, TWO)])
    assert joined.ids.tolist() == [[7, 4], [0, 0], [0, 0], [9, 7], [1, 2]]
    assert np.exp(joined.logprobs).sum(1).tolist() == pytest.approx([0.9, 0.0, 0.0, 0.75, 0.875])
    assert Candidates.join([(3, None), (0, None)]) is None
    assert joined[3:].ids.tolist() == TWO.ids.tolist()


def test_they_grow_with_their_completion_and_an_environment_has_none():
    first = replace(rollout(0, tokens=(7,)).completion, candidates=ONE)
    then = replace(rollout(0, tokens=(9, 1)).completion, candidates=TWO)
    whole = UNBEGUN.extend(first).extend(environment_tokens([3])).extend(then)
    assert whole.candidates.ids.tolist() == [[7, 4], [0, 0], [9, 7], [1, 2]]
    assert np.isneginf(whole.candidates.logprobs[1]).all()
    assert first.extend(rollout(0, tokens=(5,)).completion).candidates.ids.tolist() == [[7, 4], [0, 0]]
    again = pickle.loads(pickle.dumps(whole))
    assert again.candidates.ids.tobytes() == whole.candidates.ids.tobytes()
    assert again.candidates.logprobs.tobytes() == whole.candidates.logprobs.tobytes()
    with pytest.raises(ValueError, match=r"candidates must have one row per token: got 2 for 1 tokens"):
        replace(first, candidates=TWO)


def test_they_stand_beside_their_tokens_in_the_packed_batch():
    rollouts = [
        replace(r, completion=replace(r.completion, candidates=c))
        for r, c in ((rollout(0, tokens=(7,)), ONE), (rollout(1, tokens=(9, 1)), TWO))
    ]
    batch = pack_sequences(rollouts, [1.0, -1.0], [1, 0])
    prompts = [len(r.prompt.token_ids) for r in rollouts]
    assert batch.candidate_ids.tolist() == [
        *[[0, 0]] * prompts[1], [9, 7], [1, 2], *[[0, 0]] * prompts[0], [7, 4],
    ]  # fmt: skip
    assert batch.candidate_logprobs.exp().sum(1).tolist() == pytest.approx(
        [*[0.0] * prompts[1], 0.75, 0.875, *[0.0] * prompts[0], 0.9]
    )
    assert pack_sequences([rollout(0)], [1.0], [0]).candidate_ids is None
