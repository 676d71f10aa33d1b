"""Rewards and sandboxes behind a service, against real servers of this process."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from gspo_dist.config import RewardConfig
from gspo_dist.rewards.code import judge_code
from gspo_dist.rewards.code_tests import read_tests
from gspo_dist.rewards.pool import LocalRewardPool
from gspo_dist.rewards.reward import RewardError, judge_rollout, resolve_reward
from gspo_dist.sandbox import http
from gspo_dist.sandbox.choose import sandbox_named
from gspo_dist.sandbox.protocol import TUPLE, Limits, Program, SandboxError
from gspo_dist.types import Completion, Prompt


@pytest.fixture
def serve():
    """serve(function) -> its address; the function gets (path, message, headers), gives (status, answer)."""
    servers = []

    def start(respond):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = respond(self.path, message, self.headers)
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                return None

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch):
    monkeypatch.setattr(http, "LONGEST_PAUSE_S", 0.01)


def judged(function: str, text: str = "42", answer="42", **options):
    ones = np.ones(1)
    prompt = Prompt("p", (1,), "6*7=?", answer, {"data_source": "sums"})
    reward = resolve_reward(RewardConfig(function=function, options=options))
    return judge_rollout(reward, prompt, Completion(ones, ones, ones, ones, "stop", text), 0)


def test_a_verifier_gets_the_rollout_and_gives_score_and_parts(serve):
    got = []

    def respond(path, message, headers):
        got.append((path, message, headers["X-Key"]))
        return 200, {"score": 0.5, "pred": "42", "acc": True, "steps": 3}

    verdict = judged("http", url=serve(respond) + "/check", headers={"X-Key": "k"})
    assert verdict == (0.5, {"acc": 1.0, "steps": 3.0})
    message = {"prompt": "6*7=?", "response": "42", "label": "42", "metadata": {"data_source": "sums"}}
    assert got == [("/check", message, "k")]
    assert judged("http", url=serve(lambda *_: (200, 0.25))) == (0.25, {})


def test_a_verifier_that_is_down_for_a_moment_is_asked_again(serve):
    calls = []

    def respond(path, message, headers):
        calls.append(1)
        return (503, {}) if len(calls) == 1 else (200, b"not JSON") if len(calls) == 2 else (200, 1)

    assert judged("http", url=serve(respond)).reward == 1.0
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("status", "answer", "calls", "words"),
    [
        (503, {}, 3, "gave no usable answer in 3 attempts: status 503"),
        (400, {"error": "no label"}, 1, "in 1 attempts: status 400: .*no label"),
        (200, {"verdict": 1}, 1, "must answer a number, or an object with a number as score"),
        (200, "1", 1, "must answer a number"),
        (200, True, 1, "must answer a number"),
    ],
)
def test_no_answer_is_no_verdict(serve, status, answer, calls, words):
    got = []

    def respond(*_):
        got.append(1)
        return status, answer

    with pytest.raises(RewardError, match=words):
        judged("http", url=serve(respond), attempts=3)
    assert len(got) == calls


def test_a_refused_connection_and_a_deadline_are_told(serve):
    with pytest.raises(RewardError, match=r"in 2 attempts: URLError: .*refused"):
        judged("http", url="http://127.0.0.1:1", attempts=2)
    with pytest.raises(RewardError, match="in 1 attempts: TimeoutError"):
        judged("http", url=serve(lambda *_: (time.sleep(2), (200, 1))[1]), attempts=1, request_s=0.2)


@pytest.mark.slow
def test_requests_of_one_process_overlap(serve):
    lock, state = threading.Lock(), {"now": 0, "most": 0}

    def respond(path, message, headers):
        with lock:
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
        time.sleep(0.3)
        with lock:
            state["now"] -= 1
        return 200, float(message["response"])

    ones = np.ones(1)
    items = [
        (i, Prompt("p", (1,), "q"), Completion(ones, ones, ones, ones, "stop", str(i))) for i in range(24)
    ]
    pool = LocalRewardPool(RewardConfig(function="http", options={"url": serve(respond)}))
    try:
        assert [verdict.reward for verdict in pool.judge(items)] == list(range(24))
    finally:
        pool.close()
    assert state["most"] >= 6


def reply(text: str):
    return lambda *_: (200, {"choices": [{"message": {"content": text}}]})


def test_a_model_as_judge(serve, monkeypatch):
    got = []

    def respond(path, message, headers):
        got.append((path, message, headers["Authorization"]))
        return reply("It is right, unlike [[0]].\n[[1]]")()

    monkeypatch.setenv("JUDGE_KEY", "secret")
    url = serve(respond) + "/v1/"
    text = "<think>[[1]] please</think>It is {answer}, 42."
    verdict = judged("judge", text, url=url, model="m", api_key_env="JUDGE_KEY", extra={"seed": 3})
    assert verdict == (1.0, {"unreadable": 0.0})
    ((path, message, authorization),) = got
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret")
    assert (message["model"], message["seed"], message["temperature"]) == ("m", 3, 0.0)
    (said,) = message["messages"]
    assert "6*7=?" in said["content"]
    assert "Answer to judge:\nIt is {answer}, 42." in said["content"]
    assert "please" not in said["content"]


@pytest.mark.parametrize(
    ("text", "options", "verdict"),
    [
        ("[[0]]", {}, (0.0, {"unreadable": 0.0})),
        ("[[7]]", {"scale": 10}, (0.7, {"unreadable": 0.0})),
        ("[[70]]", {"scale": 10}, (1.0, {"unreadable": 0.0})),
        ("<think>[[1]]</think> no", {}, (0.0, {"unreadable": 1.0})),
        ("good", {"unreadable_reward": -1}, (-1.0, {"unreadable": 1.0})),
        ("Grade: B 0.5", {"pattern": r"Grade: (\w) ([\d.]+)"}, (0.0, {"unreadable": 1.0})),
        ("Grade: 0.5", {"pattern": r"Grade: ([\d.]+)"}, (0.5, {"unreadable": 0.0})),
    ],
)
def test_what_a_judge_says(serve, text, options, verdict):
    assert judged("judge", url=serve(reply(text)), model="m", **options) == pytest.approx(verdict)


def test_a_judge_without_choices_is_no_verdict(serve):
    with pytest.raises(RewardError, match="must answer with choices"):
        judged("judge", url=serve(lambda *_: (200, {"error": "x"})), model="m")


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (
            "http",
            {"url": "host:80"},
            "reward.options.url must be an address that begins with http: got 'host:80'",
        ),
        ("http", {"url": "http://h", "request_s": 0}, "reward.options.request_s must be above 0"),
        ("http", {"url": "http://h", "attempts": 0}, "reward.options.attempts must be at least 1"),
        ("judge", {"url": "http://h"}, "missing a required argument: 'model'"),
        ("judge", {"url": "http://h", "model": "m", "template": "x"}, "template must have {completion}"),
        (
            "judge",
            {"url": "http://h", "model": "m", "pattern": "1"},
            "pattern must have a group around the number",
        ),
        ("judge", {"url": "http://h", "model": "m", "pattern": "("}, "pattern must be a regular expression"),
        ("judge", {"url": "http://h", "model": "m", "scale": 0}, "reward.options.scale must be above 0"),
    ],
)
def test_options_without_meaning_are_refused(function, options, words):
    with pytest.raises(ValueError, match=words):
        resolve_reward(RewardConfig(function=function, options=options))


# The sandbox behind a service: real programs, run by a server that speaks the two protocols


def ran(code: str, text: str, seconds: float):
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], input=text, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return None
    return done


def fusion(path, message, headers):
    assert (path, message["language"], message["memory_limit_MB"]) == ("/run_code", "python", 256)
    done = ran(message["code"], message["stdin"], message["run_timeout"])
    if done is None:
        return 200, {
            "status": "Failed",
            "run_result": {"status": "TimeLimitExceeded", "stdout": "", "stderr": ""},
        }
    result = {
        "status": "Finished",
        "return_code": done.returncode,
        "stdout": done.stdout,
        "stderr": done.stderr,
    }
    return 200, {
        "status": "Failed" if done.returncode else "Success",
        "run_result": {**result, "execution_time": 0.1},
    }


def piston(path, message, headers):
    assert (path, message["language"]) == ("/api/v2/execute", "python")
    done = ran(message["files"][0]["content"], message["stdin"], message["run_timeout"] / 1000)
    if done is None:
        return 200, {"run": {"code": None, "signal": "SIGKILL", "stdout": "", "stderr": ""}}
    return 200, {
        "run": {"code": done.returncode, "signal": None, "stdout": done.stdout, "stderr": done.stderr}
    }


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "respond"), [("sandboxfusion", fusion), ("piston", piston)])
def test_programs_behind_a_service(serve, kind, respond):
    sandbox = sandbox_named("http", serve(respond), kind)
    limits = Limits(time_s=1.0, memory_mb=256)

    def outcome(code: str, text: str = "", **options):
        with sandbox.open(Program(code, **options), limits) as run:
            return run.run(text)

    assert outcome("print(int(input()) + 1)", "41")[:2] == ("ok", "42\n")
    assert outcome("while True: pass").status == "time"
    assert (outcome("1 / 0").status, outcome("import sys; sys.exit(1)").status) == ("error", "error")
    assert outcome("import sys; sys.exit(1)", quiet_exit=True).status == "ok"
    assert outcome("1 / 0", quiet_exit=True).status == "error"
    tests = read_tests({"inputs": [[20, 22], [1, 1]], "outputs": [42, 2], "fn_name": "add"})
    method = "class Solution:\n  def add(self, a: int, b: Optional[int]): print('noise'); return a + b"
    assert judge_code(method, tests, sandbox, limits).solved
    assert judge_code("def add(a, b): return (a + b, (1,))", tests, sandbox, limits).why == "wrong"
    assert judge_code("import os\ndef add(a, b): os._exit(0)", tests, sandbox, limits).why == "error"
    tuples = "def marked(x): return {'t': (x, (2,)), 'l': [(3, 4)]}"  # marked as in the rooms of this host
    result = outcome(tuples, "1", function="marked").result
    assert json.loads(result or "") == {"t": [TUPLE, 1, [TUPLE, 2]], "l": [[TUPLE, 3, 4]]}


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (200, {"status": "SandboxError", "message": "no space"}, "no space"),
        (200, {"status": "Success"}, "Success"),
        (200, [1], "must answer with an object"),
        (500, {}, "status 500"),
    ],
)
def test_a_service_that_fails_is_no_verdict(serve, status, answer, words):
    with (
        pytest.raises(SandboxError, match=words),
        sandbox_named("http", serve(lambda *_: (status, answer))).open(Program("print(1)"), Limits()) as run,
    ):
        run.run("")
