"""Environments of other libraries, known by their verbs and wrapped: none of the libraries is imported.

* this project's: reset(prompt, seed), step(turn) -> Observation.
* gymnasium-like: reset(seed=) -> (observation, info), step(action) -> five values. The action is the turn's
  text, or the last whole number in it where the action space counts its actions (`n`).
* skyrl-gym-like: init(messages) -> (messages, info), step(turn) -> {observations, reward, done}.
* openenv:URL: POST /reset, POST /step {"action": {FIELD: turn}} -> {observation, reward, done}.
"""

from __future__ import annotations

import inspect
import json
import re
import urllib.request
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
        observation, _ = self.env.reset(seed=seed % 2**32)
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
    """One episode of a server that speaks OpenEnv's HTTP form. It serves one episode at a time."""

    def __init__(self, url: str, *, action: str = "message", observation: str | None = None) -> None:
        """action: the action's field that takes the turn. observation: the observation's field that is the
        answer; None is all of it, as JSON.
        """
        self.url, self.action, self.observation = url.rstrip("/"), action, observation

    def reset(self, prompt: Prompt, seed: int) -> str:
        return self._told(self._post("reset", {"seed": seed % 2**31})).text

    def step(self, turn: str) -> Observation:
        return self._told(self._post("step", {"action": {self.action: turn}}))

    def _post(self, verb: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        request = urllib.request.Request(
            f"{self.url}/{verb}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        # Without a deadline here: the parent of this process has one, and ends it.
        with urllib.request.urlopen(request) as answer:
            return dict(json.load(answer))

    def _told(self, answer: Mapping[str, Any]) -> Observation:
        seen = answer["observation"]
        text = _text(seen if self.observation is None else seen[self.observation])
        return Observation(text, float(answer.get("reward") or 0.0), bool(answer.get("done")))


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
