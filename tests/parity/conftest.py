"""What the parity tests share: the megatron processes, and the table of what was measured.

    GSPO_PARITY_TABLE=FILE.md python -m pytest tests/parity

writes the largest deviation from the eager learner, layout by layout, under what the tests allow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parity.ranks import Crew


@pytest.fixture(scope="session")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """Megatron ranks that stay from test to test."""
    crew = Crew(Path(__file__).parent / "megatron_worker.py", tmp_path_factory.mktemp("crew"))
    yield crew
    crew.end()


COLUMNS = {
    "logits": "logits, nats (1e-4)",
    "logprobs": "log-probs, nats (1e-5)",
    "loss": "loss (1e-5)",
    "grad_norm": "gradient norm, relative (1e-5)",
    "weights": "weights after the steps, relative (1e-5)",
}
TABLE: dict[tuple[str, str], dict[str, float]] = {}


@pytest.fixture(scope="session")
def measured() -> Callable[..., None]:
    """measured(backend, layout, logits=..., ...): largest deviations that a test saw."""

    def note(backend: str, layout: str, **errors: float) -> None:
        TABLE.setdefault((backend, layout), {}).update(errors)

    return note


def pytest_sessionfinish() -> None:
    path = os.environ.get("GSPO_PARITY_TABLE")
    if not path or not TABLE:
        return
    lines = [
        "| learner | layout | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]
    for (backend, layout), errors in TABLE.items():
        cells = [f"{errors[c]:.1e}" if c in errors else "" for c in COLUMNS]
        lines.append(f"| {backend} | {layout} | {' | '.join(cells)} |")
    Path(path).write_text("\n".join(lines) + "\n")
