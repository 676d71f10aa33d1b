"""A reward of one's own that judges a list at a time: for a reward model, or a verifier with a batch call.

    gspo train experiment=quickstart reward=function \
      reward.function=gspo_dist.examples.batched_reward:near

Its parameters are called (prompts, completions), which is how a batched reward is known. It gets up to 32 at
a time, and returns as many verdicts. `near_async` is the same for one completion, as an `async def`: up to 32
wait at once in each reward process, which suits anything that asks a service.

    gspo train experiment=quickstart reward=function \
      reward.function=gspo_dist.examples.batched_reward:near_async
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from gspo_dist.types import Completion, Prompt


def near(
    prompts: Sequence[Prompt], completions: Sequence[Completion], *, width: float = 10.0
) -> list[tuple[float, dict[str, float]]]:
    """1 for the right sum, less the further off: exp(-distance / width). Computed for all of them at once."""
    wanted = np.array([float(prompt.answer) for prompt in prompts])
    found = np.array([number_after_mark(completion.text) for completion in completions])
    distances = np.abs(found - wanted)
    rewards = np.where(np.isnan(distances), 0.0, np.exp(-np.nan_to_num(distances) / width))
    answered = ~np.isnan(found)
    return [(float(reward), {"answered": float(one)}) for reward, one in zip(rewards, answered, strict=True)]


async def near_async(
    prompt: Prompt, completion: Completion, *, width: float = 10.0
) -> tuple[float, dict[str, float]]:
    """The same for one completion; the pause stands for a service that takes its time."""
    await asyncio.sleep(0.01)
    return near([prompt], [completion], width=width)[0]


def number_after_mark(text: str) -> float:
    """The number after the last # of "7+5=12,1#12"; nan without one."""
    _, mark, number = text.rpartition("#")
    return float(number) if mark and number.isascii() and number.isdigit() else float("nan")
