"""What starts real engines or several processes is slow, whether or not its file says so."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

SLOW = ("integration", "parity")
"""Folders whose tests take seconds to minutes each. One unmarked file more than doubles the quick run."""
QUICK = ("test_launchers.py",)
"""Files in them that start shell scripts only."""
ALONE = (
    "test_cluster.py",
    "test_hosts.py",
    "test_lost_engines.py",
    "test_quickstart.py",
    "test_suites_beside.py",
    "test_sync_hosts.py",
)
"""Files whose tests start a Ray cluster, Slurm, several hosts or kill processes: more than a core each."""


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        if folder in SLOW and item.path.name not in QUICK:
            item.add_marker(pytest.mark.slow)
        if item.path.name in ALONE:
            item.add_marker(pytest.mark.alone)
        if item.get_closest_marker("alone") and folder != "integration":
            raise pytest.UsageError(
                "tests that run alone must be in tests/integration, where launch/test.sh looks: got "
                f"{item.nodeid}"
            )
    if hasattr(config, "workerinput"):
        # Files are handed out in this order, so the last ones are short and all workers end together.
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (item.path.parent.name not in SLOW, item.path not in slow))


def pytest_collection_finish() -> None:
    """Collections of garbage pass over the imported libraries, which takes a twentieth off the quick run."""
    gc.freeze()
