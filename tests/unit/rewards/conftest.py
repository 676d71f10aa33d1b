"""Prompts, completions and reward files for the tests of rewards."""

from __future__ import annotations

import numpy as np
import pytest

from gspo_dist.types import Completion, Prompt


def completion(text: str) -> Completion:
    n = len(text)
    return Completion(
        np.zeros(n, np.int64), np.ones(n, bool), np.zeros(n, np.float32), np.zeros(n, np.int32), "stop", text
    )


@pytest.fixture
def items_of():
    """Texts -> items with the ids 10, 11, ... and the prompts p0, p1, ..., whose answer is "3"."""

    def make(*texts: str):
        return [
            (10 + i, Prompt(f"p{i}", (1, 2), "1+2=", "3"), completion(text)) for i, text in enumerate(texts)
        ]

    return make


@pytest.fixture
def reward_file(tmp_path):
    """Source text -> the path of a file with it."""

    def write(body: str, name: str = "reward.py") -> str:
        file = tmp_path / name
        file.write_text(body)
        return str(file)

    return write
