"""Dealing weighted items to bins: the longest first, each to the lightest bin (LPT)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def longest_first(
    weights: Sequence[int], bins: int, *, capacity: int | None = None
) -> list[list[int]] | None:
    """The items of each bin, as indices into `weights`.

    Ties go to the lower index and to the lower bin, so that the same input always gives the same bins.
    `capacity` is the most that a bin may hold. None is returned when the next item does not fit into the
    lightest bin.
    Example: weights [5, 3, 4, 2] in 2 bins give [[0, 3], [2, 1]], loads 7 and 7.
    Source: R. L. Graham, Bounds on Multiprocessing Timing Anomalies (1969): the largest load is at most 4/3
    of the smallest one that any dealing reaches.
    """
    heap = [(0, b) for b in range(bins)]
    members: list[list[int]] = [[] for _ in range(bins)]
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        load, b = heapq.heappop(heap)
        if capacity is not None and load + weights[i] > capacity:
            return None
        members[b].append(i)
        heapq.heappush(heap, (load + weights[i], b))
    return members
