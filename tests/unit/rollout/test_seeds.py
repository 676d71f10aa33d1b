"""Laws of the counter-based random numbers."""

import numpy as np
from scipy import stats

from gspo_dist.rollout.seeds import mix, request_key, sample_keys, uniforms


def test_mix_is_splitmix64():
    """First outputs of splitmix64 from state 0 (published reference values)."""
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(gamma * i) % 2**64 for i in (1, 2, 3)], dtype=np.uint64)
    assert [int(x) for x in mix(states)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_a_uniform_depends_on_its_own_counter_only():
    keys = sample_keys(request_key(1, 2), np.arange(8))
    together = uniforms(keys, np.arange(8))
    alone = [uniforms(keys[i : i + 1], np.array([i]))[0] for i in range(8)]
    assert together.tolist() == alone


def test_seed_request_sample_and_position_all_count():
    draws = [
        float(uniforms(sample_keys(request_key(seed, request), np.array([sample])), np.array([position]))[0])
        for seed in range(6)
        for request in range(6)
        for sample in range(6)
        for position in range(6)
    ]
    assert len(set(draws)) == 6**4


def test_uniforms_are_uniform_along_every_axis():
    key = request_key(7, 3)
    along_positions = uniforms(np.repeat(sample_keys(key, np.array([0])), 100_000), np.arange(100_000))
    along_samples = uniforms(sample_keys(key, np.arange(100_000)), np.zeros(100_000, dtype=np.int64))
    along_requests = np.array(
        [uniforms(sample_keys(request_key(7, r), np.array([0])), np.array([0]))[0] for r in range(5_000)]
    )
    for draws in (along_positions, along_samples, along_requests):
        assert draws.min() >= 0.0
        assert draws.max() < 1.0
        assert stats.kstest(draws, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(along_positions[:-1], along_positions[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(along_positions, along_samples)[0, 1]) < 0.01


def test_without_a_seed_keys_do_not_repeat():
    assert len({request_key(None, 0) for _ in range(100)}) == 100


def test_negative_and_large_seeds_are_taken():
    assert len({request_key(s, 0) for s in (-1, 0, 2**63, 2**64 - 2)}) == 4
