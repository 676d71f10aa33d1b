"""Score centering (Marek and Ryabinin, arXiv 2609.20807): the mean score under the engine's distribution.

Where the engine samples from q and the learner's policy is pi, the mean of grad log pi over q is not 0. What
a policy gradient then adds in every step is drift: it pulls pi towards q, whatever the reward. Its mean,

    C = sum_v q(v) log pi(v)        with q fixed,

taken from log pi(y) before it is multiplied with the advantage, makes the mean of the score exactly 0.

An engine gives the likeliest K tokens only. The rest of its mass is spread as pi spreads its own:

    C = sum_{v in K} q(v) log pi(v) + (1 - sum_{v in K} q(v)) log(1 - sum_{v in K} pi(v))

whose gradient is that of sum_v q'(v) log pi(v), with q'(v) = (1 - q_K) sg[pi(v) / (1 - pi_K)] outside of K.
With the whole vocabulary the second term is 0.

Beside a truncated importance weight w(v) = sg[min(pi(v) / q(v), c)] the mean to take out is that of
w grad log pi (the paper's appendix A.2). q w = min(pi, c q) then stands for every q above, with the rest of
pi and q as one more token. With c without bound that is pi itself, whose mean score is 0: a full weight needs
no centring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gspo_dist.objectives.surrogate import LEAST_REST


def expected_score(engine: Tensor, learner: Tensor, weight_cap: float | None = None) -> tuple[Tensor, Tensor]:
    """C [N] with the gradient of `learner`, and 1 - q_K [N]: what the engine's likeliest tokens leave.

    engine [N, K]: the engine's log-probs of them, -inf where there is none. learner [N, K]: the learner's, of
    the same tokens. weight_cap: c of the weight beside it. None: no weight.

    Example: q = (0.6, 0.3) and pi = (0.5, 0.3): C = 0.6 log 0.5 + 0.3 log 0.3 + 0.1 log 0.2. With c = 1 it is
    0.5 log 0.5 + 0.3 log 0.3 + 0.1 log 0.2.
    """
    known = torch.isfinite(engine)
    q = engine.detach().double().exp()
    pi = learner.masked_fill(~known, -torch.inf).double().exp()
    rest = (1.0 - q.sum(1)).clamp(min=0.0)
    rest_of_pi = (1.0 - pi.sum(1)).clamp(min=LEAST_REST)
    weighed, weighed_rest = q, rest
    if weight_cap is not None:
        weighed = torch.minimum(pi.detach(), weight_cap * q)
        weighed_rest = torch.minimum(rest_of_pi.detach(), weight_cap * rest)
    # masked_fill and not a product with 0: the learner's number of a token that is none means nothing.
    inside = (weighed * learner.double()).masked_fill(~known, 0.0).sum(1)
    return (inside + weighed_rest * rest_of_pi.log()).to(learner.dtype), rest.to(learner.dtype)
