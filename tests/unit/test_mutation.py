"""The mutation tool finds what a weak test misses, and only that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "benchmarks" / "mutation.py"
MODULE = """
def clamp(value, low, high, log):
    if value < low:
        return low
    log.append(value)
    return high if value > high else value


def half(value):
    return value / 2
"""
# No test calls `clamp` at its lower bound or looks at the log, and `half` is right for one number only, which
# is not in the package.
TESTS = """
from pathlib import Path
from gspo_dist.weak import clamp, half

def test_clamp():
    assert [clamp(v, 2, 7, []) for v in (1, 5, 9)] == [2, 5, 7]

def test_half():
    assert half(int(Path("docker/zero.lock").read_text())) == 0
"""
REASON = "the log is for people"


def tool(root: Path, *arguments: str) -> list[str]:
    command = [sys.executable, str(TOOL), "--root", str(root), "--modules", "weak", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def project(tmp_path):
    for path, text in {
        "gspo_dist/__init__.py": "",
        "gspo_dist/weak.py": MODULE,
        "tests/unit/test_weak.py": TESTS,
        "docker/zero.lock": "0",
        "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '--import-mode=importlib'\n",
        "benchmarks/mutation_explained.toml": f'["weak.py"]\n"clamp: drop log.append(value)" = "{REASON}"\n'
        '["*"]\n"*: 2 -> 3" = "any text"\n',
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


@pytest.mark.slow
def test_it_lists_the_survivors_of_a_weak_test(project):
    printed = tool(project, "--jobs", "2", "--report", str(project / "report.md"))
    assert sorted(line for line in printed if line.startswith("survived")) == [
        "survived weak.py:10 half: value / 2 -> value * 2",
        "survived weak.py:3 clamp: value < low -> value <= low",
        "survived weak.py:6 clamp: value > high -> value >= high",
    ]
    text = (project / "report.md").read_text()
    assert f"- weak.py:5 `clamp: drop log.append(value)`: {REASON}" in text
    assert "- weak.py:10 `half: 2 -> 3`: any text" in text
    assert "| weak.py | 10 | 5 | 0 | 5 | 2 | 3 |" in text
    assert (project / "gspo_dist/weak.py").read_text() == MODULE


@pytest.mark.slow
def test_a_survivor_is_looked_at_once_more_by_the_other_files_that_import_the_module(project):
    """One that fails without any change, and one that imports something else, have no say."""
    (project / "tests/unit/room").mkdir()
    other = project / "tests/unit/room/test_user.py"
    lines = "from gspo_dist.weak import half\nfrom gspo_dist import weak_not\n"
    other.write_text(f"{lines}def test_it():\n    assert half(6) == 3\n")
    (project / "gspo_dist/weak_not.py").write_text("")
    stranger = "from gspo_dist import weak_not\ndef test_it():\n    assert False\n"
    (project / "tests/unit/room/test_stranger.py").write_text(stranger)
    weak = [
        "survived weak.py:3 clamp: value < low -> value <= low",
        "survived weak.py:6 clamp: value > high -> value >= high",
    ]
    assert sorted(line for line in tool(project) if line.startswith("survived")) == weak
    other.write_text(f"{lines}def test_it():\n    assert half(6) == 4\n")
    printed = [line for line in tool(project) if line.startswith("survived")]
    assert sorted(printed) == ["survived weak.py:10 half: value / 2 -> value * 2", *weak]


def test_a_sample_is_the_same_for_the_same_seed(project):
    whole = tool(project, "--list")
    one, again, other = (tool(project, "--list", "--sample", "4", "--seed", seed) for seed in ("1", "1", "2"))
    assert (len(one), one) == (4, again)
    assert one != other
    assert set(one) | set(other) <= set(whole)


def test_a_truth_value_is_shown_with_the_name_that_it_is_given_to(project):
    """Otherwise an explanation of one explains every other of the same function."""
    (project / "gspo_dist/weak.py").write_text("def f(a):\n    b = False\n    c = sorted(a, reverse=True)\n")
    assert tool(project, "--list") == [
        "weak.py:2 f: False -> True",
        "weak.py:3 f: sorted(a, reverse=True) -> sorted(a)",
        "weak.py:3 f: reverse=True -> reverse=False",
    ]


@pytest.mark.parametrize("more", [[], ["--timeout", "60"]], ids=["", "timeout"])
def test_a_module_whose_tests_fail_unchanged_is_an_error(project, more):
    """Also with a limit of one's own, for which nobody has to know how long they take."""
    (project / "tests/unit/test_weak.py").write_text("def test_it():\n    assert False\n")
    command = [sys.executable, str(TOOL), "--root", str(project), "--modules", "weak", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "the tests of weak.py must pass without a change" in done.stderr


@pytest.mark.slow
def test_what_was_judged_before_such_a_module_is_reported(project):
    (project / "gspo_dist/worse.py").write_text("x = 1\n")
    (project / "tests/unit/test_worse.py").write_text("def test_it():\n    assert False\n")
    command = [sys.executable, str(TOOL), "--root", str(project), "--modules", "weak", "worse"]
    report = project / "report.md"
    done = subprocess.run(
        [*command, "--report", str(report)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "the tests of worse.py must pass without a change" in done.stderr
    assert "| weak.py | 10 | 5 | 0 | 5 | 2 | 3 |" in report.read_text()


@pytest.mark.slow
def test_every_explanation_is_of_a_change_that_exists():
    """One whose code was edited explains nothing any more, and would be thought to."""
    explained = tomllib.loads((TOOL.parent / "mutation_explained.toml").read_text())
    explained.pop("*")
    command = [sys.executable, str(TOOL), "--list", "--modules", *explained]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    changes = {
        (place.rpartition(":")[0], key)
        for place, _, key in (line.partition(" ") for line in listed.splitlines())
    }
    wanted = {(module, key) for module, keys in explained.items() for key in keys}
    assert wanted - changes == set()


@pytest.mark.slow
@pytest.mark.parametrize("is_imported_elsewhere", [False, True])
def test_an_interrupt_ends_the_tests_that_run_and_reports_what_was_judged(project, is_imported_elsewhere):
    """The test hangs once `half` is changed. Ctrl-C comes while it does."""
    page = project / "report.md"
    pid_file = project / "pid"
    (project / "tests/unit/test_weak.py").write_text(
        "import os, pathlib, time\n"
        "from gspo_dist.weak import half\n"
        "def test_half():\n"
        "    if half(2) != 1:\n"
        f"        pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\n"
        "        time.sleep(100)\n"
    )
    if is_imported_elsewhere:  # then survivors wait for a second look, which never comes
        (project / "tests/unit/test_user.py").write_text("from gspo_dist import weak\ndef test_it(): pass\n")
    command = [sys.executable, str(TOOL), "--root", str(project), "--modules", "weak", "--report", str(page)]

    def hear_interrupts() -> None:
        # A shell's background jobs ignore Ctrl-C, and so would all that they start.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=hear_interrupts
    ) as running:
        deadline = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 130
    assert "It was interrupted" in page.read_text()
    assert "| weak.py | 7 | 0 | 0 | 7 |" in page.read_text()  # those of `clamp`, which this test never calls
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
