"""A small model folder and a reward file, shared by the tests that run the whole loop in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_dist.coldstart.model import build_model, save_model
from gspo_dist.coldstart.recipes import Shape
from gspo_dist.coldstart.tokenizer import build_tokenizer

REWARD = '''
def share_of_sevens(prompt, completion):
    """Learnable at once from a random policy: the share of the digit 7."""
    return completion.text.count("7") / max(1, len(completion))

def spread(prompt, completion):
    """Nothing to learn, but every group has better and worse ones from the first step on."""
    return int(sum(completion.token_ids)) % 7 / 7

def broken(prompt, completion):
    raise KeyError("no such key")
'''


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shape = Shape(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, expert_hidden=16)
    save_model(build_model(shape, seed=0), folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text(REWARD)
    return path
