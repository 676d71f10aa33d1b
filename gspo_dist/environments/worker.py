"""What runs in an environment process, which its parent (pool.py) can end.

    parent                         worker
    ------                         ------
    (EnvironmentConfig, form)  ->  imports the environment
                               <-  Answer("ready", facts) or Answer("refused", why), once
    [Call or End, ...]             a Call: plays it again as far as it is not here, and takes the turn
        (each pickled)         <-  Answer("told", Told), Answer("diverged", why) or Answer("failed", why)
                                   an End: forgets its episodes, without an answer

An episode lives here from its reset to its end. One that is not here, because its process was ended or the
run was resumed, is made again: from the state that the environment gave, else by its recorded turns. Where
neither can be done it has diverged, and its parent begins it again.
"""

from __future__ import annotations

import json
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from gspo_dist.environments.protocol import Environment, Observation
from gspo_dist.rewards.worker import Answer
from gspo_dist.rewards.worker import main as serve_connection
from gspo_dist.types import Prompt, WorkKey

EPISODES = 4096
"""Most episodes that a process holds. Beyond, the oldest is forgotten, and made again when it goes on."""


@dataclass(frozen=True)
class Call:
    """One question to an environment, with all that is needed to make the episode again."""

    key: WorkKey
    prompt: Prompt
    seed: int
    turn: str | None
    """What the policy said; None asks for a reset."""
    history: tuple[tuple[str, str], ...] = ()
    """(said, answer) of the turns so far; the first is the reset's."""
    state: str | None = None
    """What the environment gave after the last of them, as JSON."""


class End(NamedTuple):
    """The episodes of these keys are over."""

    keys: tuple[WorkKey, ...]


class Told(NamedTuple):
    """What an environment answered."""

    observation: Observation
    state: str | None
    """The environment's state after it, as JSON, where it has one."""
    is_replayed: bool
    """Whether the episode was made again by its turns before it answered."""


class Diverged(RuntimeError):
    """An episode cannot be made again: its turns are answered otherwise than before, or not at all."""


@dataclass
class Live:
    """An episode in this process."""

    env: Environment
    turns: int
    """How many of its turns it has seen, the reset included."""


class Episodes:
    """The episodes of this process."""

    def __init__(self, make: Callable[[], Environment], characters: int) -> None:
        """characters: of an answer that are kept."""
        self.make, self.characters = make, characters
        self.live: dict[WorkKey, Live] = {}

    def take(self, call: Call) -> Told:
        """The answer. Raises what the environment raises, and Diverged."""
        if call.turn is None:
            self.end((call.key,))
            episode = self._begin(call.key)
            text = plain(episode.env.reset(call.prompt, call.seed), "reset")
            return self._told(episode, Observation(text))
        episode, is_replayed = self._found(call)
        observation = checked(episode.env.step(call.turn))
        return self._told(episode, observation, is_replayed)

    def _found(self, call: Call) -> tuple[Live, bool]:
        """The episode at the place of the call, made again where it is not here."""
        episode = self.live.get(call.key)
        if episode is not None and episode.turns == len(call.history):
            return episode, False
        episode = self._restored(call)
        if episode is not None:
            return episode, False
        self.end((call.key,))
        episode = self._begin(call.key)
        try:
            self._replay(episode.env, call)
        except Exception as error:
            raise Diverged(f"{type(error).__name__}: {error}") from error
        episode.turns = len(call.history)
        return episode, True

    def _restored(self, call: Call) -> Live | None:
        """The episode by the state that it gave. None where it gave none, or does not take it up."""
        if call.state is None:
            return None
        self.end((call.key,))
        episode = self._begin(call.key)
        try:
            episode.env.load_state_dict(json.loads(call.state))  # type: ignore[attr-defined]
        except Exception:
            traceback.print_exc()  # its turns are played again instead, which may be slow
            return None
        episode.turns = len(call.history)
        return episode

    def _replay(self, env: Environment, call: Call) -> None:
        for number, (said, answer) in enumerate(call.history):
            if number:
                told = checked(env.step(said)).text
            else:
                told = plain(env.reset(call.prompt, call.seed), "reset")
            if not begins_with(told, answer):
                raise ValueError(f"turn {number} answered {told[:80]!r} and not {answer[:80]!r} as before")

    def _begin(self, key: WorkKey) -> Live:
        if len(self.live) >= EPISODES:
            self.end((next(iter(self.live)),))
        self.live[key] = Live(self.make(), 0)
        return self.live[key]

    def _told(self, episode: Live, observation: Observation, is_replayed: bool = False) -> Told:
        episode.turns += 1
        observation = replace(observation, text=observation.text[: self.characters])
        state = getattr(episode.env, "state_dict", None)
        return Told(observation, json.dumps(state()) if callable(state) else None, is_replayed)

    def end(self, keys: tuple[WorkKey, ...]) -> None:
        for key in keys:
            episode = self.live.pop(key, None)
            if episode is not None and callable(getattr(episode.env, "close", None)):
                episode.env.close()  # type: ignore[attr-defined]


def checked(told: Any) -> Observation:
    """What `step` returned. TypeError or ValueError: it is no Observation, its text is none, or its reward is
    no number.
    """
    if not isinstance(told, Observation):
        raise TypeError(f"step must return an Observation: got {type(told).__name__}")
    numbers = {"reward": told.reward, **told.parts}
    for name, value in numbers.items():
        if not abs(float(value)) < float("inf"):
            raise ValueError(f"step must give finite numbers: got {value!r} as {name}")
    text = plain(told.text, "step")
    return Observation(
        text, float(told.reward), bool(told.done), {str(k): float(v) for k, v in told.parts.items()}
    )


def plain(text: Any, verb: str) -> str:
    """What an environment says, as text that has a UTF-8 form; "" for None. TypeError: it is no text.

    Half of a pair of surrogates, as JSON may spell one, has no such form. It becomes a question mark.
    """
    if text is None:
        return ""
    if not isinstance(text, str):
        raise TypeError(f"{verb} must answer with a text: got {type(text).__name__}")
    return text.encode("utf-8", "replace").decode("utf-8")


def begins_with(told: str, answer: str) -> bool:
    """Whether an answer is the one that was recorded.

    That may have been cut at its end, and special tokens in it have got a space (rollout/turns.py, `cut`).
    """
    return told.replace(" ", "").startswith(answer.replace(" ", ""))


def serve(connection: Connection) -> None:
    """Answers a parent until it closes the connection."""
    from gspo_dist.environments.resolve import resolve

    try:
        config, form = connection.recv()
        maker = resolve(config, form)
    except (ValueError, TypeError) as error:
        connection.send(Answer("refused", str(error)))
        return
    connection.send(Answer("ready", maker.facts))
    episodes = Episodes(maker.make, config.characters_per_answer)
    while True:
        try:
            messages = [pickle.loads(part) for part in connection.recv()]
        except (EOFError, OSError):
            return  # the parent has closed the connection, or is gone
        for message in messages:
            answer = answered(episodes, message)
            try:
                if answer is not None:
                    connection.send(answer)
            except OSError:
                return  # the parent went while this was answered


def answered(episodes: Episodes, message: Call | End) -> Answer | None:
    """The answer to a message; None to an End, also where closing fails."""
    if isinstance(message, End):
        try:
            episodes.end(message.keys)
        except (Exception, SystemExit):
            traceback.print_exc()
        return None
    try:
        return Answer("told", episodes.take(message))
    except Diverged as error:
        return Answer("diverged", str(error))
    except (Exception, SystemExit) as error:
        return Answer("failed", f"{type(error).__name__}: {error}", traceback.format_exc())


def main(descriptor: int, parent: int) -> None:
    """What the parent starts (rewards/pool.py, `Worker`)."""
    serve_connection(descriptor, parent, serve)
