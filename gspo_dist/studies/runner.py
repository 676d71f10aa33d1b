"""Runs a study: one process per run, resumed where it stopped.

How a run ends                             recorded   the other runs   the study, submitted again
it finishes                                done       go on            leaves it
a loss, gradient or log-prob not finite    diverged   go on            leaves it: that is a result
anything else (memory, a lost node)        died       go on            goes on from its checkpoint, unless
                                                                       study.retry_failed=false
it refuses its input (exit status 2)       nothing    start no more    starts it, by its corrected settings
somebody stops it                          nothing    start no more    goes on from its checkpoint
its end cannot be written (a full disk)    nothing    start no more    goes on from its checkpoint
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.studies.ending import STATUS, Ending, read_ending, write_ending
from gspo_dist.studies.study import Study

Key = tuple[str, int]
"""(arm, seed)"""


def run_study(study: Study, log: Callable[[str], None] = print) -> list[Ending]:
    """Runs what is not done yet, `study.parallel` at a time; returns every run's end, in the study's order.

    Raises ValueError before any run starts when a folder holds a run of other settings. Raises ValueError for
    a run that refuses its input, KeyboardInterrupt for one that was stopped and RuntimeError for one whose
    end cannot be written. From then on no run starts, and those that are under way end first. May be called
    again with the same study: it goes on.
    """
    ends = _recorded_ends(study)
    total = len(study.runs)
    stop = threading.Event()
    children: set[subprocess.Popen[bytes]] = set()

    def work(job: tuple[int, Key]) -> Ending | None:
        number, (arm, seed) = job

        def say(text: str) -> None:
            log(f"[{number}/{total}] {arm} seed {seed}: {text}")

        if stop.is_set():
            return None
        before = ends.get((arm, seed))
        if before and not (before.status == "died" and study.retry_failed):
            say(f"{before.status} already{_way_on(study, before)}")
            return before
        say(f"started again; it died before ({before.reason})" if before else "started")
        try:
            ending = _run_one(study, arm, seed, children)
        except BaseException as error:
            stop.set()
            log(f"[{number}/{total}] {error}; no further run starts")
            raise
        tail = f" ({ending.reason})" if ending.reason else ""
        say(f"{ending.status} after {ending.seconds:.0f} s{tail}{_way_on(study, ending)}")
        return ending

    with _passing_on_sigterm(children, stop), ThreadPoolExecutor(study.parallel) as pool:
        try:  # a run that was not started stands after the one whose error ends this line
            return [ending for ending in pool.map(work, enumerate(study.runs, 1)) if ending is not None]
        finally:
            stop.set()


@contextlib.contextmanager
def _passing_on_sigterm(
    children: Collection[subprocess.Popen[bytes]], stop: threading.Event
) -> Iterator[None]:
    """SIGTERM (a cancelled job) ends the runs that are under way too; Ctrl-C reaches them by itself."""

    def end(*_: object) -> None:
        stop.set()
        for child in list(children):
            child.terminate()
        raise KeyboardInterrupt("the study was stopped; the same command goes on with it")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _way_on(study: Study, ending: Ending) -> str:
    """How a run that failed can be run again, for the log."""
    if ending.status == "diverged":
        path = study.run_dir(ending.arm, ending.seed) / STATUS
        return f"; that is a result: to run it again, delete {path}"
    if ending.status == "died":
        how = "the study, submitted again," if study.retry_failed else "study.retry_failed=true"
        return f"; {how} goes on with it"
    return ""


def _recorded_ends(study: Study) -> dict[Key, Ending]:
    """The ends that were recorded with today's settings.

    A failed run of other settings that finished no step has nothing to lose: it counts as not run. Raises
    ValueError for any other run of other settings.
    """
    ends: dict[Key, Ending] = {}
    conflicts = []
    for arm, seed in study.runs:
        folder, now = study.run_dir(arm, seed), _command(study, arm, seed)
        end = read_ending(folder)
        if end is None:
            continue
        if end.command == now:
            ends[arm, seed] = end
        elif end.status == "done" or _last_step(folder):
            gone = [argument for argument in end.command if argument not in now]
            new = [argument for argument in now if argument not in end.command]
            conflicts.append(
                f"{folder} holds {' '.join(gone) or 'the same'}, now {' '.join(new) or 'the same'}"
            )
    if conflicts:
        raise ValueError(
            "a study's folder must hold runs of the same settings: got others in\n  "
            + "\n  ".join(conflicts)
            + "\nset study.dir to a new folder, or repeat the command that made them"
        )
    return ends


def _run_one(study: Study, arm: str, seed: int, children: set[subprocess.Popen[bytes]]) -> Ending:
    """One run to its end, which is recorded in its folder."""
    folder = study.run_dir(arm, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATUS).unlink(missing_ok=True)  # it says how a run ended, and this one goes on
    command, logged = _command(study, arm, seed), _last_logged(folder)
    start = time.monotonic()
    with open(folder / "train.log", "ab") as output:
        begin = output.tell()
        code = _call([sys.executable, *command], output, _environment(study), children)
    if code in INTERRUPTED:
        raise KeyboardInterrupt(
            f"{arm} seed {seed} was interrupted; the same command goes on from its checkpoint"
        )
    reason = "" if code == 0 else _reason(folder / "train.log", begin, code)
    if code == REFUSED and _last_logged(folder) == logged:
        raise ValueError(
            f"{arm} seed {seed} refused its input: {reason}; correct that and run the study again"
        )
    seconds = time.monotonic() - start
    ending = Ending(arm, seed, _classify(code, reason), reason, seconds, _last_step(folder), command)
    try:
        write_ending(folder, ending)
    except OSError as error:
        raise RuntimeError(
            f"{arm} seed {seed} ended ({reason or ending.status}), but {folder / STATUS} could not be "
            f"written: {error}; make room and run the study again: nothing that finished is lost"
        ) from error
    return ending


def _call(
    command: Sequence[str],
    output: BinaryIO,
    environment: Mapping[str, str],
    children: set[subprocess.Popen[bytes]],
) -> int:
    """Runs a command to its end, as one of `children` meanwhile; its exit status."""
    with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as child:
        children.add(child)
        try:
            return child.wait()
        finally:
            children.discard(child)


INTERRUPTED = (130, 143, -2, -15)
"""Exit codes of a run that somebody stopped: no result, it goes on next time."""

REFUSED = 2
"""Exit code of `gspo train` for bad input. Together with a metrics file that it has not touched it means:
found before anything heavy, so there is nothing to record."""


def _command(study: Study, arm: str, seed: int) -> list[str]:
    """Arguments of the interpreter that make one run."""
    return ["-m", "gspo_dist", "train", *study.run_overrides(arm, seed), "logger.console=false"]


def _environment(study: Study) -> Mapping[str, str]:
    """The environment of a run's process."""
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
    errors = [line.partition("gspo: error:")[2].strip() for line in lines if "gspo: error:" in line]
    return errors[-1] if errors else f"exit status {code}: {lines[-1] if lines else 'no output'}"


def _last_step(folder: Path) -> int:
    """The last step that the run logged; 0 for none."""
    rows = read_jsonl(folder / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0


def _last_logged(folder: Path) -> int:
    """When metrics.jsonl was last written (0: never); a run that resumes writes it before its first step."""
    path = folder / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.is_file() else 0


def dry_run(study: Study, describe: Callable[[list[str]], str]) -> str:
    """What would start where, without starting it.

    describe(overrides) gives the text of one run: its layout and memory.
    """
    lines = [
        f"study {study.name}: {len(study.arms)} arms x {len(study.seeds)} seeds, {study.parallel} at a time"
    ]
    for arm in study.arms:
        lines += ["", f"== {arm}", describe(study.run_overrides(arm, study.seeds[0]))]
    return "\n".join(lines)
