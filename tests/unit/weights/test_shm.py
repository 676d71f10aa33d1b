"""Laws of the shm transport: a bucket is a file that is whole, is a copy, and goes when it is released."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gspo_dist.weights import shm
from gspo_dist.weights.checksum import host_checksum
from gspo_dist.weights.shm import ShmTransport, create_file, map_bucket


@pytest.fixture
def transport(tmp_path):
    return ShmTransport(folder=tmp_path)


def test_the_source_may_change_while_a_bucket_flies(transport):
    """The file is a copy: an optimiser step after staging does not reach the engines."""
    tensor = torch.ones(4)
    staged = transport.stage([("w", tensor)])
    tensor.zero_()
    assert torch.equal(map_bucket(staged.update_info)[0][1], torch.ones(4))
    assert staged.checksums["w"] == host_checksum(torch.ones(4))
    transport.release(staged)


def test_a_copy_that_went_wrong_has_another_checksum_than_was_sent(transport, monkeypatch):
    """Sums are of what the learner holds, so the engine, which sums what it reads, refuses a torn copy."""
    monkeypatch.setattr(shm.BucketLayout, "fill", lambda layout, buffer, bucket: buffer.zero_())
    staged = transport.stage([("w", torch.ones(4))])
    [(_, read)] = map_bucket(staged.update_info)
    assert staged.checksums["w"] == host_checksum(torch.ones(4)) != host_checksum(read)
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
    shm = Path("/dev/shm") / f"no-room-{os.getpid()}"  # tests may run side by side
    with pytest.raises(
        ValueError,
        match=r"no room for a weight bucket: 1073741824 MiB wanted, \d+ MiB free; lower .*bucket_mib",
    ):
        create_file(shm, 1 << 50)
    assert not shm.exists()


@pytest.mark.slow
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


def test_what_the_engines_are_told_of_a_bucket(transport, tmp_path):
    bucket = [("w", torch.zeros(3)), ("v", torch.ones(2, dtype=torch.bfloat16))]
    first, second = transport.stage(bucket), transport.stage(bucket)
    assert first.update_info["host"] == socket.gethostname()
    assert Path(first.update_info["path"]).stat().st_size == 128
    assert first.update_info["path"] != second.update_info["path"]
    assert first.nbytes == 3 * 4 + 2 * 2
    assert first.checksums == {n: host_checksum(t) for n, t in bucket}
    assert first.seconds_checking > 0
    assert transport.init_info(0) == transport.init_info(7) == {"transport": "shm", "check": True}
    transport.release(first)
    transport.release(first)
    assert [p.name for p in tmp_path.iterdir()] == [Path(second.update_info["path"]).name]
    transport.close()
    transport.close()
    assert not list(tmp_path.iterdir())


def test_closing_leaves_the_buckets_of_other_senders(tmp_path):
    one, other = ShmTransport(folder=tmp_path), ShmTransport(folder=tmp_path)
    one.stage([("w", torch.zeros(1))])
    kept = other.stage([("w", torch.zeros(1))])
    one.close()
    assert [str(p) for p in tmp_path.iterdir()] == [kept.update_info["path"]]


def test_what_another_has_removed_meanwhile_is_no_error(transport, monkeypatch):
    """Two senders that start together sweep the same files."""
    gone = Path(f"gspo-{shm._pid_namespace()}-999999999-aa-0")
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [folder / gone])
    transport.close()
    ShmTransport(folder=transport.folder)


def test_without_checks_nothing_is_summed(tmp_path):
    transport = ShmTransport(check=False, folder=tmp_path)
    assert transport.stage([("w", torch.zeros(1))]).checksums == {}
    assert transport.init_info(0) == {"transport": "shm", "check": False}


def test_a_bucket_that_cannot_be_written_leaves_no_file(transport, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("copy failed")

    monkeypatch.setattr(shm.BucketLayout, "fill", fail)
    with pytest.raises(RuntimeError, match="copy failed"):
        transport.stage([("w", torch.zeros(1))])
    assert not list(tmp_path.iterdir())


def test_the_mapping_is_private(transport):
    staged = transport.stage([("w", torch.zeros(4))])
    [(_, one)], [(_, other)] = map_bucket(staged.update_info), map_bucket(staged.update_info)
    one.fill_(1)
    assert torch.equal(other, torch.zeros(4))
    transport.close()


def test_an_empty_bucket_has_no_tensors(transport):
    staged = transport.stage([])
    assert map_bucket(staged.update_info) == []
    assert (staged.nbytes, staged.checksums) == (0, {})
    transport.release(staged)


def test_a_file_is_made_whole_and_for_its_owner_only(tmp_path):
    path = tmp_path / "f"
    create_file(path, 4096 * 3 + 1)
    assert path.stat().st_size == 4096 * 3 + 1
    assert path.stat().st_blocks * 512 >= 4096 * 3 + 1  # the pages are there already
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        create_file(path, 1)


def test_another_error_of_the_file_system_gets_out_and_leaves_no_file(tmp_path, monkeypatch):
    def fail(fd, offset, nbytes):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match="Input/output"):
        create_file(tmp_path / "f", 10)
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_never_swept(tmp_path):
    ours = f"gspo-{shm._pid_namespace()}"
    kept = [f"{ours}-{os.getpid()}-aa-0", f"{ours}-x-aa-0", "gspo-1-999999999-aa-0", "other"]
    for name in [*kept, f"{ours}-999999999-aa-0"]:
        (tmp_path / name).write_text("x")
    ShmTransport(folder=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
