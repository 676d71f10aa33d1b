"""Law of `make_source`: the engine's side follows from what the transport says of itself."""

from __future__ import annotations

import torch

from gspo_dist.weights.shm import ShmSource, ShmTransport
from gspo_dist.weights.source import make_source


def test_a_bucket_in_shared_memory_is_read_by_the_side_that_its_transport_names(tmp_path):
    transport = ShmTransport(folder=tmp_path)
    source = make_source(transport.init_info(3), worker=1)
    assert isinstance(source, ShmSource)
    staged = transport.stage([("w", torch.arange(3.0))])
    [(name, tensor)] = source.begin(staged.update_info)()
    assert name == "w"
    assert torch.equal(tensor, torch.arange(3.0))
