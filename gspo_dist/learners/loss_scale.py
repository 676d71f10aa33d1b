"""The loss scale of float16, the same on every backend.

float16 has ten bits of mantissa where bfloat16 has seven, and a narrow range: 6e-8 to 65,504. Gradients of a
policy's loss are mostly smaller than that. So the loss is multiplied by a power of two before the backward
pass, and the float32 gradients are divided by it again before anything reads them. Both are exact. A gradient
that leaves the range is inf: that optimiser step is skipped, and the scale halves. After `WINDOW` steps
without one it doubles.

Micikevicius et al., Mixed Precision Training (arXiv 1710.03740), section 3.2. FP16 against the mismatch of
engine and learner: arXiv 2510.26788.
"""

from __future__ import annotations

from typing import Any

import torch

WINDOW = 100
"""Steps without an overflow after which the scale doubles. Pre-training takes 1,000, more than many RL runs
have."""
LEAST = 1.0
"""The scale never falls below. Gradients that overflow there are no matter of scale."""


class LossScale:
    """One learner's scale, at its value before the next backward pass."""

    def __init__(self, initial: float) -> None:
        """initial: a power of two."""
        self.value = initial
        self.clean = 0
        """Steps since it changed."""

    @staticmethod
    def of(precision: str, initial: float) -> LossScale | None:
        """The scale of a precision; None where none is needed."""
        return LossScale(initial) if precision == "fp16" else None

    def apply(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss that is differentiated."""
        return loss * self.value

    def update(self, overflow: bool) -> None:
        """After every optimiser step, taken or skipped. Example: 8, an overflow, 100 others -> 8, 4, 8."""
        self.clean = 0 if overflow else self.clean + 1
        if overflow:
            self.value = max(LEAST, self.value / 2)
        elif self.clean == WINDOW:
            self.value, self.clean = self.value * 2, 0

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs."""
        return {"value": self.value, "clean": self.clean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.value, self.clean = float(state["value"]), int(state["clean"])
