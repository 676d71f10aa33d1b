"""Laws of checkpoints: whole or not there, kept in number, torn ones told, one writer per run folder."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_dist import checkpoint
from gspo_dist.checkpoint import FORMAT, Checkpoint, CheckpointStore, hold

STATE = {"policy_version": 12, "cursor": {"epoch": 1, "order": [2, 0, 1]}, "seconds": 0.5}


def save(store: CheckpointStore, step: int, state=STATE) -> Path:
    partial = store.begin(step)
    (partial / "learner" / "rank-0").mkdir()
    (partial / "learner" / "rank-0" / "weights.bin").write_bytes(bytes(100))
    return store.commit(partial, step, state)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "run", keep=2)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.root.iterdir())


def test_what_was_saved_comes_back(store):
    folder = save(store, 40)
    found = store.newest()
    assert found is not None
    assert (found.folder, found.step) == (folder, 40)
    assert folder == store.root / "step-000040"
    assert {key: found.state[key] for key in STATE} == STATE
    assert (found.learner / "rank-0" / "weights.bin").read_bytes() == bytes(100)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"] == {"rank-0/weights.bin": 100}
    assert (manifest["format"], FORMAT) == (2, 2)


def test_a_save_leaves_no_file_open(store):
    before = os.listdir("/proc/self/fd")
    save(store, 10)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_folders_of_other_names_are_not_read(store):
    save(store, 10)
    for name in ("step-backup", "step-x00020"):
        (store.root / name).mkdir()
    assert store.newest().step == 10


def test_nothing_saved_is_no_checkpoint(store):
    assert store.newest() is None
    store.root.mkdir(parents=True)
    assert store.newest() is None


def test_an_unfinished_checkpoint_is_none(store):
    save(store, 10)
    partial = store.begin(20)
    (partial / "learner" / "weights.bin").write_bytes(bytes(7))
    assert store.newest().step == 10
    again = store.begin(20)
    assert list((again / "learner").iterdir()) == []
    assert again == partial


def test_the_newest_is_the_highest_step(store):
    for step in (999_999, 1_000_000):  # seven digits sort before six as text
        save(store, step)
    assert store.newest().step == 1_000_000


def test_the_oldest_beyond_keep_go_when_a_newer_one_is_whole(store):
    for step in (10, 20):
        save(store, step)
    store.begin(30)
    assert names(store) == [".step-000030.partial", "step-000010", "step-000020"]
    save(store, 30)
    assert names(store) == ["step-000020", "step-000030"]


def test_the_same_step_may_be_saved_again(store):
    save(store, 10, STATE | {"policy_version": 1})
    save(store, 10, STATE | {"policy_version": 2})
    assert store.newest().state["policy_version"] == 2
    assert names(store) == ["step-000010"]


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(store, monkeypatch):
    """Every call that touches the disk fails in turn.

    The newest is then the old one or the new one, whole.
    """
    seen = set()
    for name in ("os.replace", "os.fsync", "gspo_dist.files.os.fsync", "shutil.rmtree", "os.open"):
        for fatal in range(8):
            save(store, 10)
            partial = store.begin(20)
            (partial / "learner" / "weights.bin").write_bytes(bytes(9))
            with monkeypatch.context() as patched:
                calls = iter(range(1000))
                module, _, attribute = name.rpartition(".")
                target = {"os": os, "gspo_dist.files.os": os, "shutil": checkpoint.shutil}[module]
                real = getattr(target, attribute)

                def dying(*args, real=real, calls=calls, fatal=fatal, **kwargs):
                    if next(calls) == fatal:
                        raise KeyboardInterrupt
                    return real(*args, **kwargs)

                patched.setattr(target, attribute, dying)
                with contextlib.suppress(KeyboardInterrupt):
                    store.commit(partial, 20, STATE)
            seen.add(store.newest().step)
            checkpoint.shutil.rmtree(store.root)
    assert seen == {10, 20}


def test_everything_is_on_the_disk_before_it_gets_its_name(store, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real_sync(handle)

    def replace(source, target):
        events.append(f"-> {Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    save(store, 10)
    named = events.index("-> step-000010")
    assert {"manifest.json", "learner", "rank-0", "weights.bin", ".step-000010.partial"} <= set(
        events[:named]
    )
    assert events[named + 1 :] == ["checkpoints"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "manifest.json").write_text(""), "manifest.json is torn (0 bytes that are no JSON)"),
        (lambda f: (f / "manifest.json").write_text('{"format": 2, "st'), "(17 bytes that are no JSON)"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json names no step"),
        (lambda f: (f / "manifest.json").write_text('{"format": 2}'), "manifest.json names no step"),
        (
            lambda f: (f / "manifest.json").write_text('{"format": 7, "step": 3}'),
            "has format 7, and this version reads 2",
        ),
        (lambda f: (f / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda f: (f / "learner/rank-0/weights.bin").unlink(), "learner/rank-0/weights.bin is missing"),
        (
            lambda f: (f / "learner/rank-0/weights.bin").write_bytes(bytes(99)),
            "learner/rank-0/weights.bin is torn (99 of 100 bytes)",
        ),
    ],
)
def test_a_torn_checkpoint_is_told_and_the_whole_one_before_it_named(store, damage, words):
    first, second = save(store, 10), save(store, 20)
    damage(second)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        store.newest()
    assert str(caught.value).startswith(f"checkpoint {second} must be whole: ")
    assert str(caught.value).endswith(f"; remove it to go on from {first}")
    damage(first)
    with pytest.raises(ValueError, match="start a new run_dir"):
        store.newest()


def test_a_file_that_was_seen_too_small_is_whole(store):
    """Another host's file may look shorter than it is to the host that writes the manifest."""
    folder = save(store, 10)
    (folder / "learner" / "rank-0" / "weights.bin").write_bytes(bytes(101))
    assert isinstance(store.newest(), Checkpoint)


def test_a_manifest_without_a_list_of_files_is_read(store):
    folder = save(store, 10)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert store.newest().step == 10


def fill_the_disk(*_):
    with open("/dev/full", "wb") as disk:
        disk.write(b"one byte too many")


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_is_told_with_its_way_out_and_loses_nothing_finished(store, monkeypatch, earlier):
    if earlier:
        first = save(store, 10)
    partial = store.begin(20)
    monkeypatch.setattr(checkpoint, "write_text", fill_the_disk)
    with pytest.raises(OSError, match=r"free space or lower checkpoint\.keep \(now 2\)") as caught:
        store.commit(partial, 20, STATE)
    assert caught.value.errno == errno.ENOSPC
    assert f"no room to save a checkpoint below {store.root}: No space left on device at" in str(caught.value)
    assert (f"{first} is safe" if earlier else "none was saved before") in str(caught.value)
    assert not partial.exists()
    monkeypatch.undo()
    assert save(store, 20) == store.newest().folder


def test_other_errors_pass_a_save_as_they_are(store):
    partial = store.begin(20)
    with pytest.raises(PermissionError, match=r"^not yours$"), store.saving(partial):
        raise PermissionError("not yours")
    assert partial.exists()


def test_a_run_folder_has_one_writer(tmp_path):
    held = hold(tmp_path)
    with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on .*choose another run_dir"):
        hold(tmp_path)
    held.close()
    hold(tmp_path).close()


def test_a_killed_process_lets_go_and_leaves_no_name_behind(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from gspo_dist.checkpoint import hold\n"
        "held = hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {other.pid} on "):
            hold(tmp_path)
        other.kill()
    with hold(tmp_path):
        assert str(other.pid) not in (tmp_path / ".lock").read_text()
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, caplog, number):
    def refuse(file, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint.fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), hold(tmp_path) as lock:
        assert not lock.closed
    assert f"run_dir {tmp_path} lies on a file system without locks" in caplog.text


def test_another_failure_to_lock_is_an_error(tmp_path, monkeypatch):
    def refuse(file, flags):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(checkpoint.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken disk"):
        hold(tmp_path)
