"""Small terms of a reward, for weighted sums: a pattern, a format, a length, DAPO's overlong penalty."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gspo_dist.checks import above, at_least, choose, true_or_false
from gspo_dist.rewards.exact import check_pattern
from gspo_dist.types import Completion, Prompt

TAGS = ("think", "answer")


def regex(prompt: Prompt, completion: Completion, *, pattern: str, whole: bool = False) -> float:
    """1 when the pattern is found in the completion (`whole`: when it is all of it), else 0."""
    search = re.fullmatch if whole else re.search
    return float(search(pattern, completion.text, re.DOTALL) is not None)


def check_regex(*, pattern: str, whole: bool) -> None:
    check_pattern(pattern)
    true_or_false("reward.options.whole", whole)


def format_tags(
    prompt: Prompt, completion: Completion, *, tags: Sequence[str] = TAGS, shares: bool = False
) -> float:
    """1 when the completion is <think>...</think> and <answer>...</answer>, each once and in order, else 0.

    shares: a share for each opening or closing tag that occurs once instead. Empty tags earn either, so use
    it with a small weight, or as the gate of a weighted sum.
    """
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    once = [completion.text.count(mark) == 1 for mark in marks]
    if shares:
        return sum(once) / len(once)
    inside = r"\s*".join(f"<{re.escape(tag)}>.*</{re.escape(tag)}>" for tag in tags)
    return float(all(once) and re.fullmatch(rf"\s*{inside}\s*", completion.text, re.DOTALL) is not None)


def check_format_tags(*, tags: Sequence[str], shares: bool) -> None:
    if (
        isinstance(tags, str)
        or not tags
        or not all(isinstance(t, str) and re.fullmatch(r"\w+", t) for t in tags)
    ):
        raise ValueError(f"reward.options.tags must be a list of names: got {tags!r}")
    true_or_false("reward.options.shares", shares)


UNITS = ("tokens", "words", "characters")


def length(
    prompt: Prompt, completion: Completion, *, most: int, least: int = 0, unit: str = "tokens"
) -> float:
    """1 when the completion has from `least` to `most` tokens (or words, or characters), else 0."""
    counts = {
        "tokens": len(completion),
        "words": len(completion.text.split()),
        "characters": len(completion.text),
    }
    return float(least <= counts[unit] <= most)


def check_length(*, most: int, least: int, unit: str) -> None:
    at_least("reward.options.least", least, 0)
    at_least("reward.options.most", most, max(least, 1))
    choose("reward.options.unit", unit, UNITS)


def overlong(prompt: Prompt, completion: Completion, *, max_tokens: int, cache: int) -> float:
    """DAPO's soft penalty (arXiv 2503.14476, eq. 13) on the completion's N tokens, between 0 and -1.

    0 up to max_tokens - cache, (max_tokens - cache - N) / cache up to max_tokens, -1 beyond.
    Example: max_tokens 20480 and cache 4096 give 0 for 16384 tokens, -0.5 for 18432, -1 for 20480.
    """
    return -min(1.0, max(0.0, (len(completion) - (max_tokens - cache)) / cache))


def check_overlong(*, max_tokens: int, cache: int) -> None:
    above("reward.options.cache", cache, 0)
    at_least("reward.options.max_tokens", max_tokens, cache)
