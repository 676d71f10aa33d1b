"""The code reward: tests in the forms of data files, run in a real sandbox."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from gspo_dist.config import RewardConfig
from gspo_dist.rewards import code as module
from gspo_dist.rewards.code import CodeVerdict, check_answer, check_prompt, code, function_name, judge_code
from gspo_dist.rewards.code_tests import read_tests
from gspo_dist.rewards.reward import resolve_reward
from gspo_dist.sandbox.choose import STRONG, sandbox_named
from gspo_dist.sandbox.local import refusal
from gspo_dist.sandbox.protocol import Limits, Outcome, SandboxError
from gspo_dist.types import Completion, Prompt

strong = pytest.mark.skipif(all(refusal(name) for name in STRONG), reason="this host gives no sandbox")
ADD = "a, b = map(int, input().split())\nprint(a + b)"
SUMS = [
    {"input": "20 22\n", "output": "42\n"},
    {"input": "1 1\n", "output": "2\n"},
    {"input": "0 5", "output": "5"},
]


def judged(program: str, answer, metadata=None, fenced: bool = True, **options):
    text = f"Here it is:\n```python\n{program}\n```\n" if fenced else program
    empty = np.zeros(0)
    completion = Completion(empty, empty, empty, empty, "stop", text)
    return code(Prompt("p", (1,), "q", answer, metadata or {}), completion, **options)


@pytest.mark.parametrize(
    ("answer", "words"), [("42", "got int"), ([{"input": "1"}], "got test 0"), ([], "got an empty list")]
)
def test_records_without_tests_are_refused_at_load(answer, words):
    with pytest.raises(ValueError, match=f"^the answer of a code record must be its tests: .*{words}"):
        check_prompt(Prompt("p", (1,), "q", answer))
    with pytest.raises(ValueError, match=words):
        check_answer(answer)


def test_the_name_of_a_function_may_stand_beside_the_tests():
    tests = [{"input": "1", "output": "1", "testtype": "functional"}]
    check_prompt(Prompt("p", (1,), "q", tests, {"func_name": "f"}))


def test_limits_are_livecodebenchs_unless_they_are_said(monkeypatch):
    """Six seconds a test. Half a GiB and a minute for all tests are ours."""
    asked = []

    def judge_code(source, tests, sandbox, limits, **options):
        asked.append((limits, options))
        return CodeVerdict(1, 3, "wrong")

    monkeypatch.setattr(module, "judge_code", judge_code)
    assert judged(ADD, SUMS) == (
        0.0,
        {"answered": 1.0, "tests_passed": 1 / 3, "time_limit": 0.0, "crashed": 0.0},
    )
    given = {"time_s": 2.0, "memory_mb": 64, "deadline_s": 9.0, "max_tests": 2}
    assert judged(ADD, SUMS, partial=True, **given)[0] == 1 / 3
    assert asked == [
        (Limits(time_s=6.0, memory_mb=512), {"max_tests": None, "go_on": False, "deadline_s": 60.0}),
        (Limits(time_s=2.0, memory_mb=64), {"max_tests": 2, "go_on": True, "deadline_s": 9.0}),
    ]


@strong
@pytest.mark.parametrize(
    ("program", "reward", "share", "why"),
    [
        (ADD, 1.0, 1.0, {}),
        ("print(42)", 0.0, 1 / 3, {}),
        (ADD.replace("+", "-"), 0.0, 0.0, {}),
        ("while True: pass", 0.0, 0.0, {"time_limit": 1.0}),
        ("1 / 0", 0.0, 0.0, {"crashed": 1.0}),
        ("print(", 0.0, 0.0, {"crashed": 1.0}),
        (ADD + "\nimport sys; sys.exit(1)", 1.0, 1.0, {}),
        ("", 0.0, 0.0, {"answered": 0.0}),
        ("print(gcd(*map(int, input().split())) and heappop([42]))", 0.0, 1 / 3, {}),
    ],
)
def test_programs_that_read_standard_input(program, reward, share, why):
    parts = {"answered": 1.0, "tests_passed": share, "time_limit": 0.0, "crashed": 0.0} | why
    assert judged(program, SUMS, time_s=1.0) == (reward, pytest.approx(parts))


@strong
def test_partial_runs_all_tests_and_pays_their_share():
    program = "a, b = map(int, input().split())\nif a == 20: raise ValueError\nprint(a + b)"
    reward, parts = judged(program, SUMS, partial=True)
    assert reward == parts["tests_passed"] == pytest.approx(2 / 3)
    assert parts["crashed"] == 1.0
    assert judged(program, SUMS)[1]["tests_passed"] == 0.0  # stops at the first
    assert judged(ADD, [*SUMS[:1], {"input": "1 1", "output": "3"}], max_tests=1)[0] == 1.0


@strong
def test_functions():
    tests = {"inputs": [[20, 22], [1, 1]], "outputs": [42, 2], "fn_name": "add"}
    method = (
        "class Solution:\n  def add(self, a: int, b: int) -> Optional[int]:\n    print('x'); return a + b"
    )
    assert judged(method, tests)[0] == 1.0
    assert judged("def add(a, b): return a + b", tests)[0] == 1.0
    assert judged("def add(a, b): return str(a + b)", tests)[0] == 0.0
    cheat = "class Yes(int):\n  def __eq__(self, other): return True\ndef add(a, b): return Yes(0)"
    assert judged(cheat, tests)[0] == 0.0


@strong
def test_asserts():
    answer = {"functional": "def check(f):\n  assert f(2) == 4\ncheck(Solution().square)"}
    assert judged("class Solution:\n  def square(self, n): return n * n", answer)[0] == 1.0
    assert judged("class Solution:\n  def square(self, n): return n", answer)[0] == 0.0
    assert judged("import os\nos._exit(0)", answer)[0] == 0.0
    assert judged("import sys\nsys.exit(0)", answer)[0] == 0.0


@strong
def test_the_expected_output_is_nowhere_in_the_room():
    program = """
import glob, os
places = glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/self/fd/*")
places += [os.path.join(f, n) for root in ("/tmp", "/work") for f, _, names in os.walk(root) for n in names]
for place in places:
    try:
        if place.startswith("/proc/self/fd") and not os.path.isfile(place): continue
        if "tok" + "en-7731" in open(place, errors="ignore").read(1 << 20): print("tok" + "en-7731")
    except OSError: pass
print("searched", len(places) > 3)
"""
    tests = read_tests([{"input": "", "output": "token-7731"}])
    verdict = judge_code(program, tests, sandbox_named("auto"), Limits())
    assert (verdict.why, verdict.outcome.stdout) == ("wrong", "searched True\n")


@strong
def test_the_deadline_of_all_tests_together():
    begun = time.monotonic()
    answer = [{"input": str(i), "output": str(i)} for i in range(200)]
    reward, parts = judged("import time; time.sleep(0.3); print(input())", answer, deadline_s=1.0)
    assert (reward, parts["time_limit"]) == (0.0, 1.0)
    assert 0 < parts["tests_passed"] < 0.1
    assert time.monotonic() - begun < 10


def test_a_sandbox_that_fails_is_no_verdict():
    class Broken:
        name = "broken"

        def open(self, program, limits):
            raise SandboxError("sandbox http: down")

    with pytest.raises(SandboxError, match="down"):
        judge_code("print(1)", read_tests(SUMS), Broken(), Limits())


class Stub:
    """A sandbox whose runs end as told, one outcome after the other."""

    name = "stub"

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes, self.given = list(outcomes), []

    def open(self, program, limits):
        self.program = program
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def run(self, text):
        self.given.append(text)
        return self.outcomes.pop(0)


RIGHT = [Outcome("ok", test["output"]) for test in SUMS]


def test_where_a_program_failed_is_told():
    sandbox = Stub(*RIGHT[:2], Outcome("ok", "42"))
    verdict = judge_code("print(1)", read_tests(SUMS), sandbox, Limits())
    assert sandbox.program.quiet_exit
    assert sandbox.given == [test["input"] for test in SUMS]
    assert (verdict.passed, verdict.total, verdict.failed_at) == (2, 3, 2)
    assert (verdict.why, verdict.solved, verdict.outcome) == ("wrong", False, Outcome("ok", "42"))


def test_the_first_failure_ends_the_tests_unless_they_go_on_and_a_program_that_was_killed_always_does():
    wrong, late, killed = Outcome("ok", "0"), Outcome("time"), Outcome("killed")
    sandbox = Stub(wrong, *RIGHT[1:])
    assert judge_code("x", read_tests(SUMS), sandbox, Limits()) == CodeVerdict(0, 3, "wrong", 0, wrong)
    assert len(sandbox.given) == 1
    sandbox = Stub(RIGHT[0], wrong, late)
    found = judge_code("x", read_tests(SUMS), sandbox, Limits(), go_on=True)
    assert found == CodeVerdict(1, 3, "wrong", 1, wrong)  # of the first
    sandbox = Stub(killed, *RIGHT[1:])
    found = judge_code("x", read_tests(SUMS), sandbox, Limits(), go_on=True)
    assert (found, len(sandbox.given)) == (CodeVerdict(0, 3, "killed", 0, killed), 1)


@pytest.mark.parametrize("go_on", [False, True])
def test_a_deadline_keeps_what_was_found_before_it(monkeypatch, go_on):
    """The clock moves 1 s a look: the deadline of 2 s is over when the second test would begin."""
    looks = iter([10.0, 11.0, 12.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(looks)))
    wrong = Outcome("ok", "0")
    sandbox = Stub(wrong if go_on else RIGHT[0], *RIGHT[1:])
    found = judge_code("x", read_tests(SUMS), sandbox, Limits(), go_on=go_on, deadline_s=2.0)
    assert len(sandbox.given) == 1
    expected = CodeVerdict(0, 3, "wrong", 0, wrong) if go_on else CodeVerdict(1, 3, "deadline", 1)
    assert found == expected


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (Outcome("ok", "said nothing"), "wrong"),
        (Outcome("error", stderr="AssertionError: f(2)"), "wrong"),
        (Outcome("error", stderr="NameError: f"), "error"),
        (Outcome("time"), "time"),
    ],
)
def test_asserts_are_one_test_that_is_passed_by_reaching_its_end(outcome, why):
    tests = read_tests({"functional": "assert f(2) == 4"})
    sandbox = Stub(outcome)
    assert judge_code("x", tests, sandbox, Limits()) == CodeVerdict(0, 1, why, 0, outcome)
    assert "assert f(2) == 4" in sandbox.program.code


def test_the_name_of_a_function_is_a_text():
    def named(**metadata):
        return function_name(Prompt("p", (1,), "q", SUMS, metadata))

    assert named() is None
    assert named(fn_name="", func_name=7) is None
    assert named(fn_name=7, func_name="f") == "f"
    assert named(fn_name="g", func_name="f") == "g"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block": "first"}, "reward.options.block must be a known name: got 'first'"),
        ({"partial": 1}, "reward.options.partial must be true or false"),
        ({"max_tests": 0}, "reward.options.max_tests must be at least 1"),
        ({"time_s": 0}, "reward.options.time_s must be above 0"),
        ({"memory_mb": 1}, "reward.options.memory_mb must be at least 64"),
        ({"deadline_s": 0}, "reward.options.deadline_s must be above 0"),
        ({"sandbox": "docker"}, "reward.options.sandbox must be a known name: got 'docker'"),
        ({"sandbox": "http"}, "reward.options.sandbox_url must be given"),
    ],
)
def test_options_without_meaning_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        resolve_reward(RewardConfig(function="code", options=options))


def test_a_host_without_a_sandbox_refuses_before_the_run(monkeypatch):
    monkeypatch.setattr("gspo_dist.sandbox.choose.refusal", lambda name: "not here")
    module._sandbox.cache_clear()
    with pytest.raises(
        ValueError, match="must be able to run programs on this host: got bubblewrap: not here"
    ):
        resolve_reward(RewardConfig(function="code"))
    module._sandbox.cache_clear()
