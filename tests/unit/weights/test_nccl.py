"""Laws of the nccl transport that need no GPU: ranks, arguments, and what it says where it cannot work."""

from types import SimpleNamespace

import pytest
import torch

from gspo_dist.weights.bucket import BucketLayout
from gspo_dist.weights.checksum import device_checksum
from gspo_dist.weights.nccl import NcclTransport, require_nccl
from gspo_dist.weights.send import make_transport
from gspo_dist.weights.transport import Staged
from gspo_dist.weights.verify import WeightSyncError


def test_nccl_transport_gives_every_worker_its_own_rank():
    t = make_transport("nccl", master_address="10.0.0.1", master_port=29600, engines=3, engine_workers=2)
    assert t.world_size == 7
    assert [t.init_info(i)["rank_offset"] for i in range(3)] == [1, 3, 5]
    assert {t.init_info(i)["world_size"] for i in range(3)} == {7}
    with pytest.raises(ValueError, match="engine index"):
        t.init_info(3)


@pytest.mark.parametrize(
    "where", [{"master_address": "", "master_port": 1}, {"master_address": "h", "master_port": 0}]
)
def test_nccl_transport_checks_its_arguments(where):
    with pytest.raises(ValueError, match="address and a free port"):
        make_transport("nccl", engines=1, **where)


def test_nccl_transport_without_a_gpu_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("this host has a GPU")
    t = make_transport("nccl", master_address="localhost", master_port=29600, engines=1)
    with pytest.raises(ValueError, match="transport=shm"):
        t.connect()
    with pytest.raises(ValueError, match="not connected"):
        t.send(t)


@pytest.mark.parametrize("numbers", [{"engines": 0}, {"engines": 1, "engine_workers": 0}])
def test_an_nccl_transport_without_engines_is_refused(numbers):
    with pytest.raises(ValueError, match="needs engines: got"):
        NcclTransport(master_address="h", master_port=1, **numbers)


def test_the_last_port_is_taken_and_the_next_is_not():
    assert NcclTransport(master_address="h", master_port=65535, engines=1).world_size == 2
    with pytest.raises(ValueError, match="'h' and 65536"):
        NcclTransport(master_address="h", master_port=65536, engines=1)


def test_what_every_engine_is_told():
    t = NcclTransport(master_address="10.0.0.1", master_port=29600, engines=2, engine_workers=4, check=False)
    assert t.init_info(1) == {
        "check": False,
        "master_address": "10.0.0.1",
        "master_port": 29600,
        "rank_offset": 5,
        "world_size": 9,
    }
    with pytest.raises(ValueError, match=r"must be in 0\.\.1: got -1"):
        t.init_info(-1)


def test_a_communicator_without_nccl_is_refused():
    require_nccl(SimpleNamespace(disabled=False))
    with pytest.raises(WeightSyncError, match="VLLM_DISABLE_PYNCCL"):
        require_nccl(SimpleNamespace(disabled=True))


def test_closing_twice_is_allowed():
    t = NcclTransport(master_address="h", master_port=1, engines=1)
    t.group = SimpleNamespace()
    t.close()
    t.close()
    assert t.group is None


class Cuda:
    """Stands for streams and the group, in the order in which they are used."""

    def __init__(self):
        self.calls = []
        self.disabled = False

    def wait_stream(self, other):
        self.calls.append(("wait", other))

    def broadcast(self, flat, src, stream):
        self.calls.append(("broadcast", flat, src, stream))


@pytest.fixture
def connected(monkeypatch):
    """A transport that met its engines, on a host that only looks as if it had a GPU."""
    from vllm.distributed.weight_transfer import nccl_common

    cuda, met = Cuda(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "compute")
    monkeypatch.setattr(nccl_common, "trainer_init", lambda info: met.append(info) or cuda)
    t = NcclTransport(master_address="10.0.0.1", master_port=29600, engines=2)
    t.device = "cpu"
    t.connect()
    assert met == [{"master_address": "10.0.0.1", "master_port": 29600, "world_size": 3}]
    return t, cuda


BUCKET = [("a", torch.arange(3.0)), ("b", torch.ones(2, 2, dtype=torch.bfloat16))]


def test_a_bucket_is_one_broadcast_that_waits_for_its_packing(connected):
    t, cuda = connected
    staged = t.stage(BUCKET)
    layout = BucketLayout.from_dict(staged.update_info["layout"])
    assert {n: v.tolist() for n, v in layout.views(staged.handle)} == {n: v.tolist() for n, v in BUCKET}
    assert staged.checksums == {n: device_checksum(v) for n, v in BUCKET}
    assert staged.nbytes == 12 + 8
    assert 0 < staged.seconds_checking < 10
    t.send(staged)
    assert cuda.calls == [("wait", "compute"), ("broadcast", staged.handle, 0, cuda)]


def test_a_bucket_is_kept_until_the_broadcast_has_read_it(connected):
    t, cuda = connected
    kept = []
    t.release(Staged({}, {}, 0, 0.0, SimpleNamespace(record_stream=kept.append)))
    assert kept == [cuda]


def test_without_checks_nothing_is_summed_and_an_empty_bucket_is_a_byte(connected):
    t, _ = connected
    t.check = False
    assert t.stage(BUCKET).checksums == {}
    empty = t.stage([])
    assert (len(empty.handle), empty.handle.dtype, empty.nbytes) == (1, torch.uint8, 0)


def test_a_group_that_found_no_nccl_is_refused_on_connecting(connected):
    t, cuda = connected
    cuda.disabled = True
    with pytest.raises(WeightSyncError, match="found no NCCL"):
        t.connect()


def test_half_a_connection_is_none(connected):
    t, _ = connected
    for part in ("stream", "group"):
        kept = getattr(t, part)
        setattr(t, part, None)
        with pytest.raises(ValueError, match="not connected"):
            t.send(None)
        setattr(t, part, kept)
