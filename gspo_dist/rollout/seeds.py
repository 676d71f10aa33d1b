"""Random numbers by counter: the uniform of a token depends on (seed, request, sample, position) and
on nothing else.

So the draws of a completion are the same whichever engine runs it, in whatever batch, before or after a
preemption, and no generator has a state to save. Equal draws give equal tokens where equal prefixes give
equal log-probs: on a CPU in fp32. In bf16, on GPUs above all, a kernel's rounding depends on the neighbours
in the batch, so a draw that falls close to a boundary can give another token. rollout.batch_invariant=true
asks vLLM for kernels without that.

The mixer is splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014), vectorised.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from gspo_dist.types import Work

# splitmix64's constants: the increment of its state, the two multipliers, the shifts.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)
# A float64 has 53 bits of fraction, so the lowest 11 of 64 are dropped.
_S11 = np.uint64(11)


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser of uint64 words [N]: a bijection in which every input bit moves half
    of the output's.
    """
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


def request_key(seed: int | None, request_id: int) -> int:
    """The 64-bit key of a request. Without a seed it is one that nobody can repeat."""
    if seed is None:
        return secrets.randbits(64)
    words = np.array([seed & (2**64 - 1), request_id & (2**64 - 1)], dtype=np.uint64)
    return int(mix(mix(words[:1] + _GAMMA) + words[1:] * _GAMMA)[0])


def sample_keys(key: int, samples: np.ndarray) -> np.ndarray:
    """Keys [N] uint64 of the samples [N] (0, 1, ..., n - 1) of one request."""
    return mix(np.array([key], dtype=np.uint64) + (samples.astype(np.uint64) + np.uint64(1)) * _GAMMA)


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Uniforms [N] float64 in [0, 1), 53 random bits each.

    keys [N] uint64 are those of the samples, positions [N] the index of each sample's token
    in its completion.
    """
    words = mix(keys + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return (words >> _S11).astype(np.float64) * 2.0**-53


def work_keys(work: Sequence[Work]) -> np.ndarray:
    """Keys [N] uint64 of completions in the making: of the seed, the group and the sample of each.

    They do not depend on what is sampled so far, which is why a completion can go on anywhere.
    """
    groups: dict[tuple[int | None, int], int] = {}
    keys = np.zeros(len(work), dtype=np.uint64)
    for i, item in enumerate(work):
        group = item.spec.seed, item.group_id
        if group not in groups:
            groups[group] = request_key(*group)
        keys[i] = sample_keys(groups[group], np.array([item.sample]))[0]
    return keys
