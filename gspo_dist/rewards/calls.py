"""The three ways to call a reward: one completion at a time, async, or a list at a time."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from gspo_dist.types import Completion, Prompt


class Reward(Protocol):
    """Judges one completion: the reward alone, or the reward with its named parts (logged, not trained on).

    A function of (prompt, completion) with its options as keywords; it must depend on nothing else, so that
    reward processes can run it in any order, and a resumed run gives the same rewards.

    An `async def` of the same form is called for up to 32 completions at once in each reward process. A
    function, plain or async, whose parameters are called (prompts, completions) gets lists, and returns a
    list of verdicts.
    """

    def __call__(
        self, prompt: Prompt, completion: Completion
    ) -> float | tuple[float, Mapping[str, float]]: ...


PARAMETERS, BATCHED = ("prompt", "completion"), ("prompts", "completions")


def is_batched(function: Callable[..., Any]) -> bool:
    """Whether it takes lists: its first two parameters say so by their names."""
    return tuple(inspect.signature(function).parameters)[:2] == BATCHED


def is_async(function: Callable[..., Any]) -> bool:
    """Whether it is an async def, or an object whose __call__ is one."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )


def as_one(function: Callable[..., Any]) -> Reward:
    """A plain function of one completion, whatever the kind of `function`."""
    if not is_batched(function) and not is_async(function):
        return function

    def one(prompt: Prompt, completion: Completion) -> Any:
        (verdict,) = verdicts(function, [prompt], [completion])
        if isinstance(verdict, BaseException):
            raise verdict
        return verdict

    return one


def verdicts(
    function: Callable[..., Any], prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> Iterator[Any]:
    """What the function gives for each, in order, each as soon as it is there; an exception in its place.

    Raises what a batched function raises: then there is no verdict on any.
    """
    if is_batched(function):
        found = function(list(prompts), list(completions))
        found = asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found
        if not isinstance(found, (list, tuple)) or len(found) != len(prompts):
            got = f"{len(found)}" if isinstance(found, (list, tuple)) else type(found).__name__
            raise ValueError(f"a batched reward must return a list of {len(prompts)} verdicts: got {got}")
        yield from found
    elif is_async(function):
        yield from _concurrent(function, prompts, completions)
    else:
        for prompt, completion in zip(prompts, completions, strict=True):
            try:
                verdict = function(prompt, completion)
            except (Exception, SystemExit) as error:
                verdict = error
            yield verdict


async def _awaited(found: Awaitable[Any]) -> Any:
    return await found


def _concurrent(
    function: Callable[..., Awaitable[Any]], prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> Iterator[Any]:
    """All at once; each verdict is given when it and those before it are there."""
    loop = asyncio.new_event_loop()
    try:
        tasks = [
            loop.create_task(_settled(function, prompt, completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        for task in tasks:
            yield loop.run_until_complete(task)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _settled(function: Callable[..., Awaitable[Any]], prompt: Prompt, completion: Completion) -> Any:
    try:
        return await function(prompt, completion)
    except (Exception, SystemExit) as error:
        return error
