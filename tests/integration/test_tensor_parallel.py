"""An engine of two workers on a CPU: it computes what one does, takes weights, and leaves nothing behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.integration.hosts import Hosts, need_hosts

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_an_engine_of_two_workers_from_start_to_end(tmp_path: Path) -> None:
    """On a host of its own, so that all of its /dev/shm is this engine's."""
    need_hosts()
    with Hosts(1, tmp_path, {"PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}) as hosts:
        done = hosts[0].run(sys.executable, ROOT / "tests/integration/tp_engine.py", tmp_path, timeout=280)
        assert done.returncode == 0, done.stdout[-4000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (seen["workers"], seen["processes"]) == (2, 2)
    # vLLM computes a row of a matrix in two parts, which are added in another order than HF adds.
    assert seen["gap"] < 1e-5
    assert seen["moved"] > 0.1
    assert seen["gap after a sync"] < 1e-5
    # vLLM itself says "cancelled".
    assert "engine-0 lost one of its 2 tensor-parallel workers" in seen["says of a worker that was killed"]
    # No name while it runs means none after any end, also after a kill.
    assert seen["names while it runs"] == []
    assert (seen["names after its end"], seen["processes after its end"]) == ([], 0)
