"""The sandboxes of this host: they start guest/ in a room of its own, and hold the deadline from outside.

Three ways to build the room, one guest in all of them:

bubblewrap   bwrap builds it. Preferred where it is installed.
namespaces   the guest builds it with the same calls of Linux; as root, or where users may make namespaces.
process      no room: limits and the filter of system calls alone. The program sees the host's files. It is
             used only when it is asked for by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import marshal
import os
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from gspo_dist.sandbox.guest.frames import decoded
from gspo_dist.sandbox.protocol import Limits, Outcome, Program, SandboxError

START_S = 30.0
"""Longest wait for a room: on a busy host Python alone takes a second."""
GRACE_S = 2.5
"""What the guest may be late with its answer before it is killed with all that it holds."""
NOBODY = 65534
DEVICES = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
"""Those of the room."""


class Python(NamedTuple):
    """The interpreter of the sandbox: where it lies on the host, and in the room."""

    executable: str
    prefix: str
    inside: str
    """Its prefix in the room."""

    @property
    def inside_executable(self) -> str:
        return self.inside + self.executable[len(self.prefix) :]


@functools.cache
def own_python() -> Python:
    """The interpreter below this one's virtual environment. In the room it never lies under a home folder."""
    executable, prefix = os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)
    return Python(executable, prefix, "/usr" if prefix == "/usr" else "/python")


@functools.cache
def open_python() -> Python | None:
    """An interpreter that every user of this host may run: ours, or that of the system."""
    for python in (own_python(), Python(os.path.realpath("/usr/bin/python3"), "/usr", "/usr")):
        places = [Path(python.executable), *Path(python.executable).parents]
        with contextlib.suppress(OSError):
            if all(place.stat().st_mode & 0o001 for place in places):
                return python
    return None


def guest_python() -> Python:
    """Ours; as root one that the user nobody may run too. Raises SandboxError where there is none."""
    python = open_python() if os.geteuid() == 0 else own_python()
    if python is None:
        raise SandboxError("no Python that the user nobody may run: install python3 of the system")
    return python


def host_folders(python: Python) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What a program finds of the host: read-only folders and links of its libraries and of its Python.

    There is nothing of /etc.
    """
    binds, links = [("/usr", "/usr")], []
    for name in ("/lib", "/lib64", "/bin"):
        if os.path.islink(name):
            links.append((os.readlink(name), name))
        elif os.path.isdir(name):
            binds.append((name, name))
    if python.inside != python.prefix:
        binds.append((python.prefix, python.inside))
    return binds, links


def setup_of(python: Python, build: bool, weak: bool) -> dict[str, Any]:
    """What the guest is told of its room."""
    binds, links = host_folders(python)
    binds += [(device, device) for device in DEVICES]
    return {
        "build": build,
        "weak": weak,
        "binds": binds if build else [],
        "links": links if build else [],
        "python": [python.prefix, python.inside] if build else ["", ""],
        "executable": python.inside_executable,
    }


def bubblewrap_command(python: Python, limits: Limits) -> list[str]:
    """The arguments that build the room; without the guest itself."""
    binds, links = host_folders(python)
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--as-pid-1",
        "--clearenv",
    ]
    command += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox", "--cap-drop", "ALL"]
    for source, target in binds:
        command += ["--ro-bind", source, target]
    for target, link in links:
        command += ["--symlink", target, link]
    for device in DEVICES:
        command += ["--dev-bind", device, device]
    command += ["--proc", "/proc", "--size", str(limits.files_mb << 20), "--tmpfs", "/work"]
    return [*command, "--symlink", "work", "/tmp", "--remount-ro", "/", "--chdir", "/work"]


class Start(NamedTuple):
    """How a guest is started."""

    command: list[str]
    code: bytes
    setup: dict[str, Any]
    user: int | None
    """Whom the process belongs to on the host; None for this process's user."""


def bubblewrap_start(limits: Limits) -> Start:
    # As root, bwrap runs under another user: root's processes are not counted by RLIMIT_NPROC.
    user = NOBODY if os.geteuid() == 0 else None
    if shutil.which("bwrap") is None:
        raise SandboxError("bwrap is not installed")
    python = guest_python()
    guest = [python.inside_executable, "-I", "-S", "-c", BOOTSTRAP]
    command = [*bubblewrap_command(python, limits), *guest]
    return Start(command, guest_code(python.executable), setup_of(python, build=False, weak=False), user)


def namespaces_start(limits: Limits) -> Start:
    python = own_python()
    command = [python.executable, "-I", "-S", "-c", BOOTSTRAP]
    return Start(command, guest_code(python.executable), setup_of(python, build=True, weak=False), None)


def process_start(limits: Limits) -> Start:
    python = guest_python()
    command = [python.executable, "-I", "-S", "-c", BOOTSTRAP]
    return Start(command, guest_code(python.executable), setup_of(python, build=False, weak=True), None)


GUEST = Path(__file__).with_name("guest")
MODULES = ("frames", "calls", "room", "program", "watch")
"""Those of the guest, each after what it imports."""
BOOTSTRAP = """
import marshal, os, sys
def read(count):
    data = b""
    while len(data) < count:
        part = os.read(0, count - len(data))
        if not part:
            os._exit(1)
        data += part
    return data
for name, code in marshal.loads(read(int.from_bytes(read(4), "big"))):
    sys.modules[name] = module = type(sys)(name)
    exec(code, module.__dict__)
module.main()
"""
"""The guest comes through the pipe: no room must hold it, and it is not compiled every time."""


@functools.cache
def guest_code(executable: str) -> bytes:
    """The guest as `executable` loads it: compiled, or as text where its Python is of another version."""
    ask = "import importlib.util as u, sys; sys.stdout.buffer.write(u.MAGIC_NUMBER)"
    magic = subprocess.run([executable, "-I", "-S", "-c", ask], capture_output=True, timeout=60).stdout
    same = magic == importlib.util.MAGIC_NUMBER
    modules = []
    for name in MODULES:
        source = (GUEST / f"{name}.py").read_text()
        full_name = f"gspo_dist.sandbox.guest.{name}"
        modules.append((full_name, compile(source, f"{name}.py", "exec") if same else source))
    data = marshal.dumps(modules) if same else marshal.dumps(modules, 2)
    return struct.pack("!I", len(data)) + data


class LocalSandbox:
    """A sandbox of this host."""

    def __init__(self, name: str, start: Callable[[Limits], Start]) -> None:
        self.name, self.start = name, start

    def open(self, program: Program, limits: Limits) -> LocalRun:
        return LocalRun(self.name, self.start(limits), program, limits)


class LocalRun:
    """One program, one guest."""

    def __init__(self, name: str, start: Start, program: Program, limits: Limits) -> None:
        self.name, self.limits = name, limits
        self.folder = tempfile.TemporaryDirectory(prefix="gspo-sandbox-") if start.setup["weak"] else None
        if self.folder is not None:
            os.chmod(self.folder.name, 0o777)
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the run)
        try:
            self.process = subprocess.Popen(
                start.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/work"},
                cwd=self.folder.name if self.folder else "/",
                user=start.user,
                group=start.user,
                extra_groups=[] if start.user is not None else None,
            )
        except OSError as error:
            self._tidy()
            raise SandboxError(f"sandbox {name} cannot start: {error}") from error
        try:
            request = {**program.__dict__, "limits": asdict(limits), "setup": start.setup}
            answer = self._exchange(request, START_S, start.code)
            if answer is None or "ready" not in answer:
                why = (answer or {}).get("refused", "") or self._said() or "its process gave no answer"
                raise SandboxError(f"sandbox {name} cannot start: {why}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LocalRun:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, text: str) -> Outcome:
        if self.process.returncode is not None:
            raise SandboxError(f"sandbox {self.name}: the run is closed")
        answer = self._exchange({"input": text}, self.limits.time_s + GRACE_S)
        if answer is None:
            # The program has taken the guest with it (the host's memory), or has stopped it.
            why = self._said() or "the sandbox ended, or gave no answer in time"
            self.close()
            return Outcome("killed", stderr=why)
        return Outcome(
            status=answer["status"],
            stdout=answer.get("stdout", ""),
            stderr=answer.get("stderr", ""),
            result=answer.get("result"),
            exit_status=int(answer["exit_status"]) if answer.get("exit_status") else None,
            seconds=float(answer["seconds"]),
        )

    def close(self) -> None:
        """Ends the guest, and with it everything in the room. A second call does nothing."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        if self.process.returncode is None:
            if self.folder is not None:  # no room that ends with its guest: the guest ends the program first
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(GRACE_S)
            self.process.kill()
            self.process.wait()
        self._tidy()

    def _tidy(self) -> None:
        self.errors.close()
        if self.folder is not None:
            self.folder.cleanup()

    def _said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-500:].decode("utf-8", "replace").strip().replace("\n", " | ")

    def _exchange(
        self, message: dict[str, Any], seconds: float, before: bytes = b""
    ) -> dict[str, str] | None:
        """Sends a frame and waits for one; None when the guest is gone or late. No guest can hold this up."""
        data = marshal.dumps(message, 2)
        waiting, answer = memoryview(before + struct.pack("!I", len(data)) + data), bytearray()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        to, back = self.process.stdin.fileno(), self.process.stdout.fileno()
        most = 8 * (self.limits.output_mb << 20) + (1 << 20)
        os.set_blocking(to, False)
        poll, deadline = select.poll(), time.monotonic() + seconds
        poll.register(to, select.POLLOUT)
        poll.register(back, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            for descriptor, event in poll.poll(left * 1000):
                if descriptor == to:
                    try:
                        waiting = waiting[os.write(to, waiting) :] if not event & select.POLLERR else waiting
                    except OSError:
                        return None
                    if not waiting or event & select.POLLERR:
                        poll.unregister(to)
                else:
                    part = os.read(back, 1 << 20)
                    answer += part
                    if not part or len(answer) > most:
                        return None
            if len(answer) >= 4 and len(answer) - 4 >= struct.unpack("!I", answer[:4])[0]:
                return decoded(bytes(answer[4:]))
        return None


LOCAL = {
    "bubblewrap": LocalSandbox("bubblewrap", bubblewrap_start),
    "namespaces": LocalSandbox("namespaces", namespaces_start),
    "process": LocalSandbox("process", process_start),
}

_probed: dict[str, str] = {}
_probing = threading.Lock()


def refusal(name: str) -> str:
    """Why this host does not give the sandbox `name`; empty when it does. Asked once per process."""
    with _probing:
        if name not in _probed:
            try:
                with LOCAL[name].open(Program("print(6 * 7)"), Limits(time_s=10)) as run:
                    outcome = run.run("")
                    said = "" if outcome.stdout == "42\n" else f"a program that prints 42 gave {outcome}"
                    _probed[name] = said
            except SandboxError as error:
                _probed[name] = str(error)
        return _probed[name]
