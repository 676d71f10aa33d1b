"""Laws of the collective transport: gloo for real, in threads; nccl as far as no GPU is needed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from gspo_dist.weights import collective as collectives
from gspo_dist.weights import group as groups
from gspo_dist.weights.bucket import BucketLayout
from gspo_dist.weights.checksum import device_checksum, host_checksum
from gspo_dist.weights.collective import CHECKSUMS, CollectiveSource, CollectiveTransport
from gspo_dist.weights.group import Meeting, MissingRanks, TransferFailed
from gspo_dist.weights.send import make_transport, send_weights
from gspo_dist.weights.source import make_source
from gspo_dist.weights.stream import buckets

HERE = "127.0.0.1"


def gloo(engines=("engine-0", "engine-1"), **options) -> CollectiveTransport:
    told = {"address": HERE, "engines": list(engines), "timeout_s": 30.0} | options
    transport = make_transport("gloo", **told)
    assert isinstance(transport, CollectiveTransport)
    return transport


def meet(transport: CollectiveTransport, workers: int = 1) -> list[CollectiveSource]:
    """Every worker of every engine, connected."""
    with ThreadPoolExecutor(8) as pool:
        joining = [
            pool.submit(make_source, transport.init_info(i), worker)
            for i in range(len(transport.engines))
            for worker in range(workers)
        ]
        transport.connect()
        return [source.result() for source in joining]


@pytest.fixture
def pair():
    transport = gloo()
    sources = meet(transport)
    yield transport, sources
    for end in (*sources, transport):
        end.close()


def weights(seed: int) -> list[tuple[str, torch.Tensor]]:
    maker = torch.Generator().manual_seed(seed)
    return [
        ("a", torch.randn(300, generator=maker)),
        ("b", torch.randn(7, 5, generator=maker).bfloat16()),
        ("scalar", torch.tensor(float(seed))),
        ("empty", torch.zeros(0, 4)),
        ("wide", torch.randn(40, 100, generator=maker).half()),
    ]


def publish(transport, sources, tensors, bucket_bytes=500):
    got: list[dict[str, torch.Tensor]] = [{} for _ in sources]
    with ThreadPoolExecutor(len(sources)) as pool:

        def deliver(info) -> None:
            taken = [pool.submit(lambda source=source: source.begin(info)()) for source in sources]
            for into, future in zip(got, taken, strict=True):
                into.update(future.result())

        return send_weights(buckets(iter(tensors), bucket_bytes), transport, deliver), got


def test_every_engine_gets_every_bit_of_every_publication(pair) -> None:
    transport, sources = pair
    for seed in (1, 2):
        sent = dict(weights(seed))
        report, got = publish(transport, sources, list(sent.items()))
        assert report.checksums == {name: host_checksum(tensor) for name, tensor in sent.items()}
        for arrived in got:
            assert list(arrived) == list(sent)
            assert all(torch.equal(arrived[name], sent[name]) for name in sent)
            assert {n: sources[0].checksum(t) for n, t in arrived.items()} == report.checksums


def test_a_learner_that_changes_its_tensors_after_staging_sends_what_it_staged(pair) -> None:
    transport, sources = pair
    tensor = torch.ones(1000)
    staged = transport.stage([("a", tensor)])
    tensor.zero_()
    transport.send(staged)
    assert [source.begin(staged.update_info)()[0][1].sum().item() for source in sources] == [1000.0] * 2


def test_every_worker_of_every_engine_has_a_rank_of_its_own() -> None:
    """Three engines of two workers: the engines begin at the ranks 1, 3 and 5, rank 0 is the learner's."""
    transport = gloo(["a", "b", "c"], engine_workers=2)
    told = [transport.init_info(i) for i in range(3)]
    assert [info["first_rank"] for info in told] == [1, 3, 5]
    assert {info["meeting"]["world_size"] for info in told} == {transport.world_size} == {7}
    sources = meet(transport, workers=2)
    assert sorted(source.group.group.rank() for source in sources) == [1, 2, 3, 4, 5, 6]
    for i in (-1, 3):
        with pytest.raises(ValueError, match=f"engine index must be in 0..2: got {i}"):
            transport.init_info(i)
    for end in (*sources, transport):
        end.close()


def test_what_an_engine_is_told_is_plain_data_and_needs_no_other() -> None:
    transport = gloo(["a"], check=False, timeout_s=7.0)
    meeting = {
        "backend": "gloo",
        "address": HERE,
        "port": transport.store.port,
        "world_size": 2,
        "timeout_s": 7.0,
    }
    assert transport.init_info(0) == {
        "transport": "gloo", "check": False, "meeting": meeting, "first_rank": 1,
    }  # fmt: skip
    transport.close()


def test_an_engine_that_does_not_come_is_named_before_the_others_give_up() -> None:
    transport = gloo(["engine-0", "engine-1", "engine-2"], timeout_s=2.0)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(make_source, transport.init_info(0))
        start = time.perf_counter()
        with pytest.raises(
            TransferFailed, match=r"^engine-1, engine-2 did not come to the rendezvous .* 2 s"
        ):
            transport.connect()
        assert 1.4 < time.perf_counter() - start < 1.95  # 0.8 of the time
        transport.close()
        with pytest.raises(TransferFailed, match=r"rank 1 on .* could not meet the learner's exporter"):
            there.result(timeout=10)


def test_an_address_that_nobody_answers_is_told_within_the_time() -> None:
    info = gloo(["engine-0"]).init_info(0)
    info["meeting"] |= {"port": 1, "timeout_s": 1.0}
    start = time.perf_counter()
    with pytest.raises(TransferFailed, match=r"exporter by gloo at 127\.0\.0\.1:1 within 1 s .*any port"):
        make_source(info)
    assert time.perf_counter() - start < 10


def test_a_bucket_that_does_not_come_is_given_up_in_time_and_the_group_left_at_once(pair) -> None:
    transport, sources = pair
    info = transport.stage(weights(1)).update_info
    start = time.perf_counter()
    with pytest.raises(TransferFailed, match=r"a bucket did not arrive by gloo within 0\.5 s"):
        sources[0].begin({**info, "seconds": 0.5})()
    assert 0.4 < time.perf_counter() - start < 5
    start = time.perf_counter()
    sources[0].close()
    sources[0].close()
    assert time.perf_counter() - start < 1  # although its broadcast is still waiting
    with pytest.raises(TransferFailed, match="was closed: connect again"):
        sources[0].begin(info)()


def test_a_learner_that_leaves_is_noticed_and_its_engines_can_meet_a_new_one(pair) -> None:
    transport, sources = pair
    info = transport.stage(weights(1)).update_info
    transport.close()
    transport.close()
    with pytest.raises(TransferFailed, match="lost on its way by gloo"):
        sources[0].begin({**info, "seconds": 20.0})()
    again = gloo()
    sources = meet(again)
    _, got = publish(again, sources, weights(3))
    assert all(torch.equal(arrived["a"], weights(3)[0][1]) for arrived in got)
    for end in (*sources, again):
        end.close()


def test_a_transport_checks_what_it_sends_and_waits_ten_minutes_unless_it_is_told_otherwise() -> None:
    transport = CollectiveTransport("gloo", address=HERE, engines=["a"])
    assert (transport.check, transport.meeting.timeout_s) == (True, 600.0)
    assert transport.store.timeout.total_seconds() == 600.0
    transport.close()


def test_every_engine_that_lacks_a_worker_is_named_once(monkeypatch) -> None:
    """Ranks 1 to 3 are a's, 4 to 6 b's, 7 to 9 c's."""

    def join(*told):
        raise MissingRanks([3, 7, 9])

    monkeypatch.setattr(collectives, "join", join)
    transport = gloo(["a", "b", "c"], engine_workers=3)
    with pytest.raises(TransferFailed, match=r"^a, c did not come"):
        transport.connect()
    transport.close()


def test_a_worker_joins_at_its_own_rank_and_the_first_one_at_its_engines(monkeypatch) -> None:
    ranks: list[int] = []
    monkeypatch.setattr(collectives, "join", lambda told, rank: ranks.append(rank))
    transport = gloo(["a", "b"], engine_workers=2)
    for worker in ((), (1,)):
        assert CollectiveSource(transport.init_info(1), *worker).arrives_later is True
    assert ranks == [3, 4]
    transport.close()


def test_a_bucket_is_timed_while_it_is_summed_and_an_empty_one_is_a_byte(monkeypatch) -> None:
    """The clock of the test goes on by 2 s a look."""
    monkeypatch.setattr(collectives, "time", SimpleNamespace(perf_counter=iter((5.0, 7.0)).__next__))
    left: list[str] = []
    transport = gloo(["a"])
    transport.group = SimpleNamespace(device=torch.device("cpu"), close=lambda: left.append("group"))
    staged = transport.stage([("empty", torch.zeros(0, 4))])
    assert (len(staged.handle.buffer), staged.nbytes, staged.seconds_checking) == (1, 0, 2.0)
    transport.close()
    transport.close()
    assert left == ["group"]


def test_a_bucket_arrives_on_the_groups_device_and_an_empty_one_is_a_byte_there_too(monkeypatch) -> None:
    taken: list[torch.Tensor] = []
    group = SimpleNamespace(device=torch.device("meta"), broadcast=taken.append)
    monkeypatch.setattr(collectives, "join", lambda told, rank: group)
    transport = gloo(["a"])
    source = CollectiveSource(transport.init_info(0))
    for tensor in (torch.zeros(0, 4), torch.zeros(16)):
        source.begin({"layout": BucketLayout.of([("t", tensor)]).to_dict()})
    assert [(buffer.device.type, len(buffer)) for buffer in taken] == [("meta", 1), ("meta", 64)]
    transport.close()


def test_nothing_is_staged_before_the_engines_were_met() -> None:
    transport = gloo(["engine-0"])
    with pytest.raises(ValueError, match="gloo transport is not connected"):
        transport.stage(weights(1))
    transport.close()


@pytest.mark.parametrize("wrong", [{"address": ""}, {"engines": []}, {"engine_workers": 0}])
def test_arguments_without_a_group_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="needs the learner's address and engines of at least one worker"):
        gloo(**wrong)


def test_nccl_without_a_gpu_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"needs a GPU on the learner: set .*=gloo"):
        CollectiveTransport("nccl", address=HERE, engines=["engine-0"])
    with pytest.raises(ValueError, match=r"is one of \('nccl', 'gloo'\): got 'mpi'"):
        CollectiveTransport("mpi", address=HERE, engines=["engine-0"])


def test_both_sides_sum_where_the_bytes_lie() -> None:
    assert {"nccl": device_checksum, "gloo": host_checksum} == CHECKSUMS


class Cuda:
    """Stands for vLLM's communicator and a stream."""

    def __init__(self) -> None:
        self.calls, self.disabled = [], False


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    """A host that only looks as if it had a GPU."""
    from vllm.distributed.device_communicators import pynccl, pynccl_wrapper

    cuda = Cuda()
    unique = SimpleNamespace(ncclGetUniqueId=lambda: bytes(range(128)))
    comm = SimpleNamespace(from_unique_id_bytes=lambda *told: cuda.calls.append(("met", *told)) or cuda)
    monkeypatch.setattr(pynccl, "PyNcclCommunicator", comm)
    monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", lambda: unique)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: cuda)
    return cuda


def test_nccl_meets_by_the_learners_id_at_the_same_store(cuda) -> None:
    meeting = Meeting("nccl", HERE, 1, 2, 5.0)
    store = groups.open_store(HERE, 5.0)
    meeting = Meeting("nccl", HERE, store.port, 2, 5.0)
    other = threading.Thread(target=groups.join, args=(meeting, 1))
    other.start()
    groups.join(meeting, 0, store)
    other.join()
    device = torch.device("cuda", 3)
    assert sorted(call for call in cuda.calls if call[0] == "met") == [
        ("met", bytes(range(128)), rank, 2, device) for rank in (0, 1)
    ]


def test_a_bucket_goes_in_one_broadcast(pair) -> None:
    transport, _ = pair
    sent = []
    transport.group = SimpleNamespace(device=torch.device("cpu"), broadcast=sent.append, close=lambda: None)
    report = send_weights(buckets(iter(weights(1)), 1 << 20), transport, lambda info: None)
    assert [len(buffer) for buffer in sent] == [BucketLayout.of(weights(1)).nbytes]
    assert report.tensors == 5


EXIT = """
import sys
from tests.unit.weights.test_collective import gloo, meet, weights
transport = gloo()
sources = meet(transport)
staged = transport.stage(weights(1))
transport.send(staged)
arriving = [source.begin(staged.update_info) for source in sources]
assert all(len(arrived()) == 5 for arrived in arriving)
if "close" in sys.argv:
    for end in (*sources, transport):
        end.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["close", "leave it open"])
def test_a_process_with_a_group_ends_in_order(how) -> None:
    """torch 2.13's gloo group aborts the process when it lives at exit, or is destroyed by a thread then."""
    done = subprocess.run([sys.executable, "-c", EXIT, how], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
