"""What tests of several files share: a small model, a reward, and a run that nobody stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.tiny_run import finish, start


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    # Imported here: the quick tests of this folder need neither torch nor transformers.
    from gspo_dist.coldstart.model import build_model, save_model
    from gspo_dist.coldstart.recipes import Shape
    from gspo_dist.coldstart.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("model")
    save_model(
        build_model(Shape(layers=2, hidden=64, heads=2, kv_heads=1, head_dim=32, expert_hidden=32), seed=0),
        folder,
    )
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text(
        "def sevens(prompt, completion):\n    return completion.text.count('7') / max(1, len(completion))\n"
    )
    return path


@pytest.fixture(scope="session")
def whole(model, reward_file, tmp_path_factory) -> Path:
    """A run of four steps that nobody stopped: what stopped ones, and those on several hosts, must equal."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    process = start(model, reward_file, run_dir, "steps=4", "checkpoint.every=2")
    output = finish(process, timeout=500)
    assert process.returncode == 0, output
    return run_dir
