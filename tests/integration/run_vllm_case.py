"""Runs one case of vllm_case.py, or of another file, in a process of its own: vLLM changes global state."""

import json
from pathlib import Path

from tests.integration import forked


def run_case(case, folder, timeout=280, script="vllm_case.py"):
    done = forked.run([Path(__file__).with_name(script), case, folder], timeout)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    said = f"{case} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, said
    assert lines, said
    return json.loads(lines[-1].removeprefix("RESULT "))
