"""Laws of the pool: prompts are dealt evenly and repeatably, and one local engine answers for all."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gspo_dist.config import RolloutConfig
from gspo_dist.rollout.engine import group_work
from gspo_dist.rollout.pool import LocalRolloutPool, deal
from gspo_dist.rollout.reference import ReferenceEngine
from gspo_dist.types import Completion, Prompt, SamplingSpec
from tests.unit.rollout.table_policy import TablePolicy


def dealt(lengths, engines, spec):
    """The prompts of every engine, by number."""
    prompts = [Prompt(f"p{i}", (1,) * n, "") for i, n in enumerate(lengths)]
    work = deal(group_work(prompts, spec, range(len(prompts))), engines)
    for own in work:
        assert [item.key for item in own] == sorted(item.key for item in own)
    assert sum(len(own) for own in work) == spec.n * len(lengths)
    return [sorted({item.group_id for item in own}) for own in work]


def test_the_docstrings_example():
    assert dealt([10, 40, 20], 2, SamplingSpec(1, 100)) == [[1], [0, 2]]


def test_equal_prompts_are_dealt_evenly_and_in_order():
    assert dealt([5] * 7, 3, SamplingSpec(4, 100)) == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_prompt_weighs_its_prefill_once_and_every_completion():
    """A prompt of 300 with one completion of 100 is as heavy as two of 100: so it is alone."""
    assert dealt([300, 100, 100], 2, SamplingSpec(1, 100)) == [[0], [1, 2]]
    assert dealt([300, 100, 100], 2, SamplingSpec(10, 100)) == [[0], [1, 2]]
    assert dealt([300, 100, 100, 100], 2, SamplingSpec(10, 100)) == [[0, 3], [1, 2]]


def test_what_is_sampled_already_weighs_nothing():
    """Three groups of two: one has 5 of 100 tokens to go, so it joins the lighter of the others."""
    spec, tokens = SamplingSpec(2, 100), 95
    old = Completion(
        np.ones(tokens, int), np.ones(tokens, bool), np.zeros(tokens), np.zeros(tokens, int), "", ""
    )
    work = group_work([Prompt(f"p{i}", (1,) * n, "") for i, n in enumerate((4, 6, 5))], spec, range(3))
    work = [replace(item, so_far=old) if item.group_id == 1 else item for item in work]
    assert [sorted({item.group_id for item in own}) for own in deal(work, 2)] == [[2], [0, 1]]


def test_every_prompt_is_dealt_once_and_no_engine_gets_more_than_a_fair_share_and_one():
    lengths = np.random.default_rng(0).integers(1, 500, 40).tolist()
    spec = SamplingSpec(2, 50)
    rows = dealt(lengths, 3, spec)
    assert sorted(i for row in rows for i in row) == list(range(40))
    work = [sum(lengths[i] + 100 for i in row) for row in rows]
    assert max(work) - min(work) <= 600
    assert dealt(lengths, 3, spec) == rows
    assert deal([], 2) == [[], []]


def test_a_local_pool_answers_with_its_engine():
    config = RolloutConfig(precision="fp32", max_prompt_tokens=8, max_completion_tokens=8)
    engine = ReferenceEngine(config, TablePolicy(0))
    pool = LocalRolloutPool(engine)
    prompts, spec = [Prompt("a", (1, 2), ""), Prompt("b", (3,), "")], SamplingSpec(2, 4, seed=1)
    assert pool.start() == engine.info()
    assert pool.engines == {"engine-0": engine}
    got, wanted = pool.generate(prompts, spec, [0, 1]), engine.generate(prompts, spec, [0, 1])
    tokens = [[[c.token_ids.tolist() for c in group] for group in groups] for groups in (got, wanted)]
    assert tokens[0] == tokens[1]
    [told] = pool.logprobs_of([np.arange(4)], 1.0)["engine-0"]
    assert told.tolist() == engine.logprobs_of([np.arange(4)])[0].tolist()
    pool.start_weight_update(1.0)
    assert pool.finish_weight_update(3, 1.0)["engine-0"].policy_version == 3
    for verb in (pool.sleep, pool.wake_up):
        with pytest.raises(ValueError, match="cannot"):
            verb()
    pool.close()


def test_peak_memory_is_in_bytes():
    page = os.sysconf("SC_PAGE_SIZE")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
    peak = LocalRolloutPool(ReferenceEngine(RolloutConfig(), TablePolicy(0))).peak_memory()
    assert 0.5 * resident < peak["process"]["host"] < 50 * resident
