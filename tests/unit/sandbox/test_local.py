"""The properties of the sandboxes of this host, one test each, with programs that try the opposite."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gspo_dist.sandbox import local
from gspo_dist.sandbox.choose import sandbox_named
from gspo_dist.sandbox.local import LOCAL, refusal
from gspo_dist.sandbox.protocol import TUPLE, Limits, Outcome, Program, SandboxError

PUBLISHED = next(
    (found for parent in Path(__file__).parents if (found := parent / "shared/cases/programs").is_dir()), None
)
SMALL = Limits(time_s=1.5, memory_mb=200, processes=8, files_mb=4, files=64, output_mb=1)


@pytest.fixture(params=["bubblewrap", "namespaces"])
def sandbox(request):
    if why := refusal(request.param):
        pytest.skip(f"{request.param}: {why}")
    return LOCAL[request.param]


def run(sandbox, code: str, text: str = "", limits: Limits = SMALL, **options) -> Outcome:
    with sandbox.open(Program(code, **options), limits) as opened:
        return opened.run(text)


def named(comm: str) -> list[int]:
    """Processes of the host with this name. A program of the sandbox can give itself one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text().strip() == comm:
                found.append(int(path.parent.name))
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < until:
        time.sleep(0.05)
    return met


def unique() -> str:
    return f"gspo{uuid.uuid4().hex[:10]}"


def rename(comm: str) -> str:
    return f"open('/proc/self/comm', 'w').write({comm!r})\n"


# What a program can see


def test_no_network(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        code = (
            "import socket\ntry:\n  socket.create_connection(('127.0.0.1', int(input())), 1); print('sent')\n"
        )
        code += "except OSError as error: print(type(error).__name__)"
        assert run(sandbox, code, str(server.getsockname()[1])).stdout == "PermissionError\n"
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_sockets_of_any_family_but_pairs(sandbox):
    code = """
import socket
for family in range(1, 45):
    try: socket.socket(family, socket.SOCK_STREAM); print("made", family)
    except OSError: pass
a, b = socket.socketpair(); a.send(b"ok"); print(b.recv(2))
"""
    assert run(sandbox, code).stdout == "b'ok'\n"


def test_no_files_of_the_host(sandbox, tmp_path):
    (tmp_path / "secret").write_text("secret")
    code = f"""
import os
print([p for p in ("/etc", "/home", "/root", "/var", "/run", "/sys", {str(tmp_path)!r}, {str(Path.cwd())!r})
       if os.path.exists(p)])
print(sorted(os.listdir("/")), os.listdir("/work"))
"""
    outcome = run(sandbox, code)
    assert outcome.stdout.splitlines()[0] == "[]"
    seen = set(outcome.stdout.splitlines()[1].partition("]")[0].strip("[").replace("'", "").split(", "))
    assert seen <= {"bin", "dev", "lib", "lib64", "proc", "python", "tmp", "usr", "work"}
    assert outcome.stdout.endswith("[]\n")


def test_nothing_but_work_can_be_written(sandbox):
    code = """
import os
for folder in ("/", "/usr", "/dev", "/proc", "/usr/lib"):
    try: open(os.path.join(folder, "new"), "w"); print("written", folder)
    except OSError: pass
for folder in (os.getcwd(), "/work", "/tmp"):
    with open(os.path.join(folder, "new"), "a") as file: file.write("x")
print(open("new").read())
"""
    assert run(sandbox, code).stdout == "xxx\n"


def test_no_environment_of_the_host(sandbox, monkeypatch):
    monkeypatch.setenv("GSPO_TEST_SECRET", "s3cr3t")
    code = "import os\nprint('s3cr3t' in str(os.environ) + open('/proc/self/environ').read())"
    assert run(sandbox, code).stdout == "False\n"


def test_no_processes_of_the_host(sandbox):
    code = "import os\nprint(sorted(int(p) for p in os.listdir('/proc') if p.isdigit()) == [1, os.getpid()])"
    assert run(sandbox, code).stdout == "True\n"


def test_nobody_without_rights(sandbox):
    code = """
import os
rights = [l.split()[1] for l in open("/proc/self/status") if l[:6] in ("CapEff", "CapPrm")]
print(os.getuid(), os.getgid(), rights)
try: os.setuid(0); print("root")
except OSError: print("denied")
"""
    none = "0" * 16
    assert run(sandbox, code).stdout == f"65534 65534 ['{none}', '{none}']\ndenied\n"


def test_no_calls_that_lead_out(sandbox):
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
calls = {"unshare": lambda: libc.unshare(0x10000000),
         "mount": lambda: libc.mount(b"n", b"/tmp", b"tmpfs", 0, None),
         "ptrace": lambda: libc.ptrace(16, 1, 0, 0), "keyctl": lambda: libc.syscall(250, 0, -3, 0),
         "memfd": lambda: libc.memfd_create(b"a", 0), "shm": lambda: libc.shmget(0, 1 << 20, 0o1600)}
for name, call in calls.items():
    if call() >= 0 or ctypes.get_errno() != 1: print(name, ctypes.get_errno())
clone = libc.syscall(56, 0x10000011, 0, 0, 0, 0)  # a new user namespace
if clone == 0: libc._exit(0)
print(clone, libc.syscall(435, 0, 0), ctypes.get_errno())
"""
    if os.uname().machine != "x86_64":
        pytest.skip("numbers of x86_64")
    assert run(sandbox, code).stdout == "-1 -1 38\n"


# What a program can use


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
        "import _signal\nfor s in range(1, 65):\n  try: _signal.signal(s, _signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\nwhile True: pass",
    ],
    ids=["busy", "asleep", "one C call", "ignores signals"],
)
def test_the_deadline_of_a_test(sandbox, code):
    begun = time.monotonic()
    outcome = run(sandbox, code, limits=Limits(time_s=0.5))
    assert outcome.status == "time"
    assert 0.5 <= outcome.seconds < 3
    assert time.monotonic() - begun < 20


def test_cpu_seconds_are_limited_too(sandbox):
    code = "import resource as r\nprint(r.getrlimit(r.RLIMIT_CPU), r.getrlimit(r.RLIMIT_CORE))"
    assert run(sandbox, code, limits=Limits(time_s=6)).stdout == "(7, 8) (0, 0)\n"


def test_memory_of_one_process(sandbox):
    outcome = run(
        sandbox, "x = []\nwhile True: x.append(bytearray(20 << 20))", limits=Limits(time_s=10, memory_mb=200)
    )
    assert outcome.status == "memory"


def test_memory_of_all_processes_together(sandbox):
    """Each is below the limit, the sum is not."""
    comm = unique()
    code = (
        rename(comm)
        + "import os, time\nfor _ in range(4):\n  if os.fork() == 0:\n    x = bytearray(60 << 20)\n"
    )
    code += "    for i in range(0, len(x), 4096): x[i] = 1\n    time.sleep(60)\ntime.sleep(60)"
    outcome = run(sandbox, code, limits=Limits(time_s=20, memory_mb=120))
    assert outcome.status == "memory"
    assert named(comm) == []


def test_shared_pages_count_once(sandbox):
    code = "import os, time\nx = bytearray(60 << 20)\n"
    code += "children = [os.fork() for _ in range(1)]\nif 0 in children: time.sleep(0.5); os._exit(0)\n"
    code += "os.waitpid(children[0], 0); print('fine')"
    assert run(sandbox, code, limits=Limits(time_s=10, memory_mb=110)).stdout == "fine\n"


FORKS = """
import os, time
made = 0
try:
    for _ in range(100):
        if os.fork() == 0: time.sleep(60)
        made += 1
except OSError: print(made < 8, made > 2)
"""


def test_the_number_of_processes(sandbox):
    assert run(sandbox, FORKS).stdout == "True True\n"


def test_a_fork_bomb_ends_and_leaves_nothing(sandbox):
    comm = unique()
    code = rename(comm) + "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    assert run(sandbox, code, limits=Limits(time_s=0.7, processes=8)).status == "time"
    assert named(comm) == []


def test_the_size_of_files(sandbox):
    code = """
import os
try:
    with open("a", "wb") as file:
        for _ in range(9): file.write(b"x" * (1 << 20))
except OSError: print("stopped", sum(os.path.getsize(f) for f in os.listdir(".")) <= 4 << 20)
"""
    outcome = run(sandbox, "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + code)
    assert outcome.stdout == "stopped True\n"
    several = code.replace('"a", "wb"', 'str(_), "ab"').replace(
        "with open", "for _ in range(9):\n     with open"
    )
    several = several.replace("        for _ in range(9): file", "         file")
    assert run(sandbox, several).stdout == "stopped True\n"


def test_the_number_of_files(sandbox):
    code = "i = 0\nwhile True:\n  open(str(i), 'w').close(); i += 1"
    outcome = run(sandbox, code, limits=Limits(time_s=5, files=200))
    assert outcome.status in ("files", "error")  # seen by the guest, or refused by the file system
    assert outcome.seconds < 4


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_cut_while_it_is_read(sandbox, stream):
    code = f"import sys\nwhile True: sys.{stream}.write('x' * 65536)"
    outcome = run(sandbox, code, limits=Limits(time_s=20, output_mb=1))
    assert outcome.status == "output"
    assert outcome.seconds < 10
    assert len(outcome.stdout) < 3 << 20
    assert len(outcome.stderr) <= 4000


# Killed whole


def test_a_daemon_is_killed_and_not_waited_for(sandbox):
    comm = unique()
    code = "import os, time\nprint(42, flush=True)\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
    code += "    " + rename(comm) + "    time.sleep(600)\n  os._exit(0)\ntime.sleep(0.2)"
    outcome = run(sandbox, code, limits=Limits(time_s=10))
    assert (outcome.status, outcome.stdout) == ("ok", "42\n")
    assert outcome.seconds < 3
    assert named(comm) == []


def test_a_program_cannot_end_the_hosts_processes_or_its_guest(sandbox):
    user = 65534 if os.geteuid() == 0 else None
    with subprocess.Popen(["sleep", "60"], user=user) as bystander:
        code = (
            "import os\nfor p in [1, -1, *range(2, 3000)]:\n  if p != os.getpid():\n    try: os.kill(p, 9)\n"
        )
        code += "    except OSError: pass\nprint('done')"
        with sandbox.open(Program(code), SMALL) as opened:
            assert opened.run("").status in ("ok", "error")
            assert opened.run("").status in ("ok", "error")  # the guest is there
        assert bystander.poll() is None
        bystander.kill()


def test_nothing_is_left_when_the_caller_goes(sandbox):
    comm = unique()
    opened = sandbox.open(Program(rename(comm) + "import time\ntime.sleep(600)"), Limits(time_s=600))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(opened.run, "")
        assert wait_for(lambda: bool(named(comm)))
        opened.process.kill()
        assert waiting.result(20).status == "killed"
    assert wait_for(lambda: not named(comm))
    opened.close()


PROGRAMS_THAT_STAY = {
    "a fork bomb": ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", None),
    "daemons": ("import os, time\nif os.fork() == 0: os.setsid()\nos.fork()\ntime.sleep(600)", None),
    "a function at work": ("import os, time\ndef f():\n  os.fork()\n  time.sleep(600)", "f"),
    "a function at rest": ("import os, time\nif os.fork() == 0: time.sleep(600)\ndef f(): pass", "f"),
}


@pytest.mark.parametrize("what", PROGRAMS_THAT_STAY)
@pytest.mark.parametrize("name", LOCAL)
def test_nothing_is_left_when_the_caller_is_killed(name, what):
    """Killed by SIGKILL, so that nothing of the caller can tidy up: the weak one holds this too."""
    if why := refusal(name):
        pytest.skip(f"{name}: {why}")
    comm = unique()
    code, function = PROGRAMS_THAT_STAY[what]
    program = Program(rename(comm) + code, function)
    caller = (
        f"import sys, time; sys.path[:] = {sys.path!r}\n"
        "from gspo_dist.sandbox.local import LOCAL\nfrom gspo_dist.sandbox.protocol import Limits, Program\n"
        f"run = LOCAL[{name!r}].open({program!r}, Limits(time_s=600, processes=8))\n"
        "run.run('')\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", caller]) as process:
        begun = wait_for(lambda: len(named(comm)) > 1)
        process.kill()
    assert begun
    ended = wait_for(lambda: not named(comm))
    for pid in named(comm):
        os.kill(pid, signal.SIGKILL)
    assert ended


def test_a_guest_that_hangs_is_killed_from_outside(sandbox, monkeypatch):
    monkeypatch.setattr(local, "GRACE_S", 0.3)
    with sandbox.open(Program("print(1)"), Limits(time_s=0.2)) as opened:
        ids, parents = [opened.process.pid], [opened.process.pid]
        while parents:
            children = Path(f"/proc/{parents[0]}/task/{parents.pop(0)}/children").read_text().split()
            ids += map(int, children)
            parents += map(int, children)
        os.kill(ids[-1], signal.SIGSTOP)
        assert opened.run("").status == "killed"
        with pytest.raises(SandboxError, match="the run is closed"):
            opened.run("")


# Programs as they are


@pytest.mark.parametrize(
    "read",
    [
        "import sys; d = sys.stdin.read().split()",
        "import sys; d = [w for line in sys.stdin for w in line.split()]",
        "import sys; d = sys.stdin.buffer.read().split()",
        "import sys; d = (sys.stdin.readline() + sys.stdin.readline()).split()",
        "d = input().split() + input().split()",
        "d = open(0).read().split()",
        "import os; d = os.read(0, 1 << 20).split()",
    ],
)
def test_every_way_to_read(sandbox, read):
    outcome = run(sandbox, read + "\nprint(int(d[0]) + int(d[1]))", "20\n22\n")
    assert (outcome.status, outcome.stdout, outcome.exit_status) == ("ok", "42\n", 0)


def test_much_input_and_output(sandbox):
    text = "7 " * 200_000
    outcome = run(
        sandbox, "d = input().split(); print('\\n'.join(d) * 3)", text, Limits(time_s=20, output_mb=2)
    )
    assert outcome.status == "ok"
    assert len(outcome.stdout) == 3 * 399_999 + 1


def test_numbers_threads_and_recursion_of_competitors(sandbox):
    code = """
import sys, threading
sys.setrecursionlimit(10 ** 6)
threading.stack_size(1 << 27)
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
threading.Thread(target=lambda: print(depth(50_000), len(str(10 ** 6000)))).start()
"""
    assert run(sandbox, code, limits=Limits(time_s=20)).stdout == "50000 6001\n"


@pytest.mark.parametrize(
    ("code", "status", "exit_status"),
    [
        ("print(1); exit()", "ok", 0),
        ("import sys; sys.exit(3)", "error", 3),
        ("import os; os._exit(4)", "error", 4),
        ("1 / 0", "error", 1),
        ("print(", "error", 1),
        ("import os; os.kill(os.getpid(), 11)", "error", -11),
    ],
)
def test_how_a_program_ended(sandbox, code, status, exit_status):
    outcome = run(sandbox, code)
    assert (outcome.status, outcome.exit_status) == (status, exit_status)
    if code == "1 / 0":
        assert "ZeroDivisionError" in outcome.stderr


def test_a_quiet_exit_is_no_error(sandbox):
    assert run(sandbox, "import sys; print(1); sys.exit(1)", quiet_exit=True).status == "ok"
    assert run(sandbox, "1 / 0", quiet_exit=True).status == "error"


def test_tests_of_one_program_do_not_share_processes_or_leftovers(sandbox):
    code = "import sys\nprint(hasattr(sys, 'mark')); sys.mark = 1"
    with sandbox.open(Program(code), SMALL) as opened:
        assert [opened.run("").stdout for _ in range(2)] == ["False\n", "False\n"]


# Functions


def call(sandbox, code: str, *texts: str, function: str = "f", limits: Limits = SMALL) -> list[Outcome]:
    with sandbox.open(Program(code, function=function), limits) as opened:
        return [opened.run(text) for text in texts]


def test_a_functions_result_travels_apart_from_what_it_prints(sandbox):
    (outcome,) = call(sandbox, "def f(a, b):\n  print('{}', a)\n  return a + b", "20\n22")
    assert (outcome.result, outcome.stdout, outcome.status) == ("42", "{} 20\n", "ok")


def test_class_solution_is_made_once(sandbox):
    code = "class Solution:\n  def __init__(self): self.n = 0\n  def f(self):\n    self.n += 1; return self.n"
    assert [outcome.result for outcome in call(sandbox, code, "", "")] == ["1", "2"]


def test_values_are_json(sandbox):
    code = "def f(x): return {'s': x + x, 't': (1, (2,)), 'l': [(3, 4)]}"
    (outcome,) = call(sandbox, code, '"ab"')
    assert json.loads(outcome.result or "") == {
        "s": "abab",
        "t": [TUPLE, 1, [TUPLE, 2]],
        "l": [[TUPLE, 3, 4]],
    }
    (outcome,) = call(sandbox, "def f(): return (1, 2)", "")
    assert json.loads(outcome.result or "") == [1, 2]


def test_an_object_equal_to_everything_is_what_it_prints(sandbox):
    code = "class Yes(int):\n  def __eq__(self, other): return True\ndef f(a): return Yes(0)"
    assert call(sandbox, code, "42")[0].result == "0"


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import os\ndef f(a): os._exit(0)", "error", "ended without a result"),
        ("def f(a): return {1, 2}", "error", "not JSON serializable"),
        ("def g(a): return a", "error", "KeyError"),
        ("def f(a): return a[0]", "error", "not subscriptable"),
        ("def f(a):\n  while True: pass", "time", ""),
        ("def f(a): return [bytearray(1 << 28) for _ in range(9)]", "memory", "MemoryError"),
        ("import sys\ndef f(a): sys.exit(0)", "error", "SystemExit"),
        ("import os\ndef f(a): os.write(4, bytes(4) + b'garbage')", "error", "without a result"),
    ],
)
def test_a_function_without_a_result(sandbox, code, status, said):
    (outcome,) = call(sandbox, code, "42", limits=Limits(time_s=1.5))
    assert (outcome.status, outcome.result) == (status, None)
    assert said in outcome.stderr


def test_a_function_is_there_again_after_it_failed(sandbox):
    code = "def f(a):\n  while a: pass\n  return 7"
    outcomes = call(sandbox, code, "1", "0", limits=Limits(time_s=0.5))
    assert [(outcome.status, outcome.result) for outcome in outcomes] == [("time", None), ("ok", "7")]


def test_the_preamble_runs_in_the_programs_names(sandbox):
    program = Program("print(heappop([3, 4]), pow(2, 3, 5))", preamble="from heapq import *\n")
    with sandbox.open(program, SMALL) as opened:
        assert opened.run("").stdout == "3 3\n"


# Choosing, and the weak one


def test_auto_never_takes_the_weak_one(monkeypatch):
    monkeypatch.setattr(
        "gspo_dist.sandbox.choose.refusal", lambda name: "" if name == "process" else f"no {name}"
    )
    with pytest.raises(
        ValueError, match=r"got bubblewrap: no bubblewrap; namespaces: no namespaces\. Install bub"
    ):
        sandbox_named("auto")
    assert sandbox_named("process").name == "process"


def test_auto_prefers_bubblewrap(monkeypatch):
    monkeypatch.setattr("gspo_dist.sandbox.choose.refusal", lambda name: "")
    assert sandbox_named("auto").name == "bubblewrap"
    monkeypatch.setattr("gspo_dist.sandbox.choose.refusal", lambda name: "" if name == "namespaces" else "no")
    assert sandbox_named("auto").name == "namespaces"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("docker",), "sandbox must be a known name: got 'docker'"),
        (("http",), "sandbox_url must be given for sandbox http"),
        (("auto", "http://h"), "sandbox_url must be given for sandbox http, and for no other"),
        (("http", "http://h", "e2b"), "sandbox_kind must be a known name: got 'e2b'"),
    ],
)
def test_names_that_mean_nothing_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        sandbox_named(*arguments)


def test_the_weak_one_keeps_limits_filter_and_kills_orphans():
    """It does not hide files; what it does hold is this."""
    weak = LOCAL["process"]
    if why := refusal("process"):
        pytest.skip(why)
    assert run(weak, "while True: pass", limits=Limits(time_s=0.4)).status == "time"
    assert run(weak, "x = bytearray(1 << 30)").status == "memory"
    assert "PermissionError" in run(weak, "import socket; socket.socket()").stderr
    code = (
        "import os\ntry: os.kill(int(input()), 0); print('reached')\nexcept PermissionError: print('denied')"
    )
    assert run(weak, code, str(os.getpid())).stdout == "denied\n"
    comm = unique()
    code = rename(comm) + "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(600)\nprint(1)"
    assert run(weak, code, limits=Limits(time_s=20)).stdout == "1\n"
    assert named(comm) == []
    with weak.open(Program(rename(comm) + PROGRAMS_THAT_STAY["a function at rest"][0], "f"), SMALL) as opened:
        assert opened.run("").status == "ok"
    assert named(comm) == []
    if os.geteuid() == 0:  # another user's other processes come and go, and are counted
        assert run(weak, FORKS).stdout == "True True\n"


def test_a_host_that_refuses_is_no_verdict(monkeypatch):
    monkeypatch.setattr(local, "BOOTSTRAP", "raise SystemExit('no namespaces here')")
    with pytest.raises(SandboxError, match="sandbox namespaces cannot start: no namespaces here"):
        LOCAL["namespaces"].open(Program("print(1)"), SMALL)


@pytest.mark.slow
@pytest.mark.skipif(PUBLISHED is None, reason="the published programs do not lie beside this checkout")
def test_the_published_programs(sandbox, monkeypatch):
    assert PUBLISHED is not None
    monkeypatch.setenv("GSPO_TEST_SECRET", "s3cr3t")
    cases = [json.loads(line) for line in (PUBLISHED / "manifest.jsonl").read_text().splitlines()]
    numbers = "\n".join(map(str, range(200_000)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)

        def verdict(case) -> str:
            limits = Limits(time_s=case["limits"]["time_s"], memory_mb=case["limits"]["memory_mb"])
            text = case["tests"][0]["input"].replace("{PORT}", str(server.getsockname()[1]))
            right = case["tests"][0]["output"].replace("{RANGE_200000}", numbers)
            right = right.replace("{10**6000}", "1" + "0" * 6000)
            code = (PUBLISHED / case["file"]).read_text()
            program = Program(code, case["fn_name"], "from typing import *\n" if case["fn_name"] else "")
            with sandbox.open(program, limits) as opened:
                begun = time.monotonic()
                outcome = opened.run(text)
                assert time.monotonic() - begun < limits.time_s + 3
            if case["fn_name"]:
                same = outcome.result is not None and json.loads(outcome.result) == json.loads(right)
            else:
                same = [t.strip() for t in outcome.stdout.strip().split("\n")] == right.strip().split("\n")
            return "accepted" if outcome.status == "ok" and same else "rejected"

        with ThreadPoolExecutor(6) as pool:
            verdicts = list(pool.map(verdict, cases))
        with pytest.raises(TimeoutError):
            server.accept()
    wrong = [c["id"] for c, got in zip(cases, verdicts, strict=True) if got not in c["allowed"]]
    assert wrong == []
