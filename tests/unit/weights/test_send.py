"""Laws of sending: what arrives is bitwise what was sent, in any bucket size; an error leaves nothing."""

import json
import threading
import time

import pytest
import torch

from gspo_dist.rollout.engine import SyncReceipt
from gspo_dist.weights.checksum import host_checksum
from gspo_dist.weights.send import make_transport, send_weights
from gspo_dist.weights.shm import ShmTransport, map_bucket
from gspo_dist.weights.stream import buckets
from gspo_dist.weights.transport import Staged
from gspo_dist.weights.verify import WeightSyncError, verify_receipt


def weights(n=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    kinds = [torch.float32, torch.bfloat16, torch.float32]
    return [(f"layer.{i}.weight", torch.randn(i + 1, 3, generator=g).to(kinds[i % 3])) for i in range(n)]


@pytest.fixture
def transport(tmp_path):
    return ShmTransport(folder=tmp_path)


@pytest.mark.parametrize("bucket_bytes", [1, 60, 100, 1 << 20])
def test_what_arrives_is_what_was_sent_bit_for_bit(transport, tmp_path, bucket_bytes):
    sent, got = weights(), {}
    report = send_weights(
        buckets(iter(sent), bucket_bytes),
        transport,
        lambda info: got.update({n: t.clone() for n, t in map_bucket(json.loads(json.dumps(info)))}),
    )
    assert list(got) == [n for n, _ in sent]
    assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in sent)
    assert report.checksums == {n: host_checksum(t) for n, t in sent}
    assert (report.tensors, report.bytes) == (9, sum(t.nbytes for _, t in sent))
    assert not list(tmp_path.iterdir())


def test_at_most_two_buckets_are_alive(transport, tmp_path):
    alive = []

    def deliver(info):
        alive.append(len(list(tmp_path.iterdir())))

    def slow_source():
        for bucket in buckets(iter(weights(20)), 40):
            alive.append(len(list(tmp_path.iterdir())))
            yield bucket

    send_weights(slow_source(), transport, deliver)
    assert max(alive) <= 2
    assert len(alive) > 10


def test_the_next_bucket_is_staged_while_one_is_delivered(transport):
    staged_second, order = threading.Event(), []
    stage = transport.stage

    def noting(bucket):
        order.append(bucket[0][0])
        if len(order) == 2:
            staged_second.set()
        return stage(bucket)

    transport.stage = noting
    waits = []
    send_weights(
        [[("a", torch.zeros(1))], [("b", torch.zeros(1))]],
        transport,
        lambda info: waits.append(staged_second.wait(20)),
    )
    assert waits == [True, True]


@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_an_engine_error_gets_out_and_leaves_no_file(transport, tmp_path, fail_at):
    calls = []

    def deliver(info):
        calls.append(info)
        if len(calls) == fail_at + 1:
            raise TimeoutError("engine 1 did not answer")

    with pytest.raises(TimeoutError, match="engine 1"):
        send_weights(buckets(iter(weights()), 60), transport, deliver)
    assert len(calls) == fail_at + 1
    assert not list(tmp_path.iterdir())


def test_a_learner_error_leaves_no_file(transport, tmp_path):
    def broken():
        yield weights(1)
        yield weights(2)[1:]
        raise RuntimeError("gather failed")

    with pytest.raises(RuntimeError, match="gather failed"):
        send_weights(broken(), transport, lambda info: None)
    assert not list(tmp_path.iterdir())


def test_a_tensor_sent_twice_is_refused(transport, tmp_path):
    with pytest.raises(WeightSyncError, match=r"layer\.0\.weight twice"):
        send_weights([weights(1), weights(1)], transport, lambda info: None)
    assert not list(tmp_path.iterdir())


def test_without_checks_nothing_is_summed(tmp_path):
    report = send_weights([weights(3)], ShmTransport(check=False, folder=tmp_path), lambda info: None)
    assert report.checksums == {}
    assert report.tensors == 3


def test_scalars_and_empty_tensors_travel(transport):
    sent = [("scalar", torch.tensor(3.0)), ("empty", torch.zeros(0, 4)), ("last", torch.ones(2))]
    got = {}
    send_weights([sent], transport, lambda info: got.update(map_bucket(info)))
    assert got["scalar"].shape == ()
    assert float(got["scalar"]) == 3.0
    assert got["empty"].shape == (0, 4)
    assert torch.equal(got["last"], torch.ones(2))


def test_unknown_transports_are_refused():
    with pytest.raises(ValueError, match="shm, gloo or nccl once resolved"):
        make_transport("auto")
    with pytest.raises(ValueError, match="takes no"):
        make_transport("shm", master_port=3)


class Engine:
    """Takes what `map_bucket` gives; `spoil` stands for its memory, its network, its loader."""

    def __init__(self, version, spoil=lambda got: None):
        self.version, self.spoil, self.got = version, spoil, {}

    def update_weights(self, info):
        self.got.update({name: tensor.clone() for name, tensor in map_bucket(info)})

    def receipt(self):
        self.spoil(self.got)
        sums = {name: host_checksum(tensor) for name, tensor in self.got.items()}
        return SyncReceipt(self.version, sums, len(sums), 0, 0.0)


def flip(got):
    got["layer.4.weight"].view(torch.uint8)[0, 0] ^= 1


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Engine(3, flip), r"engine-1 received other bytes for layer\.4\.weight in version 3"),
        (
            Engine(3, lambda got: got.pop("layer.2.weight")),
            r"engine-1 did not receive layer\.2\.weight",
        ),
        (Engine(2), "engine-1 reports policy version 2 after a sync of version 3"),
        (Engine(3, lambda got: got.update(x=torch.zeros(1))), "engine-1 received x, which was not sent"),
    ],
)
def test_a_publication_that_went_wrong_names_tensor_and_engine(transport, engine, message):
    report = send_weights(buckets(iter(weights()), 60), transport, engine.update_weights)
    with pytest.raises(WeightSyncError, match=message):
        verify_receipt(report.checksums, engine.receipt(), 3, engine="engine-1")


def test_a_publication_that_went_right_passes(transport):
    engine = Engine(3)
    report = send_weights(buckets(iter(weights()), 60), transport, engine.update_weights)
    verify_receipt(report.checksums, engine.receipt(), 3, engine="engine-1")


class Log:
    """A transport that writes down what it is asked; checking takes it a quarter of a second each time."""

    name = "log"

    def __init__(self):
        self.calls = []

    def stage(self, bucket):
        self.calls.append(("stage", bucket[0][0]))
        return Staged(
            {"first": bucket[0][0]}, {n: len(n) for n, _ in bucket}, 10 * len(bucket), 0.25, bucket[0][0]
        )

    def send(self, staged):
        self.calls.append(("send", staged.handle))

    def release(self, staged):
        self.calls.append(("release", staged.handle))


def test_every_bucket_is_staged_sent_delivered_and_released_in_order():
    transport, told = Log(), []

    def deliver(info):
        time.sleep(0.05)  # so that staging the next bucket does not wait for it
        told.append(info["first"])

    names = ["a", "b", "c"]
    report = send_weights([[(n, torch.zeros(1))] for n in names], transport, deliver)
    assert told == names
    assert transport.calls == [
        ("stage", "a"),
        ("send", "a"),
        ("stage", "b"),
        ("release", "a"),
        ("send", "b"),
        ("stage", "c"),
        ("release", "b"),
        ("send", "c"),
        ("release", "c"),
    ]
    assert report.checksums == {"a": 1, "b": 1, "c": 1}
    assert (report.tensors, report.bytes, report.seconds_checking) == (3, 30, 0.75)


def test_the_second_bucket_is_not_sent_before_the_first_has_been_taken():
    transport, open_gate = Log(), threading.Event()

    def deliver(info):
        if info["first"] == "a":
            assert open_gate.wait(20)
            time.sleep(0.05)
            transport.calls.append(("taken", "a"))

    def source():
        yield [("a", torch.zeros(1))]
        open_gate.set()
        yield [("b", torch.zeros(1))]

    send_weights(source(), transport, deliver)
    assert transport.calls.index(("taken", "a")) < transport.calls.index(("send", "b"))


def test_an_error_of_the_sender_is_heard_although_a_delivery_hangs():
    transport, over = Log(), threading.Event()

    def source():
        yield [("a", torch.zeros(1))]
        raise RuntimeError("gather failed")

    start = time.perf_counter()
    with pytest.raises(RuntimeError, match="gather failed"):
        send_weights(source(), transport, lambda info: over.wait(30))
    assert time.perf_counter() - start < 10
    over.set()
    assert transport.calls[-1] == ("release", "a")


def test_a_publication_of_nothing_is_empty():
    report = send_weights([], Log(), lambda info: None)
    assert (report.checksums, report.tensors, report.bytes, report.seconds_checking) == ({}, 0, 0, 0.0)


def test_transports_are_made_by_name():
    assert make_transport("shm").name == "shm"
    assert make_transport("shm").check
    assert not make_transport("shm", check=False).check
    gloo = make_transport("gloo", check=False, address="127.0.0.1", engines=["engine-0"])
    assert (gloo.name, gloo.check, gloo.engine_workers, gloo.world_size) == ("gloo", False, 1, 2)
    gloo.close()
