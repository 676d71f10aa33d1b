"""The self-check of a learner that needs a process of its own.

DeepSpeed and megatron-core each change the process that they run in: environment, default process group,
parts of torch. The one who asks is the trainer, which is no learner. So a module with a `check` is run as a
program, reads a config from its standard input and prints its findings.

The process sees no GPU. One rank holds the whole miniature, and gloo connects it with nobody.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspo_dist.learners.learner import Learner
from gspo_dist.learners.properties import Ask, Finding, check_architecture, guarded, save_miniature, streams
from gspo_dist.learners.stream_names import Shapes, check_names
from gspo_dist.weights.folder import ModelFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIMEOUT_S = 300.0
"""Seconds for the process. It needs about ten, most of them for imports."""


def ask(module: str, config: dict[str, Any], argument: Path | str | None = None) -> list[Finding]:
    """What `check(config, argument)` of a module finds, on one rank on the CPU.

    config: of an HF model. argument, of a learner's module: the folder of the model itself; None: only the
    architecture is checked.

    Raises RuntimeError, with the end of what it said, when the process does not come to a result.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *([] if argument is None else [str(argument)])],
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


def answer(check: Callable[[dict[str, Any], Path | None], list[Finding]]) -> None:
    """The program's side: reads a config, prints the findings as one line of JSON."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    print(json.dumps([asdict(finding) for finding in check(json.load(sys.stdin), folder)]), flush=True)


def examine(
    config: dict[str, Any],
    make: Callable[[Path], Learner],
    shapes: Callable[[ModelFolder], Shapes],
    whole: Path | None,
) -> list[Finding]:
    """The findings for the architecture of an HF config: alone, packed, names, and routes where there are
    experts. Made in this process, which is a learner's from then on.

    make: the learner of a folder, whose default process group of one rank exists.
    shapes: what this learner streams of the model in a folder, of any size.
    whole: the folder of the model itself. None: names are those of the miniature alone.
    """
    made: list[Learner] = []
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"

        def load(original: PreTrainedModel) -> Ask:
            """The learner's log-probs after it has read the miniature, as a run reads a model."""
            import torch.distributed as dist

            save_miniature(original, folder)
            dist.init_process_group("gloo", init_method=f"file://{parent}/store", rank=0, world_size=1)
            learner = make(folder)
            made.append(learner)
            return lambda batch, record: learner.logprobs([batch], record_routing=record)[0]

        def names() -> tuple[bool, str]:
            """The stream of the miniature bit for bit, then that of the whole model by name and shape."""
            if not made:
                return False, "it cannot be made or loaded"
            passed, measured = streams(
                folder, (pair for bucket in made[0].weights(1 << 20) for pair in bucket)
            )
            if not passed or whole is None:
                return passed, measured
            source = ModelFolder(whole)
            return True, f"{check_names(source, shapes(source))[1]}; {measured}"

        found = list(check_architecture(config, load))
        found.insert(2, guarded("names", names))
        if made:
            made[0].close()
        return found
