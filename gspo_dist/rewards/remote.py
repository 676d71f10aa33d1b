"""Rewards that ask a service: a verifier over HTTP, and a model as judge over the OpenAI protocol.

Both are async, so that each reward process has up to 32 requests under way. A service that gives no usable
answer after all attempts is no verdict: it raises, and reward.error_reward says what then.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gspo_dist.checks import above, at_least
from gspo_dist.rewards.answers import is_number
from gspo_dist.rewards.exact import check_pattern
from gspo_dist.rewards.final_answer import after_thinking
from gspo_dist.sandbox.http import HttpError, post_json
from gspo_dist.types import Completion, Prompt

THREADS = ThreadPoolExecutor(32, thread_name_prefix="reward-request")

TEMPLATE = """Judge the answer to a question.

Question:
{question}

Reference answer:
{answer}

Answer to judge:
{completion}

Say in one sentence what is right or wrong. Then write the verdict on a line of its own:
[[1]] if the answer is right, [[0]] if it is wrong."""
VERDICT = r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]"


async def http(
    prompt: Prompt,
    completion: Completion,
    *,
    url: str,
    request_s: float = 10.0,
    attempts: int = 4,
    headers: Mapping[str, str] | None = None,
) -> tuple[float, dict[str, float]]:
    """POSTs {prompt, response, label, metadata} to `url`. It answers a number or an object with `score`.

    The object's other numbers are parts. request_s: deadline of one attempt. `attempts`, with growing pauses,
    on refused connections, deadlines, and answers such as 429 and 503.
    """
    message = {
        "prompt": prompt.text,
        "response": completion.text,
        "label": prompt.answer,
        "metadata": dict(prompt.metadata),
    }
    answer = await _posted(url, message, request_s, attempts, headers)
    if is_number(answer):
        return float(answer), {}
    if isinstance(answer, Mapping):
        for name in ("score", "reward"):
            if is_number(answer.get(name)):
                others = {key: value for key, value in answer.items() if key != name}
                parts = {str(k): float(v) for k, v in others.items() if isinstance(v, (bool, int, float))}
                return float(answer[name]), {k: v for k, v in parts.items() if math.isfinite(v)}
    raise HttpError(
        f"{url} must answer a number, or an object with a number as score: got {str(answer)[:200]}"
    )


async def judge(
    prompt: Prompt,
    completion: Completion,
    *,
    url: str,
    model: str,
    template: str = TEMPLATE,
    pattern: str = VERDICT,
    scale: float = 1.0,
    unreadable_reward: float = 0.0,
    max_tokens: int = 1024,
    temperature: float = 0.0,
    request_s: float = 60.0,
    attempts: int = 4,
    api_key_env: str = "OPENAI_API_KEY",
    extra: Mapping[str, Any] | None = None,
) -> tuple[float, dict[str, float]]:
    """Asks the model at `url` (its base, such as http://host:8000/v1) and reads a number from what it says.

    template: with {question}, {answer} and {completion}; what stands in <think> is never shown to the judge.
    pattern: its last match in the reply counts, divided by `scale` and kept between 0 and 1. A reply without
    one earns `unreadable_reward` and the part `unreadable` = 1. api_key_env: the environment variable that
    holds the key, if there is one. extra: further fields of the request.
    """
    filled = {
        "question": prompt.text,
        "answer": str(prompt.answer),
        "completion": after_thinking(completion.text),
    }
    # One pass: what a completion writes in braces is not filled in.
    content = re.sub(r"\{(question|answer|completion)\}", lambda match: filled[match.group(1)], template)
    message = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": temperature,
        **(extra or {}),
    }
    key = os.environ.get(api_key_env)
    headers = {"Authorization": f"Bearer {key}"} if key else None
    answer = await _posted(url.rstrip("/") + "/chat/completions", message, request_s, attempts, headers)
    try:
        reply = after_thinking(str(answer["choices"][0]["message"]["content"] or ""))
    except (KeyError, IndexError, TypeError) as error:
        raise HttpError(f"{url} must answer with choices: got {str(answer)[:200]}") from error
    found = re.findall(pattern, reply)
    try:
        verdict = float(found[-1] if isinstance(found[-1], str) else found[-1][0])
    except (IndexError, ValueError):
        return unreadable_reward, {"unreadable": 1.0}
    return min(1.0, max(0.0, verdict / scale)), {"unreadable": 0.0}


async def _posted(
    url: str, message: Any, request_s: float, attempts: int, headers: Mapping[str, str] | None
) -> Any:
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(THREADS, lambda: post_json(url, message, request_s, attempts, headers))


def check_http(*, url: str, request_s: float, attempts: int, headers: Mapping[str, str] | None) -> None:
    """Raises ValueError for values without meaning. The service is not asked: it may start later."""
    if not isinstance(url, str) or not re.match(r"https?://\S+$", url):
        raise ValueError(f"reward.options.url must be an address that begins with http: got {url!r}")
    above("reward.options.request_s", request_s, 0)
    at_least("reward.options.attempts", attempts, 1)
    if headers is not None and not isinstance(headers, Mapping):
        raise ValueError(f"reward.options.headers must be a mapping: got {headers!r}")


def check_judge(
    *,
    url: str,
    template: str,
    pattern: str,
    scale: float,
    max_tokens: int,
    temperature: float,
    request_s: float,
    attempts: int,
    **unchecked: Any,
) -> None:
    """Raises ValueError for values without meaning. The service is not asked: it may start later."""
    check_http(url=url, request_s=request_s, attempts=attempts, headers=None)
    if "{completion}" not in template:
        raise ValueError(f"reward.options.template must have {{completion}}: got {template[:80]!r}")
    if check_pattern(pattern).groups < 1:
        raise ValueError(f"reward.options.pattern must have a group around the number: got {pattern!r}")
    above("reward.options.scale", scale, 0)
    at_least("reward.options.max_tokens", max_tokens, 1)
    at_least("reward.options.temperature", temperature, 0)
