"""How a completion is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gspo_dist.checks import above, at_least


@dataclass(frozen=True)
class RewardConfig:
    """How a completion is judged."""

    function: str = "exact_match"
    """exact_match | math | code | regex | format | length | overlong | weighted_sum | by_source | http |
    judge, or a function of yours: package.module:name, or path/to/file.py:name."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function."""
    workers: int = 1
    """Reward processes. Each judges one rollout at a time; of an async or batched reward, up to 32."""
    timeout_s: float = 30.0
    """Deadline for one rollout's reward. Its process is ended then, and another one started."""
    timeout_reward: float | None = 0.0
    """Reward of a rollout whose reward misses the deadline (counted in reward/timeout_fraction) or ends its
    process (reward/crash_fraction). Null stops the run instead."""
    error_reward: float | None = None
    """Reward of a rollout whose reward raises or gives no number (counted in reward/error_fraction), such as
    one whose service is down. Null, the default, stops the run instead; so do 100 of them in a row."""

    def __post_init__(self) -> None:
        at_least("reward.workers", self.workers, 1)
        above("reward.timeout_s", self.timeout_s, 0)
