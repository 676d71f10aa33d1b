"""The self-check of the megatron learner: its own model against transformers', in a process of its own.

    python -m gspo_dist.learners.megatron.self_check < config.json      # one JSON list of findings

A process of its own, because on a CPU the learner replaces parts of torch for good (`cpu_shim`). It sees no
GPU, so the layers are the ones that megatron-core has for a CPU, one rank holds the whole miniature, and
gloo connects it with nobody. What a GPU computes with Transformer Engine's layers is not measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspo_dist.learners.properties import Ask, Finding, check_architecture, guarded, save_miniature, streams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gspo_dist.learners.megatron.learner import MegatronLearner

TIMEOUT_S = 300.0
"""Seconds for the process. It needs about ten, most of them for imports."""


def findings(config: dict[str, Any]) -> list[Finding]:
    """The findings of the megatron learner for the architecture of an HF config: alone, packed,
    names, and routes where there are experts.

    Raises RuntimeError, with the end of what it said, when the process does not come to a result.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gspo_dist.learners.megatron.self_check"],
            input=json.dumps(config),
            capture_output=True,
            text=True,
            env=environment,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it took more than {TIMEOUT_S:.0f} s") from None
    try:
        return [Finding(**found) for found in json.loads(done.stdout.splitlines()[-1])]
    except (IndexError, ValueError, TypeError):
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"])[-1]
        raise RuntimeError(f"it ended with {done.returncode}: {last[:300]}") from None


class Miniature:
    """A megatron learner of one rank, and the folder that it was loaded from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.learner: MegatronLearner | None = None

    def load(self, original: PreTrainedModel) -> Ask:
        """The learner's log-probs after it has read the miniature from its folder, as a run reads a model."""
        import torch.distributed as dist

        from gspo_dist.config import LearnerConfig
        from gspo_dist.learners.megatron.learner import MegatronLearner

        save_miniature(original, self.folder / "model")
        store = f"file://{self.folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        config = LearnerConfig(backend="megatron", world_size=1, precision="fp32")
        learner = self.learner = MegatronLearner(config, self.folder / "model", total_steps=1)
        return lambda batch, record: learner.logprobs([batch], record_routing=record)[0]

    def names(self) -> tuple[bool, str]:
        """Whether the learner streams the tensors that its folder holds, bit for bit."""
        if self.learner is None:
            return False, "it cannot be made or loaded"
        weights = (pair for bucket in self.learner.weights(1 << 20) for pair in bucket)
        return streams(self.folder / "model", weights)


def check(config: dict[str, Any]) -> list[Finding]:
    """What `findings` returns, made in this process, which is a learner's from then on."""
    with tempfile.TemporaryDirectory() as folder:
        miniature = Miniature(Path(folder))
        found = list(check_architecture(config, miniature.load))
        found.insert(2, guarded("names", miniature.names))
        if miniature.learner is not None:
            miniature.learner.close()
        return found


def main() -> None:
    """Reads a config and prints the findings."""
    print(json.dumps([asdict(finding) for finding in check(json.load(sys.stdin))]), flush=True)


if __name__ == "__main__":
    main()
