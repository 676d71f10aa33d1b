"""A reward of one's own: the right sum earns 1, the right last digit a little. Its parts are logged.

    gspo train experiment=quickstart reward=function \
      reward.function=gspo_dist.examples.digit_reward:score +reward.options.last_digit=0.2

A copy is named by its path: `reward.function=my_rewards.py:score`. The parts appear as reward/answered,
reward/right and reward/last_digit_right: means over the rollouts of a step.
"""

from __future__ import annotations

import re

from gspo_dist.types import Completion, Prompt

ANSWER = re.compile(r"#(\d+)$")
"""The quickstart's solutions end with the answer behind a mark: "7+5=12,4+8+1=13#132"."""


def score(
    prompt: Prompt, completion: Completion, *, last_digit: float = 0.1
) -> tuple[float, dict[str, float]]:
    """(reward, parts). It reads nothing else, so that a resumed run gives the same rewards.

    prompt.answer is the `answer` of the data, and completion.text is what the model wrote. An error here
    stops the run with the rollout's name. A call longer than reward.timeout_s earns reward.timeout_reward.
    """
    found = ANSWER.search(completion.text)
    if found is None:
        return 0.0, {"answered": 0.0, "right": 0.0, "last_digit_right": 0.0}
    right = found.group(1) == str(prompt.answer)
    close = found.group(1)[-1] == str(prompt.answer)[-1]
    reward = 1.0 if right else last_digit * close
    return reward, {"answered": 1.0, "right": float(right), "last_digit_right": float(close)}
