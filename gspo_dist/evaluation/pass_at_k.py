"""pass@k without bias: the chance that at least one of k completions is right, from n >= k of them."""

from __future__ import annotations

from math import comb


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - correct, k) / C(n, k): the share of k-subsets of the n completions that hold a right one.

    arXiv 2107.03374, equation 1, in exact integers up to the one division. Raises ValueError unless
    0 <= correct <= n and 1 <= k <= n.

    Example: n 4, correct 1, k 2. Three of the six pairs hold the right one: 0.5.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"pass@k needs 0 <= correct <= n: got correct={correct}, n={n}")
    if not 1 <= k <= n:
        raise ValueError(
            f"pass@k needs 1 <= k <= n: got k={k} with n={n} completions; sample more or lower k"
        )
    subsets = comb(n, k)
    return (subsets - comb(n - correct, k)) / subsets
