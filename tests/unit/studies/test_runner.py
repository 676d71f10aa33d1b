"""What a run's end means for the study: recorded or not, tried again or not, and whether more runs start."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gspo_dist.studies import runner
from gspo_dist.studies.ending import read_ending
from gspo_dist.studies.runner import run_study
from gspo_dist.studies.study import Study

Child = Callable[[Path], int]


def write_steps(folder: Path, steps: int) -> None:
    """metrics.jsonl after so many finished steps; row 0 is the evaluation before the first."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in range(steps + 1)))


class Children:
    """Stands for the processes: each arm's child takes its run folder and returns the exit status."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **arms: Child) -> None:
        self.arms, self.started = arms, []
        self.lock = threading.Lock()
        monkeypatch.setattr(runner, "_call", self)

    def __call__(self, command: list[str], stdout, *_: object) -> int:
        folder = Path(next(a for a in command if a.startswith("run_dir=")).removeprefix("run_dir="))
        with self.lock:
            self.started.append(folder.parent.name)
        code = self.arms.get(folder.parent.name, finishes)(folder)
        stdout.write(f"gspo: error: status {code}\n".encode() if code else b"fine\n")
        return code


def finishes(folder: Path) -> int:
    write_steps(folder, 4)
    return 0


def dies_at(step: int) -> Child:
    def child(folder: Path) -> int:
        write_steps(folder, step)
        return 1

    return child


def study_of(tmp_path: Path, arms: str = "abc", **change) -> Study:
    overrides = {arm: change.pop(arm, ()) for arm in arms}
    return Study("s", (), overrides, (0,), arms[0], str(tmp_path / "runs"), **change)


def test_an_arm_that_dies_is_a_result_and_does_not_stop_the_others(tmp_path, monkeypatch):
    Children(monkeypatch, a=dies_at(2))
    study, lines = study_of(tmp_path), []
    assert [s.status for s in run_study(study, lines.append)] == ["died", "done", "done"]
    assert (s := read_ending(study.run_dir("a", 0)))
    assert (s.reason, s.steps_logged) == ("status 1", 2)
    ended = r"\[1/3\] a seed 0: died after \d+ s \(status 1\); the study, submitted again, goes on with it"
    assert re.fullmatch(ended, lines[1])


def test_a_study_submitted_again_goes_on_with_what_died_and_only_that(tmp_path, monkeypatch):
    study, lines = study_of(tmp_path), []
    Children(monkeypatch, a=dies_at(2))
    run_study(study, lines.append)
    again = Children(monkeypatch)
    assert [s.status for s in run_study(study, lines.append)] == ["done"] * 3
    assert again.started == ["a"]
    assert "[1/3] a seed 0: started again; it died before (status 1)" in lines


def test_what_died_is_left_when_told_so_and_the_log_names_the_flag(tmp_path, monkeypatch):
    study, lines = study_of(tmp_path, retry_failed=False), []
    Children(monkeypatch, a=dies_at(2))
    first = run_study(study, lines.append)
    again = Children(monkeypatch)
    assert run_study(study, lines.append) == first
    assert again.started == []
    assert "[1/3] a seed 0: died already; study.retry_failed=true goes on with it" in lines


def test_a_diverged_run_is_a_result_that_stays(tmp_path, monkeypatch):
    study, lines = study_of(tmp_path, "a"), []
    Children(monkeypatch, a=dies_at(2))
    monkeypatch.setattr(runner, "_reason", lambda *_: "FloatingPointError: loss is nan")
    assert run_study(study, lines.append)[0].status == "diverged"
    again = Children(monkeypatch)
    assert run_study(study, lines.append)[0].status == "diverged"
    assert again.started == []
    assert f"delete {study.run_dir('a', 0) / 'status.json'}" in lines[-1]


def test_refused_input_is_reported_at_once_recorded_nowhere_and_starts_nothing_more(tmp_path, monkeypatch):
    children = Children(monkeypatch, b=lambda _: 2)
    study, lines = study_of(tmp_path), []
    with pytest.raises(
        ValueError, match="b seed 0 refused its input: status 2; correct that and run the study again"
    ):
        run_study(study, lines.append)
    assert children.started == ["a", "b"]
    assert lines[-1].startswith("[2/3] b seed 0 refused its input: status 2")
    assert "no further run starts" in lines[-1]
    assert read_ending(study.run_dir("b", 0)) is None
    corrected, again = study_of(tmp_path, b=("steps=3",)), Children(monkeypatch)
    assert [s.status for s in run_study(corrected, lines.append)] == ["done"] * 3
    assert again.started == ["b", "c"]


def test_a_retried_run_that_refuses_its_input_leaves_no_old_end(tmp_path, monkeypatch):
    study = study_of(tmp_path, "a")
    Children(monkeypatch, a=dies_at(2))
    run_study(study, print)
    Children(monkeypatch, a=lambda _: 2)
    with pytest.raises(ValueError, match="refused its input"):
        run_study(study, print)
    assert read_ending(study.run_dir("a", 0)) is None


def test_status_2_after_steps_of_learning_is_a_death(tmp_path, monkeypatch):
    """`gspo train` ends with 2 for every ValueError, late ones too: those are results like other deaths."""

    def late(folder: Path) -> int:
        write_steps(folder, 3)
        return 2

    Children(monkeypatch, a=late)
    assert [s.status for s in run_study(study_of(tmp_path, "ab"), print)] == ["died", "done"]


@pytest.mark.slow
def test_refused_input_of_real_processes(tmp_path):
    """A model folder that does not exist, in a folder whose name hydra's grammar would take apart."""
    base = ("model=local", f"model.path={tmp_path / 'absent'}", "logger=quiet")
    study = Study(
        "tiny", base, {"bad": (), "worse": ("steps=2",)}, (0,), "bad", str(tmp_path / "runs, a=b ~c")
    )
    lines: list[str] = []
    with pytest.raises(ValueError, match=r"bad seed 0 refused its input: .*does not exist"):
        run_study(study, lines.append)
    assert not any("worse" in line for line in lines)
    assert read_ending(study.run_dir("bad", 0)) is None
    assert (study.run_dir("bad", 0) / "train.log").is_file()


@pytest.mark.parametrize("code", [143, -15, 130, -2])
def test_a_child_that_is_stopped_alone_starts_nothing_more(tmp_path, monkeypatch, code):
    children = Children(monkeypatch, a=lambda _: code)
    study, lines = study_of(tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        run_study(study, lines.append)
    assert children.started == ["a"]
    assert read_ending(study.run_dir("a", 0)) is None
    assert "a seed 0 was interrupted; the same command goes on" in lines[-1]


def test_an_error_beside_a_long_run_starts_nothing_more_and_the_long_run_ends(tmp_path, monkeypatch):
    """Two at a time: b refuses its input while a runs; a ends after that, and neither worker takes c or d."""
    refused = threading.Event()

    def long(folder: Path) -> int:
        assert refused.wait(30)
        return finishes(folder)

    children = Children(monkeypatch, a=long, b=lambda _: 2)
    study = study_of(tmp_path, "abcd", parallel=2)
    with pytest.raises(ValueError, match="b seed 0 refused"):
        run_study(study, lambda line: refused.set() if "refused" in line else None)
    assert sorted(children.started) == ["a", "b"]
    assert (s := read_ending(study.run_dir("a", 0)))
    assert s.status == "done"


def test_other_settings_of_any_arm_are_found_before_the_first_run(tmp_path, monkeypatch):
    children = Children(monkeypatch)
    run_study(study_of(tmp_path, "c"), print)
    with pytest.raises(
        ValueError, match=r"runs/c/seed-0 holds the same, now steps=3\nset study.dir to a new folder"
    ):
        run_study(study_of(tmp_path, c=("steps=3",)), print)
    assert children.started == ["c"]  # the first study's


@pytest.mark.parametrize("retry", [True, False])
def test_corrected_settings_start_over_what_finished_no_step(tmp_path, monkeypatch, retry):
    Children(monkeypatch, a=dies_at(0))
    run_study(study_of(tmp_path, "a"), print)
    again = Children(monkeypatch)
    endings = run_study(study_of(tmp_path, "a", a=("steps=3",), retry_failed=retry), print)
    assert (endings[0].status, again.started) == ("done", ["a"])
    assert "steps=3" in endings[0].command


def test_corrected_settings_do_not_go_on_with_finished_steps(tmp_path, monkeypatch):
    """Half a run of one setting and half of another would be no evidence for either."""
    Children(monkeypatch, a=dies_at(1))
    run_study(study_of(tmp_path, "a"), print)
    again = Children(monkeypatch)
    with pytest.raises(ValueError, match="must hold runs of the same settings"):
        run_study(study_of(tmp_path, "a", a=("steps=3",)), print)
    assert again.started == []


STUDY = """
import sys, time
from gspo_dist.studies import runner
from gspo_dist.studies.study import Study
wait = "import os, time; open(r'{pid}', 'w').write(str(os.getpid())); time.sleep(600)"
runner._command = lambda study, arm, seed: ["-c", wait]
runner.run_study(Study("s", (), dict(a=(), b=()), (0,), "a", r"{folder}"))
"""


@pytest.mark.slow
def test_a_cancelled_study_ends_the_run_that_is_under_way(tmp_path):
    """Real processes: SIGTERM to the study alone, as a scheduler sends it to a job's script."""
    pid, folder = tmp_path / "pid", tmp_path / "runs"
    study = subprocess.Popen(
        [sys.executable, "-c", STUDY.format(pid=pid, folder=folder)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (pid.is_file() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    study.terminate()
    assert study.wait(30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not list(folder.rglob("status.json"))
    assert not (folder / "b").exists()


def test_an_end_that_cannot_be_written_stops_the_study_and_costs_nothing(tmp_path, monkeypatch):
    """A full disk when b ends: a keeps its end, c does not start. Later the study goes on with b and c."""
    study, lines = study_of(tmp_path), []
    children = Children(monkeypatch)
    real = runner.write_ending

    def full_for_b(folder, ending):
        if ending.arm == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, ending)

    monkeypatch.setattr(runner, "write_ending", full_for_b)
    way_out = r"b seed 0 ended \(done\), but .*b/seed-0/status.json could not be written: .*; make room"
    with pytest.raises(RuntimeError, match=way_out):
        run_study(study, lines.append)
    assert children.started == ["a", "b"]
    assert lines[-1].endswith("no further run starts")
    monkeypatch.setattr(runner, "write_ending", real)
    again = Children(monkeypatch)
    assert [s.status for s in run_study(study, lines.append)] == ["done"] * 3
    assert again.started == ["b", "c"]


def test_a_torn_end_is_said_and_its_run_goes_on(tmp_path, monkeypatch, caplog):
    """A machine that lost power while the end was written: the run itself is whole and goes on."""
    study = study_of(tmp_path, "ab")
    Children(monkeypatch)
    run_study(study, print)
    torn = study.run_dir("a", 0) / "status.json"
    torn.write_text(torn.read_text()[:20])
    again = Children(monkeypatch)
    assert [s.status for s in run_study(study, print)] == ["done", "done"]
    assert again.started == ["a"]
    assert f"{torn} is torn: the run counts as not ended and goes on from its checkpoint" in caplog.text


def test_a_run_that_met_a_full_disk_is_a_death_that_is_tried_again(tmp_path, monkeypatch):
    study = study_of(tmp_path, "a")
    Children(monkeypatch, a=dies_at(2))
    monkeypatch.setattr(runner, "_reason", lambda *_: "OSError: [Errno 28] No space left on device")
    ending = run_study(study, print)[0]
    assert (ending.status, ending.steps_logged) == ("died", 2)
    again = Children(monkeypatch)
    assert run_study(study, print)[0].status == "done"
    assert again.started == ["a"]
