"""Laws of a bucket's layout: tensors start at multiples of 64, and both ends see the same ones."""

import json

import pytest
import torch

from gspo_dist.weights.bucket import BucketLayout


def test_offsets_of_the_docstring_example():
    layout = BucketLayout.of([("a", torch.zeros(3)), ("b", torch.zeros(2, 2, dtype=torch.bfloat16))])
    assert (layout.offsets, layout.nbytes) == ((0, 64), 128)
    assert layout.dtypes == ("float32", "bfloat16")
    assert layout.names == ("a", "b")
    assert layout.shapes == ((3,), (2, 2))


def test_a_tensor_of_whole_lines_leaves_no_gap_and_one_byte_more_takes_a_line():
    sizes = [64, 65, 0, 1, 128]
    layout = BucketLayout.of([(str(n), torch.zeros(n, dtype=torch.uint8)) for n in sizes])
    assert layout.offsets == (0, 64, 192, 192, 256)
    assert layout.nbytes == 384


def test_a_layout_survives_json():
    layout = BucketLayout.of([("a", torch.zeros(3, 1)), ("b", torch.zeros((), dtype=torch.int64))])
    assert BucketLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


def test_what_is_filled_in_is_seen_again():
    g = torch.Generator().manual_seed(0)
    bucket = [
        ("f", torch.randn(3, 5, generator=g)),
        ("b", torch.randn(7, generator=g).bfloat16()),
        ("i", torch.tensor(7)),
        ("none", torch.zeros(0, 4)),
        ("u", torch.arange(200, dtype=torch.uint8)),
    ]
    layout = BucketLayout.of(bucket)
    buffer = torch.full((layout.nbytes,), 255, dtype=torch.uint8)
    layout.fill(buffer, bucket)
    seen = list(layout.views(buffer))
    assert [n for n, _ in seen] == [n for n, _ in bucket]
    for (_, got), (_, wanted) in zip(seen, bucket, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    assert seen[1][1].data_ptr() - buffer.data_ptr() == 64  # a view, no copy
    assert (buffer[60:64] == 255).all()  # the gap is left alone


def test_a_layout_and_a_bucket_that_do_not_belong_together_are_refused():
    bucket = [("a", torch.zeros(1)), ("b", torch.zeros(1))]
    layout = BucketLayout.of(bucket)
    with pytest.raises(ValueError, match="zip"):
        layout.fill(torch.zeros(layout.nbytes, dtype=torch.uint8), bucket[:1])
    torn = BucketLayout.from_dict({**layout.to_dict(), "offsets": [0]})
    with pytest.raises(ValueError, match="zip"):
        list(torn.views(torch.zeros(layout.nbytes, dtype=torch.uint8)))
