"""Laws of the buckets: order is kept, nothing is lost, only a tensor that is too large passes the limit."""

import pytest
import torch

from gspo_dist.weights.stream import buckets


def sizes(items, limit):
    weights = ((str(n), torch.zeros(n, dtype=torch.uint8)) for n in items)
    return [[t.nbytes for _, t in bucket] for bucket in buckets(weights, limit)]


@pytest.mark.parametrize(
    ("items", "limit", "wanted"),
    [
        ([40, 40, 30, 200], 100, [[40, 40], [30], [200]]),  # the docstring's
        ([50, 50], 100, [[50, 50]]),
        ([50, 51], 100, [[50], [51]]),
        ([101, 1], 100, [[101], [1]]),
        ([0, 0, 100, 0], 100, [[0, 0, 100, 0]]),
        ([], 100, []),
        ([1], 0, [[1]]),
    ],
)
def test_groups_of_bytes(items, limit, wanted):
    assert sizes(items, limit) == wanted


def test_buckets_count_the_bytes_of_tensors():
    weights = [
        (f"w{i}", torch.zeros(5, dtype=kind)) for i, kind in enumerate([torch.float32, torch.bfloat16] * 3)
    ]
    got = list(buckets(iter(weights), 30))
    assert [[n for n, _ in bucket] for bucket in got] == [["w0", "w1"], ["w2", "w3"], ["w4", "w5"]]
    assert all(a is b for (_, a), (_, b) in zip([p for g in got for p in g], weights, strict=True))


def test_a_tensor_counts_what_it_is_said_to_count():
    weights = [(str(n), torch.zeros(n)) for n in (1, 2, 3)]
    got = list(buckets(iter(weights), 50, nbytes=lambda t: 10 * len(t)))
    assert [[n for n, _ in bucket] for bucket in got] == [["1", "2"], ["3"]]


def test_a_bucket_is_given_before_the_next_tensor_is_asked_for():
    """A learner gathers tensor by tensor: at most one beyond the bucket may be alive."""
    asked = []

    def source():
        for i in range(6):
            asked.append(i)
            yield f"w{i}", torch.zeros(10)

    stream = buckets(source(), 80)
    assert len(next(stream)) == 2
    assert asked == [0, 1, 2]
