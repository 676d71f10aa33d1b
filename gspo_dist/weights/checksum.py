"""Checksums of tensors, so that every transfer of weights can be compared at both ends.

There are two functions, both of (dtype, shape, bytes). `host_checksum` hashes bytes in host memory with
xxh3. `device_checksum` needs integer arithmetic only, so a GPU computes it without sending the bytes
anywhere. A transport uses the same one on both sides. Neither is cryptographic: they catch a lost, torn,
reordered or misnamed tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import xxhash

Checksum = Callable[[torch.Tensor], int]
"""Tensor -> 64-bit number."""

_CHUNK = 1 << 24
"""Words that a device checksum expands to 8 bytes at a time: 128 MiB of scratch memory."""
# The three constants are splitmix64's, as int64. They are odd, so a multiplication by one of them
# loses no bit.
_MIX = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX2 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX3 = -7723592293110705685  # 0x94D049BB133111EB


def _label(tensor: torch.Tensor) -> bytes:
    """Dtype and shape as bytes: zeros of two lengths, or one tensor viewed in two ways, must differ."""
    return f"{tensor.dtype}{list(tensor.shape)}".encode()


def host_checksum(tensor: torch.Tensor) -> int:
    """xxh3-64 of the bytes of a tensor in host memory, of any shape, seeded by its dtype and shape."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_intdigest(flat.numpy().data, seed=xxhash.xxh3_64_intdigest(_label(tensor)))


def device_checksum(tensor: torch.Tensor) -> int:
    """Sum over 4-byte words of mix(word + index * odd constant), modulo 2^64. It is the same on every device.

    mix is splitmix64's finaliser with arithmetic shifts. Zeros pad the last word. All three rounds are
    needed: with fewer, the same bit flipped in two different words would change the sum alike.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    tail = -data.numel() % 4
    if tail:
        data = torch.cat([data, data.new_zeros(tail)])
    if data.storage_offset() % 4 or data.data_ptr() % 4:
        data = data.clone()  # a view that starts off a word boundary cannot be read as words
    words = data.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _CHUNK):
        x = words[start : start + _CHUNK].long()
        x += torch.arange(start, start + x.numel(), device=x.device) * _MIX
        x = (x ^ (x >> 30)) * _MIX2
        x = (x ^ (x >> 27)) * _MIX3
        x ^= x >> 31
        total += x.sum()
    return (int(total) + xxhash.xxh3_64_intdigest(_label(tensor))) % (1 << 64)
