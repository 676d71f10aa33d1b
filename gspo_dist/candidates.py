"""The likeliest tokens at each place of a completion, with the engine's log-probs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Candidates:
    """The K likeliest tokens at each of N places, by the distribution that was sampled from.

    Example: with K = 2 and probabilities 0.6, 0.3 and 0.1 of the tokens 7, 4 and 9, the ids of a place are
    [7, 4] and its log-probs [log 0.6, log 0.3].
    """

    ids: np.ndarray
    """[N, K] int32, the likeliest first."""
    logprobs: np.ndarray
    """[N, K] float32, in nats. -inf where there is none: a vocabulary of fewer than K tokens, a token that
    top-p cut away, a place that no engine sampled."""

    @staticmethod
    def none(places: int, k: int) -> Candidates:
        """Places without a candidate: an environment's tokens."""
        return Candidates(np.zeros((places, k), np.int32), np.full((places, k), -np.inf, np.float32))

    @staticmethod
    def join(parts: Sequence[tuple[int, Candidates | None]]) -> Candidates | None:
        """Parts (number of places, candidates or None) end to end. None where no part has any."""
        k = max((part.width for _, part in parts if part is not None), default=None)
        if k is None:
            return None
        own = [Candidates.none(places, k) if part is None else part for places, part in parts]
        return Candidates(np.concatenate([c.ids for c in own]), np.concatenate([c.logprobs for c in own]))

    @property
    def width(self) -> int:
        """K."""
        return int(self.ids.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, places: slice) -> Candidates:
        return Candidates(self.ids[places], self.logprobs[places])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as bytes, as a completion is."""
        ids, logprobs = np.asarray(self.ids, np.int32), np.asarray(self.logprobs, np.float32)
        return _candidates, (ids.tobytes(), logprobs.tobytes(), self.width)


def _candidates(ids: bytes, logprobs: bytes, k: int) -> Candidates:
    """What `Candidates.__reduce__` wrote."""
    return Candidates(
        np.frombuffer(ids, np.int32).reshape(-1, k), np.frombuffer(logprobs, np.float32).reshape(-1, k)
    )
