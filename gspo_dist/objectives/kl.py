"""Estimators of KL(pi || ref) per token from a sample of pi, and what they do as a loss.

With d = log pi(y) - log ref(y) in nats, y ~ pi, and g = grad log pi(y). Exact facts, on policy:

    k1 = d
        value     unbiased, of either sign
        gradient  g, whose mean over samples of pi is zero: as a loss it penalises nothing
    k2 = d^2 / 2
        value     biased, never negative
        gradient  d g, whose mean is exactly that of KL(pi || ref)
    k3 = exp(-d) - 1 + d
        value     unbiased, never negative
        gradient  (1 - exp(-d)) g, whose mean is that of the other KL, KL(ref || pi)

So k1 and k3 are for reading, k2 and k3 for a loss.
Source: J. Schulman, "Approximating KL divergence" (2020); k3 as a loss: arXiv 2402.03300 eq 4.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gspo_dist.objectives.surrogate import LOG_RATIO_LIMIT


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log ref, [N] nats."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2, [N]."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ref/pi - 1 - log(ref/pi), [N]; the exponent is capped at 20."""
    log_inverse = ref_logprobs - logprobs
    # expm1: exp(x) - 1 would lose all digits where the policies nearly agree.
    return log_inverse.clamp(max=LOG_RATIO_LIMIT).expm1() - log_inverse


KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""Estimator by name."""
