"""The process of a program, from the fork to its end."""

import _signal  # type: ignore[import-not-found]
import builtins
import contextlib
import os
import resource
import sys
from typing import Any

from gspo_dist.sandbox.guest.calls import PR_SET_DUMPABLE, install_filter, libc
from gspo_dist.sandbox.guest.frames import marked, receive, send
from gspo_dist.sandbox.guest.room import NOBODY

KEPT_STDERR = 4000
MEGA = 1 << 20
STACK = 64 * MEGA


def become_program(files: list[int], limits: dict[str, Any], weak: bool) -> None:
    """In the forked child: its files, signals, limits and filter. Nothing of the guest stays open."""
    os.setpgid(0, 0)
    for target, descriptor in enumerate(files):
        os.dup2(descriptor, target)
    os.closerange(len(files), 1024)
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ, _signal.SIGINT):
        _signal.signal(number, _signal.SIG_DFL)
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    seconds = int(limits["time_s"]) + 1
    hard_stack = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = STACK if hard_stack == resource.RLIM_INFINITY else min(STACK, hard_stack)
    processes = limits["processes"] + (threads_of_user() if weak else 1)
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_FSIZE, limits["files_mb"] * MEGA, limits["files_mb"] * MEGA),
        (resource.RLIMIT_NPROC, processes, processes),
        (resource.RLIMIT_NOFILE, 128, 128),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_STACK, stack, stack),
        (resource.RLIMIT_AS, limits["memory_mb"] * MEGA, limits["memory_mb"] * MEGA),
    ):
        resource.setrlimit(kind, (soft, hard))
    install_filter(own_signals_only=weak)


def threads_of_user() -> int:
    """What RLIMIT_NPROC already counts without a room: all that this user runs on the host."""
    with open("/proc/self/uid_map") as file:
        # The user namespace of drop_rights: the guest is alone in it, and /proc shows everybody as nobody.
        if file.read().split() == [str(NOBODY), str(NOBODY), "1"]:
            return 1
    count = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.geteuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def namespace(request: dict[str, Any]) -> dict[str, Any]:
    """Runs the program as module __main__, as in a process of its own. Returns its names."""
    module = type(sys)("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    # As site defines them, which this interpreter has not loaded.
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    # LiveCodeBench's runner sets both to 50,000. Python itself stops at 1,000 and at 4,300 digits.
    sys.setrecursionlimit(50_000)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(50_000)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = open(number, mode, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    exec(compile(request["preamble"], "preamble.py", "exec"), module.__dict__)
    exec(compile(request["code"], "program.py", "exec"), module.__dict__)
    return module.__dict__


def main_program(request: dict[str, Any]) -> int:
    """Runs the program to its end. Returns its exit status."""
    status = 0
    try:
        namespace(request)
    except SystemExit as error:
        code = error.code
        status = code & 0xFF if isinstance(code, int) else int(code is not None)
        status = 0 if request["quiet_exit"] else status
    except BaseException:
        status = 1
        print_error()
    try:
        if "threading" in sys.modules:  # waits for the program's threads, as an interpreter does at its end
            sys.modules["threading"]._shutdown()
        sys.stdout.flush()
    except BaseException:
        status = status or 1
    return status


def print_error() -> None:
    import traceback

    with contextlib.suppress(BaseException):
        os.write(2, traceback.format_exc(limit=-8).encode("utf-8", "replace")[-KEPT_STDERR:])


def function_program(request: dict[str, Any], requests: int, results: int) -> None:
    """Serves calls of the program's function until the guest closes the pipe."""
    import json

    try:
        names = namespace(request)
        owner = names["Solution"]() if "Solution" in names else None
        function = getattr(owner, request["function"]) if owner is not None else names[request["function"]]
        send(results, {"begun": 1})
    except BaseException as error:
        print_error()
        send(results, {"error": f"{type(error).__name__}: {error}"})
        return
    while (message := receive(requests)) is not None:
        try:
            value = function(*[json.loads(line) for line in message["input"].split("\n") if line.strip()])
            value = list(value) if isinstance(value, tuple) else value
            sys.stdout.flush()
            send(results, {"result": json.dumps(marked(value))})
        except BaseException as error:
            send(results, {"error": f"{type(error).__name__}: {str(error)[:500]}"})
