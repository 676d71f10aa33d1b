"""Shared memory without a name lives as long as its processes and leaves nothing behind."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from gspo_dist.rollout.vllm.shared_memory import FOLDER, unname

CHILD = """
import mmap, sys
file = open(sys.argv[1], "r+b")
mapped = mmap.mmap(file.fileno(), 0)
print("up", flush=True)
input()
"""


@pytest.fixture
def name():
    name = f"psm_{uuid.uuid4().hex}"
    yield name
    (FOLDER / name).unlink(missing_ok=True)


def make(name: str) -> Path:
    path = FOLDER / name
    path.write_bytes(b"x" * 4096)
    return path


def test_what_this_process_has_mapped_loses_its_name_and_keeps_its_content(name) -> None:
    with make(name).open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    assert name in unname()
    assert not (FOLDER / name).exists()
    assert mapped[:3] == b"xxx"
    mapped.close()
    assert name not in unname()


def test_so_does_what_a_child_has_mapped_and_nothing_of_others(name) -> None:
    path, foreign, other = make(name), make("psm_" + uuid.uuid4().hex), make(f"gspo-{os.getpid()}-test")
    try:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        with other.open("r+b") as file:
            mine = mmap.mmap(file.fileno(), 0)  # of this process, and not vLLM's
        assert name in unname()
        assert (path.exists(), foreign.exists(), other.exists()) == (False, True, True)
        mine.close()
        child.communicate("\n")
    finally:
        foreign.unlink()
        other.unlink()
