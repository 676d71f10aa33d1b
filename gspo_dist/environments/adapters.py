"""Environments of other libraries, known by their verbs and wrapped: none of the libraries is imported.

* this project's: reset(prompt, seed), step(turn) -> Observation.
* gymnasium-like: reset(seed=) -> (observation, info), step(action) -> five values. The action is the turn's
  text, or the last whole number in it where the action space counts its actions (`n`).
* skyrl-gym-like: init(messages) -> (messages, info), step(turn) -> {observations, reward, done}.
* openenv:URL: a WebSocket at URL/ws; {type: reset | step, data} -> {observation, reward, done}.

Gymnasium's and OpenEnv's begin by a seed alone. It is the prompt's, so that siblings begin alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

from gspo_dist.environments.protocol import Environment, Observation
from gspo_dist.types import Prompt


def adapted(made: Any) -> Environment:
    """What a factory made, as an environment. ValueError: its verbs are those of none that is known."""
    if not callable(getattr(made, "step", None)):
        raise ValueError(_unknown(made))
    if callable(getattr(made, "init", None)):
        return SkyRLEpisode(made)
    reset = getattr(made, "reset", None)
    if not callable(reset):
        raise ValueError(_unknown(made))
    names = list(inspect.signature(reset).parameters)
    if "prompt" in names:
        return made
    if "seed" in names:
        return GymEpisode(made)
    raise ValueError(_unknown(made))


def _unknown(made: Any) -> str:
    verbs = [n for n in dir(made) if not n.startswith("_") and callable(getattr(made, n, None))]
    return (
        "environment.factory must make an object with reset(prompt, seed) and step(turn), or one with the "
        f"verbs of gymnasium or skyrl-gym: got a {type(made).__name__} with {', '.join(verbs) or 'no verbs'}"
    )


class GymEpisode:
    """One episode of a gymnasium-like environment."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def reset(self, prompt: Prompt, seed: int) -> str:
        # gymnasium 1.4 takes seeds below 2^32.
        observation, _ = self.env.reset(seed=seed_of(prompt) % 2**32)
        return _text(observation)

    def step(self, turn: str) -> Observation:
        observation, reward, terminated, truncated, _ = self.env.step(self._action(turn))
        return Observation(_text(observation), float(reward), bool(terminated or truncated))

    def _action(self, turn: str) -> Any:
        if getattr(getattr(self.env, "action_space", None), "n", None) is None:
            return turn
        numbers = re.findall(r"\d+", turn)
        if not numbers:
            raise ValueError(f"the turn names no action (a whole number): {turn[-80:]!r}")
        return int(numbers[-1])

    def close(self) -> None:
        if callable(getattr(self.env, "close", None)):
            self.env.close()


class SkyRLEpisode:
    """One episode of a skyrl-gym-like environment. Its messages are joined to one text."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def reset(self, prompt: Prompt, seed: int) -> str | None:
        asked = [{"role": "user", "content": prompt.text}]
        messages, _ = self.env.init(asked)
        # It returns the conversation that the policy shall see: the prompt is in the history already.
        return _joined(messages[1:] if list(messages[:1]) == asked else messages) or None

    def step(self, turn: str) -> Observation:
        told = self.env.step(turn)
        return Observation(_joined(told["observations"]), float(told["reward"]), bool(told["done"]))

    def close(self) -> None:
        if callable(getattr(self.env, "close", None)):
            self.env.close()


class OpenEnvEpisode:
    """One episode of a server that speaks OpenEnv's protocol: a session of its own, over a WebSocket.

    By plain HTTP a server makes another environment for each request (OpenEnv, 2026), or has one for
    everybody (2025), so that no episode has a second turn of its own.
    """

    def __init__(self, url: str, *, action: str = "message", observation: str | None = None) -> None:
        """action: the action's field that takes the turn. observation: the observation's field that is the
        answer; None is all of it, as JSON.
        """
        self.url = "ws" + url.rstrip("/").removesuffix("/ws").removeprefix("http").removeprefix("ws") + "/ws"
        self.action, self.observation = action, observation
        self.socket: Any = None

    def reset(self, prompt: Prompt, seed: int) -> str:
        return self._told(self._ask("reset", {"seed": seed_of(prompt) % 2**31})).text

    def step(self, turn: str) -> Observation:
        return self._told(self._ask("step", {self.action: turn}))

    def _ask(self, kind: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
        from websockets.exceptions import ConnectionClosed
        from websockets.sync.client import connect

        if self.socket is None:
            # Without a deadline for answers: the parent of this process has one, and ends it. The server
            # looks whether its clients are alive.
            self.socket = connect(
                self.url, max_size=None, compression=None, ping_interval=None, close_timeout=1.0
            )
        # A server without room says so and closes. What it has said is still to be read.
        with contextlib.suppress(ConnectionClosed):
            self.socket.send(json.dumps({"type": kind, "data": data}))
        answer = json.loads(self.socket.recv())
        if answer["type"] != "observation":
            raise RuntimeError(_refused(self.url, answer.get("data", {})))
        return dict(answer["data"])

    def _told(self, answer: Mapping[str, Any]) -> Observation:
        seen = answer["observation"]
        text = _text(seen if self.observation is None else seen[self.observation])
        return Observation(text, float(answer.get("reward") or 0.0), bool(answer.get("done")))

    def close(self) -> None:
        if self.socket is not None:
            with contextlib.suppress(Exception):
                self.socket.send(json.dumps({"type": "close"}))
            self.socket.close()


def _refused(url: str, data: Mapping[str, Any]) -> str:
    way_out = ""
    if data.get("code") == "CAPACITY_REACHED":
        way_out = "; every episode under way has a session: give the server's max_concurrent_envs as many"
    return f"OpenEnv at {url} answered with {data.get('code')}: {data.get('message')}{way_out}"


def seed_of(prompt: Prompt) -> int:
    """The seed of an environment that has nothing else to begin with: its prompt's.

    Siblings begin alike then, as the comparison in their group needs, and so does an evaluation's episode.
    """
    digest = hashlib.blake2b(f"{prompt.prompt_id} {prompt.text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _joined(messages: Any) -> str:
    if isinstance(messages, str):
        return messages
    return "\n".join(str(m["content"]) if isinstance(m, Mapping) else str(m) for m in messages)
