"""Runs a study: one process a run, resumed where it stopped; a run that dies is a result and stops nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gspo_dist.compare.study import Study
from gspo_dist.metrics.sinks import read_jsonl, write_json

STATUS = "status.json"


def run_study(study: Study, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Runs what is not done yet, `study.parallel` at a time; returns every run's status, in the study's order."""
    total = len(study.runs)

    def work(job: tuple[int, tuple[str, int]]) -> dict[str, Any]:
        number, (arm, seed) = job
        before = read_status(study, arm, seed)
        if before and before["command"] != _command(study, arm, seed):
            raise ValueError(
                f"{study.run_dir(arm, seed)} holds a run of other settings; set study.dir to a new folder, or repeat "
                "the command that made it"
            )
        if before and (before["status"] == "done" or not study.retry_failed):
            log(f"[{number}/{total}] {arm} seed {seed}: {before['status']} already")
            return before
        log(f"[{number}/{total}] {arm} seed {seed}: started")
        status = _run_one(study, arm, seed)
        tail = f" ({status['reason']})" if status["reason"] else ""
        log(f"[{number}/{total}] {arm} seed {seed}: {status['status']} after {status['seconds']:.0f} s{tail}")
        return status

    with ThreadPoolExecutor(max(1, study.parallel)) as pool:
        return list(pool.map(work, enumerate(study.runs, 1)))


def read_status(study: Study, arm: str, seed: int) -> dict[str, Any] | None:
    """The recorded end of a run, or None while it has none."""
    path = study.run_dir(arm, seed) / STATUS
    return json.loads(path.read_text()) if path.is_file() else None


def _run_one(study: Study, arm: str, seed: int) -> dict[str, Any]:
    folder = study.run_dir(arm, seed)
    folder.mkdir(parents=True, exist_ok=True)
    command = _command(study, arm, seed)
    start = time.monotonic()
    with open(folder / "train.log", "ab") as output:
        begin = output.tell()
        code = subprocess.call(
            [sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, env=_environment(study)
        )
    if code in INTERRUPTED:
        raise KeyboardInterrupt(f"{arm} seed {seed} was interrupted; the same command goes on from its checkpoint")
    reason = "" if code == 0 else _reason(folder / "train.log", begin, code)
    status = {
        "arm": arm, "seed": seed, "status": _classify(code, reason), "reason": reason,
        "seconds": time.monotonic() - start, "steps_logged": _last_step(folder), "command": command,
    }
    write_json(folder / STATUS, status)
    return status


INTERRUPTED = (130, 143, -2, -15)
"""Exit codes of a run that somebody stopped: no result, it goes on next time."""


def _command(study: Study, arm: str, seed: int) -> list[str]:
    """Arguments of the interpreter that make one run."""
    return ["-m", "gspo_dist.cli", "train", *study.run_overrides(arm, seed), "logger.console=false"]


def _environment(study: Study) -> Mapping[str, str]:
    env = dict(os.environ)
    if study.threads:
        env["OMP_NUM_THREADS"] = str(study.threads)
    return env


def _classify(code: int, reason: str) -> str:
    """done | diverged (a loss, gradient or log-prob that is not finite) | died (anything else)."""
    if code == 0:
        return "done"
    return "diverged" if "FloatingPointError" in reason else "died"


def _reason(log: Path, begin: int, code: int) -> str:
    """The error of this attempt: what the log says from byte `begin` on."""
    text = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "gspo: error:" in line]
    return errors[-1] if errors else f"exit status {code}: {lines[-1] if lines else 'no output'}"


def _last_step(folder: Path) -> int:
    rows = read_jsonl(folder / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0


def dry_run(study: Study, describe: Callable[[list[str]], str]) -> str:
    """What would start where, without starting it. describe(overrides) -> text of one run's layout and memory."""
    lines = [f"study {study.name}: {len(study.arms)} arms x {len(study.seeds)} seeds, {study.parallel} at a time"]
    for arm in study.arms:
        lines += ["", f"== {arm}", describe(study.run_overrides(arm, study.seeds[0]))]
    return "\n".join(lines)
