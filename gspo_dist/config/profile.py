"""A look at where the learner's time and memory go."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ProfileConfig:
    """Steps in which torch's profiler records the learner's ranks. No run stops for it."""

    steps: list[int] = field(default_factory=list)
    """Steps to record, each into a folder of its own: `run_dir/profile/step-000003/`. Empty: none."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Learner ranks that record. A trace of a large model has hundreds of megabytes, so a few are plenty."""

    def __post_init__(self) -> None:
        for name, values, low in (("steps", self.steps, 1), ("ranks", self.ranks, 0)):
            wrong = [v for v in values if not isinstance(v, int) or isinstance(v, bool) or v < low]
            if wrong:
                raise ValueError(
                    f"profile.{name} must hold whole numbers from {low} on: got {wrong[0]!r} in {values}"
                )
