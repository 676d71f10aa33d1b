"""Environments of other libraries, known by their verbs: written here as those libraries write them."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from websockets.protocol import State
from websockets.sync.client import connect
from websockets.sync.server import serve

from gspo_dist.config import EnvironmentConfig
from gspo_dist.environments.adapters import adapted, seed_of
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
    assert inner.seed == 227348944
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


class OpenEnvServer:
    """What OpenEnv's server says over its WebSocket: an environment per session, and `places` sessions."""

    def __init__(self, places) -> None:
        self.places, self.asked, self.lock = places, [], threading.Lock()
        self.server = serve(self.session, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.socket.getsockname()[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def session(self, socket) -> None:
        with self.lock:
            is_full = not self.places
            self.places -= not is_full
        if is_full:
            told = {"message": "no room", "code": "CAPACITY_REACHED"}
            socket.send(json.dumps({"type": "error", "data": told}))
        messages = () if is_full else map(json.loads, socket)
        for count, message in enumerate(messages, start=1):
            self.asked.append((socket.request.path, message))
            if message["type"] == "close":
                break
            seen = message["data"].get("message", "ready")
            data = {"observation": {"echoed_message": f"{seen} {count}"}, "reward": None, "done": False}
            if message["type"] == "step":
                data |= {"reward": 1.5, "done": seen == "bye"}
            socket.send(json.dumps({"type": "observation", "data": data}))
        with self.lock:
            self.places += not is_full


def wait_until(is_so) -> None:
    until = time.monotonic() + 100
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def openenv():
    made = []

    def start(places):
        made.append(OpenEnvServer(places))
        return made[-1]

    yield start
    for one in made:
        one.server.shutdown()


def make(server, **options):
    return resolve(EnvironmentConfig(factory=f"openenv:{server.url}/", options=options)).make


def test_openenv_has_a_session_for_every_episode(openenv) -> None:
    """Two of them take turns, and each goes on where it was."""
    server = openenv(places=2)
    one, other = (make(server, observation="echoed_message")() for _ in range(2))
    assert one.reset(PROMPT, 2**31 + 3) == "ready 1"
    assert other.reset(PROMPT, 5) == "ready 1"
    told = one.step("hello")
    assert (told.text, told.reward, told.done) == ("hello 2", 1.5, False)
    assert other.step("you").text == "you 2"
    assert one.step("bye").done
    seed = {"seed": seed_of(PROMPT) % 2**31}
    assert [path for path, _ in server.asked] == ["/ws"] * 5
    assert [message for _, message in server.asked[:3]] == [
        *[{"type": "reset", "data": seed}] * 2,
        {"type": "step", "data": {"message": "hello"}},
    ]
    one.close()
    other.close()
    wait_until(lambda: server.places == 2)
    assert [message for _, message in server.asked[5:]] == [{"type": "close"}] * 2


def test_openenv_tells_that_it_has_no_room(openenv) -> None:
    server = openenv(places=1)
    one, other, third = (make(server)() for _ in range(3))
    assert one.reset(PROMPT, 0) == '{"echoed_message": "ready 1"}'
    # It has closed before anything is asked of it.
    other.socket = connect(other.url)
    wait_until(lambda: other.socket.state is State.CLOSED)
    with pytest.raises(RuntimeError, match=r"CAPACITY_REACHED: no room; every .*max_concurrent_envs"):
        other.reset(PROMPT, 0)
    one.close()
    wait_until(lambda: server.places == 1)
    assert third.reset(PROMPT, 0) == '{"echoed_message": "ready 1"}'
    third.close()


def test_siblings_of_a_library_that_begins_by_a_seed_begin_alike() -> None:
    inner = [Gym(), Gym(), Gym()]
    asked = [(PROMPT, 1), (PROMPT, 2), (Prompt("p2", (1,), "How?"), 1)]
    for one, (prompt, seed) in zip(inner, asked, strict=True):
        adapted(one).reset(prompt, seed)
    assert inner[0].seed == inner[1].seed == seed_of(PROMPT) % 2**32 != inner[2].seed


def test_openenv_takes_no_other_options() -> None:
    with pytest.raises(ValueError, match=r"environment.options: openenv:http://x takes .* got \['field'\]"):
        resolve(EnvironmentConfig(factory="openenv:http://x", options={"field": "a"}))


def test_an_object_of_no_known_shape_is_refused_by_its_verbs() -> None:
    class Odd:
        def step(self, turn): ...

        def begin(self): ...

    with pytest.raises(ValueError, match="got a Odd with begin, step"):
        adapted(Odd())
