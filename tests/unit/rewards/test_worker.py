"""Laws of a reward process: it dies with its parent, and imports torch only for rewards that use it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from gspo_dist.config import RewardConfig
from gspo_dist.rewards.pool import LocalRewardPool

DRIVER = """
import sys
import numpy as np
from gspo_dist.config import RewardConfig
from gspo_dist.rewards.pool import LocalRewardPool
from gspo_dist.types import Completion, Prompt
pool = LocalRewardPool(RewardConfig(function=sys.argv[1], timeout_s=60.0))
pool.start()
empty = np.zeros(0)
print(pool.workers[0].process.pid, flush=True)
pool.judge([(0, Prompt("p", (1,), "q", "1"), Completion(empty, empty, empty, empty, "stop", "text"))])
"""


@pytest.mark.slow
def test_a_reward_that_hangs_does_not_outlive_a_parent_that_was_killed(reward_file, tmp_path):
    path = reward_file(
        f"import time\ndef f(p, c):\n    open({str(tmp_path / 'begun')!r}, 'w').close()\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", DRIVER, f"{path}:f"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        worker = Path("/proc") / driver.stdout.readline().strip()
        for _ in range(200):
            if (tmp_path / "begun").exists():
                break
            time.sleep(0.05)
        assert worker.exists()
        driver.kill()
    for _ in range(100):
        if not worker.exists() or worker.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the reward process outlived its parent")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "loaded"),
    [
        ("import sys\ndef f(p, c): return float('torch._C' in sys.modules)", 0.0),
        ("import torch\ndef f(p, c): return torch.ones(3).sum()", 3.0),
        ("import torch.nn.functional as F, torch\ndef f(p, c): return F.relu(torch.tensor(2.0))", 2.0),
        ("from torch import nn\ndef f(p, c): return float(issubclass(nn.Linear, nn.Module))", 1.0),
    ],
)
def test_torch_is_imported_for_rewards_that_use_it(items_of, reward_file, body, loaded):
    pool = LocalRewardPool(RewardConfig(function=f"{reward_file(body)}:f"))
    try:
        assert pool.judge(items_of("x"))[0].reward == loaded
    finally:
        pool.close()
