"""Forks a program for every test, watches it, and tells how it ended."""

import _signal  # type: ignore[import-not-found]
import contextlib
import os
import resource
import select
import struct
import time
from typing import Any, NamedTuple

from gspo_dist.sandbox.guest.calls import PR_SET_CHILD_SUBREAPER, Refused, filter_program, libc
from gspo_dist.sandbox.guest.frames import decoded, receive, send, write_frame
from gspo_dist.sandbox.guest.program import KEPT_STDERR, become_program, function_program, main_program
from gspo_dist.sandbox.guest.room import build_room, drop_rights

LOOK_S = 0.05
"""Seconds between two looks at memory and files."""


class Host(NamedTuple):
    """The process that serves calls of a function, and the ends of its pipes."""

    pid: int
    pidfd: int
    requests: int
    results: int
    stdout: int
    stderr: int


class Seen(NamedTuple):
    """What was seen until a test ended."""

    broken: str | None
    """The limit that it broke."""
    stdout: str
    stderr: str
    frame: dict[str, str]
    """What a function's process sent apart from what it printed."""


def main() -> None:
    control, answers = os.dup(0), os.dup(1)
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    request = receive(control)
    setup = request["setup"]
    try:
        if setup["build"]:
            build_room(setup, request["limits"])
        elif setup["weak"]:
            # Orphans of the program come back to this process, which ends them.
            libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            if os.geteuid() == 0:
                drop_rights(root=True)
        if not setup["weak"] and os.getpid() != 1:
            raise Refused(f"the guest must be process 1 of its namespace: got {os.getpid()}")
        filter_program(setup["weak"])  # refused here rather than in the program's process
    except (Refused, OSError) as error:
        send(answers, {"refused": str(error)})
        return
    if request["preamble"]:  # imported once: the process of a test finds the modules in memory
        exec(compile(request["preamble"], "preamble.py", "exec"), {})
    send(answers, {"ready": 1})
    guest = Guest(control, request)
    try:
        while (message := receive(control)) is not None:
            send(answers, guest.test(message["input"]))
    finally:  # the caller is gone or has finished; without a room, nobody else ends what the program left
        guest.finish()


class Guest:
    """Runs the tests of one program, one after the other."""

    def __init__(self, control: int, request: dict[str, Any]) -> None:
        self.control, self.request = control, request
        self.limits, self.weak = request["limits"], request["setup"]["weak"]
        self.host: Host | None = None

    def test(self, text: str) -> dict[str, Any]:
        begun = time.monotonic()
        deadline = begun + self.limits["time_s"]
        answer = self.call(text, deadline) if self.request["function"] else self.process(text, deadline)
        return {**answer, "seconds": time.monotonic() - begun}

    def process(self, text: str, deadline: float) -> dict[str, Any]:
        """One process that reads `text`. Its input is a file in memory, so nobody waits for a full pipe."""
        stdin = os.memfd_create("input")
        data = text.encode("utf-8", "surrogateescape")
        while data:
            data = data[os.write(stdin, data) :]
        os.lseek(stdin, 0, os.SEEK_SET)
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                become_program([stdin, out_end, err_end], self.limits, self.weak)
                status = main_program(self.request)
            finally:
                os._exit(status)
        for descriptor in (stdin, out_end, err_end):
            os.close(descriptor)
        pidfd = os.pidfd_open(pid)
        seen = self.watch(pidfd, out, err, deadline)
        status_of_end = self.finish(pid)
        for descriptor in (out, err, pidfd):
            os.close(descriptor)
        return told(seen, status_of_end)

    def call(self, text: str, deadline: float) -> dict[str, Any]:
        """One call of the program's function. Its process lives until a call fails."""
        if self.host is None:
            self.host = self.start_host()
            seen = self.watch_host(self.host, deadline)
            if "begun" not in seen.frame:
                return self.end_host(self.host, seen)
        import marshal

        with contextlib.suppress(OSError):  # it may have closed its end; then nothing comes back
            write_frame(self.host.requests, marshal.dumps({"input": text}, 2))
        seen = self.watch_host(self.host, deadline)
        if "result" not in seen.frame or seen.broken:
            return self.end_host(self.host, seen)
        return {"status": "ok", "stdout": seen.stdout, "stderr": seen.stderr, "result": seen.frame["result"]}

    def start_host(self) -> Host:
        (requests_end, requests), (results, results_end) = os.pipe(), os.pipe()
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        empty = os.open("/dev/null", os.O_RDONLY)
        pid = os.fork()
        if pid == 0:
            try:
                files = [empty, out_end, err_end, requests_end, results_end]
                become_program(files, self.limits, self.weak)
                function_program(self.request, 3, 4)
            finally:
                os._exit(0)
        for descriptor in (requests_end, results_end, out_end, err_end, empty):
            os.close(descriptor)
        return Host(pid, os.pidfd_open(pid), requests, results, out, err)

    def watch_host(self, host: Host, deadline: float) -> Seen:
        return self.watch(host.pidfd, host.stdout, host.stderr, deadline, host.results)

    def end_host(self, host: Host, seen: Seen) -> dict[str, Any]:
        status = self.finish(host.pid)
        for descriptor in host[1:]:
            os.close(descriptor)
        self.host = None
        error = seen.frame.get("error", "")
        why = seen.broken or ("memory" if "MemoryError" in error else "error")
        said = seen.stderr or error or "the program ended without a result"
        return {**told(seen, status), "status": why, "stderr": said}

    def watch(self, pidfd: int, out: int, err: int, deadline: float, results: int | None = None) -> Seen:
        """Reads what the program writes until it ends, answers, or breaks a limit."""
        cap, broken, ended = self.limits["output_mb"] << 20, None, False
        kept: dict[int, list[bytes]] = {out: [], err: []}
        counts = {out: 0, err: 0}
        if results is not None:
            kept[results], counts[results] = [], 0
        poll = select.poll()
        for descriptor in kept:
            os.set_blocking(descriptor, False)
            poll.register(descriptor, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        poll.register(self.control, 0)  # only its end: nobody waits for the answer any more

        def take(descriptor: int) -> bool:
            part = read_some(descriptor)
            if part == b"":  # its end, or it would wake us for ever
                with contextlib.suppress(KeyError):
                    poll.unregister(descriptor)
            if part:
                counts[descriptor] += len(part)
                kept[descriptor].append(part)
                if descriptor == err:
                    kept[err] = [b"".join(kept[err])[-4 * KEPT_STDERR :]]
            return bool(part)

        look = time.monotonic() + LOOK_S
        while broken is None and not ended:
            for descriptor, _ in poll.poll(max(0.0, (min(deadline, look) - time.monotonic()) * 1000)):
                if descriptor == self.control:
                    raise SystemExit(1)  # through main, which kills the program first
                ended = ended or descriptor == pidfd
                if descriptor in kept and take(descriptor) and descriptor == results:
                    ended = ended or whole(b"".join(kept[results]))
            now = time.monotonic()
            if max(counts.values()) > cap:
                broken = "output"
            elif now >= deadline and not ended:
                broken = "time"
            elif now >= look:
                look, broken = now + LOOK_S, self.broken()
        for descriptor in kept:  # what was written before the end
            while counts[descriptor] <= cap and take(descriptor):
                pass
        if max(counts.values()) > cap:
            broken = broken or "output"
        texts = [b"".join(kept[descriptor]).decode("utf-8", "replace") for descriptor in (out, err)]
        frame = b"".join(kept[results])[4:] if results is not None else b""
        return Seen(broken, texts[0], texts[1][-KEPT_STDERR:], decoded(frame))

    def broken(self) -> str | None:
        """The limit that all processes together break, if any: memory, or the number of files."""
        members = self.members()
        if len(members) > 1:  # one process is held by RLIMIT_AS
            limit = self.limits["memory_mb"] << 20
            if sum(map(resident, members)) > limit and sum(map(proportional, members)) > limit:
                return "memory"
        if not self.weak:
            room = os.statvfs("/work")
            if room.f_files - room.f_ffree > self.limits["files"]:
                return "files"
        return None

    def members(self) -> list[int]:
        """Ids of the processes of the sandbox, without this one."""
        if not self.weak:
            return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
        found: list[int] = []
        todo = [os.getpid()]
        while todo:
            parent = todo.pop()
            with contextlib.suppress(OSError), open(f"/proc/{parent}/task/{parent}/children") as file:
                children = [int(one) for one in file.read().split()]
                found += children
                todo += children
        return found

    def finish(self, pid: int | None = None) -> int | None:
        """Kills all that is left of the program. Returns how its first process, `pid`, ended."""
        status = None
        while True:
            if not self.weak:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, _signal.SIGKILL)  # everybody in this namespace but this process
            for member in self.members() if self.weak else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member, _signal.SIGKILL)
            try:
                found, code = os.waitpid(-1, os.WNOHANG)
                while found:
                    if found == pid:
                        status = os.waitstatus_to_exitcode(code)
                    found, code = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return status
            time.sleep(0.001)


def told(seen: Seen, status: int | None) -> dict[str, Any]:
    """The answer about a test, from what was seen and the status of its end."""
    state = seen.broken or ("ok" if status == 0 else "error")
    if state == "error" and status == -_signal.SIGXCPU:
        state = "time"
    if state == "error" and "MemoryError" in seen.stderr:
        state = "memory"
    return {"status": state, "exit_status": status, "stdout": seen.stdout, "stderr": seen.stderr}


def whole(frame: bytes) -> bool:
    return len(frame) >= 4 and len(frame) - 4 >= int(struct.unpack_from("!I", frame)[0])


def read_some(descriptor: int) -> bytes | None:
    """What a pipe holds; b"" at its end, None when it holds nothing now."""
    try:
        return os.read(descriptor, 1 << 18)
    except BlockingIOError:
        return None


def resident(pid: int) -> int:
    """Bytes of memory, with pages that processes share counted for each."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def proportional(pid: int) -> int:
    """Bytes of memory, with pages that processes share counted once in all."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration, ValueError):
        return resident(pid)
