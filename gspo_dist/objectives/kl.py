"""Estimators of KL(pi || ref) per token from a sample of pi, and what their gradient is when used as a loss.

d = log pi(y) - log ref(y), y ~ pi. Exact facts, on policy:
k1 = d                 value unbiased, can be negative; as a loss its expected gradient is ZERO: it penalises
nothing k2 = d^2 / 2           value biased (>= 0); expected gradient is exactly that of KL(pi || ref)
k3 = exp(-d) - 1 + d   value unbiased, >= 0; expected gradient is that of the forward KL(ref || pi)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gspo_dist.objectives.losses import LOG_RATIO_LIMIT


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log ref, [N]."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2, [N]."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ref/pi - 1 - log(ref/pi), [N]; expm1 keeps it exact near zero, the exponent is capped at 20."""
    log_inverse = ref_logprobs - logprobs
    return log_inverse.clamp(max=LOG_RATIO_LIMIT).expm1() - log_inverse


KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
