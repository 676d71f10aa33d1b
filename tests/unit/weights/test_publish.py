"""Laws of a publication over shared memory: what arrives, what stays behind, what an error does."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from gspo_dist.weights.bucket import BucketLayout
from gspo_dist.weights.checksum import host_checksum
from gspo_dist.weights.send import make_transport, send_weights
from gspo_dist.weights.shm import ShmTransport, create_file, map_bucket
from gspo_dist.weights.stream import buckets
from gspo_dist.weights.verify import WeightSyncError


def weights(n=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    kinds = [torch.float32, torch.bfloat16, torch.float32]
    return [(f"layer.{i}.weight", torch.randn(i + 1, 3, generator=g).to(kinds[i % 3])) for i in range(n)]


@pytest.fixture
def transport(tmp_path):
    return ShmTransport(folder=tmp_path)


def test_what_arrives_is_what_was_sent_bit_for_bit(transport, tmp_path):
    sent, got = weights(), {}
    report = send_weights(
        buckets(iter(sent), 100),
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
    with pytest.raises(WeightSyncError, match="layer.0.weight twice"):
        send_weights([weights(1), weights(1)], transport, lambda info: None)
    assert not list(tmp_path.iterdir())


def test_without_checks_nothing_is_summed(tmp_path):
    report = send_weights([weights(3)], ShmTransport(check=False, folder=tmp_path), lambda info: None)
    assert report.checksums == {}
    assert report.tensors == 3


def test_the_source_may_change_while_a_bucket_flies(transport):
    """The file is a copy: an optimiser step after staging does not reach the engines."""
    tensor = torch.ones(4)
    staged = transport.stage([("w", tensor)])
    tensor.zero_()
    assert torch.equal(map_bucket(staged.update_info)[0][1], torch.ones(4))
    assert staged.checksums["w"] == host_checksum(torch.ones(4))
    transport.release(staged)


def test_a_mapping_outlives_its_file(transport):
    staged = transport.stage([("w", torch.arange(5.0))])
    [(_, mapped)] = map_bucket(staged.update_info)
    transport.release(staged)
    assert not Path(staged.update_info["path"]).exists()
    assert torch.equal(mapped, torch.arange(5.0))


def test_a_bucket_of_another_host_is_named(transport):
    staged = transport.stage([("w", torch.zeros(1))])
    transport.release(staged)
    with pytest.raises(ValueError, match="engines on the learner's host"):
        map_bucket(staged.update_info)


def test_a_torn_file_is_refused(transport):
    staged = transport.stage([("w", torch.zeros(1000))])
    with open(staged.update_info["path"], "r+b") as f:
        f.truncate(64)
    with pytest.raises(ValueError, match="torn write"):
        map_bucket(staged.update_info)
    transport.close()


def test_no_room_is_an_error_with_a_way_out_not_a_crash(tmp_path):
    shm = Path("/dev/shm") / "gspo-test-no-room"
    with pytest.raises(ValueError, match="bucket_mib"):
        create_file(shm, 1 << 50)
    assert not shm.exists()


def test_offsets_of_the_docstring_example():
    layout = BucketLayout.of([("a", torch.zeros(3)), ("b", torch.zeros(2, 2, dtype=torch.bfloat16))])
    assert (layout.offsets, layout.nbytes) == ((0, 64), 128)
    assert layout.dtypes == ("float32", "bfloat16")


def test_scalars_and_empty_tensors_travel(transport):
    sent = [("scalar", torch.tensor(3.0)), ("empty", torch.zeros(0, 4)), ("last", torch.ones(2))]
    got = {}
    send_weights([sent], transport, lambda info: got.update(map_bucket(info)))
    assert got["scalar"].shape == ()
    assert float(got["scalar"]) == 3.0
    assert got["empty"].shape == (0, 4)
    assert torch.equal(got["last"], torch.ones(2))


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


def test_unknown_transports_are_refused():
    with pytest.raises(ValueError, match="shm or nccl"):
        make_transport("auto")
    with pytest.raises(ValueError, match="takes no"):
        make_transport("shm", master_port=3)


def test_the_buckets_of_a_killed_sender_are_swept_and_those_of_a_living_one_are_not(tmp_path):
    script = (
        "import sys, torch; from pathlib import Path; from gspo_dist.weights.shm import ShmTransport\n"
        "ShmTransport(folder=Path(sys.argv[1])).stage([('w', torch.zeros(8))]); print('staged', flush=True)\n"
        "input()"
    )
    sender = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert sender.stdout.readline() == "staged\n"
        ShmTransport(folder=tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
    finally:
        sender.kill()
        sender.communicate()
    ShmTransport(folder=tmp_path)
    assert not list(tmp_path.iterdir())
