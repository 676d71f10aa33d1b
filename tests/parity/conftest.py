"""The processes that the megatron parity tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from ranks import Crew


@pytest.fixture(scope="session")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """Megatron ranks that stay from test to test."""
    crew = Crew(Path(__file__).parent / "megatron_worker.py", tmp_path_factory.mktemp("crew"))
    yield crew
    crew.close()
