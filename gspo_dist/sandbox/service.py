"""Programs run by a service: SandboxFusion's POST /run_code, or Piston's POST /api/v2/execute.

The service draws the boundary. It says nothing here of what it covers, and takes no limit on processes or
files. What it does not answer is no verdict: SandboxError, after retries.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

from gspo_dist.sandbox.guest.frames import marked
from gspo_dist.sandbox.http import HttpError, post_json
from gspo_dist.sandbox.protocol import Limits, Outcome, Program, Run, SandboxError

CALL = """
import json as _json, sys as _sys
_guest = {{}}
exec({guest!r}, _guest)
_names = globals()
_owner = _names["Solution"]() if "Solution" in _names else None
_function = getattr(_owner, {name!r}) if _owner is not None else _names[{name!r}]
_arguments = [_json.loads(_line) for _line in _sys.stdin.read().split("\\n") if _line.strip()]
_value = _function(*_arguments)
print("\\n" + {mark!r} + _json.dumps(_guest["marked"](list(_value) if isinstance(_value, tuple) else _value)))
"""
GUEST = "from __future__ import annotations\n" + inspect.getsource(marked)
"""In names of its own: the program may have a function `marked`, too."""
MARK = "gspo-result:"
SETTINGS = "import sys\nsys.setrecursionlimit(50_000)\nsys.set_int_max_str_digits(50_000)\n"


class ServiceSandbox:
    """A service that runs one program per request. Tests share nothing, not even class Solution."""

    name = "http"

    def __init__(self, url: str, kind: str = "sandboxfusion", attempts: int = 4) -> None:
        """kind: sandboxfusion | piston. attempts: of a request that the service does not answer."""
        self.url, self.kind, self.attempts = url.rstrip("/"), kind, attempts

    def open(self, program: Program, limits: Limits) -> Run:
        return ServiceRun(self, program, limits)


class ServiceRun:
    """One program; every test is a request."""

    def __init__(self, sandbox: ServiceSandbox, program: Program, limits: Limits) -> None:
        self.sandbox, self.program, self.limits = sandbox, program, limits
        code = SETTINGS + program.preamble + "\n" + program.code
        if program.function is not None:
            code += "\n" + CALL.format(name=program.function, guest=GUEST, mark=MARK)
        self.code = code

    def __enter__(self) -> ServiceRun:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def run(self, text: str) -> Outcome:
        asked = self._fusion if self.sandbox.kind == "sandboxfusion" else self._piston
        outcome = asked(text)
        # Only an uncaught exception prints a traceback; sys.exit(1) is silent.
        silent = outcome.exit_status == 1 and "Traceback (most recent call last)" not in outcome.stderr
        if self.program.quiet_exit and outcome.status == "error" and silent:
            outcome = outcome._replace(status="ok")
        return self._of_function(outcome) if self.program.function is not None else outcome

    def _of_function(self, outcome: Outcome) -> Outcome:
        printed, mark, result = outcome.stdout.rpartition("\n" + MARK)
        if outcome.status != "ok":
            return outcome
        if not mark:
            return outcome._replace(status="error", stderr="the program ended without a result")
        return outcome._replace(stdout=printed, result=result.strip())

    def _post(self, path: str, message: dict[str, Any]) -> dict[str, Any]:
        seconds = self.limits.time_s + 30
        try:
            answer = post_json(self.sandbox.url + path, message, seconds, self.sandbox.attempts)
        except HttpError as error:
            raise SandboxError(f"sandbox http: {error}") from error
        if not isinstance(answer, dict):
            raise SandboxError(
                f"sandbox http: {self.sandbox.url}{path} must answer with an object: got {answer!r}"
            )
        return answer

    def _fusion(self, text: str) -> Outcome:
        message = {
            "code": self.code,
            "language": "python",
            "stdin": text,
            "compile_timeout": 10,
            "run_timeout": self.limits.time_s,
            "memory_limit_MB": self.limits.memory_mb,
        }
        answer = self._post("/run_code", message)
        ran = answer.get("run_result")
        if answer.get("status") == "SandboxError" or not isinstance(ran, dict):
            raise SandboxError(f"sandbox http: {answer.get('message') or json.dumps(answer)[:500]}")
        status = {"Finished": "ok", "TimeLimitExceeded": "time"}.get(str(ran.get("status")), "error")
        code = ran.get("return_code")
        if status == "ok" and code not in (0, None):
            status = "error"
        return Outcome(
            status=status,
            stdout=ran.get("stdout") or "",
            stderr=(ran.get("stderr") or "")[-4000:],
            exit_status=code,
            seconds=float(ran.get("execution_time") or 0.0),
        )

    def _piston(self, text: str) -> Outcome:
        message = {
            "language": "python",
            "version": "*",
            "files": [{"name": "program.py", "content": self.code}],
            "stdin": text,
            "run_timeout": int(self.limits.time_s * 1000),
            "run_memory_limit": self.limits.memory_mb << 20,
        }
        answer = self._post("/api/v2/execute", message)
        ran = answer.get("run")
        if not isinstance(ran, dict):
            raise SandboxError(f"sandbox http: {answer.get('message') or json.dumps(answer)[:500]}")
        code = ran.get("code")
        # Piston ends what is late with SIGKILL, and says nothing else of it.
        status = "ok" if code == 0 else "time" if ran.get("signal") == "SIGKILL" else "error"
        return Outcome(
            status=status,
            stdout=ran.get("stdout") or "",
            stderr=(ran.get("stderr") or "")[-4000:],
            exit_status=code,
        )
