"""Laws of the checksums: what they must notice, what they must not depend on."""

import numpy as np
import pytest
import torch
import xxhash

from gspo_dist.weights.checksum import device_checksum, host_checksum


def signed(x):
    """x modulo 2^64 as a signed word."""
    return (x + 2**63) % 2**64 - 2**63


BOTH = pytest.mark.parametrize("checksum", [host_checksum, device_checksum])


def tensor(n=1000, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@BOTH
def test_equal_tensors_have_equal_checksums_however_they_are_stored(checksum):
    a = tensor(1024).view(32, 32)
    strided = a.t().contiguous().t()
    shifted = torch.cat([torch.zeros(7), a.flatten()])[7:].view(32, 32)
    assert checksum(a) == checksum(a.clone()) == checksum(strided) == checksum(shifted)


@BOTH
def test_every_single_bit_counts(checksum):
    a = tensor(64)
    seen = {checksum(a)}
    for bit in range(64 * 32):
        words = a.clone().view(torch.int32)
        words[bit // 32] ^= torch.tensor(1 << (bit % 32), dtype=torch.int64).to(torch.int32)
        seen.add(checksum(words.view(torch.float32)))
    assert len(seen) == 64 * 32 + 1


@BOTH
def test_order_shape_and_dtype_count(checksum):
    a = tensor(1000)
    swapped = a.clone()
    swapped[[3, 900]] = a[[900, 3]]
    values = [checksum(t) for t in (a, swapped, a.view(10, 100), a.view(torch.int32), a[:999])]
    assert len(set(values)) == len(values)


@BOTH
def test_zeros_of_different_lengths_differ(checksum):
    assert len({checksum(torch.zeros(n)) for n in range(50)}) == 50


@BOTH
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 8])
def test_lengths_that_are_no_whole_words(checksum, n):
    a = torch.arange(n, dtype=torch.uint8)
    padded = torch.cat([a, torch.zeros(1, dtype=torch.uint8)])
    assert checksum(a) != checksum(padded)
    view = torch.arange(20, dtype=torch.uint8)[1 : 1 + n]
    assert checksum(view) == checksum(view.clone())


@BOTH
def test_a_view_that_cannot_be_read_as_words_is_copied(checksum):
    """15 bytes into memory that starts off a word, so at a word's address: torch has no view as int32."""
    memory = bytearray(range(64))
    view = torch.frombuffer(memory, dtype=torch.uint8, offset=1)[15:35]
    assert view.storage_offset() == 15
    assert checksum(view) == checksum(view.clone())


def test_host_checksum_is_xxh3_of_the_bytes_seeded_by_dtype_and_shape():
    a = tensor(10)
    seed = xxhash.xxh3_64_intdigest(b"torch.float32[10]")
    assert host_checksum(a) == xxhash.xxh3_64_intdigest(a.numpy().tobytes(), seed=seed)


def test_device_checksum_equals_its_formula_in_python_integers():
    a = torch.tensor([1, -2, 3], dtype=torch.int32)
    total = 0
    for i, word in enumerate([1, -2, 3]):
        x = signed(word + i * 0x9E3779B97F4A7C15)
        x = signed((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9)
        x = signed((x ^ (x >> 27)) * 0x94D049BB133111EB)
        total += x ^ (x >> 31)
    label = xxhash.xxh3_64_intdigest(b"torch.int32[3]")
    assert device_checksum(a) == (total + label) % 2**64


def test_device_checksum_does_not_depend_on_the_chunk(monkeypatch):
    a = tensor(1000)
    whole = device_checksum(a)
    monkeypatch.setattr("gspo_dist.weights.checksum._CHUNK", 7)
    assert device_checksum(a) == whole


def test_bfloat16_is_summed_as_bytes():
    a = tensor(7).bfloat16()
    bits = a.view(torch.int16).numpy()
    assert bits.dtype == np.int16
    seed = xxhash.xxh3_64_intdigest(b"torch.bfloat16[7]")
    assert host_checksum(a) == xxhash.xxh3_64_intdigest(bits.tobytes(), seed=seed)
