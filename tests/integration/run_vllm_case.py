"""Runs one case of vllm_case.py, or of another file, in a fresh interpreter: vLLM changes global state of its
process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def run_case(case, folder, timeout=280, script="vllm_case.py"):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), case, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    said = f"{case} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, said
    assert lines, said
    return json.loads(lines[-1].removeprefix("RESULT "))
