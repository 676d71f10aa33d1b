"""Runs Python programs in processes that find vLLM imported already, which takes ten seconds.

    done = forked.run([CASE_FILE, "sync", folder], timeout=280)
    done = forked.run(["-m", "gspo_dist", "train", ...], timeout=280)

vLLM changes global state of its process, so each program has a process of its own. It is forked from a server
that imports and does nothing else, so no program finds anything of an earlier one. The server runs with one
thread of OpenMP and with the environment that the engine sets before it imports vLLM.

The server is this file as a script. It reads a JSON line per program, and answers with the program's exit
status when it has ended.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "gspo_dist.learners.hf_model")
START_S = 240.0
"""Longest wait for the imports."""
_servers: list[subprocess.Popen[str]] = []
"""The one of this process, once a program was run."""


def run(words: Sequence[Any], timeout: float) -> subprocess.CompletedProcess[str]:
    """`python WORDS...` with its output and exit status; its folder is the root of the repository.

    AssertionError when it does not end within `timeout` seconds. It is killed then, with its children.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        for path in (out, err):
            path.touch()
        request = {"words": [str(word) for word in words], "out": str(out), "err": str(err)}
        try:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            status = _answer(server, timeout)
        except BaseException:  # the test's own time is over: the next program shall not get this one's answer
            _end()
            raise
        said = [path.read_text(errors="replace") for path in (out, err)]
    end = "\n".join((said[0][-2000:], said[1][-4000:]))
    assert status is not None, f"{words} took more than {timeout:.0f} s, or the server died:\n{end}"
    return subprocess.CompletedProcess(list(words), int(status), *said)


def _server() -> subprocess.Popen[str]:
    if not _servers or _servers[0].poll() is not None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
            text=True,
            start_new_session=True,
        )
        _servers[:] = [server]
        assert _answer(server, START_S) == "ready\n", "vLLM was not imported: see above"
    return _servers[0]


def _answer(server: subprocess.Popen[str], timeout: float) -> str | None:
    """The server's next line. None: it took too long or ended, and is gone with what it had started."""
    if select.select([server.stdout], [], [], timeout)[0] and (line := server.stdout.readline()):
        return line
    _end()
    return None


@atexit.register
def _end() -> None:
    for server in _servers:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    _servers.clear()


def _serve() -> list[str]:
    """Answers until nobody asks any more. Returns in the processes that it forks, with what they run."""
    from gspo_dist.rollout.vllm.engine import prepare_process

    prepare_process("cpu", 1, "bf16")  # which is fp32's too, and more: the process may use AMX
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # collections in the programs need not pass over what is imported
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        program = os.fork()
        if not program:
            answers.close()
            flags = os.O_WRONLY | os.O_CREAT
            for number, (path, how) in enumerate(
                ((os.devnull, os.O_RDONLY), (request["out"], flags), (request["err"], flags))
            ):
                os.dup2(os.open(path, how), number)
            return request["words"]
        _, status = os.waitpid(program, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    os._exit(0)


def _main(words: list[str]) -> None:
    """What `python WORDS...` does."""
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    _main(_serve())
