"""Environments of other libraries, known by their verbs: written here as those libraries write them."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from gspo_dist.config import EnvironmentConfig
from gspo_dist.environments.adapters import adapted
from gspo_dist.environments.resolve import resolve
from gspo_dist.types import Prompt

PROMPT = Prompt("p", (1,), "How?")


class Gym:
    action_space = SimpleNamespace(n=4)

    def reset(self, *, seed=None, options=None):
        self.seed, self.closed = seed, False
        return np.array([1, 2]), {}

    def step(self, action):
        assert type(action) is int
        return {"at": np.int64(action)}, np.float32(action / 2), action == 2, action == 3, {}

    def close(self):
        self.closed = True


def test_gymnasium() -> None:
    inner = Gym()
    env = adapted(inner)
    assert env.reset(PROMPT, 2**40 + 5) == "[1, 2]"
    assert inner.seed == 5
    told = env.step("I go 3 steps, no: 1")
    assert (told.text, told.reward, told.done) == ('{"at": 1}', 0.5, False)
    assert env.step("2").done
    assert env.step("3").done
    with pytest.raises(ValueError, match="names no action"):
        env.step("left")
    env.close()
    assert inner.closed


def test_gymnasium_with_actions_of_text() -> None:
    class Text:
        def reset(self, seed=None, options=None):
            return "begin", {}

        def step(self, action):
            return action[::-1], 1, False, False, {}

    env = adapted(Text())
    assert env.reset(PROMPT, 1) == "begin"
    assert env.step("abc").text == "cba"


def test_skyrl_gym() -> None:
    class Sky:
        def init(self, prompt):
            self.prompt = prompt
            return [*prompt, {"role": "user", "content": "begin"}], {}

        def step(self, action):
            return {
                "observations": [{"role": "user", "content": f"not {action}"}],
                "reward": 0.25,
                "done": action == "end",
                "metadata": {},
            }

    inner = Sky()
    env = adapted(inner)
    assert env.reset(PROMPT, 0) == "begin"
    assert inner.prompt == [{"role": "user", "content": "How?"}]
    told = env.step("x")
    assert (told.text, told.reward, told.done) == ("not x", 0.25, False)
    assert env.step("end").done


class OpenEnv(BaseHTTPRequestHandler):
    asked: list = []  # noqa: RUF012

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        seen = body.get("action", {}).get("message", "ready")
        answer = {"observation": {"echoed_message": seen, "n": 1}, "reward": None, "done": False}
        if self.path == "/step":
            answer |= {"reward": 1.5, "done": seen == "bye"}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Silent."""


def test_openenv_over_http() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), OpenEnv)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        config = EnvironmentConfig(
            factory=f"openenv:http://127.0.0.1:{server.server_port}/",
            options={"observation": "echoed_message"},
        )
        env = resolve(config).make()
        assert env.reset(PROMPT, 2**31 + 3) == "ready"
        told = env.step("hello")
        assert (told.text, told.reward, told.done) == ("hello", 1.5, False)
        assert env.step("bye").done
        assert OpenEnv.asked[:2] == [("/reset", {"seed": 3}), ("/step", {"action": {"message": "hello"}})]
    finally:
        server.shutdown()
        server.server_close()


def test_openenv_takes_no_other_options() -> None:
    with pytest.raises(ValueError, match=r"environment.options: openenv:http://x takes .* got \['field'\]"):
        resolve(EnvironmentConfig(factory="openenv:http://x", options={"field": "a"}))


def test_an_object_of_no_known_shape_is_refused_by_its_verbs() -> None:
    class Odd:
        def step(self, turn): ...

        def begin(self): ...

    with pytest.raises(ValueError, match="got a Odd with begin, step"):
        adapted(Odd())
